"""Cross-architecture: sets that were distilled with one network train others, and what is lost there."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import pandas as pd
from matplotlib.figure import Figure

from ..engine.record import Run
from ..report import plots, tables

IMAGES, TRAINED = "method of the images", "network that is trained on them"


def networks(profile: str) -> list[str]:
    """The networks of the heat maps, each with instance and with batch norm; in the smoke profile a few narrow ones."""
    if profile == "smoke":
        return ["convnet:width=32", "convnet:width=32,norm=bn", "resnet18:width=8", "mlp"]
    wide = ("convnet", "alexnet", "vgg11", "resnet18")
    return [*(name + norm for name in wide for norm in ("", ":norm=bn")), "mlp"]


@dataclass(frozen=True)
class Grid:
    """Accuracy (%) by method (rows) and network (columns): mean and standard deviation over networks, NaN for one."""

    mean: pd.DataFrame
    std: pd.DataFrame
    own: dict[str, str]  # method -> the network that its set was distilled on

    @property
    def gain(self) -> pd.DataFrame:
        """Points over random real images on the same network."""
        found = (self.mean - self.mean.loc["random"]).drop(index="random")
        return found.dropna(axis=1, how="all").dropna(how="all")

    @property
    def noise(self) -> pd.DataFrame:
        """Spread of `gain`: the two standard deviations added in squares."""
        both = (self.std**2 + self.std.loc["random"] ** 2) ** 0.5
        return both.loc[self.gain.index, self.gain.columns]

    def accuracy(self, place: str) -> Figure:
        text = self.mean.map("{:.1f}".format) + self.std.map(_below)
        title = f"Accuracy across networks: {place}"
        return plots.heatmap(self.mean, title, label="test accuracy (%)", text=text)

    def difference(self, place: str) -> Figure:
        text = self.gain.map("{:+.1f}".format) + self.noise.map(_below)
        title, label = f"Difference from random images: {place}", "points over random images"
        return plots.heatmap(self.gain, title, label=label, text=text, centred=True)

    def fall(self) -> pd.DataFrame:
        """Own network and the mean over those that no set was distilled on; where random images are better."""
        seen, rows = set(self.own.values()), []
        for method in self.mean.index:
            line, own = self.mean.loc[method], self.own[method]
            unseen = line.drop(seen, errors="ignore").mean()
            row = {"method": method, "own network": own, "own": line.get(own), "unseen": unseen}
            row["fall"] = row["own"] - unseen if row["own"] is not None else None
            if "random" in self.mean.index and method in self.gain.index:
                gain = self.gain.loc[method]
                below = (gain < -self.noise.loc[method].fillna(0)).sum()
                row["below random"] = f"{below} of {gain.notna().sum()}"
            rows.append(row)
        return pd.DataFrame(rows).fillna({"below random": ""})


def _below(spread: float) -> str:
    """The second line of a cell; one network has no spread."""
    return "" if math.isnan(spread) else f"\n± {spread:.1f}"


def evaluate(
    found: Iterable[Run], names: Sequence[str], *, count: int, train: bool, device: str = "auto"
) -> pd.DataFrame:
    """Every kept evaluation of the runs' sets (`tables.transfers`), after those on `names` are made where `train`."""
    found = list(found)
    for run in found if train else ():
        for name in names:
            if name != run.synthetic.backbone:
                run.transfer(name, networks=count, device=device)
    return tables.transfers(found)


def grid(
    scores: pd.DataFrame, found: Iterable[Run], methods: Sequence[str], names: Sequence[str]
) -> Grid:
    """The heat map's numbers, methods and networks in the order given; what has no record is left out."""
    own = {run.record["method"]: run.synthetic.backbone for run in found}
    rows = [method for method in methods if method in set(scores.method)]
    columns = list(dict.fromkeys([*names, *own.values()]))
    scores = scores.assign(std=scores["std"].where(scores.networks.map(len) > 1))
    mean, std = (
        scores.pivot_table(key, "method", "backbone", dropna=False)
        .reindex(index=rows, columns=columns)
        .rename_axis(index=IMAGES, columns=TRAINED)
        for key in ("mean", "std")
    )
    mean = mean.dropna(axis=1, how="all")
    return Grid(mean, std[mean.columns], own)


def printed(dataset: str) -> Figure:
    """The papers' tables for a dataset, or for CIFAR-10 where they have none on it."""
    where = dataset if len(tables.printed_across(dataset)) else "cifar10"
    across = tables.printed_across(where)
    rows, columns = list(dict.fromkeys(across["set"])), list(dict.fromkeys(across.backbone))
    value, cell = (
        across.pivot_table(key, "set", "backbone", aggfunc="first")
        .reindex(index=rows, columns=columns)
        .rename_axis(index=IMAGES, columns=TRAINED)
        for key in ("value", "cell")
    )
    title = f"As published, {plots.short(where)}; * from memory"
    return plots.heatmap(value, title, label="test accuracy (%)", text=cell)
