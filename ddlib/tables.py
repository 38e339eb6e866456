"""DataFrames from records and from the papers' published figures; nothing is trained here."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from statistics import fmean, pstdev

import pandas as pd

from .core import DDError
from .data import canonical
from .methods import METHODS
from .runs import Run, resolve_record, results_folder

COLUMNS = ["method", "dataset", "ipc", "profile", "backbone", "seed", "accuracy", "std", "best", "best_std",
           "networks", "seconds", "peak_bytes", "device", "name"]


def runs(found: Iterable[Run]) -> pd.DataFrame:
    """One row a run: last and best accuracy (per cent) with the spread over networks, seconds, peak bytes, device."""
    rows = []
    for run in found:
        record, last, best = run.record, run.record["accuracy"]["last"], run.record["accuracy"]["best"]
        rows.append({key: record[key] for key in COLUMNS if key in record} | {
            "accuracy": last["mean"], "std": last["std"], "best": best["mean"], "best_std": best["std"],
            "networks": last["networks"], "seconds": round(sum(record["seconds"].values()), 1)})
    return pd.DataFrame(rows, columns=COLUMNS)


def stored(results: str | Path | None = None, profile: str | None = None) -> list[Run]:
    """Every current run in the results folder, by name; a record of an older version of its method is left out."""
    found = [Run(path) for path in sorted(results_folder(results).glob(f"{profile or '*'}/*-seed*-????????.json"))]
    return [run for run in found if _current(run.record)]


def _current(record: dict) -> bool:
    try:
        return record["method"] in METHODS and resolve_record(record).name == record["name"]
    except (KeyError, DDError):
        return False


def summary(table: pd.DataFrame, by: tuple[str, ...] = ("dataset", "profile", "backbone", "ipc", "method")
            ) -> pd.DataFrame:
    """Mean over distillation seeds, with the two spreads apart and the papers' pooled one (all population, ddof 0).

    `over seeds` is the spread of the runs' means, `over networks` the mean spread inside a run, `pooled` the spread
    of all networks of all runs, which is what the papers print.
    """
    rows = []
    for key, group in table.groupby(list(by), sort=False):
        pooled = [score for scores in group["networks"] for score in scores]
        rows.append(dict(zip(by, key, strict=True)) | {
            "accuracy": fmean(group["accuracy"]), "over seeds": pstdev(group["accuracy"]),
            "over networks": fmean(group["std"]), "pooled": pstdev(pooled), "best": fmean(group["best"]),
            "seeds": len(group), "networks": len(pooled), "seconds": fmean(group["seconds"]),
            "peak MiB": round(group["peak_bytes"].max() / 2**20)})
    return pd.DataFrame(rows).sort_values(list(by), ignore_index=True) if rows else pd.DataFrame(columns=[*by])


@cache
def published() -> pd.DataFrame:
    """The papers' figures (`published.csv`): paper, table, method, dataset, IPC, networks, value, spread, evidence."""
    return pd.read_csv(Path(__file__).with_name("published.csv"), dtype={"paper": str})


def paper_value(method: str, dataset: str, ipc: int, protocol: str | None = None) -> tuple[float, float] | None:
    """The (value, spread) that a paper prints for a method on its own backbone, or None where none is on file."""
    table = published()
    rows = table[(table.method == method) & (table.dataset == canonical(dataset)) & (table.ipc == ipc)
                 & (table.backbone == table.backbone_eval) & (table.metric == "accuracy") & table.variant.isna()]
    rows = rows[rows.protocol == protocol] if protocol else rows
    return None if rows.empty else (float(rows.iloc[0].value), float(rows.iloc[0].spread))


def verdict(profile: str, ours: float, spread: float, paper: tuple[float, float] | None) -> str:
    """The rule fixed in advance: *reproduced* needs the paper's profile and 1 point, or the two intervals to meet."""
    if paper is None:
        return "no published figure"
    if profile != "paper":
        return "reduced budget"
    near = max(1.0, spread + (0.0 if math.isnan(paper[1]) else paper[1]))
    return "reproduced" if abs(ours - paper[0]) <= near else "not reproduced"


def compare(table: pd.DataFrame) -> pd.DataFrame:
    """The table of a paper's notebook: paper | ours | difference | verdict, one row a method, dataset and IPC."""
    rows = []
    for _, row in summary(table).iterrows():
        paper = paper_value(row.method, row.dataset, row.ipc, "dsa" if row.method == "random" else None)
        rows.append({"dataset": row.dataset, "ipc": row.ipc, "method": row.method, "profile": row.profile,
                     "paper": _with_spread(*paper) if paper else "none",
                     "ours": f"{row.accuracy:.1f} ± {row.pooled:.1f}",
                     "Δ": f"{row.accuracy - paper[0]:+.1f}" if paper else "",
                     "over seeds": round(row["over seeds"], 1), "over networks": round(row["over networks"], 1),
                     "best": round(row.best, 1), "networks": row.networks,
                     "verdict": verdict(row.profile, row.accuracy, row.pooled, paper)})
    return pd.DataFrame(rows)


def _with_spread(value: float, spread: float) -> str:
    return f"{value:.1f}" if math.isnan(spread) else f"{value:.1f} ± {spread:.1f}"


def to_json(table: pd.DataFrame) -> str:
    """The rows as a JSON list, for machines."""
    return json.dumps(json.loads(table.to_json(orient="records")), indent=1)
