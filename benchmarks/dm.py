"""One DM iteration and one evaluation against plain loops: `make bench`.

The plain loop (`dm_gradient`, the tests' oracle) is what the released code does: class by class, uncompiled, the images
through torch autograd. The roofline is the iteration's FLOPs (spec: forward for every real image, forward and input
gradient for every synthetic one) over the rate of a large 3x3 convolution on this machine. Images are random bytes of
CIFAR-10's shape: the values do not change the work. The plain loop is timed twice: in this process, where freed memory
is kept (`ddlib.engine.heap`), and alone, as the C library has it by default.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from statistics import median

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

from benchmarks import show
from ddlib.augment.siamese import augment, draw
from ddlib.core import generator
from ddlib.data.dataset import Dataset, from_arrays
from ddlib.distilled import Synthetic
from ddlib.engine.meter import PeakMemory, conv_rate, machine, seconds
from ddlib.methods.dm import DM, Config
from ddlib.nets.build import build, count_flops
from ddlib.recipe import PRECISIONS, Recipe, protocol
from ddlib.train.evaluate import evaluate
from tests.oracles.plain import dm_gradient


def shapes(classes: int, each: int, device: torch.device):
    """A dataset of CIFAR-10's image shape with `each` training images a class."""
    rng = generator(0, "bench", classes)
    images = torch.randint(256, (classes * each, 3, 32, 32), dtype=torch.uint8, generator=rng)
    labels = torch.arange(classes).repeat_interleave(each)
    return from_arrays(
        images,
        labels,
        images[: 10 * classes],
        labels[:: max(1, each // 10)][: 10 * classes],
        device=device,
    )


def alone(function: Callable, *arguments: object) -> float:
    """`function(*arguments)` in a process of its own, whose heap is left to the C library."""
    os.environ["DDLIB_HEAP"] = "0"  # read by the new process when it imports ddlib
    try:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            return pool.submit(function, *arguments).result()
    finally:
        del os.environ["DDLIB_HEAP"]


def compared(row: dict, plain: Callable, *arguments: object) -> dict:
    """`row` with the seconds that `plain(*arguments)` measures, here and alone, and how many times faster we are."""
    for where, taken in (("", alone(plain, *arguments)), (", heap kept", plain(*arguments))):
        row[f"plain seconds{where}"], row[f"times faster{where}"] = taken, taken / row["seconds"]
    return row


def plain_evaluation(syn: Synthetic, data: Dataset, recipe: Recipe, networks: int) -> None:
    """Train networks on a set by an ordinary DataLoader loop with one DSA draw a batch, and test them."""
    test = TensorDataset(data.batch("test", slice(None)), data.labels["test"])
    for _ in range(networks):
        net = build(syn.backbone, tuple(syn.images.shape[1:]), len(syn.classes)).to(
            syn.images.device
        )
        optimiser = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
        loader = DataLoader(TensorDataset(syn.images, syn.labels), batch_size=256, shuffle=True)
        rng = torch.Generator().manual_seed(0)
        for _ in range(recipe.epochs):
            for x, y in loader:
                x = augment(
                    x, draw(recipe.augment, len(x), tuple(x.shape[-2:]), rng, op_every=len(x))
                )
                loss = F.cross_entropy(net(x), y)
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
        net.eval()
        with torch.no_grad():
            sum(int((net(x).argmax(1) == y).sum()) for x, y in DataLoader(test, batch_size=256))


def iteration(
    classes: int, ipc: int, batch: int, device: torch.device, rate: float, repeats: int
) -> dict:
    data = shapes(classes, max(batch, ipc), device)
    flops = (
        count_flops(build("convnet", data.shape, classes), data.shape) * classes * (batch + 2 * ipc)
    )
    row = {"what": "DM iteration", "classes": classes, "ipc": ipc, "real a class": batch}
    method = DM(Config(compile=True), data, ipc, "convnet", 0)
    with PeakMemory(device) as peak:
        row["seconds"] = seconds(method.step, repeats=repeats, device=device)
    row["peak MiB"] = round(peak.bytes / 2**20)
    row["over roofline"] = row["seconds"] / (flops / rate)
    with PeakMemory(device) as peak:
        compared(row, plain_iteration, classes, ipc, batch, device, repeats)
    row["plain peak MiB"] = round(peak.bytes / 2**20)
    return row


def in_bf16(ipc: int, device: torch.device, repeats: int) -> dict:
    """Seconds of DM's iteration with bf16 features, and how many times that is faster; the two take turns."""
    data, taken = shapes(10, 256, device), {}
    methods = {
        precision: DM(Config(compile=True, precision=precision), data, ipc, "convnet", 0)
        for precision in PRECISIONS
    }
    for turn in range(repeats + 1):
        for precision, method in methods.items():
            time = seconds(method.step, repeats=1, warm=turn == 0, device=device)
            taken.setdefault(precision, []).extend([time] if turn else [])
    middle = {precision: median(times) for precision, times in taken.items()}
    return {
        "what": "DM iteration in bf16",
        "classes": 10,
        "ipc": ipc,
        "real a class": 256,
        "seconds": middle["bf16"],
        "float32 seconds": middle["float32"],
        "times faster": middle["float32"] / middle["bf16"],
    }


def in_lock_step(ipcs: tuple[int, ...], device: torch.device, repeats: int) -> dict:
    """Seconds of one iteration of all IPCs, which pass the same real images once, and of each alone; all take turns."""
    data, taken = shapes(10, 256, device), {}
    methods = {ipc: DM(Config(compile=True), data, ipc, "convnet", 0) for ipc in ipcs}

    def step(chosen: tuple[int, ...]) -> None:
        shared: dict = {}
        for ipc in chosen:
            methods[ipc].shared = shared
            methods[ipc].step()

    choices = {"together": ipcs} | {ipc: (ipc,) for ipc in ipcs}
    for turn in range(repeats + 1):
        for name, chosen in choices.items():
            time = seconds(partial(step, chosen), repeats=1, warm=turn == 0, device=device)
            taken.setdefault(name, []).extend([time] if turn else [])
    middle = {name: median(times) for name, times in taken.items()}
    return {
        "what": f"DM iteration, IPC {', '.join(map(str, ipcs))} in lock step",
        "classes": 10,
        "real a class": 256,
        "seconds": middle.pop("together"),
        **{f"seconds, IPC {ipc} alone": time for ipc, time in middle.items()},
    }


def plain_iteration(
    classes: int, ipc: int, batch: int, device: torch.device, repeats: int
) -> float:
    data = shapes(classes, max(batch, ipc), device)
    images = data.batch("train", data.sample(ipc, generator(0, "bench")).flatten())
    return seconds(lambda: dm_gradient(data, images, ipc, batch, 0), repeats=repeats, device=device)


def small_set(device: torch.device, epochs: int) -> tuple[Synthetic, Dataset]:
    """One image of each of ten classes, and a test set of ten."""
    data = shapes(10, 10, device)
    return Synthetic.of(
        data,
        data.batch("train", torch.arange(0, 100, 10, device=device)),
        torch.arange(10, device=device),
        protocol("dsa", epochs=epochs),
        "convnet",
    ), data


def plain_evaluations(device: torch.device, networks: int, epochs: int) -> float:
    syn, data = small_set(device, epochs)
    return seconds(
        lambda: plain_evaluation(syn, data, syn.recipe, networks), repeats=3, device=device
    )


def evaluations(device: torch.device, networks: int = 5, epochs: int = 100) -> dict:
    syn, data = small_set(device, epochs)
    row = {
        "what": f"evaluation, {networks} networks, {syn.recipe.epochs} epochs",
        "classes": 10,
        "ipc": 1,
    }
    row["seconds"] = seconds(
        lambda: evaluate(syn, data, networks=networks, compile=True), repeats=3, device=device
    )
    return compared(row, plain_evaluations, device, networks, epochs)


def main(device: torch.device) -> list[dict]:
    """Print the rows, each as soon as it is measured, and return them."""
    rate = conv_rate(device)
    rows = [{"what": f"3x3 convolution on {machine(device)}: {rate / 1e9:.0f} GFLOP/s"}]
    print(rows[0]["what"], flush=True)
    jobs = [lambda ipc=ipc: iteration(10, ipc, 256, device, rate, 3) for ipc in (1, 10, 50)]
    jobs += [
        lambda: iteration(100, 10, 64 if device.type == "cpu" else 256, device, rate, 1),
        lambda: in_bf16(10, device, 5),
        lambda: in_lock_step((1, 10, 50), device, 5),
        lambda: evaluations(device),
    ]
    for job in jobs:
        rows.append(job())
        show(rows[-1])
    return rows
