"""Tables from hand-made records: spreads worked out by hand, the rule of the verdict, stale records left out."""

import json
from dataclasses import asdict
from types import SimpleNamespace

import pandas as pd
import pytest

import ddlib as dd
from ddlib.engine.record import Run
from ddlib.recipe import VERSION
from ddlib.report import claims, docs, tables, verdict

JPEG = next(iter(verdict.COPIES))  # the checksum of the known copy of CIFAR-10


def record(
    folder,
    method="dm",
    dataset="digits",
    ipc=1,
    profile="smoke",
    seed=0,
    scores=(50.0, 52.0),
    **overrides,
):
    """A record as `runs` writes it, with these accuracies of its networks, and its Run."""
    spec = dd.resolve(method, dataset, ipc, profile, seed, **overrides)
    mean = sum(scores) / len(scores)
    last = {
        "step": spec.config.iterations,
        "mean": mean,
        "std": (sum((s - mean) ** 2 for s in scores) / len(scores)) ** 0.5,
        "networks": list(scores),
    }
    written = {
        "name": spec.name,
        "method": method,
        "dataset": dataset,
        "ipc": ipc,
        "profile": profile,
        "seed": seed,
        "values": spec.values,
        "backbone": spec.run.backbone,
        "recipe": asdict(spec.recipe),
        "accuracy": {"last": last, "best": last},
        "evaluations": [last],
        "seconds": {"distill": 20.0, "evaluate": 5.0},
        "peak_bytes": 3 * 2**20,
        "peak_method": "counted",
        "device": "test",
        "commit": "f" * 40,
        "dataset_checksum": JPEG if dataset == "folder:cifar10" else "0",
        "history": [{"step": k, "loss": 1 / k} for k in (1, 2, 3)],
    }
    path = folder / profile / method / f"{spec.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(written))
    return Run(path)


def test_summary_keeps_the_two_spreads_apart(tmp_path):
    # run means 51 and 57: over seeds 3; inside the runs 1 and 3: over networks 2; all of 50 52 54 60 about 54: pooled
    table = tables.runs(
        [
            record(tmp_path, seed=0, scores=(50.0, 52.0)),
            record(tmp_path, seed=1, scores=(54.0, 60.0)),
        ]
    )
    (row,) = tables.summary(table).to_dict("records")
    assert row["accuracy"] == 54 and row["over seeds"] == 3 and row["over networks"] == 2
    assert row["pooled"] == pytest.approx(((16 + 4 + 0 + 36) / 4) ** 0.5)
    assert (row["seeds"], row["networks"], row["iterations"], row["seconds"]) == (2, 4, 200, 25)


def test_runs_with_other_settings_are_not_seeds_of_one(tmp_path):
    table = tables.runs([record(tmp_path), record(tmp_path, seed=1, lr_img=5.0)])
    assert list(table.overrides) == ["", "lr_img=5.0"]
    assert len(tables.summary(table)) == 2
    assert list(tables.compare(table).method) == ["dm", "dm, lr_img=5.0"]


def test_a_precision_below_float32_is_marked_and_a_choice_in_it_changes_the_method(tmp_path):
    low = {"eval_precision": "bf16", "sampling_precision": "bf16"}
    found = [
        record(tmp_path, "dm", precision="bf16"),
        record(tmp_path, "dream", "folder:cifar10", 10, "paper", **low),
        record(tmp_path, "dm", seed=1),
    ]
    table = tables.runs(found)
    assert table.marks.tolist() == [
        ("distilled in bf16",),
        ("on the JPEG copy", "real images chosen in bf16", "evaluated in bf16"),
        (),
    ]
    (said,) = tables.details(table[1:2]).verdict
    assert said.startswith("changed method") and "sampling_precision bf16 for float32" in said


def test_compare_puts_the_published_figure_beside_ours(tmp_path):
    place = {"dataset": "folder:cifar10", "ipc": 10}
    found = [
        record(tmp_path, **place, profile="paper", scores=(48.0, 48.6, 48.3, 48.5, 48.1)),
        record(tmp_path, **place, profile="small", scores=(44.0, 46.0, 45.0)),
        record(tmp_path, "random", **place, profile="paper", scores=(40.0, 40.2, 39.8, 40.1, 39.9)),
        record(tmp_path),
    ]
    found[1].path.write_text(json.dumps(found[1].record | {"commit": None}))
    table = tables.runs([*found[:1], Run(found[1].path), *found[2:]])
    shown = tables.compare(table)
    assert list(shown) == ["dataset", "ipc", "method", "paper", "ours", "random", "Δ", "verdict"]
    behind = tables.details(table)
    rows = {
        (profile, method): row
        for profile, method, (_, row) in zip(
            behind.profile, behind.method, shown.iterrows(), strict=True
        )
    }
    full = rows["paper", "dm"]
    assert (full.paper, full.ours, full.random) == ("48.9 ± 0.6", "48.3 ± 0.2", "40.0 ± 0.1")
    assert (full["Δ"], full.verdict) == ("-0.6", "reproduced, on the JPEG copy")
    short = rows["small", "dm"]
    assert short.random == "40.0 ± 0.1"  # the protocol and the budget of evaluation are the same
    assert short.verdict == "changed method, on the JPEG copy, code unknown"
    (why,) = behind.verdict[(behind.profile == "small") & (behind.method == "dm")]
    assert (
        why
        == f"{short.verdict}: lr_img 10 for 1, iterations 800 of 20000 (25x less), networks 3 of 5"
    )
    real = rows["paper", "random"]
    assert (real.paper, real.random) == ("32.2~", "")  # under DSA's protocol; 26.0 is without
    assert real.verdict.startswith("contradicted")
    toy = rows["smoke", "dm"]
    assert (toy.paper, toy["Δ"], toy.verdict) == ("none", "", "no published figure")


def test_a_curve_is_for_images_that_begin_as_its_own_do(tmp_path):
    place = {"dataset": "folder:cifar10", "ipc": 10, "profile": "small"}
    start = record(tmp_path, "idc", **place, iterations=0)
    other = record(tmp_path, "idc", **place, iterations=0, init="kmeans")
    idc = record(tmp_path, "random", **place, scores=(30.0,) * 5, protocol="idc")
    shown = tables.compare(tables.runs([start, other, idc])).set_index("method")
    assert shown.paper["idc, iterations=0"] == "49.0~"  # read off the curve at iteration 0
    assert shown.paper["idc, iterations=0, init=kmeans"] == "none"
    assert shown.paper["random, protocol=idc"] == "none"  # no paper prints it
    assert shown.verdict["random, protocol=idc"] == "no published figure, on the JPEG copy"


def test_coresets_are_held_against_the_column_of_their_protocol(tmp_path):
    scores = (25.5, 26.0, 26.5, 26.2, 25.8)
    run = record(tmp_path, "random", "cifar10", 10, "paper", scores=scores, protocol="dc")
    (row,) = tables.compare(tables.runs([run])).to_dict("records")
    assert row["paper"].startswith("26.0") and row["verdict"] == "reproduced"


def test_the_folders_name_is_nobody(tmp_path):
    run = record(tmp_path, dataset="folder:cifar10", ipc=10, profile="paper", scores=[48.9] * 5)
    run.path.write_text(json.dumps(run.record | {"dataset_checksum": "of something else"}))
    (row,) = tables.compare(tables.runs([Run(run.path)])).to_dict("records")
    assert (row["paper"], row["verdict"]) == ("none", "no published figure")


def test_the_front_page_takes_the_nearest_run_of_known_code(tmp_path):
    place = {"dataset": "cifar10", "ipc": 10}
    near = record(tmp_path, **place, profile="small", scores=(44.0, 45.0, 46.0), lr_img=1.0)
    far = record(tmp_path, **place, profile="small", scores=(48.0, 48.9, 49.0))
    nearest = record(tmp_path, **place, profile="paper", scores=(48.9,) * 5)
    nearest.path.write_text(json.dumps(nearest.record | {"commit": None}))
    real = [record(tmp_path, "random", **place, protocol=name) for name in ("dsa", "dc")]
    unpublished = record(tmp_path, "random", **place, protocol="idc")
    table = tables.runs([*real, unpublished, near, far, Run(nearest.path)])
    first, *others = tables.front_page(table).to_dict("records")  # distilled sets come first
    assert (first["method"], first["ours"]) == ("dm", "45.0 ± 0.8")
    assert first["verdict"] == "reduced budget"
    assert sorted(row["method"] for row in others) == ["random (dc)", "random (dsa)"]


def test_images_that_were_never_distilled_are_no_set_of_the_method(tmp_path):
    values = {"dataset": "folder:cifar10", "ipc": 10, "profile": "paper", "scores": (49.0, 49.4)}
    first = record(tmp_path, "idc", iterations=0, **values)
    rows = tables.runs([first, record(tmp_path, "random", **values)])
    assert set(tables.made(tables.judge(rows)).method) == {"random"}
    assert set(tables.headline(rows).method) == {"random"}
    assert set(tables.front_page(rows).method.str.partition(" ")[0]) == {"random"}
    own, all_claims = claims.of_method("idc"), claims.load()
    assert set(claims.judge(own, tmp_path).kind) == {"not attempted"}
    curve = claims.judge(all_claims[all_claims.method == "idc"], tmp_path)
    assert [*curve[curve.kind != "not attempted"].variant] == ["iteration=0"]
    assert "attains nothing yet" in docs.fill("    `idc` attains x.", tmp_path)


def test_a_docstring_says_that_no_figure_is_printed_beside_a_run(tmp_path):
    record(tmp_path, "idc", dataset="digits", profile="small", iterations=8, scores=(51.0, 52.0))
    line = " ".join(docs.fill("    `idc` attains x.", tmp_path).split())
    assert "attains 51.5 ± 0.5 % on" in line and "in 8 iterations; no printed figure" in line


def test_random_images_beside_a_run_are_of_its_own_profile(tmp_path):
    for profile, score in (("paper", 17.0), ("small", 19.0)):
        record(tmp_path, "random", "folder:cifar10", profile=profile, scores=(score, score))
    dm = record(tmp_path, "dm", "folder:cifar10", profile="paper")
    row = tables.compare(tables.runs(tables.stored(tmp_path, "paper")))
    assert [*row[row.method == "dm"].random] == ["17.0 ± 0.0"]
    both = tables.runs([*tables.stored(tmp_path, "paper"), *tables.stored(tmp_path, "small")])
    assert [*tables.compare(both).query("method == 'dm'").random] == ["17.0 ± 0.0"]
    alone = tables.runs([dm, *tables.stored(tmp_path, "small")])  # else another profile's
    assert [*tables.compare(alone).query("method == 'dm'").random] == ["19.0 ± 0.0"]


def test_the_front_page_has_every_method_before_a_second_row_of_one(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "HEADLINES", 3)
    place = {"dataset": "cifar10", "profile": "paper", "scores": (50.0,) * 5}
    full = [record(tmp_path, ipc=ipc, **place) for ipc in (1, 10, 50)]
    less = record(tmp_path, "dsa", ipc=10, **place, iterations=1)
    real = record(tmp_path, "random", ipc=10, **place)
    shown = tables.front_page(tables.runs([*full, less, real]))
    assert sorted(shown.method) == ["dm", "dm", "dsa"]


def test_a_key_younger_than_a_record_has_its_default(tmp_path):
    run = record(tmp_path, dataset="folder:cifar10", profile="small", ema=0.0)
    run.path.write_text(
        json.dumps(
            run.record | {"values": {k: v for k, v in run.record["values"].items() if k != "ema"}}
        )
    )
    (old,) = tables.stored(tmp_path)
    assert tables.runs([old]).overrides[0] == "ema=0.0"  # the small profile has another now


def test_stored_leaves_out_what_is_not_current(tmp_path, monkeypatch):
    current, old = record(tmp_path, seed=0), record(tmp_path, seed=1)
    old.path.write_text(json.dumps(old.record | {"method": "gone"}))
    current.path.with_suffix(".transfer.json").write_text("{}")
    assert [run.path for run in tables.stored(tmp_path)] == [current.path]
    assert tables.stored(tmp_path, "paper") == []
    monkeypatch.setattr(dd.METHODS["dm"], "version", dd.METHODS["dm"].version + 1)
    assert tables.stored(tmp_path) == []


def test_cost_per_step(tmp_path):
    table = tables.cost(tables.runs([record(tmp_path), record(tmp_path, "random")])).set_index(
        "method"
    )
    assert table.loc["dm", "ms / step"] == 100 and table.loc["dm", "peak MiB"] == 3
    assert pd.isna(table.loc["random", "ms / step"])


def test_printed_is_the_papers_own_table():
    table = tables.printed(["dc", "dm", "full"], ["cifar10", "cifar100"]).set_index(
        ["dataset", "ipc"]
    )
    assert list(table.columns) == ["dc", "dm", "full"] and len(table) == 6
    assert table.loc[("cifar10", 50), "dm"] == "63.0 ± 0.4"
    assert set(table.loc["cifar10", "full"]) == {"84.8 ± 0.1"}
    assert (
        table.loc[("cifar100", 50), "dc"] == ""
    )  # DC-BENCH has a figure there, the papers have none
    assert tables.printed(["dm"], ["mnist"]).dm.iloc[0] == "89.7 ± 0.6*"


def test_across_keeps_the_order_and_shows_no_spread_of_one_network():
    scores = [
        {"backbone": b, "method": m, "mean": 50.0, "std": 2.0, "networks": [50.0] * n}
        for b, n in (("resnet18", 1), ("mlp", 2))
        for m in ("random", "dm")
    ]
    table = tables.across(scores)
    assert list(table.columns) == ["backbone", "random", "dm"] and list(table.backbone) == [
        "resnet18",
        "mlp",
    ]
    assert list(table.dm) == ["50.0", "50.0 ± 2.0"]
    assert tables.across([]).empty


def test_curve_has_a_papers_own_figures_alone():
    dm = tables.curve("dm", "folder:/home/me/cifar10").set_index("ipc")
    assert (dm.value[1], dm.spread[1], dm.mark[1]) == (
        26.0,
        0.8,
        "",
    ) and dm.index.is_monotonic_increasing
    assert 50 not in set(tables.curve("dc", "cifar100").ipc)  # DC-BENCH has one, the paper has none
    assert list(tables.curve("random", "cifar10").value[:3]) == [
        16.5,
        32.2,
        49.7,
    ]  # under DSA's protocol
    assert list(tables.curve("random", "mnist").value) == [
        64.9,
        95.1,
        97.9,
    ]  # where nothing else is on file
    assert set(tables.curve("random", "mnist").mark) == {"*"}
    assert list(tables.curve("full", "cifar10").value) == [84.8]
    assert tables.curve("dm", "digits").empty


def test_headline_keeps_all_seeds_of_the_setting_nearest_to_the_preset(tmp_path):
    main = [record(tmp_path, seed=seed) for seed in (0, 1)]
    others = [
        record(tmp_path, seed=2, lr_img=5.0),
        record(tmp_path, "dsa", iterations=3),
        record(tmp_path, "dsa", iterations=5),
        record(tmp_path, "dsa", iterations=9, eval_epochs=2),
    ]
    kept = tables.headline(tables.runs([*others, *main]))
    assert sorted(zip(kept.method, kept.overrides, kept.seed, strict=True)) == [
        ("dm", "", 0),
        ("dm", "", 1),
        ("dsa", "iterations=5", 0),
    ]
    assert tables.headline(tables.runs([])).empty


def test_a_line_is_of_one_protocol_that_of_the_printed_figures(tmp_path):
    place = {"dataset": "mnist", "profile": "paper"}
    dc = {"protocol": "dc", "eval_augment": "dc:crop_scale_rotate"}
    runs = [
        record(tmp_path, "random", ipc=1, **place),  # DSA's protocol, which no paper prints
        record(tmp_path, "random", ipc=10, **place, protocol="dc", eval_augment="none"),
        *(record(tmp_path, "random", ipc=ipc, **place, **dc) for ipc in (1, 10)),
    ]
    kept = tables.headline(tables.runs(runs))
    assert [*kept.ipc] == [1, 10]
    assert {values["eval_augment"] for values in kept["values"]} == {"dc:crop_scale_rotate"}
    assert [*kept.columns] == tables.COLUMNS


def test_transfers_are_the_own_network_and_the_kept_others_under_the_same_protocol(tmp_path):
    run = record(tmp_path, scores=(50.0, 52.0, 54.0))
    run.__dict__["synthetic"] = SimpleNamespace(
        backbone="convnet:width=32"
    )  # else read from the file of the set
    assert list(tables.transfers([run]).backbone) == ["convnet:width=32"]
    score = {"std": 1.0, "step": 3}
    kept = {
        f"mlp x 1, version {VERSION}": {
            **score,
            "backbone": "mlp",
            "mean": 60.0,
            "networks": [60.0],
        },
        f"mlp x 2, version {VERSION}": {
            **score,
            "backbone": "mlp",
            "mean": 61.0,
            "networks": [60.0, 62.0],
        },
        f"mlp x 9, version {VERSION}, protocol=dc": {
            **score,
            "backbone": "mlp",
            "mean": 1.0,
            "networks": [1.0] * 9,
        },
        "lenet x 1, version 0": {**score, "backbone": "lenet", "mean": 1.0, "networks": [1.0]},
        f"convnet:width=32 x 2, version {VERSION}": {
            **score,
            "backbone": "convnet:width=32",
            "mean": 1.0,
            "networks": [1.0] * 2,
        },
    }
    run.path.with_suffix(".transfer.json").write_text(json.dumps(kept))
    table = tables.transfers([run]).set_index("backbone")
    assert dict(table["mean"]) == {"convnet:width=32": 52.0, "mlp": 61.0}
    assert list(table.loc["mlp", ["method", "dataset", "ipc", "seed"]]) == ["dm", "digits", 1, 0]
    assert tables.transfers([]).empty


def test_printed_across_names_the_sets_and_marks_what_is_from_memory():
    cells = tables.printed_across("folder:/home/me/cifar10").pivot(
        index="set", columns="backbone", values="cell"
    )
    assert (
        cells.loc["ftd, IPC 50", "resnet18"] == "65.7"
        and cells.loc["mtt, IPC 10", "vgg11"] == "50.3"
    )
    assert cells.loc["dm, IPC 50, on vgg11:norm=bn", "convnet:norm=bn"] == "54.2*"
    assert "random, IPC 10" not in cells.index  # tested on its own network alone
    assert {"lenet", "mlp"} < set(tables.printed_across("mnist").backbone)  # DC's second table
    assert tables.printed_across("digits").empty


def test_rows_as_json(tmp_path):
    (row,) = json.loads(tables.runs([record(tmp_path)]).to_json(orient="records"))
    assert row["method"] == "dm" and row["networks"] == [50.0, 52.0]


def test_titled_shows_one_decimal_and_the_caption():
    html = tables.titled(pd.DataFrame({"a": [1.26, None]}), "made for a test").to_html()
    assert (
        "1.3" in html
        and "1.26" not in html
        and "nan" not in html
        and "<caption>made for a test</caption>" in html
    )
