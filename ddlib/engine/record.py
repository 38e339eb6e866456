"""A finished run as it lies in `results/`: its record, its distilled set, and the set under other conditions."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

from ..config import Spec, dataset_of, defaults, resolve
from ..core import DDError, pick_device
from ..data.dataset import Dataset
from ..distilled import Synthetic
from ..files import write_atomically
from ..recipe import VERSION, own_augment
from ..recipe import protocol as make_protocol
from ..train.evaluate import Evaluation, evaluate
from .meter import machine


@dataclass(frozen=True)
class Run:
    """A finished run: its record (a dict, see `record`) and, when asked for, its distilled set."""

    path: Path

    @cached_property
    def record(self) -> dict[str, Any]:
        try:
            record = json.loads(self.path.read_text())
            record["accuracy"]["last"]["mean"]
            return record
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DDError(
                f"the record {self.path} cannot be read ({type(error).__name__}): delete it and run again"
            ) from error

    @cached_property
    def synthetic(self) -> Synthetic:
        return Synthetic.load(self.path.with_suffix(".safetensors"))

    @property
    def accuracy(self) -> float:
        """Test accuracy in per cent after the last step, mean over networks."""
        return self.record["accuracy"]["last"]["mean"]

    def transfer(
        self,
        backbone: str | None = None,
        *,
        networks: int = 3,
        protocol: str | None = None,
        epochs: int | None = None,
        augment: str | None = None,
        hard: bool = False,
        data: Dataset | None = None,
        device: str = "auto",
    ) -> dict[str, Any]:
        """The set under other conditions, as {backbone, mean, std, networks, ...} in per cent: another backbone
        (cross-architecture), another protocol or augmentation, or the images' classes as labels (`hard`).

        Kept beside the record in NAME.transfer.json, so a second call trains nothing and needs no data.
        """
        path = self.path.with_suffix(".transfer.json")
        kept = json.loads(path.read_text()) if path.is_file() else {}
        changes = {"protocol": protocol, "epochs": epochs, "augment": augment, "hard": hard or None}
        changes = {name: value for name, value in changes.items() if value is not None}
        backbone = backbone or self.synthetic.backbone
        key = ", ".join(
            [
                f"{backbone} x {networks}",
                f"version {VERSION}",
                *(f"{k}={v}" for k, v in changes.items()),
            ]
        )
        if key not in kept:
            spec, syn = (
                resolve_record(self.record),
                self.synthetic.hardened() if hard else self.synthetic,
            )
            data = data or dataset_of(spec, pick_device(device))
            recipe = replace(syn.recipe, augment=augment) if augment else syn.recipe
            if protocol or epochs is not None:
                plain = resolve(
                    "random", spec.dataset, spec.ipc, spec.profile
                ).run  # as the baselines are evaluated
                name = protocol or spec.run.protocol
                recipe = make_protocol(
                    name,
                    epochs=plain.eval_epochs if epochs is None else epochs,
                    mirror=plain.mirror,
                    augment=augment or (None if own_augment(name) else plain.augment),
                )
            if augment == "none":
                recipe = replace(recipe, cutmix=0.0)  # which augments too
            result = evaluate(
                syn,
                data,
                backbone=backbone,
                networks=networks,
                recipe=recipe,
                seed=spec.seed,
                compile=spec.run.compile,
                precision=spec.run.eval_precision,
            )
            kept[key] = {
                **changes,
                "backbone": backbone,
                **summary(self.record["accuracy"]["last"]["step"], result),
                "seconds": round(result.seconds, 3),
                "device": machine(data.device),
            }
            write_atomically(
                path, lambda temporary: temporary.write_text(json.dumps(kept, indent=1))
            )
        return kept[key]

    def __repr__(self) -> str:
        last = self.record["accuracy"]["last"]
        return f"Run({self.path.stem}: {last['mean']:.1f} ± {last['std']:.1f} %)"


def resolve_record(record: dict[str, Any]) -> Spec:
    """The spec of a stored record, as `spec.name` was computed from; a key younger than the record has its default."""
    facts = {key: record[key] for key in ("method", "dataset", "ipc", "profile", "seed")}
    return Spec(**facts, values=defaults(record["method"]) | record["values"])


def summary(step: int, result: Evaluation) -> dict[str, Any]:
    """An evaluation after `step` as records keep it."""
    extras = {
        name: {"mean": fmean(values), "std": pstdev(values), "networks": list(values)}
        for name, values in result.extras.items()
    }
    return {
        "step": step,
        "mean": result.mean,
        "std": result.std,
        "networks": list(result.accuracies),
    } | extras
