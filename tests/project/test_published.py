"""The papers' numbers as data: well formed, each with its source, and in agreement with what is printed elsewhere.

No cell is typed again here. What is tested are relations between cells: sums that the papers state in words, the same
set scored in two tables, more images doing no harm, and nothing far above the whole training set.
"""

import re
from pathlib import Path

import pandas as pd
import pytest

import ddlib
from ddlib.report import tables

COLUMNS = [
    "paper",
    "method",
    "variant",
    "table",
    "dataset",
    "ipc",
    "backbone",
    "backbone_eval",
    "protocol",
    "metric",
    "value",
    "spread",
    "verified",
    "note",
]
CORESETS = {"random", "herding", "kcenter", "kmeans", "forgetting"}
OURS = {"dc", "dsa", "idc", "dm", "mtt", "tesla", "ftd", "datm", "frepo", "dream", "dream_plus"}
LATER = {"cafe", "pp", "rcig", "idm", "rded", "dance", "ncfm"}  # printed beside them, not built
DATASETS = {
    "mnist",
    "fashionmnist",
    "svhn",
    "cifar10",
    "cifar100",
    "tinyimagenet",
    "imagenet1k",
    "imagenette",
    "imagewoof",
    "imagefruit",
    "imagemeow",
    "imagesquawk",
    "imageyellow",
    "cub200",
    "imagenet10",
    "imagenet100",
}
PROTOCOLS = {
    "dc",
    "dsa",
    "dc-bench best",
    "dc-bench average",
    "mtt",
    "tesla",
    "ftd",
    "datm",
    "frepo",
    "idc",
    "rded",
    "ncfm",
    "unknown",
}
EVIDENCE = {
    "V-paper",
    "V-readme",
    "V-2nd",
    "V-fig",
    "V-issue",
    "RECALLED",
    "RECALLED high",
    "RECALLED med-high",
    "RECALLED med",
    "RECALLED low",
}


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    path = Path(ddlib.__file__).with_name("report") / "published.csv"
    return pd.read_csv(
        path,
        dtype={"paper": str},
        keep_default_na=False,
        na_values={"ipc": "", "spread": ""},
    )


@pytest.fixture(scope="module")
def own(table) -> pd.DataFrame:
    """The rows on the network that the images were made on, in the method's plain form, by its own authors' table."""
    plain = (table.backbone == table.backbone_eval) & (table.variant == "")
    return table[plain & ~table.table.isin(["leaderboard", "second-hand"])]


def test_columns_and_words(table):
    assert list(table.columns) == COLUMNS
    for column, allowed in (
        ("method", CORESETS | OURS | LATER | {"full"}),
        ("dataset", DATASETS),
        ("protocol", PROTOCOLS),
        ("verified", EVIDENCE),
        ("metric", {"accuracy", "transfer accuracy"}),
    ):
        assert set(table[column]) <= allowed, f"{column}: {set(table[column]) - allowed}"
    assert table.paper.map(lambda paper: bool(re.fullmatch(r"\d{4}\.\d{5}", paper))).all()
    for column in ("table", "backbone", "backbone_eval"):
        assert (table[column] != "").all(), column


def test_one_row_a_cell(table):
    key = [c for c in COLUMNS if c not in ("value", "spread", "verified", "note")]
    twice = table[table.duplicated(key, keep=False)]
    assert twice.empty, twice[key].to_string()


def test_numbers_are_accuracies(table):
    assert table.value.between(0, 100, inclusive="neither").all()
    assert table.spread.dropna().between(0, 6).all()
    assert table.ipc.isna().equals(
        table.method == "full"
    )  # the whole training set has no images per class
    assert (table.ipc.dropna() >= 1).all() and (table.ipc.dropna() % 1 == 0).all()


def test_what_was_read_in_another_paper_says_where(table):
    source = re.compile(
        r"read in|prints?\b|printed by|over evaluation aug|mean over|by subtraction"
    )
    silent = table[(table.verified == "V-2nd") & ~table.note.str.contains(source)]
    assert silent.empty, silent.to_string()


def test_few_rows_are_from_memory_and_every_table_marks_them(table):
    rows = tables.recalled()
    assert set(rows.verified) == {tag for tag in table.verified if tag.startswith("RECALLED")}
    assert 0 < len(rows) <= 60, "look the new ones up before quoting more from memory"
    own = tables.own(tables.published())
    first = own[~own.table.isin(tables.REVIEWS) & own.ipc.notna()].drop_duplicates(
        ["method", "dataset", "ipc"]
    )
    ipcs = sorted(set(first.ipc.astype(int)))
    shown = tables.printed(set(first.method), set(first.dataset), ipcs).set_index(
        ["dataset", "ipc"]
    )
    for row in first.itertuples():
        cell = shown.loc[(row.dataset, int(row.ipc)), row.method]
        assert cell.endswith("*") == row.verified.startswith("RECALLED"), row
    assert tables._mark(tables.published()).eq("*").sum() == len(rows)


STATED = {  # gaps that the papers put in words, in points, and the cells of their tables that give them
    "FTD, section 4.2: over MTT at IPC 50 on CIFAR-10": (
        2.2,
        ("2211.11004", "Table 1", "ftd", "", "cifar10", 50),
        ("2211.11004", "Table 1", "mtt", "", "cifar10", 50),
    ),
    "FTD, section 4.2: over MTT at IPC 10 on CIFAR-100": (
        3.5,
        ("2211.11004", "Table 4", "ftd", "EMA", "cifar100", 10),
        ("2211.11004", "Table 1", "mtt", "", "cifar100", 10),
    ),
    "FTD, section 4.2: MTT+Robust Learning over MTT, CIFAR-10": (
        1.1,
        ("2211.11004", "Table 1", "mtt", "weight noise", "cifar10", 50),
        ("2211.11004", "Table 1", "mtt", "", "cifar10", 50),
    ),
    "FTD, section 4.2: MTT+Robust Learning over MTT, CIFAR-100": (
        0.2,
        ("2211.11004", "Table 1", "mtt", "weight noise", "cifar100", 50),
        ("2211.11004", "Table 1", "mtt", "", "cifar100", 50),
    ),
    "FTD, abstract: up to 4.7 %": (
        4.7,
        ("2211.11004", "Table 2", "ftd", "", "imagenette", 10),
        ("2211.11004", "Table 2", "mtt", "", "imagenette", 10),
    ),
    "TESLA, abstract: over the best before it": (
        18.2,
        ("2211.10586", "main table", "tesla", "", "imagenet1k", 50),
        ("2206.00719", "main table", "frepo", "", "imagenet1k", 2),
    ),
    "NCFM, section 5.2: over DM at IPC 1 on CIFAR-10": (
        23.5,
        ("2502.20653", "main table", "ncfm", "", "cifar10", 1),
        ("2110.04181", "Table 1", "dm", "", "cifar10", 1),
    ),
    "NCFM, section 5.2: over DM at IPC 1 on CIFAR-100": (
        23.0,
        ("2502.20653", "main table", "ncfm", "", "cifar100", 1),
        ("2110.04181", "Table 1", "dm", "", "cifar100", 1),
    ),
}


@pytest.mark.parametrize("sentence", STATED)
def test_the_cells_give_the_gaps_that_the_papers_state(table, sentence):
    gap, *cells = STATED[sentence]
    keys = table.set_index(["paper", "table", "method", "variant", "dataset", "ipc"]).value
    upper, lower = (keys.loc[cell] for cell in cells)
    assert float(upper) - float(lower) == pytest.approx(gap, abs=0.01)


def test_one_set_scores_alike_in_two_tables(own):
    """A cross-architecture table repeats the main one on its first network; MTT's was run again, 1.0 lower."""
    for key, cells in own.groupby(["paper", "method", "dataset", "ipc", "backbone", "protocol"]):
        assert cells.value.max() - cells.value.min() <= 1.0, f"{key}: {cells.value.tolist()}"


def test_later_papers_repeat_dc_and_cafe_where_ftd_quotes_them(table):
    """FTD's Table 3 quotes sets whose own row on the ConvNet stands in the main tables."""
    quoted = table[(table.paper == "2203.01531") & (table.table == "cross-architecture")]
    for row in quoted[quoted.backbone == quoted.backbone_eval].itertuples():
        main = table[
            (table.method == row.method)
            & (table.dataset == row.dataset)
            & (table.ipc == row.ipc)
            & table.table.isin(["readme", "main table"])
            & (table.variant == "")
        ]
        assert main.value.tolist() == [row.value], row


def test_more_images_do_no_harm(own):
    """A distilled set of more images scores no less, in every table; picked real images may."""
    for key, cells in own[own.method.isin(OURS | LATER | {"random"})].groupby(
        ["paper", "method", "table", "dataset", "backbone", "protocol"]
    ):
        scores = cells.sort_values("ipc").value
        assert scores.is_monotonic_increasing, f"{key}: {scores.tolist()}"


def test_distilled_images_beat_random_ones_of_dcs_protocol(own):
    """DC's protocol, without augmentation, is the lowest bar that random images have."""
    random = own[(own.method == "random") & (own.protocol == "dc")]
    bar = random.set_index(["dataset", "ipc"]).value
    rows = own[own.method.isin(OURS | LATER)]
    compared = 0
    for row in rows.itertuples():
        if (row.dataset, row.ipc) in bar.index:
            compared += 1
            assert row.value > bar.loc[(row.dataset, row.ipc)], row
    assert compared > 100


def test_nothing_is_far_above_the_whole_training_set(own):
    """On the same kind of network; DATM's largest sets are the only ones that claim to reach it."""
    whole = own[own.method == "full"].set_index(["dataset", "backbone"]).value
    rows = own[(own.method != "full") & (own.method != "datm") & (own.method != "rded")]
    for row in rows.itertuples():
        top = whole.get((row.dataset, row.backbone))
        assert top is None or row.value < top, row
