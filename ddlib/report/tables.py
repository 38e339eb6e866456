"""DataFrames from records and from the papers' published figures; only `sweep` trains anything."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from statistics import fmean, pstdev
from typing import TYPE_CHECKING, Any

import pandas as pd

from ..config import resolve
from ..core import DDError
from ..data.dataset import canonical
from ..engine.record import Run, resolve_record
from ..engine.run import run as distil
from ..files import results_folder
from ..methods import METHODS
from ..recipe import VERSION

if TYPE_CHECKING:
    from pandas.io.formats.style import Styler

COLUMNS = [
    "method",
    "dataset",
    "ipc",
    "profile",
    "backbone",
    "overrides",
    "protocol",
    "changed",
    "seed",
    "iterations",
    "eval_epochs",
    "accuracy",
    "std",
    "best",
    "best_std",
    "selected",
    "krr",
    "networks",
    "seconds",
    "distill",
    "evaluate",
    "peak_bytes",
    "peak_method",
    "device",
    "name",
]
SETTING = (
    "dataset",
    "profile",
    "backbone",
    "ipc",
    "method",
    "overrides",
)  # what makes runs comparable
BUDGET = ("iterations", "eval_epochs", "networks")  # what a shortened run has less of
NEUTRAL = ("compile", "evaluations", "snapshots", "chunk")  # what leaves the result alone
REVIEWS = ("leaderboard", "second-hand")  # tables in which later papers evaluate a method again


def runs(found: Iterable[Run]) -> pd.DataFrame:
    """One row a run: last and best accuracy (per cent) with the spread over networks, seconds, peak bytes, device.

    `best` is over checkpoints, and over the epochs that IDC's protocol looks at; `selected` the checkpoint that the
    validation split chooses; `krr` FRePo's second predictor; both are NaN where a run has none. `overrides` names the
    values that are not the profile's preset, "" for none; `changed` has those of the profile itself that are not the
    paper's; `networks` lists every accuracy; `seconds` is `distill` and `evaluate` together.
    """
    rows = []
    for run in found:
        record, last = run.record, run.record["accuracy"]["last"]
        best = record["accuracy"]["best"]
        best = best.get("best", best)
        spec, seconds = resolve_record(record), record["seconds"]
        values, overrides = spec.values, spec.overrides
        paper = resolve(record["method"], record["dataset"], record["ipc"], "paper").values
        rows.append(
            {key: record[key] for key in COLUMNS if key in record}
            | {
                "overrides": ", ".join(f"{key}={value}" for key, value in overrides.items()),
                "protocol": values["protocol"],
                "changed": tuple(
                    f"{key} {_short(values[key])} for {_short(paper[key])}"
                    for key in paper
                    if values[key] != paper[key]
                    and key not in (*BUDGET, *NEUTRAL, "backbone", *overrides)
                ),
                "iterations": values.get("iterations", 0),
                "eval_epochs": values["eval_epochs"],
                "accuracy": last["mean"],
                "std": last["std"],
                "best": best["mean"],
                "best_std": best["std"],
                "selected": record["accuracy"].get("selected", {}).get("mean", math.nan),
                "krr": last.get("krr", {}).get("mean", math.nan),
                "networks": last["networks"],
                "seconds": round(sum(seconds.values()), 1),
                **seconds,
            }
        )
    return pd.DataFrame(rows, columns=COLUMNS)


def stored(results: str | Path | None = None, profile: str | None = None) -> list[Run]:
    """Every current run in the results folder, by name; a record of an older version of its method is left out."""
    found = [
        Run(path)
        for path in sorted(results_folder(results).glob(f"{profile or '*'}/*-seed*-????????.json"))
    ]
    return [run for run in found if _current(run.record)]


def _current(record: dict) -> bool:
    try:
        return record["method"] in METHODS and resolve_record(record).name == record["name"]
    except (KeyError, DDError):
        return False


def summary(table: pd.DataFrame, by: tuple[str, ...] = SETTING) -> pd.DataFrame:
    """Mean over distillation seeds, with the two spreads apart and the papers' pooled one (all population, ddof 0).

    `over seeds` is the spread of the runs' means, `over networks` the mean spread inside a run, `pooled` the spread
    of all networks of all runs, which is what the papers print.
    """
    rows = []
    for key, group in table.groupby(list(by), sort=False):
        pooled = [score for scores in group["networks"] for score in scores]
        rows.append(
            dict(zip(by, key, strict=True))
            | {
                "accuracy": fmean(group["accuracy"]),
                "over seeds": pstdev(group["accuracy"]),
                "over networks": fmean(group["std"]),
                "pooled": pstdev(pooled),
                "best": fmean(group["best"]),
                "selected": fmean(group["selected"]),
                "krr": fmean(group["krr"]),
                "seeds": len(group),
                "networks": len(pooled),
                "protocol": group["protocol"].iloc[0],
                "changed": group["changed"].iloc[0],
                "iterations": group["iterations"].min(),
                "eval_epochs": group["eval_epochs"].min(),
                "seconds": fmean(group["seconds"]),
                "distill": fmean(group["distill"]),
                "evaluate": fmean(group["evaluate"]),
                "peak MiB": round(group["peak_bytes"].max() / 2**20),
                "memory": group["peak_method"].iloc[0],
                "device": ", ".join(sorted(set(group["device"]))),
            }
        )
    return (
        pd.DataFrame(rows).sort_values(list(by), ignore_index=True)
        if rows
        else pd.DataFrame(columns=[*by])
    )


def headline(table: pd.DataFrame) -> pd.DataFrame:
    """Of the rows of `runs`, all seeds of one setting a method, dataset, IPC and profile: the nearest to the preset.

    Nearest is with the fewest overrides, then with the most iterations: ablations stay out where a main run is kept.
    """
    changes = table.overrides.map(lambda text: len(text.split(", ")) if text else 0)
    nearest = table.assign(changes=changes, less=-table.iterations).sort_values(
        ["changes", "less"], kind="stable"
    )
    return table.merge(nearest.drop_duplicates(["method", "dataset", "ipc", "profile"])[[*SETTING]])


@cache
def published() -> pd.DataFrame:
    """The papers' figures (`published.csv`): paper, table, method, dataset, IPC, networks, value, spread, evidence."""
    return pd.read_csv(Path(__file__).with_name("published.csv"), dtype={"paper": str})


def recalled() -> pd.DataFrame:
    """The rows of `published` that were quoted from memory and not yet seen in print; tables mark them with `*`."""
    table = published()
    return table[table.verified.str.startswith("RECALLED")]


def _own(table: pd.DataFrame) -> pd.DataFrame:
    """The rows on which a paper's method is tested on the network it was distilled on, in its plain form."""
    return table[
        (table.backbone == table.backbone_eval)
        & (table.metric == "accuracy")
        & table.variant.isna()
    ]


def _mark(table: pd.DataFrame) -> pd.Series:
    """`*` for a figure that was quoted from memory and not yet seen in print, `~` for one that was read off a plot."""
    return table.verified.fillna("").map(
        lambda text: "*" if text.startswith("RECALLED") else "~" * (text == "V-fig")
    )


def curve(method: str, dataset: str) -> pd.DataFrame:
    """What the papers print on a method by IPC, on its own backbone: columns ipc, value, spread, mark (as in `printed`).

    Re-evaluations by later papers are left out. Random images are those under DSA's protocol where these are on file,
    else those of the papers' tables. "full", the whole training set, has one row and no IPC.
    """
    rows = _own(published())
    rows = rows[
        (rows.method == method) & (rows.dataset == canonical(dataset)) & ~rows.table.isin(REVIEWS)
    ]
    if method == "random" and (rows.protocol == "dsa").any():
        rows = rows[rows.protocol == "dsa"]
    rows = (
        rows.assign(mark=_mark(rows)).drop_duplicates("ipc").sort_values("ipc", ignore_index=True)
    )
    return rows[["ipc", "value", "spread", "mark"]]


def paper_value(
    method: str, dataset: str, ipc: int, protocol: str | None = None, variant: str = ""
) -> tuple[float, float, str] | None:
    """The (value, spread, mark as in `printed`) that a paper prints for a method, or a variant of it such as
    "iteration=40", on its own backbone; None where none is on file."""
    rows = published()
    rows = rows[(rows.method == method) & (rows.dataset == canonical(dataset)) & (rows.ipc == ipc)]
    rows = rows[rows.variant == variant] if variant else _own(rows)
    rows = rows[rows.protocol == protocol] if protocol else rows
    return (
        None
        if rows.empty
        else (float(rows.iloc[0].value), float(rows.iloc[0].spread), _mark(rows).iloc[0])
    )


def printed(
    methods: Iterable[str], datasets: Iterable[str], ipcs: Iterable[int] = (1, 10, 50)
) -> pd.DataFrame:
    """The papers' own table: a row a dataset and IPC, a column a method, as value ± spread.

    Re-evaluations by later papers are left out, so a cell that the papers leave empty is empty. `*` marks a figure that was quoted
    from memory and not yet seen in print, `~` one that was read off a plot. "full" stands in every row of its dataset.
    """
    table = _own(published())
    table = table[~table.table.isin(REVIEWS)]
    table = pd.concat(
        [
            table[table.method != "full"],
            *(table[table.method == "full"].assign(ipc=k) for k in ipcs),
        ]
    )
    cells = [_with_spread(v, s) for v, s in zip(table.value, table.spread, strict=True)]
    table = table.assign(cell=cells + _mark(table))
    table = table[table.dataset.isin(list(datasets)) & table.ipc.isin(list(ipcs))].astype(
        {"ipc": int}
    )
    cells = table.pivot_table("cell", ["dataset", "ipc"], "method", aggfunc="first").fillna("")
    return cells.reindex(columns=list(methods)).rename_axis(columns=None).reset_index()


def shortfall(row: pd.Series, early: bool = False) -> str:
    """In what a row of `summary` is not the paper's setting, e.g. "iterations 800 of 20000, lr_img 10 for 1"; "" in
    nothing. More than two other settings are counted; overrides, which tables show, are "the overrides" where nothing
    else is said. `early`: the paper's figure is one of the same iteration."""
    paper = resolve(row.method, row.dataset, row.ipc, "paper").values
    ours = {
        "iterations": paper["iterations"] if early else row.iterations,
        "eval_epochs": row.eval_epochs,
        "networks": min(row.networks / row.seeds, paper["networks"]),
    }  # more networks are only more certain
    less = [
        f"{key} {value:.0f} of {paper[key]}" for key, value in ours.items() if value != paper[key]
    ]
    less += [row.backbone] * (row.backbone != paper["backbone"])
    less += [f"{len(row.changed)} more settings"] if len(row.changed) > 2 else [*row.changed]
    return ", ".join(less) or "the overrides" * bool(overriding(row.overrides))


def overriding(overrides: str) -> set[str]:
    """Of the `overrides` of a row, "key=value" each, those that are neither budget nor neutral."""
    parts = filter(None, overrides.split(", "))
    return {part for part in parts if part.partition("=")[0] not in (*BUDGET, *NEUTRAL)}


def verdict(profile: str, ours: float, spread: float, paper: tuple | None, less: str = "") -> str:
    """The rule fixed in advance: *reproduced* needs the paper's setting and 1 point, or the two intervals to meet.

    `paper` is (value, spread, ...); `less` says what is not the paper's setting (`shortfall`) and stands in the verdict.
    """
    reduced = "reduced budget" + (f": {less}" if less else "")
    if paper is None:
        return "no published figure" + (f"; {reduced}" if less else "")
    if profile != "paper" or less:
        return reduced
    near = max(1.0, spread + (0.0 if math.isnan(paper[1]) else paper[1]))
    return "reproduced" if abs(ours - paper[0]) <= near else "not reproduced"


def compare(table: pd.DataFrame) -> pd.DataFrame:
    """The table of a paper's notebook: paper | ours | difference | verdict, one row a method, dataset and IPC.

    Random images are held against the figure under their protocol, a run of fewer iterations against the paper's curve
    at that iteration where there is one. The spread of ours is over all networks of all seeds, as the papers' is.
    """
    rows = []
    for _, row in summary(table).iterrows():
        place = (row.method, row.dataset, row.ipc, row.protocol if row.method == "random" else None)
        early = (
            paper_value(*place, variant=f"iteration={row.iterations}")
            if "iterations=" in row.overrides
            else None
        )
        paper = early or paper_value(*place)
        less = "" if row.profile == "smoke" else shortfall(row, early is not None)
        rows.append(
            {
                "dataset": row.dataset,
                "profile": row.profile,
                "ipc": row.ipc,
                "method": row.method,
                "overrides": row.overrides,
                "paper": _with_spread(*paper[:2]) + paper[2] if paper else "none",
                "ours": _with_spread(row.accuracy, row.pooled, row.networks),
                "Δ": f"{row.accuracy - paper[0]:+.1f}" if paper else "",
                "over seeds": row["over seeds"],
                "over networks": row["over networks"],
                "best": row.best,
                "validation-selected": row.selected,
                "KRR": row.krr,
                "seeds": row.seeds,
                "networks": row.networks,
                "verdict": verdict(row.profile, row.accuracy, row.pooled, paper, less),
            }
        )
    found = pd.DataFrame(rows).round(1).dropna(axis=1, how="all")
    return (
        found
        if any(found.get("overrides", ()))
        else found.drop(columns="overrides", errors="ignore")
    )


def cost(table: pd.DataFrame) -> pd.DataFrame:
    """What a run cost, mean over seeds: seconds of distillation and evaluation, milliseconds a step, peak memory."""
    rows = summary(table)
    rows["ms / step"] = 1000 * rows.distill / rows.iterations.where(rows.iterations > 0)
    rows = rows.rename(
        columns={"iterations": "steps", "distill": "distillation (s)", "evaluate": "evaluation (s)"}
    )
    return rows[
        [
            "dataset",
            "profile",
            "ipc",
            "method",
            "seeds",
            "steps",
            "distillation (s)",
            "ms / step",
            "evaluation (s)",
            "peak MiB",
            "memory",
            "device",
        ]
    ]


def across(scores: Iterable[dict[str, Any]]) -> pd.DataFrame:
    """Accuracy by backbone (rows) and method (columns) from dicts with method, backbone, mean, std and networks."""
    rows = [
        {**score, "cell": _with_spread(score["mean"], score["std"], len(score["networks"]))}
        for score in scores
    ]
    table = pd.DataFrame(rows, columns=["backbone", "method", "cell"])
    order = {axis: list(dict.fromkeys(table[axis])) for axis in ("backbone", "method")}
    cells = table.pivot_table("cell", "backbone", "method", aggfunc="first")
    return cells.reindex(order["backbone"])[order["method"]].rename_axis(columns=None).reset_index()


def transfers(found: Iterable[Run]) -> pd.DataFrame:
    """Every kept evaluation of the runs' sets under their own protocol, on their own backbone and on others.

    One row each: method, dataset, ipc, seed, backbone, mean, std (per cent) and networks, each one's accuracy. Those on
    other backbones are what `Run.transfer` has kept; of several on one backbone the one with the most networks stands.
    """
    rows = []
    for run in found:
        path = run.path.with_suffix(".transfer.json")
        kept = json.loads(path.read_text()) if path.is_file() else {}
        same = [
            score
            for key, score in kept.items()
            if key.split(" x ")[1].partition(", ")[2] == f"version {VERSION}"
        ]
        own = {"backbone": run.synthetic.backbone, **run.record["accuracy"]["last"]}
        rows += [
            {key: run.record[key] for key in ("method", "dataset", "ipc", "seed")}
            | {key: score[key] for key in ("backbone", "mean", "std", "networks")}
            for score in sorted((own, *same), key=lambda score: -len(score["networks"]))
        ]
    columns = ["method", "dataset", "ipc", "seed", "backbone", "mean", "std", "networks"]
    return pd.DataFrame(rows, columns=columns).drop_duplicates(
        ["method", "dataset", "ipc", "seed", "backbone"]
    )


def printed_across(dataset: str) -> pd.DataFrame:
    """The papers' cross-architecture figures on a dataset: columns set, backbone, value, cell (value and mark).

    `set` names the method, the IPC and the backbone that it was distilled on where that is not the plain ConvNet.
    """
    table = published()
    table = (
        table[
            (table.dataset == canonical(dataset))
            & (table.metric == "accuracy")
            & table.variant.isna()
            & ~table.table.isin(REVIEWS)
        ]
        .fillna({"ipc": 0})
        .astype({"ipc": int})
    )
    table = table[
        table.groupby(["paper", "table", "method", "ipc", "backbone"]).backbone_eval.transform(
            "nunique"
        )
        > 1
    ]
    made = [
        f"{r.method}, IPC {r.ipc}"
        + f", on {r.backbone}" * (r.backbone.partition(":depth")[0] != "convnet")
        for r in table.itertuples()
    ]
    return pd.DataFrame(
        {
            "set": made,
            "backbone": table.backbone_eval,
            "value": table.value,
            "cell": table.value.map("{:.1f}".format) + _mark(table),
        }
    )


def titled(table: pd.DataFrame, caption: str) -> Styler:
    """The table for a notebook: one decimal, no row numbers, the caption above."""
    return table.style.hide(axis="index").format(precision=1, na_rep="").set_caption(caption)


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value) or "none"


def _with_spread(value: float, spread: float, count: int = 2) -> str:
    return f"{value:.1f}" if math.isnan(spread) or count < 2 else f"{value:.1f} ± {spread:.1f}"


def markdown(table: pd.DataFrame) -> str:
    """`compare` with the cost of each row, as the Markdown table of README.md."""
    if table.empty:
        return "No record yet."
    rows = compare(table).join(
        cost(table)[["distillation (s)", "evaluation (s)", "peak MiB"]]
    )  # both in summary's order
    shown = {
        "dataset": "dataset",
        "ipc": "IPC",
        "method": "method",
        "overrides": "overrides",
        "paper": "paper",
        "ours": "ours",
        "Δ": "Δ",
        "seeds": "seeds",
        "networks": "networks",
        "verdict": "verdict",
        "distillation (s)": "distillation (s)",
        "evaluation (s)": "evaluation (s)",
        "peak MiB": "process peak (MiB)",
    }
    names = [name for name in shown if name in rows]
    lines = [[shown[name] for name in names], ["---"] * len(names)]
    lines += [
        [f"{v:.0f}" if isinstance(v, float) else str(v) for v in row]
        for row in rows[names].itertuples(index=False)
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def sweep(
    method: str, dataset: str, *, ipcs: Iterable[int], seeds: Iterable[int] = (0,), **options: Any
) -> pd.DataFrame:
    """`run` for every IPC and seed; one row per run, as `tables.runs` makes them."""
    return runs(
        [distil(method, dataset, ipc=ipc, seed=seed, **options) for ipc in ipcs for seed in seeds]
    )
