"""The few small things that every other file needs: one error, one random stream, one way to stop or write."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import os
import secrets
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

SOURCE = Path(__file__).resolve().parents[1]  # the checkout, when ddlib is installed from one


class DDError(ValueError):
    """The one error that a user sees: one sentence that names what is wrong and what is allowed."""

    def _render_traceback_(self) -> list[str]:
        """What IPython, and so a notebook, shows in place of the traceback; the cell still fails, and papermill too."""
        return [f"ddlib: {self}"]


def choose(what: str, value: object, allowed: Iterable[object]) -> object:
    """Return `value` if it is one of `allowed`, else raise `DDError` naming the choices and the nearest one."""
    allowed = list(allowed)
    if value in allowed:
        return value
    near = difflib.get_close_matches(str(value), [str(a) for a in allowed], n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    raise DDError(
        f"unknown {what} {value!r}{hint}; allowed: {', '.join(str(a) or '(empty)' for a in allowed)}"
    )


def numbers(text: object, kind: type = int, least: float | None = None) -> list:
    """A notebook's scalar parameter as the list it means: "1,10" -> [1, 10], 1 -> [1]; `kind` is int or float."""
    with suppress(ValueError):
        found = [kind(part) for part in str(text).split(",")]
        if least is None or all(number >= least for number in found):
            return found
    what = f"{'whole ' * (kind is int)}numbers{'' if least is None else f' of at least {least}'}"
    raise DDError(f"{text!r} is no list of {what}; write them with commas, as in '1,10'")


def generator(seed: int, *purpose: object) -> torch.Generator:
    """A CPU generator fixed by (seed, purpose...), e.g. `generator(0, "dm", "network", step)`.

    Every draw of the library comes from one of these. They live on the CPU whatever the device, so a seed means
    the same draws everywhere, and a resumed run needs no generator state: the step is part of the purpose.
    """
    digest = hashlib.sha256(repr((seed, *purpose)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def checksum(*tensors: torch.Tensor) -> str:
    """sha256 over dtype, shape and bytes of the tensors, as hex."""
    sha = hashlib.sha256()
    for tensor in tensors:
        array = tensor.detach().cpu().contiguous().numpy()
        sha.update(f"{array.dtype}{array.shape}".encode())
        sha.update(array.data)
    return sha.hexdigest()


def pick_device(device: str | torch.device = "auto") -> torch.device:
    """`auto` is CUDA where there is one, else the CPU; anything else must be a device torch can use here."""
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


def results_folder(results: str | Path | None = None) -> Path:
    """Where records live: the argument, else DDLIB_RESULTS, else `results/` of the checkout or working directory."""
    root = SOURCE if (SOURCE / "pyproject.toml").is_file() else Path.cwd()
    return Path(results or os.environ.get("DDLIB_RESULTS") or root / "results")


class Interrupted(DDError):
    """The run was stopped by a signal; its checkpoint holds every finished step."""


@contextmanager
def guard() -> Iterator[dict]:
    """Turn SIGTERM and Ctrl-C into KeyboardInterrupt, but never inside a step, which would tear its state."""
    flags = {"stepping": False, "stop": False}

    def handle(*_: object) -> None:
        flags["stop"] = True
        if not flags["stepping"]:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield flags
        return
    old = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield flags
    finally:
        for number, previous in old.items():
            signal.signal(number, previous)


def write_atomically(path: Path, write: Callable[[Path], None]) -> Path:
    """Call `write(temporary)` beside `path`, then rename: a reader sees the old file or the whole new one."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
    except OSError as error:
        raise DDError(
            f"cannot write {path}: {error.strerror}; choose a writable folder (--results DIR, "
            f"or the environment variable DDLIB_RESULTS)"
        ) from error
    try:
        rights = (
            temporary.stat().st_mode
        )  # what the umask gives; safetensors would leave the owner alone with it
        write(temporary)
        temporary.chmod(rights)
        os.replace(temporary, path)
    except (
        OSError,
        SafetensorError,
    ) as error:  # safetensors wraps a full disk in an error of its own
        raise DDError(
            f"cannot write {path}: {getattr(error, 'strerror', None) or error}"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    return path


def save_tensors(path: Path, tensors: dict[str, torch.Tensor], header: dict) -> Path:
    """Write tensors and a JSON header as one safetensors file: loading it can never run code."""
    # Copies: safetensors refuses tensors that share memory, as a set and its first snapshot may.
    tensors = {
        name: value.detach().cpu().contiguous().clone() for name, value in sorted(tensors.items())
    }
    meta = {"ddlib": json.dumps({**header, "sha256": checksum(*tensors.values())}, sort_keys=True)}
    return write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata=meta))


def load_tensors(path: Path, kind: str, cure: str) -> tuple[dict[str, torch.Tensor], dict]:
    """Read what `save_tensors` wrote as (tensors, header); a missing, truncated or altered file is a `DDError`."""
    if not path.is_file():
        raise DDError(f"no {kind} at {path}; {cure}")
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})["ddlib"])
            tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise DDError(
            f"the {kind} {path} is damaged or not ddlib's ({type(error).__name__}); {cure}"
        ) from error
    if header.pop("sha256", None) != checksum(*tensors.values()):
        raise DDError(f"the {kind} {path} was altered: its checksum does not match; {cure}")
    return tensors, header


def fields_from(cls: type, values: dict, what: str) -> object:
    """Build the frozen dataclass `cls` from `values`; an unknown key or a wrong type is a `DDError` naming it.

    Types are those of the annotations: bool, int, float (an int will do), str, tuple. A field's metadata may carry
    `allowed` (a tuple of choices), `least` (a lower bound) or `below` (a bound that is not reached).
    """
    kinds = {"bool": bool, "int": int, "float": (int, float), "str": str, "tuple": (list, tuple)}
    known = {field.name: field for field in dataclasses.fields(cls)}
    clean = {}
    for key, value in values.items():
        choose(f"{what} key", key, known)
        field, kind = known[key], known[key].type.split("[")[0]
        if not isinstance(value, kinds[kind]) or (isinstance(value, bool) and kind != "bool"):
            raise DDError(f"{what} key {key!r} must be {field.type}, not {value!r}")
        if "allowed" in field.metadata:
            choose(f"{what} {key}", value, field.metadata["allowed"])
        if "least" in field.metadata and not value >= field.metadata["least"]:
            raise DDError(
                f"{what} key {key!r} must be at least {field.metadata['least']}, not {value!r}"
            )
        if "below" in field.metadata and not value < field.metadata["below"]:
            raise DDError(
                f"{what} key {key!r} must be below {field.metadata['below']}, not {value!r}"
            )
        clean[key] = {"tuple": tuple, "float": float}.get(kind, lambda v: v)(value)
    return cls(**clean)


def option(default: object, **bounds: object) -> object:
    """A dataclass field with a default and the bounds `allowed`, `least` and `below` that `fields_from` checks."""
    return dataclasses.field(default=default, metadata=bounds)
