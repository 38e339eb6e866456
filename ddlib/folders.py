"""Folders of images as lists of files: any ImageFolder tree, ImageNet-1K with its subsets, Tiny ImageNet."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .core import DDError, generator

EXTENSIONS = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff"}

# Indices into the sorted WordNet ids of ImageNet-1K, in label order (MTT, Cazenavette et al. 2022).
SUBSETS = {
    "imagenette": (0, 217, 482, 491, 497, 566, 569, 571, 574, 701),
    "imagewoof": (193, 182, 258, 162, 155, 167, 159, 273, 207, 229),
    "imagefruit": (953, 954, 949, 950, 951, 957, 952, 945, 943, 948),
    "imagemeow": (281, 282, 283, 284, 285, 291, 292, 290, 289, 287),
    "imagesquawk": (84, 130, 88, 144, 145, 22, 96, 9, 100, 89),
    "imageyellow": (309, 986, 954, 951, 987, 779, 599, 291, 72, 11),
}


@dataclass(frozen=True)
class Listing:
    """The images of one split: file names relative to `root`, (bytes, time of change) and label of each."""

    root: Path
    files: list[str]
    stats: list[tuple[int, int]]
    labels: list[int]

    def select(self, keep: Tensor) -> Listing:
        rows = keep.nonzero().flatten().tolist()
        return Listing(self.root, *([column[i] for i in rows] for column in (self.files, self.stats, self.labels)))


Tree = tuple[tuple[str, ...], dict[str, Listing]]  # class names, split -> listing


def carve(labels: Tensor, fraction: float, draw: torch.Generator) -> Tensor:
    """A random, stratified share: bool [N], True for round(fraction * n) of each class's n images.

    A class of two or more gives at least one and keeps at least one; a single image is never taken.
    """
    labels = labels.cpu()
    sizes = torch.bincount(labels)
    order = torch.randperm(len(labels), generator=draw)
    order = order[labels[order].argsort(stable=True)]
    rank = torch.arange(len(labels)) - (sizes.cumsum(0) - sizes)[labels[order]]
    quota = (fraction * sizes).round().clamp(min=1).minimum(sizes - 1)
    taken = torch.zeros(len(labels), dtype=torch.bool)
    taken[order] = rank < quota[labels[order]]
    return taken


def _entries(folder: Path) -> list[os.DirEntry]:
    try:
        with os.scandir(folder) as found:
            return sorted((e for e in found if e.name[0] != "."), key=lambda e: e.name)
    except OSError as error:
        raise DDError(f"cannot read the folder {folder}: {error.strerror or error}") from error


def _subfolders(folder: Path) -> tuple[str, ...]:
    return tuple(e.name for e in _entries(folder) if e.is_dir() and e.name != "__MACOSX")


def _list(root: Path, split: str, classes: Sequence[str]) -> Listing:
    """SPLIT/CLASS/*.jpg (or SPLIT/CLASS/images/*.jpg, as Tiny ImageNet ships), classes in the order given."""
    listing = Listing(root, [], [], [])
    for label, name in enumerate(classes):
        folder = root / split / name
        if (folder / "images").is_dir():
            folder = folder / "images"
        images = [e for e in _entries(folder) if os.path.splitext(e.name)[1].lower() in EXTENSIONS]
        if not images:
            raise DDError(f"the class folder {folder} holds no image; remove it or add images "
                          f"({', '.join(sorted(EXTENSIONS))})")
        for entry in images:
            try:
                stat = entry.stat()
            except OSError as error:
                raise DDError(f"cannot read the image {entry.path}: {error.strerror}") from error
            listing.stats.append((stat.st_size, stat.st_mtime_ns))
            listing.files.append(entry.path[len(str(root)) + 1:])
            listing.labels.append(label)
    return listing


def _same_classes(root: Path, train: Sequence[str], other: Sequence[str], split: str) -> None:
    odd = sorted(set(train) ^ set(other))
    if odd:
        raise DDError(f"{root}: train/ and {split}/ must hold the same class folders, but {len(odd)} are in one only: "
                      f"{', '.join(odd[:3])}{', ...' if len(odd) > 3 else ''}")


def folder_tree(root: Path) -> Tree:
    """SPLIT/CLASS/*.jpg with train/ and test/ (else val/); or train/ alone, or class folders at the top.

    Without a test split one is carved: a stratified fifth, the same on each load, where a class of one image stays in
    train; with one image in every class the test split is therefore empty.
    """
    want = f"{root}/train/CLASS/*.jpg with {root}/test/CLASS/*.jpg (or val/), or {root}/CLASS/*.jpg"
    names = _subfolders(root)
    split_layout = "train" in names and bool(_subfolders(root / "train"))
    if not names or (not split_layout and set(names) <= {"train", "test", "val", "valid", "validation"}):
        raise DDError(f"{root} holds no class folders; the layout wanted is {want}")
    test = next((s for s in ("test", "val") if split_layout and s in names), None)
    top = "train" if split_layout else "."
    classes = _subfolders(root / top)
    if len(classes) < 2:
        raise DDError(f"{root / top} holds the one class folder {classes[0]!r}, and two or more are needed; "
                      f"the layout wanted is {want}")
    if test:
        _same_classes(root, classes, _subfolders(root / test), test)
        return classes, {"train": _list(root, top, classes), "test": _list(root, test, classes)}
    listing = _list(root, top, classes)
    taken = carve(torch.tensor(listing.labels), 0.2, generator(0, "carve test"))
    return classes, {"train": listing.select(~taken), "test": listing.select(taken)}


def imagenet_tree(root: Path, name: str) -> Tree:
    """ROOT/{train,val}/WNID/*.JPEG: all classes, or the ten of a subset in the order of its list."""
    want = f"{name} needs {root}/train/WNID/*.JPEG and {root}/val/WNID/*.JPEG"
    missing = [s for s in ("train", "val") if not (root / s).is_dir()]
    if missing:
        raise DDError(f"{want}, and {root / missing[0]} is missing")
    classes = _subfolders(root / "train")
    if not classes or (name in SUBSETS and len(classes) != 1000):
        raise DDError(f"{want} with the 1,000 class folders of ImageNet-1K, and {root / 'train'} holds {len(classes)}")
    _same_classes(root, classes, _subfolders(root / "val"), "val")
    if name in SUBSETS:
        classes = tuple(classes[i] for i in SUBSETS[name])
    return classes, {"train": _list(root, "train", classes), "test": _list(root, "val", classes)}


def tiny_tree(root: Path) -> Tree:
    """Tiny ImageNet as it ships (val/images with val/val_annotations.txt), or val/ or test/ in class folders."""
    want = (f"tinyimagenet needs {root}/train/WNID/images/*.JPEG with {root}/val/val_annotations.txt, "
            f"or {root}/train/WNID/*.JPEG with {root}/val/WNID/*.JPEG")
    if not (root / "train").is_dir():
        raise DDError(f"{want}, and {root / 'train'} is missing")
    classes = _subfolders(root / "train")
    notes = root / "val" / "val_annotations.txt"
    if notes.is_file():
        rows = [line.split("\t")[:2] for line in notes.read_text().splitlines() if line.strip()]
        if not rows or any(len(row) < 2 for row in rows):
            raise DDError(f"{notes} must have one line an image, 'FILE<tab>WNID<tab>...'")
        _same_classes(root, classes, [wnid for _, wnid in rows], "val")
        label = {name: i for i, name in enumerate(classes)}
        test = Listing(root, [f"val/images/{file}" for file, _ in rows], [], [label[wnid] for _, wnid in rows])
        for file in test.files:
            try:
                stat = os.stat(root / file)
            except OSError as error:
                raise DDError(f"{notes} names the image {root / file}, which cannot be read") from error
            test.stats.append((stat.st_size, stat.st_mtime_ns))
    else:
        split = next((s for s in ("val", "test") if (root / s).is_dir()), None)
        if split is None:
            raise DDError(f"{want}, and {root / 'val'} is missing")
        _same_classes(root, classes, _subfolders(root / split), split)
        test = _list(root, split, classes)
    return classes, {"train": _list(root, "train", classes), "test": test}
