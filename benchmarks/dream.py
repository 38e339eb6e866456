"""DREAM's choice of the real batch, K images of a class of 5,000 by a ConvNet's features: plain, compiled, in bf16.

`plain` is `ddlib.match.sampler.representatives` as an uncompiled run has it, the tests' oracle; `compiled` as one with
`compile`, `compiled, bf16` with `sampling_precision` besides. `channels last` is what compiled runs did before, plain
features of weights that lie as the compiled steps want them. All take turns, on pictures of CIFAR-10's shape
(`benchmarks.kmeans`); a figure is the median over the turns, in seconds of the wall on a GPU, of the processor on a
CPU. `same images`: the share of K that plain chooses too.
"""

from __future__ import annotations

import copy
import time
from statistics import median

import torch

from benchmarks import show
from benchmarks.kmeans import pictures
from ddlib.core import generator
from ddlib.data.dataset import from_arrays
from ddlib.engine.meter import machine
from ddlib.match.sampler import representatives
from ddlib.nets.build import build
from ddlib.train.loop import compiled, lowered


def choice(
    images: int, k: int, device: torch.device, turns: int, backbone: str = "convnet"
) -> list[dict]:
    """A row for each way: median seconds, how many times faster than plain, and how many of plain's images it has."""
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    rng = generator(0, "bench", "dream")
    x = pictures(images, rng).mul(255).byte()
    y = torch.zeros(images, dtype=torch.int64)
    data = from_arrays(x, y, x[:1], y[:1], device=device)
    plain = build(backbone, data.shape, 10, rng).to(device).requires_grad_(False)
    last = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    ways = {
        "plain": (plain, None),
        "channels last": (last, None),
        "compiled": (last, compiled(last.features)),
        "compiled, bf16": (last, compiled(lowered(last.features, device, "bf16"))),
    }
    times: dict[str, list[float]] = {way: [] for way in ways}
    chosen = {}
    for turn in range(turns + 1):  # the first one warms up
        for way, (net, features) in ways.items():
            start = clock()
            chosen[way] = representatives(
                net, data, k, generator(turn, "bench", "dream"), features=features
            )
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times[way] += [clock() - start] if turn else []
    return [
        {
            "what": f"DREAM's choice, {images} images, K {k}: {way}",
            "seconds": median(times[way]),
            "times faster": median(a / b for a, b in zip(times["plain"], times[way], strict=True)),
            "same images": float(torch.isin(chosen[way], chosen["plain"]).float().mean()),
        }
        for way in ways
    ]


def main(device: torch.device, turns: int = 5) -> list[dict]:
    """Print the rows and return them."""
    rows = [{"what": f"DREAM's choice on {machine(device)}"}, *choice(5000, 128, device, turns)]
    for row in rows:
        show(row)
    return rows
