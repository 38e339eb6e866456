"""Folders of images as lists of files: any ImageFolder tree, ImageNet-1K with its subsets, Tiny ImageNet."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from ..core import DDError, generator, shown

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff")
LABELS = "val_annotations.txt"  # Tiny ImageNet's: a line per image, FILE<tab>WNID<tab>...
_WANTED = (
    "wanted is PATH/train/CLASS/*.jpg with PATH/test/CLASS/*.jpg (or val/), or PATH/CLASS/*.jpg"
)

# Indices into the sorted WordNet ids of ImageNet-1K, in label order (MTT, Cazenavette et al. 2022).
SUBSETS = {
    "imagenette": (0, 217, 482, 491, 497, 566, 569, 571, 574, 701),
    "imagewoof": (193, 182, 258, 162, 155, 167, 159, 273, 207, 229),
    "imagefruit": (953, 954, 949, 950, 951, 957, 952, 945, 943, 948),
    "imagemeow": (281, 282, 283, 284, 285, 291, 292, 290, 289, 287),
    "imagesquawk": (84, 130, 88, 144, 145, 22, 96, 9, 100, 89),
    "imageyellow": (309, 986, 954, 951, 987, 779, 599, 291, 72, 11),
}

# folder, class names, split -> (file below the folder, label) of each image
Tree = tuple[Path, tuple[str, ...], dict[str, list[tuple[str, int]]]]


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


def tree(name: str, root: Path) -> Tree:
    """The files of "folder:PATH", Tiny ImageNet, ImageNet-1K or one of its subsets (ten classes, in their order)."""
    if name == "tinyimagenet":
        root = root / name
        want = (
            f"{name} needs {root}/train/WNID/images/*.JPEG with {root}/val/val_annotations.txt, or "
            f"{root}/train/WNID/*.JPEG with {root}/val/WNID/*.JPEG"
        )
        test = next((split for split in ("val", "test") if (root / split).is_dir()), "val")
        return _splits(root, test, want)
    if not name.startswith("folder:"):
        root = root / "imagenet1k"
        want = f"{name} needs the 1,000 class folders {root}/train/WNID/*.JPEG and {root}/val/WNID/*.JPEG"
        return _splits(root, "val", want, SUBSETS.get(name, ()))
    found = find_folder(name, root)
    if found is not None:
        return folder_tree(found)
    places = " or ".join(map(str, _places(name, root)))
    raise DDError(f"there is no folder {places} for {name!r}; {_WANTED}")


def find_folder(name: str, root: Path) -> Path | None:
    """The folder that "folder:PATH" means: below `root`, then in the working directory; None where there is none."""
    try:
        return next((place for place in _places(name, root) if place.is_dir()), None)
    except OSError as error:  # a name that is too long
        raise DDError(f"cannot look for {shown(name)}: {error.strerror}") from None


def _places(name: str, root: Path) -> list[Path]:
    if name == "folder:":
        raise DDError("'folder:' needs a path, as in folder:/data/pets or folder:pets")
    path = Path(name.removeprefix("folder:"))
    with suppress(RuntimeError):  # no such user's home
        path = path.expanduser()
    return [path] if path.is_absolute() else [root / path, Path.cwd() / path]


def folder_tree(root: Path) -> Tree:
    """SPLIT/CLASS/*.jpg with train/ and test/ (else val/); or train/ alone, or class folders at the top.

    Without a test split one is carved: a stratified fifth, the same on each load, where a class of one image stays in
    train; with one image in every class the test split is therefore empty.
    """
    top = _subfolders(root, _WANTED)
    below = _subfolders(root / "train", _WANTED) if "train" in top else ()
    train, classes = ("train", below) if below else (".", top)
    if {name.lower() for name in classes} <= {"train", "test", "val", "valid", "validation"}:
        raise DDError(f"{root} holds no class folders; {_WANTED}")
    if len(classes) < 2:
        raise DDError(
            f"{root / train} holds the one class folder {classes[0]!r}, and two are the least; {_WANTED}"
        )
    if below and not {"test", "val"}.isdisjoint(top):
        return _splits(root, "test" if "test" in top else "val", _WANTED)
    samples = _samples(root, train, classes)
    labels = torch.tensor([label for _, label in samples])
    taken = carve(labels, 0.2, generator(0, "carve test")).tolist()
    splits = {"train": [], "test": []}
    for sample, test in zip(samples, taken, strict=True):
        splits["test" if test else "train"].append(sample)
    return root, classes, splits


def _splits(root: Path, test: str, want: str, subset: Sequence[int] = ()) -> Tree:
    """Class folders in ROOT/train and ROOT/TEST, which may be as Tiny ImageNet ships: images/ and a list of labels."""
    classes = _subfolders(root / "train", want)
    if not classes or (subset and len(classes) != 1000):
        raise DDError(f"{want}, and {root / 'train'} holds {len(classes)}")
    notes = root / test / LABELS
    lines = _lines(notes) if notes.is_file() else []
    rows = [[*line.split("\t"), ""][:2] for line in lines if line.strip()]
    outside = [file for file, _ in rows if os.path.basename(file) != file]
    if outside:
        raise DDError(f"{notes} may name files of {test}/images only, not {shown(outside[0])}")
    tested = {wnid for _, wnid in rows} if rows else {*_subfolders(root / test, want)}
    odd = sorted({*classes} ^ tested)
    if odd:
        raise DDError(
            f"{root}: train/ and {test}/ must hold the same class folders, but {len(odd)} are in one only: "
            f"{', '.join(odd[:3])}{', ...' if len(odd) > 3 else ''}; {want}"
        )
    classes = tuple(classes[i] for i in subset) or classes
    splits = {"train": _samples(root, "train", classes)}
    label = {name: i for i, name in enumerate(classes)}
    listed = [(f"{test}/images/{file}", label[wnid]) for file, wnid in rows]
    return root, classes, splits | {"test": listed or _samples(root, test, classes)}


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DDError(f"cannot read {path} ({type(error).__name__}); copy it anew") from None


def _samples(root: Path, split: str, classes: Sequence[str]) -> list[tuple[str, int]]:
    """SPLIT/CLASS/*.jpg (or SPLIT/CLASS/images/*.jpg, as Tiny ImageNet ships), classes in the order given."""
    samples = []
    for label, name in enumerate(classes):
        folder = root / split / name
        folder = folder / "images" if (folder / "images").is_dir() else folder
        images = [file for file in _entries(folder) if file.lower().endswith(EXTENSIONS)]
        if not images:
            raise DDError(
                f"the class folder {folder} holds no image; remove it or add some ({' '.join(EXTENSIONS)})"
            )
        below = str(folder)[len(str(root)) + 1 :]
        samples += [(f"{below}/{file}", label) for file in images]
    return samples


def _subfolders(folder: Path, want: str) -> tuple[str, ...]:
    names = (name for name in _entries(folder, want) if name != "__MACOSX")
    return tuple(name for name in names if os.path.isdir(folder / name))


def _entries(folder: Path, want: str = "remove it or make it readable") -> list[str]:
    try:
        return sorted(name for name in os.listdir(folder) if name[0] != ".")
    except OSError as error:
        raise DDError(f"cannot read the folder {folder}: {error.strerror}; {want}") from error
