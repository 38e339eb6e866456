"""The distilled set as an artefact: images, labels, learned rate, decoder and the protocol that it was made for."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F

from .augment.siamese import check_strategy
from .core import DDError, choose, fields_from, instance, path_of, pick_device, shown, whole
from .data.dataset import Dataset
from .files import load_tensors, save_tensors
from .recipe import Recipe


def decode(images: torch.Tensor, factor: int, fill: torch.Tensor | float = 0.5) -> torch.Tensor:
    """Multi-formation (IDC, arXiv 2205.14959): images [n, C, H, W] -> [n * factor^2, C, H, W], differentiable.

    Every image is cut into factor x factor tiles, row by row, each enlarged bilinearly to the whole size; all images'
    first tiles come first, then all second ones. A side that factor does not divide is padded right and below with
    `fill`, mid-grey in the space of the images, by factor - side % factor.
    """
    if factor == 1:
        return images
    n, channels, *size = images.shape
    down, right = ((factor - side % factor) % factor for side in size)
    if down or right:
        padded = torch.as_tensor(fill, dtype=images.dtype, device=images.device).expand(
            channels, 1, 1
        )
        padded = padded.expand(n, channels, size[0] + down, size[1] + right).clone()
        padded[..., : size[0], : size[1]] = images
        images = padded
    tiles = images.unflatten(3, (factor, -1)).unflatten(2, (factor, -1))  # [n, C, f, h, f, w]
    tiles = tiles.permute(2, 4, 0, 1, 3, 5).flatten(0, 2)
    return F.interpolate(tiles, size=size, mode="bilinear", align_corners=False)


def encode(sources: torch.Tensor, factor: int) -> torch.Tensor:
    """IDC's "mix" start: images [classes, ipc * factor^2, C, H, W] -> [classes * ipc, C, H, W].

    Tile k of image i of a class is source k * ipc + i, shrunk by nearest neighbour as the released code does. Where
    factor does not divide the side, the first tiles are one pixel larger than the last, while `decode` cuts the
    padded image evenly: that is the released code's too.
    """
    if factor == 1:
        return sources.flatten(0, 1)
    h, w = sources.shape[-2:]
    cuts = [[side // factor + (k < side % factor) for k in range(factor)] for side in (h, w)]
    tiles = sources.unflatten(1, (factor, factor, -1))  # [classes, f, f, ipc, C, H, W]
    rows = []
    for r, high in enumerate(cuts[0]):
        row = [
            F.interpolate(tiles[:, r, c].flatten(0, 1), size=(high, wide), mode="nearest")
            for c, wide in enumerate(cuts[1])
        ]
        rows.append(torch.cat(row, dim=3))
    return torch.cat(rows, dim=2)


def check_factor(factor: int, shape: tuple[int, int, int]) -> int:
    """`factor`, unless its tiles would be smaller than 2 pixels a side: then a `DDError`."""
    most = min(shape[1:]) // 2
    if not 1 <= factor <= most:
        raise DDError(
            f"factor {shown(factor)} does not fit images of {shape[1]}x{shape[2]} px; allowed: 1 to {most}"
        )
    return factor


def _tensor(name: str, value: object, dtype: torch.dtype, shape: tuple[int | None, ...]) -> None:
    """Raise `DDError` unless `value` is a finite tensor of this type and shape; None is any length."""
    if isinstance(value, torch.Tensor) and value.dtype == dtype and value.ndim == len(shape):
        fits = (want in (None, size) for want, size in zip(shape, value.shape, strict=True))
        if all(fits) and torch.isfinite(value).all():
            return
    wanted = ", ".join("any" if size is None else str(size) for size in shape)
    kind = str(dtype).removeprefix("torch.")
    given = shown(value)
    if isinstance(value, torch.Tensor):
        given = f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
        given += "" if torch.isfinite(value).all() else " with values that are not finite"
    raise DDError(f"{name} must be finite {kind} [{wanted}], not {given}")


@dataclass(frozen=True)
class Synthetic:
    """A synthetic set of `n = classes x ipc` images, class by class, in the normalised space of its dataset.

    `images` float32 [n, C, H, W]; `labels` int64 [n] or float32 [n, classes], soft or FRePo's real-valued ones;
    `recipe` is the evaluation protocol that travels with the set; `factor` that of the decoder (`decode`), 1 where
    images are trained on as they are; `spec` says which run made it; `snapshots` maps a step to [n, C, H, W].
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
    factor: int = 1
    spec: dict = field(default_factory=dict)
    snapshots: dict[int, torch.Tensor] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        data: Dataset,
        images: torch.Tensor,
        labels: torch.Tensor,
        recipe: Recipe,
        backbone: str,
        **extra,
    ) -> Synthetic:
        """The set of `images` [n, C, H, W] and `labels` that was distilled from `data`."""
        instance("data", data, Dataset)
        return cls(
            instance("images", images, torch.Tensor).detach(),
            instance("labels", labels, torch.Tensor).detach(),
            data.name,
            data.classes,
            data.mean,
            data.std,
            recipe,
            backbone,
            data.zca.id if data.zca else None,
            **extra,
        )

    @property
    def ipc(self) -> int:
        return len(self.images) // len(self.classes)

    def training_set(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The images [n * factor^2, C, H, W] that networks train on, decoded, and their labels."""
        images = decode(self.images, self.factor, ((0.5 - self.mean) / self.std).to(self.images))
        return images, self.labels.repeat(self.factor**2, *[1] * (self.labels.ndim - 1))

    def hardened(self) -> Synthetic:
        """The set with each image's class as its label, whatever labels it was distilled with."""
        classes = torch.arange(len(self.classes), device=self.images.device)
        return replace(self, labels=classes.repeat_interleave(self.ipc))

    def to(self, device: torch.device | str) -> Synthetic:
        device = pick_device(device)
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))

    def pixels(
        self, data: Dataset | None = None, images: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`images` (default: the set's) as float32 in [0, 1]; a ZCA-whitened set needs its dataset to undo it."""
        instance("data", data, Dataset, None)
        if images is None:
            images = self.images
        elif not (isinstance(images, torch.Tensor) and images.is_floating_point()):
            raise DDError(f"images must be a tensor of floats, not {shown(images)}")
        if self.zca:
            if data is None:
                raise DDError(
                    "this set lives in ZCA space: pass its dataset, loaded with the same zca, to see pixels"
                )
            self.check(data)
            return data.denormalise(images)
        return (images * self.std.to(images) + self.mean.to(images)).clamp(0, 1)

    def validate(self) -> None:
        """Raise `DDError` unless all parts are of their types and fit one another."""
        self._validate_images()
        self._validate_labels()
        for name in ("mean", "std"):
            _tensor(name, getattr(self, name), torch.float32, (self.images.shape[1], 1, 1))
        if not (self.std > 0).all():
            raise DDError("a std must be above 0")
        for name, kind in (("dataset", str), ("backbone", str), ("spec", dict), ("recipe", Recipe)):
            if not isinstance(getattr(self, name), kind):
                raise DDError(
                    f"{name} must be of type {kind.__name__}, not {shown(getattr(self, name))}"
                )
        instance("the values of spec", self.spec.get("values", {}), dict)
        if not (self.zca is None or isinstance(self.zca, str)):
            raise DDError(f"zca must be a text or None, not {shown(self.zca)}")
        whole("factor", self.factor, 1)
        if self.factor != 1:
            check_factor(self.factor, self.images.shape[1:])

    def _validate_images(self) -> None:
        _tensor("images", self.images, torch.float32, (None, None, None, None))
        names = isinstance(self.classes, tuple) and {type(name) for name in self.classes} == {str}
        if not names or not len(self.images):
            raise DDError(
                f"a set needs images and the names of its classes, not {len(self.images)} images and "
                f"{shown(self.classes)}"
            )
        if not isinstance(self.snapshots, dict):
            raise DDError(f"snapshots must be a dict, not {shown(self.snapshots)}")
        for step, images in self.snapshots.items():
            whole("the step of a snapshot", step, 0)
            _tensor(f"the snapshot of step {step}", images, torch.float32, self.images.shape)

    def _validate_labels(self) -> None:
        count, classes = len(self.images), len(self.classes)
        if isinstance(self.labels, torch.Tensor) and self.labels.is_floating_point():
            _tensor("soft labels", self.labels, torch.float32, (count, classes))
            return
        _tensor("labels", self.labels, torch.int64, (count,))
        if not 0 <= int(self.labels.min()) <= int(self.labels.max()) < classes:
            raise DDError(f"labels must lie in 0..{classes - 1}")

    def check(self, data: Dataset) -> None:
        """Raise `DDError` unless networks trained on this set can be tested on `data`."""
        instance("data", data, Dataset)
        self.validate()
        if tuple(self.images.shape[1:]) != data.shape or self.classes != data.classes:
            raise DDError(
                f"a set distilled from {self.dataset} ({len(self.classes)} classes, images "
                f"{tuple(self.images.shape[1:])}) cannot be used with {data.name} "
                f"({data.num_classes} classes, images {data.shape})"
            )
        if self.zca != (data.zca.id if data.zca else None):
            raise DDError(
                f"the set's ZCA is {self.zca}, the data's is {data.zca.id if data.zca else None}: load the "
                "data as the run did (its record names the zca)"
            )
        # Constants differ in the last bit between a file and a fit; a different normalisation differs far more.
        if not (
            torch.allclose(self.mean.cpu(), data.mean.cpu(), atol=1e-4)
            and torch.allclose(self.std.cpu(), data.std.cpu(), atol=1e-4)
        ):
            raise DDError(
                f"the set was normalised with mean {self.mean.flatten().tolist()} and std "
                f"{self.std.flatten().tolist()}, {data.name} is with {data.mean.flatten().tolist()} and "
                f"{data.std.flatten().tolist()}"
            )

    def save(self, path: str | Path) -> Path:
        """Write the set as one safetensors file, replacing an old one only when the new one is whole."""
        tensors = {"images": self.images, "labels": self.labels, "mean": self.mean, "std": self.std}
        tensors |= {f"images@{step}": images for step, images in self.snapshots.items()}
        header = {
            "dataset": self.dataset,
            "classes": self.classes,
            "recipe": asdict(self.recipe),
            "zca": self.zca,
            "backbone": self.backbone,
            "factor": self.factor,
            "spec": self.spec,
        }
        return save_tensors(path_of("the path of a set", path), tensors, header)

    @classmethod
    def load(cls, path: str | Path) -> Synthetic:
        """Read a set that `save` wrote; a damaged or foreign file is a `DDError`."""
        cure = "name a .safetensors file that a run wrote, or delete it and run again"
        path = path_of("the path of a set", path)
        tensors, header = load_tensors(path, "distilled set", cure)
        try:
            snapshots = {
                int(name.split("@")[1]): tensors.pop(name) for name in list(tensors) if "@" in name
            }
            header["classes"] = tuple(header["classes"])
            header["recipe"] = recipe_from(header["recipe"])
            syn = cls(**tensors, **header, snapshots=dict(sorted(snapshots.items())))
            syn.validate()
        except DDError as error:
            raise DDError(f"the distilled set {path} makes no sense: {error}") from None
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            # a checkpoint or an expert of ours
            raise DDError(f"{path} is a file of ddlib's, but not a distilled set") from error
        return syn


def recipe_from(values: dict) -> Recipe:
    """A recipe read from a file, held to the same types and limits as one that is typed; else a `DDError`."""
    recipe = fields_from(Recipe, values, "recipe")
    for key, (least, most) in _LIMITS.items():
        value = getattr(recipe, key)
        if not least <= value <= most:
            raise DDError(f"recipe key {key!r} must be {least} to {most}, not {shown(value)}")
    choose("recipe loss", recipe.loss, ("ce", "mse"))
    check_strategy(recipe.augment)
    return recipe


_LIMITS = {
    "epochs": (1, 1_000_000),
    "lr": (0, 1000),
    "momentum": (0, 1),
    "weight_decay": (0, 1000),
    "batch": (1, 1_000_000_000),
    "drop": (0, 1),
    "cutmix": (0, 1),
    "warmup": (0, 1_000_000_000),
    "cosine": (0, 1),
}
