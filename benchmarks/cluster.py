"""Two Ray workers on this machine, one thread each, beside the queue alone: `python -m benchmarks.cluster`.

Four runs of DM on the digits, some 50 s each, and eight experts of MTT, some 17 s each, by `ddlib queue` one after the
other and on the cluster. `times faster` counts from the first task to the last record; `with start` also what Ray takes
to start and end. `overhead` is what a run costs more than half its time alone: the workers' two cores share a cache and
a clock.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import ray
import torch

from benchmarks import show
from ddlib.config import Spec, resolve
from ddlib.engine import cluster, queue
from ddlib.engine.meter import commit, machine
from ddlib.files import environment, write_atomically

WORKERS = 2


def jobs(scale: float) -> dict[str, list[Spec]]:
    """What is timed; `scale` shortens it."""
    few = {"networks": 1, "eval_epochs": 1, "evaluations": 1, "snapshots": 0}
    steps = max(1, round(3000 * scale))
    runs = [resolve("dm", "digits", 1, "smoke", seed, iterations=steps, **few) for seed in range(4)]
    experts = {"experts": 8, "expert_total": max(1, round(240 * scale)), "expert_epochs": 1}
    experts |= {"max_start": 1, "iterations": 1, "syn_steps": 1}
    return {
        "four runs": runs,
        "eight experts": [resolve("mtt", "digits", 1, "smoke", **experts, **few)],
    }


def timed(work: Callable[[], bool]) -> float:
    start = time.perf_counter()
    if not work():
        raise SystemExit("a run failed, as said above")
    return time.perf_counter() - start


def compared(what: str, specs: list[Spec], folder: Path) -> dict:
    """Seconds of the rows alone and on the cluster, each in folders of its own."""
    row: dict = {"what": what}
    with environment(DDLIB_EXPERTS=str(folder / "experts")):
        here = queue.unpriced(specs, folder / "results")
        row["seconds"] = timed(lambda: queue.work_through(here, None, "cpu", folder / "results"))
    places = {"DDLIB_EXPERTS": folder / "ray experts", "DDLIB_CACHE": folder / "ray cache"}
    with environment(**{key: str(path) for key, path in places.items()}):
        there = queue.unpriced(specs, folder / "ray results")
        start = time.perf_counter()
        ray.init(num_cpus=WORKERS, include_dashboard=False, log_to_driver=False)
        row["seconds on Ray"] = timed(
            lambda: cluster.work_through(there, None, None, "cpu", folder / "ray results")
        )
        ray.shutdown()
        row["with start"] = time.perf_counter() - start
    row["times faster"] = row["seconds"] / row["seconds on Ray"]
    row["overhead"] = WORKERS * row["seconds on Ray"] / row["seconds"] - 1
    return row


def main(words: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cluster", description=__doc__)
    parser.add_argument("--out", type=Path, help="write the rows as JSON to this file")
    parser.add_argument("--scale", type=float, default=1.0, help="shortens the work; default: 1")
    args = parser.parse_args(words)
    os.environ["OMP_NUM_THREADS"] = "1"
    rows: list[dict] = [{"device": machine(torch.device("cpu")), "commit": commit()}]
    with TemporaryDirectory() as folder:
        for what, specs in jobs(args.scale).items():
            rows.append(compared(what, specs, Path(folder) / what))
            show(rows[-1])
    if args.out:
        write_atomically(args.out, lambda path: path.write_text(json.dumps(rows, indent=1)))
    return rows


if __name__ == "__main__":
    main()
