"""The contract of a method as a test, for ours and for those of other packages: `check_method("idm")`."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields
from functools import partial
from typing import Any

import numpy
import torch
from torch import Tensor

from .config import resolve
from .core import DDError, pick_device
from .data.dataset import Dataset, load
from .engine import contract
from .files import environment
from .methods import METHODS
from .methods.base import Method

IPC = 2


class Double(Dataset):
    """The same dataset in float64."""

    def batch(self, split: str, index: Any) -> Tensor:
        return super().batch(split, index).double()


def check_method(name: str, *, steps: int = 3, **settings: Any) -> None:
    """Raise `AssertionError`, in one sentence, where the registered method `name` breaks the contract.

    It is run on a part of the embedded digits, by its smoke preset, a network of width 8 and `settings` (keys of its
    Config): the same seed gives the same bits, another seed others; a stop after any step and a resume end in the same
    bytes; labels stand class by class, soft ones by their sum over a class's images; no global random state is read or
    written; images that are not finite are refused, before anything changes; float64 data give float64 images; and the
    state of one device is taken on another, where there are two. Takes a few seconds.
    """
    with tempfile.TemporaryDirectory() as scratch, environment(DDLIB_EXPERTS=scratch):
        spec = resolve(name, "digits", IPC, "smoke", **{"backbone": "convnet:width=8"} | settings)
        steps = min(steps, spec.config.iterations)
        data = load("digits", device="cpu").subset(60)
        for asset in contract.needs(name, spec.config):
            contract.made(name, asset, data, spec.run.backbone, progress=False)

        def make(seed: int = 0, data: Dataset = data) -> Method:
            cls = METHODS[name]
            start = partial(cls, spec.config, data, IPC, spec.run.backbone, seed)
            return contract.started(name, start, data, IPC)

        whole = _labels_and_seeds(name, make, steps)
        _resume(name, make, steps, whole)
        _global_state(name, make, steps, whole)
        if steps:
            _not_finite(name, make)
        _float64(name, make, data, min(steps, 1))
        _devices(name, make, data)


def _fail(name: str, sentence: str) -> None:
    raise AssertionError(f"the method {name!r} {sentence}")


def _after(method: Method, steps: int) -> Method:
    for _ in range(steps):
        method.step()
    return method


def _copy(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.detach().clone() for key, value in state.items()}


def _same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    alike = lambda x, y: x.shape == y.shape and torch.equal(x.nan_to_num(7.0), y.nan_to_num(7.0))
    return a.keys() == b.keys() and all(alike(a[key], b[key]) for key in a)


def _labels_and_seeds(name: str, make: Callable[..., Method], steps: int) -> dict[str, Tensor]:
    """The state after all steps of seed 0."""
    method = make()
    count = len(method.labels) // IPC
    for _ in range(steps):
        contract.numbers(name, method.step())
    result = contract.result(name, method, count, IPC)
    if not torch.equal(_classes(result.labels).cpu(), torch.arange(count)):
        _fail(
            name, "has labels that do not stand class by class: image k belongs to class k // IPC"
        )
    contract.summary(name, method)
    state = _copy(method.state_dict())
    if not _same(state, _copy(_after(make(), steps).state_dict())):
        _fail(
            name, "ends in other bits when the same seed is run again: draw everything from `rng`"
        )
    if torch.equal(result.images, _after(make(seed=1), steps).result().images):
        _fail(name, "has the same images under another seed")
    return state


def _classes(labels: Tensor) -> Tensor:
    """The class of each IPC labels in turn, by their sum where they are soft; -1 where hard ones differ."""
    of_class = labels.unflatten(0, (-1, IPC))
    if labels.ndim > 1:
        return of_class.sum(1).argmax(1)
    return torch.where((of_class == of_class[:, :1]).all(1), of_class[:, 0], -1)


def _resume(name: str, make: Callable[..., Method], steps: int, whole: dict[str, Tensor]) -> None:
    for stop in range(steps + 1):
        kept = _copy(_after(make(), stop).state_dict())
        again = make()
        again.load_state_dict(_copy(kept))
        if not _same(kept, again.state_dict()):
            _fail(name, f"does not take back the state that it gave after step {stop}")
        if not _same(whole, _after(again, steps - stop).state_dict()):
            _fail(name, f"ends in other bits when it is stopped after step {stop} and resumed")


def _global_state(
    name: str, make: Callable[..., Method], steps: int, whole: dict[str, Tensor]
) -> None:
    torch.manual_seed(5), numpy.random.seed(5), random.seed(5)
    before = torch.get_rng_state(), numpy.random.get_state()[1].tolist(), random.getstate()
    state = _after(make(), steps).state_dict()
    after = torch.get_rng_state(), numpy.random.get_state()[1].tolist(), random.getstate()
    if not torch.equal(before[0], after[0]) or before[1:] != after[1:]:
        _fail(name, "draws from the global random state: draw from `rng`")
    if not _same(whole, state):
        _fail(name, "depends on the global random state: draw from `rng`")


def _not_finite(name: str, make: Callable[..., Method]) -> None:
    """Images that are NaN: an error before anything changes, or a report that the engine refuses."""
    good = _copy(_after(make(), 1).state_dict())
    floats = [key for key, value in good.items() if value.is_floating_point()]
    method = make()
    method.load_state_dict(
        _copy(good) | {key: torch.full_like(good[key], torch.nan) for key in floats}
    )
    with suppress(DDError):
        report = contract.numbers(name, method.step())
        if all(map(numpy.isfinite, report.values())) and method.images.isfinite().all():
            _fail(name, "goes on silently from images that are not finite")
    for key in floats:  # in one at a time, and half of it, so that a change of all else is seen
        _refusal(name, make(), good | {key: _half_nan(good[key])})


def _half_nan(value: Tensor) -> Tensor:
    """A copy with the first half of the numbers NaN, the one that there is included."""
    flat = value.flatten().clone()
    flat[: (len(flat) + 1) // 2] = torch.nan
    return flat.view_as(value)


def _refusal(name: str, method: Method, bad: dict[str, Tensor]) -> None:
    """Where the next step from the state `bad` is refused, it is refused before anything has changed."""
    method.load_state_dict(_copy(bad))
    try:
        method.step()
    except DDError:
        if not _same(bad, method.state_dict()):
            _fail(name, "changes its state before it refuses what is not finite")


def _float64(name: str, make: Callable[..., Method], data: Dataset, steps: int) -> None:
    double = Double(**{field.name: getattr(data, field.name) for field in fields(data)})
    images = _after(make(data=double), steps).images
    if images.dtype != torch.float64:
        _fail(name, f"turns float64 data into {images.dtype} images: build networks with `network`")


def _devices(name: str, make: Callable[..., Method], data: Dataset) -> None:
    other = pick_device("auto")
    if other == data.device:
        return
    moved = make(data=data.to(other))
    moved.load_state_dict(_copy(make().state_dict()))
    if moved.images.device != other:
        _fail(name, f"keeps the images on the device of the state that it is given, not on {other}")
