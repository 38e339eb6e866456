"""Faults at file operations: a run is killed, or the disk is full, before, within or after the n-th of them."""

import errno
import hashlib
import json
import os
import random
import signal
import tempfile
from collections import Counter
from functools import cache
from pathlib import Path

import ddlib as dd
from ddlib import files

from .server import case, start, wait

TINY = {
    "ipc": 1,
    "eval_epochs": 1,
    "networks": 1,
    "evaluations": 2,
    "snapshots": 1,
    "backbone": "convnet:width=4",
    "progress": False,
    "checkpoint_every": 1,
    "device": "cpu",
}
EXPERTS = {
    "teach": True,
    "subset": 20,
    "experts": 1,
    "expert_total": 2,
    "max_start": 1,
    "expert_epochs": 1,
    "syn_steps": 2,
    "iterations": 2,
}
# A method of every file in ddlib/methods, and what makes it short.
METHODS = {
    "dm": {"iterations": 3},
    "kmeans": {"extractor_epochs": 1},
    "dsa": {"iterations": 2},
    "dream_plus": {"iterations": 2},
    "frepo": {"iterations": 3, "pool_size": 2, "max_age": 1},
    "mtt": EXPERTS,
}
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
PLACES = ("before", "half", "after")


def run(method: str, results: str, **more) -> dd.Run:
    os.environ["DDLIB_RESULTS"] = results
    return dd.run(method, "digits", **TINY | METHODS[method] | more)


def digest(method: str, results: str) -> str:
    """What a run must come to, whatever became of it before: the bytes of its set, and what its record measured."""
    done = run(method, results)
    kept = ("accuracy", "evaluations", "history", "extra", "threads")
    measured = {key: value for key, value in done.record.items() if key in kept}
    facts = json.dumps(_timeless(measured), sort_keys=True).encode()
    return hashlib.sha256(done.path.with_suffix(".safetensors").read_bytes() + facts).hexdigest()


def _timeless(value: object) -> object:
    """Without what a clock says, of a method's extras too."""
    if isinstance(value, dict):
        return {key: _timeless(v) for key, v in value.items() if "seconds" not in key}
    return [_timeless(v) for v in value] if isinstance(value, list) else value


class Operations:
    """Count file operations, and let `fault` happen before, within or after the n-th one (0: never)."""

    def __init__(self, number: int = 0, place: str = "", fault=None, unlinks: bool = True):
        self.number, self.place, self.fault, self.count = number, place, fault, 0
        plain = [(os, "replace"), (Path, "touch"), (Path, "unlink")]
        for owner, name in plain if unlinks else plain[:2]:
            setattr(owner, name, self.watched(getattr(owner, name)))
        Path.write_text = self.watched(Path.write_text, lambda path, *_: path)
        files.save_file = self.watched(files.save_file, lambda tensors, path, **_: path)

    def watched(self, real, written=None):
        def operation(*arguments, **options):
            self.count += 1
            if self.count != self.number:
                return real(*arguments, **options)
            if self.place == "before":
                self.fault()
            value = real(*arguments, **options)
            if self.place == "half" and written:
                path = written(*arguments, **options)
                os.truncate(path, os.path.getsize(path) // 2)
            self.fault()
            return value

        return operation


def counted(method: str, results: str) -> tuple[int, str]:
    operations = Operations()
    value = digest(method, results)
    return operations.count, value


def killed(method: str, results: str, number: int, place: str, which: int) -> str:
    Operations(number, place, lambda: os.kill(os.getpid(), which))
    return digest(method, results)


def full(method: str, results: str, number: int, place: str) -> str:
    def fault():
        raise OSError(errno.ENOSPC, "No space left on device")

    Operations(number, place, fault, unlinks=False)  # which needs no room
    return digest(method, results)


@cache
def _undisturbed(method: str) -> tuple[int, str]:
    """The number of file operations of a run, and its digest."""
    with tempfile.TemporaryDirectory() as results:
        what, value = case(counted, method, results)
    assert what == "done", (method, value)
    return tuple(value)


def campaign(draw: random.Random, end, disk: bool = False, methods=METHODS) -> Counter:
    """Faults at random operations until `end()`; each is followed by an undisturbed call."""
    counts, whole = Counter(), {method: _undisturbed(method) for method in methods}
    while not end():
        for method, (operations, wanted) in whole.items():
            if end():
                break
            where = (draw.randint(1, operations), draw.choice(PLACES))
            with tempfile.TemporaryDirectory() as results:
                if disk:
                    what, text = case(full, method, results, *where)
                else:
                    # A signal that can be handled does not tear a write.
                    which = signal.SIGKILL if where[1] == "half" else draw.choice(SIGNALS)
                    what, text = case(killed, method, results, *where, which)
                again, value = case(digest, method, results)
            counts["tried"] += 1
            counts["traceback"] += "traceback" in (what, again)
            counts["hung"] += "hung" in (what, again)
            counts["lost"] += again != "done"
            counts["wrong"] += again == "done" and value != wanted
            if (again, value) != ("done", wanted) or what in ("traceback", "hung"):
                print(method, where, what, text, again, value)
    return counts


def row(path: str, backbone: str) -> float:
    return dd.Run(Path(path)).transfer(backbone, networks=1)["mean"]


def stepped(method: str, results: str, notes: str) -> str:
    """`digest`, leaving a file in `notes` for every run that is computed, not read."""
    from ddlib.engine import run as engine

    real = engine._distil

    def distil(*arguments):
        Path(tempfile.mkstemp(dir=notes)[1])
        return real(*arguments)

    engine._distil = distil
    return digest(method, results)


def meetings(draw: random.Random, end, many: int = 4, methods=METHODS) -> Counter:
    """Several processes ask for one run, then for as many transfers of it, at the same moment."""
    counts = Counter()
    while not end():
        for method in methods:
            if end():
                break
            with tempfile.TemporaryDirectory() as results, tempfile.TemporaryDirectory() as notes:
                children = [start(stepped, method, results, notes) for _ in range(many)]
                answers = [wait(child) for child in children]
                counts["tried"] += many
                counts["lost"] += sum(what != "done" for what, _ in answers)
                counts["traceback"] += sum(what == "traceback" for what, _ in answers)
                counts["wrong"] += len({value for what, value in answers if what == "done"}) > 1
                counts["computed twice"] += max(0, len(os.listdir(notes)) - 1)
                (path,) = Path(results).glob("smoke/*[0-9a-f].json")
                nets = [f"convnet:width={width}" for width in draw.sample(range(2, 12), many)]
                answers = [wait(child) for child in [start(row, str(path), net) for net in nets]]
                beside = json.loads(path.with_suffix(".transfer.json").read_text())
                counts["tried"] += many
                counts["lost"] += sum(net not in str(list(beside)) for net in nets)
                counts["traceback"] += sum(what == "traceback" for what, _ in answers)
    return counts
