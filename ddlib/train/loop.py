"""The one SGD loop: trains a network on a synthetic set, a coreset or the whole training set."""

from __future__ import annotations

import math
import os
import sys
import sysconfig
import warnings
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from shutil import which

import torch
import torch.nn.functional as F

from ..augment.siamese import augment, cutmix, draw
from ..core import DDError, choose, generator, upload
from ..data.dataset import Dataset
from ..nets.build import Backbone
from ..recipe import PRECISIONS, Recipe

PIXELS_AT_ONCE = 1000 * 64**2  # of the images that a network is tested on


@cache
def _can_compile() -> bool:
    # What Inductor (CPU) and Triton (CUDA) look for; both compile a file that includes Python.h.
    cxx = which(os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++"))
    cc = torch.cuda.is_available() and (which(os.environ.get("CC") or "gcc") or which("clang"))
    if (cxx or cc) and Path(sysconfig.get_path("include"), "Python.h").is_file():
        return True
    warnings.warn(
        "torch.compile needs a C++ compiler and Python.h, and one is missing: running uncompiled, about half "
        "as fast"
    )
    return False


def compiled(function: Callable) -> Callable:
    """`torch.compile(function)` for static shapes where that works, else `function` with one line of warning."""
    if not _can_compile():
        return function
    # One graph a batch shape and mode; past the limit it runs uncompiled.
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(function, dynamic=False)


def lowered(forward: Callable, device: torch.device, precision: str) -> Callable:
    """`forward` with its convolutions and products in `precision`: "float32" leaves it alone, "bf16" is autocast.

    Weights, their gradients and the result stay float32, so the loss and the optimiser do too.
    """
    if choose("precision", precision, PRECISIONS) == "float32":
        return forward

    def cast(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            return forward(x).float()

    return cast


def _targets(labels: torch.Tensor, recipe: Recipe, classes: int) -> torch.Tensor:
    """Labels as the loss takes them: for mse, a class becomes its one-hot row less 1 / classes (FRePo, section 3)."""
    if recipe.loss == "mse" and not labels.is_floating_point():
        return F.one_hot(labels, classes).float() - 1 / classes
    return labels


# Recipe.optimiser -> (parameters, recipe, step size) -> optimiser. FRePo's Adam has neither momentum nor weight decay.
# Another package may add a name of its own.
OPTIMISERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda parameters, recipe, lr: torch.optim.SGD(
        parameters, lr=lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay
    ),
    "adam": lambda parameters, recipe, lr: torch.optim.Adam(parameters, lr=lr),
    "adamw": lambda parameters, recipe, lr: torch.optim.AdamW(
        parameters, lr=lr, weight_decay=recipe.weight_decay
    ),
}


def _optimiser(net: Backbone, recipe: Recipe, lr: float) -> torch.optim.Optimizer:
    make = OPTIMISERS[choose("optimiser", recipe.optimiser, OPTIMISERS)]
    return make(net.parameters(), recipe, lr)


def _loss(forward: Callable, x: torch.Tensor, y: torch.Tensor, kind: str) -> torch.Tensor:
    logits = forward(x)
    return F.cross_entropy(logits, y) if kind == "ce" else 0.5 * (logits - y).square().sum(1).mean()


def _share(recipe: Recipe, step: int, total: int) -> float:
    """The step size at `step` of `total` as a share of the highest: linear warm-up from 0, then a cosine."""
    warm = min(recipe.warmup, total // 2)
    if step < warm:
        return step / warm
    return (
        recipe.cosine
        + (1 - recipe.cosine) * (1 + math.cos(math.pi * (step - warm) / max(1, total - warm))) / 2
    )


def _schedule(
    optimiser: torch.optim.Optimizer, recipe: Recipe, lr: float, step: int, total: int
) -> None:
    """Set the step size of `step` of `total`, where the recipe warms up or ends in a cosine."""
    if recipe.warmup or recipe.cosine != 1:
        optimiser.param_groups[0]["lr"] = lr * _share(recipe, step, total)


def train(
    net: Backbone,
    images: torch.Tensor | Callable[[torch.Tensor], torch.Tensor],
    labels: torch.Tensor,
    recipe: Recipe,
    rng: torch.Generator,
    *,
    forward: Callable | None = None,
    after_epoch: Callable[[int], None] | None = None,
    adjust: Callable[[Callable[[], torch.Tensor]], None] | None = None,
    targets: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
) -> Backbone:
    """Train `net` in place under `recipe` and return it.

    images: normalised float [n, C, H, W], or a function from an index [b] to such a batch; labels: int64 [n], or float
    [n, classes] (probabilities, or any numbers under mse). `forward` is the network's compiled forward, if there is
    one. `rng` gives the order of the images and the augmentation. `adjust(closure)` may edit the gradients before the
    step; the closure gives the batch's loss again. `targets(x, y)` gives what the loss compares the logits of the
    augmented batch x with, in place of y: a teacher's answers, say. Raises `DDError` when the loss stops being finite.
    """
    fetch = images if callable(images) else images.__getitem__
    forward, n = forward or net, len(labels)
    net.train()
    classes = net.classifier.out_features
    labels, lr, loss = _targets(labels, recipe, classes), recipe.lr, torch.zeros(())
    optimiser, step = _optimiser(net, recipe, lr), 0
    total = recipe.epochs * math.ceil(n / recipe.batch)
    for epoch in range(recipe.epochs):
        if epoch in recipe.drops:
            lr *= recipe.drop
            optimiser.param_groups[0]["lr"] = lr
            if recipe.reset:
                optimiser = _optimiser(net, recipe, lr)
        order = upload(torch.randperm(n, generator=rng), labels.device)
        for index in order.split(recipe.batch):
            x, y = fetch(index), labels[index]
            x = augment(x, draw(recipe.augment, len(x), tuple(x.shape[-2:]), rng, op_every=len(x)))
            if recipe.cutmix:
                x, y = cutmix(x, y, rng, recipe.cutmix, classes)
            if targets:
                y = targets(x, y)
            _schedule(optimiser, recipe, lr, step, total)
            step += 1
            closure = partial(_loss, forward, x, y, recipe.loss)
            optimiser.zero_grad(set_to_none=True)
            loss = closure()
            loss.backward()
            if adjust:
                adjust(closure)
            optimiser.step()
        if after_epoch:
            after_epoch(epoch)
    if not torch.isfinite(loss):
        raise DDError(
            f"training of {net.spec} ended with loss {loss.item()}: lower the step size ({recipe.lr})"
        )
    return net


@torch.no_grad()
def predict(
    net: Backbone,
    data: Dataset,
    split: str = "test",
    *,
    forward: Callable | None = None,
) -> torch.Tensor:
    """Logits [N, classes] of `net` in eval mode on the un-augmented images of a split.

    A thousand images at once, of more than 64 px a side as many as have the same number of pixels.
    """
    net.eval()
    batch = min(1000, max(1, PIXELS_AT_ONCE // math.prod(data.shape[1:])))
    rows = torch.arange(len(data.labels[split]), device=data.device)
    return torch.cat([(forward or net)(data.batch(split, index)) for index in rows.split(batch)])


def embed(net: Backbone, data: Dataset, split: str = "train") -> torch.Tensor:
    """Features float32 [N, d] of a split's un-augmented images, the network in eval mode."""
    return predict(net, data, split, forward=lambda x: net.features(x).float())


def accuracy(net: Backbone, data: Dataset, split: str = "test", **options) -> float:
    """Top-1 accuracy of `net` on a split, in per cent."""
    return (
        100
        * (predict(net, data, split, **options).argmax(1) == data.labels[split])
        .float()
        .mean()
        .item()
    )


def train_on(data: Dataset, net: Backbone, recipe: Recipe, seed: int, **options) -> Backbone:
    """Train `net` on a dataset's whole training split, e.g. as a coreset's feature extractor; options of `train`."""
    return train(
        net,
        lambda index: data.batch("train", index),
        data.labels["train"],
        recipe,
        generator(seed, "train", net.spec),
        **options,
    )
