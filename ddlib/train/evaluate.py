"""The papers' evaluation: fresh networks are trained on a set and tested on the dataset's real test images."""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from statistics import fmean, pstdev

import torch
import torch.nn.functional as F

from ..augment.siamese import check_strategy
from ..core import DDError, choose, generator
from ..data.dataset import Dataset
from ..distilled import Synthetic
from ..nets.build import Backbone, build, initialise
from .loop import Recipe, accuracy, compiled, embed, halved, lowered, train

VERSION = 1  # raise it when a change here or in training.py changes results: old records are then made anew


def _idc(name: str, epochs: int) -> Recipe:
    """IDC's, also DREAM's and DREAM+'s (released code): trained on the decoded set with CutMix instead of cutout."""
    return Recipe(
        name,
        epochs=epochs,
        batch=64,
        drops=(2 * epochs // 3, 5 * epochs // 6),
        drop=0.2,
        reset=False,
        augment="color+flip+crop_scale_rotate",
        cutmix=0.5,
        tests=tuple(max(1, epochs * k // 4) for k in (1, 2, 3, 4)),
    )


def _frepo(name: str, epochs: int) -> Recipe:
    """FRePo's (released code): Adam on the learned labels' squared error, with warm-up and a cosine to 1 %."""
    return Recipe(
        name,
        epochs=epochs,
        lr=3e-4,
        batch=500,
        drops=(),
        optimiser="adam",
        loss="mse",
        warmup=500,
        cosine=0.01,
        augment="frepo:flip_color_crop_rotate_translate_cutout",
    )


# name -> (the recipe for E epochs, the usual E). Source: Zhao et al., DC (ICLR 2021), DSA (ICML 2021), DM (WACV 2023),
# released code. DM evaluates as DSA does. MTT, TESLA and FTD too, at the learned step size; DATM's batches are of 128.
PROTOCOLS: dict[str, tuple[Callable[[str, int], Recipe], int]] = {
    "dc": (partial(halved, augment="none"), 300),
    "dsa": (halved, 1000),
    "dm": (halved, 1000),
    "mtt": (halved, 1000),
    "datm": (partial(halved, batch=128), 1000),
    "idc": (_idc, 1000),
    "frepo": (_frepo, 1000),
}
OWN_AUGMENT = (
    "idc",
    "frepo",
)  # protocols with an augmentation of their own, whatever distillation uses


def protocol(
    name: str, *, epochs: int | None = None, augment: str | None = None, mirror: bool = True
) -> Recipe:
    """The recipe of a protocol; `epochs` shortens or lengthens it (E means E + 1 passes in the DC family), `augment`
    replaces its augmentation, where it has one, and without `mirror` the protocol's own has no flip (digits)."""
    make, usual = PROTOCOLS[choose("protocol", name, PROTOCOLS)]
    if epochs is not None and epochs < 1:
        raise DDError(f"eval_epochs must be at least 1, not {epochs}")
    recipe = make(name, epochs or usual)
    if not mirror:
        recipe = replace(recipe, augment=re.sub(r"flip[_+]", "", recipe.augment))
    if augment and recipe.augment != "none":
        check_strategy(augment)
        recipe = replace(recipe, augment=augment)
    return recipe


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
) -> Evaluation:
    """Train `networks` fresh networks on `syn` under its own protocol (or `recipe`) and test each on `data`.

    The last epoch counts; no epoch is picked. Network k depends on (seed, k) alone. `precision` "bf16" trains and
    tests under autocast (`loop.lowered`; the extra "krr" stays float32): 1.9 times as fast on a CPU with bf16
    instructions, compiled. Raises `DDError` where set and data do not belong together.
    """
    syn.check(data)
    if networks < 1:
        raise DDError(f"networks must be at least 1, not {networks}")
    if seed < 0:
        raise DDError(f"seed must be at least 0, not {seed}")
    choose("split", split, data.labels)
    if len(data.labels[split]) == 0:
        raise DDError(f"{data.name} has no {split} images: nothing to evaluate on")
    recipe, start = recipe or syn.recipe, time.perf_counter()
    syn = syn.to(data.device)
    images, labels = syn.training_set()
    net, forward = _network(
        backbone or syn.backbone, data.shape, data.num_classes, data.device, compile, precision
    )
    scores, extras = [], defaultdict(list)
    noted: list[float] = []

    def test(epoch: int) -> None:
        if epoch + 1 in recipe.tests:
            noted.append(accuracy(net, data, split, forward=forward))
            net.train()

    for k in range(networks):
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
        scores.append(accuracy(net, data, split, forward=forward))
        if noted:
            extras["best"].append(max(*noted, scores[-1]))
        if split == "test" and "val" in data.labels:
            extras["val"].append(accuracy(net, data, "val", forward=forward))
        if recipe.loss == "mse":
            extras["krr"].append(_krr(net, syn, data, split))
    return Evaluation(
        tuple(scores),
        recipe,
        net.spec,
        time.perf_counter() - start,
        {name: tuple(values) for name, values in extras.items()},
    )


@torch.no_grad()
def _krr(net: Backbone, syn: Synthetic, data: Dataset, split: str) -> float:
    """Accuracy (per cent) of ridge regression from the network's features of the set to its labels (FRePo, eq. 3)."""
    from ..methods.frepo import krr

    images, labels = syn.training_set()
    if (
        syn.spec.get("values", {}).get("flip") == "on"
    ):  # mirrored copies stand beside the images, as in distillation
        images, labels = (
            torch.cat([images, images.flip(3)]),
            labels.repeat(2, *[1] * (labels.ndim - 1)),
        )
    targets = labels if labels.is_floating_point() else F.one_hot(labels, data.num_classes).float()
    net.eval()
    support = torch.cat([net.features(x) for x in images.split(500)])
    answers, _ = krr(embed(net, data, split), support, targets)
    return 100 * (answers.argmax(1) == data.labels[split]).float().mean().item()
