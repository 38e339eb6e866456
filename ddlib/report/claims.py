"""Every claim of the five papers in one place: what is printed, what our kept records say, and the verdict.

`claims.yaml` names the claims. Accuracies are selected from `published.csv`, where they stand once; other figures
(a factor, a correlation) are written there. Nothing is trained here. The verdict is `verdict`'s: an accuracy is
answered by the run nearest to the claim's setting, whatever it scores, and a factor only by what was measured there.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import yaml

from ..config import resolve
from ..core import DDError, choose
from ..engine.record import Run
from ..files import results_folder
from ..methods.coreset import KINDS
from ..studies.architecture_search import correlations
from . import tables, verdict
from .verdict import DEFAULT_COUNT, VERDICTS, Differences, Published, Verdict

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KEPT = (
    "paper",
    "small",
)  # the profiles whose records are kept, the better first; smoke's are made anew everywhere
NEEDED = {"paper", "where", "labels", "spread", "reason"}
FIGURE = {
    "method",
    "dataset",
    "network",
    "quantity",
    "unit",
    "value",
}  # of a claim that selects nothing
ALLOWED = (
    NEEDED
    | FIGURE
    | {"select", "ipc", "evidence", "measured", "overrides", "extra", "sense", "setting"}
)
COLUMNS = [
    "paper",
    "where",
    "quantity",
    "unit",
    "method",
    "variant",
    "dataset",
    "ipc",
    "network",
    "network_eval",
    "protocol",
    "labels",
    "value",
    "printed",
    "marked",
    "spread",
    "spread_means",
    "evidence",
    "note",
    "measured",
    "overrides",
    "extra",
    "sense",
    "setting",
    "reason",
]
NOTHING = {
    "ours": math.nan,
    "pooled": math.nan,
    "records": (),
    "verdict": "not attempted",
    "kind": "not attempted",
    "cost": "",
}  # the answer to a claim that no record has a figure for
SAME = ["profile", "dataset", "overrides"]  # of the seeds of one setting
STUDY = re.compile(r"-(?P<place>\w+)-ipc(?P<ipc>\d+)-\w+$")  # the name of a study's file
PRESET = re.compile(r"(?P<method>\w+)-(?P<dataset>\w+)-ipc(?P<ipc>\d+)-paper-seed(?P<seed>\d+)-")
CHANGES = {
    "protocol",
    "epochs",
    "augment",
    "hard",
}  # what a transfer may change besides the backbone


@cache
def _document() -> dict[str, Any]:
    return yaml.safe_load(Path(__file__).with_name("claims.yaml").read_text())


def papers() -> dict[str, dict[str, str]]:
    """arXiv id -> title, venue, the version read, and the method's page in docs/methods."""
    return _document()["papers"]


def load() -> pd.DataFrame:
    """One row a claim (`COLUMNS`); raises `DDError` naming a key, paper or selector that `claims.yaml` has wrong."""
    document = _document()
    return pd.DataFrame(
        [
            row
            for number, claim in enumerate(document["claims"], 1)
            for row in _expand(claim, document, f"claim {number} of claims.yaml")
        ],
        columns=COLUMNS,
    )


def _expand(claim: dict[str, Any], document: dict[str, Any], name: str) -> list[dict[str, Any]]:
    for key in claim:
        choose(f"key in {name}", key, sorted(ALLOWED))
    if missing := sorted((NEEDED | (set() if "select" in claim else FIGURE)) - claim.keys()):
        raise DDError(f"{name} lacks {', '.join(missing)}")
    choose(f"paper in {name}", claim["paper"], document["papers"])
    common = dict.fromkeys(("extra", "evidence", "note", "variant", "protocol", "sense"), "")
    common |= {"measured": None, "overrides": None, "setting": None}
    if "sense" in claim:
        choose(f"sense in {name}", claim["sense"], verdict.SENSES)
    common |= {key: value for key, value in claim.items() if key != "select"}
    common |= {
        "spread_means": document["spreads"].get(claim["spread"], claim["spread"]),
        "spread": float("nan"),
        "reason": document["reasons"].get(claim["reason"], claim["reason"]),
    }
    if "select" not in claim:
        known = claim["value"] != "unknown"
        return [
            common
            | {
                "network_eval": claim["network"],
                "ipc": claim.get("ipc", float("nan")),
                "printed": str(claim["value"]),
                "marked": str(claim["value"]) + tables.mark(common["evidence"]),
                "value": float(claim["value"]) if known else float("nan"),
            }
        ]
    rows = tables.published()
    rows = rows.fillna({"variant": "", "note": ""})
    for key, wanted in ({"paper": claim["paper"]} | claim["select"]).items():
        rows = rows[
            rows[choose(f"selector in {name}", key, sorted(rows))].isin(
                wanted if isinstance(wanted, list) else [wanted]
            )
        ]
    if rows.empty:
        raise DDError(f"{name} selects no row of published.csv: {claim['select']}")
    return [common | _row(row) for row in rows.itertuples()]


def _row(row: Any) -> dict[str, Any]:
    """A row of published.csv as a claim has it."""
    printed = f"{row.value:.1f}" if round(row.value, 1) == row.value else f"{row.value:g}"
    return {
        "quantity": "accuracy",
        "unit": "%",
        "method": row.method,
        "variant": row.variant,
        "dataset": row.dataset,
        "ipc": row.ipc,
        "network": row.backbone,
        "network_eval": row.backbone_eval,
        "protocol": row.protocol,
        "value": row.value,
        "printed": printed,
        "marked": printed + tables.mark(row.verified),
        "spread": row.spread,
        "evidence": row.verified,
        "note": row.note,
    }


def from_memory() -> str:
    """How many printed figures are quoted from memory, in a sentence; tables mark them with `*`."""
    rows, loaded = tables.recalled(), load()
    others = loaded[loaded.protocol.eq("") & loaded.evidence.str.startswith("RECALLED")]
    return (
        f"{len(rows)} of the {len(tables.published())} published accuracies, and {len(others)} other claims, are "
        "quoted from memory and not yet seen in print; tables mark them with *."
    )


def of_method(method: str) -> pd.DataFrame:
    """The accuracies that papers print for a method on its own backbone, in the form of `load`, for `judge`."""
    rows = tables.published()
    rows = rows[
        (rows.method == method)
        & (rows.backbone == rows.backbone_eval)
        & rows.variant.isna()
        & (rows.metric == "accuracy")
        & (rows.protocol != "dc-bench average")
    ]
    first = rows[~rows.table.isin(["leaderboard", "second-hand"])]
    rows = (
        (rows if first.empty else first)
        .drop_duplicates(["dataset", "ipc", "protocol"])
        .fillna({"variant": ""})
    )
    rows = rows.assign(place=rows.dataset.map(list(rows.dataset.unique()).index)).sort_values(
        ["place", "ipc"]
    )
    common = {"overrides": None, "extra": "", "reason": "no run yet", "measured": None}
    return pd.DataFrame(
        [
            common | _row(row) | {"paper": row.paper, "where": row.table}
            for row in rows.itertuples()
        ],
        columns=COLUMNS,
    )


def judge(
    claims: pd.DataFrame,
    results: str | Path | None = None,
    predict: Callable[[pd.Series], str] | None = None,
) -> pd.DataFrame:
    """The claims with `ours`, `pooled` (spread over networks and seeds), `records`, `verdict`, `kind` and `cost`.

    `verdict` says what differs; `kind` is its class, a key of `VERDICTS`. Only records of the kept profiles count
    (`KEPT`). predict: what a claim that no record answers would cost, as text for `cost`.
    """
    kept = Kept(results)
    rows = []
    for _, claim in claims.iterrows():
        answer = NOTHING | (_answer(claim, kept) or {})
        if predict and answer["kind"] == "not attempted":
            answer["cost"] = predict(claim)
        rows.append(answer)
    answers = pd.DataFrame(rows, columns=list(NOTHING))
    return pd.concat([claims.reset_index(drop=True), answers], axis=1)


class Kept:
    """The kept records: the folder, the table of runs and the path of each by its name."""

    def __init__(self, results: str | Path | None) -> None:
        found = [run for profile in KEPT for run in tables.stored(results, profile)]
        self.folder = results_folder(results)
        self.table = tables.runs(found)
        self.paths = {run.path.stem: run.path for run in found}


def _answer(claim: pd.Series, kept: Kept) -> dict[str, Any] | None:
    if pd.isna(claim.value):
        return None
    if isinstance(claim.measured, dict):
        return _from_files(claim, kept)
    return _from_runs(claim, kept) if claim.quantity == "accuracy" else None


def _from_runs(claim: pd.Series, kept: Kept) -> dict[str, Any] | None:
    """The answer of the run nearest to the claim's setting, which is the paper's with what the claim itself changes.

    A run must have what the claim changes; a variant that no overrides, `extra` or iteration describe has no runs.
    """
    rows = kept.table
    rows = rows[(rows.method == claim.method) & (rows.data == claim.dataset)]
    rows = rows[rows.ipc == claim.ipc]
    iteration = claim.variant.rpartition("iteration=")[2] if "iteration=" in claim.variant else ""
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
    groups = [(row, verdict.differences(row["values"], settings)) for _, row in _summary(rows)]
    if not groups:
        return None
    row, differs = min(groups, key=lambda pair: tables.nearness(pair[1], pair[0].networks))
    figure = Published(claim.value, claim.spread, tables.NETWORKS.get(claim.paper, DEFAULT_COUNT))
    lead = tables.lead(figure, row, kept.table)
    found = verdict.accuracy(row.scores, figure, differs, lead, row.marks)
    return _told(found) | {
        "ours": row.accuracy,
        "pooled": row.pooled if row.networks > 1 else math.nan,
        "records": tuple(rows.name[rows[SAME].eq(row[SAME]).all(axis=1)]),
        "cost": f"{row.distill:.0f} s distillation and {row.evaluate:.0f} s evaluation per run, "
        f"{row['peak MiB']} MiB, {row.device}",
    }


def _summary(rows: pd.DataFrame) -> Iterable[tuple[Any, pd.Series]]:
    return tables.summary(rows).iterrows() if len(rows) else ()


def _told(found: Verdict) -> dict[str, Any]:
    return {"kind": found.word, "verdict": str(found)}


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
    """The runs with the score that the claim is about: the last one, one on the way, another predictor or backbone."""

    def score(name: str) -> dict[str, Any] | None:
        record = Run(paths[name]).record
        if claim.network_eval != claim.network:
            path = paths[name].with_suffix(".transfer.json")
            others = json.loads(path.read_text()).values() if path.is_file() else ()
            same = (e for e in others if e["backbone"] == claim.network_eval)
            return next((e for e in same if not CHANGES & e.keys()), None)
        if iteration:
            steps = record["evaluations"]
            return next((e for e in steps if e["step"] == int(iteration)), None)
        last = record["accuracy"]["last"]
        return last.get(claim.extra) if claim.extra else last

    scores = [score(name) for name in rows.name]
    rows = rows.loc[[found is not None for found in scores]].copy()
    scores = [found for found in scores if found is not None]
    for column, key in (("accuracy", "mean"), ("std", "std"), ("networks", "networks")):
        rows[column] = [found[key] for found in scores]
    rows["values"] = [
        values
        | {"networks": len(found["networks"])}
        | ({"iterations": int(iteration)} if iteration else {})
        for values, found in zip(rows["values"], scores, strict=True)
    ]
    return rows


def _from_files(claim: pd.Series, kept: Kept) -> dict[str, Any] | None:
    """The answer of the rows that `measured` names, the paper profile's first; None where no record has the figure."""
    how = claim.measured
    for rows in _sources(claim, kept):
        figures = correlations(rows) if how.get("ranks") and _ranked(how, rows) else rows
        ours = _figure_of(how, figures)
        if math.isnan(ours):
            continue
        used = rows if how.get("ranks") else _asked(how, rows)
        elsewhere = _elsewhere(claim, used)
        if claim.unit == "%" and not elsewhere:
            scores = [[value] for value in _where(figures, how["of"])[how["field"]]]
            figure = Published(claim.value, claim.spread)
            found = verdict.accuracy(scores, figure, Differences())
        else:
            found = verdict.factor(ours, claim.printed, claim.sense, elsewhere)
        return _told(found) | {"ours": ours, "records": tuple(dict.fromkeys(used.file))}
    return None


def _sources(claim: pd.Series, kept: Kept) -> Iterable[pd.DataFrame]:
    """The rows to look in, with `file` and, of a study, its dataset, IPC, options and whether its run is the paper's."""
    pattern = claim.measured["from"]
    if pattern == "runs":
        rows = kept.table
        plain = [not _differing(row) for _, row in rows.iterrows()]
        yield from (
            part.assign(dataset=part["data"], file=part.name, plain=True)
            for _, part in rows.loc[plain].groupby("device", sort=False)
        )
        return
    for place in [""] if pattern.startswith("bench/") else KEPT:
        rows = []
        for path in sorted((kept.folder / place).glob(pattern)):
            record = json.loads(path.read_text())
            facts = {"plain": True} if isinstance(record, list) else _study(path, record, kept)
            facts |= {"file": str(path.relative_to(kept.folder))}
            own = record if isinstance(record, list) else record["rows"]
            rows += [facts | row for row in own]
        yield pd.DataFrame(rows)


def _study(path: Path, record: dict[str, Any], kept: Kept) -> dict[str, Any]:
    """What a study's rows share: dataset, IPC, its options, and `plain`, whether its run is one at the paper's setting."""
    name = record.get("run", "")
    parts = STUDY.search(path.stem)
    facts = {"dataset": parts["place"], "ipc": int(parts["ipc"])} if parts else {}
    row = kept.table[kept.table.name == name]
    if len(row):
        facts["dataset"] = row.iloc[0]["data"]
        plain = not _differing(row.iloc[0])
    else:
        preset = PRESET.match(name)
        plain = bool(preset) and _preset_name(**preset.groupdict()) == name
    return facts | record.get("options", {}) | {"plain": plain}


def _preset_name(method: str, dataset: str, ipc: str, seed: str) -> str:
    try:
        return resolve(method, dataset, int(ipc), "paper", int(seed)).name
    except DDError:
        return ""


def _differing(row: pd.Series) -> bool:
    """Whether a run is not at the paper's setting, or on unknown data."""
    settings = tables.paper_settings(row.method, row["data"], row.ipc) if row["data"] else None
    if settings is None:
        return True
    differs = verdict.differences(row["values"], settings)
    return bool(differs.less or differs.changed)


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


def _ranked(how: dict[str, Any], rows: pd.DataFrame) -> bool:
    return len(rows) > 0 and {"whole", how["of"]["proxy"]} <= set(rows.proxy)


def _where(rows: pd.DataFrame, conditions: dict[str, Any]) -> pd.DataFrame:
    for key, value in conditions.items():
        rows = rows[rows[key] == value] if key in rows else rows.iloc[:0]
    return rows


def _asked(how: dict[str, Any], rows: pd.DataFrame) -> pd.DataFrame:
    return pd.concat([_where(rows, how[key]) for key in ("of", "over", "minus") if key in how])


def _figure_of(how: dict[str, Any], rows: pd.DataFrame) -> float:
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


def counts(judged: pd.DataFrame) -> pd.DataFrame:
    """How many claims of each paper ended in which verdict, and how many there are."""
    table = pd.crosstab(judged.paper, judged.kind).reindex(
        index=papers(), columns=list(VERDICTS), fill_value=0
    )
    table.insert(0, "claims", table.sum(axis=1))
    return table.rename_axis(columns=None).reset_index()


def shown(judged: pd.DataFrame) -> pd.DataFrame:
    """The claims as a reader sees them, a line each, figures as text. What a table's claims share is in `groups`."""
    arrow = [
        n if n == e else f"{n} → {e}"
        for n, e in zip(judged.network, judged.network_eval, strict=True)
    ]
    what = [
        " ".join(filter(None, (m, v and f"({v})", "" if q == "accuracy" else q)))
        for m, v, q in zip(judged.method, judged.variant, judged.quantity, strict=True)
    ]
    return pd.DataFrame(
        {
            "where": judged["where"],
            "what": what,
            "dataset": judged.dataset,
            "IPC": ["" if pd.isna(ipc) else f"{ipc:.0f}" for ipc in judged.ipc],
            "network": arrow,
            "paper": [
                _figure(row.printed, row.spread, row.unit, tables.mark(row.evidence))
                for row in judged.itertuples()
            ],
            "evidence": judged.evidence,
            "ours": [_ours(row) for row in judged.itertuples()],
            "verdict": judged.verdict,
            "records": judged.records.map("; ".join),
            "cost": judged.cost,
        }
    )


def groups(judged: pd.DataFrame) -> pd.DataFrame:
    """One row a table or figure: what its claims share (labels, what its ± means), how many ended how, and why not."""
    rows = []
    for (paper, where), part in judged.groupby(["paper", "where"], sort=False):
        rows.append(
            {
                "paper": paper,
                "table or figure": where,
                "labels": ", ".join(dict.fromkeys(part.labels)),
                "± of the paper": "; ".join(dict.fromkeys(part.spread_means)),
                "claims": len(part),
                **part.kind.value_counts().reindex(list(VERDICTS), fill_value=0),
                "why not attempted": "; ".join(
                    dict.fromkeys(part.reason[part.kind == "not attempted"])
                ),
            }
        )
    return pd.DataFrame(rows)


def _figure(text: str, spread: float, unit: str, mark: str = "") -> str:
    shown = (text if pd.isna(spread) else f"{text} ± {spread:.1f}") + mark
    return f"{shown} {unit}" if unit and text != "unknown" else shown


def _ours(row: Any) -> str:
    if pd.isna(row.ours):
        return ""
    digits = 1 if row.unit == "%" else max(2, len(row.printed.partition(".")[2]))
    return _figure(f"{row.ours:.{digits}f}", row.pooled, row.unit)


def figure(judged: pd.DataFrame, title: str = "Claims of the five papers by verdict") -> Figure:
    """The counts as one bar a paper, and the number of claims in every part."""
    import matplotlib.pyplot as plt

    table, left = counts(judged), 0
    names = [papers()[paper]["title"].partition(":")[0] for paper in table.paper]
    drawn, axis = plt.subplots(figsize=(8, 3), layout="constrained")
    for kind, colour in VERDICTS.items():
        bars = axis.barh(names, table[kind], left=left, color=colour, label=kind, edgecolor="white")
        axis.bar_label(
            bars, [str(n) if n else "" for n in table[kind]], label_type="center", fontsize=8
        )
        left = left + table[kind]
    axis.invert_yaxis()
    axis.set(xlabel="claims (one a figure of a table)", title=title)
    drawn.legend(loc="outside lower center", ncols=len(VERDICTS), fontsize=8, frameon=False)
    return drawn
