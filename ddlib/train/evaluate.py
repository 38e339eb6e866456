"""The papers' evaluation: fresh networks are trained on a set and tested on the dataset's real test images."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from statistics import fmean, pstdev

import torch
import torch.nn.functional as F

from ..core import DDError, choose, generator, instance, plain, whole
from ..data.dataset import Dataset
from ..distilled import Synthetic
from ..nets.build import Backbone, build, initialise
from ..recipe import PRECISIONS, Recipe
from .krr import krr
from .loop import accuracy, compiled, embed, lowered, train


@dataclass(frozen=True)
class Evaluation:
    """Test accuracies (per cent) of networks trained on one set; the papers' spread is the population one, ddof 0.

    `extras` has further accuracies of the same networks: "best" over the epochs `recipe.tests` (chosen on the test
    set, as IDC and DREAM print), "val" on the validation split where the data has one, and "krr", FRePo's other
    predictor: ridge regression on the trained network's features, where the loss is mse.
    """

    accuracies: tuple[float, ...]
    recipe: Recipe
    backbone: str
    seconds: float
    extras: dict[str, tuple[float, ...]] = field(default_factory=dict)

    @property
    def mean(self) -> float:
        return fmean(self.accuracies)

    @property
    def std(self) -> float:
        return pstdev(self.accuracies)

    def __str__(self) -> str:
        return (
            f"{self.mean:.1f} ± {self.std:.1f} % ({len(self.accuracies)} x {self.backbone}, "
            f"{self.recipe.name} protocol, {self.recipe.epochs} epochs)"
        )


@lru_cache(maxsize=2)
def _network(
    spec: str, shape: tuple, classes: int, device: torch.device, fast: bool, precision: str
) -> tuple[Backbone, object]:
    """A network and its forward pass; kept, since compiling costs more than a short training."""
    net = build(spec, shape, classes).to(device)
    forward = lowered(net.forward, device, precision)
    return net, compiled(forward) if fast else forward


def evaluate(
    syn: Synthetic,
    data: Dataset,
    *,
    backbone: str | None = None,
    networks: int = 5,
    seed: int = 0,
    recipe: Recipe | None = None,
    split: str = "test",
    compile: bool = False,
    precision: str = "float32",
    scores: list[dict[str, float]] | None = None,
    after_network: Callable[[], None] | None = None,
) -> Evaluation:
    """Train `networks` fresh networks on `syn` under its own protocol (or `recipe`) and test each on `data`.

    The last epoch counts; no epoch is picked. Network k depends on (seed, k) alone. `precision` "bf16" trains and
    tests under autocast (`loop.lowered`; the extra "krr" stays float32), which is faster on a CPU with bf16
    instructions (results/bench/precision_cpu.json). An evaluation that was stopped goes on from `scores`, the
    accuracies of its first networks: each further network's are appended, then `after_network()` is called, which may
    save them. Raises `DDError` where set and data do not belong together.
    """
    instance("the set", syn, Synthetic).check(instance("data", data, Dataset))
    networks, seed = whole("networks", networks, 1), whole("seed", seed, 0)
    instance("recipe", recipe, Recipe, None)
    instance("scores", scores, list, None)
    instance("backbone", backbone, str, None)
    choose("precision", precision, PRECISIONS)
    compile = instance("compile", plain(compile), bool)
    choose("split", split, data.labels)
    if len(data.labels[split]) == 0:
        raise DDError(f"{data.name} has no {split} images: nothing to evaluate on")
    recipe, start = recipe or syn.recipe, time.perf_counter()
    check_labels(syn, recipe)
    syn = syn.to(data.device)
    images, labels = syn.training_set()
    net, forward = _network(
        backbone or syn.backbone, data.shape, data.num_classes, data.device, compile, precision
    )
    scores = [] if scores is None else scores
    noted: list[float] = []

    def test(epoch: int) -> None:
        if epoch + 1 in recipe.tests:
            noted.append(accuracy(net, data, split, forward=forward))
            net.train()

    for k in range(len(scores), networks):
        noted.clear()
        initialise(net, generator(seed, "evaluate", "weights", k))
        train(
            net,
            images,
            labels,
            recipe,
            generator(seed, "evaluate", "order", k),
            forward=forward,
            after_epoch=test,
        )
        score = {"last": accuracy(net, data, split, forward=forward)}
        if noted:
            score["best"] = max(*noted, score["last"])
        if split == "test" and "val" in data.labels:
            score["val"] = accuracy(net, data, "val", forward=forward)
        if recipe.loss == "mse":
            score["krr"] = _krr(net, syn, data, split)
        scores.append(score)
        if after_network:
            after_network()
    by_name = {name: tuple(score[name] for score in scores) for name in scores[0]}
    return Evaluation(
        by_name.pop("last"), recipe, net.spec, time.perf_counter() - start, extras=by_name
    )


def check_labels(syn: Synthetic, recipe: Recipe) -> None:
    """Raise `DDError` where the cross-entropy of `recipe` would meet labels that are no distribution, as FRePo's."""
    y = syn.labels
    if recipe.loss != "ce" or not y.is_floating_point():
        return
    if not ((y >= 0).all() and torch.allclose(y.sum(1), torch.ones_like(y[:, 0]), atol=1e-3)):
        raise DDError(
            f"the {recipe.name} protocol trains by cross-entropy, and the labels of this set are no "
            "distributions over the classes: take the set's own protocol, or its classes alone (hard=True)"
        )


@torch.no_grad()
def _krr(net: Backbone, syn: Synthetic, data: Dataset, split: str) -> float:
    """Accuracy (per cent) of ridge regression from the network's features of the set to its labels (FRePo, eq. 3)."""
    images, labels = syn.training_set()
    if syn.spec.get("values", {}).get("flip") == "on":
        # Mirrored copies stand beside the images, as in distillation.
        images = torch.cat([images, images.flip(3)])
        labels = labels.repeat(2, *[1] * (labels.ndim - 1))
    targets = labels if labels.is_floating_point() else F.one_hot(labels, data.num_classes).float()
    net.eval()
    support = torch.cat([net.features(x) for x in images.split(500)])
    answers, _ = krr(embed(net, data, split), support, targets)
    return 100 * (answers.argmax(1) == data.labels[split]).float().mean().item()
