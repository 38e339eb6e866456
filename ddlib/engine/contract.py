"""What a method of another package may get wrong, each as one sentence that names the method and the remedy."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from traceback import extract_tb
from typing import Any

import torch
from torch import Tensor

from ..core import DDError
from ..data.dataset import Dataset
from ..methods.base import Method, Result


class StepError(DDError):
    """A step failed on the way: what it has changed is not to be kept."""


def started(name: str, method: Method, data: Dataset, ipc: int) -> Method:
    """`method`, once it is seen to hold images [classes x IPC, C, H, W] and their labels."""
    for member in ("images", "labels"):
        try:
            value = getattr(method, member)
        except AttributeError as error:
            raise DDError(f"the method {name!r} lacks self.{member}: set it in __init__") from error
        if not isinstance(value, Tensor) or len(value) != data.num_classes * ipc:
            raise DDError(
                f"the method {name!r} starts with {_shape(value)} as its {member}: there must be "
                f"{data.num_classes} classes x {ipc} of them, class by class"
            )
    return method


def step(name: str, method: Method) -> Mapping[str, Any]:
    """What a step reports; whatever it raises, but for what the engine itself can say more of, is one sentence.

    The error that it raised is the cause of ours, with its traceback.
    """
    try:
        return method.step()
    except (DDError, torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except Exception as error:
        raise StepError(
            f"the step of the method {name!r} fails ({type(error).__name__}: {error}, {_line(error)}): "
            "mend it and give the same command again"
        ) from error


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


def result(name: str, method: Method) -> Result:
    """What the method hands over for evaluation."""
    found = method.result()
    if isinstance(found, Result):
        return found
    raise DDError(
        f"result() of the method {name!r} returns {_shape(found)}: let it return a "
        "ddlib.methods.base.Result"
    )


def summary(name: str, method: Method) -> dict[str, Any]:
    """The method's own part of the record."""
    remedy = "mend it and give the same command again, which goes on from the checkpoint"
    try:
        found = dict(method.summary())
        json.dumps(found)
    except DDError:
        raise
    except Exception as error:
        raise DDError(
            f"summary() of the method {name!r} fails ({type(error).__name__}: {error}): {remedy}"
        ) from error
    return found


def _shape(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)}"
    return "nothing" if value is None else f"a {type(value).__name__}"
