"""What the notebook of a paper shows: its table beside ours, the settings that differ, details that fold away.

Each verb makes one thing to look at, from records and from `published.csv`; nothing is trained here, but for
`controls`, which asks for random images as any sweep does. The kept records are the checkout's own, so that the
column *ours* is filled beside the column *paper* before the reader has run anything.
"""

from __future__ import annotations

import html
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd
from pandas.io.formats.style import Styler

from ..config import resolve
from ..core import DDError, pick_device
from ..data.dataset import canonical
from ..engine import meter
from ..engine.record import Run
from ..engine.run import sweep
from ..files import SOURCE
from ..methods import METHODS
from ..studies import size
from . import plots, tables
from .claims import KEPT

MAIN = ("dataset", "ipc", "method", "paper", "ours", "Δ", "verdict")
# What random images need to be evaluated as a method's own sets are, by protocol.
EVALUATION = {
    "frepo": (
        "eval_backbone",
        "protocol",
        "eval_epochs",
        "eval_augment",
        "eval_lr",
        "networks",
        "zca",
        "resolution",
        "compile",
    ),
    "idc": ("protocol", "eval_epochs", "eval_augment"),
    "mtt": ("backbone", "protocol", "augment", "zca", "compile"),
    "dm": (),
}


@dataclass(frozen=True)
class Page:
    """Something to show in a notebook: HTML there, plain text elsewhere."""

    html: str
    text: str

    def _repr_html_(self) -> str:
        return self.html

    def __repr__(self) -> str:
        return self.text


def page(part: object) -> Page:
    """A table, a text or a page as a page."""
    if isinstance(part, Page):
        return part
    if isinstance(part, pd.DataFrame):
        part = tables.titled(part, "")
    if isinstance(part, Styler):
        return Page(part.to_html(), part.data.to_string(index=False))
    return Page(f"<pre>{html.escape(str(part))}</pre>", str(part))


def fold(title: str, *parts: object) -> Page:
    """Parts under a title that opens at a click."""
    pages = [page(part) for part in parts]
    inside = "".join(one.html for one in pages)
    summary = f"<summary>{html.escape(title)}</summary>"
    text = "\n\n".join([title, *(one.text for one in pages)])
    return Page(f"<details>{summary}{inside}</details>", text)


def kept(methods: Iterable[str], *, every: bool = False) -> pd.DataFrame:
    """The checkout's kept runs of `methods`, one row each: the setting nearest to each preset, or `every` one."""
    wanted = set(methods)
    found = [run for profile in KEPT for run in tables.stored(SOURCE / "results", profile)]
    rows = tables.runs(run for run in found if run.record["method"] in wanted)
    return rows if every or rows.empty else tables.headline(rows)


def kept_run(method: str, dataset: str, ipc: int, **values: Any) -> Run:
    """The checkout's kept run of a method, its preset's own setting first, then the lowest seed.

    `values` are settings that it must have. Raises `DDError` where none is kept.
    """
    rows = kept([method], every=True)
    rows = rows[(rows.ipc == ipc) & (rows.dataset.map(canonical) == canonical(dataset))]
    rows = rows.assign(changes=rows.overrides.str.count("=")).sort_values(["changes", "seed"])
    for row in rows.itertuples():
        run = Run(SOURCE / "results" / row.profile / f"{row.name}.json")
        if values.items() <= run.record["values"].items():
            return run
    raise DDError(f"no run of {method} on {dataset} at IPC {ipc} is kept in {SOURCE / 'results'}")


def control(method: str, dataset: str, ipc: int, profile: str, **changes: Any) -> dict[str, Any]:
    """The overrides that evaluate random images as the sets of `method` are: network, loss, step size, epochs."""
    values = resolve(method, dataset, ipc, profile, **changes).values
    same = {key: values[key] for key in EVALUATION.get(values["protocol"], ())}
    return same | ({"eval_lr": values["lr_teacher"]} if values["protocol"] == "mtt" else {})


def controls(
    method: str,
    dataset: str,
    *,
    ipcs: Iterable[int],
    profile: str,
    changes: Mapping[str, Any] | None = None,
    **options: Any,
) -> pd.DataFrame:
    """Random images under the evaluation of `method`, one row a run; `changes` are the method's own overrides."""
    parts = []
    for ipc in ipcs:
        same = control(method, dataset, ipc, profile, **(changes or {}))
        parts.append(sweep("random", dataset, ipcs=[ipc], profile=profile, **options, **same))
    return pd.concat(parts, ignore_index=True)


def beside(live: pd.DataFrame, methods: Iterable[str], *, every: bool = False) -> Page:
    """The main table, paper | ours: the kept runs of `methods`, then the `live` ones; the rest of it folds.

    Seven columns. Random images are those under the evaluation of the first of `methods`.
    """
    first, *others = methods
    protocol = resolve(first, live.dataset.iloc[0], int(live.ipc.iloc[0]), live.profile.iloc[0]).run.protocol
    rows = kept([first, *others], every=every)
    random = kept(["random"], every=True)
    rows = pd.concat([random[random.protocol == protocol], rows], ignore_index=True)
    rows = rows[~rows.name.isin(live.name)]
    parts = [tables.compare(part) for part in (rows, live) if len(part)]
    whole = pd.concat([part.assign(method=_named(part)) for part in parts], ignore_index=True)
    whole["dataset"] = [plots.short(name) for name in whole.dataset]
    main = whole[list(MAIN)].assign(verdict=whole.verdict.str.partition(":")[0])
    more = whole[[name for name in whole if name not in (*MAIN[3:6], "overrides")]]
    caption = "Test accuracy (%), last step, mean ± spread over all networks of all seeds"
    shown = page(tables.titled(main.fillna(""), caption))
    details = fold("Spread by seed and by network, and every setting that differs", more.fillna(""))
    return Page(shown.html + details.html, f"{shown.text}\n\n{details.text}")


def _named(rows: pd.DataFrame) -> list[str]:
    """The method, with its overrides where the table has several settings of it."""
    overrides = rows.get("overrides", pd.Series("", rows.index)).fillna("")
    several = overrides.groupby([rows.dataset, rows.ipc, rows.method]).transform("nunique") > 1
    pairs = zip(rows.method, overrides, several, strict=True)
    return [f"{name} ({text})" if many and text else name for name, text, many in pairs]


def published(methods: Iterable[str], datasets: Iterable[str]) -> Page:
    """The papers' own table, folded: at most five methods, so that it stays seven columns wide."""
    table = tables.printed(methods, datasets)
    table["dataset"] = [plots.short(name) for name in table.dataset]
    note = "Test accuracy (%); full: the whole training set. * from memory, ~ read off a plot"
    return fold("The table as published", tables.titled(table, note))


def cost(table: pd.DataFrame) -> Page:
    """Seconds and memory of the runs in `table`, mean over seeds, folded."""
    rows = tables.cost(table)
    machines = "; ".join(sorted({*rows.device, *rows.memory}))
    columns = ["ipc", "method", "steps", "distillation (s)", "ms / step", "evaluation (s)"]
    note = f"One run, mean over seeds; {machines}"
    return fold("What a run cost", tables.titled(rows[[*columns, "peak MiB"]], note))


def settings(method: str, dataset: str, ipc: int, profile: str, **changes: Any) -> Page:
    """Folded: what this run's settings have in place of the paper's, and the differences that the code states."""
    ours = resolve(method, dataset, ipc, profile, **changes).values
    paper = resolve(method, dataset, ipc, "paper").values
    rows = [
        {"setting": key, "here": str(value), "paper": str(paper[key])}
        for key, value in ours.items()
        if value != paper[key]
    ]
    where = plots.place(dataset, profile)
    caption = f"{method}, IPC {ipc}: {where}; {len(rows)} settings differ from the paper's"
    parts = [fold("Settings that differ", tables.titled(pd.DataFrame(rows), caption))]
    module = sys.modules[METHODS[method].__module__]
    parts.append(fold(f"The method as coded: ddlib/{_path(module.__name__)}", module.__doc__ or ""))
    return Page("".join(one.html for one in parts), "\n\n".join(one.text for one in parts))


def _path(module: str) -> str:
    return module.partition(".")[2].replace(".", "/") + ".py"


def paper_size(method: str, device: str = "auto") -> Page:
    """Folded: the arithmetic of `method` on CIFAR-10 at the paper's size, and the least hours on this machine."""
    table = size.dream(device) if method == "dream_plus" else size.by_ipc(method, device)
    caption = f"CIFAR-10 at the paper's setting; {meter.machine(pick_device(device))}"
    shown = tables.titled(table, caption).format(precision=1)
    return fold("What the paper's size costs on this machine", shown)


def across(
    runs: Mapping[str, Any],
    backbones: Iterable[str],
    *,
    networks: int = 2,
    device: str = "auto",
    hard: str = "",
) -> pd.DataFrame:
    """Accuracy by network (rows) and set (columns) of `runs`, set name -> run, on each set's own network and others.

    `hard` names a network on which the images' classes are learned under DSA's protocol, in a last row.
    """
    backbones = list(backbones)
    scores = [
        {"method": name, "backbone": run.synthetic.backbone, **run.record["accuracy"]["last"]}
        for name, run in runs.items()
    ]
    for backbone in backbones:
        for name, run in runs.items():
            score = run.transfer(backbone, networks=networks, device=device)
            scores.append({"method": name, **score})
    for name, run in runs.items() if hard else ():
        score = run.transfer(hard, protocol="dsa", hard=True, device=device)
        scores.append({"method": name, **score, "backbone": "DSA protocol, hard labels"})
    return tables.across(scores)
