"""A list of runs, worked through cheapest first: one command for any machine and any device.

    python -m ddlib queue --plan            what there is to do, and what each row costs, here and on a GPU
    python -m ddlib queue --minutes 60      does it; stops cleanly, and the next call goes on

A queue file is YAML, a list of rows: {method, dataset, ipc: 1 or [1, 10], seeds: 0 or [0, 1], set: {KEY: VALUE}}, each
standing for all its combinations under one profile. Rows whose record is kept, or that another process works on, are
skipped, so several queues may share a folder. Every run is a process of its
own, so that one that fails or runs out of memory ends alone.
"""

from __future__ import annotations

import math
import os
import shlex
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Hashable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from ..config import Spec, resolve
from ..core import DDError, choose, path_of
from ..files import Busy, is_there, lock, results_folder
from . import contract
from .cost import DEVICES, UNKNOWN, Cost, predict, shared_key
from .record import checkpoint_path, record_path

ROWS = Path(__file__).with_name("queue.yaml")  # the papers' rows
KEYS = ("method", "dataset", "ipc", "seeds", "set")
LARGEST = 2**20  # bytes of a queue file
GRACE = 120  # seconds that a run has to write its checkpoint


@dataclass(frozen=True)
class Row:
    """One run of a queue, its predicted cost and the results folder that is to keep it."""

    spec: Spec
    cost: Cost
    results: Path

    @property
    def record(self) -> Path:
        return record_path(self.spec, self.results)

    @property
    def checkpoint(self) -> Path:
        return checkpoint_path(self.spec, self.results)

    @property
    def done(self) -> bool:
        """Whether its record is kept; the set may be left out, as those of larger coresets are."""
        return self.record.is_file()

    @property
    def taken(self) -> bool:
        """Whether another process is at work on it."""
        try:
            with lock(self.record, "the run", wait=False):
                return False
        except Busy:
            return True

    def __str__(self) -> str:
        spec = self.spec
        changes = "".join(f" {key}={value}" for key, value in spec.overrides.items())
        return f"{spec.method} {spec.dataset} IPC {spec.ipc} seed {spec.seed}{changes}"


def read(
    path: str | Path | None = None, profile: str = "paper", cifar10: str = "cifar10"
) -> list[Spec]:
    """The runs that a queue file stands for, every row resolved; what is wrong is named with its row.

    cifar10: where CIFAR-10 is, if not in torchvision's files, e.g. folder:PATH.
    """
    path = path_of("the path of a queue", path or ROWS)
    if not is_there(path):
        raise DDError(f"cannot read the queue {path}: there is no such file")
    if path.stat().st_size > LARGEST:
        raise DDError(f"the queue {path} is larger than 1 MiB, which no list of runs is")
    try:
        rows = yaml.safe_load(path.read_text())
    except OSError as error:
        raise DDError(f"cannot read the queue {path}: {error.strerror}") from None
    except (yaml.YAMLError, ValueError, TypeError, RecursionError):
        raise DDError(f"the queue {path} is no YAML; it is a list of rows with {KEYS}") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DDError(f"the queue {path} must be a list of rows with the keys {', '.join(KEYS)}")
    specs: list[Spec] = []
    for number, row in enumerate(rows, start=1):
        try:
            specs += _combinations(row, profile, cifar10)
        except DDError as error:
            raise DDError(f"row {number} of the queue {path}: {error}") from None
    return specs


def _combinations(row: dict[str, Any], profile: str, cifar10: str) -> list[Spec]:
    for key in row:
        choose("key", key, KEYS)
    for key in ("method", "dataset", "ipc"):
        if key not in row:
            raise DDError(f"it lacks {key}")
    changes = row.get("set") or {}
    if not isinstance(changes, dict):
        raise DDError(f"set must be keys and values, not {changes!r}")
    values = (row["method"], row["dataset"], row["ipc"], row.get("seeds", 0))
    several = [value if isinstance(value, list) else [value] for value in values]
    return [
        resolve(method, cifar10 if dataset == "cifar10" else dataset, ipc, profile, seed, **changes)
        for method, dataset, ipc, seed in product(*several)
    ]


def plan(
    specs: Iterable[Spec], device: str = "cpu", results: str | Path | None = None
) -> list[Row]:
    """The rows in the order in which they will be worked through: cheapest first, those of unknown cost last.

    The first that needs an extractor or experts pays for them; those that share them cost less from then on.
    """
    folder = results_folder(results)
    left = [(spec, _cost(spec, device), _cost(spec, device, prepared=True)) for spec in specs]
    rows: list[Row] = []
    paid: set[Hashable] = set()
    while left:
        choices = [own if shared_key(spec) in paid else whole for spec, whole, own in left]
        next_one = min(range(len(left)), key=lambda k: _order(choices[k]))
        spec, _, _ = left.pop(next_one)
        paid.add(shared_key(spec))
        rows.append(Row(spec, choices[next_one], folder))
    return rows


def unpriced(specs: Iterable[Spec], results: str | Path | None = None) -> list[Row]:
    """The rows in the order given, their cost unknown."""
    folder = results_folder(results)
    return [Row(spec, UNKNOWN, folder) for spec in specs]


def _cost(spec: Spec, device: str, prepared: bool = False) -> Cost:
    """The predicted cost, unknown where the dataset's size is not on file."""
    try:
        return predict(spec, device, prepared)
    except DDError:
        return UNKNOWN


def _order(cost: Cost) -> tuple[bool, float]:
    return math.isnan(cost.seconds), cost.seconds


def work_through(
    rows: list[Row],
    minutes: float | None = None,
    device: str = "auto",
    results: str | Path | None = None,
) -> bool:
    """Run every row that has no record, for at most so many minutes; whether all ended well.

    A run that the time cuts off is stopped as Ctrl-C stops it: its checkpoint is kept, and the next call goes on there.
    """
    if minutes is not None and not minutes > 0:
        raise DDError(f"minutes must be above 0, not {minutes:g}")
    end = time.monotonic() + 60 * (math.inf if minutes is None else minutes)
    well = True
    for row in rows:
        if row.done:
            print(f"kept     {row}", flush=True)
            continue
        if row.taken:
            print(f"taken    {row}", flush=True)
            continue
        if time.monotonic() >= end:
            print(f"later    {row}", flush=True)
            continue
        print(f"running  {row}, predicted: {_minutes(row.cost.seconds)}", flush=True)
        start = time.monotonic()
        code = _run(row, end, device, results)
        said = {0: "done", None: "stopped, to go on"}.get(code, f"failed with {code}")
        print(f"{said:8} {row}, {_minutes(time.monotonic() - start)}", flush=True)
        well &= code in (0, None)
    return well


def _run(row: Row, end: float, device: str, results: str | Path | None) -> int | None:
    """The exit status of one run, after that of the experts that it needs; None where the time ended it."""
    spec = row.spec
    commands = [spec.command("run") + f" --seed {spec.seed}"]
    if contract.needs(spec.method, spec.config):
        commands.insert(0, spec.command("experts"))
    for command in commands:
        code = _process([*shlex.split(command)[1:], "--device", device], end, results)
        if code != 0:
            break
    return code


def _process(words: list[str], end: float, results: str | Path | None) -> int | None:
    """The exit status of a ddlib command; None where it was stopped at the time `end`, its checkpoint written."""
    folder = {"DDLIB_RESULTS": str(results_folder(results).resolve())}
    process = subprocess.Popen([sys.executable, *words], env=os.environ | folder)
    try:
        return process.wait(None if end == math.inf else max(0.0, end - time.monotonic()))
    except (subprocess.TimeoutExpired, KeyboardInterrupt) as reason:
        process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
        process.kill()
        if isinstance(reason, KeyboardInterrupt):
            raise
        return None


def _minutes(seconds: float) -> str:
    if math.isnan(seconds):
        return "unknown"
    if seconds >= 36_000:
        return f"{seconds / 3600:.0f} h"
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def table(rows: Iterable[Row]) -> str:
    """The plan as text of at most 100 columns, long names folded: what, TFLOP, time here or that it is kept, peak MiB,
    and the time at the published rate of each of `DEVICES`."""
    lines = [
        f"{'run':45} {'TFLOP':>9} {'here':>8} {'peak MiB':>8}"
        + "".join(f" {name:>8}" for name in DEVICES)
    ]
    for row in rows:
        here = "kept" if row.done else _minutes(row.cost.seconds)
        peak = row.cost.peak_bytes / 2**20
        name, *rest = textwrap.wrap(str(row), 45, subsequent_indent="  ")
        lines.append(
            f"{name:45} {row.cost.tflop:9.1f} {here:>8} {peak:8.0f}"
            + "".join(f" {_minutes(row.cost.seconds_on(device)):>8}" for device in DEVICES)
        )
        lines += rest
    return "\n".join([*lines, "", "GPUs: the work over the published float32 rate, a guide."])
