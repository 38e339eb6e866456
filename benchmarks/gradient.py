"""One image step of gradient matching, all classes, against the plain loop over classes: `make bench`.

The plain loop is what IDC's released code does: class by class, gradients of all parameters, a backward pass into the
network too, and an optimiser over all images that steps once per class: `idc_images`, the tests' oracle. Both take
turns, and a ratio is the median over the turns. Images are random bytes of CIFAR-10's shape, which changes no work.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from statistics import median

import torch

from benchmarks import show
from benchmarks.dm import shapes
from ddlib.engine.meter import PeakMemory, machine, seconds
from ddlib.match.gradients import ENGINES
from ddlib.methods.gradient import IDC, Config
from tests.oracles.plain import idc_images


def turns(
    work: dict[str, Callable[[], object]], repeats: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of every piece of work, in turns after one unmeasured call each."""
    times = {name: [] for name in work}
    for turn in range(repeats):
        for name, call in work.items():
            times[name].append(seconds(call, repeats=1, warm=turn == 0, device=device))
    return times


def image_step(
    classes: int,
    ipc: int,
    device: torch.device,
    repeats: int,
    backbone: str = "convnet",
    *,
    factor: int = 2,
    batch: int = 64,
    compile: bool = True,
) -> dict:
    data = shapes(classes, max(batch, ipc * factor**2), device)
    config = Config(
        factor=factor, batch_real=batch, augment_match="color+crop+cutout", compile=compile
    )
    fast, slow = (
        IDC(replace(config, compile=flag), data, ipc, backbone, 0) for flag in (compile, False)
    )
    times = turns(
        {"fast": lambda: fast.move(0, 0), "plain": lambda: idc_images(slow, 1)}, repeats, device
    )
    row = {
        "what": f"IDC image step, {backbone}",
        "classes": classes,
        "ipc": ipc,
        "factor": factor,
        "real a class": batch,
        "seconds": median(times["fast"]),
        "plain seconds": median(times["plain"]),
        "times faster": median(b / a for a, b in zip(times["fast"], times["plain"], strict=True)),
    }
    for name, work in (
        ("peak MiB", lambda: fast.move(0, 0)),
        ("plain peak MiB", lambda: idc_images(slow, 1)),
    ):
        with PeakMemory(device) as peak:
            work()
        row[name] = round(peak.bytes / 2**20)
    return row


def engines(device: torch.device, repeats: int, backbone: str = "convnet") -> dict:
    """The engines of `ddlib.match.gradients` without a compiler, at 10 classes: which of them "auto" should be."""
    data, config = shapes(10, 64, device), Config(augment_match="color+crop+cutout")
    methods = {
        engine: IDC(replace(config, engine=engine), data, 10, backbone, 0) for engine in ENGINES[1:]
    }
    times = turns({name: lambda m=m: m.move(0, 0) for name, m in methods.items()}, repeats, device)
    return {"what": f"IDC image step by engine, {backbone}, uncompiled"} | {
        f"{name} seconds": median(values) for name, values in times.items()
    }


def main(device: torch.device) -> list[dict]:
    """Print the rows, each as soon as it is measured, and return them."""
    rows = [{"what": f"gradient matching on {machine(device)}"}]
    print(rows[0]["what"], flush=True)
    for job in (
        lambda: image_step(10, 10, device, 3),
        lambda: image_step(100, 10, device, 1),
        lambda: image_step(10, 10, device, 3, "convnet:width=32"),
        lambda: engines(device, 2),
    ):
        rows.append(job())
        show(rows[-1])
    return rows
