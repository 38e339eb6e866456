"""Figures from records and distilled sets; the same colour for the same method everywhere (Okabe and Ito's palette)."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from textwrap import fill

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, LogLocator, NullLocator

from ..config import PROFILES
from ..core import DDError, choose, generator, instance, shown, whole
from ..data.dataset import Dataset, canonical
from ..distilled import Synthetic
from ..engine.record import Run
from ..files import figures_folder, write_atomically
from ..methods import METHODS
from . import tables

COLOURS = {
    "random": "#999999",
    "herding": "#CC79A7",
    "kcenter": "#F0E442",
    "kmeans": "#56B4E9",
    "forgetting": "#8C8C00",
    "dm": "#0072B2",
    "dc": "#8C564B",
    "dsa": "#D55E00",
    "idc": "#E69F00",
    "mtt": "#117733",
    "tesla": "#009E73",
    "ftd": "#882255",
    "datm": "#AA4499",
    "frepo": "#332288",
    "dream": "#44AA99",
    "dream_plus": "#CC6677",
}
ENGINES = {
    "unroll": "#555555",
    "checkpoint": "#BB9900",
    "tesla": COLOURS["tesla"],
    "tesla_repo": "#74C476",
    "adjoint": "#3C3CC8",
    "plain": COLOURS["mtt"],
    "sam": "#EE7733",
    "agsam": COLOURS["ftd"],  # and experts
    "members": "#000000",
    "whole": "#000000",
    "early stop": "#777744",
}  # and real data in the applications
TITLES = {
    "cifar10": "CIFAR-10",
    "cifar100": "CIFAR-100",
    "digits": "digits",
    "fashionmnist": "FashionMNIST",
    "imagenet1k": "ImageNet-1K",
    "imagenette": "ImageNette",
    "imagewoof": "ImageWoof",
    "mnist": "MNIST",
    "svhn": "SVHN",
    "tinyimagenet": "TinyImageNet",
}
# What shares a panel where all methods would crowd it; random images stand in each.
FAMILIES = {
    "real images": ("random", "herding", "kcenter", "kmeans", "forgetting"),
    "features, gradients": ("dm", "dc", "dsa", "idc", "dream", "dream_plus"),
    "trajectories, regression": ("mtt", "tesla", "ftd", "datm", "frepo"),
}
MOST = 8  # curves of methods a panel
SIZES = {"smoke": "quick run", "small": "shortened run", "paper": "the paper's setting"}
LINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # for what is no method
MARKERS = "os^Dvph"
MOSAIC = "mosaic"  # a figure of pixels alone, of which an SVG would be a larger PNG


def colour_of(method: str) -> str:
    """A method's colour: that of `COLOURS`, else the one it was registered with, else one of `LINES` by its name."""
    if method in COLOURS:
        return COLOURS[method]
    registered = METHODS.registration(method).colour if method in METHODS else ""
    return registered or LINES[sum(method.encode()) % len(LINES)]


def ordered(methods: Iterable[str]) -> list[str]:
    """The methods, each once, in the order of `COLOURS`, which all figures keep; others follow by name."""
    names = set(methods)
    return [*filter(names.__contains__, COLOURS), *sorted(names.difference(COLOURS))]


def grid(
    pixels: torch.Tensor,
    columns: int,
    *,
    titles: Sequence[str] = (),
    rows: Sequence[str] = (),
    scale: float = 0.8,
) -> Figure:
    """Images [n, C, H, W] in [0, 1] as one mosaic, row by row; `titles` name the columns, `rows` the rows."""
    count, (height, width) = math.ceil(len(pixels) / columns), pixels.shape[2:]
    gap = max(1, width // 10)
    tiles = F.pad(
        pixels.detach().cpu().float().expand(-1, 3, -1, -1), (gap, gap, gap, gap), value=1.0
    )
    tiles = torch.cat([tiles, tiles.new_ones(count * columns - len(tiles), *tiles.shape[1:])])
    picture = (
        tiles.unflatten(0, (count, columns)).permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
    )
    margin = 0.8 if rows else 0
    figure, axis = plt.subplots(
        figsize=(scale * columns + margin, scale * count + 0.35), layout="constrained"
    )
    axis.imshow(picture.numpy(), interpolation="nearest")
    axis.set_xticks(
        [(k + 0.5) * (width + 2 * gap) - 0.5 for k in range(len(titles))], titles, fontsize=8
    )
    axis.set_yticks(
        [(k + 0.5) * (height + 2 * gap) - 0.5 for k in range(len(rows))], rows, fontsize=8
    )
    axis.tick_params(length=0, labeltop=True, labelbottom=False)
    axis.spines[:].set_visible(False)
    figure.set_gid(MOSAIC)
    return figure


def _by_class(pixels: torch.Tensor, classes: Sequence[str], per_class: int, title: str) -> Figure:
    """Images [classes * ipc, C, H, W]: one row per class, or all classes side by side where each has one image."""
    table = pixels.unflatten(0, (len(classes), -1))[:, :per_class]
    names = [name[:12] for name in classes]
    if table.shape[1] == 1:
        figure = grid(
            table[:100].flatten(0, 1),
            min(10, len(classes)),
            titles=names if len(classes) <= 10 else (),
        )
    else:
        figure = grid(table[:10].flatten(0, 1), table.shape[1], rows=names[:10], scale=0.6)
        title += f" (10 of {len(classes)} classes)" if len(classes) > 10 else ""
    figure.suptitle(title, fontsize=9)
    return figure


def images(
    syn: Synthetic, data: Dataset | None = None, *, per_class: int = 10, title: str | None = None
) -> Figure:
    """The distilled images, one row per class (at most `per_class` of each); a ZCA set needs its `data`."""
    pixels = instance("the set", syn, Synthetic).pixels(data)
    title = instance("title", title, str, None) or title_of(syn)
    return _by_class(pixels, syn.classes, whole("per_class", per_class, 1), title)


def real(data: Dataset, *, per_class: int = 10, seed: int = 0, split: str = "train") -> Figure:
    """Random real images, one row per class."""
    instance("data", data, Dataset)
    per_class, seed = whole("per_class", per_class, 1), whole("seed", seed, 0)
    index = data.sample(per_class, generator(seed, "plots", "real"), split)
    return _by_class(
        data.denormalise(data.batch(split, index.flatten())),
        data.classes,
        per_class,
        f"{short(data.name)}, {split} images",
    )


def short(dataset: str) -> str:
    """A dataset as a reader calls it: "cifar10" -> "CIFAR-10", "folder:cifar10" -> "CIFAR-10 (JPEG)".

    Any other folder loses the path before its name: "folder:/home/me/pets" -> "folder:pets".
    """
    if not isinstance(dataset, str):
        raise DDError(
            f"a dataset is named by a word such as digits or cifar10, not {shown(dataset)}"
        )
    known = canonical(dataset)
    if not dataset.startswith("folder:"):
        return TITLES.get(known, known)
    return f"{TITLES[known]} (JPEG)" if known in TITLES else f"folder:{known}"


def place(dataset: str, profile: str = "") -> str:
    """What a title or caption says of a run: "CIFAR-10 (JPEG), shortened run"."""
    size = SIZES.get(profile, "")
    return f"{short(dataset)}, {size}" if size else short(dataset)


def setting(dataset: str, ipc: object) -> str:
    """What a table calls a row: "CIFAR-10 (JPEG), IPC 1"; without an IPC it is the dataset as it is named."""
    return f"{short(dataset)}, IPC {ipc}" if ipc else dataset


def title_of(syn: Synthetic) -> str:
    """What a picture of the set is called: method, images per class, dataset and size of the run."""
    made = syn.spec
    if not made:
        return short(syn.dataset)
    return f"{made['method']}, IPC {made['ipc']}: {place(syn.dataset, made['profile'])}"


def evolution(syn: Synthetic, data: Dataset | None = None, *, title: str | None = None) -> Figure:
    """The first image of each class (of the first ten) at every snapshot, one row per step."""
    if not syn.snapshots:
        raise DDError(
            "this set keeps no snapshots: run it with snapshots=5, or another count, to see it change"
        )
    shots = {f"step {step}": replace(syn, images=shot) for step, shot in syn.snapshots.items()}
    return side_by_side(shots, data, title=title or title_of(syn))


def side_by_side(
    sets: Mapping[str, Synthetic], data: Dataset | None = None, *, title: str = ""
) -> Figure:
    """The first image of each class (of the first ten) of several sets, one row per set by its name."""
    first = [syn.pixels(data if syn.zca else None)[:: syn.ipc][:10] for syn in sets.values()]
    classes = next(iter(sets.values())).classes
    names = [name[:12] for name in classes[:10]]
    figure = grid(torch.cat(first), len(first[0]), titles=names, rows=list(sets))
    figure.suptitle(title, fontsize=9)
    return figure


def _panels(count: int, width: float, height: float) -> tuple[Figure, list]:
    """A figure with `count` panels, three a row, and their axes."""
    across, down = min(3, count), math.ceil(count / 3)
    figure, axes = plt.subplots(
        down,
        across,
        figsize=(width * across + 0.6, height * down + 0.2),
        squeeze=False,
        layout="constrained",
    )
    for axis in axes.flat[count:]:
        axis.remove()
    return figure, list(axes.flat[:count])


def accuracy_vs_ipc(
    table: pd.DataFrame,
    *,
    papers: bool = True,
    datasets: Sequence[str] = (),
    methods: Sequence[str] = (),
    full: dict[str, float] | None = None,
) -> Figure:
    """Accuracy against IPC: ours solid with the pooled spread, the papers' dashed, hollow from memory.

    One panel per dataset and profile of `table`, with the papers' figures of its methods at its IPCs;
    with `datasets`, one a dataset, with one more for each other name in it, and all that the papers
    print of `methods`; of runs in several profiles the nearest to the paper's. More than `MOST`
    methods are split by `FAMILIES`, on one scale. `full`: our accuracy on the whole training set by
    dataset, a line. A panel whose runs share one IPC shows a row per method instead of a curve of one
    point. Where our random images are under another protocol than the printed ones, those are not drawn.
    """
    rows, every = tables.summary(table), bool(datasets)
    rows = rows.sort_values("method", key=_rank, kind="stable")
    panels = []
    for dataset, profile, here in _places(rows, datasets):
        ipcs = sorted(map(int, here.ipc.unique()))
        theirs = _theirs(methods or dict.fromkeys(here.method), dataset, () if every else ipcs)
        theirs = theirs if every else _comparable(theirs, here)
        drawn = {*here.method, *theirs}
        curves = every or len(ipcs) > 1
        for family, names in _families(drawn).items() if curves else {"": drawn}.items():
            ours = _ours(here[here.method.isin(names)])
            known = {name: line for name, line in theirs.items() if name in names and papers}
            parts = (ours, known, _ceilings(dataset, full), ipcs)
            panels.append((place(dataset, profile), family, curves, parts))
    panels.sort(key=lambda panel: not panel[1])  # three families make a row
    small = len(panels) > 2
    tall = max(3.6, *(0.34 * len(parts[0]) for *_, parts in panels))
    figure, axes = _panels(len(panels), 3.6 if small else 5.2, 3.1 if small else tall)
    ends, scales = [], {}
    for axis, (where, family, curves, parts) in zip(axes, panels, strict=True):
        if family:
            axis.sharey(scales.setdefault(where, axis))
        axis.set_title(f"{where}\n{family}".strip(), fontsize=9 if small else 10)
        axis.grid(alpha=0.3)
        ends.append((_curves if curves else _rows)(axis, *parts, every))
    for axis, names in zip(axes, ends, strict=True):
        _name_ends(axis, names)
    _legend(figure, axes)
    return figure


def _places(rows: pd.DataFrame, datasets: Sequence[str]) -> list[tuple[str, str, pd.DataFrame]]:
    """(dataset, profile, rows of `tables.summary`) a panel, the profile "" where the rows are of several."""
    if not datasets:
        return [(*where, here) for where, here in rows.groupby(["dataset", "profile"], sort=False)]
    nearest = rows.sort_values("profile", key=lambda names: names.map([*PROFILES].index))
    nearest = rows.loc[nearest.drop_duplicates(["method", "dataset", "ipc"], keep="last").index]
    places = []
    for dataset, here in nearest.sort_index().groupby("dataset", sort=False):
        profiles = here.profile.unique()
        places.append((dataset, profiles[0] if len(profiles) == 1 else "", here))
    drawn = {canonical(dataset) for dataset, *_ in places}
    return places + [(name, "", rows[:0]) for name in datasets if name not in drawn]


def _families(methods: Collection[str]) -> dict[str, set[str]]:
    """The methods of each panel: all in one, or those of `FAMILIES` and others where they are many."""
    if len(methods) <= MOST:
        return {"": {*methods}}
    others = {*methods}.difference(*FAMILIES.values())
    found = {}
    for family, names in (FAMILIES | {"others": others}).items():
        if (here := {*names} & {*methods}) - {"random"}:
            found[family] = here | {"random"} & {*methods}
    return found


def _rank(methods: pd.Series) -> pd.Series:
    return methods.map(ordered(methods).index)


def _ours(rows: pd.DataFrame) -> dict[str, tuple[str, pd.DataFrame]]:
    """Label -> (method, its rows), the overrides named only where a method has several settings."""
    found = {}
    for (method, overrides), line in rows.groupby(["method", "overrides"], sort=False):
        several = rows.overrides[rows.method == method].nunique() > 1
        label = fill(f"{method} ({overrides})", 40) if overrides and several else method
        found[label] = (method, line)
    return found


def _theirs(methods: Iterable[str], dataset: str, ipcs: Sequence[int]) -> dict[str, pd.DataFrame]:
    """Method -> what its paper prints, at `ipcs` or, where none are given, at all."""
    found = {}
    for method in methods:
        known = tables.curve(method, dataset)
        known = known[known.ipc.isin(ipcs)] if ipcs else known
        if len(known):
            found[method] = known
    return found


def _comparable(theirs: dict[str, pd.DataFrame], ours: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """`theirs` without its random images where ours are under another protocol."""
    found = ours.protocol[ours.method == "random"].replace(tables.SAME_PROTOCOL)
    known = theirs.get("random")
    if known is None or found.empty or found.isin(known.protocol).any():
        return theirs
    return {name: line for name, line in theirs.items() if name != "random"}


def _ceilings(dataset: str, full: dict[str, float] | None) -> dict[str, float]:
    if full is None:
        return {}
    known = {"ours": full.get(dataset, math.nan)}
    known["paper"] = tables.curve("full", dataset).value.mean()
    return {whose: value for whose, value in known.items() if not math.isnan(value)}


def _curves(axis: Axes, ours: dict, theirs: dict, tops: dict, ipcs: list, every: bool) -> list:
    """Lines over the IPCs, and what is to be named at their right ends, ours in bold."""
    ends = []
    for k, (label, (method, line)) in enumerate(ours.items()):
        x = line.ipc * 1.03 ** (k - (len(ours) - 1) / 2)  # a little apart, so that all are seen
        axis.errorbar(
            x,
            line.accuracy,
            line.pooled,
            marker="o",
            capsize=3,
            color=colour_of(method),
            label=f"{label}, ours",
        )
        ends.append((x.iloc[-1], line.accuracy.iloc[-1], label, colour_of(method), "bold"))
    for method, known in theirs.items():
        axis.errorbar(
            known.ipc,
            known.value,
            known.spread,
            fmt="s--",
            capsize=3,
            ms=5,
            alpha=0.6,
            zorder=1.5,
            color=colour_of(method),
            label=f"{method}, paper",
        )
        memory = known[known.mark == "*"]
        axis.plot(memory.ipc, memory.value, "ws", ms=3, label="")
        ends.append((known.ipc.iloc[-1], known.value.iloc[-1], method, colour_of(method), "normal"))
    for whose, value in tops.items():
        style = "-" if whose == "ours" else "--"
        axis.axhline(value, color="black", ls=style, lw=1, label=f"whole set, {whose}")
    axis.set(xscale="log", xlabel="images per class (IPC)")
    if axis.get_subplotspec().is_first_col():
        axis.set_ylabel("test accuracy (%), mean ± std")
    if not every:
        axis.set_xlim(ipcs[0] / 1.6, ipcs[-1] * 1.6)
    ticks = [1, 10, 50] if every else ipcs
    if every and axis.dataLim.x1 >= 1000:
        ticks.append(1000)
    axis.set_xticks(ticks, ticks)
    axis.minorticks_off()
    return ends


def _name_ends(axis: Axes, ends: list[tuple]) -> None:
    """Names of lines in their colours: beside the right edge, or beside a line that ends far to the left of it.

    `ends` are (x, y, name, colour, weight).
    """
    axis.autoscale_view()  # settles the limits, on which the transform rests
    place = (axis.transData - axis.transAxes).transform
    placed = [(*place(end[:2]), end) for end in ends]
    early = [one for one in placed if one[0] < 0.3]
    if early:
        _name_column(axis, max(x for x, *_ in early) + 0.06, early)
    _name_column(axis, 1.03, [one for one in placed if one[0] >= 0.3])


def _name_column(axis: Axes, left: float, placed: list[tuple]) -> None:
    """Names under one another from `left` on, moved apart so that none covers another.

    `placed` are (x, y, end): shares of the axis, so that its scale may be a log one.
    """
    placed = sorted(placed, key=lambda one: one[1])
    rooms = [0.045 * (1 + end[2].count("\n")) for *_, end in placed]
    heights: list[float] = []
    for k, (_, y, _) in enumerate(placed):
        least = heights[-1] + (rooms[k - 1] + rooms[k]) / 2 if heights else 0.0
        heights.append(max(y, least))
    ceiling = 1.0
    for k in reversed(range(len(heights))):
        heights[k] = min(heights[k], ceiling)
        ceiling = heights[k] - (rooms[k - 1] + rooms[k]) / 2
    for height, (*_, (x, y, name, colour, weight)) in zip(heights, placed, strict=True):
        axis.annotate(
            name,
            (x, y),
            (left, height),
            textcoords="axes fraction",
            color=_dark(colour),
            weight=weight,
            fontsize=7,
            va="center",
            bbox={"facecolor": "white", "alpha": 0.7, "edgecolor": "none", "pad": 0.5},
            arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.5, "alpha": 0.5},
            annotation_clip=False,
        )


def _dark(colour: str) -> tuple[float, ...]:
    """The colour for text: bright ones darker, so that they are read on white."""
    rgb = to_rgb(colour)
    bright = 0.3 * rgb[0] + 0.6 * rgb[1] + 0.1 * rgb[2]
    return tuple(part * min(1.0, 0.55 / max(bright, 1e-6)) for part in rgb)


def _rows(axis: Axes, ours: dict, theirs: dict, tops: dict, ipcs: list, every: bool) -> list:
    """One IPC: a row per method, ours a disc and the paper's a square, joined by a thin line; no line to name."""
    names = list(ours)
    for k, (label, (method, line)) in enumerate(ours.items()):
        mine, colour = line.iloc[0], colour_of(method)
        known = theirs.get(method)
        if known is not None:
            value, spread, mark = known[["value", "spread", "mark"]].iloc[0]
            axis.plot([mine.accuracy, value], [k, k], color=colour, lw=1, alpha=0.5, label="")
            axis.errorbar(
                [value],
                [k],
                xerr=[spread],
                fmt="s",
                capsize=3,
                ms=6,
                color=colour,
                mfc="white" if mark == "*" else colour,
                alpha=0.7,
                label=f"{method}, paper",
            )
        axis.errorbar(
            [mine.accuracy],
            [k],
            xerr=[mine.pooled],
            fmt="o",
            capsize=3,
            ms=7,
            color=colour,
            label=f"{label}, ours",
        )
    for whose, value in tops.items():
        style = "-" if whose == "ours" else "--"
        axis.axvline(value, color="black", ls=style, lw=1, label=f"whole set, {whose}")
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.set_xlabel(f"test accuracy (%) at IPC {ipcs[0]}, mean ± std")
    return []


def _legend(figure: Figure, axes: Sequence[Axes]) -> None:
    """What the marks mean, once for the figure; the methods are named at their lines."""
    named = {label for axis in axes for label in axis.get_legend_handles_labels()[1]}
    styles = {
        "ours": Line2D([], [], color="#444444", marker="o"),
        "paper": Line2D([], [], color="#444444", marker="s", ls="--", alpha=0.6),
    }
    shown = {
        name: line for name, line in styles.items() if any(n.endswith(f", {name}") for n in named)
    }
    for whose, style in (("ours", "-"), ("paper", "--")):
        if f"whole set, {whose}" in named:
            shown[f"whole set, {whose}"] = Line2D([], [], color="black", lw=1, ls=style)
    figure.legend(shown.values(), shown, fontsize=8, loc="outside upper center", ncols=4)


def heatmap(
    table: pd.DataFrame,
    title: str,
    *,
    label: str,
    text: pd.DataFrame | None = None,
    centred: bool = False,
) -> Figure:
    """Numbers as colours, each written in its cell, by `text` if given, e.g. with a spread; a missing one stays white.

    `label` names them and their unit, the names of index and columns the axes; `centred` puts white at 0.
    """
    most = float(table.abs().max().max())
    figure, axis = plt.subplots(
        figsize=(0.8 * table.shape[1] + 2.4, 0.42 * len(table) + 1.7), layout="constrained"
    )
    drawn = axis.imshow(
        table.to_numpy(float),
        aspect="auto",
        alpha=0.7,
        cmap="RdBu" if centred else "Blues",
        vmin=-most if centred else None,
        vmax=most,
    )
    text = table.map("{:.1f}".format) if text is None else text
    for i, j in zip(*table.notna().to_numpy().nonzero(), strict=True):
        axis.text(j, i, text.iat[i, j], ha="center", va="center", fontsize=7)
    axis.set_xticks(range(table.shape[1]), table.columns, rotation=30, ha="right", fontsize=8)
    axis.set_yticks(range(len(table)), table.index, fontsize=8)
    axis.set(xlabel=table.columns.name, ylabel=table.index.name)
    axis.set_title(title, fontsize=10)
    figure.colorbar(drawn, label=label)
    return figure


def history(found: list[Run], key: str = "loss") -> Figure:
    """A logged metric against the step, one line per run, one colour per IPC."""
    figure, axis = plt.subplots(figsize=(5.2, 3.4), layout="constrained")
    ipcs = sorted({run.record["ipc"] for run in found})
    seen = set()
    for run in found:
        rows, ipc = [row for row in run.record["history"] if key in row], run.record["ipc"]
        axis.plot(
            [row["step"] for row in rows],
            [row[key] for row in rows],
            lw=1,
            alpha=0.8,
            color=LINES[ipcs.index(ipc) % len(LINES)],
            label=None if ipc in seen else f"IPC {ipc}",
        )
        seen.add(ipc)
    record = found[0].record
    seeds = len({run.record["seed"] for run in found})
    axis.set(
        xlabel="step",
        ylabel=key,
        yscale="log",
        title=f"{record['method']}: {place(record['dataset'], record['profile'])}, "
        f"{seeds} seed{'s' if seeds > 1 else ''}",
    )
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 4, 6)))
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.yaxis.set_minor_locator(NullLocator())
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return figure


def lines(
    table: pd.DataFrame,
    x: str,
    columns: dict[str, str],
    by: str,
    title: str,
    *,
    xlabel: str | None = None,
    log: Sequence[str] = (),
) -> Figure:
    """Columns against `x`, one panel each (three a row) under its axis label: mean ± std of the rows with equal `x`.

    One line per value of `by`, named at its end; lines that coincide in a panel are one, with all their names. `log`
    names the columns, `x` too, on a log axis.
    """
    names = list(dict.fromkeys(table[by]))
    figure, axes = _panels(len(columns), 4.2, 3.1)
    drawn = []
    for axis, (column, label) in zip(axes, columns.items(), strict=True):
        rows = table.groupby([by, x])[column].agg(["mean", ("std", lambda part: part.std(ddof=0))])
        ends = []
        for one, *others in _coinciding({name: rows.loc[name] for name in names}):
            k, line = names.index(one), rows.loc[one]
            colour = (ENGINES | COLOURS).get(one, LINES[k % len(LINES)])
            axis.errorbar(
                line.index,
                line["mean"],
                line["std"] if line["std"].any() else None,
                capsize=2,
                label=one,
                ms=5,
                color=colour,
                marker=MARKERS[k % len(MARKERS)],
            )
            words = fill(", ".join([one, *others]), 14)
            ends.append((line.index[-1], line["mean"].iloc[-1], words, colour, "normal"))
        drawn.append(ends)
        axis.set(xlabel=xlabel or x, ylabel=label)
        for line, name in ((axis.xaxis, x), (axis.yaxis, column)):
            if name in log:
                axis.set(**{f"{line.axis_name}scale": "log"})
                line.set_major_locator(
                    FixedLocator(sorted(table[x].unique()))
                    if name == x
                    else LogLocator(subs=(1, 2, 5))
                )
                line.set_major_formatter(lambda value, _: f"{value:g}")
                line.set_minor_locator(NullLocator())
        axis.grid(alpha=0.3)
    for axis, ends in zip(axes, drawn, strict=True):
        _name_ends(axis, ends)
    figure.suptitle(title, fontsize=10)
    return figure


def _coinciding(curves: Mapping[str, pd.DataFrame]) -> list[list[str]]:
    """The names of the curves, those together whose means and spreads are the same to a thousandth."""
    groups: list[list[str]] = []
    for name, curve in curves.items():
        for group in groups:
            other = curves[group[0]]
            if curve.index.equals(other.index) and np.allclose(curve, other, rtol=1e-3, atol=0):
                group.append(name)
                break
        else:
            groups.append([name])
    return groups


def intervals(
    table: pd.DataFrame,
    x: str,
    y: str,
    by: str,
    title: str,
    *,
    ylabel: str,
    level: float | None = None,
    xlabel: str | None = None,
) -> Figure:
    """`y` with its interval (columns low and high) by `x`, values of `by` side by side; `level` is a dashed line."""
    places, names = list(dict.fromkeys(table[x])), list(dict.fromkeys(table[by]))
    figure, axis = plt.subplots(
        figsize=(max(5.2, 1.3 * len(places)) + 1.6, 3.6), layout="constrained"
    )
    for k, name in enumerate(names):
        rows = table[table[by] == name]
        at = [places.index(value) + 0.7 * ((k + 0.5) / len(names) - 0.5) for value in rows[x]]
        axis.errorbar(
            at,
            rows[y],
            [rows[y] - rows.low, rows.high - rows[y]],
            fmt=MARKERS[k % len(MARKERS)],
            capsize=3,
            color=(ENGINES | COLOURS).get(name, LINES[k % len(LINES)]),
            label=name,
        )
    if level is not None:
        axis.axhline(level, color="#555555", ls="--", lw=1)
    axis.set_xticks(range(len(places)), places)
    axis.set(ylabel=ylabel, xlabel=xlabel or x)
    axis.set_title(title, fontsize=10)
    axis.grid(alpha=0.3, axis="y")
    axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))  # points fill the axes
    return figure


def scatter(
    table: pd.DataFrame, x: str, y: str, by: str, title: str, *, xlabel: str, ylabel: str
) -> Figure:
    """One panel per value of `by`, `x` against `y` on shared axes."""
    groups = table.groupby(by, sort=False)
    figure, axes = plt.subplots(
        1,
        len(groups),
        figsize=(2.4 * len(groups) + 0.6, 2.9),
        squeeze=False,
        sharex=True,
        sharey=True,
        layout="constrained",
    )
    for axis, (name, rows) in zip(axes[0], groups, strict=True):
        axis.scatter(
            rows[x], rows[y], s=22, alpha=0.8, color=(ENGINES | COLOURS).get(name, LINES[0])
        )
        axis.set_title(name, fontsize=9)
        axis.grid(alpha=0.3)
    axes[0, 0].set(ylabel=ylabel)
    figure.supxlabel(xlabel, fontsize=10)
    figure.suptitle(title, fontsize=10)
    return figure


def save(figure: Figure, name: str, profile: str) -> Path:
    """Write `figures/PROFILE/NAME.png`, and `.svg` but for a mosaic of pixels; DDLIB_FIGURES moves them.

    `name` may lie in a folder: a notebook's figures lie in one of its name, as in "dm/history".
    """
    place = figures_folder() / choose("profile", profile, PROFILES)
    # Without it the ids, and so the bytes, differ every time.
    with plt.rc_context({"svg.hashsalt": "ddlib"}):
        for suffix in ("png",) if figure.get_gid() == MOSAIC else ("svg", "png"):
            draw = partial(
                figure.savefig,
                format=suffix,
                dpi=150,
                bbox_inches="tight",
                metadata={"Date": None} if suffix == "svg" else None,
            )
            path = write_atomically(place / f"{name}.{suffix}", draw)
    return path
