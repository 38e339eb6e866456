"""Studies: rows are computed once, the exact engines agree, TESLA's does not, memory is predicted as measured."""

import shutil

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import ddlib as dd
from ddlib.core import DDError, generator
from ddlib.engine import meter
from ddlib.engine.meter import SavedTensors
from ddlib.match.trajectory import FlatNet, Segment, match
from ddlib.methods.trajectory import soft_cross_entropy
from ddlib.nets.build import build
from ddlib.studies import trajectories as studies
from ddlib.train.loop import accuracy, train_on

TINY = {
    "experts": 1,
    "expert_total": 4,
    "iterations": 2,
    "syn_steps": 3,
    "backbone": "convnet:width=8",
    "max_start": 2,
    "eval_epochs": 2,
    "networks": 1,
    "snapshots": 0,
}


@pytest.fixture
def spec(results):
    dd.prepare("mtt", "digits", ipc=1, progress=False, **TINY)
    return dd.resolve("mtt", "digits", 1, **TINY)


def test_unrolling_compares_engines_and_is_computed_once(spec, monkeypatch):
    table = studies.unrolling(spec, steps=(1, 4)).set_index(["steps", "engine"])
    for engine in ("unroll", "checkpoint", "adjoint"):
        assert table.loc[(4, engine), "cosine"] == pytest.approx(1, abs=1e-5)
        assert table.loc[(4, engine), "norm ratio"] == pytest.approx(1, abs=1e-3)
    assert table.loc[(1, "tesla"), "norm ratio"] == pytest.approx(1, abs=1e-4)
    assert abs(table.loc[(4, "tesla"), "norm ratio"] - 1) > 1e-2
    assert table.loc[(4, "unroll"), "graph bytes"] > 3 * table.loc[(1, "unroll"), "graph bytes"]
    assert (
        table.loc[(4, "adjoint"), "graph bytes"] < 1.05 * table.loc[(1, "adjoint"), "graph bytes"]
    )
    vectors = table["vectors bytes"].xs(4, level="steps")
    assert vectors["adjoint"] > 0 == vectors["tesla"] == vectors["unroll"]
    monkeypatch.setattr(studies, "dataset_of", None)  # a second call must not need the data
    again = studies.unrolling(spec, steps=(1, 4)).set_index(["steps", "engine"])
    assert again.equals(table)


def test_unrolling_takes_the_runs_own_loss(results):
    """DATM's inner loss reads its labels as logits, which another criterion would not notice."""
    options = TINY | {"flat": "plain", "labels": "learned", "init": "real"}
    dd.prepare("datm", "digits", ipc=1, progress=False, **options)
    spec = dd.resolve("datm", "digits", 1, **options)
    (row,) = studies.unrolling(spec, steps=(3,), engines=("tesla",)).to_dict("records")
    method = dd.METHODS["datm"](
        spec.config, dd.load("digits", device="cpu"), 1, spec.run.backbone, 0
    )
    segment, labels = method.segment(generator(0, "unrolling"))
    exact, tesla = (
        match(
            method.net,
            segment,
            method.raw,
            labels,
            method.rate.expand(3),
            engine,
            criterion=soft_cross_entropy,
        )
        for engine in ("adjoint", "tesla")
    )
    assert row["norm ratio"] == pytest.approx(
        float(tesla.images.norm() / exact.images.norm()), rel=1e-6
    )
    assert row["rate ratio"] == pytest.approx(
        float(tesla.rates.sum() / exact.rates.sum()), rel=1e-6
    )


def test_unroll_is_left_out_where_it_would_not_fit(spec):
    table = studies.unrolling(spec, steps=(1, 8), engines=("unroll", "adjoint"), largest=1)
    assert list(table[table.engine == "unroll"].steps) == [1]
    assert list(table[table.engine == "adjoint"].steps) == [1, 8]


@pytest.mark.parametrize("engine", ["unroll", "adjoint", "tesla"])
def test_memory_is_predicted_as_measured(engine):
    backbone, shape, classes, batch, steps = "convnet:width=8", (3, 16, 16), 5, 10, 4
    net = FlatNet(build(backbone, shape, classes))
    rng = torch.Generator().manual_seed(0)
    index = torch.arange(batch)
    with SavedTensors() as saved:
        match(
            net,
            Segment(net.vector(), net.vector() + 1, [index] * steps, [None] * steps),
            torch.randn(batch, *shape, generator=rng),
            torch.full((batch, classes), 1 / classes),
            torch.full((steps,), 0.01),
            engine,
        )
    predicted = studies.predicted_memory(backbone, shape, classes, batch, steps, engine)
    assert predicted["graph bytes"] == pytest.approx(saved.peak, rel=0.05)


def test_flatness_and_trajectory_error(spec):
    rows = studies.flatness(spec, images=64)
    assert list(rows.epoch) == [0, 1, 2, 3, 4]
    assert (rows.sharpness > 0).all()
    assert rows["test loss"].iloc[-1] < rows["test loss"].iloc[0]
    error = studies.trajectory_error(dd.run("mtt", "digits", ipc=1, progress=False, **TINY))
    assert error[error.epoch == 0].error.abs().max() < 1e-6
    assert list(error.epoch) == [0, 2, 4]


def test_a_damaged_study_is_named(spec, results):
    studies.flatness(spec, images=64)
    (path,) = results.rglob("flatness-*.json")
    whole = path.read_text()
    path.write_text(whole.replace('"seal"', '"sealed"'))  # as if it were from before there were any
    with pytest.raises(DDError, match="the study .*flatness-.* its checksum is missing"):
        studies.flatness(spec, images=64)
    path.write_text("{")
    with pytest.raises(DDError, match="the study .*flatness-.* cannot be read"):
        studies.flatness(spec, images=64)


def test_kept_studies_are_found_by_dataset(spec):
    table = studies.unrolling(spec, steps=(1,), engines=("tesla",))
    assert studies.kept("unrolling", "digits").equals(table)
    assert studies.kept("unrolling", "imagenet1k").empty


def test_a_run_teaches_the_experts_that_it_lacks_and_a_kept_one_needs_none(results, monkeypatch):
    with pytest.raises(DDError, match="make the experts first"):
        dd.run("mtt", "digits", ipc=1, progress=False, **TINY)
    table = dd.sweep("mtt", "digits", ipcs=(1,), progress=False, teach=True, **TINY)
    shutil.rmtree(results / "experts")
    monkeypatch.setattr("ddlib.engine.run.dataset_of", None)
    assert dd.sweep("mtt", "digits", ipcs=(1,), progress=False, teach=True, **TINY).equals(table)


def test_full_is_the_whole_training_set_under_the_same_protocol(results, monkeypatch):
    spec = dd.resolve("random", "digits", 1, backbone="convnet:width=8", eval_epochs=4)
    (row,) = studies.full(spec).to_dict("records")
    few = dd.run(
        "random",
        "digits",
        ipc=1,
        backbone="convnet:width=8",
        eval_epochs=4,
        networks=2,
        progress=False,
    )
    assert (
        row["accuracy"] > few.accuracy + 20
        and len(row["networks"]) == 2
        and row["networks"][0] != row["networks"][1]
    )
    assert row["accuracy"] == pytest.approx(sum(row["networks"]) / 2)
    assert (row["protocol"], row["epochs"], row["precision"]) == ("dsa", 5, "float32")
    data, net = dd.load("digits"), build("convnet:width=8", (1, 8, 8), 10, generator(0, "full", 1))
    assert row["networks"][1] == accuracy(train_on(data, net, spec.recipe, 1), data)
    monkeypatch.setattr(studies, "dataset_of", None)  # a second call must not need the data
    assert studies.full(spec).to_dict("records") == [row]
    assert studies.kept("full", "digits").accuracy[0] == row["accuracy"]


def test_the_roof_is_the_rate_of_a_convolution(monkeypatch):
    made = []
    monkeypatch.setattr(meter, "seconds", lambda work, **rest: made.append(work()) or 0.5)
    rate = meter.conv_rate(torch.device("cpu"), batch=2, width=4, side=8)
    (out,) = made
    assert out.shape == (2, 4, 8, 8) and out.is_contiguous(memory_format=torch.channels_last)
    net = torch.nn.Conv2d(4, 4, 3, padding=1)
    with FlopCounterMode(display=False) as counted:
        net(torch.zeros(2, 4, 8, 8))
    assert rate == 2 * counted.get_total_flops()
