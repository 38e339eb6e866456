"""Files that lie, folders that change, processes that meet: each was once a wrong number, a hang or a traceback."""

import dataclasses
import errno
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import ddlib as dd
from ddlib import cli, files
from ddlib.core import DDError, Interrupted
from ddlib.data import cache as decoded
from ddlib.data import dataset
from ddlib.data.zca import ZCA
from ddlib.engine import checkpoint
from ddlib.engine import record as records
from ddlib.engine import run as trunk
from ddlib.experts import _timing
from ddlib.methods.dm import DM
from ddlib.recipe import VERSION
from ddlib.report import answers, docs, plots, reproduce, site, slim, tables

ROOT = str(Path(__file__).resolve().parents[2])

SHORT = {
    "ipc": 1,
    "iterations": 4,
    "eval_epochs": 1,
    "networks": 1,
    "evaluations": 1,
    "snapshots": 0,
    "backbone": "convnet:width=4",
    "progress": False,
}


def dm(dataset="digits", **changes) -> dd.Run:
    return dd.run("dm", dataset, **SHORT | changes)


def pets(root: Path, seed: int) -> Path:
    """A folder of two classes, six grey images of 8 x 8 pixels each."""
    draw = np.random.default_rng(seed)
    for name in ("cat", "dog"):
        (root / name).mkdir(parents=True, exist_ok=True)
        for number in range(6):
            pixels = draw.integers(0, 256, (8, 8), np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dd.Run:
    return dm(results=tmp_path_factory.mktemp("made"))


@pytest.fixture
def kept(made, results) -> dd.Run:
    """A finished run of this test's own, to spoil."""
    shutil.copytree(made.path.parent, results / "smoke" / "dm")
    return dd.Run(results / "smoke" / "dm" / made.path.name)


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("DDLIB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


# The right record


def test_a_folder_is_known_by_its_images_and_not_by_its_name(results, tmp_path, cache, monkeypatch):
    monkeypatch.delenv("DDLIB_DATA", raising=False)
    for place, seed in (("a", 0), ("b", 1)):
        pets(tmp_path / place / "pets", seed)
    monkeypatch.chdir(tmp_path / "a")
    first = dm("folder:pets")
    assert dm("folder:pets").path == first.path
    monkeypatch.chdir(tmp_path / "b")
    with pytest.raises(DDError, match="was made from other images of the name 'folder:pets'"):
        dm("folder:pets")
    with pytest.raises(DDError, match="was made from other images"):
        first.transfer("mlp", networks=1)
    # Where the folder is not at hand, the record is all there is.
    monkeypatch.chdir(tmp_path)
    assert dm("folder:pets").accuracy == first.accuracy


def test_a_folder_that_changed_in_place(results, tmp_path, cache):
    name = f"folder:{pets(tmp_path / 'pets', 0)}"
    run = dm(name, subset=2)
    assert dm(name, subset=2).record == run.record
    pets(tmp_path / "pets", 1)
    with pytest.raises(DDError, match="other images of the name .* run with fresh=True"):
        dm(name, subset=2)
    assert (
        dm(name, subset=2, fresh=True).record["dataset_checksum"] != run.record["dataset_checksum"]
    )
    assert dm(name, subset=2).path == run.path


def test_rows_of_a_replaced_set_go_with_it(results, tmp_path, cache):
    name = f"folder:{pets(tmp_path / 'pets', 0)}"
    run = dm(name)
    row, beside = run.transfer("mlp", networks=1), run.path.with_suffix(".transfer.json")
    dm(name, fresh=True)
    assert [*records.side_file(beside).values()] == [row]  # the same set, the same row
    pets(tmp_path / "pets", 1)
    run = dm(name, fresh=True)
    assert not beside.exists()
    run.transfer("mlp", networks=1)
    assert beside.exists()  # made anew; the accuracy on so few images may be the same


def test_a_transfer_of_a_set_that_is_replaced_meanwhile(results, tmp_path, cache, monkeypatch):
    name = f"folder:{pets(tmp_path / 'pets', 0)}"
    old, real = dm(name), records.evaluate
    row = old.transfer("mlp", networks=1)
    beside = old.path.with_suffix(".transfer.json")

    def replaced(*arguments, **options):
        pets(tmp_path / "pets", 1)
        dm(name, fresh=True)
        return real(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(records, "evaluate", replaced)
        with pytest.raises(DDError, match="was replaced while its transfer was at work: ask again"):
            old.transfer("lenet", networks=1)
    assert not beside.exists()
    files.write_json(beside, {f"mlp x 1, version {VERSION}": row})  # as if one moment earlier
    new = dm(name)
    assert new.transferred() == {}
    assert new.transfer("mlp", networks=1)["set_checksum"] == new.record["set_checksum"]
    assert new.record["set_checksum"] != row["set_checksum"] == old.record["set_checksum"]
    with pytest.raises(DDError, match="is not the one of its record: one of the two was replaced"):
        _ = copy_with_record(new, old.record).synthetic


def copy_with_record(run: dd.Run, record: dict) -> dd.Run:
    """The set of a run beside another record."""
    shutil.copytree(run.path.parent, run.path.parents[1] / "copy")
    path = run.path.parents[1] / "copy" / run.path.name
    return dd.Run(files.write_json(path, record))


def test_a_kill_between_a_new_set_and_its_record(results, tmp_path, cache, monkeypatch):
    name = f"folder:{pets(tmp_path / 'pets', 0)}"
    old = dm(name).record
    pets(tmp_path / "pets", 1)

    def killed(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(trunk, "write_json", killed)
        dm(name, fresh=True)
    torn = dd.Run(next(results.glob("smoke/dm/*.json")))
    assert torn.record == old
    with pytest.raises(DDError, match="the set beside .* is not the one of its record"):
        _ = torn.synthetic
    run = dm(name)
    assert records.set_checksum(run.synthetic) == run.record["set_checksum"] != old["set_checksum"]


def test_a_device_is_never_replaced(tmp_path):
    (tmp_path / "link").symlink_to("/dev/null")  # a real one would be gone where this test fails
    with pytest.raises(DDError, match="it is a device; choose a writable folder"):
        files.write_json(tmp_path / "link", {})
    assert (tmp_path / "link").is_char_device()


def test_a_record_under_another_runs_name(results):
    one, other = dm(), dm(seed=1)
    for suffix in (".json", ".safetensors"):
        shutil.copy(other.path.with_suffix(suffix), one.path.with_suffix(suffix))
    with pytest.raises(DDError, match="is that of the run dm-digits-ipc1-smoke-seed1-"):
        _ = dm().accuracy


def test_a_folder_that_goes_while_it_is_looked_at(tmp_path, cache):
    root = pets(tmp_path / "pets", 0)
    tree = dataset.tree(f"folder:{root}", None)
    states = decoded.states(tree)
    shutil.rmtree(root)
    with pytest.raises(DDError, match="pets changes while it is read: No such file"):
        decoded.Watch(tree, states, 0)


def test_a_quiet_folder_is_looked_through_once_and_then_by_turns(tmp_path, cache, monkeypatch):
    root = pets(tmp_path / "pets", 0)
    images = sorted(root.rglob("*.png"))
    for path in (root, *root.iterdir(), *images):
        os.utime(path, (10**9, 10**9))
    name, first = f"folder:{root}", dataset.folder_checksum(f"folder:{root}")
    monkeypatch.setattr(decoded.Watch, "EACH_TIME", 5)
    listed, real = [], dataset.tree

    def tree(*arguments):
        listed.append(1)
        return real(*arguments)

    monkeypatch.setattr(dataset, "tree", tree)
    assert dataset.folder_checksum(name) == first and not listed
    place = (root.resolve(), None)
    dataset._WATCHED.pop(place)
    assert [dataset.folder_checksum(name) for _ in range(9)] == [first] * 9 and listed == [1]
    # Written over, which no directory shows: one of three turns finds it, and it stays found.
    images[7].write_bytes(images[0].read_bytes())
    seen = [dataset.folder_checksum(name) != first for _ in range(6)]
    assert seen == sorted(seen) and all(seen[2:])
    # Renamed, or one more: at once.
    for path in (root, *root.iterdir(), *images):
        os.utime(path, (10**9, 10**9))
    second = dataset.folder_checksum(name)
    assert dataset._WATCHED[place][0].useful
    shutil.copy(images[0], root / "dog" / "6.png")
    assert dataset.folder_checksum(name) not in (first, second)


# One checksum over everything


def spoil(path: Path, old: str, new: str) -> None:
    text = path.read_bytes()
    assert text.count(old.encode()) and len(old) == len(new)
    path.write_bytes(text.replace(old.encode(), new.encode(), 1))


@pytest.mark.parametrize(
    ("old", "new"), [('\\"epochs\\": 2', '\\"epochs\\": 9'), ('\\"lr\\": 0.01', '\\"lr\\": 9.01')]
)
def test_a_changed_digit_in_the_header_of_a_set(kept, old, new):
    path = kept.path.with_suffix(".safetensors")
    spoil(path, old, new)
    with pytest.raises(DDError, match="was altered: its checksum does not match"):
        dd.Synthetic.load(path)


def test_a_renamed_tensor(tmp_path):
    path = files.save_tensors(tmp_path / "a.safetensors", {"mean": torch.ones(2)}, {})
    spoil(path, '"mean"', '"neam"')
    with pytest.raises(DDError, match="was altered"):
        files.load_tensors(path, "set", "delete it")


def test_a_changed_digit_in_a_checkpoint(results, monkeypatch):
    stop_after(3, monkeypatch)
    with pytest.raises(Interrupted):
        dm()
    (path,) = results.glob("smoke/checkpoints/*.safetensors")
    spoil(path, '\\"step\\": 3, \\"threads', '\\"step\\": 2, \\"threads')
    with pytest.raises(DDError, match="the checkpoint .* was altered"):
        dm()


def unsealed(path: Path, **changes) -> Path:
    """The record at `path` with these changes, as ddlib wrote it before records had a checksum."""
    record = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in record.items() if k not in ("seal", "threads")}))
    return path


def stop_after(step: int, monkeypatch) -> None:
    real = DM.step

    def stopping(self):
        if self.steps == step:
            raise KeyboardInterrupt
        return real(self)

    monkeypatch.setattr(DM, "step", stopping)


def test_a_changed_digit_in_a_record_or_beside_it(kept):
    kept.transfer("mlp", networks=1)
    beside = kept.path.with_suffix(".transfer.json")
    for path in (kept.path, beside):
        value = json.loads(path.read_text())
        score = value["accuracy"]["last"] if path == kept.path else [*value.values()][-1]
        score["mean"] += 1
        path.write_text(json.dumps(value))
    with pytest.raises(DDError, match="the record .* was altered"):
        _ = dd.Run(kept.path).record
    with pytest.raises(DDError, match="the side file .* was altered"):
        records.side_file(beside)


@pytest.mark.parametrize("seal", ["seam", None])
def test_a_file_that_has_lost_its_checksum_is_no_older_one(kept, seal):
    kept.transfer("mlp", networks=1)
    beside = kept.path.with_suffix(".transfer.json")
    for path in (kept.path, beside):
        value = json.loads(path.read_text())
        sha = value.pop("seal")
        path.write_text(json.dumps({seal: sha, **value} if seal else value))
    with pytest.raises(DDError, match="the record .* was altered: its checksum is missing"):
        _ = dd.Run(kept.path).record
    if seal:
        with pytest.raises(DDError, match="the side file .* holds something else than rows"):
            records.side_file(beside)


@pytest.mark.parametrize("size", [8, 64])
def test_no_lost_bytes_make_an_older_file_with_other_contents(tmp_path, size):
    """Each cut of a record's text is refused, or all that it said is still there."""
    value = {"name": "one", "seconds": {"distill": 1.5}, "written": "2026-11-29T02:00:00Z"}
    path = files.write_json(tmp_path / "record.json", value)
    data = path.read_bytes()
    for at in range(len(data)):
        path.write_bytes(data[:at] + data[at + size :])
        with suppress(DDError):
            assert value.items() <= files.read_json(path, "record", "").items()


def test_older_files_are_read_and_told_apart(kept):
    assert kept.sealed
    old = dd.Run(unsealed(kept.path))
    assert old.accuracy == kept.accuracy and not old.sealed
    path = kept.path.with_suffix(".safetensors")
    assert files.sealed(path)
    tensors, header = files.load_tensors(path, "set", "")
    header["sha256"] = files.checksum(*tensors.values())
    files.save_file(tensors, path, metadata={"ddlib": json.dumps(header)})
    assert torch.equal(old.synthetic.images, tensors["images"]) and not files.sealed(path)


# Threads


def test_a_resume_with_another_number_of_threads_is_refused_unless_allowed(results, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        stop_after(3, patch)
        dm()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)  # nor leave the process 7
    with pytest.raises(
        DDError, match="computed on 1 threads and this process has 7, .*NUM_THREADS=1"
    ):
        dm()
    assert dm(any_threads=True).record["threads"] == [1, 7]


def test_smoke_runs_on_one_thread_wherever_it_is_started(monkeypatch):
    set_to = []
    monkeypatch.setattr(torch, "set_num_threads", set_to.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    for variable, profile, wanted in (
        ("", "smoke", [1, 4]),
        ("2", "smoke", [4]),
        ("", "small", [4]),
    ):
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
        set_to.clear()
        with checkpoint.threads_of(profile):
            pass
        assert set_to == wanted


# No row is lost


def test_rows_written_at_once_are_all_kept(kept):
    nets = ["mlp", "lenet", "convnet:width=2", "convnet:width=3"]
    with ThreadPoolExecutor(4) as pool:
        rows = list(pool.map(lambda net: dd.Run(kept.path).transfer(net, networks=1), nets))
    beside = records.side_file(kept.path.with_suffix(".transfer.json"))
    assert [row["backbone"] for row in rows] == nets
    assert {row["backbone"] for row in beside.values()} == set(nets)


def test_one_transfer_asked_for_at_once_is_made_once(kept, monkeypatch):
    made, real = [], records.evaluate

    def evaluate(*arguments, **options):
        made.append(1)
        time.sleep(0.2)
        return real(*arguments, **options)

    monkeypatch.setattr(records, "evaluate", evaluate)
    with ThreadPoolExecutor(3) as pool:
        ask = lambda _: dd.Run(kept.path).transfer("mlp", networks=1)
        first, *others = pool.map(ask, range(3))
    assert len(made) == 1 and others == [first] * 2


# Recipes in files


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": -1}, "'epochs' must be 1 to 1000000, not -1"),
        ({"epochs": 10**12}, "'epochs' must be 1 to 1000000"),
        ({"loss": "x"}, "unknown recipe loss 'x'"),
        ({"lr": float("nan")}, "'lr' must be a finite number"),
        ({"drops": ["x"]}, "'drops' must be tuple"),
        ({"augment": "blur"}, "blur"),
        ({"speed": 1}, "unknown recipe key 'speed'"),
    ],
)
def test_a_sets_recipe_is_held_to_what_a_typed_one_is(kept, change, message):
    path = kept.path.with_suffix(".safetensors")
    tensors, header = files.load_tensors(path, "set", "")
    files.save_tensors(path, tensors, header | {"recipe": header["recipe"] | change})
    with pytest.raises(DDError, match=f"the distilled set .* makes no sense: .*{message}"):
        dd.Synthetic.load(path)


def test_an_unknown_optimiser_is_not_taken_for_another(kept):
    syn = dataclasses.replace(kept.synthetic, recipe=dd.protocol("dm", epochs=1))
    syn = dataclasses.replace(syn, recipe=dataclasses.replace(syn.recipe, optimiser="x"))
    with pytest.raises(DDError, match="unknown optimiser 'x'"):
        dd.evaluate(syn, dd.load("digits", device="cpu"), networks=1)


def test_a_record_without_a_number_is_no_result(kept):
    last = kept.record["accuracy"]["last"] | {"mean": float("nan")}
    unsealed(kept.path, accuracy={"last": last, "best": last})
    with pytest.raises(DDError, match="is no record of a run .*delete it and run again"):
        _ = dd.Run(kept.path).record


@pytest.mark.parametrize("path", ["", ".", "/"])
def test_a_run_at_a_path_without_a_name_is_one_sentence(path):
    for call in (dd.Run, dd.tables.on_other_networks):
        with pytest.raises(dd.DDError, match="the path of a run names its record, a JSON file"):
            call(Path(path))


# Processes that meet


def test_one_computes_and_the_others_wait_and_read(results, monkeypatch):
    made, real = [], DM.step

    def step(self):
        made.append(1)
        return real(self)

    monkeypatch.setattr(DM, "step", step)
    with ThreadPoolExecutor(3) as pool:
        runs = list(pool.map(lambda _: dm(), range(3)))
    assert len(made) == SHORT["iterations"] and len({run.accuracy for run in runs}) == 1


def test_one_fits_the_whitening_and_the_others_read_it(tmp_path, monkeypatch):
    fitted = []
    real = ZCA.fit

    def fit(*arguments):
        fitted.append(1)
        time.sleep(0.2)
        return real(*arguments)

    monkeypatch.setattr(ZCA, "fit", fit)
    pixels = torch.arange(4 * 3 * 64).mul(37).remainder(256).view(4, 3, 8, 8).to(torch.uint8)
    ask = lambda _: ZCA.fit_cached(pixels, "mtt", torch.device("cpu"), "0" * 64, tmp_path)
    with ThreadPoolExecutor(3) as pool:
        first, *others = pool.map(ask, range(3))
    assert len(fitted) == 1 and all(torch.equal(zca.matrix, first.matrix) for zca in others)


def test_a_run_at_work_elsewhere_can_be_seen_and_a_dead_ones_lock_is_free(results):
    path = dm().path
    path.unlink()
    hold = (
        "import sys, time; from pathlib import Path; from ddlib.files import lock\n"
        f"with lock(Path({str(path)!r}), 'it'): print(1, flush=True), time.sleep(60)"
    )
    child = subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout.readline() == "1\n"
        with pytest.raises(files.Busy, match="another process is at work on the run dm-digits"):
            dm(wait=False)
    finally:
        child.kill()
        child.wait()
    assert dm(wait=False).path == path


# Nothing that hangs, crashes or starts a program


def test_a_pipe_among_the_images_is_not_waited_for(tmp_path, cache):
    root = pets(tmp_path / "pets", 0)
    for name in ("0.png", "5.png"):  # the first image of a class, and the last
        (root / "cat" / name).unlink()
        os.mkfifo(root / "cat" / name)
        with pytest.raises(DDError, match=f"the image .*{name} is not a regular file"):
            dd.load(f"folder:{root}", device="cpu")
        (root / "cat" / name).unlink()


def test_a_program_is_never_asked_to_decode(tmp_path, cache, monkeypatch):
    root = pets(tmp_path / "pets", 0)
    text = "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"
    (root / "cat" / "0.png").write_text(text)
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(DDError, match="cannot decode the image"):
        dd.load(f"folder:{root}", device="cpu")
    assert not (tmp_path / "started").exists()


@pytest.mark.parametrize("where", ["write", "move", "note"])
def test_a_full_disk_leaves_the_images_in_memory(tmp_path, cache, monkeypatch, where):
    name = f"folder:{pets(tmp_path / 'pets', 0)}"
    wanted = dd.load(name, device="cpu").checksum
    monkeypatch.setenv("DDLIB_CACHE", str(tmp_path / "full"))

    def full(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    if where == "write":
        monkeypatch.setattr(decoded.np.lib.format, "write_array_header_1_0", full)
    elif where == "move":
        monkeypatch.setattr(os, "replace", full)
    else:
        monkeypatch.setattr(decoded, "write_json", lambda *args: full_sentence())
    with pytest.warns(UserWarning, match="cannot write the decode cache"):
        assert dd.load(name, device="cpu").checksum == wanted
    left = [path.suffix for path in (tmp_path / "full").iterdir()]
    assert ".part" not in left and ".done" not in left


def full_sentence():
    raise files.CannotWrite("cannot write it: No space left on device")


def test_no_memory_is_asked_for_before_a_bound(tmp_path, cache):
    root = pets(tmp_path / "pets", 0)
    images, labels = np.zeros((2, 8, 8), np.uint8), np.array([0, 2**62])
    with pytest.raises(DDError, match="2 images make at most as many classes"):
        dd.from_arrays(images, labels, images, labels)
    with pytest.raises(DDError, match="more than the memory and the disk of the decode cache"):
        dd.load(f"folder:{root}", resolution=10**6, device="cpu")
    Image.new("L", (60_000, 1)).save(root / "dog" / "5.png")
    with pytest.raises(DDError, match="60000x1 is too narrow to be resized to 64"):
        dd.load(f"folder:{root}", resolution=64, device="cpu")
    with pytest.raises(DDError, match="'snapshots' must be at most 10000"):
        dm(snapshots=10**9)
    assert dm(evaluations=10**9, iterations=2).record["history"]


def test_an_import_changes_nothing(tmp_path):
    code = (
        "import ctypes, random, signal, sys, warnings\n"
        "import numpy, torch\n"
        "state = lambda: (torch.get_num_threads(), torch.random.get_rng_state().tolist(),\n"
        "    random.getstate(), numpy.random.get_state()[1].tolist(), list(warnings.filters),\n"
        "    [signal.getsignal(n) for n in (2, 15)], torch.get_default_dtype(), dict(__import__('os').environ))\n"
        "before = state()\n"
        "import ddlib\n"
        "from ddlib.engine import heap\n"
        "assert state() == before\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": ROOT})


# One sentence, and nothing left over


def test_no_test_images_are_found_before_the_distillation(results, tmp_path, cache, monkeypatch):
    root = tmp_path / "pets"
    for name in ("cat", "dog"):
        (root / name).mkdir(parents=True)
        Image.new("L", (8, 8), 9).save(root / name / "0.png")
    monkeypatch.setattr(DM, "step", lambda self: pytest.fail("it has begun"))
    with pytest.raises(DDError, match="has no test images"):
        dm(f"folder:{root}")


def test_numpy_numbers_are_numbers(results):
    assert dm(ipc=np.int64(1), seed=np.int32(0), iterations=np.int64(4)).path == dm().path


def test_constant_images_cannot_be_whitened(tmp_path, cache):
    images = torch.full((4, 1, 8, 8), 7, dtype=torch.uint8)
    with pytest.raises(DDError, match="needs images that differ"):
        ZCA.fit(images, "frepo")


def test_a_lost_timing_stops_no_run(tmp_path):
    path = tmp_path / "expert-000.safetensors"
    for text in ("{", "[1]", '{"seconds": "x"}', "null"):
        path.with_suffix(".json").write_text(text)
        assert math.isnan(_timing(path))


def test_what_a_killed_process_left_is_swept(results):
    run = dm()
    forgotten = records.checkpoint_path(records.resolve_record(run.record))
    forgotten.touch()
    targets = (run.path, run.path.with_suffix(".safetensors"), forgotten)
    old, new = (
        [path.with_name(f".{path.name}.0000000{end}") for path in targets] for end in (1, 2)
    )
    for path in (*old, *new):
        path.touch()
    for path in old:
        os.utime(path, (0, 0))
    dm()
    assert not forgotten.exists()
    assert not any(path.exists() for path in old) and all(path.exists() for path in new)


@pytest.mark.parametrize("text", ["{", "[]", "5", "[" * 5000, "\udcff"])
def test_a_damaged_side_file_is_one_sentence(kept, text):
    beside = kept.path.with_suffix(".transfer.json")
    beside.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(DDError, match="the side file .* cannot be read .*; delete it and run"):
        kept.transfer("mlp", networks=1)


SCORE = {"backbone": "mlp", "step": 4, "mean": 9.5, "std": 0.0, "networks": [9.5]}


@pytest.mark.parametrize(
    ("kind", "rows"),
    [
        ("transfer", {"rows": 5}), ("transfer", {"mlp": SCORE}), ("transfer", {"mlp x 1, version 1": [SCORE]}),
        ("transfer", {"mlp x 1, version 1": SCORE | {"backbone": None}}), ("transfer", {"mlp y 1, version 1": SCORE}),
        ("transfer", {"mlp x 1, version 1": SCORE | {"mean": 10**400}}), ("confusion", {"step 4": 5}),
        ("transfer", {"mlp x 1, version 1": SCORE | {"networks": []}}), ("confusion", {"step 4": [[1], [2]]}),
    ],
)  # fmt: skip
def test_rows_that_are_none(kept, kind, rows):
    beside = kept.path.with_suffix(f".{kind}.json")
    beside.write_text(json.dumps(rows))
    with pytest.raises(DDError, match="the side file .* holds something else than rows .*; delete"):
        records.side_file(beside)
    if kind == "transfer":
        with pytest.raises(DDError, match="holds something else than rows"):
            tables.transfers([kept])


@pytest.mark.parametrize("text", ["", "{}", "[5]", "[" * 3000])
def test_a_damaged_benchmark_is_one_sentence(tmp_path, text):
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "dm_cpu.json").write_text(text)
    with pytest.raises(DDError, match="the benchmark .*dm_cpu.json .*; run it again"):
        [*answers._sources("bench/dm_*.json", answers.Kept(tmp_path))]


def test_ctrl_c_ends_the_kernels_of_reproduce(monkeypatch):
    started = threading.Event()
    children = []

    def execute(name: str) -> float:
        """As a notebook does: a child in a session of its own, waited for."""
        code = "import time; time.sleep(600)  # ipykernel"
        children.append(subprocess.Popen([sys.executable, "-c", code], start_new_session=True))
        started.set()
        children[-1].wait()
        return 0.0

    def interrupted(jobs):
        assert started.wait(120)
        raise KeyboardInterrupt

    monkeypatch.setattr(reproduce, "as_completed", interrupted)
    with pytest.raises(KeyboardInterrupt):
        reproduce._all(execute, ["a"], "small", ZeroDivisionError)
    assert children[0].returncode == -signal.SIGKILL  # and not waited for


def test_a_name_that_is_too_long(results):
    with pytest.raises(DDError, match="no distilled set at"):
        dd.Synthetic.load("e" * 300)
    with pytest.raises(DDError, match="cannot write .*File name too long"):
        dd.run("dm", "mine" * 80, data=_mine("mine" * 80), **SHORT)


def _mine(name: str) -> dd.Dataset:
    images, labels = np.zeros((4, 8, 8), np.uint8), np.array([0, 1, 0, 1])
    return dd.from_arrays(images, labels, images, labels, name=name, device="cpu")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"lr_img": 1e300}, "must be a finite number of at most 1e30"),
        ({"backbone": "convnet:width=999999999"}, "whole number above 0 and at most 65536"),
        ({"backbone": "convnet:width=60000"}, "GiB of weights, more than this machine's memory"),
        ({"backbone": "mlp:depth=999999999"}, "at most 128"),
        ({"fresh": np.zeros(3)}, "fresh must be of type bool"),
        ({"data": "digits"}, "data must be of type Dataset or None, not 'digits'"),
    ],
)
def test_a_value_too_large_or_of_a_wrong_type(results, words, message):
    with pytest.raises(DDError, match=message):
        dm(**words)


def test_wrong_types_for_an_evaluation(kept):
    data = dd.load("digits", device="cpu")
    for words in ({"networks": "x"}, {"seed": None}, {"recipe": 3}, {"backbone": 1}, {"split": []}):
        with pytest.raises(DDError, match=next(iter(words))):
            dd.evaluate(kept.synthetic, data, **words)
    with pytest.raises(DDError, match="the set must be of type Synthetic"):
        dd.evaluate(None, data)
    with pytest.raises(DDError, match="data must be of type Dataset"):
        dd.evaluate(kept.synthetic, "digits")


NOTEBOOK = {
    "cells": [
        {"cell_type": "markdown", "source": ["# DM"], "metadata": {}},
        {
            "cell_type": "code",
            "source": "run()",
            "metadata": {"tags": ["parameters"]},
            "outputs": [{"output_type": "execute_result", "data": {"text/plain": "67.0 ± 5.6"}}],
        },
    ],
    "metadata": {"papermill": {"parameters": {"ipcs": 1}, "end_time": "2026-11-30"}},
}


@pytest.mark.parametrize(
    "text",
    ['{"cells": [', "[]", "{}"]
    + [
        json.dumps(NOTEBOOK).replace(*change)
        for change in (
            ('"source"', '"sourcE"'),
            ('"run()"', "5"),
            ('"cell_type": "code"', '"cell_type": 1'),
            ('["parameters"]', "null"),
            ('"text/plain": "67.0', '"image/png": "67.0'),
            ('"67.0', '[1], "": "'),
            ('"output_type"', '"output"'),
            ('"2026-11-30"', "2026"),
            ('{"ipcs": 1}', '"ipcs"'),
        )
    ],
)
def test_half_a_notebook_is_one_sentence(tmp_path, text):
    (tmp_path / "a.ipynb").write_text(text)
    for reader in (site.notebook, lambda path: reproduce._executed_with(path.parent)):
        with pytest.raises(DDError, match="the notebook .* reproduce it again"):
            reader(tmp_path / "a.ipynb")


def test_a_changed_digit_in_an_executed_notebook(tmp_path):
    path = tmp_path / "a.ipynb"
    path.write_text(json.dumps(NOTEBOOK))  # of before notebooks had a checksum
    assert "67.0" in site.notebook(path)[0]
    whole = json.dumps(slim.sealed(json.loads(json.dumps(NOTEBOOK))))
    path.write_text(whole)
    assert "67.0" in site.notebook(path)[0]
    for change in (("67.0", "97.0"), ('"ipcs": 1', '"ipcs": 2')):
        path.write_text(whole.replace(*change))
        with pytest.raises(DDError, match="altered since it was executed"):
            site.notebook(path)


def test_an_output_runs_nothing_in_a_browser():
    html = (
        "<p onclick='x()'>one = 5</p><iframe src='javascript:x'></iframe><a href='javascript:x()'>"
        "<SCRIPT>x()</script><object data=x></object><embed src=y>"
    )
    assert site.tame(html) == "<p>one = 5</p>"
    for attack in (
        '<p title=">" onclick=x()>',
        "<img/onerror=x() src=y>",
        '<td a="b"onclick=x()>',
        "<meta http-equiv=refresh content=0;url=y>",
        "<a href=java&#115;cript:x()>",
        "<svg onload=x() ",
        "<scr<b>ipt>x()</script>",
    ):
        left = site.tame(attack)
        assert not re.search("<(?!/?(p|td|b)>)", left), left
    printed = {"output_type": "stream", "text": "```\n<script>x()</script>\n```"}
    assert site._output(printed, "a", {}).startswith("````text\n```\n")
    assert site.tame("<" * 100_000) == "&lt;" * 100_000  # in a moment, not in minutes


def test_a_figure_is_whole_or_the_old_one(tmp_path, monkeypatch):
    monkeypatch.setenv("DDLIB_FIGURES", str(tmp_path))
    figure = plots.plt.figure()
    path = plots.save(figure, "a", "smoke")
    whole = path.read_bytes()

    def half(self, to, **options):
        Path(to).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(plots.Figure, "savefig", half)
    with pytest.raises(DDError, match="No space left"):
        plots.save(figure, "a", "smoke")
    assert path.read_bytes() == whole and len(list(path.parent.iterdir())) == 2
    plots.plt.close(figure)


def test_an_executed_notebook_is_whole_or_the_old_one(tmp_path):
    nbformat = pytest.importorskip("nbformat")
    target = tmp_path / "a.ipynb"
    target.write_text("old")

    class Papermill:
        """What `reproduce` asks of papermill: the whole notebook, or an error on the way."""

        fails = True

        def execute_notebook(self, source, out, **options):
            assert out is None and target.read_text() == "old"
            if self.fails:
                raise KeyboardInterrupt
            return nbformat.v4.new_notebook(metadata={"papermill": {}})

    papermill, source = Papermill(), tmp_path / "source.ipynb"
    with pytest.raises(KeyboardInterrupt):
        reproduce._execute(papermill, source, target, {})
    assert target.read_text() == "old"
    papermill.fails = False
    reproduce._execute(papermill, source, target, {})
    written = nbformat.read(target, 4).metadata.papermill
    assert written == {"input_path": "source.ipynb", "output_path": "a.ipynb"}
    assert list(tmp_path.iterdir()) == [target]


# What is asked for in words


@pytest.fixture
def ddlib(monkeypatch, capsys):
    """The command line in this process: words -> (exit code, stderr)."""

    def call(*words: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["ddlib", *map(str, words)])
        try:
            code = cli.main()
        except SystemExit as end:  # argparse's
            code = end.code
        return code, capsys.readouterr().err

    return call


def test_what_needs_the_checkout_says_so(tmp_path, monkeypatch):
    for module, act in (
        (reproduce, lambda: reproduce.reproduce(results=tmp_path)),
        (site, lambda: site.build(tmp_path, tmp_path)),
        (docs, docs.write),
    ):
        monkeypatch.setattr(module, "SOURCE", tmp_path)
        with pytest.raises(DDError, match="needs the source checkout of ddlib: .* has no "):
            act()


@pytest.mark.parametrize(
    "text",
    [
        "2001-02-30",
        "0x_",
        "-0b_",
        "9" * 5000,
        "!!float x",
        "[" * 3000,
        "{}",
        "&a [*a]",
        "1" + "0" * 400,
    ],
)
def test_an_odd_value_at_the_command_line(ddlib, results, text):
    line = ["run", "dm", "--dataset", "digits", "--ipc", 1, "--set", f"lr_img={text}"]
    code, said = ddlib(*line)
    assert code == 2 and re.fullmatch(r"ddlib: .*(--set takes|'lr_img' must be).*\n", said), said
    assert len(said) < 600


def test_a_value_that_grows_when_it_is_printed(ddlib, results):
    """A list of lists of lists ...: 10 ** 9 words, were it written out."""
    text = "[&a [x,x,x,x,x,x,x,x,x,x]" + "".join(
        f",&{new} [{','.join([f'*{old}'] * 10)}]"
        for old, new in zip("abcdefgh", "bcdefghi", strict=True)
    )
    code, said = ddlib(
        "run", "dm", "--dataset", "digits", "--ipc", 1, "--set", f"iterations={text}]"
    )
    assert code == 2 and said.startswith("ddlib: ") and len(said) < 600


def test_names_that_no_line_can_hold(ddlib, results):
    for words in (["evaluate", "a\nb\x1c\x85é.safetensors"], ["list", "a\nb"]):
        code, said = ddlib(*words)
        assert code == 2 and len(said.splitlines()) == 1 and said.startswith("ddlib: "), said
    assert str(DDError("a\nb\x1cé")) == r"a\nb\x1cé"


def test_names_that_no_file_can_have(results, tmp_path, cache):
    with pytest.raises(DDError, match="no folder .*nouser"):
        dm("folder:~nouser/x")
    with pytest.raises(DDError, match="must be a name that a file can have|cannot write"):
        dm(results="a\0b")
    root = pets(tmp_path / "pets", 0)
    (root / "eel").symlink_to("eel")  # to itself
    assert dd.load(f"folder:{root}", device="cpu").classes == ("cat", "dog")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("accuracy", {}), ("accuracy", {"last": 5}), ("seconds", None), ("seconds", {"distill": "x"}), ("history", [1]),
        ("evaluations", []), ("values", []), ("ipc", "1"), ("seed", True), ("profile", "x"), ("recipe", 1),
        ("device", None),
    ],
)  # fmt: skip
def test_a_record_that_lacks_what_a_table_reads(kept, ddlib, key, value):
    unsealed(kept.path, **{key: value})  # so that its contents alone speak
    for words in (["list"], ["list", "--markdown"], ["list", "--json"]):
        code, said = ddlib(*words, "--results", kept.results)
        assert code == 2 and re.fullmatch("ddlib: .* is no record of a run .*\n", said)
    with pytest.raises(DDError, match="is no record of a run .*delete it and run again"):
        dm()


@pytest.mark.parametrize("header", ["[]", "5", "null", "{", "[" * 3000, '{"spec": 5}'])
def test_a_header_that_is_none(tmp_path, header):
    path = tmp_path / "a.safetensors"
    files.save_file({"images": torch.zeros(1)}, path, metadata={"ddlib": header})
    with pytest.raises(
        DDError, match="the distilled set .* (is damaged or not ddlib's|was altered)"
    ):
        dd.Synthetic.load(path)


@pytest.mark.parametrize(
    ("tensors", "header"),
    [
        ({}, {"factor": 0}), ({}, {"factor": -1}), ({}, {"factor": "2"}), ({}, {"spec": 5}), ({}, {"recipe": None}),
        ({"images@x": torch.zeros(1)}, {}), ({"labels": torch.full((10,), 99)}, {}), ({"images": torch.zeros(0)}, {}),
        ({"images": torch.zeros(10, 1, 8, 8, dtype=torch.bfloat16)}, {}), ({"labels": torch.zeros(3, dtype=int)}, {}),
    ],
)  # fmt: skip
def test_a_set_with_a_right_checksum_and_contents_that_make_no_sense(kept, tensors, header):
    path = kept.path.with_suffix(".safetensors")
    whole, facts = files.load_tensors(path, "set", "")
    files.save_tensors(path, whole | tensors, facts | header)
    with pytest.raises(DDError, match="makes no sense|but not a distilled set"):
        dd.Synthetic.load(path)


def test_a_list_of_labels_may_name_its_own_images_alone(tmp_path, cache):
    root = tmp_path / "pets"
    pets(root / "train", 0)
    (root / "val" / "images").mkdir(parents=True)
    notes = root / "val" / "val_annotations.txt"
    notes.write_text("../../train/cat/0.png\tcat\n1.png\tdog\n")
    with pytest.raises(DDError, match="may name files of val/images only, not '../../train"):
        dd.load(f"folder:{root}", device="cpu")
    notes.write_bytes(b"\xff\xfe\n")
    with pytest.raises(DDError, match="cannot read .*val_annotations.txt .UnicodeDecodeError."):
        dd.load(f"folder:{root}", device="cpu")


# Notebooks and pages that stop half way


def test_a_kernel_that_dies_is_one_sentence(monkeypatch):
    def killed(name):
        raise RuntimeError("Kernel died")

    with pytest.raises(DDError, match="notebook a stopped: Kernel died .out of memory"):
        reproduce._all(killed, ["a"], "small", ZeroDivisionError)


def test_notebooks_into_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DDError, match="cannot write .*--results DIR"):
        reproduce.reproduce(only=["dm"], results=tmp_path / "file")


def test_a_killed_site_is_a_site_and_a_file_or_a_strange_folder_is_none(tmp_path):
    site._mark(tmp_path / "site")
    (tmp_path / "site" / "half.html").touch()
    site._mark(tmp_path / "site")
    with pytest.raises(DDError, match="cannot write a site into .*Not a directory.*--out"):
        site._mark(tmp_path / "site" / "half.html")
    with pytest.raises(DDError, match="holds something else than a site"):
        site._mark(tmp_path)


def test_images_whose_note_is_not_there_yet_are_no_damaged_ones(tmp_path, cache, recwarn):
    name = f"folder:{pets(tmp_path / 'pets', 0)}"
    wanted = dd.load(name, device="cpu").checksum
    for note in cache.glob("*.json"):
        note.unlink()
    assert dd.load(name, device="cpu").checksum == wanted
    assert [str(each.message) for each in recwarn] == []


# What looks like ours and is not


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> Path:
    """The checkpoint of a run that was stopped before its fourth step."""
    folder, step = tmp_path_factory.mktemp("stopped"), DM.step

    def thrice(self):
        if self.steps == 3:
            raise KeyboardInterrupt
        return step(self)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(DM, "step", thrice)
        dm(results=folder)
    (path,) = folder.rglob("checkpoints/*.safetensors")
    return path


@pytest.mark.parametrize(
    ("tensors", "header"),
    [
        ({}, {"step": 99}), ({}, {"step": -1}), ({}, {"step": "x"}), ({}, {"step": True}), ({}, {"history": 5}),
        ({}, {"history": {}}), ({}, {"seconds": []}), ({}, {"threads": []}), ({}, {"evaluations": [{}]}),
        ({}, {"scores": [5]}), ({}, {"smaller": {"x": 1}}), ({}, {"smaller": 5}), ({}, {"peak": "x"}),
        ({}, {"together": 1}), ({"snapshot.x": torch.zeros(1)}, {}), ({"snapshot.1": torch.zeros(1)}, {}),
        ({"method.steps": torch.zeros(2, dtype=int)}, {}), ({"method.raw": torch.zeros(3)}, {}),
        ({"method.average": torch.full((10, 1, 8, 8), math.nan)}, {}), ({"more": torch.zeros(1)}, {}),
    ],
)  # fmt: skip
def test_a_checkpoint_with_a_right_checksum_and_contents_that_make_no_sense(
    stopped, tmp_path, tensors, header
):
    whole, facts = files.load_tensors(stopped, "checkpoint", "")
    path = tmp_path / "smoke" / "checkpoints" / stopped.name
    path.parent.mkdir(parents=True)
    files.save_tensors(path, whole | tensors, facts | header)
    with pytest.raises(DDError, match=r"the checkpoint .* delete it to start anew"):
        dm(results=tmp_path)


def test_a_file_larger_than_any_record_is_not_read(tmp_path):
    path = tmp_path / "endless.json"
    with path.open("wb") as file:
        file.truncate(2**40)  # of which the disk holds nothing
    with pytest.raises(DDError, match="larger than 64 MiB"):
        files.read_json(path, "record", "delete it")


def test_numbers_that_python_does_not_write(results):
    huge = 10**5000
    for call in (
        lambda: dd.resolve("dm", "digits", huge),
        lambda: dd.resolve("dm", "digits", 1, seed=huge),
        lambda: dd.resolve("dm", "digits", 1, iterations=huge),
        lambda: dd.resolve("dm", "digits", 1, iterations=-huge),
        lambda: dd.protocol("dsa", epochs=huge),
        lambda: dd.load("digits", resolution=huge),
        lambda: dd.load("digits", resolution=-huge),
        lambda: dd.load("digits", device="cpu").minival(seed=huge),
        lambda: dd.load("digits", device="cpu").minival(huge),
        lambda: dd.load("digits", device="cpu").subset(huge),
        lambda: dd.numbers(huge),
    ):
        with pytest.raises(DDError, match="(at most|at least|between|no list)"):
            call()


def test_every_argument_is_looked_at_where_the_record_is_kept(kept):
    with pytest.raises(DDError, match="checkpoint_every must be an integer"):
        dm(results=kept.path.parents[2], checkpoint_every=[1])


def test_ctrl_c_while_torch_is_imported_is_one_sentence():
    code = (
        "import os, signal, sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'torch':\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Finder())\n"
        "sys.argv = ['ddlib', 'list']\n"
        "from ddlib.cli import main\n"
        "sys.exit(main())"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "ddlib: stopped\n")
