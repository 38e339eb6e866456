"""A dataset as tensors by split: embedded digits, torchvision sets, any folder of images, your own arrays."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from . import decoding
from .core import DDError, checksum, choose, generator, pick_device
from .folders import SUBSETS, carve, folder_tree, imagenet_tree, tiny_tree
from .sources import TORCHVISION, Splits, as_labels, as_pixels, digits, torchvision_set
from .zca import KINDS, ZCA

_RESOLUTION = {"tinyimagenet": 64, "imagenet1k": 64} | dict.fromkeys(SUBSETS, 128)
NAMES = ("digits", *TORCHVISION, *_RESOLUTION)

# Channel mean and std as the released codes of DC, DM and MTT have them, kept for comparability. CIFAR-10's std is the
# mean of the per-image std (that of all pixels is .247 .243 .262); the ImageNets share one triple.
_IMAGENET = ((.485, .456, .406), (.229, .224, .225))
STATISTICS = {
    "mnist": ((.1307,), (.3081,)),
    "fashionmnist": ((.2861,), (.3530,)),
    "svhn": ((.4377, .4438, .4728), (.1980, .2010, .1970)),
    "cifar10": ((.4914, .4822, .4465), (.2023, .1994, .2010)),
    "cifar100": ((.5071, .4866, .4409), (.2673, .2564, .2762)),
} | dict.fromkeys(_RESOLUTION, _IMAGENET)


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images and labels by split ("train", "test"), with the normalisation that every method uses.

    images: split -> uint8 [N,C,H,W]; labels: split -> int64 [N]; mean, std: float32 [C,1,1]; checksum: hex over
    images and labels. Images too large for the device (half of its free memory) stay on the CPU, memory-mapped where
    they came from a large folder, and `batch` moves the rows asked for; `device` is where batches appear.
    """

    name: str
    classes: tuple[str, ...]
    images: dict[str, Tensor]
    labels: dict[str, Tensor]
    mean: Tensor
    std: Tensor
    checksum: str
    zca: ZCA | None = None

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        return tuple(self.images["train"].shape[1:])

    @property
    def device(self) -> torch.device:
        return self.mean.device

    def to(self, device: str | torch.device) -> Dataset:
        device = pick_device(device)
        return dataclasses.replace(
            self, images=_place(self.images, device), labels={s: y.to(device) for s, y in self.labels.items()},
            mean=self.mean.to(device), std=self.std.to(device), zca=self.zca and self.zca.to(device))

    def normalise(self, pixels: Tensor) -> Tensor:
        """uint8 0..255 or float in [0,1], [...,C,H,W] -> float32 on the device: (x - mean)/std, or ZCA if set."""
        if pixels.dtype != torch.uint8 and not pixels.is_floating_point():
            raise DDError(f"pixels must be uint8 in 0..255 or float in [0,1], not {pixels.dtype}")
        x = pixels.to(self.device)
        x = x.float() / 255 if x.dtype == torch.uint8 else x.float()
        return self.zca.whiten(x) if self.zca else (x - self.mean) / self.std

    def denormalise(self, x: Tensor) -> Tensor:
        """The inverse of `normalise`, clamped to [0,1]: float32 [...,C,H,W]."""
        x = x.to(self.device).float()
        return (self.zca.colour(x) if self.zca else x * self.std + self.mean).clamp(0, 1)

    def batch(self, split: str, index: Tensor | Sequence[int] | slice) -> Tensor:
        """Normalised images of the given rows: float32 [*index.shape,C,H,W] on the device."""
        images = self.images[choose("split", split, self.images)]
        if not isinstance(index, slice):
            index = torch.as_tensor(index, device=images.device)
            index = index if index.numel() else index.long()  # [] would be float
        return self.normalise(images[index])

    def class_sizes(self, split: str = "train") -> Tensor:
        """Images of each class: int64 [C] on the device."""
        return self._by_class[choose("split", split, self.images)][1].to(self.device)

    def sample(self, n: int, generator: torch.Generator, split: str = "train",
               classes: Sequence[int] | Tensor | None = None) -> Tensor:
        """Rows of n random images of each class (all, or those given), without replacement within a class.

        int64 [len(classes), n] on the device. Raises DDError when a class has fewer than n images. One uniform key
        for each image of the classes; the n smallest of a class are its sample, in random order.
        """
        rows, sizes = self._by_class[choose("split", split, self.images)]
        if classes is not None:
            which = torch.as_tensor(classes, dtype=torch.int64, device="cpu").flatten()
            if which.numel() and not 0 <= int(which.min()) <= int(which.max()) < self.num_classes:
                raise DDError(f"classes must lie in 0..{self.num_classes - 1}, not {which.tolist()[:10]}")
            rows, sizes = rows[which], sizes[which]
        if n < 0 or (len(sizes) and n > sizes.min()):
            raise DDError(f"cannot sample {n} images of each class without replacement: 0 to "
                          f"{int(sizes.min())} is possible in {split!r} of {self.name}")
        keys = torch.rand(rows.shape, generator=generator)
        keys.masked_fill_(torch.arange(rows.shape[1]) >= sizes[:, None], 2)
        return rows.gather(1, keys.topk(n, dim=1, largest=False).indices).to(self.device)

    @cached_property
    def _by_class(self) -> dict[str, tuple[Tensor, Tensor]]:
        """split -> (row numbers of each class [C, largest class], padded; class sizes [C]), on the CPU."""
        tables = {}
        for split, labels in self.labels.items():
            order = labels.cpu().argsort(stable=True)
            sizes = torch.bincount(labels.cpu(), minlength=self.num_classes)
            columns = torch.arange(int(sizes.max()))
            at = (sizes.cumsum(0) - sizes)[:, None] + columns
            tables[split] = order[at.clamp(max=max(len(order) - 1, 0))], sizes
        return tables

    def minival(self, fraction: float = 0.1, seed: int = 0) -> Dataset:
        """A dataset with splits train, val and test, where val is a stratified share of train (for tuning).

        Normalisation and ZCA stay those of the whole train split. The images of train and val are copies.
        """
        if not 0 < fraction < 1:
            raise DDError(f"the fraction of train that becomes val must lie between 0 and 1, not {fraction}")
        taken = carve(self.labels["train"], fraction, generator(seed, "minival"))
        parts = {"train": ~taken, "val": taken}
        images, labels = dict(self.images), dict(self.labels)
        for split, keep in parts.items():
            images[split] = self.images["train"][keep.to(self.images["train"].device)]
            labels[split] = self.labels["train"][keep.to(self.device)]
        name = f"{self.checksum} minival {fraction} {seed}"
        return dataclasses.replace(self, images=images, labels=labels,
                                   checksum=hashlib.sha256(name.encode()).hexdigest())

    def subset(self, per_class: int, seed: int = 0) -> Dataset:
        """The dataset with `per_class` random training images of each class; test and normalisation stay."""
        rows = self.sample(per_class, generator(seed, "subset")).flatten()
        images, labels = dict(self.images), dict(self.labels)
        images["train"] = self.images["train"][rows.to(self.images["train"].device)]
        labels["train"] = self.labels["train"][rows]
        name = f"{self.checksum} subset {per_class} {seed}"
        return dataclasses.replace(self, images=images, labels=labels,
                                   checksum=hashlib.sha256(name.encode()).hexdigest())


def canonical(name: str) -> str:
    """The short name: "folder:cifar10" -> "cifar10", "folder:/x/y/pets" -> "pets", any other name as it is."""
    return os.path.basename(os.path.abspath(os.path.expanduser(name[7:]))) if name.startswith("folder:") else name


def load(name: str, *, device: str | torch.device = "auto", resolution: int | None = None, zca: str | None = None,
         root: str | Path | None = None) -> Dataset:
    """The dataset called `name`: one of `NAMES`, or "folder:PATH" for any tree of images (see `folders`).

    root: the data folder, else the environment variable DDLIB_DATA, else ~/.cache/ddlib/data. torchvision's sets are
        downloaded into it; the ImageNets are read from ROOT/imagenet1k/{train,val}/WNID/*.JPEG and ROOT/tinyimagenet;
        a relative PATH is looked up below it, then in the working directory.
    resolution: pixels of the shorter side, then centre crop (folders and ImageNets: default 64, subsets 128).
    zca: None, "mtt" or "frepo" (see `ZCA`), fitted on train.
    mean and std are the released codes' constants for a known (canonical) name, else computed from train.
    Raises DDError for an unknown name, missing files (with the layout wanted), unreadable, corrupt or mixed images.
    """
    if not (isinstance(name, str) and name.startswith("folder:")):
        choose("dataset", name, (*NAMES, "folder:PATH"))
    if resolution is not None and not (type(resolution) is int and resolution > 0):
        raise DDError(f"resolution must be a positive number of pixels, not {resolution!r}")
    if zca is not None:
        choose("zca kind", zca, KINDS)
    device = pick_device(device)
    root = Path(root or os.environ.get("DDLIB_DATA") or "~/.cache/ddlib/data").expanduser().absolute()
    if name == "digits" or name in TORCHVISION:
        classes, splits = digits() if name == "digits" else torchvision_set(name, root)
        size = splits["train"][0].shape[-1]
        if resolution not in (None, size):
            raise DDError(f"{name} comes at resolution {size}; only folders and the ImageNets can be resized")
    else:
        if name.startswith("folder:"):
            tree = folder_tree(_find(name, root))
        elif name == "tinyimagenet":
            tree = tiny_tree(root / name)
        else:
            tree = imagenet_tree(root / "imagenet1k", name)
        classes, listings = tree
        decoded = decoding.read(tree, resolution or _RESOLUTION.get(name), grey=name.startswith("folder:"))
        splits = {s: (images, torch.tensor(listings[s].labels, dtype=torch.int64), sha)
                  for s, (images, sha) in decoded.items()}
    return _assemble(name, classes, splits, device, zca)


def from_arrays(train_images: np.ndarray | Tensor, train_labels: np.ndarray | Tensor, test_images: np.ndarray | Tensor,
                test_labels: np.ndarray | Tensor, *, classes: Sequence[str] | None = None, name: str = "arrays",
                device: str | torch.device = "auto") -> Dataset:
    """A dataset of your own: images uint8 or float in [0,1] (rounded to 8 bits), [N,H,W], [N,H,W,C] or [N,C,H,W] with
    C of 1 or 3; labels integers [N] in 0..classes-1, every class present in train; test may be empty.

    classes: names; default "0", "1", ... up to the largest train label. The arrays are copied.
    Raises DDError for shapes that do not fit, other types, NaN, values outside [0,1] and labels out of range.
    """
    device = pick_device(device)
    splits: Splits = {}
    for split, images, labels in (("train", train_images, train_labels), ("test", test_images, test_labels)):
        pixels = as_pixels(f"{split} images", images)
        splits[split] = pixels, as_labels(f"{split} labels", labels, len(pixels)), checksum(pixels)
    (train, train_y, _), (test, test_y, _) = splits["train"], splits["test"]
    if not len(train):
        raise DDError("the train split is empty; at least one image of each class is needed")
    if train.shape[1:] != test.shape[1:]:
        raise DDError(f"train and test images must share one shape, not {list(train.shape[1:])} and "
                      f"{list(test.shape[1:])} (C,H,W)")
    classes = tuple(map(str, classes if classes is not None else range(int(train_y.max()) + 1)))
    for split, y in (("train", train_y), ("test", test_y)):
        if len(y) and not 0 <= int(y.min()) <= int(y.max()) < len(classes):
            raise DDError(f"{split} labels must lie in 0..{len(classes) - 1} for {len(classes)} classes, not "
                          f"{int(y.min())}..{int(y.max())}")
    absent = (torch.bincount(train_y, minlength=len(classes)) == 0).nonzero().flatten().tolist()
    if absent:
        raise DDError(f"every class needs an image in train, and {len(absent)} have none: "
                      f"{', '.join(classes[i] for i in absent[:3])}{', ...' if len(absent) > 3 else ''}")
    return _assemble(name, classes, splits, device, None)


def _assemble(name: str, classes: Sequence[str], splits: Splits, device: torch.device, zca: str | None) -> Dataset:
    train, _, train_sha = splits["train"]
    constants = STATISTICS.get(canonical(name))
    if constants and len(constants[0]) == train.shape[1]:
        mean, std = (torch.tensor(c).view(-1, 1, 1) for c in constants)
    else:
        mean, std = _statistics(train)
    parts = (f"{split} {sha} {checksum(labels)}" for split, (_, labels, sha) in sorted(splits.items()))
    digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()
    whitening = zca and ZCA.fit_cached(train, zca, device, train_sha, decoding.cache_folder())
    images, labels = ({s: part[i] for s, part in splits.items()} for i in (0, 1))
    return Dataset(name, tuple(classes), images, labels, mean, std, digest, whitening).to(device)


def _statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and std [C,1,1] of all pixels in [0,1]; exact integer sums; a constant channel gets std 1."""
    total = torch.zeros(images.shape[1], dtype=torch.int64)
    square = total.clone()
    for chunk in images.split(1024):
        x = chunk.transpose(0, 1).flatten(1).int()
        total += x.sum(1)
        square += (x * x).sum(1)
    count = images.numel() // images.shape[1]
    mean = total.double() / count
    std = (square.double() / count - mean**2).clamp(min=0).sqrt()
    std[std == 0] = 255
    return (mean / 255).float().view(-1, 1, 1), (std / 255).float().view(-1, 1, 1)


def _place(images: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    if device.type == "cuda":
        size = sum(x.nbytes for x in images.values() if x.device.type != "cuda")
        if 2 * size > torch.cuda.mem_get_info(device)[0]:
            return images
    return {split: x.to(device) for split, x in images.items()}


def _find(name: str, root: Path) -> Path:
    path = Path(name.removeprefix("folder:")).expanduser()
    if name == "folder:":
        raise DDError("'folder:' needs a path, as in folder:/data/pets or folder:pets")
    places = [path] if path.is_absolute() else [root / path, Path.cwd() / path]
    found = next((p for p in places if p.is_dir()), None)
    if found is None:
        raise DDError(f"there is no folder {' or '.join(map(str, places))} for {name!r}; wanted is "
                      f"PATH/train/CLASS/*.jpg with PATH/test/CLASS/*.jpg (or val/), or PATH/CLASS/*.jpg")
    return found
