"""Files that are whole or refused: atomic writes, safetensors and JSON under one checksum, locks.

Every file of ours carries a checksum over all that it says: `sha256` in the header of a safetensors file, `seal` in a
JSON object. Files that ddlib wrote before it did so stay readable: a safetensors file of theirs has a checksum of its
tensors alone, a JSON file none at all (`sealed` tells them apart).
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .core import DDError, checksum, instance, shown

SOURCE = Path(__file__).resolve().parents[1]  # the checkout, when ddlib is installed from one
_LARGEST = 2**26  # characters of a JSON file, which is a record or a table of figures
_STALE = 3600  # seconds after which a temporary file is nobody's any more


class CannotWrite(DDError):
    """A file could not be written: the folder is missing, read-only or full."""


class Busy(DDError):
    """Another process holds the lock, and the caller asked not to wait for it."""


def home() -> Path:
    """Where results and figures are kept: the checkout, or the working directory where there is none."""
    return SOURCE if (SOURCE / "pyproject.toml").is_file() else Path.cwd()


def figures_folder() -> Path:
    """Where figures are drawn: DDLIB_FIGURES, else `figures/` of the checkout or working directory."""
    return Path(os.environ.get("DDLIB_FIGURES") or home() / "figures")


def results_folder(results: str | Path | None = None) -> Path:
    """Where records live: the argument, else DDLIB_RESULTS, else `results/` of the checkout or working directory.

    Raises `DDError` for a name that no folder can have.
    """
    instance("results", results, str, Path, None)
    folder = Path(results or os.environ.get("DDLIB_RESULTS") or home() / "results")
    try:
        folder.is_dir()
    except OSError as error:
        raise DDError(f"no results can be in {shown(str(folder))}: {error.strerror}") from None
    return folder


def write_atomically(path: Path, write: Callable[[Path], None]) -> Path:
    """Call `write(temporary)` beside `path`, then rename: a reader sees the old file or the whole new one.

    Temporary files of `path` that a killed process left more than an hour ago are removed. Raises `CannotWrite`.
    """
    try:
        if path.is_char_device() or path.is_block_device():  # root would replace it for everybody
            raise FileExistsError(errno.EEXIST, "it is a device")
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path, or no name
        raise _no_folder(path, error) from error
    try:
        # What the umask gives; safetensors would leave the owner alone with it.
        rights = temporary.stat().st_mode
        write(temporary)
        temporary.chmod(rights)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:  # safetensors has its own error for a full disk
        reason = getattr(error, "strerror", None) or error
        raise CannotWrite(f"cannot write {path}: {reason}") from error
    finally:
        with suppress(OSError):  # the folder went read-only meanwhile
            temporary.unlink(missing_ok=True)
    sweep(path)
    return path


def _no_folder(path: Path, error: Exception) -> CannotWrite:
    reason = getattr(error, "strerror", None) or error
    return CannotWrite(
        f"cannot write {path}: {reason}; choose a writable folder (--results DIR, or the "
        "environment variable DDLIB_RESULTS)"
    )


def sweep(path: Path) -> None:
    """Remove old temporary files of `path` and of those that have its name and another ending."""
    ours = re.compile(re.escape(f".{path.stem}.") + r"(.+\.)?[0-9a-f]{8}")
    with suppress(OSError), os.scandir(path.parent) as entries:
        for entry in entries:
            if ours.fullmatch(entry.name) and time.time() - entry.stat().st_mtime > _STALE:
                os.unlink(entry.path)


@contextmanager
def environment(**values: str) -> Iterator[None]:
    """Environment variables as given inside, and afterwards as they were."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def lock(path: Path, what: str, wait: bool = True) -> Iterator[bool]:
    """Hold the lock of `path`, which lies in `.locks/` beside it; a dead process's lock is free at once.

    Gives whether it is held: a file system without locks is used without, after one warning. `what` names the work in
    the sentence of `Busy`, which is raised where another process holds the lock and `wait` is False. Raises
    `CannotWrite`.
    """
    from filelock import FileLock, Timeout  # slow to import, and most calls need no lock

    place = path.parent / ".locks" / f"{path.name}.lock"
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        place.touch()
    except (OSError, ValueError) as error:
        raise _no_folder(path, error) from error
    held = FileLock(place)
    try:
        try:
            held.acquire(timeout=0)
        except Timeout:
            if not wait:
                raise Busy(f"another process is at work on {what}") from None
            print(f"ddlib: waiting for the process at work on {what}", file=sys.stderr)
            held.acquire(poll_interval=0.05)
    except (OSError, NotImplementedError):
        warnings.warn(
            f"{place.parent} is on a file system without locks: two processes may do the same work",
            stacklevel=3,
        )
    try:
        yield held.is_locked
    finally:
        held.release()


def save_tensors(path: Path, tensors: dict[str, torch.Tensor], header: dict) -> Path:
    """Write tensors and a JSON header as one safetensors file: loading it can never run code."""
    # Copies: safetensors refuses tensors that share memory, as a set and its first snapshot may.
    tensors = {
        name: value.detach().cpu().contiguous().clone() for name, value in sorted(tensors.items())
    }
    seal = seal_of(json.loads(json.dumps(header)), [*tensors], checksum(*tensors.values()))
    meta = {"ddlib": json.dumps({**header, "sha256": seal}, sort_keys=True)}
    return write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata=meta))


def load_tensors(path: Path, kind: str, cure: str) -> tuple[dict[str, torch.Tensor], dict]:
    """Read what `save_tensors` wrote as (tensors, header); a missing, truncated or altered file is a `DDError`."""
    tensors, header, seal = _read_tensors(path, kind, cure)
    old = checksum(*tensors.values())
    if seal not in (seal_of(header, [*tensors], old), old):
        raise DDError(f"the {kind} {path} was altered: its checksum does not match; {cure}")
    return tensors, header


def is_there(path: Path) -> bool:
    """Whether `path` is a regular file; a name that is too long for one is none."""
    try:
        return path.is_file()
    except OSError:
        return False


def _read_tensors(path: Path, kind: str, cure: str) -> tuple[dict, dict, str | None]:
    """(tensors, header, checksum) as they stand in the file."""
    if not is_there(path):
        raise DDError(f"no {kind} at {path}; {cure}")
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})["ddlib"])
            tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
        return tensors, header, header.pop("sha256", None)
    except (
        SafetensorError,
        OSError,
        KeyError,
        ValueError,
        TypeError,
        AttributeError,
        RuntimeError,  # torch's want of memory, and too deep a header
        MemoryError,
    ) as error:
        raise DDError(
            f"the {kind} {path} is damaged or not ddlib's ({type(error).__name__}); {cure}"
        ) from error


def write_json(path: Path, value: dict[str, Any]) -> Path:
    """Write a JSON object with `seal`, the checksum of its canonical form, as its first key.

    First, where no text stands before it: a few lost bytes that join a text to the next key, the seal's, leave an
    object that is valid and has no seal, which would pass for an older file.
    """
    text = json.dumps({"seal": seal_of(json.loads(json.dumps(value))), **value}, indent=1)
    return write_atomically(path, lambda temporary: temporary.write_text(text))


def read_json(path: Path, kind: str, cure: str) -> dict[str, Any]:
    """Read what `write_json` wrote, or an older file without a checksum; what is amiss is a `DDError` with the cure."""
    value = _read(path, kind, cure, dict)
    if "seal" in value and value.pop("seal") != seal_of(value):
        raise DDError(f"the {kind} {path} was altered: its checksum does not match; {cure}")
    return value


def read_rows(path: Path, kind: str, cure: str) -> list[dict[str, Any]]:
    """Read a JSON list of objects, as the benchmarks keep them, without a checksum; what is amiss is a `DDError`."""
    rows = _read(path, kind, cure, list)
    if not all(isinstance(row, dict) for row in rows):
        raise DDError(f"the {kind} {path} is no list of rows; {cure}")
    return rows


def _read(path: Path, kind: str, cure: str, form: type) -> Any:
    if not is_there(path):
        raise DDError(f"no {kind} at {path}; {cure}")
    try:
        with path.open() as file:
            text = file.read(_LARGEST + 1)
        if len(text) > _LARGEST:
            raise DDError(f"the {kind} {path} is larger than {_LARGEST >> 20} MiB; {cure}")
        value = json.loads(text)
        if not isinstance(value, form):
            raise TypeError
        return value
    except DDError:
        raise
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise DDError(
            f"the {kind} {path} cannot be read ({type(error).__name__}); {cure}"
        ) from error


def update_json(
    path: Path,
    kind: str,
    cure: str,
    changes: dict[str, Any],
    check: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Add or replace keys of a JSON object that other processes write too: none of theirs is lost.

    `check` is called under the lock and leaves the file as it is where it raises.
    """
    with lock(path, f"the {kind} {path.name}"):
        check()
        value = (read_json(path, kind, cure) if path.exists() else {}) | changes
        write_json(path, value)
    return value


def sealed(path: Path) -> bool:
    """Whether the checksum of the file, a JSON or safetensors one, covers all of it; False for the older forms."""
    if path.suffix == ".json":
        return "seal" in _read(path, "file", "make it anew", dict)
    tensors, header, seal = _read_tensors(path, "file", "make it anew")
    return seal == seal_of(header, [*tensors], checksum(*tensors.values()))


def seal_of(value: object, *more: object) -> str:
    """sha256, as hex, of a JSON value as it is read, and of what comes with it."""
    text = json.dumps([value, *more], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
