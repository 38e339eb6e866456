"""Class-incremental learning with a memory of distilled images, retrained from scratch after every task.

The protocol is GDumb's (Prabhu et al., ECCV 2020) as DM (arXiv 2110.04181, section 4.3) and FRePo (arXiv 2206.00719)
use it: the classes come in equal tasks, each task's images are distilled on their own into `ipc` a class, the memory
is the union of all tasks so far, and a fresh network with an output for every class learns from the memory alone. It
is tested on the test images of the classes seen, by the largest of *all* outputs.

The two papers' settings, which are what the presets of the methods give:

                DM's                                      FRePo's
    network     the ConvNet with instance norm            its own without norm, distilled with BatchNorm
    training    1,001 epochs, SGD 0.01, batches of 256,   10,000 steps, Adam 3e-4, batches of 500, squared error,
                cross-entropy, DSA                        its own augmentation
    networks    3 for each of 5 class orders              5 for each of 5 class orders

Differences from the released codes:
1. FRePo distils a task with labels and networks of all 100 classes; here with those of the task, and the labels then
   take their places among all classes (`memory`).
2. Random and herding are shown under both settings (`evaluated_as`), each beside the method of that setting.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch

from ..config import dataset_of, resolve
from ..core import DDError, pick_device
from ..data.dataset import Dataset
from ..distilled import Synthetic
from ..recipe import Recipe
from ..train.evaluate import evaluate
from .parts import distil, evaluated_as, part
from .store import cached

VERSION = 1  # raise it when a change here changes the rows


def class_order(classes: int, steps: int, seed: int) -> list[list[int]]:
    """The classes of each of `steps` tasks: numpy.random.RandomState(seed).permutation(classes), as both papers do."""
    if steps < 1 or classes % steps or classes < 2 * steps:
        allowed = [n for n in range(1, classes // 2 + 1) if classes % n == 0]
        raise DDError(
            f"{classes} classes cannot come in {steps} equal tasks of two or more; allowed: "
            f"{', '.join(map(str, allowed))}"
        )
    return np.random.RandomState(seed).permutation(classes).reshape(steps, -1).tolist()


def seen(data: Dataset, classes: Sequence[int], split: str) -> torch.Tensor:
    """The mask [N] of a split's images that belong to one of the classes."""
    return torch.isin(data.labels[split], torch.as_tensor(classes, device=data.device))


def memory(sets: Sequence[Synthetic], tasks: Sequence[Sequence[int]], data: Dataset) -> Synthetic:
    """The union of the tasks' sets, the labels of each moved to its classes' places among all of the dataset's.

    Hard labels become class numbers and probabilities get zeros for the other tasks' classes. FRePo's labels of k
    classes began as (one-hot - 1/k) / sqrt(k/10); the same map that makes these (one-hot - 1/C) / sqrt(C/10), as they
    begin among all C classes, moves the learned ones.
    """
    labels = []
    for syn, classes in zip(sets, tasks, strict=True):
        places = torch.as_tensor(classes, device=syn.labels.device)
        if not syn.labels.is_floating_point():
            labels.append(places[syn.labels])
            continue
        k, total = len(places), data.num_classes
        wide = syn.labels.new_zeros(len(syn.labels), total)
        if syn.recipe.loss == "mse":
            wide[:, places] = syn.labels * (k / 10) ** 0.5 + 1 / k
            wide = (wide - 1 / total) / (total / 10) ** 0.5
        else:
            wide[:, places] = syn.labels
        labels.append(wide)
    first, images = sets[0], torch.cat([syn.images for syn in sets])
    whole = torch.cat(labels)
    return Synthetic.of(data, images, whole, first.recipe, first.backbone, factor=first.factor)


def _as_long_as_the_last(recipe: Recipe, images: int, last: int) -> Recipe:
    """FRePo's script takes as many optimiser steps after every task; other protocols count passes over the set."""
    if recipe.name != "frepo":
        return recipe
    steps = recipe.epochs * -(-last // recipe.batch)
    return replace(recipe, epochs=-(-steps // -(-images // recipe.batch)))


def study(
    method: str,
    dataset: str,
    *,
    ipc: int = 20,
    steps: int = 5,
    order: int = 0,
    profile: str = "smoke",
    networks: int = 3,
    device: str = "auto",
    progress: bool = True,
    **overrides: Any,
) -> pd.DataFrame:
    """Learn the classes in `steps` tasks of class order `order` with a memory of `ipc` images per class.

    `overrides` are keys of the method's Config or of `RunConfig`; seed `order` distils. One row a task: method, ipc,
    protocol, steps, order, classes seen, accuracy, std (per cent, `networks` fresh networks), networks (accuracies).
    """
    spec = resolve(method, dataset, ipc, profile, order, **overrides)

    def compute() -> list[dict]:
        data = dataset_of(spec, pick_device(device))
        tasks, sets, rows = class_order(data.num_classes, steps, order), [], []
        for count, classes in enumerate(tasks, 1):
            taken = {split: seen(data, classes, split) for split in ("train", "test")}
            task = part(data, f"classes {','.join(map(str, classes))}", taken, classes)
            sets.append(distil(spec, task, progress))
            so_far = [c for group in tasks[:count] for c in group]
            taken = {split: seen(data, so_far, split) for split in ("train", "test")}
            tested = part(data, f"{len(so_far)} classes seen", taken)
            known, precision = memory(sets, tasks[:count], data), spec.run.eval_precision
            found = evaluate(
                known,
                tested,
                networks=networks,
                seed=order,
                recipe=_as_long_as_the_last(
                    known.recipe, ipc * len(so_far), ipc * data.num_classes
                ),
                precision=precision,
            )
            rows.append(
                {
                    "method": method,
                    "ipc": ipc,
                    "protocol": spec.run.protocol,
                    "steps": steps,
                    "order": order,
                    "classes seen": len(so_far),
                    "accuracy": found.mean,
                    "std": found.std,
                    "networks": list(found.accuracies),
                }
            )
        return rows

    options = {"steps": steps, "networks": networks, "version": VERSION}
    return cached("continual", spec, options, compute)


def final(rows: pd.DataFrame) -> pd.DataFrame:
    """After the last task, by protocol, method and tasks: mean and spread over all networks of all orders (ddof 0)."""
    last = rows[rows["classes seen"] == rows["classes seen"].max()]
    last = last.explode("networks").astype({"networks": float})
    pooled = last.groupby(["protocol", "method", "steps"], sort=False)
    return pooled.agg(
        accuracy=("networks", "mean"),
        std=("networks", lambda v: v.std(ddof=0)),
        orders=("order", "nunique"),
        networks=("networks", "size"),
    ).reset_index()


def splits(steps: Iterable[int], classes: int) -> list[int]:
    """Of some numbers of tasks those that cut `classes` evenly into two or more a task; all where none does."""
    steps = list(steps)
    return [n for n in steps if classes % n == 0 and classes >= 2 * n] or steps


def settings(methods: Iterable[str], dataset: str, ipc: int, profile: str) -> pd.DataFrame:
    """How the networks of each method's setting are trained: protocol, network, epochs, step size, loss."""
    rows = []
    for name in methods:
        recipe = resolve(name, dataset, ipc, profile).recipe
        same = evaluated_as(name, dataset, ipc, profile)
        facts = {key: same[key] for key in ("protocol", "eval_epochs", "eval_lr")}
        facts |= {"optimiser": recipe.optimiser, "loss": recipe.loss}
        rows.append({"setting": name, **facts, "augmentation": recipe.augment})
    return pd.DataFrame(rows)


def studies(
    methods: Iterable[str],
    baselines: Iterable[str],
    dataset: str,
    *,
    steps: Iterable[int],
    orders: Iterable[int],
    ipc: int,
    profile: str,
    **options: Any,
) -> pd.DataFrame:
    """`study` of each method and of every baseline in that method's setting, for all numbers of tasks and orders."""
    steps, orders, baselines, parts = list(steps), list(orders), list(baselines), []
    for setting in methods:
        same = evaluated_as(setting, dataset, ipc, profile)
        for name in (*baselines, setting):
            for n in steps:
                for order in orders:
                    values = {"steps": n, "order": order, "ipc": ipc, "profile": profile}
                    rows = study(name, dataset, **values, **options, **same)
                    parts.append(rows.assign(setting=setting))
    return pd.concat(parts, ignore_index=True)


def by_network(rows: pd.DataFrame, setting: str, steps: int) -> pd.DataFrame:
    """The rows of one setting and number of tasks, one a network."""
    rows = rows[(rows.setting == setting) & (rows.steps == steps)]
    return rows.explode("networks").astype({"networks": float})


def over_random(rows: pd.DataFrame) -> pd.DataFrame:
    """`final` of every setting, with the gain over the random memory of the same setting and number of tasks."""
    groups = rows.groupby("setting", sort=False)
    parts = [final(part).assign(setting=name) for name, part in groups]
    last = pd.concat(parts, ignore_index=True)
    base = last[last.method == "random"].set_index(["setting", "steps"]).accuracy
    keys = pd.MultiIndex.from_frame(last[["setting", "steps"]])
    last["over random"] = last.accuracy - base.reindex(keys).to_numpy()
    return last[["setting", "method", "steps", "accuracy", "std", "over random", "networks"]]
