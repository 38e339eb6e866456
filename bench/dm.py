"""One DM iteration and one evaluation against plain loops in the same process: `make bench`.

The plain loop is what the released code does: class by class, uncompiled, the images through torch autograd. The
roofline is the iteration's FLOPs (spec: forward for every real image, forward and input gradient for every synthetic
one) over the machine's measured float32 matrix-multiply rate; a convolution algorithm that saves multiplications can
go below it. Images are random bytes of CIFAR-10's shape: the values do not change the work.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

from ddlib.augment import augment, draw
from ddlib.backbones import build, count_flops, initialise
from ddlib.core import generator
from ddlib.data import from_arrays
from ddlib.evaluation import evaluate, protocol
from ddlib.meter import PeakMemory, machine, seconds, sgemm_rate
from ddlib.methods.dm import DM, Config
from ddlib.synthetic import Synthetic
from ddlib.training import Recipe


def shapes(classes: int, each: int, device: torch.device):
    """A dataset of CIFAR-10's image shape with `each` training images a class."""
    rng = generator(0, "bench", classes)
    images = torch.randint(256, (classes * each, 3, 32, 32), dtype=torch.uint8, generator=rng)
    labels = torch.arange(classes).repeat_interleave(each)
    return from_arrays(images, labels, images[: 10 * classes], labels[:: max(1, each // 10)][: 10 * classes], device=device)


def plain_step(data, images: torch.Tensor, ipc: int, batch: int, step: int, backbone: str = "convnet") -> torch.Tensor:
    """The gradient of DM's loss for all images by the plain loop over classes, with DM's own draws: also the oracle."""
    net = build(backbone, data.shape, data.num_classes).to(images).requires_grad_(False).train()
    initialise(net, generator(0, "dm", "network", step))
    real = data.sample(batch, generator(0, "dm", "real", step))
    params = draw("color_crop_cutout_flip_scale_rotate", data.num_classes, data.shape[1:],
                  generator(0, "dm", "augment", step))
    images = images.detach().requires_grad_()
    loss = 0.0
    for c in range(data.num_classes):
        mine = params.select(torch.tensor([c]))
        x = augment(data.batch("train", real[c]).to(images), mine.repeat(batch))
        s = augment(images[c * ipc:(c + 1) * ipc], mine.repeat(ipc))
        loss = loss + (net.features(x).detach().mean(0) - net.features(s).mean(0)).square().sum()
    return torch.autograd.grad(loss, images)[0]


def plain_evaluation(syn: Synthetic, recipe: Recipe, networks: int) -> None:
    """Train networks on a set by an ordinary DataLoader loop with one DSA draw a batch."""
    for _ in range(networks):
        net = build(syn.backbone, tuple(syn.images.shape[1:]), len(syn.classes)).to(syn.images.device)
        optimiser = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
        loader = DataLoader(TensorDataset(syn.images, syn.labels), batch_size=256, shuffle=True)
        rng = torch.Generator().manual_seed(0)
        for _ in range(recipe.epochs):
            for x, y in loader:
                x = augment(x, draw(recipe.augment, len(x), tuple(x.shape[-2:]), rng, op_every=len(x)))
                loss = F.cross_entropy(net(x), y)
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()


def iteration(classes: int, ipc: int, batch: int, device: torch.device, rate: float, repeats: int) -> dict:
    data = shapes(classes, max(batch, ipc), device)
    flops = count_flops(build("convnet", data.shape, classes), data.shape) * classes * (batch + 2 * ipc)
    row = {"what": "DM iteration", "classes": classes, "ipc": ipc, "real a class": batch}
    method = DM(Config(compile=True), data, ipc, "convnet", 0)
    with PeakMemory(device) as peak:
        row["seconds"] = seconds(method.step, repeats=repeats, device=device)
    row["peak MiB"] = round(peak.bytes / 2**20)
    images = method.images
    with PeakMemory(device) as peak:
        row["plain seconds"] = seconds(lambda: plain_step(data, images, ipc, batch, 0), repeats=repeats, device=device)
    row["plain peak MiB"] = round(peak.bytes / 2**20)
    row["times faster"] = row["plain seconds"] / row["seconds"]
    row["over roofline"] = row["seconds"] / (flops / rate)
    return row


def evaluations(device: torch.device, networks: int = 5, epochs: int = 100) -> dict:
    data = shapes(10, 10, device)
    recipe = protocol("dsa", epochs=epochs)
    syn = Synthetic.of(data, data.batch("train", torch.arange(0, 100, 10, device=device)),
                       torch.arange(10, device=device), recipe, "convnet")
    row = {"what": f"evaluation, {networks} networks, {recipe.epochs} epochs", "classes": 10, "ipc": 1}
    row["seconds"] = seconds(lambda: evaluate(syn, data, networks=networks, compile=True), repeats=3, device=device)
    row["plain seconds"] = seconds(lambda: plain_evaluation(syn, recipe, networks), repeats=3, device=device)
    row["times faster"] = row["plain seconds"] / row["seconds"]
    return row


def main(device: torch.device, out: Path | None = None) -> list[dict]:
    """Print the rows, one as soon as it is measured, and write them to `out` as JSON."""
    rate = sgemm_rate(device)
    rows = [{"what": f"sgemm rate on {machine(device)}: {rate / 1e9:.0f} GFLOP/s"}]
    print(rows[0]["what"], flush=True)
    jobs = [lambda ipc=ipc: iteration(10, ipc, 256, device, rate, 3) for ipc in (1, 10, 50)]
    jobs += [lambda: iteration(100, 10, 64 if device.type == "cpu" else 256, device, rate, 1),
             lambda: evaluations(device)]
    for job in jobs:
        rows.append(job())
        print(", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in rows[-1].items()), flush=True)
    if out:
        out.write_text(json.dumps(rows, indent=1))
    return rows
