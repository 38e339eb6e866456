"""One run: its name, its record, and what a kill, a signal, a full disk or a wrong word does to it."""

import json
import math
import os
import random
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from safetensors import SafetensorError, safe_open

import ddlib as dd
from ddlib import cli as command_line
from ddlib import core
from ddlib import files as kept_files
from ddlib.config import PRESETS, PROFILES, resolve
from ddlib.core import DDError
from ddlib.engine import meter
from ddlib.engine import run as runs
from ddlib.files import load_tensors, results_folder
from ddlib.methods import METHODS
from ddlib.methods.dm import DM
from ddlib.train import evaluate as evaluation
from tests import forks

ROOT = Path(__file__).parents[2]
NET = "convnet:width=8"
SHORT = {"iterations": 60, "eval_epochs": 2, "networks": 2, "evaluations": 2, "snapshots": 3}
SETTINGS = SHORT | {"backbone": NET}
WORDS = [
    "run",
    "dm",
    "--dataset",
    "digits",
    "--ipc",
    "1",
    "--device",
    "cpu",
    "--backbone",
    NET,
    *(word for key, value in SHORT.items() for word in ("--set", f"{key}={value}")),
]


def run(results: Path, **options) -> dd.Run:
    return dd.run(
        "dm",
        "digits",
        **{"ipc": 1, "device": "cpu", "results": results, "progress": False} | SETTINGS | options,
    )


def files(results: Path, pattern: str) -> list[Path]:
    return sorted(results.glob(f"smoke/{pattern}"))


def checkpoint(results: Path) -> Path:
    (path,) = files(results, "checkpoints/*.safetensors")
    return path


def same(one: dd.Run, other: dd.Run) -> bool:
    """Equal records but for the clock, the memory and the state of the checkout, and the same bytes of the set."""
    clock = {"seconds": 0, "written": 0, "peak_bytes": 0, "commit": 0}
    return (
        one.record | clock == other.record | clock
        and one.path.name == other.path.name
        and one.path.with_suffix(".safetensors").read_bytes()
        == other.path.with_suffix(".safetensors").read_bytes()
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dd.Run:
    """A run that nothing interrupted."""
    return run(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def ddlib(monkeypatch, capsys):
    """The command line in this process: words -> (exit code, stdout, stderr)."""

    def call(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["ddlib", *map(str, words)])
        try:
            code = command_line.main()
        except SystemExit as error:  # argparse
            code = error.code
        return code, *capsys.readouterr()

    return call


# What a run leaves behind


def test_the_record_of_a_run(whole):
    record, syn = whole.record, whole.synthetic
    assert [e["step"] for e in record["evaluations"]] == [30, 60]
    assert [h["step"] for h in record["history"]] == list(range(1, 61))
    assert all(math.isfinite(h["loss"]) for h in record["history"])
    assert record["accuracy"]["last"] == record["evaluations"][-1]
    assert record["accuracy"]["best"]["mean"] == max(e["mean"] for e in record["evaluations"])
    assert len(record["accuracy"]["last"]["networks"]) == 2 and record["values"]["lr_img"] == 1.0
    assert (
        record["seconds"]["distill"] > 0 < record["seconds"]["evaluate"]
        and record["peak_bytes"] > 2**20
    )
    assert (record["method"], record["dataset"], record["ipc"], record["profile"]) == (
        "dm",
        "digits",
        1,
        "smoke",
    )
    assert list(syn.snapshots) == [0, 4, 15, 60] and torch.equal(syn.snapshots[60], syn.images)
    assert not torch.equal(syn.snapshots[0], syn.images)
    assert (
        syn.recipe.epochs == 3 and syn.recipe.augment == "color_crop_cutout_scale_rotate"
    )  # a digit is not flipped
    assert (
        syn.spec["values"] == record["values"]
        and whole.accuracy == record["accuracy"]["last"]["mean"]
    )
    assert re.fullmatch(
        r"Run\(dm-digits-ipc1-smoke-seed0-[0-9a-f]{8}: [\d.]+ ± [\d.]+ %\)", repr(whole)
    )
    assert [
        p.name
        for p in sorted(whole.path.parent.rglob("[!.]*"))
        if p.is_file() and p.suffix != ".lock"
    ] == [
        whole.path.name,
        whole.path.with_suffix(".safetensors").name,
    ]  # no checkpoint, no temporary file


def test_a_finished_run_is_returned_at_once(whole, tmp_path, monkeypatch):
    def refuse(*args, **options):
        raise AssertionError("loaded the data")

    results = whole.results
    monkeypatch.setattr("ddlib.config.load", refuse)
    assert run(results).record == whole.record
    for options in ({"fresh": True}, {"seed": 1}, {"lr_img": 2.0}, {"results": tmp_path}):
        with pytest.raises(AssertionError, match="loaded the data"):
            run(**{"results": results} | options)


def test_fresh_makes_the_same_bytes_anew(whole, tmp_path):
    first = run(tmp_path)
    assert same(first, whole)
    written = first.path.stat().st_mtime_ns
    again = run(tmp_path, fresh=True)
    assert again.path.stat().st_mtime_ns > written and same(again, whole)


def test_given_data_spare_the_loading_unless_they_are_others(whole, tmp_path, monkeypatch):
    data, loaded = dd.load("digits", device="cpu"), []
    whitened = dd.load("digits", device="cpu", zca="mtt")

    def load(*args, **options):
        loaded.append(args)
        return data

    monkeypatch.setattr("ddlib.config.load", load)
    assert same(run(tmp_path, data=data), whole) and not loaded
    assert (
        same(run(tmp_path / "b", data=whitened), whole) and loaded
    )  # whitened, which this spec is not
    with pytest.raises(DDError, match="made from other images of the name 'digits'"):
        run(tmp_path, data=replace(data, checksum="of others"))


@pytest.mark.parametrize("part", [lambda data: data.subset(5), lambda data: data.minival()])
def test_a_part_does_not_pass_for_the_whole(tmp_path, part):
    data = dd.load("digits", device="cpu")
    with pytest.raises(
        DDError, match=r"not what load\('digits'\) gives \((subset|minival).*say subset="
    ):
        run(tmp_path, data=part(data))
    assert not list(tmp_path.rglob("*.json"))


def test_data_of_another_name_are_not_dropped(tmp_path):
    images, labels = np.zeros((4, 8, 8), np.uint8), np.array([0, 1, 0, 1])
    mine = dd.from_arrays(images, labels, images, labels, device="cpu")
    with pytest.raises(DDError, match="the data are 'arrays' and the run is of 'digits'"):
        run(tmp_path, data=mine)
    others = dd.from_arrays(images, labels, images, labels, name="digits", device="cpu")
    with pytest.raises(DDError, match=r"not what load\('digits'\) gives \(arrays\)"):
        run(tmp_path, data=others)


def test_arrays_of_ones_own(tmp_path):
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 255, (12, 8, 8), dtype=np.uint8), np.arange(12) % 3
    mine = dd.from_arrays(images, labels, images, labels, name="mine", device="cpu")
    done = dd.run(
        "dm",
        "mine",
        ipc=2,
        device="cpu",
        data=mine,
        results=tmp_path,
        progress=False,
        **SETTINGS | {"iterations": 3},
    )
    assert (
        done.synthetic.images.shape == (6, 1, 8, 8)
        and done.record["dataset_checksum"] == mine.checksum
    )
    with pytest.raises(DDError, match="unknown dataset 'mine'"):
        dd.run("dm", "mine", ipc=1, device="cpu", results=tmp_path, progress=False)


# Names


def name(**changes) -> str:
    base = {"method": "dm", "dataset": "digits", "ipc": 1, "profile": "smoke", "seed": 0}
    return resolve(**base | changes).name


def test_everything_that_can_change_a_result_is_in_the_name():
    changes = [
        {"method": "random"},
        {"dataset": "mnist"},
        {"ipc": 2},
        {"profile": "paper"},
        {"seed": 1},
        {"lr_img": 2.0},
        {"backbone": "mlp"},
        {"networks": 4},
        {"eval_epochs": 7},
        {"zca": "mtt"},
        {"init": "noise"},
    ]
    names = [name(), *(name(**change) for change in changes)]
    assert len(set(names)) == len(names)
    assert len({n.rsplit("-", 1)[1] for n in names}) == len(
        names
    )  # the hash alone tells them apart


def test_a_value_written_otherwise_is_the_same_run():
    assert name() == name(lr_img=1) == name(lr_img=1.0) == name(lr_img=None) == name(iterations=200)
    assert name(lr_img=3) == name(lr_img=3.0)


def test_a_new_key_at_its_default_leaves_old_names_alone(monkeypatch):
    before, other = name(), name(lr_img=2.0)

    @dataclass(frozen=True)
    class Config(DM.Config):
        patience: "int" = 3  # a string, as `from __future__ import annotations` makes it

    monkeypatch.setattr(DM, "Config", Config)
    assert (name(), name(lr_img=2.0)) == (before, other) and name(patience=3) == before
    assert name(patience=4) != before


def test_a_new_version_of_the_method_makes_new_names(monkeypatch):
    before, random_before = name(), name(method="random")
    monkeypatch.setattr(DM, "version", DM.version + 1)
    assert name() != before and name(method="random") == random_before


# Stopped and resumed


def process(results: Path) -> forks.Popen:
    words = [*WORDS, "--results", str(results), "--checkpoint-every", "1"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return forks.Popen([sys.executable, "-m", "ddlib", *words], cwd=ROOT, **pipes)


def wait_for(child: forks.Popen, results: Path, step: int) -> None:
    """Until the checkpoint is newer than `step`."""
    end = time.monotonic() + 300
    while time.monotonic() < end:
        for path in files(results, "checkpoints/*.safetensors"):
            with safe_open(path, framework="pt") as file:
                if json.loads(file.metadata()["ddlib"])["step"] > step:
                    return
        assert child.poll() is None, f"ended before step {step}: {child.communicate()}"
        time.sleep(0.002)
    raise AssertionError("no checkpoint in five minutes")


def test_a_killed_process_resumes_to_the_same_bytes(whole, tmp_path):
    step = random.randrange(1, 10)  # early: the child must not end before it is killed
    with process(tmp_path) as child:
        try:
            wait_for(child, tmp_path, step)
        finally:
            child.kill()
    assert child.returncode == -signal.SIGKILL and not files(tmp_path, "**/*.json")
    _, header = load_tensors(checkpoint(tmp_path), "checkpoint", "")
    assert step < header["step"] <= 60
    again = process(tmp_path)
    out, err = again.communicate(timeout=300)
    assert again.returncode == 0, err
    (done,) = files(tmp_path, "**/*.json")
    assert f"record {done}" in out
    assert same(dd.Run(done), whole), f"killed after step {step}"


def test_a_terminated_process_says_so_in_one_sentence_and_resumes(whole, tmp_path):
    with process(tmp_path) as child:
        try:
            wait_for(child, tmp_path, 3)
            child.terminate()
            out, err = child.communicate(timeout=300)
        finally:
            child.kill()
    last = err.replace("\r", "\n").strip().splitlines()[-1]
    assert child.returncode == 130 and out == "" and "Traceback" not in err
    stopped = re.fullmatch(
        r"ddlib: stopped at step (\d+) of 60; run the same command to go on", last.strip()
    )
    assert stopped, err
    _, header = load_tensors(checkpoint(tmp_path), "checkpoint", "")
    assert header["step"] == int(stopped[1]) and len(header["history"]) == header["step"]
    assert same(run(tmp_path), whole) and not files(tmp_path, "checkpoints/*")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_inside_a_step_waits_for_its_end(whole, tmp_path, monkeypatch, number):
    before, real = signal.getsignal(number), DM.step

    def step(self):
        if self.steps == 7:
            os.kill(os.getpid(), number)
            time.sleep(0.01)
        return real(self)

    monkeypatch.setattr(DM, "step", step)
    with pytest.raises(core.Interrupted, match="stopped at step 8 of 60"):
        run(tmp_path, checkpoint_every=50)
    assert signal.getsignal(number) == before
    tensors, header = load_tensors(checkpoint(tmp_path), "checkpoint", "")
    assert header["step"] == 8 == int(tensors["method.steps"])
    monkeypatch.undo()
    assert same(run(tmp_path), whole)


@pytest.mark.parametrize("at", [0, 9, 10, 35, 59])
def test_a_crash_at_any_step_costs_the_steps_since_the_checkpoint(whole, tmp_path, monkeypatch, at):
    done, real = [], DM.step

    def step(self):
        if self.steps == at and at not in done:
            done.append(at)
            raise RuntimeError("power cut")
        done.append(self.steps)
        return real(self)

    monkeypatch.setattr(DM, "step", step)
    with pytest.raises(DDError, match="power cut"):
        run(tmp_path, checkpoint_every=10)
    again = run(tmp_path, checkpoint_every=10)
    assert done[at + 1] == at // 10 * 10  # resumed there, not at 0 ...
    assert same(
        again, whole
    )  # ... with history, evaluations and snapshots in place, and none twice


@pytest.mark.parametrize("evaluation", [1, 2])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_stop_while_evaluating_repeats_that_evaluation(
    whole, tmp_path, monkeypatch, evaluation, error
):
    calls, real = [], runs.evaluate

    def evaluate(*args, **options):
        calls.append(1)
        if len(calls) == evaluation:
            raise error
        return real(*args, **options)

    monkeypatch.setattr(runs, "evaluate", evaluate)
    with pytest.raises((core.Interrupted, RuntimeError)):
        run(tmp_path, checkpoint_every=7)
    _, header = load_tensors(checkpoint(tmp_path), "checkpoint", "")
    assert header["step"] == 30 * evaluation
    assert same(run(tmp_path, checkpoint_every=7), whole)


@pytest.mark.parametrize(
    "step, saving, every, late, due",
    [
        (50, 0.4, None, False, True),
        (50, 0.6, None, False, False),  # more than a twentieth of the 10 s since the last one
        (51, 0.0, None, False, False),
        (51, 9.0, None, True, True),
        (25, 9.0, 25, False, True),  # what is asked for holds, whatever it costs
        (50, 0.0, 40, False, False),
    ],
)
def test_checkpoints_take_a_twentieth_of_the_time_at_most(step, saving, every, late, due):
    """Those of FRePo's pool are large."""
    at = time.perf_counter() - 10
    state = SimpleNamespace(step=step, saving=saving, saved_at=at, late=lambda: late)
    assert runs.Progress.due(state, every) is due


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_stop_between_two_networks_trains_none_twice(whole, tmp_path, monkeypatch, error):
    monkeypatch.setattr("ddlib.engine.checkpoint.SAVE_SECONDS", 0)  # a checkpoint a network
    trained, real = [], evaluation.train

    def train(*args, **options):
        trained.append(1)
        if len(trained) == 2:
            raise error
        return real(*args, **options)

    monkeypatch.setattr(evaluation, "train", train)
    with pytest.raises((core.Interrupted, RuntimeError)):
        run(tmp_path)
    _, header = load_tensors(checkpoint(tmp_path), "checkpoint", "")
    assert header["step"] == 30 and len(header["scores"]) == 1
    assert same(run(tmp_path), whole)
    assert len(trained) == 5  # two evaluations of two networks, and the one that was stopped


def test_a_second_signal_waits_until_the_first_has_saved(whole, tmp_path, monkeypatch):
    trained, train, save = [], evaluation.train, runs.Progress.save

    def stopped_in_training(*args, **options):
        trained.append(1)
        if len(trained) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return train(*args, **options)

    def stopped_in_saving(state):
        if len(trained) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        save(state)

    monkeypatch.setattr(evaluation, "train", stopped_in_training)
    monkeypatch.setattr(runs.Progress, "save", stopped_in_saving)
    with pytest.raises(core.Interrupted, match="stopped at step 30"):
        run(tmp_path)
    assert len(load_tensors(checkpoint(tmp_path), "checkpoint", "")[1]["scores"]) == 1
    monkeypatch.undo()
    assert same(run(tmp_path), whole)


def test_more_evaluations_than_steps(tmp_path):
    assert [
        e["step"] for e in run(tmp_path, iterations=2, evaluations=5).record["evaluations"]
    ] == [1, 2]
    assert [
        e["step"] for e in run(tmp_path, iterations=0, evaluations=3).record["evaluations"]
    ] == [0]


def test_divergence_names_the_step_and_keeps_the_last_good_state(tmp_path):
    with pytest.raises(DDError, match=r"dm diverged at step \d+: .*lower the step size") as caught:
        run(tmp_path, lr_img=1e30, checkpoint_every=1)
    at, kept, path = re.search(
        r"at step (\d+): .*state, step (\d+), is kept in (\S+?)(?:;|$)", str(caught.value)
    ).groups()
    assert int(kept) < int(at) and Path(path) == checkpoint(tmp_path)
    tensors, header = load_tensors(checkpoint(tmp_path), "checkpoint", "")
    assert header["step"] == int(kept) and torch.isfinite(tensors["method.raw"]).all()
    assert not files(tmp_path, "**/*.json")
    with pytest.raises(DDError, match="diverged at step 2: .*state, step 1, is kept"):
        run(tmp_path / "b", lr_img=1e30)


def full_above(room: int, step):
    """A step that needs more memory than there is where more than `room` images go through the network at once."""

    def failing(method):
        each = [method.ipc * (part.stop - part.start) for part in method.chunks(method.ipc)]
        if method.steps == 3 and max(each) > room:
            raise torch.OutOfMemoryError("2 GiB")
        return step(method)

    return failing


def test_out_of_memory_halves_the_images_in_one_pass(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(DM, "step", full_above(3, DM.step))
    with pytest.warns(UserWarning, match="out of memory at step 3 .* with chunk=") as said:
        done = run(tmp_path, checkpoint_every=2)
    # halved until 3 synthetic images or fewer, one a class, are in a pass
    assert done.record["smaller"] == {"chunk": 2} and "chunk=2" in str(said[-1].message)
    assert done.path.name == whole.path.name
    torch.testing.assert_close(done.synthetic.images, whole.synthetic.images, atol=1e-3, rtol=0)


def test_no_memory_for_one_image_is_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(DM, "step", full_above(0, DM.step))
    with (
        pytest.warns(UserWarning, match="out of memory"),
        pytest.raises(DDError, match="ran out of memory at step 3 .* take a device with more"),
    ):
        run(tmp_path, checkpoint_every=2)
    assert load_tensors(checkpoint(tmp_path), "checkpoint", "")[1]["step"] == 2


def test_a_resumed_run_keeps_the_halved_chunk(tmp_path, monkeypatch):
    full = full_above(3, DM.step)

    def step(method):
        if method.steps == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return full(method)

    monkeypatch.setattr(DM, "step", step)
    with pytest.warns(UserWarning, match="out of memory"), pytest.raises(core.Interrupted):
        run(tmp_path)
    kept = load_tensors(checkpoint(tmp_path), "checkpoint", "")[1]
    assert (kept["step"], kept["smaller"]) == (6, {"chunk": 2})
    monkeypatch.undo()
    chunks, real = set(), DM.step
    monkeypatch.setattr(DM, "step", lambda self: chunks.add(self.config.chunk) or real(self))
    assert run(tmp_path).record["smaller"] == {"chunk": 2} and chunks == {2}


def no_room(*args, **options):
    raise torch.OutOfMemoryError("2 GiB")


def test_no_memory_for_an_evaluation_is_a_sentence_at_once(whole, tmp_path, monkeypatch, recwarn):
    monkeypatch.setattr(runs, "evaluate", no_room)
    with pytest.raises(DDError, match="out of memory in the evaluation at step 30 .* more$"):
        run(tmp_path)
    assert not [w for w in recwarn if "out of memory" in str(w.message)]  # it is not repeated
    monkeypatch.undo()
    assert same(run(tmp_path), whole)


@pytest.mark.parametrize("place", ["dataset_of", "_method", "_teach"])
def test_no_memory_before_the_first_step_is_a_sentence(tmp_path, monkeypatch, place):
    monkeypatch.setattr(runs, place, no_room)
    with pytest.raises(DDError, match="ran out of memory while the run was prepared; take a"):
        run(tmp_path, teach=True)
    if place != "_method":
        with pytest.raises(DDError, match="ran out of memory while the run was prepared; take a"):
            runs.prepare("mtt", "digits", ipc=1, device="cpu")


@pytest.mark.parametrize(
    ("error", "message"),
    [(torch.AcceleratorError("CUDA error: gone\nmore"), "cpu failed at step 3 .*gone.*to go on")],
)
def test_a_device_that_fails_is_a_sentence_and_nothing_is_lost(
    whole, tmp_path, monkeypatch, error, message
):
    step, taken = DM.step, []

    def failing(method):
        taken.append(method)
        if len(taken) == 4:
            raise error
        return step(method)

    monkeypatch.setattr(DM, "step", failing)
    with pytest.raises(DDError, match=message) as caught:
        run(tmp_path, checkpoint_every=2)
    assert "step 2, is kept" in str(caught.value)
    monkeypatch.undo()
    assert same(run(tmp_path), whole)


def test_a_folder_that_vanishes_while_it_is_written_gets_both_files(tmp_path, whole, monkeypatch):
    write = runs.write_json

    def vanishing(path, record):
        shutil.rmtree(path.parent)
        return write(path, record)

    monkeypatch.setattr(runs, "write_json", vanishing)
    done = run(tmp_path)
    assert done.complete and same(done, whole)


# Damaged and unwritable files


def test_a_damaged_record_is_one_sentence(ddlib, whole, tmp_path):
    done = run(tmp_path)
    text = done.path.read_text()
    for damaged in (text[:200], "", "[]", "{}"):
        done.path.write_text(damaged)
        with pytest.raises(
            DDError,
            match=f"the record {done.path} (cannot be read|is no record of a run) .*; delete it and run again",
        ):
            run(tmp_path)
    code, out, err = ddlib("list", "--results", tmp_path)
    assert (code, out) == (2, "") and err.startswith("ddlib: the record ") and err.count("\n") == 1
    done.path.unlink()
    assert same(run(tmp_path), whole)


def test_a_damaged_checkpoint_is_one_sentence(whole, tmp_path, monkeypatch):
    path = tmp_path / "smoke" / "checkpoints" / f"{whole.path.stem}.safetensors"
    path.parent.mkdir(parents=True)
    path.write_bytes(whole.path.with_suffix(".safetensors").read_bytes())  # ours, but no checkpoint
    with pytest.raises(DDError, match="belongs to another run or other images; delete it"):
        run(tmp_path)
    path.write_bytes(path.read_bytes()[:900])
    with pytest.raises(
        DDError,
        match=f"the checkpoint {path} is damaged .*delete it to start this run from the beginning",
    ):
        run(tmp_path)
    path.unlink()
    assert same(run(tmp_path), whole)


def test_a_checkpoint_of_other_images_is_refused(tmp_path, monkeypatch):
    data, real = dd.load("digits", device="cpu"), DM.step
    monkeypatch.setattr(DM, "step", lambda self: os.kill(os.getpid(), signal.SIGTERM) or real(self))
    with pytest.raises(core.Interrupted):
        run(tmp_path, data=data)
    monkeypatch.undo()
    with pytest.raises(DDError, match="belongs to another run or other images"):
        run(tmp_path, data=replace(data, checksum="of others"))


def test_a_checkpoint_that_lacks_a_tensor_is_one_sentence(tmp_path, monkeypatch):
    with pytest.raises(DDError, match="diverged"):
        run(tmp_path, lr_img=1e30, checkpoint_every=1)
    monkeypatch.setattr(DM, "load_state_dict", lambda self, state: state["younger"])
    with pytest.raises(
        DDError, match="is of an older ddlib and lacks 'younger'; delete it to start anew"
    ):
        run(tmp_path, lr_img=1e30)


def test_a_damaged_set_is_one_sentence(ddlib, whole, tmp_path):
    done = run(tmp_path)
    path = done.path.with_suffix(".safetensors")
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(
        DDError, match=f"the distilled set {path} is damaged .*delete it and run again"
    ):
        assert run(tmp_path).synthetic
    code, _, err = ddlib("evaluate", path)
    assert code == 2 and err.count("\n") == 1
    path.unlink()
    assert same(run(tmp_path), whole)


def test_a_results_folder_whose_name_no_folder_can_have():
    for name in ("x" * 3000, "[" * 300):
        with pytest.raises(DDError, match="no results can be in .*File name too long"):
            results_folder(name)


def test_a_results_folder_that_cannot_be_written(ddlib, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(
        runs,
        "dataset_of",
        lambda *args, **options: pytest.fail("found out only after loading the data"),
    )
    with pytest.raises(
        DDError, match="cannot write .*Not a directory; choose a writable folder .--results DIR"
    ):
        run(tmp_path / "file" / "results")
    code, out, err = ddlib(*WORDS, "--results", tmp_path / "file" / "results")
    assert (code, out, err.count("\n")) == (2, "", 1) and err.startswith("ddlib: cannot write")


def test_a_full_disk_is_one_sentence_and_leaves_the_old_file(tmp_path, monkeypatch):
    path = kept_files.save_tensors(tmp_path / "a.safetensors", {"x": torch.ones(2)}, {"k": 1})
    before = path.read_bytes()

    def full(tensors, at, metadata):
        Path(at).write_bytes(b"half")
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr(kept_files, "save_file", full)
    with pytest.raises(
        DDError, match="cannot write .*a.safetensors: I/O error: No space left on device"
    ):
        kept_files.save_tensors(path, {"x": torch.zeros(2)}, {})
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_files_have_the_rights_of_the_umask(tmp_path):
    old = os.umask(0o027)
    try:
        path = kept_files.save_tensors(tmp_path / "a.safetensors", {"x": torch.ones(2)}, {})
    finally:
        os.umask(old)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_a_machine_without_git(monkeypatch):
    assert meter.commit() is None or re.fullmatch("[0-9a-f]{40}(-dirty)?", meter.commit())
    monkeypatch.setenv("PATH", "")
    assert meter.commit() is None


def test_a_copy_without_git_is_told_its_commit(monkeypatch, tmp_path):
    """Also where it lies in the repository of somebody else, as in a project's environment."""
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-qm", "theirs", "--allow-empty"], check=True)
    (tmp_path / "site-packages").mkdir()
    monkeypatch.setattr(meter, "SOURCE", tmp_path / "site-packages")
    monkeypatch.delenv("DDLIB_COMMIT", raising=False)
    assert meter.commit() is None
    monkeypatch.setenv("DDLIB_COMMIT", "c0ffee")
    assert meter.commit() == "c0ffee"


# Wrong words


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "dmm"], r"unknown method 'dmm' \(did you mean 'dm'\?\); allowed: .*herding"),
        (["--profile", "papr"], "unknown profile 'papr' .*allowed: smoke, small, paper"),
        (
            ["--set", "lr_image=1"],
            r"unknown preset key for dm 'lr_image' \(did you mean 'lr_img'\?\); allowed: .*momentum",
        ),
        (["--set", "lr_img"], "--set takes KEY=VALUE, not 'lr_img'"),
        (["--set", "lr_img="], "--set takes KEY=VALUE, not 'lr_img='"),
        (["--set", "augment=[crop"], "--set takes KEY=VALUE, not"),
        (["--set", "lr_img=fast"], "'lr_img' must be float, not 'fast'"),
        (["--set", "lr_img=-1"], "'lr_img' must be at least 0, not -1"),
        (["--set", "lr_img=.nan"], "'lr_img' must be at least 0, not nan"),
        (["--set", "iterations=1.5"], "'iterations' must be int, not 1.5"),
        (["--set", "iterations=true"], "'iterations' must be int, not True"),
        (["--set", "init=zeros"], "unknown preset init 'zeros'; allowed: real, noise"),
        (["--set", "ema=1"], "'ema' must be below 1, not 1"),
        (["--set", "momentum=.nan"], "'momentum' must be at least 0, not nan"),
        (["--set", "batch_real=0"], "'batch_real' must be at least 1"),
        (["--set", "zca=foo"], r"unknown preset zca 'foo'; allowed: \(empty\), mtt"),
        (
            ["--set", "eval_backbone=convnett"],
            r"unknown backbone 'convnett' \(did you mean 'convnet'\?\)",
        ),
        (
            ["run", "random", "--set", "kind=herding"],
            "kind 'herding' is another method: ask for that one, not for random",
        ),
        (
            ["run", "frepo", "--set", "augment=colour"],
            r"unknown augmentation 'colour' \(did you mean 'color'\?\)",
        ),
        (["--set", "protocol=mtx"], r"unknown protocol 'mtx'"),
        (["--set", "augment=crop_blur"], "unknown augmentation 'blur'"),
        (["--set", "seed=1"], "--set takes the keys of a preset, and 'seed' is none"),
        (["--set", "data=1"], "--set takes the keys of a preset, and 'data' is none"),
        (["--ipc", "0"], "ipc must be an integer of at least 1, not 0"),
        (["--ipc", "-1"], "ipc must be an integer of at least 1, not -1"),
        (
            ["--ipc", "999"],
            "ipc 999 is more than the 126 training images of class '8' of digits; allowed: 1 to 126",
        ),
        (["--ipc", "one"], "argument --ipc: invalid int value: 'one'"),
        (["--seed", "-2"], "seed must be an integer of at least 0, not -2"),
        (
            ["--backbone", "convnext"],
            r"unknown backbone 'convnext' \(did you mean 'convnet'\?\); allowed: convnet",
        ),
        (["--backbone", "convnet:wide=3"], "unknown key of backbone convnet 'wide'"),
        (
            ["--dataset", "digit"],
            r"unknown dataset 'digit' \(did you mean 'digits'\?\); allowed: .*cifar10",
        ),
        (["--device", "tpu"], "device 'tpu' cannot be used here; allowed: auto, cpu"),
        (["--device", "meta"], "device 'meta' cannot be used here; allowed: auto, cpu"),
        (["--device", "cuda:99"], "device 'cuda:99' cannot be used here; allowed: auto, cpu"),
        (["--checkpoint-every", "0"], "checkpoint_every must be an integer of at least 1, not 0"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
    ],
)
def test_a_wrong_word_is_one_line_and_exit_code_2(ddlib, tmp_path, words, message):
    line = [*words, *WORDS[2:]] if words[0] == "run" else [*WORDS, *words]
    code, out, err = ddlib(*line, "--results", tmp_path)
    assert (code, out) == (2, "") and err.startswith("ddlib: ") and err.count("\n") == 1, err
    assert re.search(message, err)
    assert not files(tmp_path, "**/*.json")


def test_a_wrong_evaluation_network_is_named_before_anything_is_trained(tmp_path, monkeypatch):
    def trained(*_, **__):
        raise AssertionError("trained first")

    monkeypatch.setattr(DM, "step", trained)
    monkeypatch.setattr("ddlib.experts.train_experts", trained)
    for method in ("dm", "mtt"):
        with pytest.raises(DDError, match="unknown backbone 'convnett'"):
            dd.run(
                method,
                "digits",
                ipc=1,
                device="cpu",
                results=tmp_path,
                progress=False,
                teach=True,
                eval_backbone="convnett",
            )


def test_wrong_values_from_python(tmp_path):
    for wrong in (
        {"ipc": True},
        {"ipc": 1.0},
        {"ipc": "1"},
        {"seed": None},
        {"device": None},
        {"zca": "pca"},
        {"resolution": -1},
        {"networks": 0},
        {"evaluations": 0},
        {"compile": 1},
        {"backbone": 3},
    ):
        with pytest.raises(DDError):
            run(tmp_path, **wrong)
    with pytest.raises(DDError, match="unknown method"):
        dd.run(["dm"], "digits", ipc=1)


def test_the_module_itself_prints_no_traceback():
    done = subprocess.run(
        [sys.executable, "-m", "ddlib", "run", "nothing", "--dataset", "digits", "--ipc", "1"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert (
        done.stderr.startswith("ddlib: unknown method 'nothing'; allowed: ")
        and done.stderr.count("\n") == 1
    )


# The other commands


def test_numbers_at_the_command_line_may_be_written_in_any_way():
    values = command_line._key_values(
        ["a=1e-3", "b=1.0e30", "c=2", "d=true", "e=convnet:width=8", "f=1.5", "g='7'", "a=3"]
    )
    assert values == {
        "a": 3,
        "b": 1e30,
        "c": 2,
        "d": True,
        "e": "convnet:width=8",
        "f": 1.5,
        "g": "7",
    }


def test_run_evaluate_and_list(ddlib, whole, tmp_path):
    code, out, err = ddlib(*WORDS, "--results", whole.results)
    assert code == 0 and err == "" and out.splitlines()[:2] == [repr(whole), f"record {whole.path}"]
    code, out, _ = ddlib(
        "evaluate", whole.path.with_suffix(".safetensors"), "--networks", "2", "--device", "cpu"
    )
    last = whole.record["accuracy"]["last"]
    assert code == 0 and out.startswith(
        f"{last['mean']:.1f} ± {last['std']:.1f} % (2 x {NET}, dsa protocol"
    )

    code, out, _ = ddlib("list", "--json", "--results", whole.results)
    (row,) = json.loads(out)
    assert code == 0
    assert (
        row
        | {
            "method": "dm",
            "dataset": "digits",
            "ipc": 1,
            "profile": "smoke",
            "backbone": NET,
            "seed": 0,
            "name": whole.path.stem,
        }
        == row
    )
    assert row["accuracy"] == pytest.approx(last["mean"]) and row["std"] == pytest.approx(
        last["std"]
    )
    best = whole.record["accuracy"]["best"]
    assert row["best"] == pytest.approx(best["mean"]) and row["best_std"] == pytest.approx(
        best["std"]
    )
    assert row["seconds"] > 0 and row["peak_bytes"] > 2**20 and row["device"]
    assert row["networks"] == pytest.approx(last["networks"])

    code, out, _ = ddlib("list", "--results", whole.results)
    assert code == 0 and "dm" in out and "digits" in out
    assert whole.path.stem not in ddlib("list", "--method", "random", "--results", whole.results)[1]
    assert ddlib("list", "--method", "dmm")[:2] == (2, "")
    assert ddlib("evaluate", whole.path.with_suffix(".safetensors"), "--seed", "-1")[2] == (
        "ddlib: seed must be an integer of at least 0, not -1\n"
    )
    code, out, _ = ddlib("list", "--results", tmp_path)
    assert code == 0 and out.startswith(f"no records in {tmp_path}")
    assert ddlib("list", "--json", "--results", tmp_path)[:2] == (0, "[]\n")


def test_a_record_of_an_older_version_is_not_listed(ddlib, whole, monkeypatch):
    monkeypatch.setattr(DM, "version", DM.version + 1)
    assert ddlib("list", "--json", "--results", whole.results)[:2] == (0, "[]\n")


def test_a_sweep_is_a_row_a_run(tmp_path):
    table = dd.sweep(
        "dm",
        "digits",
        ipcs=[1, 2],
        seeds=[0, 3],
        device="cpu",
        results=tmp_path,
        progress=False,
        **SETTINGS | {"iterations": 2},
    )
    assert list(zip(table.ipc, table.seed, strict=True)) == [(1, 0), (1, 3), (2, 0), (2, 3)]
    assert table.name.nunique() == 4 and table.accuracy.between(0, 100).all()


# Runs in lock step


def together(results: Path, **options) -> list[dd.Run]:
    same = {"device": "cpu", "results": results, "progress": False} | SETTINGS
    return dd.run_together("dm", "digits", **same | {"ipcs": [2, 1], "iterations": 6} | options)


def as_alone(made: list[dd.Run], results: Path) -> bool:
    """Whether each is, but for the IPCs that it names, the run that goes alone."""
    ipcs = [one.record["ipc"] for one in made]
    assert [one.record.pop("together") for one in made] == [ipcs] * len(ipcs)
    return all(
        same(one, run(results, ipc=ipc, iterations=6)) for ipc, one in zip(ipcs, made, strict=True)
    )


@pytest.fixture
def real_halves(monkeypatch) -> list[int]:
    """The step of every pass of the real images."""
    steps, real = [], DM.real_half
    monkeypatch.setattr(
        DM, "real_half", lambda self, rows: steps.append(self.steps) or real(self, rows)
    )
    return steps


def test_runs_together_pass_the_real_images_once_and_are_the_same_runs(tmp_path, real_halves):
    made = together(tmp_path / "together")
    assert real_halves == list(range(6))
    device = dd.tables.runs(made).device.str.partition(", together ")
    assert list(device[2]) == ["with IPC 1", "with IPC 2"]
    assert as_alone(made, tmp_path / "alone")
    assert not files(tmp_path / "together", "checkpoints/*.safetensors")


def test_real_images_are_shared_only_between_equal_settings(tmp_path, real_halves, monkeypatch):
    # Another batch at one IPC, as a preset may have it
    resolved = runs.resolve
    monkeypatch.setattr(
        runs,
        "resolve",
        lambda *of, **values: resolved(*of, **values | {"batch_real": 10 + of[2]}),
    )
    together(tmp_path)
    assert real_halves == sorted([*range(6), *range(6)])


def power_cut(method) -> None:
    raise RuntimeError("power cut")


@pytest.mark.parametrize(
    ("event", "steps"),
    [
        (lambda method: os.kill(os.getpid(), signal.SIGINT), [4, 4]),
        (lambda method: os.kill(os.getpid(), signal.SIGTERM), [4, 4]),
        # IPC 1 was written before its evaluation at half the steps; it is behind and catches up first
        (power_cut, [3, 4]),
    ],
)
def test_what_ends_one_of_the_runs_together_saves_them_all(tmp_path, monkeypatch, event, steps):
    real = DM.step

    def step(method):
        if (method.steps, method.ipc) == (3, 1):
            event(method)
        return real(method)

    monkeypatch.setattr(DM, "step", step)
    message = "power cut" if event is power_cut else "stopped at step 4"
    with pytest.raises(DDError, match=message) as caught:
        together(tmp_path)
    assert caught.tb  # while it holds the runs, so that it is not their end which saves them
    kept = files(tmp_path, "checkpoints/*.safetensors")
    assert [load_tensors(path, "checkpoint", "")[1]["step"] for path in kept] == steps
    monkeypatch.undo()
    assert as_alone(together(tmp_path), tmp_path / "alone")


def test_runs_together_halve_their_passes_together(tmp_path, monkeypatch):
    monkeypatch.setattr(DM, "step", full_above(3, DM.step))
    with pytest.warns(UserWarning, match="out of memory at step 3"):
        done = together(tmp_path, checkpoint_every=2)
    assert [one.record["smaller"] for one in done] == [{"chunk": 2}] * 2


def test_methods_that_share_nothing_and_kept_runs_go_alone(tmp_path):
    options = {"device": "cpu", "results": tmp_path, "progress": False, "networks": 1}
    for one in dd.run_together("random", "digits", ipcs=[1, 2, 1], eval_epochs=1, **options):
        assert "together" not in one.record
    alone = run(tmp_path, ipc=2, iterations=6)
    kept, made = together(tmp_path)
    assert kept.record == alone.record and "together" not in made.record
    assert dd.run_together("dm", "digits", ipcs=[]) == []
    with pytest.raises(DDError, match="ipcs must be a list, not 1"):
        dd.run_together("dm", "digits", ipcs=1)


def test_a_sweep_together_is_the_same_table(tmp_path):
    swept = {"ipcs": [1, 2], "seeds": [0, 3], "device": "cpu", "progress": False}
    swept |= SETTINGS | {"iterations": 2}
    one, other = (
        dd.sweep("dm", "digits", results=tmp_path / str(how), together=how, **swept)
        for how in (True, False)
    )
    clock = ["seconds", "distill", "evaluate", "peak_bytes", "device"]
    assert one.drop(columns=clock).equals(other.drop(columns=clock))
    assert one.device.str.contains("together").all()
    with pytest.raises(DDError, match="together must be of type bool, not 2"):
        dd.sweep("dm", "digits", together=2, **swept)


# Presets


def named_in_presets() -> list[tuple[str, str, int]]:
    """(method, dataset, ipc) of every cell that a preset names."""
    cells = set()
    for path in PRESETS.glob("*.yaml"):
        preset = yaml.safe_load(path.read_text())
        for method in (m for m in METHODS if METHODS.registration(m).presets == path):
            levels = [
                preset,
                preset.get("methods", {}).get(method) or {},
                *preset.get("profiles", {}).values(),
            ]
            for level in levels:
                for dataset, values in ((level or {}).get("datasets") or {}).items():
                    cells |= {
                        (method, dataset, ipc) for ipc in (values or {}).get("ipc") or {1: None}
                    }
    return sorted(
        cells | {(method, dataset, 1) for method in METHODS for dataset in ("digits", "cifar10")}
    )


@pytest.mark.parametrize("profile", PROFILES)
def test_every_preset_resolves(profile):
    cells = named_in_presets()
    assert {m for m, _, _ in cells} == set(METHODS) and ("dm", "cifar10", 1250) in cells
    if profile == "paper":  # no paper has the digits, and what none gives is refused
        cells = [cell for cell in cells if cell[1] != "digits"]
    for method, dataset, ipc in cells:
        spec = resolve(method, dataset, ipc, profile)
        spec.run, spec.config, spec.recipe, spec.name  # noqa: B018  each of them validates
        assert ("flip" in spec.run.augment) == (
            dataset not in ("digits", "mnist", "svhn")
        ) or spec.run.augment == "none"


def test_every_preset_file_belongs_to_a_method_and_names_only_what_exists():
    beside = {METHODS.registration(method).presets for method in METHODS}
    assert set(PRESETS.glob("*.yaml")) == {PRESETS / "common.yaml", *beside}
    for path in PRESETS.glob("*.yaml"):
        preset = yaml.safe_load(path.read_text())
        assert set(preset) <= {
            "defaults",
            "methods",
            "datasets",
            "protocols",
            "borrowed",
            "profiles",
        }, path
        assert set(preset.get("methods", {})) <= {
            m for m in METHODS if METHODS.registration(m).presets == path
        }, path
        assert set(preset.get("profiles", {})) <= set(PROFILES), path


def test_the_step_sizes_of_dm_on_cifar10():
    for dataset in ("cifar10", "folder:cifar10", "folder:/data/cifar10"):
        rates = {
            ipc: resolve("dm", dataset, ipc, "paper").config.lr_img
            for ipc in (1, 10, 50, 100, 200, 500, 1000, 1250)
        }
        assert rates == {1: 1, 10: 1, 50: 1, 100: 10, 200: 10, 500: 10, 1000: 10, 1250: 10}
    assert resolve("dm", "cifar100", 100, "paper").config.lr_img == 1
    paper = resolve("dm", "cifar10", 10, "paper")
    assert (
        paper.config.iterations,
        paper.config.batch_real,
        paper.config.momentum,
        paper.config.init,
    ) == (20000, 256, 0.5, "real")
    assert paper.recipe.epochs == 1001 and paper.run.backbone == "convnet"
    assert (
        resolve("dm", "cifar10", 10, "paper", lr_img=7).config.lr_img == 7
    )  # the caller's word is the last


# Without Jupyter

REFUSE_JUPYTER = """
import sys

OTHERS = ("IPython", "papermill", "ipywidgets", "nbformat", "ipykernel", "nbclient", "psutil", "ray", "selenium")

class Refuse:
    def find_spec(self, name, path=None, target=None):
        root = name.split(".")[0]
        if root in OTHERS or root.startswith("jupyter"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Refuse())
"""
# A run, a command that needs Jupyter and the collection of the tests, one after another.
WITHOUT_JUPYTER = f"""{REFUSE_JUPYTER}
import pytest
from ddlib.cli import main

codes = []
for words in (sys.argv[1:], ["reproduce"]):
    sys.argv = ["ddlib", *words]
    codes.append(main())
collect = ["--collect-only", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
print("collected")
codes.append(pytest.main([*collect, "tests/unit", "tests/oracles", "tests/contract"]))
print("codes", *map(int, codes))
"""


@pytest.mark.slow  # imports every test
def test_dm_runs_and_the_gpu_tests_are_found_where_jupyter_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # nbval and others import it
    words = [*WORDS, "--set", "iterations=2", "--results", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_JUPYTER, *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    said = done.stdout + done.stderr
    assert done.stdout.splitlines()[-1:] == ["codes 0 2 0"], said
    assert len(files(tmp_path, "**/*.json")) == 1
    assert "\nddlib: reproduce needs papermill" in done.stderr, said
    collected = done.stdout.partition("\ncollected\n")[2]
    assert "::" in collected and "error" not in collected.lower(), said
