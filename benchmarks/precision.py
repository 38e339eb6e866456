"""Evaluation in float32 and in bf16: what it costs, and whether it changes the accuracy.

    python -m benchmarks.precision results/small/dm/*[0-9a-f].safetensors --networks 5 --out precision.json

Every set is evaluated both ways under its own protocol; network k has the same first weights, order and augmentation
in both, so accuracies are compared pair by pair. The rule, fixed before anything was measured: bf16 is neutral where
the mean difference is at most 0.3 points or two of its standard errors; a standard error above 1 point decides
nothing. The record is written after every set, and a set that it holds for so many networks is not evaluated again.
Without sets only the speed is measured, on random images of CIFAR-10's shape: the two precisions take
turns, and a figure is the median over the turns, in seconds of the wall on a GPU, of the processor on a CPU.
"""

from __future__ import annotations

import argparse
import json
import time
from functools import cache
from pathlib import Path
from statistics import fmean, median, stdev

import torch
import torch.nn.functional as F

from ddlib.core import checksum, generator, pick_device
from ddlib.data.dataset import Dataset
from ddlib.distilled import Synthetic
from ddlib.engine.meter import machine
from ddlib.engine.record import dataset_of, resolve_record
from ddlib.files import read_json, write_atomically
from ddlib.nets.build import build
from ddlib.train.evaluate import evaluate
from ddlib.train.loop import PRECISIONS, compiled, lowered

MARGIN = 0.3  # points of accuracy
NOISY = 1.0  # a standard error that decides nothing


def verdict(differences: list[float]) -> dict:
    """Mean and standard error of the paired differences (bf16 less float32, points), and what the rule says."""
    mean = fmean(differences)
    row = {"pairs": len(differences), "mean difference": mean}
    if len(differences) < 2:
        return row | {"verdict": "too few pairs"}
    error = stdev(differences) / len(differences) ** 0.5
    neutral = abs(mean) <= max(MARGIN, 2 * error)
    words = "inconclusive" if error > NOISY else "neutral" if neutral else "not neutral"
    return row | {"standard error": error, "verdict": words}


def both_ways(syn: Synthetic, data: Dataset, networks: int, turn: int) -> dict:
    """One set's accuracies and CPU seconds in each precision; odd turns begin with bf16."""
    run = resolve_record(syn.spec).run
    row: dict = {"checksum": checksum(syn.images, syn.labels), "accuracies": {}, "cpu seconds": {}}
    for precision in PRECISIONS[:: -1 if turn % 2 else 1]:
        start = time.process_time()
        result = evaluate(
            syn,
            data,
            networks=networks,
            seed=syn.spec["seed"],
            compile=run.compile,
            precision=precision,
        )
        row["cpu seconds"][precision] = round(time.process_time() - start, 3)
        row["accuracies"][precision] = list(result.accuracies)
    plain, low = (row["accuracies"][precision] for precision in PRECISIONS)
    return row | {"differences": [b - a for a, b in zip(plain, low, strict=True)]}


def speed(device: torch.device, turns: int, compile: bool, backbone: str = "convnet") -> list[dict]:
    """Seconds of a training step at IPC 10 (100 images) and of a pass over 1,000 images, in each precision."""
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    net = build(backbone, (3, 32, 32), 10).to(device)
    x = torch.randn(1000, 3, 32, 32, generator=generator(0, "bench")).to(device)
    y = torch.arange(100, device=device) % 10

    def step(forward) -> None:
        net.zero_grad(set_to_none=True)
        F.cross_entropy(forward(x[:100]), y).backward()

    @torch.no_grad()
    def test(forward) -> None:
        forward(x)

    wrap = compiled if compile else lambda function: function
    forwards = {name: wrap(lowered(net.forward, device, name)) for name in PRECISIONS}
    rows = []
    for what, work in (("training step, 100 images", step), ("1,000 test images", test)):
        times: dict[str, list[float]] = {name: [] for name in PRECISIONS}
        for turn in range(turns + 1):  # the first one warms up
            for name in PRECISIONS:
                start = clock()
                work(forwards[name])
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                times[name] += [clock() - start] if turn else []
        pairs = zip(*times.values(), strict=True)
        gain = median(plain / low for plain, low in pairs)
        row = {"what": what, "compiled": compile} | {n: median(t) for n, t in times.items()}
        rows.append(row | {"times faster": gain})
    return rows


@cache
def _data(facts: str, device: torch.device) -> Dataset:
    return dataset_of(resolve_record(json.loads(facts)), device)


def _data_of(syn: Synthetic, device: torch.device) -> Dataset:
    """The set's dataset, loaded once for all sets that look at it in the same way."""
    spec = {**syn.spec, "method": "random", "ipc": 1, "seed": 0}
    seen = ("resolution", "zca", "subset", "minival")
    spec["values"] = {key: syn.spec["values"][key] for key in seen if key in syn.spec["values"]}
    return _data(json.dumps(spec, sort_keys=True), device)


def main(words: list[str] | None = None) -> dict:
    """Measure, print and write the record; its path, sets and sizes are the command line's."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sets", nargs="*", type=Path, help="kept sets, NAME.safetensors")
    parser.add_argument("--networks", type=int, default=5)
    parser.add_argument("--turns", type=int, default=7, help="of the speed; 0 leaves it out")
    parser.add_argument("--compile", action="store_true", help="the speed of compiled networks")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(words)
    device = pick_device(args.device)
    kept = read_json(args.out, "benchmark", "delete it and run again") if args.out.is_file() else {}
    record = {"device": machine(device), "networks": args.networks}
    record["speed"] = kept.get("speed", [])
    if args.turns:
        record["speed"] = speed(device, args.turns, args.compile)
    same = kept.get("networks") == args.networks and kept.get("device") == record["device"]
    record["sets"] = dict(kept["sets"]) if same else {}
    for turn, path in enumerate(args.sets):
        syn = Synthetic.load(path)
        if record["sets"].get(path.stem, {}).get("checksum") != checksum(syn.images, syn.labels):
            data = _data_of(syn, device)
            record["sets"][path.stem] = both_ways(syn, data, args.networks, turn)
        _write(args.out, record)
    _write(args.out, record)
    print(json.dumps({key: value for key, value in record.items() if key != "sets"}, indent=1))
    return record


def _write(path: Path, record: dict) -> None:
    differences = [d for row in record["sets"].values() for d in row["differences"]]
    record |= verdict(differences) if differences else {}
    write_atomically(path, lambda temporary: temporary.write_text(json.dumps(record, indent=1)))


if __name__ == "__main__":
    main()
