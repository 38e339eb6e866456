"""The distilled set as an artefact: images, labels, learned rate and the protocol that it was made for."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch

from .core import DDError, load_tensors, save_tensors
from .data import Dataset
from .training import Recipe


@dataclass(frozen=True)
class Synthetic:
    """A synthetic set of `n = classes x ipc` images, class by class, in the normalised space of its dataset.

    `images` float32 [n, C, H, W]; `labels` int64 [n] or soft float32 [n, classes]; `recipe` is the evaluation
    protocol that travels with the set; `spec` says which run made it; `snapshots` maps a step to [n, C, H, W].
    """

    images: torch.Tensor
    labels: torch.Tensor
    dataset: str
    classes: tuple[str, ...]
    mean: torch.Tensor
    std: torch.Tensor
    recipe: Recipe
    backbone: str
    zca: str | None = None
    spec: dict = field(default_factory=dict)
    snapshots: dict[int, torch.Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, data: Dataset, images: torch.Tensor, labels: torch.Tensor, recipe: Recipe, backbone: str,
           **extra) -> Synthetic:
        """The set of `images` [n, C, H, W] and `labels` that was distilled from `data`."""
        return cls(images.detach(), labels.detach(), data.name, data.classes, data.mean, data.std, recipe, backbone,
                   data.zca.id if data.zca else None, **extra)

    @property
    def ipc(self) -> int:
        return len(self.images) // len(self.classes)

    def to(self, device: torch.device | str) -> Synthetic:
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))

    def pixels(self, data: Dataset | None = None, images: torch.Tensor | None = None) -> torch.Tensor:
        """`images` (default: the set's) as float32 in [0, 1]; a ZCA-whitened set needs its dataset to undo it."""
        images = self.images if images is None else images
        if self.zca:
            if data is None:
                raise DDError("this set lives in ZCA space: pass its dataset, loaded with the same zca, to see pixels")
            self.check(data)
            return data.denormalise(images)
        return (images * self.std.to(images) + self.mean.to(images)).clamp(0, 1)

    def check(self, data: Dataset) -> None:
        """Raise `DDError` unless networks trained on this set can be tested on `data`."""
        if tuple(self.images.shape[1:]) != data.shape or self.classes != data.classes:
            raise DDError(f"a set distilled from {self.dataset} ({len(self.classes)} classes, images "
                          f"{tuple(self.images.shape[1:])}) cannot be used with {data.name} "
                          f"({data.num_classes} classes, images {data.shape})")
        if self.zca != (data.zca.id if data.zca else None):
            raise DDError(f"the set's ZCA is {self.zca}, the data's is {data.zca.id if data.zca else None}: load the "
                          "data as the run did (its record names the zca)")
        # Constants differ in the last bit between a file and a fit; a different normalisation differs far more.
        if not (torch.allclose(self.mean.cpu(), data.mean.cpu(), atol=1e-4)
                and torch.allclose(self.std.cpu(), data.std.cpu(), atol=1e-4)):
            raise DDError(f"the set was normalised with mean {self.mean.flatten().tolist()} and std "
                          f"{self.std.flatten().tolist()}, {data.name} is with {data.mean.flatten().tolist()} and "
                          f"{data.std.flatten().tolist()}")

    def save(self, path: str | Path) -> Path:
        """Write the set as one safetensors file, replacing an old one only when the new one is whole."""
        tensors = {"images": self.images, "labels": self.labels, "mean": self.mean, "std": self.std}
        tensors |= {f"images@{step}": images for step, images in self.snapshots.items()}
        header = {"dataset": self.dataset, "classes": self.classes, "recipe": asdict(self.recipe), "zca": self.zca,
                  "backbone": self.backbone, "spec": self.spec}
        return save_tensors(Path(path), tensors, header)

    @classmethod
    def load(cls, path: str | Path) -> Synthetic:
        """Read a set that `save` wrote; a damaged or foreign file is a `DDError`."""
        tensors, header = load_tensors(Path(path), "distilled set", "delete it and run again to make it anew")
        snapshots = {int(name.split("@")[1]): tensors.pop(name) for name in list(tensors) if "@" in name}
        try:
            header["classes"] = tuple(header["classes"])
            header["recipe"] = Recipe(**{**header["recipe"], "drops": tuple(header["recipe"]["drops"])})
            return cls(**tensors, **header, snapshots=dict(sorted(snapshots.items())))
        except (KeyError, TypeError) as error:  # a checkpoint or an expert of ours
            raise DDError(f"{path} is a file of ddlib's, but not a distilled set") from error
