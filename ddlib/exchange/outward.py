"""A distilled set for use elsewhere: PNG files by class, a TensorDataset, or one .pt file that can never run code."""

from __future__ import annotations

import csv
import json
import os
import re
import secrets
import shutil
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from ..core import DDError, instance, path_of
from ..data.dataset import Dataset
from ..distilled import Synthetic
from ..files import write_atomically

FORMAT = "ddlib set 1"  # marks a .pt file of `save_pt`


def by_class(syn: Synthetic) -> tuple[Tensor, Tensor]:
    """What networks train on, class by class: images [n * factor^2, C, H, W], normalised and decoded, and labels."""
    images, labels = instance("the set", syn, Synthetic).training_set()
    # `decode` gives all first tiles, then all second ones.
    classes = torch.arange(len(syn.classes)).repeat_interleave(syn.ipc).repeat(syn.factor**2)
    order = classes.argsort(stable=True)
    return images.cpu()[order].contiguous(), labels.cpu()[order].contiguous()


def tensor_dataset(syn: Synthetic) -> TensorDataset:
    """The decoded set as a `TensorDataset` of (image, label) in the normalised space that networks are trained in."""
    return TensorDataset(*by_class(syn))


def save_pt(syn: Synthetic, path: str | Path) -> Path:
    """One file for `torch.load(path, weights_only=True)`: a dict of tensors, strings and numbers.

    images float32 [n, C, H, W], decoded and normalised ((pixel - mean) / std, or whitened where `zca` says so); labels
    int64 [n] or float32 [n, classes]; mean, std [C, 1, 1]; classes; lr and recipe, the protocol it was made for.
    """
    images, labels = by_class(syn)
    content = {
        "format": FORMAT,
        "images": images,
        "labels": labels,
        "mean": syn.mean.cpu(),
        "std": syn.std.cpu(),
        "classes": list(syn.classes),
        "dataset": syn.dataset,
        "backbone": syn.backbone,
        "zca": syn.zca,
        "lr": syn.recipe.lr,
        "recipe": asdict(syn.recipe),
        "spec": json.dumps(syn.spec, sort_keys=True),
    }
    path = path_of("the path of a .pt file", path)
    return write_atomically(path, lambda temporary: torch.save(content, temporary))


def save_images(
    syn: Synthetic, folder: str | Path, data: Dataset | None = None, *, seen: Tensor | None = None
) -> Path:
    """PNG files as `torchvision.datasets.ImageFolder` reads them: FOLDER/CLASS/0000.png, decoded, and set.json.

    Pixels are clamped to [0, 1] and rounded to 8 bits, which costs some accuracy; a whitened set needs `data`, its
    dataset, to be seen, or its pixels as `ddlib look` has kept them, `seen`: uint8 [n, C, H, W]. Labels that are no
    classes stand in labels.csv. A folder that holds anything is a `DDError`.
    """
    folder = path_of("the folder", folder)
    if not folder.name:
        raise DDError(f"{str(folder)!r} names no folder: name a new or an empty one")
    if os.path.lexists(folder) and not (os.path.isdir(folder) and not os.listdir(folder)):
        raise DDError(f"{folder} holds other files: name a new or an empty folder to export into")
    images, labels = by_class(syn)
    pixels = (syn.pixels(data, images) * 255).round().to(torch.uint8) if seen is None else seen
    names = class_folders(syn.classes)
    each = len(images) // len(names)
    files = [f"{name}/{k:04d}.png" for name in names for k in range(each)]
    temporary = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")
    try:
        for file, image in zip(files, pixels, strict=True):
            _write_png(temporary / file, image)
        if labels.is_floating_point():
            _write_labels(temporary / "labels.csv", files, labels, syn.classes)
        facts = {
            "format": FORMAT,
            "dataset": syn.dataset,
            "classes": dict(zip(names, syn.classes, strict=True)),
            "labels": "labels.csv" if labels.is_floating_point() else "the folders",
            "pixels": "clamped to [0, 1], 8 bits",
            "mean": syn.mean.flatten().tolist(),
            "std": syn.std.flatten().tolist(),
            "zca": syn.zca,
            "recipe": asdict(syn.recipe),
            "backbone": syn.backbone,
        }
        (temporary / "set.json").write_text(json.dumps(facts, indent=1))
        os.replace(temporary, folder)
    except OSError as error:
        raise DDError(f"cannot write {folder}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def class_folders(classes: tuple[str, ...]) -> list[str]:
    """The name of each class's folder; numbered where the alphabet would put the classes into another order."""
    names = [re.sub(r"[^\w -]", "_", name).strip() or "_" for name in classes]
    if names == sorted(set(names)):
        return names
    digits = len(str(len(names) - 1))
    return [f"{k:0{digits}d}_{name}" for k, name in enumerate(names)]


def _write_png(path: Path, image: Tensor) -> None:
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    array = image.permute(1, 2, 0).numpy()
    Image.fromarray(array[..., 0] if array.shape[2] == 1 else array).save(path)


def _write_labels(path: Path, files: list[str], labels: Tensor, classes: tuple[str, ...]) -> None:
    with open(path, "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["file", *classes])
        table.writerows(
            [name, *map(repr, row)] for name, row in zip(files, labels.tolist(), strict=True)
        )
