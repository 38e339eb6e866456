"""The few small things that every other file needs: one error, choices, random streams, devices."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import math
import numbers as abstract
import os
import reprlib
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 200
_REPR.maxlevel = 3  # lists of lists of lists: each level may hold the one below a dozen times
_REPR.maxdict = _REPR.maxlist = _REPR.maxtuple = _REPR.maxset = 12
_LONGEST = 400  # characters of a value in a sentence


class DDError(ValueError):
    """The one error that a user sees: one sentence that names what is wrong and what is allowed."""

    def __str__(self) -> str:
        """On one line, whatever a file of the user's is called: what cannot be printed is written as Python does."""
        text = super().__str__()
        if text.isprintable():
            return text
        return "".join(
            sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text
        )

    def _render_traceback_(self) -> list[str]:
        """What IPython, and so a notebook, shows in place of the traceback; the cell still fails, and papermill too."""
        return [f"ddlib: {self}"]


def choose(what: str, value: object, allowed: Iterable[object]) -> object:
    """Return `value` if it is one of `allowed`, else raise `DDError` naming the choices and the nearest one."""
    allowed = list(allowed)
    if isinstance(value, (str, int, float, type(None))) and value in allowed:
        return value
    words = [str(word) for word in allowed]
    near = difflib.get_close_matches(value, words, n=1) if isinstance(value, str) else []
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    raise DDError(
        f"unknown {what} {shown(value)}{hint}; "
        f"allowed: {', '.join(word or '(empty)' for word in words)}"
    )


def check_only(method: str, only: Mapping[str, tuple], config: object) -> None:
    """Raise `DDError` where a setting that is the method's own has another value than those of `only`."""
    for key, allowed in only.items():
        if (value := getattr(config, key)) not in allowed:
            words = " or ".join(shown(choice) for choice in allowed)
            raise DDError(
                f"{key} {shown(value)} makes another method of {method}: allowed with it: {words}"
            )


def shown(value: object) -> str:
    """`repr(value)` for an error's sentence, shortened: a user may give a value of any size and depth."""
    try:
        text = _REPR.repr(value)
    except Exception:  # noqa: BLE001  whatever another library's repr does
        return f"a {type(value).__name__}"
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def plain(value: object) -> object:
    """A NumPy (or any other) number as Python's bool, int or float, which settings and names are made of."""
    if isinstance(value, (bool, int, float)):
        return value
    if type(value).__name__ in ("bool", "bool_") and hasattr(value, "item"):
        return value.item()
    if isinstance(value, abstract.Integral):
        return int(value)
    return float(value) if isinstance(value, abstract.Real) else value


MOST = 2**63 - 1  # of any integer: what a tensor holds, and Python writes


def whole(what: str, value: object, least: int) -> int:
    """`value` as an int of at least `least` and at most `MOST`, else a `DDError` that names `what`."""
    value = plain(value)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise DDError(f"{what} must be an integer of at least {least}, not {shown(value)}")
    if value > MOST:
        raise DDError(f"{what} must be an integer of at most {MOST}, not {shown(value)}")
    return value


def instance(what: str, value: object, *kinds: type | None) -> Any:
    """`value` if it is of one of `kinds`, where None stands for itself, else a `DDError` that names `what`."""
    classes = tuple(type(None) if kind is None else kind for kind in kinds)
    if isinstance(value, classes):
        return value
    names = " or ".join("None" if kind is None else kind.__name__ for kind in kinds)
    raise DDError(f"{what} must be of type {names}, not {shown(value)}")


def listed(what: str, values: object) -> list:
    """The elements of `values`, if they can be counted one by one, else a `DDError` that names `what`."""
    with suppress(TypeError):
        if not isinstance(values, (str, bytes)):
            return list(values)
    raise DDError(f"{what} must be a list, not {shown(values)}")


def path_of(what: str, value: object) -> Path:
    """`value` as a path, else a `DDError` that names `what`."""
    path = Path(instance(what, value, str, os.PathLike))
    with suppress(UnicodeEncodeError):
        if b"\0" not in os.fsencode(path):
            return path
    raise DDError(f"{what} must be a name that a file can have, not {shown(value)}")


def numbers(text: object, kind: type = int, least: float | None = None) -> list:
    """A notebook's scalar parameter as the list it means: "1,10" -> [1, 10], 1 -> [1]; `kind` is int or float."""
    if kind is not int and kind is not float:
        raise DDError(f"the kind of numbers must be int or float, not {shown(kind)}")
    instance("the least of numbers", least, int, float, None)
    text = plain(text)
    with suppress(ValueError):
        parts = str(text).split(",") if isinstance(text, (str, int, float)) else [""]
        found = [kind(part) for part in parts]
        if least is None or all(number >= least for number in found):
            return found
    what = f"{'whole ' * (kind is int)}numbers{'' if least is None else f' of at least {shown(least)}'}"
    raise DDError(f"{shown(text)} is no list of {what}; write them with commas, as in '1,10'")


def generator(seed: int, *purpose: object) -> torch.Generator:
    """A CPU generator fixed by (seed, purpose...), e.g. `generator(0, "dm", "network", step)`.

    Every draw of the library comes from one of these. They live on the CPU whatever the device, so a seed means
    the same draws everywhere, and a resumed run needs no generator state: the step is part of the purpose.
    """
    digest = hashlib.sha256(repr((seed, *purpose)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


_BITS = (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)


def checksum(*tensors: torch.Tensor) -> str:
    """sha256 over dtype, shape and bytes of the tensors, as hex."""
    sha = hashlib.sha256()
    for tensor in tensors:
        tensor = tensor.detach().cpu().contiguous()
        if tensor.dtype in _BITS:  # NumPy has no such numbers
            sha.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
            tensor = tensor.flatten().view(torch.uint8)
        array = tensor.numpy()
        sha.update(f"{array.dtype}{array.shape}".encode())
        sha.update(array.data)
    return sha.hexdigest()


def upload(table: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A CPU tensor on `device`, by a copy that does not wait for a GPU: it goes through pinned memory."""
    if device.type == "cuda":
        return table.pin_memory().to(device, non_blocking=True)
    return table.to(device)


def pick_device(device: str | torch.device = "auto") -> torch.device:
    """`auto` is CUDA where there is one, else the CPU; anything else must be a device torch can use here."""
    if not isinstance(device, (str, torch.device)):
        raise DDError(f"device must be auto, cpu, cuda or a torch.device, not {shown(device)}")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        if torch.device(device).type != "meta":  # which has shapes and no values
            return torch.empty(0, device=device).device  # as tensors report it: "cuda" is "cuda:0"
        error = None
    except (RuntimeError, AssertionError, TypeError) as caught:
        error = caught
    raise DDError(
        f"device {str(device)!r} cannot be used here; allowed: auto, cpu"
        f"{', cuda' if torch.cuda.is_available() else ' (no CUDA device is visible)'}"
    ) from error


class Interrupted(DDError):
    """The run was stopped by a signal; its checkpoint holds every finished step."""


def fields_from(cls: type, values: dict, what: str) -> object:
    """Build the frozen dataclass `cls` from `values`; an unknown key or a wrong type is a `DDError` naming it.

    Types are those of the annotations: bool, int, float (an int will do), str, tuple. A field's metadata may carry
    `allowed` (a tuple of choices), `least` and `most` (bounds) or `below` (a bound that is not reached).
    """
    known = {field.name: field for field in dataclasses.fields(cls)}
    clean = {}
    for key, value in values.items():
        choose(f"{what} key", key, known)
        clean[key] = _field_value(known[key], plain(value), what)
    return cls(**clean)


KINDS = {"bool": bool, "int": int, "float": (int, float), "str": str, "tuple": (list, tuple)}


def kind_of(field: dataclasses.Field) -> str:
    """The name of a field's type, whether its annotation is a type or, under `from __future__`, a text."""
    return getattr(field.type, "__name__", str(field.type)).split("[")[0]


def _field_value(field: dataclasses.Field, value: object, what: str) -> object:
    kind, bounds, key = kind_of(field), field.metadata, field.name
    wrong = isinstance(value, bool) and kind != "bool"
    if wrong or not isinstance(value, KINDS[kind]):
        raise DDError(f"{what} key {key!r} must be {kind}, not {shown(value)}")
    if kind == "int" and abs(value) > MOST:
        raise DDError(f"{what} key {key!r} must be at most {MOST}, not {shown(value)}")
    if "allowed" in bounds:
        choose(f"{what} {key}", value, bounds["allowed"])
    if kind == "tuple" and "[" in str(field.type):
        value = tuple(map(plain, value))
        inner = KINDS[str(field.type).split("[")[1].split(",")[0]]  # of tuple[int, ...]
        if not all(isinstance(each, inner) and not isinstance(each, bool) for each in value):
            raise DDError(f"{what} key {key!r} must be {field.type}, not {shown(value)}")
    for bound, words, holds in _BOUNDS:
        if bound in bounds and not holds(value, bounds[bound]):
            raise DDError(f"{what} key {key!r} must be {words} {bounds[bound]}, not {shown(value)}")
    if kind == "tuple":
        return tuple(value)
    return _finite(value, f"{what} key {key!r}") if kind == "float" else value


_BOUNDS = (
    ("least", "at least", lambda value, bound: value >= bound),
    ("most", "at most", lambda value, bound: value <= bound),
    ("below", "below", lambda value, bound: value < bound),
)


def _finite(value: float, what: str) -> float:
    with suppress(OverflowError):  # an int of 400 digits
        value = float(value)
        if math.isfinite(value) and abs(value) <= 1e30:  # float32 ends at 3.4e38
            return value
    raise DDError(f"{what} must be a finite number of at most 1e30, not {shown(value)}")


def option(default: object, **bounds: object) -> object:
    """A field with a default and the bounds `allowed`, `least`, `most` and `below` that `fields_from` checks."""
    return dataclasses.field(default=default, metadata=bounds)
