"""What a run will cost before it starts: floating-point operations over this machine's rate, and peak memory.

Work is counted in forward passes F of one image through the run's network: 3 F for a gradient, 7 F for the
second-order gradient of a synthetic image, 10 F for a step of the adjoint. The rate is measured on training steps of
that network here and now, each in its precision (DM's networks, the extractor, the evaluation) and an evaluation's with
its augmentation, so seconds hold for this machine, this number of threads and its present load.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass
from functools import cache, singledispatch
from typing import Any

import torch
import torch.nn.functional as F

from ..augment.siamese import augment, draw
from ..config import Spec
from ..core import DDError, choose, generator
from ..data.dataset import canonical
from ..match.sampler import work
from ..methods.coreset import CoresetConfig
from ..methods.dm import Config as DMConfig
from ..methods.frepo import Config as FRePoConfig
from ..methods.gradient import Config as GradientConfig
from ..methods.trajectory import Config as TrajectoryConfig
from ..nets.build import Backbone, build, count_flops
from ..train.loop import lowered
from . import meter
from .meter import SavedTensors

# Seconds until a network's first compiled step: seen on two CPU cores, in a run of DM; no benchmark of ours has it.
COMPILING = 20.0
COMPILED = 0.6  # seconds of a compiled step over those of a plain one, on a CPU: benchmarks/dm.py
BATCH = 256  # images of 32 x 32 that go through a network together on a CPU
FEW, MANY = 8, 32  # images of the two timed batches
# FLOP/s in float32 of NVIDIA's data sheets, without tensor cores (H200: SXM). PyTorch's convolutions take TF32 there by
# default, whose published rates are higher; what networks this small wait for is memory and launches.
DEVICES = {"H200": 67e12, "A100": 19.5e12, "RTX 4090": 82.6e12}
PROCESS = 1.2 * 2**30  # bytes that Python, torch and a compiler's cache hold before any image


@dataclass(frozen=True)
class Sizes:
    """A dataset as its cost sees it: shape (C, H, W), classes, training and test images."""

    shape: tuple[int, int, int]
    classes: int
    train: int
    test: int

    @property
    def by_class(self) -> list[int]:
        return [self.train // self.classes] * self.classes


SIZES = {
    "digits": Sizes((1, 8, 8), 10, 1297, 500),
    "mnist": Sizes((1, 28, 28), 10, 60_000, 10_000),
    "fashionmnist": Sizes((1, 28, 28), 10, 60_000, 10_000),
    "svhn": Sizes((3, 32, 32), 10, 73_257, 26_032),
    "cifar10": Sizes((3, 32, 32), 10, 50_000, 10_000),
    "cifar100": Sizes((3, 32, 32), 100, 50_000, 10_000),
    "tinyimagenet": Sizes((3, 64, 64), 200, 100_000, 10_000),
    "imagenet1k": Sizes((3, 64, 64), 1000, 1_281_167, 50_000),
}


@dataclass(frozen=True)
class Cost:
    """The predicted cost of one run: TFLOP, seconds on this machine, and peak bytes; NaN where unknown."""

    tflop: float
    seconds: float
    peak_bytes: float

    def seconds_on(self, device: str) -> float:
        """What the work takes at the published float32 rate of one of `DEVICES`: a guide, and no bound."""
        return 1e12 * self.tflop / DEVICES[choose("device", device, DEVICES)]


UNKNOWN = Cost(math.nan, math.nan, math.nan)


def sizes_of(dataset: str) -> Sizes:
    """The sizes of a dataset by its name, or of a folder that is named as one; others are a `DDError`."""
    try:
        return SIZES[canonical(dataset)]
    except KeyError:
        raise DDError(
            f"the size of {dataset!r} is not on file, so its cost cannot be predicted; known: "
            f"{', '.join(SIZES)}"
        ) from None


@dataclass(frozen=True)
class Network:
    """What a network costs on images of one shape.

    forward: FLOPs of a forward pass of one image. graph: bytes that a training step's graph keeps of one image.
    start, each: an uncompiled training step of n images takes start + each n seconds here.
    """

    net: Backbone
    forward: int
    graph: float
    start: float
    each: float


@singledispatch
def distillation(config: Any, own: Network, sizes: Sizes, ipc: int) -> float:
    """FLOPs of a whole distillation; NaN for a method that says nothing about its work."""
    return math.nan


@distillation.register
def _(config: CoresetConfig, own: Network, sizes: Sizes, ipc: int) -> float:
    return 0.0 if config.kind == "random" else own.forward * sizes.train


@distillation.register
def _(config: DMConfig, own: Network, sizes: Sizes, ipc: int) -> float:
    real = min(config.batch_real, min(sizes.by_class))
    images = sizes.classes * (real + 3 * ipc)
    return config.iterations * own.forward * images


@distillation.register
def _(config: GradientConfig, own: Network, sizes: Sizes, ipc: int) -> float:
    parts = work(config, own.net, sizes.shape, sizes.by_class, ipc)
    return config.iterations * sum(parts.values())


@distillation.register
def _(config: TrajectoryConfig, own: Network, sizes: Sizes, ipc: int) -> float:
    images = ipc * sizes.classes
    batch = min(config.batch_syn or images, images)
    steps = config.iterations * config.segments * config.syn_steps
    return own.forward * 10 * steps * batch


@distillation.register
def _(config: FRePoConfig, own: Network, sizes: Sizes, ipc: int) -> float:
    images = config.batch_real + 7 * ipc * sizes.classes
    return config.iterations * own.forward * images


@singledispatch
def preparation(config: Any) -> tuple[float, Hashable]:
    """(Passes of a network's training over the whole set before distillation, what runs must have in common to share
    that network or those networks); (0, None) where there is nothing to prepare."""
    return 0, None


@preparation.register
def _(config: CoresetConfig) -> tuple[float, Hashable]:
    if config.kind == "random":
        return 0, None
    common = (config.extractor_epochs, config.extractor_lr, config.extractor_precision)
    return config.extractor_epochs, ("extractor", *common)


@preparation.register
def _(config: TrajectoryConfig) -> tuple[float, Hashable]:
    twice = 1 if config.flat == "plain" else 2
    epochs = twice * config.experts * config.expert_total
    return epochs, ("experts", config.expert_recipe, config.experts)


@cache
def network(
    backbone: str,
    shape: tuple[int, int, int],
    classes: int,
    device: str,
    precision: str,
    strategy: str,
) -> Network:
    """The network's FLOPs, its memory, and its speed from two timed batches in `precision`, augmented by `strategy`."""
    net = build(backbone, shape, classes, generator(0, "cost")).to(device)
    with SavedTensors() as saved:
        F.cross_entropy(net(torch.zeros((2, *shape), device=device)), _labels(2, classes, device))
    few, many = (
        _timed_step(net, shape, classes, batch, device, precision, strategy)
        for batch in (FEW, MANY)
    )
    each = max((many - few) / (MANY - FEW), many / MANY / 10)
    start = max(0.0, few - FEW * each)
    return Network(net, count_flops(net, shape), saved.peak / 2, start, each)


def _labels(count: int, classes: int, device: str) -> torch.Tensor:
    return torch.arange(count, device=device) % classes


def _timed_step(
    net: Backbone,
    shape: tuple,
    classes: int,
    batch: int,
    device: str,
    precision: str,
    strategy: str,
) -> float:
    rng = generator(0, "cost", batch)
    x, y = torch.randn((batch, *shape), generator=rng).to(device), _labels(batch, classes, device)
    forward = lowered(net, x.device, precision)

    def step() -> None:
        # The same operation at every size, so that their difference is of the size.
        params = draw(strategy, batch, shape[1:], generator(0, "cost"), op_every=batch)
        seen = augment(x, params)
        F.cross_entropy(forward(seen), y).backward()

    return meter.seconds(step, repeats=2, device=x.device)


def predict(spec: Spec, device: str = "cpu", prepared: bool = False) -> Cost:
    """The cost of a run; raises `DDError` for a dataset of unknown size.

    Experts and extractor are included, but where another run has `prepared` them before.
    """
    run, sizes = spec.run, sizes_of(spec.dataset)
    place = (run.backbone, sizes.shape, sizes.classes, device)
    own = network(*place, "float32", "none")
    distil = distillation(spec.config, own, sizes, spec.ipc)
    moved = network(*place, getattr(spec.config, "precision", "float32"), "none")
    epochs, _ = (0, None) if prepared else preparation(spec.config)
    prepare = 3 * own.forward * epochs * sizes.train
    low = getattr(spec.config, "extractor_precision", "float32")
    taught = network(*place, low, "none") if epochs else own
    tested = run.networks * (run.evaluations if spec.config.iterations else 1)
    scored, scored_seconds = _evaluation(spec, sizes, device)
    seconds = (distil * moved.each + prepare * taught.each) / (3 * own.forward)
    seconds += tested * scored_seconds
    if run.compile:
        seconds = COMPILING + COMPILED * seconds
    tflop = (distil + prepare + tested * scored) / 1e12
    return Cost(tflop, seconds, _peak(spec, sizes, own))


def shared_key(spec: Spec) -> Hashable:
    """What two runs have in common when one's experts or extractor serve the other; None where there are none."""
    _, key = preparation(spec.config)
    if key is None:
        return None
    seed = spec.seed if key[0] == "extractor" else 0  # experts of all seeds are the same
    run = spec.run
    images = (spec.dataset, run.subset, run.minival, run.resolution, run.zca)
    return (*images, run.backbone, seed, key)


def _evaluation(spec: Spec, sizes: Sizes, device: str) -> tuple[float, float]:
    """(FLOPs, uncompiled seconds) of training one network on the set and testing it."""
    run, recipe = spec.run, spec.recipe
    backbone, conditions = run.eval_backbone or run.backbone, (run.eval_precision, recipe.augment)
    other = network(backbone, sizes.shape, sizes.classes, device, *conditions)
    images = spec.ipc * sizes.classes * getattr(spec.config, "factor", 1) ** 2
    steps = recipe.epochs * math.ceil(images / recipe.batch)
    seconds = steps * other.start + (recipe.epochs * images + sizes.test / 3) * other.each
    return other.forward * (3 * recipe.epochs * images + sizes.test), seconds


def _peak(spec: Spec, sizes: Sizes, own: Network) -> float:
    """Bytes at the peak: the process, the images as they are held, and a graph of one batch."""
    images = (sizes.train + sizes.test) * math.prod(sizes.shape)
    return PROCESS + images + own.graph * max(BATCH, spec.recipe.batch)
