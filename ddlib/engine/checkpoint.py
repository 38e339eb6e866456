"""What lets a run be killed at any moment: its state in a checkpoint, and signals that wait for a step to end."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..config import Spec
from ..core import DDError
from ..files import load_tensors, save_tensors
from .meter import PeakMemory, commit


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


class Progress:
    """What a checkpoint keeps beside the method's tensors: history, evaluations, snapshots and seconds so far."""

    def __init__(self, spec: Spec, path: Path, method: Any, data: str):
        self.spec, self.path, self.method, self.data, self.total = (
            spec,
            path,
            method,
            data,
            spec.config.iterations,
        )
        self.step, self.history, self.evaluations, self.snapshots = 0, [], [], {}
        self.seconds = {"distill": 0.0, "evaluate": 0.0}
        self.peak = 0
        self.commit = commit()  # of the code that runs, whatever is committed while it does

    KEPT = ("step", "history", "evaluations", "seconds", "peak")

    def save(self, peak: PeakMemory) -> None:
        self.peak = max(self.peak, peak.read())
        tensors = {f"method.{k}": v for k, v in self.method.state_dict().items()}
        tensors |= {f"snapshot.{k}": v for k, v in self.snapshots.items()}
        header = {"name": self.spec.name, "data": self.data} | {
            k: getattr(self, k) for k in self.KEPT
        }
        save_tensors(self.path, tensors, header)

    def restore(self) -> None:
        if not self.path.exists():
            return
        tensors, header = load_tensors(
            self.path, "checkpoint", "delete it to start this run from the beginning"
        )
        if header.get("name") != self.spec.name or header.get("data", self.data) != self.data:
            raise DDError(
                f"the checkpoint {self.path} belongs to another run or other images; delete it to start anew"
            )
        for key in self.KEPT:
            setattr(self, key, header[key])
        self.snapshots = {
            int(k.split(".")[1]): v for k, v in tensors.items() if k.startswith("snapshot.")
        }
        state = {
            k.removeprefix("method."): v for k, v in tensors.items() if k.startswith("method.")
        }
        try:
            self.method.load_state_dict(state)
        except KeyError as error:
            raise DDError(
                f"the checkpoint {self.path} is of an older ddlib and lacks {error}; delete it to start anew"
            ) from None

    def kept(self, step: int) -> str:
        return (
            f"the last good state, step {step}, is kept in {self.path}"
            if self.path.is_file()
            else "nothing is kept"
        )
