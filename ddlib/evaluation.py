"""The papers' evaluation: fresh networks are trained on a set and tested on the dataset's real test images."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import lru_cache
from statistics import fmean, pstdev

import torch

from .augment import draw
from .backbones import Backbone, build, initialise
from .core import DDError, choose, generator
from .data import Dataset
from .synthetic import Synthetic
from .training import Recipe, accuracy, compiled, halved, train

VERSION = 1  # raise it when a change here or in training.py changes results: old records are then made anew
# Source: Zhao et al., DC (ICLR 2021), DSA (ICML 2021), DM (WACV 2023), released code. DM evaluates as DSA does.
# MTT, TESLA and FTD too, at the learned step size; DATM's batches are of 128 (released configs).
PROTOCOLS = {"dc": halved("dc", 300, augment="none"), "dsa": halved("dsa", 1000), "dm": halved("dm", 1000),
             "mtt": halved("mtt", 1000), "datm": halved("datm", 1000, batch=128)}


def protocol(name: str, *, epochs: int | None = None, augment: str | None = None) -> Recipe:
    """The recipe of a protocol; `epochs` shortens or lengthens it (E means E + 1 passes), `augment` is DSA's string."""
    recipe = PROTOCOLS[choose("protocol", name, PROTOCOLS)]
    if epochs is not None:
        if epochs < 1:
            raise DDError(f"eval_epochs must be at least 1, not {epochs}")
        recipe = halved(name, epochs, augment=recipe.augment, batch=recipe.batch)
    if augment is not None and recipe.augment != "none":
        draw(augment, 0, (1, 1), generator(0))  # refuses an unknown operation
        recipe = replace(recipe, augment=augment)
    return recipe


@dataclass(frozen=True)
class Evaluation:
    """Test accuracies (per cent) of networks trained on one set; the papers' spread is the population one, ddof 0."""

    accuracies: tuple[float, ...]
    recipe: Recipe
    backbone: str
    seconds: float

    @property
    def mean(self) -> float:
        return fmean(self.accuracies)

    @property
    def std(self) -> float:
        return pstdev(self.accuracies)

    def __str__(self) -> str:
        return (f"{self.mean:.1f} ± {self.std:.1f} % ({len(self.accuracies)} x {self.backbone}, "
                f"{self.recipe.name} protocol, {self.recipe.epochs} epochs)")


@lru_cache(maxsize=2)
def _network(spec: str, shape: tuple, classes: int, device: torch.device, fast: bool) -> tuple[Backbone, object]:
    """A network and its forward pass; kept, since compiling costs more than a short training."""
    net = build(spec, shape, classes).to(device)
    return net, compiled(net.forward) if fast else net


def evaluate(syn: Synthetic, data: Dataset, *, backbone: str | None = None, networks: int = 5, seed: int = 0,
             recipe: Recipe | None = None, split: str = "test", compile: bool = False) -> Evaluation:
    """Train `networks` fresh networks on `syn` under its own protocol (or `recipe`) and test each on `data`.

    The last epoch counts; no epoch is picked. Network k depends on (seed, k) alone. Raises `DDError` where set and
    data do not belong together.
    """
    syn.check(data)
    if networks < 1:
        raise DDError(f"networks must be at least 1, not {networks}")
    choose("split", split, data.labels)
    if len(data.labels[split]) == 0:
        raise DDError(f"{data.name} has no {split} images: nothing to evaluate on")
    recipe, start = recipe or syn.recipe, time.perf_counter()
    syn = syn.to(data.device)
    net, forward = _network(backbone or syn.backbone, data.shape, data.num_classes, data.device, compile)
    scores = []
    for k in range(networks):
        initialise(net, generator(seed, "evaluate", "weights", k))
        train(net, syn.images, syn.labels, recipe, generator(seed, "evaluate", "order", k), forward=forward)
        scores.append(accuracy(net, data, split, forward=forward))
    return Evaluation(tuple(scores), recipe, net.spec, time.perf_counter() - start)
