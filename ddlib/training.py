"""The one SGD loop: trains a network on a synthetic set, a coreset or the whole training set."""

from __future__ import annotations

import os
import sys
import sysconfig
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from shutil import which

import torch
import torch.nn.functional as F

from .augment import augment, draw
from .backbones import Backbone
from .core import DDError, generator
from .data import Dataset


@dataclass(frozen=True)
class Recipe:
    """How one network is trained; the defaults are the DSA protocol (dm: same), DSA paper and released code."""

    name: str = "dsa"  # the protocol's name in tables
    epochs: int = 1001  # passes over the set; the released loop runs 0..1000 inclusive
    lr: float = 0.01  # SGD step size, or the learned one where the method learns it
    momentum: float = 0.9
    weight_decay: float = 5e-4
    batch: int = 256  # the last, smaller batch is kept
    drops: tuple[int, ...] = (502,)  # after so many epochs the step size is multiplied by `drop` ...
    drop: float = 0.1  # ... and the momentum is forgotten, since the released code builds a new optimiser
    augment: str = "color_crop_cutout_flip_scale_rotate"  # DSA: one operation a batch, parameters an image


def halved(name: str, epochs: int, **changes) -> Recipe:
    """The DC family's schedule for `--epoch_eval_train epochs`: epochs + 1 passes, one drop after epochs // 2 + 2."""
    return Recipe(name=name, epochs=epochs + 1, drops=(epochs // 2 + 2,), **changes)


@cache
def _can_compile() -> bool:
    # What Inductor (CPU) and Triton (CUDA) look for; both compile a file that includes Python.h.
    cxx = which(os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++"))
    cc = torch.cuda.is_available() and (which(os.environ.get("CC") or "gcc") or which("clang"))
    if (cxx or cc) and Path(sysconfig.get_path("include"), "Python.h").is_file():
        return True
    warnings.warn("torch.compile needs a C++ compiler and Python.h, and one is missing: running uncompiled, about half "
                  "as fast")
    return False


def compiled(function: Callable) -> Callable:
    """`torch.compile(function)` for static shapes where that works, else `function` with one line of warning."""
    if not _can_compile():
        return function
    torch._dynamo.config.recompile_limit = 64  # one graph a batch shape and mode; past the limit it runs uncompiled
    return torch.compile(function, dynamic=False)


def _loss(forward: Callable, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(forward(x), y)


def train(net: Backbone, images: torch.Tensor | Callable[[torch.Tensor], torch.Tensor], labels: torch.Tensor,
          recipe: Recipe, rng: torch.Generator, *, forward: Callable | None = None,
          after_epoch: Callable[[int], None] | None = None,
          adjust: Callable[[Callable[[], torch.Tensor]], None] | None = None) -> Backbone:
    """Train `net` in place under `recipe` and return it.

    images: normalised float [n, C, H, W], or a function from an index [b] to such a batch; labels: int64 [n], or
    probabilities [n, classes]. `forward` is the network's compiled forward, if there is one. `rng` gives the order
    of the images and the augmentation. `adjust(closure)` may edit the gradients before the step; the closure gives the
    batch's loss again. Raises `DDError` when the loss stops being finite.
    """
    fetch = images if callable(images) else images.__getitem__
    forward, n = forward or net, len(labels)
    net.train()
    optimiser, lr, loss = None, recipe.lr, torch.zeros(())
    for epoch in range(recipe.epochs):
        if epoch in recipe.drops:
            optimiser, lr = None, lr * recipe.drop
        if optimiser is None:
            optimiser = torch.optim.SGD(net.parameters(), lr=lr, momentum=recipe.momentum,
                                        weight_decay=recipe.weight_decay)
        for index in torch.randperm(n, generator=rng).to(labels.device).split(recipe.batch):
            x = fetch(index)
            x = augment(x, draw(recipe.augment, len(x), tuple(x.shape[-2:]), rng, op_every=len(x)))
            closure = partial(_loss, forward, x, labels[index])
            optimiser.zero_grad(set_to_none=True)
            loss = closure()
            loss.backward()
            if adjust:
                adjust(closure)
            optimiser.step()
        if after_epoch:
            after_epoch(epoch)
    if not torch.isfinite(loss):
        raise DDError(f"training of {net.spec} ended with loss {loss.item()}: lower the step size ({recipe.lr})")
    return net


@torch.no_grad()
def predict(net: Backbone, data: Dataset, split: str = "test", *, batch: int = 1000,
            forward: Callable | None = None) -> torch.Tensor:
    """Logits [N, classes] of `net` in eval mode on the un-augmented images of a split."""
    net.eval()
    rows = torch.arange(len(data.labels[split]), device=data.device)
    return torch.cat([(forward or net)(data.batch(split, index)) for index in rows.split(batch)])


def accuracy(net: Backbone, data: Dataset, split: str = "test", **options) -> float:
    """Top-1 accuracy of `net` on a split, in per cent."""
    return 100 * (predict(net, data, split, **options).argmax(1) == data.labels[split]).float().mean().item()


def train_on(data: Dataset, net: Backbone, recipe: Recipe, seed: int) -> Backbone:
    """Train `net` on a dataset's whole training split, e.g. as the feature extractor of a coreset."""
    return train(net, lambda index: data.batch("train", index), data.labels["train"], recipe,
                 generator(seed, "train", net.spec))
