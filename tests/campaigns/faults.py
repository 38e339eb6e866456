"""Faults at file operations: a run is killed, or the disk is full, before, within or after the n-th of them."""

import errno
import hashlib
import json
import os
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from functools import cache
from itertools import cycle, product
from pathlib import Path

import numpy as np
from PIL import Image

import ddlib as dd
from ddlib import files
from ddlib.data import cache as cached

from .server import case, interrupted, start, wait

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
EXTRACTOR = {"extractor_epochs": 1}
STEPS = {"iterations": 2}
FOLDER = {
    "dataset": "folder:pictures"
}  # images that are decoded and kept, where the others read the digits
# Every method of ours, and what makes it short.
METHODS = {
    "random": FOLDER,
    "herding": EXTRACTOR,
    "kcenter": EXTRACTOR,
    "kmeans": EXTRACTOR,
    "forgetting": EXTRACTOR,
    "dc": STEPS,
    "dsa": STEPS,
    "idc": STEPS,
    "dream": STEPS,
    "dream_plus": STEPS,
    "dm": FOLDER | {"iterations": 3},
    "frepo": {"iterations": 3, "pool_size": 2, "max_age": 1, "zca": "frepo"},
    "mtt": EXPERTS,
    "tesla": EXPERTS,
    "ftd": EXPERTS,
    "datm": EXPERTS,
}
# What a disk may say: no room, no room for this user, read-only, file too large, broken.
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO)
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
PLACES = ("before", "half", "after")


def run(method: str, results: str, **more) -> dd.Run:
    os.environ |= {"DDLIB_RESULTS": results, "DDLIB_CACHE": f"{results}/cache"}
    return dd.run(method, **{"dataset": "digits"} | TINY | METHODS[method] | more)


@cache
def pictures() -> tempfile.TemporaryDirectory:
    """The images of FOLDER, which no fault reaches; children find them below DDLIB_DATA."""
    place = tempfile.TemporaryDirectory()
    os.environ["DDLIB_DATA"] = place.name
    draw = np.random.default_rng(0)
    for name in product(("train", "test"), "ab", range(4)):
        path = Path(place.name, "pictures", *map(str, name)).with_suffix(".png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(256, size=(8, 8), dtype=np.uint8)).save(path)
    return place


def digest(method: str, results: str, **more) -> str:
    """What a run and a transfer of it must come to, whatever became of them before: the bytes of its set, and what its
    record and the row beside it measured."""
    done = run(method, results, **more)
    row = _timeless(done.transfer("mlp:width=4", networks=1))
    kept = ("accuracy", "evaluations", "history", "extra", "threads")
    measured = {key: value for key, value in done.record.items() if key in kept}
    facts = json.dumps([_timeless(measured), row], sort_keys=True).encode()
    return hashlib.sha256(done.path.with_suffix(".safetensors").read_bytes() + facts).hexdigest()


def _timeless(value: object) -> object:
    """Without what a clock says, of a method's extras too."""
    if isinstance(value, dict):
        return {key: _timeless(v) for key, v in value.items() if "seconds" not in key}
    return [_timeless(v) for v in value] if isinstance(value, list) else value


class Operations:
    """Count file operations, and let `fault` happen before, within or after the n-th one (0: never), or where it lasts,
    at every one from then on."""

    def __init__(
        self,
        number: int = 0,
        place: str = "",
        fault=None,
        unlinks: bool = True,
        lasts: bool = False,
    ):
        self.number, self.place, self.fault, self.count = number, place, fault, 0
        self.lasts = lasts
        plain = [(os, "replace"), (Path, "touch"), (Path, "unlink")]
        for owner, name in plain if unlinks else plain[:2]:
            setattr(owner, name, self.watched(getattr(owner, name)))
        Path.write_text = self.watched(Path.write_text, lambda path, *_: path)
        files.save_file = self.watched(files.save_file, lambda tensors, path, **_: path)
        cached._write_images = self.watched(cached._write_images, lambda path, *_: path)

    def watched(self, real, written=None):
        def operation(*arguments, **options):
            self.count += 1
            due = self.count >= self.number > 0 if self.lasts else self.count == self.number
            if not due:
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


def killed(method: str, results: str, number: int, place: str, which: int, fresh: bool) -> str:
    Operations(number, place, lambda: os.kill(os.getpid(), which))
    return digest(method, results, fresh=fresh)


def broken(method: str, results: str, number: int, place: str, code: int, lasts: bool) -> str:
    """The disk fails by the error `code`, once or from then on, or (0) the folder of the results vanishes."""

    def fault():
        if not code:
            shutil.rmtree(results, ignore_errors=True)
            return
        raise OSError(code, os.strerror(code))

    # An unlink needs no room.
    Operations(number, place, fault, unlinks=not code, lasts=lasts and code != 0)
    try:
        return digest(method, results)
    except FileNotFoundError:
        if code or Path(results).is_dir():
            raise
        return "the result vanished with its folder"


@cache
def _undisturbed(method: str) -> tuple[int, str, float]:
    """The number of file operations of a run, its digest and its seconds."""
    with tempfile.TemporaryDirectory() as results:
        start = time.monotonic()
        what, value = case(counted, method, results)
    assert what == "done", (method, value)
    return (*value, time.monotonic() - start)


def kill(draw: random.Random, method: str, results: str) -> tuple[str, str]:
    """One run that is killed: three times of four at a file operation, else at any moment; one of four makes anew, with
    `fresh`, what lies finished there."""
    operations, _, seconds = _undisturbed(method)
    fresh = draw.random() < 0.25
    if fresh:
        case(digest, method, results)
    if draw.random() < 0.25:
        return interrupted(draw.choice(SIGNALS), draw.uniform(0, seconds), digest, method, results)
    number, place = draw.randint(1, operations), draw.choice(PLACES)
    # A signal that can be handled does not tear a write.
    which = signal.SIGKILL if place == "half" else draw.choice(SIGNALS)
    return case(killed, method, results, number, place, which, fresh)


def fail(draw: random.Random, method: str, results: str) -> tuple[str, str]:
    """One run whose disk fails at a file operation, or whose folder vanishes."""
    number, place = draw.randint(1, _undisturbed(method)[0]), draw.choice(PLACES)
    lasts = draw.random() < 0.5
    return case(broken, method, results, number, place, draw.choice((*DISK, 0)), lasts)


def campaign(fault, draw: random.Random, end, methods=METHODS) -> Counter:
    """Faults (`kill` or `fail`) until `end(tried)`; each is followed by an undisturbed call."""
    counts = Counter()
    pictures()
    for method in cycle(methods):
        if end(counts["tried"]):
            return counts
        wanted = _undisturbed(method)[1]
        with tempfile.TemporaryDirectory() as results:
            what, text = fault(draw, method, results)
            again, value = case(digest, method, results)
        counts["tried"] += 1
        counts["traceback"] += "traceback" in (what, again)
        counts["hung"] += "hung" in (what, again)
        counts["lost"] += again != "done"
        counts["wrong"] += again == "done" and value != wanted
        if (again, value) != ("done", wanted) or what in ("traceback", "hung"):
            print(method, what, text, again, value, flush=True)
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


def neighbour(method: str, results: str, seed: int, notes: str) -> float:
    """The accuracy of one of several runs, leaving a file in `notes` for every file that it writes."""
    real = os.replace

    def replace(source, target):
        Path(tempfile.mkstemp(dir=notes)[1]).write_text(str(target))
        real(source, target)

    os.replace = replace
    return run(method, results, seed=seed).accuracy


def twice(notes: str) -> int:
    """How many files were written again by another process; a run writes its checkpoint again and again."""
    written = Counter(path.read_text() for path in Path(notes).iterdir())
    once = [path for path in written if "checkpoints" not in path]
    return sum(written[path] - 1 for path in once)


def meetings(draw: random.Random, end, many: int = 4, methods=METHODS) -> Counter:
    """Several processes ask for one run, for as many transfers of it, or for runs that share what they stand on."""
    counts = Counter()
    pictures()
    for method in cycle(methods):
        if end(counts["tried"]):
            return counts
        with tempfile.TemporaryDirectory() as results, tempfile.TemporaryDirectory() as notes:
            seeds = draw.sample(range(9), many)
            children = [start(neighbour, method, results, seed, notes) for seed in seeds]
            answers = [wait(child) for child in children]
            counts["tried"] += many
            counts["lost"] += sum(what != "done" for what, _ in answers)
            counts["traceback"] += sum(what == "traceback" for what, _ in answers)
            counts["computed twice"] += twice(notes)
        with tempfile.TemporaryDirectory() as results, tempfile.TemporaryDirectory() as notes:
            children = [start(stepped, method, results, notes) for _ in range(many)]
            answers = [wait(child) for child in children]
            counts["tried"] += many
            counts["lost"] += sum(what != "done" for what, _ in answers)
            counts["traceback"] += sum(what == "traceback" for what, _ in answers)
            counts["wrong"] += len({value for what, value in answers if what == "done"}) > 1
            counts["computed twice"] += max(0, len(os.listdir(notes)) - 1)
            (path,) = Path(results).glob("smoke/*/*[0-9a-f].json")
            nets = [f"convnet:width={width}" for width in draw.sample(range(2, 12), many)]
            answers = [wait(child) for child in [start(row, str(path), net) for net in nets]]
            beside = json.loads(path.with_suffix(".transfer.json").read_text())
            counts["tried"] += many
            counts["lost"] += sum(net not in str(list(beside)) for net in nets)
            counts["traceback"] += sum(what == "traceback" for what, _ in answers)
