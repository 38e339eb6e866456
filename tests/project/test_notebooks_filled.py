"""The notebooks teach: both columns of a paper's table are filled on the defaults, cells are short and call verbs."""

from __future__ import annotations

import ast
import json
import re
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

import ddlib as dd
from ddlib.report import lesson, site, tables
from ddlib.studies import cross

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PAPERS = ("dm", "frepo", "tesla", "ftd", "dream_plus")
LESSONS = [path for path in NOTEBOOKS if path.stem in PAPERS]


def cells(path: Path, kind: str) -> list[str]:
    found = json.loads(path.read_text())["cells"]
    return ["".join(cell["source"]) for cell in found if cell["cell_type"] == kind]


def asked(path: Path) -> dict:
    """The arguments of the notebook's own call of `dd.lesson.beside`, but the table of its live runs."""
    for text in cells(path, "code"):
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "dd.lesson.beside":
                options = {word.arg: ast.literal_eval(word.value) for word in node.keywords}
                return {"methods": ast.literal_eval(node.args[1])} | options
    raise AssertionError(f"{path.name} does not show its table by dd.lesson.beside")


@pytest.fixture(scope="module")
def live():
    """One row as a digits run has it: a kept one under that name, since none is needed from a training here."""
    row = lesson.kept(["random"]).head(1)
    return row.assign(dataset="digits", profile="smoke", name="digits", backbone="convnet:width=32")


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_paper_and_ours_are_filled_in_at_least_three_rows(path, live):
    main, details = lesson.paper_and_ours(live, **asked(path))
    assert len(main.columns) <= 7 and len(main) == len(details)
    numbers = [
        re.match(r"\d+\.\d", paper) and re.match(r"\d+\.\d", ours)
        for paper, ours in zip(main.paper, main.ours, strict=True)
    ]
    assert sum(map(bool, numbers)) >= 3, main.to_string()
    assert (main.setting == "digits, IPC 1").sum() == 1
    assert not main.setting.str.contains("folder:").any()


def test_live_random_images_stand_beside_the_kept_runs_and_others_stay_out():
    kept = lesson.kept(["random"], every=True)
    same = kept[(kept["values"].map(lambda values: values["protocol"]) == "mtt")]
    main, _ = lesson.paper_and_ours(same, ["tesla", "ftd"])
    assert [*main.columns[:5]] == ["setting", "method", "paper", "ours", "random"]
    distilled = main[main.method != "random"]
    assert len(distilled) >= 2 and (distilled.random != "").all()
    assert (main.method == "random").sum() == 1


def test_the_kept_seeds_of_a_live_run_are_pooled_with_it():
    every = lesson.kept(["dm"], every=True)
    setting = list(tables.SETTING)
    (seeds,) = (
        rows
        for _, rows in every.groupby(setting)
        if len(rows) == 3 and rows.overrides.iloc[0] == ""
    )
    _, details = lesson.paper_and_ours(seeds.head(1), ["dm"])
    mine = details[(details.profile == "small") & (details.overrides == "") & (details.ipc == 1)]
    assert [*mine[mine.method == "dm"].seeds] == [3]


def test_a_table_without_runs_is_one_sentence():
    with pytest.raises(dd.DDError, match="there is no run to show"):
        lesson.beside(tables.runs([]), ["dm"])


@pytest.mark.parametrize("name", PAPERS)
def test_the_executed_copies_have_both_columns_filled(name, rows_filled):
    """As the site shows them; conftest.py asks the same of what is executed here on the defaults."""
    _, path = site.executed(ROOT / "results")[name]
    (shown,) = (
        cell["outputs"]
        for cell in json.loads(path.read_text())["cells"]
        if "dd.lesson.beside(" in "".join(cell["source"])
    )
    assert rows_filled("".join(shown[0]["data"]["text/html"])) >= 3


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_a_paper_notebook_explains_its_loss_and_says_what_to_look_at(path):
    texts = cells(path, "markdown")
    equations = [text for text in texts if re.search(r"\$\$.+?\$\$", text, re.DOTALL)]
    assert equations, "no display equation"
    symbols = re.findall(r"^- .*\$", equations[0], re.MULTILINE)
    assert len(symbols) >= 2, "the symbols of the equation are not explained"
    assert "**Idea.**" in texts[0] and "**Claim.**" in texts[0]
    assert f"docs/methods/{path.stem}.md" in texts[0]
    assert any(site.MATH.search(text) for text in texts)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_cells_are_short_and_internals_stay_behind_verbs(path):
    for text in cells(path, "code"):
        lines = text.splitlines()
        assert len(lines) <= 10, f"{len(lines)} lines:\n{text}"
        assert max(map(len, lines)) <= 100, text
        assert not re.search(r"^\s*(from|import) ddlib\.", text, re.MULTILINE), text


def test_what_folds_shows_its_parts_and_reads_as_text_too():
    folded = lesson.fold("a < b", lesson.page("x & y"), "z")
    assert folded.html.startswith("<details><summary>a &lt; b</summary>")
    assert "x &amp; y" in folded.html and repr(folded).split() == [
        "a",
        "<",
        "b",
        "x",
        "&",
        "y",
        "z",
    ]


def test_random_images_take_the_evaluation_of_the_method_beside_them():
    values = dd.resolve("tesla", "digits", 1, "smoke").values
    same = lesson.control("tesla", "digits", 1, "smoke")
    assert same["eval_lr"] == values["lr_teacher"] and same["protocol"] == "mtt"
    assert lesson.control("frepo", "digits", 1, "smoke")["protocol"] == "frepo"


def test_a_kept_run_is_the_presets_own_and_a_missing_one_is_named():
    run = lesson.kept_run("dm", "cifar10", 1)
    assert run.record["seed"] == 0 and run.record["values"]["init"] == "kmeans"
    assert lesson.kept_run("dm", "cifar10", 1, init="real").record["values"]["init"] == "real"
    with pytest.raises(dd.DDError, match="no run of dm on cifar10 at IPC 3 is kept"):
        lesson.kept_run("dm", "cifar10", 3)


def test_what_is_missing_is_computed_in_the_smoke_profile_alone():
    assert lesson.wanted("", "smoke") and not lesson.wanted("", "small")
    assert lesson.wanted("yes", "paper") and not lesson.wanted("no", "smoke")
    with pytest.raises(dd.DDError, match="missing 'perhaps'"):
        lesson.wanted("perhaps", "smoke")
    assert "dm" in lesson.chosen("", "smoke") and lesson.chosen("all", "paper") == list(dd.METHODS)


def test_a_grid_holds_each_network_against_random_images():
    scores = pd.DataFrame(
        [("random", "a", 40.0, 3.0), ("dm", "a", 50.0, 4.0), ("random", "b", 40.0, 0.6)]
        + [("dm", "b", 38.0, 0.8)],
        columns=["method", "backbone", "mean", "std"],
    )
    grid = cross.Grid(
        scores.pivot(index="method", columns="backbone", values="mean"),
        scores.pivot(index="method", columns="backbone", values="std"),
        {"random": "a", "dm": "a"},
    )
    assert grid.gain.loc["dm"].tolist() == [10, -2] and grid.noise.loc["dm", "a"] == 5
    fall = grid.fall().set_index("method")
    assert fall.loc["dm", "unseen"] == 38 and fall.loc["dm", "below random"] == "1 of 2"
    alone = scores.assign(networks=[[40.0], [50.0], [40.0], [38.0]])
    grid = replace(cross.grid(alone, [], ["random", "dm"], ["a", "b"]), own=grid.own)
    assert grid.std.isna().all(axis=None) and grid.fall()["below random"].tolist()[1] == "1 of 2"
    assert "±" not in "".join(text.get_text() for text in grid.difference("here").axes[0].texts)


def test_a_folder_of_digits_has_a_folder_per_class(tmp_path):
    lesson.digits_folder(tmp_path, 30)
    files = list(tmp_path.rglob("*.png"))
    assert len(files) == 30 and {path.parent.parent for path in files} == {tmp_path}


def test_the_share_of_the_gap_is_0_at_random_images_and_1_at_the_whole_set():
    runs = lesson.kept(["random", "dm"])
    top = tables.summary(runs, by=("method", "ipc")).set_index(["method", "ipc"])
    share = lesson.share_closed(runs[runs.ipc == 10], top.accuracy["dm", 10])
    assert share.to_dict("records") == [{"method": "dm", "IPC 10": 1.0}]


KEPT = (*lesson.KEPT, "kept")  # folders of executed notebooks that are kept
EXECUTED = [
    path
    for folder in KEPT
    for path in sorted((ROOT / "results" / "notebooks" / folder).glob("*.ipynb"))
]


@pytest.mark.parametrize("path", EXECUTED, ids=lambda path: path.stem)
def test_no_table_that_stands_open_has_more_than_seven_columns(path):
    executed = json.loads(path.read_text())["cells"]
    outputs = [out.get("data", {}) for cell in executed for out in cell.get("outputs", [])]
    shown = "".join("".join(data.get("text/html", "")) for data in outputs)
    opened = re.sub(r"<details.*?</details>", "", shown, flags=re.DOTALL)
    for row in re.findall(r"<tr.*?</tr>", opened, re.DOTALL):
        assert len(re.findall(r"<t[hd]\b", row)) <= 7, row
