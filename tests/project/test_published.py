"""The papers' numbers as data: well formed, and the headline rows as the papers print them."""

import re
from pathlib import Path

import pandas as pd
import pytest

import ddlib

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
METHODS = {
    "random",
    "herding",
    "kcenter",
    "kmeans",
    "forgetting",
    "dc",
    "dsa",
    "idc",
    "dm",
    "mtt",
    "tesla",
    "ftd",
    "datm",
    "frepo",
    "dream",
    "dream_plus",
    "full",
}
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
    path = Path(ddlib.__file__).parent / "report" / "published.csv"
    return pd.read_csv(
        path, dtype={"paper": str}, keep_default_na=False, na_values={"ipc": "", "spread": ""}
    )


def test_columns_and_words(table):
    assert list(table.columns) == COLUMNS
    for column, allowed in (
        ("method", METHODS),
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
    assert table.ipc.isna().equals(table.method == "full")  # the whole training set has no IPC
    assert (table.ipc.dropna() >= 1).all() and (table.ipc.dropna() % 1 == 0).all()


@pytest.mark.parametrize(
    ("method", "paper", "dataset", "values"),
    [
        ("dm", "2110.04181", "cifar10", {1: 26.0, 10: 48.9, 50: 63.0}),
        ("frepo", "2206.00719", "cifar10", {1: 46.8, 10: 65.5, 50: 71.7}),
        ("tesla", "2211.10586", "cifar10", {1: 48.5, 10: 66.4, 50: 72.6}),
        ("tesla", "2211.10586", "imagenet1k", {50: 27.9}),
        ("ftd", "2211.11004", "cifar10", {1: 46.8, 10: 66.6, 50: 73.8}),
        ("dream", "2302.14416", "cifar10", {1: 51.1, 10: 69.4, 50: 74.8}),
        ("mtt", "2203.11932", "cifar10", {1: 46.3, 10: 65.3, 50: 71.6}),
        ("idc", "2205.14959", "cifar10", {1: 50.6, 10: 67.5, 50: 74.5}),
        ("datm", "2310.05773", "cifar10", {1: 46.9, 10: 66.8, 50: 76.1, 500: 83.5, 1000: 85.5}),
    ],
)
def test_headline_rows(table, method, paper, dataset, values):
    rows = table[
        (table.method == method)
        & (table.paper == paper)
        & (table.dataset == dataset)
        & (table.variant == "")
        & (table.backbone == table.backbone_eval)
    ]
    for ipc, value in values.items():
        found = rows[rows.ipc == ipc]
        # the first is the paper's own table; later ones repeat it (a cross-architecture table) or change the network
        assert found.value.iloc[0] == value, found.to_string()


def test_random_is_kept_apart_by_protocol(table):
    rows = table[
        (table.method == "random") & (table.paper == "2110.04181") & (table.dataset == "cifar10")
    ]
    by = {
        protocol: dict(zip(group.ipc, group.value, strict=True))
        for protocol, group in rows.groupby("protocol")
    }
    assert {ipc: by["dc"][ipc] for ipc in (1, 10, 50)} == {1: 14.4, 10: 26.0, 50: 43.4}
    assert {ipc: by["dsa"][ipc] for ipc in (1, 10, 50)} == {1: 16.5, 10: 32.2, 50: 49.7}
