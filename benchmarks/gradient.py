"""One image step of gradient matching, all classes, against the plain loop over classes: `make bench`.

The plain loop is what IDC's released code does: class by class, gradients of all parameters, a backward pass into the
network too, and an optimiser over all images that steps once a class. `plain` is also the tests' oracle. Both take
turns, and a ratio is the median over the turns. Images are random bytes of CIFAR-10's shape, which changes no work.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from itertools import count, islice
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import show
from ddlib.augment.siamese import augment, cutmix, draw
from ddlib.core import generator
from ddlib.distilled import decode
from ddlib.engine.meter import PeakMemory, machine, seconds
from ddlib.match.gradients import ENGINES
from ddlib.methods.gradient import IDC, Config, Gradient

from .dm import shapes


def plain(method: Gradient, steps: int, outer: int = 0) -> Tensor:
    """The pixels X after `steps` image steps by the plain loop, from the method's network, images and draws.

    Each class's rows are those once the momentum of its last step has moved them as often as its earlier ones did.
    Squared distance over convolutions, real training data, image steps once a class: IDC's settings.
    """
    c, data, ipc, net = (
        method.config,
        method.data,
        method.ipc,
        copy.deepcopy(method.net).requires_grad_(True),
    )
    images = method.raw.clone().requires_grad_()
    sgd = torch.optim.SGD([images], lr=c.lr_img * ipc / 10, momentum=c.momentum)
    trainer = torch.optim.SGD(
        net.parameters(), lr=c.net_lr, momentum=c.net_momentum, weight_decay=c.net_decay
    )
    rng = lambda *purpose: generator(method.seed, "gradient", *purpose)
    order = (
        torch.randperm(len(data.labels["train"]), generator=rng("order", outer, epoch))
        for epoch in count()
    )
    stream = enumerate(rows for epoch in order for rows in epoch.split(c.net_batch))
    for inner in range(steps):
        real = data.sample(method.batch, rng("real", outer, inner))
        params = draw(
            c.augment_match, data.num_classes, data.shape[1:], rng("augment", outer, inner)
        )
        for k in range(data.num_classes):
            loss = _class_loss(
                net,
                data,
                real[k],
                images[k * ipc : (k + 1) * ipc],
                params.select(torch.tensor([k])),
                c,
                k,
            )
            sgd.zero_grad()
            loss.backward()
            loss.item()
            sgd.step()
        for k, rows in islice(
            stream, math.ceil(c.net_images / c.net_batch) if inner + 1 < steps else 0
        ):
            draws = rng("train", outer, "real", k)
            x = data.batch("train", rows)
            x = augment(x, draw(c.augment_net, len(x), data.shape[1:], draws, op_every=len(x)))
            x, y = cutmix(x, data.labels["train"][rows], draws, c.cutmix, data.num_classes)
            trainer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            trainer.step()
    settled = []
    for k in range(data.num_classes):
        settled.append(images[k * ipc : (k + 1) * ipc].detach().clone())
        images.grad = torch.zeros_like(images)
        sgd.step()
    return torch.cat(settled)


def _class_loss(net, data, rows: Tensor, images: Tensor, params, c: Config, k: int) -> Tensor:
    x = augment(data.batch("train", rows), params.repeat(len(rows)))
    s = (decode(images, c.factor) - data.mean.to(images)) / data.std.to(images)
    s = augment(s, params.repeat(len(s)))
    of = lambda x, graph: torch.autograd.grad(
        F.cross_entropy(net(x), torch.full((len(x),), k, device=x.device)),
        list(net.parameters()),
        create_graph=graph,
    )
    pairs = zip(of(x, False), of(s, True), strict=True)
    return sum((a - b).square().sum() for a, b in pairs if a.ndim == 4)


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
        {"fast": lambda: fast.move(0, 0), "plain": lambda: plain(slow, 1)}, repeats, device
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
        ("plain peak MiB", lambda: plain(slow, 1)),
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
