"""Figures from records and distilled sets; the same colour for the same method everywhere (Okabe and Ito's palette)."""

from __future__ import annotations

import math
import os
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import torch
from matplotlib.figure import Figure

from . import tables
from .runs import SOURCE, Run
from .synthetic import Synthetic

COLOURS = {"random": "#999999", "herding": "#CC79A7", "kcenter": "#F0E442", "kmeans": "#56B4E9", "dm": "#0072B2",
           "dc": "#8C564B", "dsa": "#D55E00", "idc": "#E69F00", "mtt": "#117733", "tesla": "#009E73",
           "ftd": "#882255", "datm": "#AA4499", "frepo": "#332288", "dream": "#DDCC77", "dream_plus": "#CC6677"}


def grid(pixels: torch.Tensor, columns: int, *, titles: list[str] | None = None, scale: float = 0.8) -> Figure:
    """Images [n, C, H, W] in [0, 1] as a grid, row by row; `titles` name the columns."""
    rows = math.ceil(len(pixels) / columns)
    figure, axes = plt.subplots(rows, columns, figsize=(scale * columns, scale * rows + 0.35), squeeze=False,
                                layout="constrained")
    for k, axis in enumerate(axes.flat):
        axis.axis("off")
        if k < len(pixels):
            image = pixels[k].detach().cpu().permute(1, 2, 0)
            axis.imshow(image.expand(-1, -1, 3) if image.shape[2] == 1 else image, interpolation="nearest")
        if titles and k < columns:
            axis.set_title(titles[k], fontsize=8)
    return figure


def images(syn: Synthetic, data=None, *, per_class: int = 10, title: str | None = None) -> Figure:
    """The distilled images, one row a class (at most `per_class` of each); a ZCA set needs its `data`."""
    shown = min(per_class, syn.ipc)
    pixels = syn.pixels(data).unflatten(0, (len(syn.classes), syn.ipc))[:, :shown]
    if shown == 1:
        figure = grid(pixels.flatten(0, 1), len(syn.classes), titles=[name[:10] for name in syn.classes])
    else:
        figure = grid(pixels.flatten(0, 1), shown)
    figure.suptitle(title or _title(syn), fontsize=9)
    return figure


def _title(syn: Synthetic) -> str:
    made = syn.spec
    return f"{made['method']}, {made['dataset']}, IPC {made['ipc']}, {made['profile']} profile" if made else syn.dataset


def evolution(syn: Synthetic, data=None, *, title: str | None = None) -> Figure:
    """The first image of each class at every snapshot, one row a step, the step beside the row."""
    first = [syn.pixels(data, shot)[:: syn.ipc] for shot in syn.snapshots.values()]
    figure = grid(torch.cat(first), len(syn.classes), titles=[name[:10] for name in syn.classes])
    for row, step in enumerate(syn.snapshots):
        figure.axes[row * len(syn.classes)].text(-0.25, 0.5, f"step {step}", ha="right", va="center", fontsize=8,
                                                 transform=figure.axes[row * len(syn.classes)].transAxes)
    figure.suptitle(title or _title(syn), fontsize=9)
    return figure


def accuracy_vs_ipc(table: pd.DataFrame, *, papers: bool = True) -> Figure:
    """Accuracy against IPC on a log axis: ours solid with the pooled spread, the paper's dashed, one panel a dataset."""
    rows = tables.summary(table)
    places = rows[["dataset", "profile"]].drop_duplicates()
    figure, axes = plt.subplots(1, len(places), figsize=(4.6 * len(places) + 0.6, 3.6), squeeze=False,
                                layout="constrained")
    for axis, (_, place) in zip(axes[0], places.iterrows(), strict=True):
        here = rows[(rows.dataset == place.dataset) & (rows.profile == place.profile)]
        for method, line in here.groupby("method"):
            axis.errorbar(line.ipc, line.accuracy, line.pooled, marker="o", capsize=3, color=COLOURS.get(method),
                          label=f"{method}, ours")
            values = {ipc: tables.paper_value(method, place.dataset, ipc, "dsa" if method == "random" else None)
                      for ipc in sorted(here.ipc.unique())}
            known = {ipc: v for ipc, v in values.items() if v}
            if papers and known:
                axis.plot(list(known), [v[0] for v in known.values()], "s--", color=COLOURS.get(method), alpha=0.6,
                          label=f"{method}, paper")
        ipcs = sorted(here.ipc.unique())
        axis.set(xscale="log", xlabel="images per class (IPC)", ylabel="test accuracy (%)",
                 title=f"{place.dataset}, {place.profile} profile")
        axis.set_xticks(ipcs, [str(ipc) for ipc in ipcs])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    return figure


def training_time(table: pd.DataFrame) -> Figure:
    """Accuracy against the seconds a run took, distillation and evaluation together, one point a run."""
    figure, axis = plt.subplots(figsize=(5, 3.4), layout="constrained")
    for method, rows in table.groupby("method"):
        axis.scatter(rows.seconds, rows.accuracy, color=COLOURS.get(method), label=method)
        for _, row in rows.drop_duplicates("ipc").iterrows():
            axis.annotate(f"IPC {row.ipc}", (row.seconds, row.accuracy), fontsize=7, textcoords="offset points",
                          xytext=(4, 4))
    axis.set(xscale="log", xlabel="seconds a run", ylabel="test accuracy (%)",
             title=f"{table.dataset.iloc[0]}, {table.profile.iloc[0]} profile")
    axis.grid(alpha=0.3, which="both")
    axis.legend(fontsize=8)
    return figure


def history(found: list[Run], key: str = "loss") -> Figure:
    """A logged metric against the step, one line a run."""
    figure, axis = plt.subplots(figsize=(5, 3.2), layout="constrained")
    for run in found:
        rows = [row for row in run.record["history"] if key in row]
        axis.plot([row["step"] for row in rows], [row[key] for row in rows],
                  label=f"IPC {run.record['ipc']}, seed {run.record['seed']}")
    record = found[0].record
    axis.set(xlabel="step", ylabel=key, yscale="log",
             title=f"{record['method']}, {record['dataset']}, {record['profile']} profile")
    axis.grid(alpha=0.3, which="both")
    axis.legend(fontsize=7)
    return figure


def save(figure: Figure, name: str, profile: str, folder: str | Path | None = None) -> Path:
    """Write `figures/PROFILE/NAME.png` and `.svg`; DDLIB_FIGURES or `folder` moves the figures elsewhere."""
    place = Path(folder or os.environ.get("DDLIB_FIGURES") or SOURCE / "figures") / profile
    place.mkdir(parents=True, exist_ok=True)
    for suffix in ("svg", "png"):
        figure.savefig(path := place / f"{name}.{suffix}", dpi=150, bbox_inches="tight",
                       metadata={"Date": None} if suffix == "svg" else None)
    return path
