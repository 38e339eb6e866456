"""Tables from hand-made records: spreads worked out by hand, the rule of the verdict, stale records left out."""

import json

import pandas as pd
import pytest

import ddlib as dd
from ddlib import tables
from ddlib.records import Run


def record(folder, method="dm", dataset="digits", ipc=1, profile="smoke", seed=0, scores=(50.0, 52.0), **overrides):
    """A record as `runs` writes it, with these accuracies of its networks, and its Run."""
    spec = dd.resolve(method, dataset, ipc, profile, seed, **overrides)
    mean = sum(scores) / len(scores)
    last = {"step": spec.config.iterations, "mean": mean, "std": (sum((s - mean) ** 2 for s in scores) / len(scores))**.5,
            "networks": list(scores)}
    written = {"name": spec.name, "method": method, "dataset": dataset, "ipc": ipc, "profile": profile, "seed": seed,
               "values": spec.values, "backbone": spec.run.backbone, "accuracy": {"last": last, "best": last},
               "seconds": {"distill": 20.0, "evaluate": 5.0}, "peak_bytes": 3 * 2**20, "peak_method": "counted",
               "device": "test", "history": [{"step": k, "loss": 1 / k} for k in (1, 2, 3)]}
    path = folder / profile / f"{spec.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(written))
    return Run(path)


def test_summary_keeps_the_two_spreads_apart(tmp_path):
    # run means 51 and 57: over seeds 3; inside the runs 1 and 3: over networks 2; all of 50 52 54 60 about 54: pooled
    table = tables.runs([record(tmp_path, seed=0, scores=(50.0, 52.0)), record(tmp_path, seed=1, scores=(54.0, 60.0))])
    (row,) = tables.summary(table).to_dict("records")
    assert row["accuracy"] == 54 and row["over seeds"] == 3 and row["over networks"] == 2
    assert row["pooled"] == pytest.approx(((16 + 4 + 0 + 36) / 4) ** 0.5)
    assert (row["seeds"], row["networks"], row["iterations"], row["seconds"]) == (2, 4, 200, 25)


def test_runs_with_other_settings_are_not_seeds_of_one(tmp_path):
    table = tables.runs([record(tmp_path), record(tmp_path, seed=1, lr_img=5.0)])
    assert list(table.overrides) == ["", "lr_img=5.0"]
    assert len(tables.summary(table)) == 2
    assert list(tables.compare(table).overrides) == ["", "lr_img=5.0"]


@pytest.mark.parametrize(("profile", "ours", "spread", "paper", "less", "expected"), [
    ("paper", 25.0, 0.0, (26.0, 0.0), "", "reproduced"),  # exactly one point
    ("paper", 24.95, 0.0, (26.0, 0.0), "", "not reproduced"),
    ("paper", 27.05, 0.0, (26.0, 0.0), "", "not reproduced"),
    ("paper", 24.0, 1.2, (26.0, 0.8), "", "reproduced"),  # the intervals just meet
    ("paper", 23.9, 1.2, (26.0, 0.8), "", "not reproduced"),
    ("paper", 24.0, 1.2, (26.0, float("nan")), "", "not reproduced"),  # no spread in print counts as none
    ("small", 26.0, 0.5, (26.0, 0.8), "", "reduced budget"),  # never a reproduction, however near
    ("paper", 26.0, 0.5, (26.0, 0.8), "iterations 10 of 20", "reduced budget: iterations 10 of 20"),
    ("paper", 26.0, 0.5, None, "", "no published figure"),
])
def test_verdict(profile, ours, spread, paper, less, expected):
    assert tables.verdict(profile, ours, spread, paper, less) == expected


def test_compare_puts_the_published_figure_beside_ours(tmp_path):
    found = [record(tmp_path, dataset="folder:cifar10", ipc=10, profile="paper", scores=(48.0, 48.6, 48.3, 48.5, 48.1)),
             record(tmp_path, dataset="folder:cifar10", ipc=10, profile="small", scores=(44.0, 46.0, 45.0)),
             record(tmp_path, dataset="folder:cifar10", ipc=10, profile="paper", scores=(48.9,) * 5, iterations=10,
                    seed=1),
             record(tmp_path, "random", dataset="folder:cifar10", ipc=10, profile="paper", scores=(40.0,) * 5),
             record(tmp_path)]
    table = tables.compare(tables.runs(found)).set_index(["dataset", "profile", "method", "overrides"])
    full = table.loc["folder:cifar10", "paper", "dm", ""]
    assert (full.paper, full.ours, full["Δ"], full.verdict) == ("48.9 ± 0.6", "48.3 ± 0.2", "-0.6", "reproduced")
    assert table.loc["folder:cifar10", "small", "dm", ""].verdict == (
        "reduced budget: iterations 800 of 20000, networks 3 of 5")
    assert table.loc["folder:cifar10", "paper", "dm", "iterations=10"].verdict == (
        "reduced budget: iterations 10 of 20000")
    real = table.loc["folder:cifar10", "paper", "random", ""]
    assert (real.paper, real.verdict) == ("32.2", "not reproduced")  # with DSA augmentation; 26.0 is without
    toy = table.loc["digits", "smoke", "dm", ""]
    assert (toy.paper, toy["Δ"], toy.verdict) == ("none", "", "no published figure")


def test_stored_leaves_out_what_is_not_current(tmp_path, monkeypatch):
    current, old = record(tmp_path, seed=0), record(tmp_path, seed=1)
    old.path.write_text(json.dumps(old.record | {"method": "gone"}))
    (tmp_path / "smoke" / f"{current.path.stem}.transfer.json").write_text("{}")
    assert [run.path for run in tables.stored(tmp_path)] == [current.path]
    assert tables.stored(tmp_path, "paper") == []
    monkeypatch.setattr(dd.METHODS["dm"], "version", dd.METHODS["dm"].version + 1)
    assert tables.stored(tmp_path) == []


def test_cost_per_step(tmp_path):
    table = tables.cost(tables.runs([record(tmp_path), record(tmp_path, "random")])).set_index("method")
    assert table.loc["dm", "ms / step"] == 100 and table.loc["dm", "peak MiB"] == 3
    assert pd.isna(table.loc["random", "ms / step"])


def test_printed_is_the_papers_own_table():
    table = tables.printed(["dc", "dm", "full"], ["cifar10", "cifar100"]).set_index(["dataset", "ipc"])
    assert list(table.columns) == ["dc", "dm", "full"] and len(table) == 6
    assert table.loc[("cifar10", 50), "dm"] == "63.0 ± 0.4"
    assert set(table.loc["cifar10", "full"]) == {"84.8 ± 0.1"}
    assert table.loc[("cifar100", 50), "dc"] == ""  # DC-BENCH has a figure there, the papers have none
    assert tables.printed(["dm"], ["mnist"]).dm.iloc[0] == "89.7 ± 0.6*"


def test_across_keeps_the_order_and_shows_no_spread_of_one_network():
    scores = [{"backbone": b, "method": m, "mean": 50.0, "std": 2.0, "networks": [50.0] * n}
              for b, n in (("resnet18", 1), ("mlp", 2)) for m in ("random", "dm")]
    table = tables.across(scores)
    assert list(table.columns) == ["backbone", "random", "dm"] and list(table.backbone) == ["resnet18", "mlp"]
    assert list(table.dm) == ["50.0", "50.0 ± 2.0"]
    assert tables.across([]).empty


def test_rows_as_json(tmp_path):
    (row,) = json.loads(tables.to_json(tables.runs([record(tmp_path)])))
    assert row["method"] == "dm" and row["networks"] == [50.0, 52.0]


def test_titled_shows_one_decimal_and_the_caption():
    html = tables.titled(pd.DataFrame({"a": [1.26, None]}), "made for a test").to_html()
    assert "1.3" in html and "1.26" not in html and "nan" not in html and "<caption>made for a test</caption>" in html
