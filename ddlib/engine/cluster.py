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
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from .. import __version__
from ..config import Spec, dataset_of
from ..core import DDError, Interrupted, choose, pick_device, whole
from ..data.cache import cache_folder
from ..experts import experts_folder
from ..files import Busy, environment, load_tensors, lock, read_json, write_atomically
from . import contract
from .checkpoint import threads_of
from .cost import shared_key
from .meter import commit
from .queue import GRACE, Row
from .record import Run, checkpoint_path, record_path, record_paths
from .run import run

RETRIES = 3  # times that a run goes on elsewhere when its worker is lost
PLACES = ("auto", "cpu", "cuda")  # devices that runs on a cluster are asked for
EXPERTS = 16  # that one process makes; `train.loop` compiles no more than 64 networks in its life
PATIENCE = 5  # seconds in which an address must answer
SUFFIXES = (".json", ".safetensors")  # of a finished run
# Seconds that a node keeps what it has given back: the caller's disk may have been full.
WEEK = 7 * 24 * 3600


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

    code: the caller's ddlib. end: the time (`time.time`) at which to stop. checkpoint: bytes. teach: the run is to make
    what it needs by itself.
    """

    spec: Spec
    device: str
    threads: int
    code: Code
    end: float = math.inf
    expert: int | None = None
    checkpoint: bytes | None = None
    teach: bool = False


@dataclass(frozen=True)
class Outcome:
    """What came of an order: done, stopped, later or failed, why, and the files by their path in the results folder,
    or among the experts."""

    word: str
    why: str = ""
    files: dict[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class Expert:
    """Expert `number` of those that the run of a row, and runs after it, need."""

    row: Row
    number: int

    def __str__(self) -> str:
        return f"expert {self.number} for {self.row}"


# --- on a worker


def perform(order: Order, *experts: Outcome) -> Outcome:
    """Carry out an order; an error is an outcome, so that Ray repeats a lost worker's task alone."""
    here, host = Code.here(), socket.gethostname()
    if not here.same(order.code):
        return Outcome("failed", f"{host} has ddlib {here}, not {order.code}")
    if lost := next((expert for expert in experts if expert.word != "done"), None):
        return Outcome(lost.word, lost.why)
    if time.time() >= order.end:
        return Outcome("later")
    room = cache_folder() / "ray"
    for expert in experts:
        _store(room / "experts", expert.files)
    torch.set_num_threads(order.threads)
    # Put back afterwards: a caller may be a worker itself.
    kept = environment(DDLIB_EXPERTS=str(room / "experts"))
    try:
        with kept, threads_of(order.spec.profile), _until(order.end):
            return _experts(order) if order.expert is not None else _run(order, room / "runs")
    except (Interrupted, KeyboardInterrupt):
        return Outcome("stopped", files=_checkpoint(order, room / "runs"))
    except DDError as error:
        return Outcome("failed", f"{error} (on {host})", _checkpoint(order, room / "runs"))


def _run(order: Order, results: Path) -> Outcome:
    _clear(record_path(order.spec, results), results)
    if order.checkpoint:
        _take_further(checkpoint_path(order.spec, results), order.checkpoint)
    words = order.spec.case | order.spec.overrides
    kept = run(**words, device=order.device, results=results, progress=False, teach=order.teach)
    return Outcome("done", files=_read([kept.path.with_suffix(s) for s in SUFFIXES], results))


def _clear(record: Path, results: Path) -> None:
    """Remove what has lain here for a week, and the asked-for record where other code may have made it."""
    for path in (*record_paths(results), *results.glob("*/checkpoints/*.safetensors")):
        with suppress(OSError):  # another worker has removed it
            if time.time() - path.stat().st_mtime > WEEK or (path == record and _other_code(path)):
                for suffix in SUFFIXES:
                    path.with_suffix(suffix).unlink(missing_ok=True)


def _other_code(record: Path) -> bool:
    """Whether the code that made a record may be another than what is here."""
    try:
        made = read_json(record, "record", "").get("commit")
    except DDError:
        return True
    return made != commit() or str(made).endswith("-dirty")


def _take_further(saved: Path, sent: bytes) -> None:
    """Go on from the checkpoint that was sent, unless that of a lost task is here and further on."""
    beside = saved.with_name(f".{saved.stem}.{os.getpid()}{saved.suffix}")
    write_atomically(beside, partial(Path.write_bytes, data=sent))
    if _work_behind(beside) >= _work_behind(saved):
        beside.replace(saved)
    else:
        beside.unlink()


def _work_behind(checkpoint: Path) -> tuple[int, ...]:
    """Steps, evaluations and networks of the evaluation under way; () where there is nothing to read."""
    try:
        _, header = load_tensors(checkpoint, "checkpoint", "")
        return header["step"], len(header["evaluations"]), len(header.get("scores", []))
    except (DDError, KeyError):
        return ()


def _checkpoint(order: Order, results: Path) -> dict[str, bytes]:
    paths = [checkpoint_path(order.spec, results)] if order.expert is None else []
    return _read(paths, results)


def _experts(order: Order) -> Outcome:
    spec, made = order.spec, []
    data = dataset_of(spec, pick_device(order.device))
    options = {"compile": spec.run.compile, "progress": False, "only": order.expert}
    for asset in contract.needs(spec.method, spec.config):
        made += contract.made(spec.method, asset, data, spec.run.backbone, **options)
    return Outcome("done", files=_expert_files(made))


def _expert_files(paths: list[Path]) -> dict[str, bytes]:
    """Experts with the seconds that they took, by their path among the experts."""
    paths = [path.with_suffix(suffix) for path in paths for suffix in SUFFIXES]
    return _read(paths, experts_folder())


def _read(paths: list[Path], folder: Path) -> dict[str, bytes]:
    """The files that are there, by their path in a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths if path.is_file()}


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
    own. threads: CPU cores that a run takes; with device "cuda" it takes a GPU besides, and "auto" is "cuda" where the
    cluster has a GPU, else "cpu". A row is locked here while a worker is at it. Raises `DDError` where Ray is not
    installed, the address does not answer or no node has what a run takes.
    """
    if minutes is not None and not minutes > 0:
        raise DDError(f"minutes must be above 0, not {minutes:g}")
    device, threads = choose("device", str(device), PLACES), whole("threads", threads, 1)
    end = time.time() + 60 * (math.inf if minutes is None else minutes)
    with connected(address) as ray, ExitStack() as locks:
        device = _device_of(ray, device, threads)
        options = {
            "max_retries": RETRIES,
            "num_cpus": threads,
            "num_gpus": 1 if device == "cuda" else 0,
        }
        # A process for each run, so that its memory is measured and freed
        run_task = ray.remote(max_calls=1, **options)(perform)
        # It takes seconds to start, so that experts share one, but on a GPU, whose memory it would hold. Ray puts no
        # run on a process of another environment; nothing reads the variable.
        calls = 1 if device == "cuda" else EXPERTS
        own = {"env_vars": {"DDLIB_WORKER": "experts"}}
        expert_task = ray.remote(max_calls=calls, runtime_env=own, **options)(perform)
        waiting: dict[Any, Row | Expert] = {}
        experts: dict[Any, list] = {}
        locks.callback(lambda: [ray.cancel(ref) for ref in waiting])
        well = True
        for row in rows:
            order = Order(row.spec, device, threads, Code.here(), end)
            try:
                if _is_to_do(row, locks):
                    _ask(ray, run_task, expert_task, row, order, waiting, experts)
            except DDError as error:
                well = _receive(row, Outcome("failed", str(error)))
        for asked, outcome in _outcomes(ray, waiting, end):
            well &= _receive(asked, outcome)
        return well


def _device_of(ray: ModuleType, device: str, threads: int) -> str:
    """What `device` means on this cluster; a `DDError` where no node has what a run takes, for which Ray would wait."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = any(node.get("GPU", 0) >= 1 for node in nodes)
    if device == "auto":
        device = "cuda" if gpus else "cpu"
    if device == "cuda" and not gpus:
        raise DDError("no node of the Ray cluster has a GPU; allowed: --device cpu or auto")
    fit = [node for node in nodes if device == "cpu" or node.get("GPU", 0) >= 1]
    most = max((int(node.get("CPU", 0)) for node in fit), default=0)
    if threads > most:
        kind = "node with a GPU" if device == "cuda" else "node"
        raise DDError(
            f"threads must be at most {most}, the cores of the largest {kind} of the Ray cluster, not {threads}"
        )
    return device


def _is_to_do(row: Row, locks: ExitStack) -> bool:
    """Whether a row is neither kept nor taken; it is locked then until `locks` are closed."""
    if row.done:
        print(f"kept     {row}", flush=True)
        return False
    try:
        locks.enter_context(lock(row.record, "the run", wait=False))
        return True
    except Busy:
        print(f"taken    {row}", flush=True)
        return False


def _ask(
    ray: ModuleType,
    run_task: Any,
    expert_task: Any,
    row: Row,
    order: Order,
    waiting: dict[Any, Row | Expert],
    experts: dict[Any, list],
) -> None:
    """Ask for a row, and before it for its experts, where its assets say their files: kept ones are sent, each other
    one is a task."""
    spec, saved = row.spec, row.checkpoint
    assets = contract.needs(spec.method, spec.config)
    parted = bool(assets) and all(callable(getattr(asset, "paths", None)) for asset in assets)
    key = shared_key(spec) or spec.name
    if parted and key not in experts:
        data = dataset_of(spec, "cpu")  # its checksum names the folder
        paths = [path for asset in assets for path in asset.paths(data, spec.run.backbone)]
        experts[key] = []
        for number, path in enumerate(paths):
            if path.is_file():
                experts[key].append(ray.put(Outcome("done", files=_expert_files([path]))))
            else:
                experts[key].append(expert_task.remote(replace(order, expert=number)))
                waiting[experts[key][-1]] = Expert(row, number)
    sent = saved.read_bytes() if saved.is_file() else None
    order = replace(order, checkpoint=sent, teach=not parted)
    waiting[run_task.remote(order, *(experts[key] if parted else []))] = row
    print(f"asked    {row}", flush=True)


def _outcomes(
    ray: ModuleType, waiting: dict[Any, Row | Expert], end: float
) -> Iterator[tuple[Row | Expert, Outcome]]:
    """What was asked for as it ends, with what came of it; what has not ended soon after `end` is for later."""
    while waiting:
        left = None if end == math.inf else max(0.0, end + GRACE - time.time())
        ready, _ = ray.wait(list(waiting), timeout=left)
        if not ready:  # no node had room for it, or it does not stop
            yield from ((asked, Outcome("later")) for asked in waiting.values())
            return
        asked = waiting.pop(ready[0])
        try:
            outcome = ray.get(ready[0])
        except ray.exceptions.RayTaskError as error:
            # No DDError: a fault of ddlib or of its install.
            outcome = Outcome("failed", str(error.cause))
        except ray.exceptions.RuntimeEnvSetupError as error:
            outcome = Outcome("failed", f"no process could be started for it: {error}")
        except ray.exceptions.RayError as error:
            what = str(error).splitlines()[0]
            outcome = Outcome("failed", f"its worker was lost {RETRIES + 1} times: {what}")
        yield asked, outcome


def _receive(asked: Row | Expert, outcome: Outcome) -> bool:
    """Keep the files of a row or an expert; whether it ended well."""
    try:
        _keep(asked, outcome)
    except DDError as error:
        outcome = Outcome("failed", "; ".join(filter(None, (outcome.why, str(error)))))
    said = {"stopped": "stopped, to go on"}.get(outcome.word, outcome.word)
    print(": ".join(filter(None, (f"{said:8} {asked}", outcome.why))), flush=True)
    return outcome.word != "failed"


def _keep(asked: Row | Expert, outcome: Outcome) -> None:
    folder = asked.results if isinstance(asked, Row) else experts_folder()
    for name, content in sorted(outcome.files.items(), reverse=True):  # the set before its record
        write_atomically(folder / name, partial(Path.write_bytes, data=content))
    if outcome.word == "done" and isinstance(asked, Row):
        if not Run(asked.record).complete:
            raise DDError("its record or its set did not come back")
        with suppress(OSError):  # a finished run needs none, and forgets it when it is asked for
            asked.checkpoint.unlink(missing_ok=True)


@contextmanager
def connected(address: str | None) -> Iterator[ModuleType]:
    """Ray, connected; a cluster that was started here ends with the block, one that the process is on stays."""
    try:
        import ray
    except ImportError:
        raise DDError("the engine ray needs Ray: pip install 'ddlib[ray]'") from None
    if ray.is_initialized():  # by a notebook
        present = ray.get_runtime_context().gcs_address
        if address not in (None, "auto", present):
            raise DDError(
                f"this process is on the Ray cluster at {present}, not {address}: leave the address "
                "out, or call ray.shutdown() first"
            )
        yield ray
        return
    if address not in (None, "auto"):
        _check_answer(address)
    try:
        ray.init(
            address,
            log_to_driver=False,
            logging_level="ERROR",
            include_dashboard=False if address is None else None,
        )
    except (ConnectionError, ValueError, RuntimeError) as error:  # the last: of another version
        where = f"at {address}" if address not in (None, "auto") else "on this machine"
        raise DDError(f"no Ray cluster {where}: {' '.join(str(error).split())}") from None
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
