"""The queue past one machine: every run, and every expert that runs need, is a task of a Ray cluster.

    python -m ddlib queue --engine ray                            a cluster of this machine's own
    python -m ddlib queue --engine ray --address 10.0.0.1:6379    one that is there

Ray places the tasks where there is room and starts a lost one again. Files travel with the tasks, so nodes need no
common folder: a checkpoint or an expert goes along, the record and the set come back to the caller's results. A node
needs the images, and this very ddlib. Nothing here is needed for one machine.
"""

from __future__ import annotations

import math
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from .. import __version__
from ..config import Spec, dataset_of
from ..core import DDError, Interrupted, pick_device
from ..data.cache import cache_folder
from ..experts import experts_folder
from ..files import Busy, lock, write_atomically
from ..methods import METHODS
from .checkpoint import threads_of
from .cost import shared_key
from .meter import commit
from .queue import Row
from .record import checkpoint_path
from .run import run

RETRIES = 3  # times that a run goes on elsewhere when its worker is lost
PATIENCE = 5  # seconds in which an address must answer
SUFFIXES = (".json", ".safetensors")  # of a finished run


@dataclass(frozen=True)
class Code:
    """The version of ddlib, and its commit where that is known."""

    version: str
    commit: str | None

    @classmethod
    def here(cls) -> Code:
        return cls(__version__, commit())

    def same(self, other: Code) -> bool:
        """Whether the two may share work: nothing known of them differs."""
        unknown = self.commit is None or other.commit is None
        return self.version == other.version and (unknown or self.commit == other.commit)

    def __str__(self) -> str:
        return f"{self.version} at {self.commit[:7]}" if self.commit else self.version


@dataclass(frozen=True)
class Order:
    """What a worker is asked for: a run, or expert number `expert` of those that the run needs.

    code: the caller's ddlib. end: the time (`time.time`) at which to stop. checkpoint: bytes.
    """

    spec: Spec
    device: str
    threads: int
    code: Code
    end: float = math.inf
    expert: int | None = None
    checkpoint: bytes | None = None


@dataclass(frozen=True)
class Outcome:
    """What came of an order: done, stopped, later or failed, why, and the files by their path in the results folder,
    or among the experts."""

    word: str
    why: str = ""
    files: dict[str, bytes] = field(default_factory=dict)


# --- on a worker


def perform(order: Order, *experts: Outcome) -> Outcome:
    """Carry out an order; an error is an outcome, so that Ray repeats a lost worker's task alone."""
    here = Code.here()
    if not here.same(order.code):
        return Outcome("failed", f"{_host()} has ddlib {here}, not {order.code}")
    if lost := next((expert for expert in experts if expert.word != "done"), None):
        return Outcome(lost.word, lost.why)
    if time.time() >= order.end:
        return Outcome("later")
    room = cache_folder() / "ray"
    for expert in experts:
        _store(room / "experts", expert.files)
    try:
        with _experts_in(room / "experts"), _threads(order), _until(order.end):
            return _experts(order) if order.expert is not None else _run(order, room / "runs")
    except (Interrupted, KeyboardInterrupt):
        return Outcome("stopped", files=_checkpoint(order, room / "runs"))
    except DDError as error:
        return Outcome("failed", f"{error} (on {_host()})")


def _run(order: Order, results: Path) -> Outcome:
    spec, saved = order.spec, checkpoint_path(order.spec, results)
    if order.checkpoint and not saved.is_file():  # else a lost task's own, which is further on
        _store(saved.parent, {saved.name: order.checkpoint})
    words = spec.case | spec.overrides
    kept = run(**words, device=order.device, results=results, progress=False)
    paths = [kept.path.with_suffix(suffix) for suffix in SUFFIXES]
    files = _read(paths, results)
    for path in paths:  # they are the caller's from here on
        path.unlink()
    return Outcome("done", files=files)


def _checkpoint(order: Order, results: Path) -> dict[str, bytes]:
    return _read([checkpoint_path(order.spec, results)], results)


def _experts(order: Order) -> Outcome:
    spec, made = order.spec, []
    data = dataset_of(spec, pick_device(order.device))
    for asset in METHODS[spec.method].needs(spec.config):
        compiled = spec.run.compile
        made += asset.make(
            data, spec.run.backbone, compile=compiled, progress=False, only=order.expert
        )
    return Outcome("done", files=_expert_files(made))


def _expert_files(paths: list[Path]) -> dict[str, bytes]:
    """Experts with the seconds that they took, by their path among the experts."""
    paths = [path.with_suffix(suffix) for path in paths for suffix in SUFFIXES]
    return _read(paths, experts_folder())


def _read(paths: list[Path], folder: Path) -> dict[str, bytes]:
    """The files that are there, by their path in a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths if path.is_file()}


@contextmanager
def _experts_in(folder: Path) -> Iterator[None]:
    """Experts are read from `folder` inside, and nowhere else afterwards: a caller may be a worker itself."""
    before = os.environ.get("DDLIB_EXPERTS")
    os.environ["DDLIB_EXPERTS"] = str(folder)
    try:
        yield
    finally:
        os.environ.pop("DDLIB_EXPERTS")
        if before is not None:
            os.environ["DDLIB_EXPERTS"] = before


@contextmanager
def _threads(order: Order) -> Iterator[None]:
    torch.set_num_threads(order.threads)
    with threads_of(order.spec.profile):
        yield


@contextmanager
def _until(end: float) -> Iterator[None]:
    """Stop what runs inside as Ctrl-C does, at the time `end` or at SIGTERM."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    left = None if end == math.inf else max(0.0, end - time.time())
    timer = threading.Timer(left or 0, os.kill, (os.getpid(), signal.SIGTERM))
    if left is not None:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()
        signal.signal(signal.SIGTERM, before)


def _host() -> str:
    return socket.gethostname()


def _store(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        path = folder / name
        if not path.is_file():
            write_atomically(path, partial(Path.write_bytes, data=content))


# --- at the caller


def work_through(
    rows: list[Row],
    address: str | None = None,
    minutes: float | None = None,
    device: str = "auto",
    results: str | Path | None = None,
    threads: int = 1,
) -> bool:
    """Run every row that has no record on the cluster, for at most so many minutes; whether all ended well.

    address: HOST:PORT of a Ray cluster, "auto" for one that this machine is part of; None starts one of this machine's
    own. threads: CPU cores that a run takes; with device "cuda" it takes a GPU besides. A row is locked here while a
    worker is at it. Raises `DDError` where Ray is not installed or the address does not answer.
    """
    if minutes is not None and not minutes > 0:
        raise DDError(f"minutes must be above 0, not {minutes:g}")
    end = time.time() + 60 * (math.inf if minutes is None else minutes)
    with connected(address) as ray, ExitStack() as locks:
        task = ray.remote(
            max_calls=1,  # a process for each, so that memory is measured and freed
            max_retries=RETRIES,
            num_cpus=threads,
            num_gpus=1 if device == "cuda" else 0,
        )(perform)
        waiting = {}
        experts: dict[Any, list] = {}
        for row in _to_do(rows, locks):
            order = Order(row.spec, device, threads, Code.here(), end)
            refs = _prepare(ray, task, order, experts)
            saved = row.checkpoint
            order = replace(order, checkpoint=saved.read_bytes() if saved.is_file() else None)
            waiting[task.remote(order, *refs)] = row
            print(f"asked    {row}", flush=True)
        well = True
        for row, outcome in _outcomes(ray, waiting):
            well &= _receive(row, outcome)
        return well


def _to_do(rows: list[Row], locks: ExitStack) -> Iterator[Row]:
    """The rows that are neither kept nor taken, each locked until `locks` are closed."""
    for row in rows:
        if row.done:
            print(f"kept     {row}", flush=True)
            continue
        try:
            locks.enter_context(lock(row.record, "the run", wait=False))
        except Busy:
            print(f"taken    {row}", flush=True)
            continue
        yield row


def _prepare(ray: ModuleType, task: Any, order: Order, experts: dict[Any, list]) -> list:
    """The experts that a run needs, as Ray's references: kept ones are sent, each other one is a task."""
    spec = order.spec
    assets = METHODS[spec.method].needs(spec.config)
    key = shared_key(spec)
    if assets and key not in experts:
        data = dataset_of(spec, "cpu")  # its checksum names the folder
        paths = [path for asset in assets for path in asset.paths(data, spec.run.backbone)]
        experts[key] = [
            ray.put(Outcome("done", files=_expert_files([path])))
            if path.is_file()
            else task.remote(replace(order, expert=number))
            for number, path in enumerate(paths)
        ]
    return experts.get(key, []) if assets else []


def _outcomes(ray: ModuleType, waiting: dict[Any, Row]) -> Iterator[tuple[Row, Outcome]]:
    """The rows as they end, with what came of them."""
    while waiting:
        (ready,), _ = ray.wait(list(waiting))
        row = waiting.pop(ready)
        try:
            outcome = ray.get(ready)
        except ray.exceptions.RayTaskError as error:
            # No DDError: a fault of ddlib or of its install.
            outcome = Outcome("failed", str(error.cause))
        except ray.exceptions.RayError as error:
            what = str(error).splitlines()[0]
            outcome = Outcome("failed", f"its worker was lost {RETRIES + 1} times: {what}")
        yield row, outcome


def _receive(row: Row, outcome: Outcome) -> bool:
    """Keep the files of a row; whether it ended well."""
    for name, content in sorted(outcome.files.items(), reverse=True):  # the set before its record
        write_atomically(row.results / name, partial(Path.write_bytes, data=content))
    if outcome.word == "done":
        row.checkpoint.unlink(missing_ok=True)
    said = {"stopped": "stopped, to go on"}.get(outcome.word, outcome.word)
    print(": ".join(filter(None, (f"{said:8} {row}", outcome.why))), flush=True)
    return outcome.word != "failed"


@contextmanager
def connected(address: str | None) -> Iterator[ModuleType]:
    """Ray, connected; a cluster that was started here ends with the block."""
    try:
        import ray
    except ImportError:
        raise DDError("the engine ray needs Ray: pip install 'ddlib[ray]'") from None
    if address not in (None, "auto"):
        _check_answer(address)
    try:
        ray.init(
            address,
            log_to_driver=False,
            logging_level="ERROR",
            include_dashboard=False if address is None else None,
        )
    except (ConnectionError, ValueError) as error:
        where = "on this machine" if address == "auto" else f"at {address}"
        raise DDError(f"no Ray cluster {where}: {str(error).splitlines()[0]}") from None
    try:
        yield ray
    finally:
        ray.shutdown()


def _check_answer(address: str) -> None:
    """Raise `DDError` unless something listens at HOST:PORT: Ray itself would try for minutes, then end the process."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise DDError(f"the address of a Ray cluster is HOST:PORT or auto, not {address!r}")
    try:
        socket.create_connection((host, int(port)), PATIENCE).close()
    except OSError as error:
        raise DDError(f"no Ray cluster answers at {address}: {error.strerror or error}") from None
