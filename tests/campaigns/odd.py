"""Damaged files and crafted sets: each is refused in one sentence, or harmless."""

import base64
import json
import math
import os
import random
import resource
import shutil
import sys
import tempfile
from collections import Counter
from contextlib import suppress
from functools import cache
from pathlib import Path

import numpy as np
import torch

import ddlib as dd
from ddlib import experts, files
from ddlib.core import DDError, Interrupted
from ddlib.data import cache as cached
from ddlib.data.zca import ZCA
from ddlib.engine import queue, record
from ddlib.experts import ExpertRecipe
from ddlib.methods.dm import DM
from ddlib.report import reproduce, site, slim

from .faults import pictures, run
from .server import Hang, alarm, case

SECONDS = 60  # a call may take, on a busy machine too
BATCH = 100  # cases a child
MEMORY = (
    16 << 30
)  # bytes of addresses that a child may ask for: more is an error, and the machine lives on


def tensors(path: Path) -> list:
    values, header = files.load_tensors(path, "file", "delete it")
    return [header, {name: files.checksum(value) for name, value in values.items()}]


def synthetic(path: Path) -> list:
    syn = dd.Synthetic.load(path)
    return [files.checksum(syn.images, syn.labels, syn.mean, syn.std), repr(syn.recipe), syn.spec]


@cache
def digits() -> dd.Dataset:
    return dd.load("digits", device="cpu")


def imported(path: Path) -> dd.Synthetic:
    return dd.import_set(path, digits())


def decoded(path: Path) -> list:
    """The images of the folder whose decode cache this file is in."""
    os.environ["DDLIB_CACHE"] = str(path.parent)
    data = dd.load("folder:pictures", device="cpu")
    return [data.checksum, files.checksum(data.images["train"])]


def whitening(path: Path) -> list:
    images, cpu = digits().images["train"], torch.device("cpu")
    zca = ZCA.fit_cached(images, "mtt", cpu, files.checksum(images), path.parent)
    return [files.checksum(zca.mean, zca.matrix, zca.inverse)]


def trained(path: Path) -> list:
    """The expert in this file: its weights after each epoch."""
    os.environ["DDLIB_EXPERTS"] = str(path.parents[1])
    loaded = experts.load_experts(digits(), NET, TRAINING, 1)
    return [files.checksum(*loaded.weights), len(loaded.weights[0])]


def executed(path: Path) -> list:
    """What pages and `reproduce` read of an executed notebook."""
    text, shown = site.notebook(path)
    known = reproduce._executed_with(path.parent)[path.stem]
    return [text, [*shown.values()], known, *site._execution(path)]


NET, TRAINING = "mlp:width=4", ExpertRecipe(epochs=3)
# Files of others, which have no checksum: some other contents are as good.
OTHERS = {
    "published .pt": imported,
    "published .npz": imported,
    "published folder": lambda path: imported(path.parent),
    "queue": queue.read,
}
READERS = OTHERS | {
    "set": synthetic,
    "checkpoint or expert": tensors,
    "record": lambda path: dd.Run(path).record,
    "side file": record.side_file,
    "study": lambda path: files.read_json(path, "study", "delete it"),
    "timing": experts._timing,
    "cache note": lambda path: cached._note(path.with_suffix(".npy")),
    "decoded images": decoded,
    "note of decoded images": decoded,
    "whitening": whitening,
    "expert": trained,
    "executed notebook": executed,
}


def stopped(folder: Path) -> Path:
    """The checkpoint of a run that was stopped after two of its steps."""
    step, made = DM.step, []

    def twice(method):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(method)
        return step(method)

    DM.step = twice
    with suppress(Interrupted):
        run("dm", str(folder))
    DM.step = step
    (path,) = folder.rglob("checkpoints/*.safetensors")
    return path


def originals(folder: str) -> dict[str, str]:
    """A whole file of each kind."""
    pictures()
    done = run("dm", folder, dataset="digits")
    done.transfer("mlp", networks=1)
    place, rows = Path(folder), [{"steps": 3, "seconds": 0.25}]
    note = {"sha256": "0" * 64, "sampled": "1" * 64, "labels": [0, 1], "files": ["a", "b"]}
    state = files.save_tensors(place / "state.safetensors", {"raw": torch.ones(3)}, {"step": 3})
    study = files.write_json(place / "study.json", {"study": "flatness", "rows": rows})
    noted = files.write_json(place / "note.json", note)
    timing = files.write_json(place / "expert.json", {"seconds": 1.5})
    dd.save_pt(done.synthetic, place / "set.pt")
    images, labels = torch.zeros(10, 1, 8, 8), torch.arange(10)
    torch.save({"data": [[images, labels]]}, place / "res_DM_digits.pt")
    np.savez_compressed(place / "step1.npz", image=images.movedim(1, 3), label=torch.eye(10))
    shutil.copy(queue.ROWS, place / "queue.yaml")
    decoded(place / "decoded" / "a.npy")
    (images,) = (place / "decoded").glob("pictures-train-*.npy")
    whitening(place / "a.safetensors")
    os.environ["DDLIB_EXPERTS"] = str(place / "experts")
    (expert,) = experts.train_experts(digits(), NET, TRAINING, 1, progress=False)
    paths = {
        "published .pt": place / "res_DM_digits.pt",
        "published .npz": place / "step1.npz",
        "published folder": place / "res_DM_digits.pt",
        "queue": place / "queue.yaml",
        "pt": place / "set.pt",
        "set": done.path.with_suffix(".safetensors"),
        "checkpoint or expert": state,
        "stopped": stopped(place / "stopped"),
        "record": done.path,
        "side file": done.path.with_suffix(".transfer.json"),
        "study": study,
        "timing": timing.with_suffix(".safetensors"),
        "cache note": noted,
        "decoded images": images,
        "note of decoded images": images.with_suffix(".json"),
        "whitening": next(place.glob("zca-*.safetensors")),
        "expert": expert,
        "executed notebook": notebook(place / "a.ipynb"),
    }
    return {kind: str(path) for kind, path in paths.items()}


def notebook(path: Path) -> Path:
    """A small notebook as `reproduce` leaves it."""
    picture = base64.b64encode(Path(pictures().name, "pictures/train/a/0.png").read_bytes())
    data = {"image/png": picture.decode()}, {"text/html": "<table><td>41.5 ± 0.3</td></table>"}
    outputs = [{"output_type": "display_data", "metadata": {}, "data": each} for each in data]
    outputs.append({"output_type": "stream", "name": "stdout", "text": ["67.0\n", "5.6\n"]})
    code = {"cell_type": "code", "source": ["run()\n"], "execution_count": 1, "outputs": outputs}
    about = {"parameters": {"profile": "small"}, "end_time": "2026-11-30T00:00:00"}
    cells = [{"cell_type": "markdown", "source": "# DM", "metadata": {}}, code | {"metadata": {}}]
    whole = {"cells": cells, "metadata": {"papermill": about}, "nbformat": 4, "nbformat_minor": 5}
    path.write_text(json.dumps(slim.sealed(whole), indent=1))
    return path


def harmed(data: bytes, draw: random.Random) -> bytes:
    at, size = draw.randrange(len(data)), draw.choice((1, 2, 8, 64))
    return draw.choice(
        (
            lambda: data[:at] + bytes([data[at] ^ (1 << draw.randrange(8))]) + data[at + 1 :],
            lambda: data[:at],
            lambda: data[:at] + bytes(size) + data[at + size :],
            lambda: data[:at] + draw.randbytes(size) + data[at + size :],
            lambda: data[:at] + draw.choice(b"0123456789").to_bytes() + data[at + 1 :],
            lambda: data[:at] + data[at + size :],
        )
    )()


# What is no file: a pipe that nobody writes to, a device without an end, a folder.
ENDLESS = (os.mkfifo, lambda path: path.symlink_to("/dev/zero"), Path.mkdir)


def same(value: object, whole: object) -> bool:
    """Whether all of `whole` is still there; a timing that is lost says so."""
    if isinstance(whole, dict):
        return isinstance(value, dict) and {**value, **whole} == value
    return value == whole or (isinstance(value, float) and math.isnan(value))


def damage(paths: dict[str, str], seed: int) -> Counter:
    """One child's cases of damaged files, and of what is none."""
    draw, counts = random.Random(seed), Counter()
    for _ in range(BATCH):
        kind = draw.choice(list(READERS))
        path = Path(paths[kind])
        source = path.with_suffix(".json") if kind == "timing" else path
        data, whole = source.read_bytes(), READERS[kind](path)
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / source.parent.name / source.name
            copy.parent.mkdir()
            for beside in source.parent.glob(f"{source.stem}.*"):
                shutil.copy(beside, copy.with_name(beside.name))
            copy.unlink()
            if draw.random() < 0.1:
                draw.choice(ENDLESS)(copy)
            else:
                copy.write_bytes(harmed(data, draw))
            copy = copy.with_name(path.name)
            value = outcome(counts, f"{kind} {seed}", READERS[kind], copy)
            kept = value is REFUSED or kind in OTHERS or same(value, whole)
            counts["wrong"] += not kept
    return counts


REFUSED = object()


def outcome(counts: Counter, what: str, function, *arguments, **options) -> object:
    counts["tried"] += 1
    try:
        with alarm(SECONDS):
            return function(*arguments, **options)
    except (DDError, SystemExit) as error:  # SystemExit: the command line's own
        counts["refused"] += 1
        counts["more than one line"] += "\n" in str(error)
    except Hang:
        counts["hung"] += 1
        counts[f"hung: {what}"] += 1
    except BaseException as error:  # noqa: BLE001  whatever comes is counted
        counts["traceback"] += 1
        counts[f"traceback: {what.split(' ')[0]} {type(error).__name__} {str(error)[:60]}"] += 1
    return REFUSED


def crafted(paths: dict[str, str], seed: int) -> Counter:
    """One child's cases of sets and checkpoints with a right checksum, or exported sets, and wrong contents; a set that
    is read can be kept, a run that goes on ends."""
    draw, counts = random.Random(seed), Counter()
    checkpoint = files.load_tensors(Path(paths["stopped"]), "checkpoint", "")
    kept = files.load_tensors(Path(paths["set"]), "set", "")
    content = torch.load(paths["pt"], weights_only=True)
    values = {key: part for key, part in content.items() if isinstance(part, torch.Tensor)}
    exported = values, {key: part for key, part in content.items() if key not in values}
    for _ in range(BATCH):
        values, header = whole = draw.choice((kept, exported, checkpoint))
        tensors_, facts = dict(values), json.loads(json.dumps(header))
        if draw.random() < 0.5:
            name = draw.choice(list(tensors_))
            shape = draw.choice(((), (0,), (3,), (10, 1, 8, 8), (10, 10), (10,), (1, 1, 1)))
            kind = draw.choice((torch.float32, torch.int64, torch.bfloat16, torch.bool))
            tensors_[draw.choice((name, "images@x", "more"))] = torch.zeros(shape).to(kind)
        else:
            part = facts.get("recipe", facts) if draw.random() < 0.5 else facts
            key = draw.choice([*part, "more"])
            part[key] = draw.choice((None, -1, 10**9, "x", "2", [], {}, math.nan, 1.5, True, [1]))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "a.safetensors"
            if whole is checkpoint:
                path = Path(folder) / "smoke" / "checkpoints" / Path(paths["stopped"]).name
                path.parent.mkdir(parents=True)
                files.save_tensors(path, tensors_, facts)
                outcome(counts, f"crafted {seed}", run, "dm", folder)
                continue
            if whole is kept:
                files.save_tensors(path, tensors_, facts)
                syn = outcome(counts, f"crafted {seed}", dd.Synthetic.load, path)
            else:
                torch.save(tensors_ | facts, path.with_suffix(".pt"))
                syn = outcome(counts, f"crafted {seed}", imported, path.with_suffix(".pt"))
            if syn is not REFUSED:
                again = outcome(Counter(), "again", dd.Synthetic.load, syn.save(path))
                counts["wrong"] += again is REFUSED
    return counts


@cache
def originals_of_all() -> tuple[tempfile.TemporaryDirectory, dict[str, str]]:
    """The originals of all campaigns, and the folder that holds them."""
    pictures()
    place = tempfile.TemporaryDirectory()
    what, paths = case(originals, place.name)
    assert what == "done", paths
    return place, paths


def campaign(kind, draw: random.Random, end) -> Counter:
    """Batches of cases, each in a child of its own, until `end(tried)`."""
    counts = Counter()
    _, paths = originals_of_all()
    while not end(counts["tried"]):
        what, found = case(_batch, kind, paths, draw.getrandbits(32))
        died = {"hung" if what == "hung" else "traceback": 1, "tried": 1}
        counts.update(found if what == "done" else died)
        if what != "done":
            print(kind.__name__, what, found, flush=True)
    return counts


def _batch(kind, paths: dict[str, str], seed: int) -> Counter:
    """One child's cases, and the programs that were started meanwhile."""
    started = []
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    sys.addaudithook(lambda event, _: started.append(event) if event in PROGRAMS else None)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # where names without a path go
        counts = kind(paths, seed)
        os.chdir("/")
    counts["program started"] = len(started)
    return counts


PROGRAMS = ("os.exec", "os.posix_spawn", "os.spawn", "os.system", "subprocess.Popen")
