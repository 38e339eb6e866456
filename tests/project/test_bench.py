"""The benchmark's rows at tiny sizes, and its plain loop as DM's oracle at the benchmark's own shapes."""

import json
import math
import os
import re
import subprocess
from pathlib import Path

import pytest
import torch

import benchmarks.dm as bench
from benchmarks import large, precision
from ddlib.core import DDError
from ddlib.engine import queue
from ddlib.engine.run import run as distil
from ddlib.files import SOURCE
from ddlib.methods import METHODS, dm
from ddlib.train import evaluate as evaluation
from tests import forks
from tests.oracles.plain import dm_gradient

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _uncompiled(monkeypatch):
    """Compiling takes longer than everything else here, and has its test with DM."""
    monkeypatch.setattr(dm, "compiled", lambda function: function)
    monkeypatch.setattr(evaluation, "compiled", lambda function: function)
    evaluation._network.cache_clear()
    yield
    evaluation._network.cache_clear()  # its networks are uncompiled ones


def positive(row: dict, *names: str) -> None:
    for name in names:
        assert math.isfinite(row[name]) and row[name] > 0, (name, row)


def test_an_iteration():
    row = bench.iteration(classes=2, ipc=1, batch=3, device=CPU, rate=1e10, repeats=1)
    positive(
        row,
        "seconds",
        "plain seconds",
        "plain seconds, heap kept",
        "times faster",
        "times faster, heap kept",
        "over roofline",
        "peak MiB",
        "plain peak MiB",
    )
    assert "DDLIB_HEAP" not in os.environ
    assert row["times faster"] == pytest.approx(row["plain seconds"] / row["seconds"])
    # 101.4 MFLOP an image at 32 px: forward for 2 x 3 real ones, forward and input gradient for 2 x 1 synthetic ones
    assert row["seconds"] / row["over roofline"] * 1e10 == pytest.approx(10 * 101.4e6, rel=0.02)


def test_the_evaluations(monkeypatch):
    # Alone is in a fork here; the iteration above has a process that is new, as `make bench` has.
    monkeypatch.setattr(bench, "get_context", lambda _: forks.SERVER)
    row = bench.evaluations(CPU, networks=1, epochs=1)
    positive(row, "seconds", "plain seconds", "times faster")
    assert row["what"] == "evaluation, 1 networks, 2 epochs"


def test_the_images_of_the_benchmark():
    data = bench.shapes(3, 25, CPU)
    assert data.shape == (3, 32, 32) and data.class_sizes().tolist() == [25] * 3
    assert len(data.labels["test"]) == len(data.images["test"]) > 0


def test_the_plain_loop_is_dms_gradient():
    data = bench.shapes(3, 6, CPU)
    method = dm.DM(dm.Config(batch_real=5), data, 2, "convnet:width=16", 0)
    for step in range(2):
        plain = dm_gradient(data, method.images, 2, 5, step, "convnet:width=16")
        before = method.velocity.clone()
        method.step()
        torch.testing.assert_close(
            method.velocity - 0.5 * before, plain, rtol=1e-3, atol=1e-5 * float(plain.abs().max())
        )


def test_precisions_are_compared_pair_by_pair(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(precision, "compiled", lambda function: function)
    run = distil(
        "random",
        "digits",
        ipc=1,
        results=tmp_path,
        progress=False,
        networks=1,
        eval_epochs=2,
        compile=False,
    )
    out = tmp_path / "precision.json"
    words = [str(run.path.with_suffix(".safetensors")), "--networks", "2", "--out", str(out)]
    record = precision.main([*words, "--turns", "0", "--device", "cpu"])
    (row,) = record["sets"].values()
    assert row["accuracies"]["float32"][0] == run.accuracy  # as the run evaluates
    assert record["pairs"] == 2 and record["mean difference"] == pytest.approx(
        sum(row["differences"]) / 2
    )
    monkeypatch.setattr(precision, "both_ways", lambda *_: pytest.fail("evaluated again"))
    assert precision.main([*words, "--turns", "0", "--device", "cpu"]) == record
    damaged = tmp_path / "damaged.json"
    damaged.write_text(out.read_text()[:-9])
    with pytest.raises(DDError, match="cannot be read .*delete it and run again"):
        precision.main(["--out", str(damaged), "--turns", "0", "--device", "cpu"])
    for row in precision.speed(CPU, 1, True, "convnet:width=4"):
        positive(row, "float32", "bf16", "times faster")


def test_the_rule_of_neutral_precision():
    assert precision.verdict([0.2, 0.2])["verdict"] == "neutral"
    assert precision.verdict([0.5, 0.5])["verdict"] == "not neutral"
    wide = precision.verdict([0.0, 1.2])  # 0.6 with a standard error of 0.6
    assert wide["standard error"] == pytest.approx(0.6) and wide["verdict"] == "neutral"
    assert precision.verdict([0.0, 6.0])["verdict"] == "inconclusive"
    assert precision.verdict([0.1])["verdict"] == "too few pairs"


def test_the_kept_pairs_of_precisions_are_as_neutral_as_the_page_says():
    kept = json.loads((ROOT / "results" / "bench" / "precision_cpu.json").read_text())
    pairs = [value for row in kept["sets"].values() for value in row["differences"]]
    said = precision.verdict(pairs)
    assert said["verdict"] == kept["verdict"] == "neutral" and len(pairs) == 16
    page = " ".join((ROOT / "docs" / "results.md").read_text().split())
    mean, error = said["mean difference"], said["standard error"]
    assert f"the mean difference is {mean:.2f} and its standard error {error:.2f}" in page


def test_every_row_of_the_gpu_lanes_resolves(tmp_path):
    """The rows and the profile that tools/gpu.sh gives its queues, under a Python that only repeats its words."""
    python = tmp_path / "python"
    python.write_text('#!/bin/bash\necho "$*"\n')
    python.chmod(0o755)
    ours = {"OUT": tmp_path / "out", "WORK": tmp_path / "work", "PY": python, "DEVICE": "cpu"}

    def call(*words: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            ["bash", str(SOURCE / "tools" / "gpu.sh"), *words],
            cwd=SOURCE,
            env=os.environ | {key: str(value) for key, value in ours.items()},
            capture_output=True,
            text=True,
            check=False,
        )

    assert call("start", "60").returncode == 0
    lanes = {}
    for log in (tmp_path / "work" / "log").glob("*.log"):
        _, file, profile = re.fullmatch(
            r"(-m ddlib queue) (\S+) --profile (\w+) --device cpu --minutes 26\n", log.read_text()
        ).groups()
        lanes[log.stem] = queue.read(file, profile)
    assert len(lanes) >= 6 and all(lanes.values())
    tried, coresets = {spec.method for spec in lanes["try"]}, {"random", "herding", "kcenter"}
    assert tried == set(METHODS) - coresets - {"kmeans", "forgetting"}
    assert all(spec.run.compile and spec.config.iterations < 4 for spec in lanes["try"])
    wrong = call("begin")
    assert wrong.returncode == 2 and "start, wait or stop, not begin" in wrong.stdout


def test_a_planted_tree_is_streamed(tmp_path, monkeypatch):
    monkeypatch.setattr(large, "CLASSES", 3)
    monkeypatch.setenv("DDLIB_CACHE", str(tmp_path / "cache"))
    large.plant(tmp_path / "tree", 12)
    assert len([*(tmp_path / "tree" / "train").glob("*/*.jpg")]) == 12
    row = large.stream(tmp_path / "tree", 2)
    positive(row, "seconds to load", "images per second", "anonymous MiB", "mapped MiB")
    assert large.limit() is None or large.limit() > 0
