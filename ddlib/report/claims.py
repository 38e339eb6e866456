"""Every claim of the five papers in one place: what is printed, what our kept records say, and the verdict.

`claims.yaml` names the claims. Accuracies are selected from `published.csv`, where they stand once; other figures
(a factor, a correlation) are written there. Nothing is trained here. The verdict is `verdict`'s: an accuracy is
answered by the run nearest to the claim's setting, whatever it scores, and a factor only by what was measured there
(`answers`).
"""

from __future__ import annotations

import math
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import yaml

from ..core import DDError, choose
from . import tables, verdict
from .answers import KEPT, Answer, Kept, answer  # noqa: F401  notebooks ask claims for KEPT
from .verdict import VERDICTS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NEEDED = {"paper", "where", "labels", "spread", "reason"}
# What a claim gives that selects nothing, and what any claim may give.
FIGURE = {"method", "dataset", "network", "quantity", "unit", "value"}
FURTHER = {"select", "ipc", "evidence", "measured", "overrides", "extra", "sense", "setting"}
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


@cache
def _document() -> dict[str, Any]:
    return yaml.safe_load(Path(__file__).with_name("claims.yaml").read_text())


def papers() -> dict[str, dict[str, str]]:
    """arXiv id -> title, venue, the version read, and the method's page in docs/methods."""
    return _document()["papers"]


def load() -> pd.DataFrame:
    """One row per claim (`COLUMNS`); raises `DDError` naming a key, paper or selector that `claims.yaml` has wrong."""
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
        choose(f"key in {name}", key, sorted(NEEDED | FIGURE | FURTHER))
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
        "spread": math.nan,
        "reason": document["reasons"].get(claim["reason"], claim["reason"]),
    }
    if "select" not in claim:
        known = claim["value"] != "unknown"
        return [
            common
            | {
                "network_eval": claim["network"],
                "ipc": claim.get("ipc", math.nan),
                "printed": str(claim["value"]),
                "marked": str(claim["value"]) + tables.mark(common["evidence"]),
                "value": float(claim["value"]) if known else math.nan,
            }
        ]
    rows = tables.published()
    rows = rows.fillna({"variant": "", "note": ""})
    for key, wanted in ({"paper": claim["paper"]} | claim["select"]).items():
        choose(f"selector in {name}", key, sorted(rows))
        rows = rows[rows[key].isin(wanted if isinstance(wanted, list) else [wanted])]
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
    rows = tables.own(tables.published())
    rows = rows[(rows.method == method) & (rows.protocol != "dc-bench average")]
    first = rows[~rows.table.isin(tables.REVIEWS)]
    rows = rows if first.empty else first
    rows = rows.drop_duplicates(["dataset", "ipc", "protocol"]).fillna({"variant": ""})
    places = rows.dataset.map(list(rows.dataset.unique()).index)
    rows = rows.assign(place=places).sort_values(["place", "ipc"])
    common = {"overrides": None, "extra": "", "reason": "no run yet", "measured": None}
    return pd.DataFrame(
        [
            common | _row(row) | {"paper": row.paper, "where": row.table}
            for row in rows.itertuples()
        ],
        columns=COLUMNS,
    )


def judge(claims: pd.DataFrame, results: str | Path | None = None) -> pd.DataFrame:
    """The claims with `ours`, `pooled` (spread over networks and seeds), `records`, `verdict`, `kind` and `cost`.

    `verdict` says what differs; `kind` is its class, a key of `VERDICTS`. Only records of the kept profiles count
    (`KEPT`).
    """
    kept = Kept(results)
    answers = [answer(claim, kept) for _, claim in claims.iterrows()]
    found = pd.DataFrame(answers, columns=[field.name for field in fields(Answer)])
    found["kind"] = [given.verdict.word for given in answers]
    found["verdict"] = [str(given.verdict) for given in answers]
    return pd.concat([claims.reset_index(drop=True), found], axis=1)


def counts(judged: pd.DataFrame) -> pd.DataFrame:
    """How many claims of each paper, by its short title, ended in which verdict, and how many there are."""
    table = pd.crosstab(judged.paper, judged.kind).reindex(
        index=papers(), columns=list(VERDICTS), fill_value=0
    )
    table.insert(0, "claims", table.sum(axis=1))
    table.index = pd.Index(map(short_title, table.index), name="paper")
    return table.rename_axis(columns=None).reset_index()


def by_verdict(judged: pd.DataFrame) -> pd.DataFrame:
    """`counts` for a page: a row per verdict and one of all claims, a column per paper and one of all papers."""
    table = counts(judged).set_index("paper").rename(columns={"claims": "all claims"})
    table = table[[*VERDICTS, "all claims"]].T.assign(all=lambda each: each.sum(axis=1))
    table = table[table["all"] > 0]
    return table.rename_axis(index="verdict", columns=None).reset_index()


def short_title(paper: str) -> str:
    """What a paper is called for short, by its arXiv id: "DM"."""
    return papers()[paper]["title"].partition(":")[0]


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
    """The counts as one bar per paper, and the number of claims in every part that is wide enough for it."""
    import matplotlib.pyplot as plt

    table, left = counts(judged), 0
    digit = table.claims.max() / 80  # as many claims are as wide as one
    drawn, axis = plt.subplots(figsize=(8, 3), layout="constrained")
    for kind, colour in VERDICTS.items():
        bars = axis.barh(
            table.paper, table[kind], left=left, color=colour, label=kind, edgecolor="white"
        )
        shown = [str(n) if n > digit * len(str(n)) else "" for n in table[kind]]
        axis.bar_label(bars, shown, label_type="center", fontsize=8)
        left = left + table[kind]
    axis.invert_yaxis()
    axis.set(xlabel="claims (one a figure of a table)", title=title)
    drawn.legend(loc="outside lower center", ncols=len(VERDICTS), fontsize=8, frameon=False)
    return drawn
