"""How one network is trained, as plain data, and the papers' evaluation protocols by name."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from .augment.siamese import check_strategy
from .core import DDError, choose, instance, plain, whole

# Of the evaluation: raise it when a change here or in ddlib/train changes results, and old records are made anew.
VERSION = 1
PRECISIONS = ("float32", "bf16")  # of the networks' passes


@dataclass(frozen=True)
class Recipe:
    """How one network is trained; the defaults are the DSA protocol (dm: same), DSA paper and released code."""

    name: str = "dsa"  # the protocol's name in tables
    epochs: int = 1001  # passes over the set; the released loop runs 0..1000 inclusive
    lr: float = 0.01  # step size, or the learned one where the method learns it
    momentum: float = 0.9
    weight_decay: float = 5e-4
    batch: int = 256  # the last, smaller batch is kept
    drops: tuple[int, ...] = (502,)  # after so many epochs the step size is multiplied by `drop`
    drop: float = 0.1
    # DSA: one operation per batch, parameters per image
    augment: str = "color_crop_cutout_flip_scale_rotate"
    # A drop also forgets the momentum, since the DC family's code builds a new optimiser
    reset: bool = True
    cutmix: float = 0.0  # share of batches mixed by CutMix (IDC)
    optimiser: str = "sgd"  # a name of `ddlib.train.loop.OPTIMISERS`
    # Or mse: half the squared error, summed over classes, on centred labels (FRePo)
    loss: str = "ce"
    warmup: int = 0  # steps in which the step size grows from 0; at most half of them all
    cosine: float = 1.0  # share of the step size that a cosine ends at; 1 is no cosine
    # Epochs after which the test accuracy is noted too, for "best of" columns
    tests: tuple[int, ...] = ()

    def tuned(self, changes: Mapping[str, Any]) -> Recipe:
        """This recipe with what a distilled set brings along, e.g. {"lr": 0.02} where the step size is learned.

        A share of CutMix counts only under a protocol that mixes: a method cannot add it to another's evaluation.
        """
        for key in changes:
            choose("change of the recipe", key, vars(self))
        own = {key: value for key, value in changes.items() if key != "cutmix" or self.cutmix}
        return replace(self, **own)


def halved(name: str, epochs: int, **changes) -> Recipe:
    """The DC family's schedule for `--epoch_eval_train epochs`: epochs + 1 passes, one drop after epochs // 2 + 2."""
    return Recipe(name=name, epochs=epochs + 1, drops=(epochs // 2 + 2,), **changes)


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


@dataclass(frozen=True)
class EvaluationProtocol:
    """One way to train the networks that judge a set."""

    make: Callable[[str, int], Recipe]  # (name, E) -> the recipe for E epochs
    epochs: int = 1000  # the usual E
    own_augment: bool = False  # it has an augmentation of its own, whatever distillation uses


# Source: Zhao et al., DC (ICLR 2021), DSA (ICML 2021), DM (WACV 2023), released code. DM evaluates as DSA does. MTT,
# TESLA and FTD too, at the learned step size; DATM's batches are of 128.
PROTOCOLS: dict[str, EvaluationProtocol] = {
    "dc": EvaluationProtocol(partial(halved, augment="none"), epochs=300),
    "dsa": EvaluationProtocol(halved),
    "dm": EvaluationProtocol(halved),
    "mtt": EvaluationProtocol(halved),
    "datm": EvaluationProtocol(partial(halved, batch=128)),
    "idc": EvaluationProtocol(_idc, own_augment=True),
    "frepo": EvaluationProtocol(_frepo, own_augment=True),
}


def register_protocol(name: str, protocol: EvaluationProtocol) -> None:
    """Offer `protocol` under a new name; a name that is taken by another one is a `DDError`."""
    if PROTOCOLS.get(name, protocol) != protocol:
        raise DDError(f"the protocol name {name!r} is taken: register it under another one")
    PROTOCOLS[name] = protocol


def own_augment(name: str) -> bool:
    """Whether the protocol `name` has an augmentation of its own, whatever distillation uses."""
    return PROTOCOLS[choose("protocol", name, PROTOCOLS)].own_augment


def usual_epochs(name: str) -> int:
    """E of the protocol `name` where nothing else is asked for."""
    return PROTOCOLS[choose("protocol", name, PROTOCOLS)].epochs


def protocol(
    name: str, *, epochs: int | None = None, augment: str | None = None, mirror: bool = True
) -> Recipe:
    """The recipe of a protocol; `epochs` shortens or lengthens it (E means E + 1 passes in the DC family), `augment`
    replaces its augmentation, where it has one, and without `mirror` the protocol's own has no flip (digits)."""
    found = PROTOCOLS[choose("protocol", name, PROTOCOLS)]
    epochs = None if epochs is None else whole("eval_epochs", epochs, 1)
    recipe = found.make(name, epochs or found.epochs)
    if not instance("mirror", plain(mirror), bool):
        recipe = replace(recipe, augment=re.sub(r"flip[_+]", "", recipe.augment))
    if instance("augment", augment, str, None) and recipe.augment != "none":
        check_strategy(augment)
        recipe = replace(recipe, augment=augment)
    return recipe
