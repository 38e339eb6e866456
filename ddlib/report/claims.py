"""Every claim of the five papers in one place: what is printed, what our kept records say, and the verdict.

`claims.yaml` names the claims. Accuracies are selected from `published.csv`, where they stand once; other figures
(a factor, a correlation) are written there. Nothing is trained here. The verdict of an accuracy is `tables.verdict`.
A factor, a gap or a correlation has no points to be near by, so its rule, fixed in advance too, is: *reproduced* if
ours, taken at the paper's setting, rounds to the printed figure; *direction only* if it lies on the same side of "no
difference" (`NEUTRAL`); else *not reproduced*.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import yaml

from ..config import resolve
from ..core import DDError, choose
from ..data.dataset import canonical
from ..engine.record import Run
from ..files import results_folder
from ..methods.coreset import KINDS
from ..studies.architecture_search import correlations
from . import tables

if TYPE_CHECKING:
    from matplotlib.figure import Figure

VERDICTS = {
    "reproduced": "#117733",
    "reduced budget": "#56B4E9",
    "direction only": "#E69F00",
    "not reproduced": "#D55E00",
    "not attempted": "#BBBBBB",
}  # and their colours (Okabe and Ito, Tol)
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
NEUTRAL = {"times": 1.0, "AUC": 0.5}  # "no difference"; 0 in any other unit
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
        "spread": row.spread,
        "evidence": row.verified,
        "note": row.note,
    }


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
    common = {"overrides": None, "extra": "", "reason": "no run yet"}
    return pd.DataFrame(
        [
            common | _row(row) | {"paper": row.paper, "where": row.table}
            for row in rows.itertuples()
        ],
        columns=COLUMNS,
    )


def judge(claims: pd.DataFrame, results: str | Path | None = None) -> pd.DataFrame:
    """The claims with `ours`, `pooled` (spread over networks and seeds), `records`, `verdict`, `kind` and `cost`.

    `verdict` says in what a reduced budget is reduced; `kind` is its class, a key of `VERDICTS`. Only records of the
    kept profiles count (`KEPT`).
    """
    found = [run for profile in KEPT for run in tables.stored(results, profile)]
    table, paths = tables.runs(found), {run.path.stem: run.path for run in found}
    answers = [
        _answer(claim, table, paths, results_folder(results)) for _, claim in claims.iterrows()
    ]
    answers = pd.DataFrame(
        answers, columns=["ours", "pooled", "records", "verdict", "kind", "cost"]
    )
    return pd.concat([claims.reset_index(drop=True), answers], axis=1)


def _answer(
    claim: pd.Series, table: pd.DataFrame, paths: dict[str, Path], folder: Path
) -> dict[str, Any]:
    none = {
        "ours": float("nan"),
        "pooled": float("nan"),
        "records": (),
        "cost": "",
        "verdict": "not attempted",
        "kind": "not attempted",
    }
    if pd.isna(claim.value):
        return none
    if claim.quantity != "accuracy":
        measured = (
            _measured(claim.measured, table, folder) if isinstance(claim.measured, dict) else None
        )
        return none if measured is None else none | _judged(claim, *measured)
    rows = _scored(claim, _runs_of(claim, table), paths)
    if rows.empty:
        return none
    order = tables.summary(rows).assign(rank=lambda t: -t.profile.map(KEPT.index))
    order["plain"] = [
        tables.overriding(text) == set(filter(None, text.split(", "))) for text in order.overrides
    ]
    order = order.sort_values(
        ["rank", "plain", "iterations", "eval_epochs", "networks"], ascending=False
    )
    best = next(order.iterrows())[1].copy()
    rows = rows[
        (
            rows[["profile", "dataset", "overrides"]] == best[["profile", "dataset", "overrides"]]
        ).all(axis=1)
    ]
    if best.backbone == claim.network:  # the claim's own network falls short of nothing
        best["backbone"] = resolve(claim.method, claim.dataset, int(claim.ipc), "paper").values[
            "backbone"
        ]
    best["overrides"] = ""  # they are the claim's own
    less = tables.shortfall(best, "iteration=" in claim.variant)
    verdict = tables.verdict(
        best.profile, best.accuracy, best.pooled, (claim.value, claim.spread), less
    )
    return {
        "ours": best.accuracy,
        "pooled": best.pooled,
        "records": tuple(rows.name),
        "verdict": verdict,
        "kind": verdict.partition(":")[0],
        "cost": f"{best.distill:.0f} s distillation and {best.evaluate:.0f} s "
        f"evaluation a run, {best['peak MiB']} MiB, {best.device}",
    }


def _runs_of(claim: pd.Series, table: pd.DataFrame) -> pd.DataFrame:
    """The runs of the claim's method, dataset and IPC that change nothing but the budget and what the claim changes.

    A variant whose `overrides` are not given, and that no iteration or `extra` names, has no runs.
    """
    rows = table[
        (table.method == claim.method)
        & (table.dataset.map(canonical) == claim.dataset)
        & (table.ipc == claim.ipc)
    ]
    unnamed = (
        claim.variant
        and claim.overrides is None
        and not claim.extra
        and "iteration=" not in claim.variant
    )
    if rows.empty or unnamed:
        return rows.iloc[:0]
    return rows[[tables.overriding(text) == _wanted(claim) for text in rows.overrides]]


def _wanted(claim: pd.Series) -> set[str]:
    """The overrides of a run that answers the claim, "key=value" each."""
    preset, wanted = (
        resolve(claim.method, claim.dataset, int(claim.ipc), "paper").values,
        dict(claim.overrides or {}),
    )
    if claim.network.partition(":depth=")[0] not in (
        preset["backbone"],
        claim.method,
    ):  # "frepo" is FRePo's own
        wanted["backbone"] = claim.network
    if claim.method in KINDS and claim.protocol != preset["protocol"]:
        wanted["protocol"] = claim.protocol
    return {f"{key}={value}" for key, value in wanted.items()}


def _scored(claim: pd.Series, rows: pd.DataFrame, paths: dict[str, Path]) -> pd.DataFrame:
    """The runs with the score that the claim is about: the last one, one on the way, another predictor or backbone."""
    iteration = claim.variant.rpartition("iteration=")[2] if "iteration=" in claim.variant else ""

    def score(row: pd.Series) -> dict[str, Any] | None:
        record = Run(paths[row["name"]]).record
        if claim.network_eval != claim.network:
            path = paths[row["name"]].with_suffix(".transfer.json")
            kept = json.loads(path.read_text()).values() if path.is_file() else ()
            return next(
                (e for e in kept if e["backbone"] == claim.network_eval and not CHANGES & e.keys()),
                None,
            )
        if iteration:
            return next((e for e in record["evaluations"] if e["step"] == int(iteration)), None)
        return (
            record["accuracy"]["last"].get(claim.extra)
            if claim.extra
            else record["accuracy"]["last"]
        )

    scores = [score(row) for _, row in rows.iterrows()]
    rows = rows[[found is not None for found in scores]].copy()
    for column, key in (("accuracy", "mean"), ("std", "std"), ("networks", "networks")):
        rows[column] = [found[key] for found in scores if found is not None]
    return rows


def _measured(
    how: dict[str, Any], table: pd.DataFrame, folder: Path
) -> tuple[float, tuple[str, ...], bool] | None:
    """(our figure, the records it is from, whether at the paper's setting), or None where no record answers.

    Of the runs only the paper profile's are asked: shortened runs are shortened each by another factor.
    """
    if how["from"] == "runs":
        rows = table[(table.profile == "paper") & (table.overrides == "")]
        ours = _figure_of(how, rows)
        asked = [row.method for row in rows.itertuples()]
        return (
            None
            if pd.isna(ours)
            else (ours, tuple(rows.name[[m in str(how) for m in asked]]), True)
        )
    for place in [""] if how["from"].startswith("bench/") else KEPT:
        kept = {
            path: json.loads(path.read_text())
            for path in sorted((folder / place).glob(how["from"]))
        }
        rows = [
            row | {"file": str(path.relative_to(folder))}
            for path, record in kept.items()
            for row in (record if isinstance(record, list) else record["rows"])
        ]
        asked = [how[key].items() for key in ("of", "over", "minus") if key in how]
        files = {
            row["file"]
            for row in rows
            if how.get("ranks") or any(each <= row.items() for each in asked)
        }
        rows = pd.DataFrame(rows)
        if len(rows) and how.get("ranks"):
            rows = (
                correlations(rows)
                if {"whole", how["of"]["proxy"]} <= set(rows.proxy)
                else rows.iloc[:0]
            )
        if not pd.isna(ours := _figure_of(how, rows)):
            return ours, tuple(sorted(files)), place == "paper"
    return None


def _figure_of(how: dict[str, Any], rows: pd.DataFrame) -> float:
    fields = (
        [how["field"]] if isinstance(how["field"], str) else how["field"]
    )  # of several, the sum

    def mean(conditions: dict[str, Any]) -> float:
        keep = rows
        for key, value in conditions.items():
            keep = keep[keep[key] == value] if key in keep else keep.iloc[:0]
        return float(keep[fields].sum(axis=1, skipna=False).mean()) if len(keep) else float("nan")

    ours = mean(how["of"])
    return (
        ours / mean(how["over"])
        if "over" in how
        else ours - mean(how["minus"])
        if "minus" in how
        else ours
    )


def _judged(claim: pd.Series, ours: float, source: tuple[str, ...], same: bool) -> dict[str, Any]:
    digits, neutral = len(claim.printed.partition(".")[2]), NEUTRAL.get(claim.unit, 0.0)
    if claim.unit == "%":
        kind = tables.verdict("paper" if same else "small", ours, 0.0, (claim.value, 0.0))
    elif same and f"{ours:.{digits}f}" == f"{claim.value:.{digits}f}":
        kind = "reproduced"
    else:
        kind = (
            "direction only" if (ours - neutral) * (claim.value - neutral) > 0 else "not reproduced"
        )
    return {"ours": ours, "records": source, "kind": kind, "verdict": kind}


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
                _figure(*cells)
                for cells in zip(judged.printed, judged.spread, judged.unit, strict=True)
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


def _figure(text: str, spread: float, unit: str) -> str:
    return (text if pd.isna(spread) else f"{text} ± {spread:.1f}") + (
        f" {unit}" if unit and text != "unknown" else ""
    )


def _ours(row: Any) -> str:
    return (
        ""
        if pd.isna(row.ours)
        else _figure(
            f"{row.ours:.1f}" if row.unit == "%" else f"{row.ours:.2f}", row.pooled, row.unit
        )
    )


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


def markdown(table: pd.DataFrame, columns: Iterable[str] | None = None) -> str:
    """A DataFrame of text as a Markdown table."""
    table = table[list(columns)] if columns is not None else table
    lines = [list(table.columns), ["---"] * len(table.columns), *table.astype(str).values.tolist()]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "/") for cell in line) + " |" for line in lines
    )
