"""Cost as the work grows: every size reaches the problem, a power law is found again, forecasts are the queue's."""

import math

import pandas as pd
import pytest
import torch

import ddlib as dd
from ddlib.core import DDError
from ddlib.engine import cost, queue
from ddlib.studies import scaling


@pytest.mark.parametrize("name", scaling.UPDATES)
def test_every_size_reaches_the_problem(name):
    def problem(**sizes):
        spec, shape = (
            scaling._spec(name, "digits", "smoke", sizes),
            scaling._shape("digits", sizes),
        )
        return spec, scaling._noise(spec, *shape, torch.device("cpu"))

    spec, data = problem()
    assert (spec.ipc, data.num_classes, data.shape) == (1, 10, (1, 8, 8))
    more, enough = problem(ipc=300)
    assert more.ipc == 300 <= enough.class_sizes().min() and more.values == spec.values
    assert problem(classes=4)[1].num_classes == 4
    assert problem(resolution=12)[1].shape == (1, 12, 12)
    wide = problem(width=24)[0].run.backbone
    assert "width=24" in wide and wide.count("width") == 1
    kept = set(spec.run.backbone.partition(":")[2].split(",")) - {"width=32"}
    assert all(option in wide for option in kept)
    if spec.method == "mtt":
        assert problem(syn_steps=7)[0].config.syn_steps == 7
        assert spec.config.gradient == name


def test_updates_are_measured_once_and_kept(results, monkeypatch):
    sizes = {"syn_steps": [2, 8], "ipc": [1], "classes": [4, 10]}
    table = dd.scaling.updates("digits", "smoke", sizes, device="cpu", repeats=1)
    steps = table[table.varied == "syn_steps"]
    assert set(steps.method) == {"unroll", "tesla", "adjoint"}
    assert set(table[table.varied == "ipc"].method) == {*scaling.UPDATES}
    assert (table.seconds > 0).all()
    graphs, vectors = (
        steps.pivot(index="method", columns="value", values=column)
        for column in ("graph bytes", "vectors bytes")
    )
    ratio = graphs[8] / graphs[2]
    assert ratio["unroll"] > 3 and ratio["tesla"] < 1.05 and ratio["adjoint"] < 1.05
    assert vectors[8]["adjoint"] == 4 * vectors[2]["adjoint"] > 0 == vectors[8]["tesla"]
    few, usual = (
        table[(table.varied == "classes") & (table.value == n)].set_index("method") for n in (4, 10)
    )
    assert (few["graph bytes"] < usual["graph bytes"]).all()
    shared = table[table.varied == "ipc"].set_index("method")  # the presets' own size, too
    assert usual.seconds.equals(shared.seconds)
    monkeypatch.setattr(scaling, "one_step", None)
    again = dd.scaling.updates("digits", "smoke", sizes, device="cpu", repeats=1)
    assert again.equals(table)


def test_a_power_law_is_found_again():
    rows = [
        {"varied": "ipc", "value": n, "method": "dm", "seconds": 3 * n**1.5, "memory (MiB)": 7 * n}
        for n in (1, 2, 10)
    ]
    alone = [rows[0] | {"method": "dsa"}]
    (found,) = dd.scaling.exponents(pd.DataFrame(rows + alone)).to_dict("records")
    assert found == {
        "varied": "ipc",
        "method": "dm",
        "time": pytest.approx(1.5),
        "memory": pytest.approx(1),
    }


def test_a_forecast_is_the_queues_plan(monkeypatch):
    monkeypatch.setattr(cost, "_timed_step", lambda net, shape, classes, batch, *how: batch / 1e3)
    cost.network.cache_clear()
    specs = dd.tables.printed_runs(["mnist"])
    assert {("dm", 10), ("frepo", 1)} <= {(spec.method, spec.ipc) for spec in specs}
    assert any(spec.method == "dream_plus" for spec in dd.tables.printed_runs(["cifar10"]))
    assert dd.tables.printed_runs(["mnist", "mnist"]) == specs
    assert {spec.profile for spec in specs} == {"paper"}
    table, plan = dd.scaling.forecast(specs, "cpu"), queue.plan(specs)
    cost.network.cache_clear()
    assert list(table.here) == [row.cost.seconds / 3600 for row in plan]
    assert table.TFLOP.iloc[-1] * 1e12 / 19.5e12 / 3600 == pytest.approx(table.A100.iloc[-1])
    assert not any(map(math.isnan, table.here))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"ipcs": [1]}, "unknown size 'ipcs' .did you mean 'ipc'"),
        ({"classes": [1]}, "classes must be an integer of at least 2, not 1"),
        ({"ipc": [1], "width": [70_000]}, "width"),
        ({"ipc": [1], "resolution": [2]}, "halves images of 2x2 px away"),
    ],
)
def test_an_impossible_size_is_one_sentence_before_anything_is_measured(
    results, monkeypatch, sizes, message
):
    monkeypatch.setattr(scaling, "one_step", None)
    with pytest.raises(DDError, match=message):
        dd.scaling.updates("digits", "smoke", sizes)
    assert not list(results.rglob("*.json"))


def test_what_has_no_size_or_rate_is_one_sentence(results):
    with pytest.raises(DDError, match="size of 'imagenette' is not on file"):
        dd.scaling.updates("imagenette", "smoke", {"ipc": [1]})
    for name in ("cifar", "imagenette"):
        with pytest.raises(DDError, match=f"unknown dataset '{name}'.*allowed: mnist"):
            dd.tables.printed_runs([name])
    with pytest.raises(DDError, match="unknown device 'H100'.*allowed: H200, A100, RTX 4090"):
        cost.Cost(1, 1, 1).seconds_on("H100")
