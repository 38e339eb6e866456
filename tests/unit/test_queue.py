"""The queue: rows, order, costs, and that stopping and going on changes nothing."""

import hashlib
import math
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import yaml

import ddlib as dd
from ddlib import cli
from ddlib.core import DDError
from ddlib.engine import cost, queue
from ddlib.files import lock
from tests import forks

SMOKE = {"iterations": 6, "networks": 1, "eval_epochs": 2, "evaluations": 1, "snapshots": 0}


def written(folder, rows) -> str:
    path = folder / "queue.yaml"
    path.write_text(yaml.safe_dump(rows))
    return str(path)


def row(**changes):
    return {"method": "dm", "dataset": "digits", "ipc": 1, "set": SMOKE} | changes


def test_a_row_stands_for_all_its_combinations(tmp_path):
    rows = [row(ipc=[1, 2], seeds=[0, 1]), row(method=["random", "kmeans"], set={})]
    specs = queue.read(written(tmp_path, rows), "smoke")
    assert [(s.method, s.ipc, s.seed) for s in specs] == [
        ("dm", 1, 0),
        ("dm", 1, 1),
        ("dm", 2, 0),
        ("dm", 2, 1),
        ("random", 1, 0),
        ("kmeans", 1, 0),
    ]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([row(method="dn")], "row 1 of the queue .* unknown method 'dn'"),
        ([row(), row(ipc=0)], "row 2 .* ipc must be an integer"),
        ([{"method": "dm", "dataset": "digits"}], "row 1 .* it lacks ipc"),
        ([row(sets={})], "unknown key 'sets'"),
        ([row(set=[1])], "set must be keys and values"),
        ([row(set={"lr": 1})], "unknown preset key"),
        ({"method": "dm"}, "must be a list of rows"),
        ("[", "is no YAML"),
        ("[" * 3000, "is no YAML"),
        ("- {method: 2001-02-30}", "is no YAML"),
    ],
)
def test_a_wrong_queue_is_named(tmp_path, rows, message):
    path = tmp_path / "queue.yaml"
    path.write_text(rows if isinstance(rows, str) else yaml.safe_dump(rows))
    with pytest.raises(DDError, match=message):
        queue.read(path, "smoke")


def test_a_missing_queue_and_no_time_are_one_sentence(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["ddlib", "queue", str(tmp_path / "none.yaml")])
    assert cli.main() == 2
    assert "cannot read the queue" in capsys.readouterr().err
    with pytest.raises(DDError, match="minutes must be above 0, not -1"):
        queue.work_through([], -1)


@pytest.mark.parametrize("words", ["queue pipe", "import folder --dataset digits --out a"])
def test_a_pipe_is_not_waited_for(tmp_path, words):
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "pipe", tmp_path / "folder" / "data.pt"):
        os.mkfifo(path)
    done = forks.run([sys.executable, "-m", "ddlib", *words.split()], cwd=tmp_path, timeout=120)
    wanted = "cannot read the queue pipe" if "queue" in words else "folder holds no published set"
    assert done.returncode == 2 and wanted in done.stderr


def test_a_queue_is_a_file_of_a_size(tmp_path):
    for path in ("/dev/null", tmp_path):
        with pytest.raises(DDError, match="cannot read the queue .*: there is no such file"):
            queue.read(path)
    (tmp_path / "long.yaml").write_text("#" * (queue.LARGEST + 1))
    with pytest.raises(DDError, match="long.yaml is larger than 1 MiB"):
        queue.read(tmp_path / "long.yaml")


def test_the_papers_rows_are_resolved_and_cheapest_first(monkeypatch):
    monkeypatch.setattr(cost, "_timed_step", lambda net, shape, classes, batch, *how: batch / 1e3)
    rows = queue.plan(queue.read())
    assert len(rows) > 50
    assert not any(math.isnan(row.cost.seconds) for row in rows)
    alone = [r for r in rows if cost.shared_key(r.spec) is None]
    seconds = [r.cost.seconds for r in alone]
    assert seconds == sorted(seconds)
    assert rows[0].spec.method == "random"
    printed = queue.table(rows)
    assert max(map(len, printed.splitlines())) <= 100
    assert printed.count("eval_augment=dc:crop_scale_rotate") > 5  # long names are folded, not cut


def test_coresets_are_scored_under_the_columns_own_epochs():
    specs = [s for s in queue.read() if s.run.protocol == "dc" and s.method == "random"]
    epochs = {s.dataset: s.run.eval_epochs for s in specs}
    assert epochs == {"mnist": 1000, "cifar10": 300}
    asked = dd.resolve("random", "mnist", 1, "paper", protocol="dc", eval_epochs=7)
    assert asked.run.eval_epochs == 7 and asked.run.eval_augment == "dc:crop_scale_rotate"


def test_work_is_timed_in_its_precision_with_its_augmentation(monkeypatch):
    def step(net, shape, classes, batch, device, precision, strategy):
        return (
            batch / 1e3 * (1 if precision == "float32" else 0.5) * (1 if strategy == "none" else 3)
        )

    monkeypatch.setattr(cost, "_timed_step", step)
    cost.network.cache_clear()
    ways = ({"eval_augment": "none"}, {}, {"eval_precision": "bf16"})
    plain, augmented, low = (
        cost.predict(dd.resolve("random", "cifar10", 1, "paper", compile=False, **way)).seconds
        for way in ways
    )

    def updates(count: int, **precision: str) -> float:
        spec = dd.resolve("dm", "cifar10", 1, "paper", compile=False, iterations=count, **precision)
        return cost.predict(spec).seconds

    dm, low_dm = (updates(2, **way) - updates(1, **way) for way in ({}, {"precision": "bf16"}))
    cost.network.cache_clear()
    assert augmented == pytest.approx(3 * plain) and low == pytest.approx(augmented / 2)
    assert low_dm == pytest.approx(dm / 2)


def test_costs_follow_the_work(monkeypatch):
    monkeypatch.setattr(cost, "_timed_step", lambda net, shape, classes, batch, *how: batch / 1e3)
    one = cost.predict(dd.resolve("dm", "cifar10", 1, "paper"))
    half = cost.predict(dd.resolve("dm", "cifar10", 1, "paper", iterations=10_000))
    longer = cost.predict(dd.resolve("dm", "cifar10", 10, "paper"))
    assert one.tflop == pytest.approx(2 * half.tflop, rel=0.02)
    assert one.seconds == pytest.approx(2 * half.seconds, rel=0.02)
    # An update passes 2,560 real images forward, 10 or 100 synthetic ones forward and back.
    scores = [5 * 3 * 1001 * n + 50_000 for n in (10, 100)]
    steps = [20_000 * (2560 + 3 * n) for n in (10, 100)]
    wanted = (steps[1] + scores[1]) / (steps[0] + scores[0])
    assert longer.tflop / one.tflop == pytest.approx(wanted, rel=1e-6)
    with pytest.raises(DDError, match="size of 'folder:pets' is not on file"):
        cost.predict(dd.resolve("dm", "folder:pets", 1, "smoke"))


def test_a_row_of_unknown_cost_stops_no_queue(monkeypatch):
    monkeypatch.setattr(cost, "_timed_step", lambda net, shape, classes, batch, *how: batch / 1e3)
    specs = [dd.resolve("random", name, 1, "smoke") for name in ("folder:pets", "digits")]
    rows = queue.plan(specs)
    assert [row.spec.dataset for row in rows] == ["digits", "folder:pets"]
    assert math.isnan(rows[1].cost.seconds) and "unknown" in queue.table(rows)


@pytest.mark.parametrize(
    "change",
    [{"subset": 100}, {"resolution": 16}, {"minival": 0.1}, {"zca": "mtt"}, {"backbone": "mlp"}],
)
def test_experts_on_other_images_or_networks_serve_nobody_else(change):
    one, other = (cost.shared_key(dd.resolve("mtt", "digits", 1, **kw)) for kw in ({}, change))
    assert one == cost.shared_key(dd.resolve("mtt", "digits", 10)) != other


def test_an_extractor_and_experts_are_paid_for_once(monkeypatch):
    monkeypatch.setattr(cost, "_timed_step", lambda net, shape, classes, batch, *how: batch / 1e3)
    coresets = [("herding", 1, 0), ("forgetting", 10, 0), ("herding", 10, 1)]
    specs = [dd.resolve(method, "mnist", ipc, "paper", seed) for method, ipc, seed in coresets]
    specs += [dd.resolve("mtt", "cifar10", ipc, "paper", experts=20) for ipc in (1, 10)]
    planned = {
        (row.spec.method, row.spec.ipc, row.spec.seed): row.cost for row in queue.plan(specs)
    }
    prepared = {("forgetting", 10, 0), ("mtt", 10, 0)}  # what a cheaper row has trained
    for spec in specs:
        key = (spec.method, spec.ipc, spec.seed)
        assert planned[key] == cost.predict(spec, prepared=key in prepared)
        assert cost.predict(spec, prepared=True).tflop < cost.predict(spec).tflop


def test_sizes_on_file_are_those_of_the_embedded_data():
    data = dd.load("digits", device="cpu")
    assert cost.SIZES["digits"] == cost.Sizes(
        data.shape, data.num_classes, len(data.labels["train"]), len(data.labels["test"])
    )


def started_by(monkeypatch, popen):
    """Let the queue start its runs so."""
    names = {"Popen": popen, "TimeoutExpired": subprocess.TimeoutExpired}
    monkeypatch.setattr(queue, "subprocess", SimpleNamespace(**names))


def test_stopped_and_gone_on_ends_in_the_same_bytes(tmp_path, monkeypatch, capfd):
    """A run is stopped by the time, goes on with the next call, and is skipped by the third."""
    changes = SMOKE | {"iterations": 400, "batch_real": 16, "backbone": "convnet:width=8"}
    rows = lambda folder: queue.plan(
        queue.read(written(tmp_path, [row(set=changes)]), "smoke"), results=tmp_path / folder
    )
    whole = dd.run("dm", "digits", ipc=1, results=tmp_path / "whole", device="cpu", **changes)
    waited = []

    class UntilCheckpoint(forks.Popen):
        """The time is up as soon as a checkpoint is there."""

        def wait(self, timeout=None):
            if timeout in (None, queue.GRACE) or waited:
                return super().wait(timeout)
            waited.append(timeout)
            checkpoints = tmp_path / "parts" / "smoke" / "checkpoints"
            while not list(checkpoints.glob("*.safetensors")) and self.poll() is None:
                queue.time.sleep(0.01)
            raise subprocess.TimeoutExpired("run", timeout)

    started_by(monkeypatch, UntilCheckpoint)
    assert queue.work_through(rows("parts"), 5, "cpu", tmp_path / "parts")
    assert "stopped, to go on" in capfd.readouterr().out and not rows("parts")[0].done
    assert queue.work_through(rows("parts"), 5, "cpu", tmp_path / "parts")
    (parts,) = rows("parts")
    with lock(parts.record, "the run"):
        assert parts.taken and not rows("whole")[0].taken
    digests = [
        hashlib.sha256(path.with_suffix(".safetensors").read_bytes()).hexdigest()
        for path in (whole.path, parts.record)
    ]
    assert digests[0] == digests[1]
    capfd.readouterr()
    assert queue.work_through(rows("parts"), 5, "cpu", tmp_path / "parts")
    assert capfd.readouterr().out.startswith("kept")


def test_a_run_of_another_process_is_left_to_it(tmp_path, monkeypatch, capfd):
    rows = [row(method="random", set=SMOKE | {"iterations": 0})]
    (one,) = queue.plan(queue.read(written(tmp_path, rows), "smoke"), results=tmp_path)
    # A process that were started would wait for the lock for ever.
    monkeypatch.setattr(queue.subprocess, "Popen", lambda *_, **__: pytest.fail("it is started"))
    with lock(one.record, "the run"):
        queue.work_through([one], None, "cpu", tmp_path)
    assert capfd.readouterr().out.startswith("taken")


def test_a_run_that_fails_is_said_and_the_next_one_starts(tmp_path, capfd, monkeypatch):
    """The run that fails is a process of the queue's own, the other one a fork."""
    started = []

    def start(words, **options):
        kind = forks.Popen if "random" in words else subprocess.Popen
        started.append(kind(words, **options))
        return started[-1]

    started_by(monkeypatch, start)
    rows = [
        row(dataset="digits", ipc=500, set={}),
        row(method="random", set=SMOKE | {"iterations": 0}),
    ]
    plan = queue.plan(queue.read(written(tmp_path, rows), "smoke"), results=tmp_path / "r")
    plan.sort(key=lambda row: row.spec.method == "random")  # which is the cheaper one
    assert not queue.work_through(plan, None, "cpu", tmp_path / "r")
    out = capfd.readouterr()
    assert "failed with 2" in out.out and "training images of class" in out.err
    assert [type(process) for process in started] == [subprocess.Popen, forks.Popen]
    assert [r.done for r in plan if r.spec.method == "random"] == [True]


def test_a_run_that_another_process_has_is_left_to_it(tmp_path, capsys):
    plan = queue.plan(queue.read(written(tmp_path, [row()]), "smoke"), results=tmp_path / "r")
    with lock(plan[0].record, "the run"):
        assert queue.work_through(plan, None, "cpu", tmp_path / "r")
    assert capsys.readouterr().out.startswith("taken") and not plan[0].taken


def test_experts_are_trained_before_the_run_that_needs_them(tmp_path, monkeypatch):
    called = []
    monkeypatch.setattr(queue, "_process", lambda words, *rest: called.append(words) or 0)
    rows = [row(method=["mtt", "dm"], dataset="cifar10", seeds=3, set={})]
    specs = queue.read(written(tmp_path, rows), "small", "folder:tree/cifar10")
    plan = [queue.Row(spec, None, tmp_path) for spec in specs]
    codes = [queue._run(each, math.inf, "cpu", tmp_path) for each in plan]
    assert codes == [0, 0] and [words[2] for words in called] == ["experts", "run", "run"]
    assert all("folder:tree/cifar10" in words for words in called)
    assert called[1][-4:] == ["--seed", "3", "--device", "cpu"]
