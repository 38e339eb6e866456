"""DataFrames from records and from the papers' published figures; only `sweep` trains anything."""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from inspect import signature
from pathlib import Path
from statistics import fmean, pstdev
from typing import TYPE_CHECKING, Any

import pandas as pd

from ..config import PROFILES, Spec, borrowed, resolve
from ..core import DDError, choose, instance, listed, plain
from ..data.dataset import canonical
from ..engine import queue
from ..engine.cost import SIZES
from ..engine.record import Run, record_paths, resolve_record, timed_on
from ..engine.run import run as distil
from ..engine.run import run_together
from ..methods import METHODS
from ..methods.coreset import KINDS
from ..recipe import VERSION, own_augment
from . import verdict
from .verdict import DEFAULT_COUNT, Differences, Published, Verdict

ENGINES = ("local", "ray")

if TYPE_CHECKING:
    from pandas.io.formats.style import Styler

COLUMNS = [
    "method",
    "dataset",
    "data",
    "ipc",
    "profile",
    "backbone",
    "overrides",
    "protocol",
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
    "commit",
    "sealed",
    "marks",
    "values",
    "name",
]
# What makes runs comparable: seeds of one setting differ in nothing of it.
SETTING = ("dataset", "profile", "ipc", "method", "backbone", "overrides")
REVIEWS = ("leaderboard", "second-hand")  # tables in which later papers evaluate a method again
# Protocols of the same networks, epochs and augmentation; MTT's takes a learned step size where there is one.
SAME_PROTOCOL = {"dm": "dsa", "mtt": "dsa"}
START = ("init", "warm_epochs")  # what the images of a run begin with
NETWORKS = {"2211.10586": 3}  # behind the spread of a paper, where not five
HEADLINES = 10  # rows of the front page
DETAILS = {
    "dataset": "dataset",
    "ipc": "ipc",
    "method": "method",
    "profile": "profile",
    "overrides": "overrides",
    "seeds": "seeds",
    "networks": "networks",
    "over seeds": "over seeds",
    "over networks": "over networks",
    "best": "best",
    "selected": "validation-selected",
    "krr": "KRR",
    "distill": "distillation (s)",
    "evaluate": "evaluation (s)",
    "peak MiB": "peak MiB",
    "verdict": "verdict",
}  # column of `judge` -> its heading


def runs(found: Iterable[Run]) -> pd.DataFrame:
    """One row per run: last and best accuracy (per cent) with the spread over networks, seconds, peak bytes, device.

    `data` is the published dataset that the run saw, "" for an unknown folder, and `marks` what a verdict on it says
    (`verdict.data_of`, and whether the code is known). `best` is over checkpoints, and over the epochs that IDC's
    protocol looks at; `selected` the checkpoint that the validation split chooses; `krr` FRePo's second predictor;
    both are NaN where a run has none. `overrides` names the values that are not the profile's preset, "" for none;
    `values` has all of them; `networks` lists every accuracy; `seconds` is `distill` and `evaluate` together; `sealed`
    says whether a checksum covers the record, which those of older versions lack.
    """
    rows = []
    for run in listed("runs", found):
        record, last = instance("a run", run, Run).record, run.record["accuracy"]["last"]
        best = record["accuracy"]["best"]
        best = best.get("best", best)
        spec, seconds = resolve_record(record), record["seconds"]
        values, overrides = spec.values, spec.overrides
        checksum = record.get("dataset_checksum")
        data, copy = verdict.data_of(record["dataset"], checksum, values["subset"])
        unknown = "" if record.get("commit") else verdict.UNKNOWN_CODE
        marks = (copy, *_precisions(values), unknown)
        rows.append(
            {key: record[key] for key in COLUMNS if key in record}
            | {
                "data": data,
                "overrides": ", ".join(f"{key}={value}" for key, value in overrides.items()),
                "protocol": values["protocol"],
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
                "device": timed_on(record),
                "sealed": run.sealed,
                "marks": tuple(filter(None, marks)),
                "values": values,
            }
        )
    return pd.DataFrame(rows, columns=COLUMNS)


def _precisions(values: dict[str, Any]) -> list[str]:
    parts = {
        "distilled": values.get("precision"),
        "real images chosen": values.get("sampling_precision"),
        "evaluated": values["eval_precision"],
    }
    return [f"{part} in {name}" for part, name in parts.items() if name not in (None, "float32")]


def stored(results: str | Path | None = None, profile: str | None = None) -> list[Run]:
    """Every current run in the results folder, by name; a record of an older version of its method is left out."""
    if profile is not None:
        choose("profile", profile, PROFILES)
    found = [Run(path) for path in record_paths(results, profile or "*")]
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
                "scores": list(group["networks"]),
                **{key: group[key].iloc[0] for key in ("protocol", "data", "values")},
                "marks": tuple(dict.fromkeys(mark for marks in group["marks"] for mark in marks)),
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
    if not rows:
        return pd.DataFrame(columns=[*by])
    return pd.DataFrame(rows).sort_values(list(by), ignore_index=True)


def headline(table: pd.DataFrame) -> pd.DataFrame:
    """Of the rows of `runs`, all seeds of one setting a method, dataset, IPC and profile: the nearest to the preset.

    Nearest is with the fewest overrides, then with the most iterations: ablations stay out where a main run is kept.
    All IPCs of a method are of one protocol and augmentation, so that they make a line: of several, those with a row
    that differs in the fewest settings from a printed figure's, then in the fewest from the preset. Images that a
    method begins with are none of it (`made`).
    """
    table = made(table)
    if table.empty:
        return table
    overrides = table.overrides.map(changes)
    table = table.assign(
        line=table["values"].map(lambda values: (_family(values), values["eval_augment"])),
        far=[_settings_changed(row) for _, row in table.iterrows()],
        overridden=overrides,
        less=-table.iterations,
    )
    place = ["method", "dataset", "profile"]
    lines = table.sort_values(["far", "overridden"], kind="stable").drop_duplicates(place)
    rows = table.merge(lines[[*place, "line"]])
    nearest = rows.sort_values(["overridden", "less"], kind="stable")
    nearest = nearest.drop_duplicates([*place, "ipc"])[[*SETTING, "line"]]
    return rows.merge(nearest)[[*COLUMNS]]


def changes(overrides: str) -> int:
    """How many overrides there are that are not neutral."""
    names = [part.partition("=")[0] for part in overrides.split(", ") if part]
    return sum(name not in verdict.NEUTRAL for name in names)


def _settings_changed(row: pd.Series) -> float:
    """The settings, budget apart, that a run has otherwise than the printed figure's; infinite without a figure."""
    held = _held_against(row)
    return len(verdict.differences(row["values"], held[2]).changed) if held else math.inf


@cache
def published() -> pd.DataFrame:
    """The papers' figures (`published.csv`): paper, table, method, dataset, IPC, networks, value, spread, evidence."""
    return pd.read_csv(Path(__file__).with_name("published.csv"), dtype={"paper": str})


def recalled() -> pd.DataFrame:
    """The rows of `published` that were quoted from memory and not yet seen in print; tables mark them with `*`."""
    table = published()
    return table[table.verified.str.startswith("RECALLED")]


def first_hand() -> pd.DataFrame:
    """`published` without the tables in which later papers evaluate a method again."""
    table = published()
    return table[~table.table.isin(REVIEWS)]


def _plain(table: pd.DataFrame) -> pd.DataFrame:
    """The accuracies of methods in their plain form, on whatever network the sets are tested."""
    return table[(table.metric == "accuracy") & table.variant.isna()]


def own(table: pd.DataFrame) -> pd.DataFrame:
    """The rows on which a paper's method is tested on the network it was distilled on, in its plain form."""
    return _plain(table[table.backbone == table.backbone_eval])


def printed_runs(datasets: Iterable[str]) -> list[Spec]:
    """The runs in the profile `paper` whose accuracies the papers print on `datasets`, in tables or along a curve, each
    on its own backbone; left out are those of which neither paper nor code gives every setting."""
    rows = first_hand()
    whole = rows.variant.isna() | rows.variant.str.startswith("iteration=", na=False)
    rows = rows[whole & (rows.metric == "accuracy") & (rows.backbone == rows.backbone_eval)]
    rows = rows[rows.method.isin([*METHODS]) & rows.ipc.notna()]
    known = [name for name in SIZES if name in set(rows.dataset)]
    specs = []
    for dataset in dict.fromkeys(datasets):
        here = rows[rows.dataset == choose("dataset", dataset, known)]
        for method, ipc in here[["method", "ipc"]].drop_duplicates().itertuples(index=False):
            with suppress(DDError):
                specs.append(resolve(method, dataset, int(ipc), "paper"))
    return specs


def mark(evidence: str) -> str:
    """`*` for a figure that was quoted from memory and not yet seen in print, `~` for one that was read off a plot."""
    return "*" if evidence.startswith("RECALLED") else "~" if evidence == "V-fig" else ""


def _mark(table: pd.DataFrame) -> pd.Series:
    return table.verified.fillna("").map(mark)


def curve(method: str, dataset: str) -> pd.DataFrame:
    """What the papers print on a method by IPC, on its own backbone: columns ipc, value, spread, mark (as in
    `printed`), protocol.

    Re-evaluations by later papers are left out. Random images are those under DSA's protocol where these are on file,
    else those of the papers' tables. "full", the whole training set, has one row and no IPC.
    """
    rows = own(first_hand())
    rows = rows[(rows.method == method) & (rows.dataset == canonical(dataset))]
    if method == "random" and (rows.protocol == "dsa").any():
        rows = rows[rows.protocol == "dsa"]
    rows = rows.assign(mark=_mark(rows)).drop_duplicates("ipc")
    rows = rows.sort_values("ipc", ignore_index=True)
    return rows[["ipc", "value", "spread", "mark", "protocol"]]


def printed_figure(
    method: str, dataset: str, ipc: int, *, protocol: str = "", variant: str = ""
) -> tuple[Published, str] | None:
    """What a paper prints for a method on its own backbone, or for a variant such as "iteration=40", and its mark as
    in `printed`; None where none is on file. Re-evaluations by later papers are left out."""
    rows = first_hand()
    rows = rows[(rows.method == method) & (rows.dataset == dataset) & (rows.ipc == ipc)]
    rows = rows[rows.variant == variant] if variant else own(rows)
    rows = rows[rows.protocol == protocol] if protocol else rows
    if rows.empty:
        return None
    row = rows.iloc[0]
    count = NETWORKS.get(row.paper, DEFAULT_COUNT)
    return Published(float(row.value), float(row.spread), count), _mark(rows).iloc[0]


def printed(
    methods: Iterable[str], datasets: Iterable[str], ipcs: Iterable[int] = (1, 10, 50)
) -> pd.DataFrame:
    """The papers' own table: a row a dataset and IPC, a column a method, as value ± spread.

    Re-evaluations by later papers are left out, so a cell that the papers leave empty is empty. `*` marks a figure that
    was quoted from memory and not yet seen in print, `~` one that was read off a plot. "full" stands in every row of
    its dataset.
    """
    table = own(first_hand())
    whole = table[table.method == "full"]
    table = pd.concat([table[table.method != "full"], *(whole.assign(ipc=k) for k in ipcs)])
    cells = [with_spread(v, s) for v, s in zip(table.value, table.spread, strict=True)]
    table = table.assign(cell=cells + _mark(table))
    table = table[table.dataset.isin(list(datasets)) & table.ipc.isin(list(ipcs))].astype(
        {"ipc": int}
    )
    cells = table.pivot_table("cell", ["dataset", "ipc"], "method", aggfunc="first").fillna("")
    return cells.reindex(columns=list(methods)).rename_axis(columns=None).reset_index()


@cache
def paper_settings(method: str, dataset: str, ipc: int, **changes: Any) -> dict[str, Any] | None:
    """Every setting of a run at the paper's, `changes` apart; None where no paper gives one.

    No paper says how the extractor of its coresets was trained, so no run can have that setting; where a preset is
    borrowed, the image step size stands for all that the paper does not say.
    """
    try:
        values = resolve(method, dataset, ipc, "paper", **changes).values
    except DDError:
        return None
    if method in KINDS and method != "random":
        return values | {"extractor_epochs": "unpublished"}
    return values | {"lr_img": "unpublished"} if borrowed(method, dataset, ipc) else values


def _family(values: dict[str, Any]) -> str:
    """The protocol, by one name where several are the same."""
    return SAME_PROTOCOL.get(values["protocol"], values["protocol"])


def _evaluation(values: dict[str, Any]) -> tuple:
    """What two runs must share for their accuracies to be of one protocol and budget of evaluation."""
    protocol = _family(values)
    fixed = protocol == "dc" or own_augment(protocol)  # whatever distillation uses
    augment = values["eval_augment"] or ("" if fixed else values["augment"])
    network = values["eval_backbone"] or values["backbone"]
    plain = (values[key] for key in ("eval_epochs", "zca", "mirror", "resolution"))
    return (protocol, augment, network, *plain)


def random_beside(row: pd.Series, table: pd.DataFrame) -> list[list[float]]:
    """Accuracies by seed of the random real images in a table of runs that were evaluated as the row was; often [].

    Those of the row's own profile, where it has any.
    """
    rows = table[(table.method == "random") & (table.data == row.data) & (table.ipc == row.ipc)]
    wanted = _evaluation(row["values"])
    rows = rows.loc[[_evaluation(values) == wanted for values in rows["values"]]]
    own = rows[rows.profile == row.profile]
    return list((own if len(own) else rows).networks)


def lead(figure: Published, row: pd.Series, table: pd.DataFrame) -> float:
    """The figure less the printed accuracy of random images under the row's protocol, else less ours (`verdict`)."""
    if row.method in KINDS:
        return math.inf
    protocol = SAME_PROTOCOL.get(row.protocol, row.protocol)
    if known := printed_figure("random", row["data"], row.ipc, protocol=protocol):
        return figure.value - known[0].value
    ours = random_beside(row, table)
    return figure.value - fmean(map(fmean, ours)) if ours else math.nan


def _held_against(row: pd.Series) -> tuple[Published, str, dict[str, Any]] | None:
    """The printed figure for a row of `summary`, its mark and the settings behind it; None where there is none.

    A coreset is held against the figure under its protocol, a run of fewer iterations against the paper's curve at
    that iteration where there is one, if its images begin as those of the curve do.
    """
    protocol = {"protocol": row.protocol} if row.method in KINDS else {}
    place = (row.method, row["data"], row.ipc)
    settings = paper_settings(*place, **protocol) if row["data"] else None
    if settings is None:
        return None
    if row.iterations < settings.get("iterations", 0) and (
        early := printed_figure(*place, variant=f"iteration={row.iterations}")
    ):
        begins = all(row["values"].get(key) == settings.get(key) for key in START)
        return (*early, settings | {"iterations": row.iterations}) if begins else None
    known = printed_figure(*place, **protocol)
    return (*known, settings) if known else None


def judge(table: pd.DataFrame) -> pd.DataFrame:
    """`summary` with columns figure (`Published` or None), mark, `verdict` and `differs`, the one rule of `verdict`."""
    rows = summary(table)
    held = [_held_against(row) for _, row in rows.iterrows()]
    verdicts = [
        (None, "", Verdict(verdict.UNPUBLISHED, marks=row.marks), Differences())
        if known is None
        else _judged(row, *known, table)
        for known, (_, row) in zip(held, rows.iterrows(), strict=True)
    ]
    names = ["figure", "mark", "verdict", "differs"]
    return rows.join(pd.DataFrame(verdicts, columns=names, index=rows.index, dtype=object))


def _judged(
    row: pd.Series, figure: Published, mark: str, settings: dict[str, Any], table: pd.DataFrame
) -> tuple[Published, str, Verdict, Differences]:
    differs = verdict.differences(row["values"], settings)
    found = verdict.accuracy(row.scores, figure, differs, lead(figure, row, table), row.marks)
    return figure, mark, found, differs


def compare(table: pd.DataFrame) -> pd.DataFrame:
    """The table of a paper's notebook, one row per setting: dataset, IPC, method, paper, ours, random, Δ, verdict.

    The spread of ours is over all networks of all seeds, as the papers' is. `random` has real images of the table
    under the same protocol, and is left out where it has none; `details` has the rest, row by row.
    """
    rows = judge(table)
    cells = []
    for _, row in rows.iterrows():
        figure = row.figure
        cells.append(
            {
                "dataset": row.dataset,
                "ipc": row.ipc,
                "method": _named(row),
                "paper": with_spread(figure.value, figure.spread) + row.mark if figure else "none",
                "ours": with_spread(row.accuracy, row.pooled, row.networks),
                "random": "" if row.method == "random" else _pooled(random_beside(row, table)),
                "Δ": f"{row.accuracy - figure.value:+.1f}" if figure else "",
                "verdict": row.verdict.short,
            }
        )
    shown = pd.DataFrame(cells)
    return shown if any(shown.get("random", ())) else shown.drop(columns="random", errors="ignore")


def _named(row: pd.Series) -> str:
    """The method and what tells this row from others of it: the overrides that are not neutral."""
    parts = [p for p in row.overrides.split(", ") if p.partition("=")[0] not in verdict.NEUTRAL]
    return ", ".join(filter(None, (row.method, *parts)))


def _pooled(scores: list[list[float]]) -> str:
    every = [score for networks in scores for score in networks]
    return with_spread(fmean(every), pstdev(every), len(every)) if every else ""


def details(table: pd.DataFrame) -> pd.DataFrame:
    """What stands behind each row of `compare`, in its order: seeds, spreads, further scores, cost, what differs."""
    rows = judge(table).reindex(columns=list(DETAILS)).rename(columns=DETAILS)
    rows["verdict"] = rows.verdict.map(str)
    return rows.round(1).dropna(axis=1, how="all")


def nearness(differs: Differences, row: pd.Series) -> tuple:
    """A key to sort rows of `summary` by, the nearest to the paper's setting first, whatever they score. Of two as near
    the one with fewer marks comes first: float32 before another precision, known code before unknown."""
    return len(differs.changed), -differs.share, len(differs.less), len(row.marks), -row.networks


def made(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows but those of the images that a method begins with (`iterations=0`), which are no set that it made."""
    return rows if rows.empty else rows[(rows.iterations > 0) | rows.method.isin(KINDS)]


def front_page(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of `compare` for README: per method, dataset and IPC the run nearest to the paper's setting, whatever it
    scores; of a coreset per protocol too, which its name then says.

    At most `HEADLINES`: distilled sets before real images, of those the nearest of each method before its others. A
    record without a commit stays out, and so do a row that no published figure stands beside and the images that a
    method begins with.
    """
    known = table.loc[[verdict.UNKNOWN_CODE not in marks for marks in table.marks]]
    if known.empty:
        return pd.DataFrame()
    rows = made(judge(known))
    rows = rows[rows.figure.notna()]
    order = sorted(rows.index, key=lambda k: nearness(rows.differs[k], rows.loc[k]))
    rows = rows.loc[order].assign(real=rows.method.isin(KINDS))
    rows["under"] = rows.protocol.where(rows.real, "")
    rows = rows.drop_duplicates(["method", "data", "ipc", "under"])
    rows["turn"] = rows.groupby("method").cumcount().where(~rows.real, 0)
    rows = rows.sort_values(["real", "turn"], kind="stable").head(HEADLINES)
    rows = rows.sort_values(["real", "data", "ipc", "method"], kind="stable")
    names = rows.method.where(~rows.real, rows.method + " (" + rows.protocol + ")")
    return compare(known).reindex(rows.index).assign(method=names)


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
        {**score, "cell": with_spread(score["mean"], score["std"], len(score["networks"]))}
        for score in scores
    ]
    table = pd.DataFrame(rows, columns=["backbone", "method", "cell"])
    order = {axis: list(dict.fromkeys(table[axis])) for axis in ("backbone", "method")}
    cells = table.pivot_table("cell", "backbone", "method", aggfunc="first")
    return cells.reindex(order["backbone"])[order["method"]].rename_axis(columns=None).reset_index()


def on_other_networks(path: Path) -> list[dict[str, Any]]:
    """What `Run.transfer` kept of the record at `path` with nothing but the network changed, most networks first."""
    same = [
        score
        for key, score in Run(path).transferred().items()
        if key.split(" x ")[1].partition(", ")[2] == f"version {VERSION}"
    ]
    return sorted(same, key=_fewness)


def _fewness(score: dict[str, Any]) -> int:
    return -len(score["networks"])


def transfers(found: Iterable[Run]) -> pd.DataFrame:
    """Every kept evaluation of the runs' sets under their own protocol, on their own backbone and on others.

    One row each: method, dataset, ipc, seed, backbone, mean, std (per cent) and networks, each one's accuracy. Those on
    other backbones are what `Run.transfer` has kept; of several on one backbone the one with the most networks stands.
    """
    rows = []
    for run in found:
        same = on_other_networks(run.path)
        own = {"backbone": run.synthetic.backbone, **run.record["accuracy"]["last"]}
        rows += [
            {key: run.record[key] for key in ("method", "dataset", "ipc", "seed")}
            | {key: score[key] for key in ("backbone", "mean", "std", "networks")}
            for score in sorted((own, *same), key=_fewness)
        ]
    columns = ["method", "dataset", "ipc", "seed", "backbone", "mean", "std", "networks"]
    return pd.DataFrame(rows, columns=columns).drop_duplicates(
        ["method", "dataset", "ipc", "seed", "backbone"]
    )


def printed_across(dataset: str) -> pd.DataFrame:
    """The papers' cross-architecture figures on a dataset: columns set, backbone, value, cell (value and mark).

    `set` names the method, the IPC and the backbone that it was distilled on where that is not the plain ConvNet.
    """
    table = _plain(first_hand())
    table = table[table.dataset == canonical(dataset)].fillna({"ipc": 0}).astype({"ipc": int})
    networks = table.groupby(["paper", "table", "method", "ipc", "backbone"]).backbone_eval
    table = table[networks.transform("nunique") > 1]
    made = [
        f"{r.method}, IPC {r.ipc}"
        + (f", on {r.backbone}" if r.backbone.partition(":depth")[0] != "convnet" else "")
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


def with_spread(value: float, spread: float, count: int = 2) -> str:
    """ "48.9 ± 0.6", or "48.9" where there is no spread or one value alone."""
    return f"{value:.1f}" if math.isnan(spread) or count < 2 else f"{value:.1f} ± {spread:.1f}"


def as_markdown(table: pd.DataFrame) -> str:
    """A DataFrame of text and integers as a Markdown table."""
    lines = [[*table.columns], ["---"] * len(table.columns), *table.astype(str).values.tolist()]
    cells = [[cell.replace("|", "/") for cell in line] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)


def sweep(
    method: str,
    dataset: str,
    *,
    ipcs: Iterable[int],
    seeds: Iterable[int] = (0,),
    together: bool = False,
    engine: str = "local",
    address: str | None = None,
    **options: Any,
) -> pd.DataFrame:
    """`run` for every IPC and seed; one row per run, as `tables.runs` makes them.

    together: all IPCs of a seed in lock step, where the method shares work among them (`run_together`; DM does): the
    same sets in less time, of which no run has one of its own. engine: "local" makes the runs here, "ray" on a Ray
    cluster at `address` (`ddlib.engine.cluster`), from which the records come back; they are the same ones. Raises
    `DDError` where a run failed there, and for what the cluster does not take: `together`, fresh, any_threads,
    checkpoint_every.
    """
    ipcs, seeds = listed("ipcs", ipcs), listed("seeds", seeds)
    instance("together", plain(together), bool)
    asked = [{"ipc": ipc, "seed": seed} for ipc in ipcs for seed in seeds]
    if choose("engine", engine, ENGINES) == "ray":
        _run_on_cluster(method, dataset, asked, address, {"together": together, **options})
    if together:
        made = [run_together(method, dataset, ipcs=ipcs, seed=seed, **options) for seed in seeds]
        return runs([run for of_one_ipc in zip(*made, strict=True) for run in of_one_ipc])
    return runs([distil(method, dataset, **one, **options) for one in asked])


def _run_on_cluster(
    method: str, dataset: str, asked: list[dict], address: str | None, options: dict[str, Any]
) -> None:
    """Make the records of a sweep on a Ray cluster; a run that failed there is not made here in silence."""
    from ..engine import cluster

    known = signature(distil).parameters
    for key in ("together", "fresh", "any_threads", "checkpoint_every"):
        if options.pop(key, None):
            raise DDError(
                f"{key} does not go with engine='ray': leave it out, or say engine='local'"
            )
    overrides = {key: value for key, value in options.items() if key not in known}
    profile, results = options.get("profile", "smoke"), options.get("results")
    specs = [resolve(method, dataset, profile=profile, **one, **overrides) for one in asked]
    rows, device = queue.unpriced(specs, results), options.get("device", "auto")
    cluster.work_through(rows, address, None, device, results)
    failed = sum(not row.done and not row.taken for row in rows)
    if failed:
        raise DDError(f"{failed} of {len(rows)} runs failed on the cluster, as said above")
