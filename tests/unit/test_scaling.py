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
    of = lambda **sizes: scaling._problem(name, "digits", "smoke", sizes, torch.device("cpu"))
    spec, data = of()
    assert (spec.ipc, data.num_classes, data.shape) == (1, 10, (1, 8, 8))
    assert of(ipc=3)[0].ipc == 3 <= of(ipc=3)[1].class_sizes().min()
    assert of(classes=4)[1].num_classes == 4
    assert of(resolution=12)[1].shape == (1, 12, 12)
    wide = of(width=24)[0].run.backbone
    assert "width=24" in wide and wide.count("width") == 1
    kept = set(spec.run.backbone.partition(":")[2].split(",")) - {"width=32"}
    assert all(option in wide for option in kept)
    if name in ("unroll", "tesla", "adjoint"):
        assert of(syn_steps=7)[0].config.syn_steps == 7
        assert spec.config.gradient == name


def test_growth_is_measured_once_and_kept(results, monkeypatch):
    sizes = {"syn_steps": [2, 8], "ipc": [1]}
    table = dd.scaling.growth("digits", "smoke", sizes, device="cpu", repeats=1)
    steps = table[table.varied == "syn_steps"]
    assert set(steps.method) == {"unroll", "tesla", "adjoint"}
    assert set(table[table.varied == "ipc"].method) == {*scaling.UPDATES}
    assert (table.seconds > 0).all()
    memory = steps.pivot(index="method", columns="value", values="graph bytes")
    ratio = memory[8] / memory[2]
    assert ratio["unroll"] > 3 and ratio["tesla"] < 1.05 and ratio["adjoint"] < 1.05
    monkeypatch.setattr(scaling, "one_step", None)
    again = dd.scaling.growth("digits", "smoke", sizes, device="cpu", repeats=1)
    assert again.equals(table)


def test_a_power_law_is_found_again():
    rows = [
        {"varied": "ipc", "value": n, "method": "dm", "seconds": 3 * n**1.5, "graph bytes": 7 * n}
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
    assert {spec.profile for spec in specs} == {"paper"}
    table, plan = dd.scaling.forecast(specs, "cpu"), queue.plan(specs)
    cost.network.cache_clear()
    assert list(table.here) == [row.cost.seconds / 3600 for row in plan]
    assert table.TFLOP.iloc[-1] * 1e12 / 19.5e12 / 3600 == pytest.approx(table.A100.iloc[-1])
    assert not any(map(math.isnan, table.here))


def test_what_cannot_be_measured_is_one_sentence(results):
    with pytest.raises(DDError, match="unknown size 'ipcs' .did you mean 'ipc'"):
        dd.scaling.growth("digits", "smoke", {"ipcs": [1]})
    with pytest.raises(DDError, match="size of 'imagenette' is not on file"):
        dd.scaling.growth("imagenette", "smoke", {"ipc": [1]})
    with pytest.raises(DDError, match="unknown dataset 'cifar'"):
        dd.tables.printed_runs(["cifar"])
    with pytest.raises(DDError, match="unknown device 'H100'.*allowed: H200, A100, RTX 4090"):
        cost.Cost(1, 1, 1).seconds_on("H100")
    assert not list(results.rglob("*.json"))
