"""What distilled sets are good for: a defence against membership inference, a memory for continual learning, a proxy
for architecture search. Each study takes any method by its name and keeps its rows as a record (`studies.cached`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from ..config import Spec, resolve
from ..data.dataset import Dataset, derived
from ..distilled import Synthetic
from ..engine.run import run
from ..files import results_folder

EVALUATION = ("protocol", "eval_backbone", "eval_epochs", "eval_lr", "eval_augment", "zca")


def evaluated_as(method: str, dataset: str, ipc: int, profile: str) -> dict[str, Any]:
    """The overrides that give any run the evaluation of `method`, so that e.g. random images stand beside it fairly."""
    values = resolve(method, dataset, ipc, profile).values
    return {key: values[key] for key in EVALUATION}


def part(
    data: Dataset, what: str, rows: dict[str, torch.Tensor], classes: Sequence[int] | None = None
) -> Dataset:
    """The dataset "NAME WHAT" of the given rows (or masks) of each split; the normalisation stays the whole one's.

    classes: the classes that it keeps, numbered anew from 0 in this order; every row must belong to one of them.
    """
    images = {
        split: data.images[split][index.to(data.images[split].device)]
        for split, index in rows.items()
    }
    labels = {split: data.labels[split][index.to(data.device)] for split, index in rows.items()}
    if classes is not None:
        number = torch.full((data.num_classes,), -1)
        number[list(classes)] = torch.arange(len(classes))
        labels = {split: number.to(data.device)[y] for split, y in labels.items()}
    name = f"{data.name} {what}"
    names = tuple(
        data.classes[c] for c in (range(data.num_classes) if classes is None else classes)
    )
    return replace(
        data,
        name=name,
        classes=names,
        images=images,
        labels=labels,
        checksum=derived(data.checksum, name),
        part="",  # its name says it
    )


def distil(like: Spec, data: Dataset, progress: bool = True, **overrides: Any) -> Synthetic:
    """What `runs.run` makes of a `part` under the settings of `like`, a spec of the whole dataset, experts included.

    Its record stands apart, in results/PROFILE/parts, and scores one network after one pass: the study is what is
    evaluated, not the part. The set that is returned carries the whole length of training again.
    """
    values = like.values | {"subset": 0, "resolution": 0, "minival": 0.0}  # which the part has had
    values |= {"networks": 1, "evaluations": 1, "eval_epochs": 1}
    made = run(
        **like.case | {"dataset": data.name},
        data=data,
        teach=True,
        device=str(data.device),
        results=results_folder() / like.profile / "parts",
        progress=progress,
        **(values | overrides),
    ).synthetic.to(data.device)
    length = {name: getattr(like.recipe, name) for name in ("epochs", "drops", "tests")}
    return replace(made, recipe=replace(made.recipe, **length))
