"""Architecture search: does a small set rank networks as the whole training set does?

DM (arXiv 2110.04181, section 4.4) and FTD (arXiv 2211.11004) train 720 ConvNets for 200 epochs on a proxy of 50 images
a class and compare the ranking with that after 100 epochs on the whole training set. A tenth of it is held out: the
proxies are distilled from the rest, and networks are ranked by their accuracy on the tenth. "early stop" trains on the
whole set for as many steps as a network makes on a proxy.

Differences from the papers:
1. A proxy's accuracy is taken on the held-out images and the whole set's on the test images, so that the correlation
   holds no noise that the two share.
2. The best k are those of the whole set. The papers take 5 % of 720 (DM) or the best 5, 10 and 20 (FTD) and do not all
   say whose.
3. Networks that the images are too small for (at 8 px depth 4 with pooling) are left out, and counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import product
from time import perf_counter
from typing import Any

import numpy as np
import pandas as pd
import torch

from ..config import dataset_of, resolve
from ..core import DDError, choose, generator, pick_device
from ..methods import METHODS
from ..nets.build import build
from ..train.loop import accuracy, train
from .parts import distil, part
from .store import cached

VERSION = 1  # raise it when a change here changes the rows
REFERENCES = ("whole", "early stop")
AXES = {
    "width": (32, 64, 128, 256),
    "depth": (1, 2, 3, 4),
    "norm": ("none", "bn", "ln", "in", "gn"),
    "act": ("sigmoid", "relu", "leakyrelu"),
    "pool": ("none", "max", "avg"),
}


def space(
    shape: tuple[int, int, int], *, count: int = 0, seed: int = 0, **axes: Sequence
) -> list[str]:
    """The specs of the 720 ConvNets that images of `shape` are large enough for, in the order of the space.

    `axes` replaces choices, as width=(32,); `count` draws that many by `seed`, 0 is all.
    """
    for name in axes:
        choose("axis of the search space", name, AXES)
    every = [dict(zip(AXES, values, strict=True)) for values in product(*(AXES | axes).values())]
    side = 32 if shape == (1, 28, 28) else min(shape[1:])  # MNIST's images are padded
    fit = [net for net in every if net["pool"] == "none" or 2 ** net["depth"] <= side]
    if type(count) is not int or not 0 <= count <= len(fit):
        raise DDError(f"cannot draw {count!r} of the {len(fit)} networks of the search space")
    order = torch.randperm(len(fit), generator=generator(seed, "architecture search"))
    drawn = [fit[i] for i in sorted(order[: count or len(fit)].tolist())]
    return [f"convnet:{','.join(f'{k}={v}' for k, v in net.items())}" for net in drawn]


def study(
    proxy: str,
    dataset: str,
    networks: Sequence[str],
    *,
    ipc: int = 50,
    profile: str = "smoke",
    seed: int = 0,
    epochs: int = 200,
    whole_epochs: int = 100,
    device: str = "auto",
    block: int = 24,
    progress: bool = True,
    **overrides: Any,
) -> pd.DataFrame:
    """Train every network of `networks` on one set: "whole", "early stop", or the set that a method distils.

    A set is trained on by its method's protocol and real data by that of "random", without drops of the step size;
    `overrides` are keys of the method's Config or of `RunConfig`. Every `block` networks are one record, so a stopped
    study goes on. Columns: proxy, seed, network, val and test (accuracy, per cent), seconds (training), images.
    """
    choose("proxy", proxy, (*REFERENCES, *METHODS))
    method = "random" if proxy in REFERENCES else proxy
    spec = resolve(method, dataset, ipc, profile, seed, **overrides)
    plain = spec.recipe

    def compute(names: Sequence[str]) -> list[dict]:
        data = dataset_of(spec, pick_device(device)).minival(0.1)
        every = {split: torch.arange(len(y)) for split, y in data.labels.items()}
        data = part(data, "less val", every)
        batches = -(-data.num_classes * ipc // plain.batch)
        if proxy in REFERENCES:
            images, labels, recipe = partial(data.batch, "train"), data.labels["train"], plain
            steps = -(-len(labels) // plain.batch)
            passes = whole_epochs if proxy == "whole" else max(1, round(epochs * batches / steps))
        else:
            syn = distil(spec, data, progress)
            (images, labels), recipe, passes = syn.training_set(), syn.recipe, epochs
        recipe = replace(recipe, epochs=passes, drops=(), tests=())
        rows = []
        for name in names:
            weights = generator(seed, "search", name)
            net = build(name, data.shape, data.num_classes, weights).to(data.device)
            start = perf_counter()
            with suppress(DDError):  # one that diverges is no reason to stop: its accuracy says it
                train(net, images, labels, recipe, generator(seed, "search", "order", name))
            rows.append(
                {
                    "proxy": proxy,
                    "seed": seed,
                    "network": name,
                    "seconds": perf_counter() - start,
                    "images": len(labels),
                    "val": accuracy(net, data, "val"),
                    "test": accuracy(net, data),
                }
            )
        return rows

    length = whole_epochs if proxy == "whole" else epochs
    facts, parts = {"proxy": proxy, "epochs": length, "version": VERSION}, []
    for k in range(0, len(networks), block):
        names = list(networks[k : k + block])
        options = facts | {"networks": names}
        parts.append(cached("architecture_search", spec, options, partial(compute, names)))
    return pd.concat(parts, ignore_index=True)


def spearman(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Rank correlation along the last axis, ties at their mean rank; NaN where one side is constant."""
    from scipy.stats import rankdata  # loaded here: it takes a second

    ranks = (rankdata(values, axis=-1) for values in (a, b))
    a, b = (rank - rank.mean(-1, keepdims=True) for rank in ranks)
    with np.errstate(invalid="ignore"):
        return (a * b).sum(-1) / np.sqrt((a * a).sum(-1) * (b * b).sum(-1))


def correlations(
    rows: pd.DataFrame, *, tops: Iterable[int] = (5, 10, 20), resamples: int = 2000, seed: int = 0
) -> pd.DataFrame:
    """How each proxy ranks the best k networks of the whole set, and all of them, against the whole set.

    Columns: proxy, top ("5", ..., "all"), networks, spearman, and low and high, its 95 % percentile bootstrap interval
    over networks. A k that is not below the number of networks is left out; repeats of a network are averaged.
    """
    val = rows.pivot_table(index="network", columns="proxy", values="val")
    whole = rows[rows.proxy == "whole"].groupby("network").test.mean()
    test = whole.sort_values(ascending=False, kind="stable")
    found = []
    for proxy in (name for name in rows.proxy.unique() if name != "whole"):
        for k in [*(k for k in tops if k < len(test)), len(test)]:
            a, b = val[proxy][test.index[:k]].to_numpy(), test[:k].to_numpy()
            draws = np.random.default_rng(seed).integers(k, size=(resamples, k))
            low, high = np.nanpercentile(spearman(a[draws], b[draws]), [2.5, 97.5])
            found.append(
                {
                    "proxy": proxy,
                    "top": "all" if k == len(test) else str(k),
                    "networks": k,
                    "spearman": float(spearman(a, b)),
                    "low": low,
                    "high": high,
                }
            )
    return pd.DataFrame(found)


def choices(rows: pd.DataFrame) -> pd.DataFrame:
    """The network that each set ranks first: its test accuracy after the whole set, and what the ranking cost."""
    whole = rows[rows.proxy == "whole"].set_index("network").test
    rows = rows.reset_index(drop=True)
    best = rows.loc[rows.groupby("proxy", sort=False).val.idxmax()].set_index("proxy")
    cost = rows.groupby("proxy", sort=False).agg(
        seconds=("seconds", "sum"), images=("images", "max")
    )
    return cost.assign(
        network=best.network,
        accuracy=whole[best.network].to_numpy(),
        regret=whole.max() - whole[best.network].to_numpy(),
    ).reset_index()


SETTINGS = {
    "smoke": {"ipc": 5, "epochs": 50, "whole_epochs": 10},
    "small": {"ipc": 10, "epochs": 200, "whole_epochs": 10},
    "paper": {"ipc": 50},
}


def setting(profile: str) -> dict[str, int]:
    """What `study` takes in a profile."""
    return dict(SETTINGS[choose("profile", profile, SETTINGS)])


def sample(
    shape: tuple[int, int, int], profile: str, count: int, seed: int
) -> tuple[list[str], list[str]]:
    """Every network that fits images of `shape`, and `count` of them, of width 32 outside the paper profile."""
    narrow = {} if profile == "paper" else {"width": (32,)}
    return space(shape), space(shape, count=count, seed=seed, **narrow)


def described(everything: Sequence[str], names: Sequence[str], shape: tuple, seed: int) -> str:
    """The space and the sample in a sentence."""
    axes = " x ".join(f"{len(values)} {axis}" for axis, values in AXES.items())
    return (
        f"{axes}; {len(everything)} fit images of {shape}; "
        f"{len(names)} are trained, drawn by seed {seed}"
    )


def studies(
    proxies: Iterable[str], dataset: str, names: Sequence[str], **options: Any
) -> pd.DataFrame:
    """`study` of every proxy, one row a training."""
    parts = [study(name, dataset, names, **options) for name in proxies]
    return pd.concat(parts, ignore_index=True)


def by_top(table: pd.DataFrame) -> pd.DataFrame:
    """`correlations` as text, a row a proxy and a column a number of best networks."""
    cells = [f"{r.spearman:.2f} [{r.low:.2f}, {r.high:.2f}]" for r in table.itertuples()]
    wide = table.assign(cell=cells).pivot(index="proxy", columns="top", values="cell")
    wide = wide[list(table.top.unique())].loc[list(table.proxy.unique())]
    return wide.add_prefix("top ").rename_axis(columns=None).reset_index()


def against_whole(rows: pd.DataFrame) -> pd.DataFrame:
    """The proxies' rows with `whole`, the test accuracy of the same network after the whole training set."""
    whole = rows[rows.proxy == "whole"].set_index("network").test
    points = rows[rows.proxy != "whole"]
    return points.assign(whole=whole[points.network].to_numpy())
