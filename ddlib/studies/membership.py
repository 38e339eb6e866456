"""Membership inference: does a network tell which images it was trained for, and does distillation hide them?

FRePo (arXiv 2206.00719), the membership-inference section. The training data is cut into chunks; one chunk is the
members. A network is trained on the members, on a set distilled from them, or on the real images that distillation
started from, and five attackers guess from its logits and its loss whether an image is a member. AUC 0.5 is safe.

Differences from the released code:
1. It attacks the real images that distillation starts from in place of the distilled ones, which it saves and never
   reads back. Here the distilled set is attacked; that arm is kept as "METHOD start".
2. Chunks are stratified and as many non-members stand beside them, so that a class says nothing about membership;
   there a chunk is 10,000 consecutive images against all 10,000 test images.
3. scikit-learn's attackers in place of TensorFlow Privacy's, without its searches over their settings. They learn on
   one half of members and non-members and are scored on the other; the threshold's direction comes from the first.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

from ..config import dataset_of, resolve
from ..core import DDError, choose, generator, pick_device
from ..data.dataset import Dataset
from ..distilled import Synthetic
from ..methods import METHODS
from ..nets.build import build
from ..recipe import protocol
from ..train.loop import accuracy, predict, train
from .parts import distil, part
from .store import cached

VERSION = 1  # raise it when a change here changes the rows
ATTACKS = ("threshold", "logistic", "mlp", "forest", "knn")


def chunk(data: Dataset, number: int, per_class: int) -> Dataset:
    """Chunk `number` of the training images, `per_class` of each class, as train, and as many test images as test."""
    drawn = data.sample((number + 1) * per_class, generator(0, "membership"))
    others = data.sample(per_class, generator(0, "membership", number), "test")
    rows = {"train": drawn[:, number * per_class :].flatten(), "test": others.flatten()}
    return part(data, f"members {number} of {per_class}", rows)


def auc(scores: np.ndarray, member: np.ndarray) -> tuple[float, float, float]:
    """Area under the ROC curve of scores [N] for the mask [N], and its variance (DeLong et al., 1988) in two parts:
    what the draw of the members brings, and what that of the others brings."""
    inside, outside = np.sort(scores[member]), np.sort(scores[~member])

    def below(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """For each x the share of y below it, ties as halves."""
        return (np.searchsorted(y, x, "left") + np.searchsorted(y, x, "right")) / (2 * len(y))

    wins, losses = below(inside, outside), below(outside, inside)
    return (
        float(wins.mean()),
        float(wins.var(ddof=1) / len(wins)),
        float(losses.var(ddof=1) / len(losses)),
    )


def attack(logits: np.ndarray, losses: np.ndarray, member: np.ndarray, seed: int = 0) -> list[dict]:
    """The five attacks on logits [N, C] and losses [N] of images that are members where the mask [N] says so.

    Rows with attack, auc, its variance by members (`var members`) and by the others (`var others`), and `images`, the
    number it was scored on. Half of the members and half of the others teach the attacker, the rest score it.
    """
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.neural_network import MLPClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if min(member.sum(), (~member).sum()) < 4:
        raise DDError(
            f"an attack needs at least 4 members and 4 others, not {member.sum()} and {(~member).sum()}"
        )
    order = np.random.default_rng(seed).permutation(len(member))
    inside, outside = order[member[order]], order[~member[order]]
    learn = np.concatenate([inside[::2], outside[::2]])  # every other one ...
    test = np.concatenate([inside[1::2], outside[1::2]])  # ... and the rest scores
    x = np.column_stack([logits, losses])
    neighbours = min(15, len(learn) // 4)
    models = {
        "logistic": LogisticRegression(max_iter=1000),
        "mlp": MLPClassifier((32,), alpha=1.0, tol=1e-3, max_iter=1000, random_state=seed),
        "forest": RandomForestClassifier(100, min_samples_leaf=3, random_state=seed),
        "knn": KNeighborsClassifier(neighbours),
    }
    sign = 1 if auc(-losses[learn], member[learn])[0] >= 0.5 else -1
    scores = {"threshold": -sign * losses[test]}
    for name, model in models.items():
        fitted = make_pipeline(StandardScaler(), model).fit(x[learn], member[learn])
        scores[name] = fitted.predict_proba(x[test])[:, 1]
    columns = ("auc", "var members", "var others")
    return [
        {
            "attack": name,
            **dict(zip(columns, auc(scores[name], member[test]), strict=True)),
            "images": len(test),
        }
        for name in ATTACKS
    ]


def study(
    arm: str,
    dataset: str,
    *,
    ipc: int,
    number: int = 0,
    per_class: int = 1000,
    profile: str = "smoke",
    steps: Iterable[int] = (100, 250, 500, 1000, 2000, 4000, 8000, 16000),
    backbone: str = "convnet:norm=none,grow=2,init=lecun",
    augment: str = "",
    lr: float = 3e-4,
    device: str = "auto",
    progress: bool = True,
) -> pd.DataFrame:
    """Attack one network of chunk `number` after each number of training steps; the defaults are FRePo's.

    arm: "members" (trained on the whole chunk), a method's name (on the set distilled from it), or "METHOD start" (on
    the real images that its distillation started from). Every arm trains by the FRePo protocol at a constant step
    size (squared error, Adam, `augment` or the protocol's own), in batches of 1,024 members or 256 of a set.

    Rows: arm, chunk, steps, accuracy (per cent, all test images) and the columns of `attack`. Raises `DDError`.
    """
    choose("arm", arm, ("members", *METHODS, *(f"{name} start" for name in METHODS)))
    method, _, start = arm.partition(" ")
    spec = resolve("random" if arm == "members" else method, dataset, ipc, profile)
    steps = sorted(steps)
    recipe = replace(
        protocol("frepo"), lr=lr, warmup=0, cosine=1.0, batch=1024 if arm == "members" else 256
    )
    recipe = replace(recipe, augment=augment or recipe.augment)

    def compute() -> list[dict]:
        data = dataset_of(spec, pick_device(device))
        victim = chunk(data, number, per_class)
        if arm == "members":
            images, labels = victim.batch("train", slice(None)), victim.labels["train"]
        else:
            images, labels = _set(distil(spec, victim, progress, snapshots=1), bool(start))
        weights, order = (generator(number, "membership", what) for what in ("weights", "order"))
        net = build(backbone, data.shape, data.num_classes, weights).to(data.device)
        passes = [math.ceil(n / math.ceil(len(labels) / recipe.batch)) for n in steps]
        rows: list[dict] = []

        def strike(epoch: int) -> None:
            for n in (n for n, last in zip(steps, passes, strict=True) if last == epoch + 1):
                facts = {"arm": arm, "chunk": number, "steps": n, "accuracy": accuracy(net, data)}
                rows.extend(facts | row for row in attack(*_features(net, victim), seed=number))
            net.train()

        longest = replace(recipe, epochs=passes[-1])
        train(net, images, labels, longest, order, after_epoch=strike)
        return rows

    options = {
        "arm": arm,
        "chunk": number,
        "per_class": per_class,
        "steps": steps,
        "backbone": backbone,
        "augment": augment,
        "lr": lr,
        "version": VERSION,
    }
    return cached("membership", spec, options, compute)


def _set(syn: Synthetic, start: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """What a network trains on: the distilled set, or with hard labels the real images that it started from."""
    if start and syn.snapshots:
        syn = replace(syn, images=syn.snapshots[0].to(syn.images)).hardened()
    images, labels = syn.training_set()
    if labels.is_floating_point() and syn.recipe.loss == "ce":
        labels = labels - 1 / labels.shape[1]  # probabilities, to what the squared error takes
    return images, labels


def _features(net: torch.nn.Module, victim: Dataset) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits [N, C], squared-error losses [N] and the mask [N] of members, of a chunk and its non-members."""
    logits = torch.cat([predict(net, victim, split) for split in ("train", "test")]).cpu()
    labels = torch.cat([victim.labels[split] for split in ("train", "test")]).cpu()
    classes = logits.shape[1]
    wrong = logits - F.one_hot(labels, classes) + 1 / classes
    losses = 0.5 * wrong.square().sum(1)
    return logits.numpy(), losses.numpy(), np.arange(len(labels)) < len(victim.labels["train"])


def pooled(rows: pd.DataFrame) -> pd.DataFrame:
    """Mean AUC over chunks with a 95 % interval (`low`, `high`), and the mean accuracy.

    Chunks share no member but may share test images, so the others' part of the variance is not divided by their count.
    """
    rows = rows.assign(**{"sd others": rows["var others"] ** 0.5})
    groups = rows.groupby(["arm", "steps", "attack"], sort=False)
    found = groups.agg(
        auc=("auc", "mean"), accuracy=("accuracy", "mean"), chunks=("chunk", "nunique")
    ).reset_index()
    variance = groups["var members"].mean().to_numpy() / found.chunks
    variance += groups["sd others"].mean().to_numpy() ** 2
    half = 1.96 * variance**0.5
    return found.assign(low=(found.auc - half).clip(0), high=(found.auc + half).clip(upper=1))


SETTINGS = {
    "smoke": {
        "ipc": 1,
        "per_class": 20,
        "steps": (100, 200, 400),
        "augment": "none",
        "lr": 1e-3,
        "backbone": "convnet:width=16,norm=none,grow=2,init=lecun",
    },
    "small": {
        "ipc": 10,
        "per_class": 200,
        "steps": (250, 1000, 4000),
        "lr": 1e-3,
        "backbone": "convnet:width=32,norm=none,grow=2,init=lecun",
    },
    "paper": {"ipc": 50, "per_class": 800},
}


def setting(profile: str) -> dict[str, Any]:
    """What `study` takes in a profile."""
    return SETTINGS[choose("profile", profile, SETTINGS)]


def studies(
    methods: Sequence[str], dataset: str, *, number: int, profile: str, device: str = "auto"
) -> pd.DataFrame:
    """`study` of the members, of random images and of each method, on `number` disjoint chunks.

    The random images are the very ones that the last method's distillation started from.
    """
    start, options = f"{methods[-1]} start", {"profile": profile, "device": device}
    parts = [
        study(arm, dataset, number=chunk, **options, **setting(profile))
        for arm in ("members", start, *methods)
        for chunk in range(number)
    ]
    rows = pd.concat(parts, ignore_index=True)
    return rows.assign(arm=rows.arm.replace({start: "random"}))


def works(last: pd.DataFrame) -> str:
    """Whether each attack tells the members of a network that was trained on them."""
    lines = []
    for row in last[last.arm == "members"].itertuples():
        told = "it works" if row.low > 0.5 else "it fails here, and says nothing below"
        lines.append(f"{row.attack:10s} AUC {row.auc:.3f} [{row.low:.3f}, {row.high:.3f}]: {told}")
    return "\n".join(lines)


def by_arm(last: pd.DataFrame) -> pd.DataFrame:
    """AUC with its interval by arm (rows) and attack (columns), and the accuracy that the arm keeps."""
    cells = [f"{r.auc:.2f} [{r.low:.2f}, {r.high:.2f}]" for r in last.itertuples()]
    wide = last.assign(cell=cells).pivot(index="arm", columns="attack", values="cell")
    wide = wide.loc[list(last.arm.unique()), list(ATTACKS)]
    wide["accuracy (%)"] = last.groupby("arm").accuracy.first()
    return wide.rename_axis(columns=None).reset_index()


def by_step(rows: pd.DataFrame) -> tuple[pd.DataFrame, dict[str, str]]:
    """Rows for `plots.lines` against training steps, the arms in their order, and the panels' labels."""
    keys = ["arm", "chunk", "steps", "accuracy"]
    wide = rows.pivot(index=keys, columns="attack", values="auc").reset_index()
    order = wide.arm.map(list(rows.arm.unique()).index)
    wide = wide.assign(order=order).sort_values("order", kind="stable")
    panels = {name: f"AUC of {name}" for name in ATTACKS}
    return wide, panels | {"accuracy": "test accuracy (%)"}


def finding(last: pd.DataFrame) -> str:
    """Each arm against the network of the members, in a sentence made from the rows."""
    real, lines = last[last.arm == "members"].set_index("attack"), []
    for arm in (name for name in last.arm.unique() if name != "members"):
        mine = last[last.arm == arm].set_index("attack")
        safe = [name for name in mine.index if mine.low[name] <= 0.5]
        gap = real.auc["threshold"] - mine.auc["threshold"]
        lines.append(
            f"{arm}: no better than guessing in {len(safe)} of {len(mine)} attacks "
            f"({', '.join(safe)}); threshold AUC {gap:.2f} below the members'; accuracy "
            f"{mine.accuracy.iloc[0]:.1f} % against {real.accuracy.iloc[0]:.1f} %"
        )
    return "\n".join(lines)


def victim_set(
    method: str, dataset: str, profile: str, *, device: str = "auto"
) -> tuple[Synthetic, Dataset]:
    """What `method` made of the first chunk, and that chunk."""
    facts = setting(profile)
    spec = resolve(method, dataset, facts["ipc"], profile)
    victim = chunk(dataset_of(spec, pick_device(device)), 0, facts["per_class"])
    return distil(spec, victim, snapshots=1), victim
