"""What a method of another package may get wrong, each as one sentence that names the method and the remedy."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from traceback import extract_tb
from typing import Any

import torch
from torch import Tensor

from ..core import DDError
from ..data.dataset import Dataset
from ..methods import METHODS
from ..methods.base import Asset, ImageMethod, Method, Result


class StepError(DDError):
    """A step failed on the way: what it has changed is not to be kept."""


REMEDY = "mend it and give the same command again"
TO_PASS = (DDError, torch.OutOfMemoryError, torch.AcceleratorError)  # the engine says more of these


def _called(name: str, part: str, call: Callable[[], Any]) -> Any:
    """What `call` returns; whatever it raises, but for `TO_PASS`, is one sentence, and the cause of ours."""
    try:
        return call()
    except TO_PASS:
        raise
    except Exception as error:
        raise DDError(f"{_failure(name, part, error)}: {REMEDY}") from error


def _failure(name: str, part: str, error: Exception) -> str:
    what = f"{type(error).__name__}: {error}, {_line(error)}"
    return f"{part} of the method {name!r} fails ({what})"


def needs(name: str, config: Any) -> Sequence[Asset]:
    """What the method `name` needs made before it starts."""
    found = _called(name, "needs()", lambda: METHODS[name].needs(config))
    remedy = "let it return a list of assets with `make` (ddlib.methods.base.Asset), () for none"
    if not isinstance(found, Sequence) or isinstance(found, str):
        raise DDError(f"needs() of the method {name!r} returns {_shape(found)}: {remedy}")
    for asset in found:
        if not callable(getattr(asset, "make", None)):
            raise DDError(f"needs() of the method {name!r} returns {_shape(asset)} in it: {remedy}")
    return found


def made(name: str, asset: Asset, data: Dataset, backbone: str, **options: Any) -> list[Path]:
    """The files of an asset that the method `name` needs, which are made where they are not there yet."""
    return _called(name, "make() of an asset", lambda: [*asset.make(data, backbone, **options)])


def started(name: str, make: Callable[[], Method], data: Dataset, ipc: int) -> Method:
    """The method that `make` gives, once it is seen to have a loss, images [classes x IPC, ...], labels and a state."""
    method = _called(name, "__init__", make)
    if _lacks_loss(type(method)):
        raise DDError(f"the method {name!r} has no loss: write `loss(synthetic, classes)`")
    for member in ("images", "labels"):
        try:
            value = getattr(method, member)
        except AttributeError as error:
            raise DDError(f"the method {name!r} lacks self.{member}: set it in __init__") from error
        _check_count(
            f"the method {name!r} starts with", member, value, classes=data.num_classes, ipc=ipc
        )
    state(name, method)  # what else would fail at the first checkpoint
    return method


def _lacks_loss(cls: type) -> bool:
    """Whether an `ImageMethod` has nothing of its own for the images to be moved by."""
    parts = ("loss", "gradient", "step")
    return issubclass(cls, ImageMethod) and all(
        getattr(cls, part) is getattr(ImageMethod, part) for part in parts
    )


def _check_count(what: str, part: str, value: object, *, classes: int, ipc: int) -> None:
    if isinstance(value, Tensor) and value.shape[:1] == (classes * ipc,):
        return
    raise DDError(
        f"{what} {_shape(value)} as its {part}: there must be {classes} classes x {ipc} of them, "
        "class by class"
    )


def state(name: str, method: Method) -> Mapping[str, Tensor]:
    """What the method gives for a checkpoint."""
    found = _called(name, "state_dict()", method.state_dict)
    if not isinstance(found, Mapping):
        raise DDError(
            f"state_dict() of the method {name!r} returns {_shape(found)}: let it return tensors by name"
        )
    for key, value in found.items():
        if not isinstance(value, Tensor):
            raise DDError(
                f"state_dict() of the method {name!r} holds {_shape(value)} as {key!r}: put it in as a "
                "tensor, e.g. torch.tensor(self.steps)"
            )
    return found


def step(name: str, method: Method) -> Mapping[str, Any]:
    """What a step reports; whatever it raises, but for what the engine itself can say more of, is one sentence.

    The error that it raised is the cause of ours, with its traceback.
    """
    try:
        return method.step()
    except TO_PASS:
        raise
    except Exception as error:
        raise StepError(f"{_failure(name, 'the step', error)}: {REMEDY}") from error


def _line(error: Exception) -> str:
    """The innermost line that is no installed package's, e.g. "idm.py:41"."""
    frames = extract_tb(error.__traceback__)
    mine = [frame for frame in frames if "site-packages" not in frame.filename]
    frame = (mine or frames)[-1]  # all are a package's where ddlib is installed
    return f"{Path(frame.filename).name}:{frame.lineno}"


def numbers(name: str, report: Mapping[str, Any]) -> dict[str, float]:
    """What a step reports, as floats; this waits for the device."""
    if not isinstance(report, Mapping):
        raise DDError(
            f"the step of the method {name!r} returns {_shape(report)}: let it return numbers by name, "
            "e.g. {'loss': loss}"
        )
    found = {}
    for key, value in report.items():
        try:
            found[key] = float(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise DDError(
                f"the step of the method {name!r} returns {_shape(value)} as {key!r}, which is no number: "
                "let it return one number per name"
            ) from error
    return found


def result(name: str, method: Method, classes: int, ipc: int) -> Result:
    """What the method hands over for evaluation: a `Result` of classes x IPC images and labels."""
    found = _called(name, "result()", method.result)
    what = f"result() of the method {name!r} returns"
    if not isinstance(found, Result):
        raise DDError(f"{what} {_shape(found)}: let it return a ddlib.methods.base.Result")
    for member in ("images", "labels"):
        _check_count(what, member, getattr(found, member), classes=classes, ipc=ipc)
    return found


def summary(name: str, method: Method) -> dict[str, Any]:
    """The method's own part of the record."""
    try:
        found = dict(method.summary())
        json.dumps(found)
    except Exception as error:
        raise DDError(
            f"{_failure(name, 'summary()', error)}: {REMEDY}, which goes on from the checkpoint"
        ) from error
    return found


def _shape(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)}"
    return "nothing" if value is None else f"a {type(value).__name__}"
