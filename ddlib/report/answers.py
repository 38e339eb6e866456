"""What the kept records say to a claim: the run nearest to its setting, or the measurements that it names."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from ..config import resolve
from ..core import DDError
from ..engine.record import Run
from ..files import read_json, read_rows, results_folder
from ..methods.coreset import KINDS
from ..studies.architecture_search import correlations
from . import tables, verdict
from .verdict import DEFAULT_COUNT, Differences, Published, Verdict

# The profiles whose records are kept, the better first; smoke's are made anew everywhere.
KEPT = ("paper", "small")
STUDY = re.compile(r"-(?P<place>\w+)-ipc(?P<ipc>\d+)-\w+$")  # the name of a study's file
PRESET = re.compile(r"(?P<method>\w+)-(?P<dataset>\w+)-ipc(?P<ipc>\d+)-paper-seed(?P<seed>\d+)-")


NOTHING = Verdict("not attempted")


@dataclass(frozen=True)
class Answer:
    """Our figure, its spread over networks and seeds, the records that it comes from, the verdict and the cost."""

    ours: float = math.nan
    pooled: float = math.nan
    records: tuple[str, ...] = ()
    verdict: Verdict = NOTHING
    cost: str = ""


class Kept:
    """The kept records: the folder, the table of runs and the path of each by its name."""

    def __init__(self, results: str | Path | None) -> None:
        found = [run for profile in KEPT for run in tables.stored(results, profile)]
        self.folder = results_folder(results)
        self.table = tables.runs(found)
        self.paths = {run.path.stem: run.path for run in found}


def answer(claim: pd.Series, kept: Kept) -> Answer:
    """The answer to one row of `claims.load`; "not attempted" where no record has a figure for it."""
    found = None
    if isinstance(claim.measured, dict):
        found = _from_files(claim, kept)
    elif claim.quantity == "accuracy" and not pd.isna(claim.value):
        found = _from_runs(claim, kept)
    return found or Answer()


# --- accuracies of runs


def _from_runs(claim: pd.Series, kept: Kept) -> Answer | None:
    """The answer of the run nearest to the claim's setting, which is the paper's with what the claim itself changes.

    A run must have what the claim changes; a variant that no overrides, `extra` or iteration describe has no runs. The
    images that a method begins with answer for its iteration 0 alone.
    """
    rows = kept.table
    rows = rows[(rows.method == claim.method) & (rows.data == claim.dataset)]
    rows = rows[rows.ipc == claim.ipc]
    iteration = claim.variant.rpartition("iteration=")[2] if "iteration=" in claim.variant else ""
    rows = rows if iteration else tables.made(rows)
    named = claim.overrides is not None or claim.extra or iteration
    if rows.empty or (claim.variant and not named):
        return None
    changes = _changes(claim)
    settings = tables.paper_settings(claim.method, claim.dataset, int(claim.ipc), **changes)
    if settings is None:
        return None
    if iteration:  # in a copy: the paper's settings are kept for other claims
        settings = settings | {"iterations": int(iteration)}
    same = [all(values[key] == settings[key] for key in changes) for values in rows["values"]]
    rows = _scored(claim, rows.loc[same], iteration, kept.paths)
    if rows.empty:
        return None
    groups = [row for _, row in tables.summary(rows).iterrows()]
    differs = [verdict.differences(row["values"], settings) for row in groups]
    nearest = min(range(len(groups)), key=lambda k: tables.nearness(differs[k], groups[k]))
    row = groups[nearest]
    figure = Published(claim.value, claim.spread, tables.NETWORKS.get(claim.paper, DEFAULT_COUNT))
    lead = tables.lead(figure, row, kept.table)
    seeds = ["profile", "dataset", "overrides"]  # what the seeds of one setting share
    return Answer(
        row.accuracy,
        row.pooled if row.networks > 1 else math.nan,
        tuple(rows.name[rows[seeds].eq(row[seeds]).all(axis=1)]),
        verdict.accuracy(row.scores, figure, differs[nearest], lead, row.marks),
        f"{row.distill:.0f} s distillation and {row.evaluate:.0f} s evaluation per run, "
        f"{row['peak MiB']} MiB, {row.device}",
    )


def _changes(claim: pd.Series) -> dict[str, Any]:
    """The settings that the claim itself changes of the paper's: a variant's, a network's, a coreset's protocol."""
    changes = dict(claim.overrides or {})
    preset = tables.paper_settings(claim.method, claim.dataset, int(claim.ipc))
    own = (preset and preset["backbone"], claim.method)  # "frepo" is FRePo's own
    if claim.network.partition(":depth=")[0] not in own:
        changes["backbone"] = claim.network
    if claim.method in KINDS:
        changes["protocol"] = claim.protocol
    return changes


def _scored(
    claim: pd.Series, rows: pd.DataFrame, iteration: str, paths: dict[str, Path]
) -> pd.DataFrame:
    """The runs that have the score that the claim is about, with it and with what it was taken at."""
    scores = [_score(claim, paths[name], iteration) for name in rows.name]
    rows = rows.loc[[score is not None for score in scores]].copy()
    scores = [score for score in scores if score is not None]
    for column, key in (("accuracy", "mean"), ("std", "std"), ("networks", "networks")):
        rows[column] = [score[key] for score in scores]
    taken = {"iterations": int(iteration)} if iteration else {}
    rows["values"] = [
        values | taken | {"networks": len(networks)}
        for values, networks in zip(rows["values"], rows.networks, strict=True)
    ]
    return rows


def _score(claim: pd.Series, path: Path, iteration: str) -> dict[str, Any] | None:
    """The last score of a record, or one on the way, of another predictor or on another backbone, as the claim asks."""
    if claim.network_eval != claim.network:
        others = tables.on_other_networks(path)
        return next((e for e in others if e["backbone"] == claim.network_eval), None)
    record = Run(path).record
    if iteration:
        return next((e for e in record["evaluations"] if e["step"] == int(iteration)), None)
    last = record["accuracy"]["last"]
    return last.get(claim.extra) if claim.extra else last


# --- measurements: bench rows, studies, the costs of runs


def _from_files(claim: pd.Series, kept: Kept) -> Answer | None:
    """The answer of the rows that `measured` names, the paper profile's first; None where no record has the figure."""
    how = claim.measured
    for rows in _sources(how["from"], kept):
        used = _chosen(how, rows)
        figures = correlations(rows) if how.get("ranks") and len(used) else rows
        ours = _figure(how, figures)
        if math.isnan(ours):
            continue
        marks = tuple(dict.fromkeys(mark for given in used.marks for mark in given))
        elsewhere = _elsewhere(claim, used)
        if claim.unit == "%" and not elsewhere:
            scores = [[value] for value in _where(figures, how["of"])[how["field"]]]
            published = Published(claim.value, claim.spread)
            found = verdict.accuracy(scores, published, Differences(), marks=marks)
        else:
            found = verdict.factor(ours, claim.printed, claim.sense, elsewhere, marks)
        return Answer(ours, records=tuple(dict.fromkeys(used.file)), verdict=found)
    return None


def _sources(pattern: str, kept: Kept) -> Iterable[pd.DataFrame]:
    """Tables to look in, the best first. Each row has `file`, `marks` and `plain`, whether its run is at the paper's
    setting; a study's rows have its dataset, IPC and options too."""
    if pattern == "runs":
        rows = kept.table
        rows = rows.loc[[_at_the_papers(row) for _, row in rows.iterrows()]]
        for _, machine in rows.groupby("device", sort=False):
            yield machine.assign(dataset=machine["data"], file=machine.name, plain=True)
    elif pattern.startswith("bench/"):
        paths = sorted(kept.folder.glob(pattern))
        files = {path: read_rows(path, "benchmark", "run it again") for path in paths}
        facts = {"marks": (), "plain": True}
        yield _table(kept, {path: (facts, rows) for path, rows in files.items()})
    else:
        for profile in KEPT:
            files = sorted((kept.folder / profile).glob(pattern))
            yield _table(kept, {path: _study(path, kept) for path in files})


def _table(kept: Kept, files: dict[Path, tuple[dict, list[dict]]]) -> pd.DataFrame:
    return pd.DataFrame(
        [
            facts | row | {"file": str(path.relative_to(kept.folder))}
            for path, (facts, rows) in files.items()
            for row in rows
        ]
    )


def _study(path: Path, kept: Kept) -> tuple[dict[str, Any], list[dict]]:
    """What the rows of a study share, and the rows. Its data are those of the kept run that it studied, else what its
    name says, which is a folder's for a folder."""
    record = read_json(path, "study", "delete it and run again")
    parts, name = STUDY.search(path.stem), record.get("run", "")
    facts = {"dataset": parts["place"], "ipc": int(parts["ipc"])} if parts else {}
    facts |= {"marks": (), "plain": _is_preset(name)} | record.get("options", {})
    for _, run in kept.table[kept.table.name == name].iterrows():
        facts |= {"dataset": run["data"], "marks": run.marks, "plain": _at_the_papers(run)}
    return facts, record["rows"]


def _is_preset(name: str) -> bool:
    """Whether this is the name of a run at the paper's setting on a dataset that is no folder."""
    parts = PRESET.match(name)
    if not parts:
        return False
    try:
        spec = resolve(
            parts["method"], parts["dataset"], int(parts["ipc"]), "paper", int(parts["seed"])
        )
    except DDError:
        return False
    return spec.name == name


def _at_the_papers(row: pd.Series) -> bool:
    """Whether a run is at the paper's setting, on data that are known."""
    settings = tables.paper_settings(row.method, row["data"], row.ipc) if row["data"] else None
    if settings is None:
        return False
    differs = verdict.differences(row["values"], settings)
    return not differs.less and not differs.changed


def _elsewhere(claim: pd.Series, rows: pd.DataFrame) -> str:
    """In what the rows are not at the claim's `setting`, by default its dataset and IPC; "" for a claim that has text
    alone, which holds at any setting."""
    setting = {key: value for key, value in (claim.setting or {}).items() if key != "text"}
    if claim.setting is None:
        setting = {"dataset": claim.dataset} | ({} if pd.isna(claim.ipc) else {"ipc": claim.ipc})
    parts = []
    for key, wanted in setting.items():
        values = set(rows[key].dropna()) if key in rows else set()
        if values != {wanted}:
            found = ", ".join(map(str, sorted(values, key=str))) or "unknown"
            parts.append(f"{key} {found} for {wanted}")
    if setting and not rows.plain.all():
        parts.append("a run that is not the paper's")
    return "; ".join(parts)


def _chosen(how: dict[str, Any], rows: pd.DataFrame) -> pd.DataFrame:
    """The rows that a figure is made of; of rank correlations all, if the networks that they compare are there."""
    if how.get("ranks"):
        whole = len(rows) > 0 and {"whole", how["of"]["proxy"]} <= set(rows.proxy)
        return rows if whole else rows.iloc[:0]
    return pd.concat([_where(rows, how[key]) for key in ("of", "over", "minus") if key in how])


def _where(rows: pd.DataFrame, conditions: dict[str, Any]) -> pd.DataFrame:
    for key, value in conditions.items():
        rows = rows[rows[key] == value] if key in rows else rows.iloc[:0]
    return rows


def _figure(how: dict[str, Any], rows: pd.DataFrame) -> float:
    """The mean field of the rows `of`, divided by that of the rows `over` or less that of the rows `minus`."""
    fields = [how["field"]] if isinstance(how["field"], str) else how["field"]  # several: the sum

    def mean(conditions: dict[str, Any]) -> float:
        chosen = _where(rows, conditions)
        if chosen.empty or not set(fields) <= set(chosen):
            return math.nan
        return float(chosen[fields].sum(axis=1, skipna=False).mean())

    ours = mean(how["of"])
    if "over" in how:
        return ours / mean(how["over"])
    return ours - mean(how["minus"]) if "minus" in how else ours
