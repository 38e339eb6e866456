"""What lets a run be killed at any moment: its state in a checkpoint, and signals that wait for a step to end."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import Spec
from ..core import DDError, shown
from ..files import load_tensors, save_tensors
from . import contract, heap
from .meter import PeakMemory, commit

SAVE_SECONDS = 300  # a checkpoint at least so often
SAVE_STEPS = 50  # steps between two checkpoints, where writing them costs no more than
SAVE_SHARE = 0.05  # of the time


@contextmanager
def threads_of(profile: str) -> Iterator[None]:
    """Compute on as many threads as a run of this profile does, wherever it is started from; freed memory is kept.

    Sums in another order have other last bits, so the number of threads is part of what "the same bytes" means. It is
    torch's own, which OMP_NUM_THREADS sets, and one for smoke unless that is set: on networks so small two threads
    wait for one another.
    """
    heap.keep()
    before = torch.get_num_threads()
    if profile == "smoke" and not os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Signals:
    """SIGTERM and Ctrl-C inside `guard`: a KeyboardInterrupt at once, but after the end of a `held` block."""

    def __init__(self):
        self.held_now = self.stop = False

    def handle(self, *_: object) -> None:
        self.stop = True
        if not self.held_now:
            raise KeyboardInterrupt

    @contextmanager
    def held(self) -> Iterator[None]:
        """A block that a signal would tear, e.g. a step: the signal waits until it is over."""
        self.held_now = True
        try:
            yield
        finally:
            self.held_now = False
        if self.stop:
            raise KeyboardInterrupt


@contextmanager
def guard() -> Iterator[Signals]:
    """Turn SIGTERM and Ctrl-C into KeyboardInterrupt, but never inside what is `held`."""
    signals = Signals()
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, signals.handle) for number in numbers}
    try:
        yield signals
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


class Progress:
    """Where a run stands: its method's tensors, history, evaluations, snapshots, seconds; saved and restored.

    `scores` are those of the networks that an evaluation under way has behind it, `smaller` the settings that were
    lowered where the device ran out of memory, `together` the IPCs of the runs in lock step, if there are several.
    """

    KEPT = (
        "step",
        "history",
        "evaluations",
        "seconds",
        "peak",
        "threads",
        "scores",
        "smaller",
        "together",
    )

    def __init__(self, spec: Spec, path: Path, method: Any, data: str, peak: PeakMemory):
        self.spec, self.path, self.method, self.data = spec, path, method, data
        self.meter, self.total = peak, spec.config.iterations
        self.step, self.history, self.evaluations, self.snapshots = 0, [], [], {}
        self.scores: list[dict[str, float]] = []
        self.smaller: dict[str, int] = {}
        self.together: list[int] = []
        self.seconds = {"distill": 0.0, "evaluate": 0.0}
        self.peak = 0
        self.threads = [torch.get_num_threads()]  # more than one where a resume had another number
        self.commit = commit()  # of the code that runs, whatever is committed while it does
        # The step of the last checkpoint, and the seconds that it took to write.
        self.saved, self.saving = 0, 0.0
        self.start_clock()

    def start_clock(self) -> None:
        """Count the seconds of the distillation from here on."""
        self.part = "distill"
        self.counted = self.saved_at = time.perf_counter()

    def turn_to(self, part: str) -> None:
        """Count the seconds from here on as those of this part: "distill" or "evaluate"."""
        self._count()
        self.part = part

    def _count(self) -> None:
        now = time.perf_counter()
        self.seconds[self.part] += now - self.counted
        self.counted = now

    def late(self) -> bool:
        """Whether the last checkpoint is so old that another one is due."""
        return time.perf_counter() - self.saved_at > SAVE_SECONDS

    def due(self, every: int | None) -> bool:
        """Whether a checkpoint is to be written after this step: every so many steps, or as often as costs little."""
        if self.late():
            return True
        if every:
            return self.step % every == 0
        cheap = SAVE_SHARE * (time.perf_counter() - self.saved_at) > self.saving
        return cheap and self.step % SAVE_STEPS == 0

    def save(self) -> None:
        """Write the checkpoint."""
        self._count()
        self.saved, self.saved_at = self.step, self.counted
        self.peak = max(self.peak, self.meter.read())
        state = contract.state(self.spec.method, self.method)
        tensors = {f"method.{k}": v for k, v in state.items()}
        tensors |= {f"snapshot.{k}": v for k, v in self.snapshots.items()}
        kept = {key: getattr(self, key) for key in self.KEPT}
        save_tensors(self.path, tensors, {"name": self.spec.name, "data": self.data} | kept)
        self.saving = time.perf_counter() - self.saved_at

    def restore(self, any_threads: bool = False) -> None:
        """Go on from the checkpoint if there is one; one of another run, other images or threads is a `DDError`."""
        if not self.path.exists():
            return
        cure = "delete it to start this run from the beginning"
        tensors, header = load_tensors(self.path, "checkpoint", cure)
        # Checkpoints of earlier versions lack these.
        header = {"scores": [], "smaller": {}, "together": []} | header
        if header.get("name") != self.spec.name or header.get("data", self.data) != self.data:
            raise DDError(
                f"the checkpoint {self.path} belongs to another run or other images; delete it to "
                "start anew"
            )
        try:
            check_header(header, self.total)
            threads = self._threads(header, any_threads)
            self._take(header | {"threads": threads}, tensors)
        except DDError:
            raise
        except KeyError as error:
            raise DDError(
                f"the checkpoint {self.path} is of an older ddlib and lacks {error}; delete it to "
                "start anew"
            ) from None
        except (TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
            raise DDError(
                f"the checkpoint {self.path} is none of this run ({type(error).__name__}: "
                f"{shown(str(error))}); delete it to start anew"
            ) from error
        self.saved = self.step

    def _take(self, header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Go on from what a checkpoint holds; what cannot be so is a TypeError or ValueError."""
        for key in self.KEPT:
            setattr(self, key, header[key])
        parts: dict[str, dict] = {"method": {}, "snapshot": {}}
        for name, tensor in tensors.items():
            kind, _, key = name.partition(".")
            parts[kind][key] = tensor
        self.snapshots = {int(step): images for step, images in parts["snapshot"].items()}
        fresh, images = self.method.state_dict(), self.method.images.shape
        for name, tensor in parts["method"].items():
            _check_tensor(name, tensor, fresh.get(name, tensor))
        self.method.load_state_dict(parts["method"])
        for step, picture in self.snapshots.items():
            if picture.shape != images or not 0 <= step <= self.step:
                raise ValueError(f"the images of step {step} are {tuple(picture.shape)}")

    def _threads(self, header: dict, any_threads: bool) -> list[int]:
        """The numbers of threads that the run has had with this process's, if that is allowed."""
        ours, before = self.threads, header.get("threads", self.threads)
        if before == ours or self.meter.device.type != "cpu":
            return before
        if not any_threads:
            raise DDError(
                f"the checkpoint {self.path} was computed on {before[-1]} threads and this process "
                f"has {ours[0]}, which gives other last bits: set OMP_NUM_THREADS={before[-1]}, "
                "or allow it by any_threads=True (--any-threads)"
            )
        return before if before[-1] == ours[0] else before + ours

    def kept(self) -> str:
        """What a sentence about a failed run says of its checkpoint."""
        if self.path.is_file():
            return f"the last good state, step {self.saved}, is kept in {self.path}"
        return "nothing is kept"


_KINDS = {
    "step": int,
    "history": list,
    "evaluations": list,
    "seconds": dict,
    "threads": list,
    "scores": list,
    "smaller": dict,
    "together": list,
}


def check_header(header: dict[str, Any], total: int) -> None:
    """Raise KeyError, TypeError or ValueError unless a checkpoint's header is that of a run of `total` steps."""
    for key, kind in _KINDS.items():
        if not isinstance(header[key], kind):
            raise TypeError(f"{key} is {shown(header[key])}")
    step = header["step"]
    if isinstance(step, bool) or not 0 <= step <= total:
        raise ValueError(f"step {shown(step)} of {total}")
    for row in header["history"]:
        row["step"] + 0
    for score in header["evaluations"]:
        check_score(score)
    numbers = [header["seconds"][part] for part in ("distill", "evaluate")] + [header["peak"]]
    numbers += [value for scores in header["scores"] for value in scores.values()]
    numbers += [*header["threads"], *header["together"], *header["smaller"].values()]
    if not header["smaller"].keys() <= {"chunk", "micro"}:
        raise ValueError(f"it lowers {shown(header['smaller'])}")
    if not (header["threads"] and all(math.isfinite(number) for number in numbers)):
        raise ValueError(f"its numbers are {shown(numbers)}")


def check_score(score: dict[str, Any]) -> None:
    """Raise KeyError, TypeError or ValueError unless an evaluation is one as records keep it."""
    values = [score["step"], score["mean"], score["std"], *score["networks"]]
    if not (score["networks"] and all(map(math.isfinite, values))):
        raise ValueError(f"a score is {shown(values)}")


def _check_tensor(name: str, tensor: Tensor, fresh: Tensor) -> None:
    """Raise ValueError unless a method's tensor is like the one that it begins with, and finite."""
    if tensor.shape != fresh.shape or tensor.dtype != fresh.dtype:
        raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}")
    if tensor.is_floating_point() and not tensor.isfinite().all():
        raise ValueError(f"{name} is not finite")
