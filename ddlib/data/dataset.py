"""A dataset as tensors by split: embedded digits, torchvision sets, any folder of images, your own arrays."""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..core import (
    DDError,
    checksum,
    choose,
    generator,
    instance,
    pick_device,
    plain,
    shown,
    upload,
    whole,
)
from . import cache as decoding
from .folders import SUBSETS, carve, find_folder, tree
from .zca import KINDS, ZCA

Splits = dict[str, tuple[Tensor, Tensor]]  # split -> images, labels

# name -> (torchvision class, what to put into the data root by hand when there is no internet)
TORCHVISION = {
    "mnist": ("MNIST", "the four *-ubyte files in MNIST/raw/"),
    "fashionmnist": ("FashionMNIST", "the four *-ubyte files in FashionMNIST/raw/"),
    "svhn": ("SVHN", "train_32x32.mat and test_32x32.mat"),
    "cifar10": ("CIFAR10", "cifar-10-python.tar.gz or the folder cifar-10-batches-py/"),
    "cifar100": ("CIFAR100", "cifar-100-python.tar.gz or the folder cifar-100-python/"),
}
_RESOLUTION = {"tinyimagenet": 64, "imagenet1k": 64} | dict.fromkeys(SUBSETS, 128)
NAMES = ("digits", *TORCHVISION, *_RESOLUTION)

# Channel mean and std as the released code of DC, DSA and DM has them, kept for comparability; MTT's and IDC's have
# CIFAR-10's for CIFAR-100 too. CIFAR-10's std is the mean of the per-image std (that of all pixels is .247 .243 .262);
# the ImageNets share one triple.
STATISTICS = {
    "mnist": ((0.1307,), (0.3081,)),
    "fashionmnist": ((0.2861,), (0.3530,)),
    "svhn": ((0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": ((0.5071, 0.4866, 0.4409), (0.2673, 0.2564, 0.2762)),
} | dict.fromkeys(_RESOLUTION, ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
VALUES_AT_ONCE = 2**22  # of a large set's pixels, when its mean and std are computed


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images and labels by split ("train", "test"), with the normalisation that every method uses.

    images: split -> uint8 [N,C,H,W]; labels: split -> int64 [N]; mean, std: float32 [C,1,1]; checksum: hex over
    images and labels. Images too large for the device (half of its free memory) stay on the CPU, memory-mapped where
    they came from a folder, and `batch` moves the rows asked for; `device` is where batches appear. `part` says
    what is other than `load` gives under this name (`subset`, `minival`, `from_arrays`), "" for nothing.
    """

    name: str
    classes: tuple[str, ...]
    images: dict[str, Tensor]
    labels: dict[str, Tensor]
    mean: Tensor
    std: Tensor
    checksum: str
    zca: ZCA | None = None
    part: str = ""

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
        labels = {split: y.to(device) for split, y in self.labels.items()}
        return replace(
            self,
            images=_place(self.images, device),
            labels=labels,
            mean=self.mean.to(device),
            std=self.std.to(device),
            zca=self.zca and self.zca.to(device),
        )

    def normalise(self, pixels: Tensor) -> Tensor:
        """uint8 0..255 or float in [0,1], [...,C,H,W] -> float32 on the device: (x - mean)/std, or ZCA if set."""
        self._check_form("pixels", pixels)
        if pixels.dtype != torch.uint8 and not pixels.is_floating_point():
            raise DDError(f"pixels must be uint8 in 0..255 or float in [0,1], not {pixels.dtype}")
        x = pixels.to(self.device)
        x = x.float() / 255 if x.dtype == torch.uint8 else x.float()
        return self.zca.whiten(x) if self.zca else (x - self.mean) / self.std

    def denormalise(self, x: Tensor) -> Tensor:
        """The inverse of `normalise`, clamped to [0,1]: float32 [...,C,H,W]."""
        self._check_form("images", x)
        x = x.to(self.device).float()
        return (self.zca.colour(x) if self.zca else x * self.std + self.mean).clamp(0, 1)

    def _check_form(self, what: str, x: Tensor) -> None:
        if not isinstance(x, Tensor) or x.shape[-3:] != self.shape:
            sizes = ", ".join(map(str, self.shape))
            raise DDError(f"{what} of {self.name} must be a tensor [..., {sizes}], not {shown(x)}")

    def batch(self, split: str, index: Tensor | Sequence[int] | slice) -> Tensor:
        """Normalised images of the given rows: float32 [*index.shape,C,H,W] on the device."""
        images = self.images[choose("split", split, self.images)]
        if not isinstance(index, slice):
            index = _integers("rows", index, images.device)
            decoding.read_ahead(images, index)
        try:
            chosen = images[index]
        except (IndexError, TypeError):
            raise DDError(
                f"rows of {split} must be integers from 0 to {len(images) - 1}, not {shown(index)}"
            ) from None
        return self.normalise(chosen)

    def class_sizes(self, split: str = "train") -> Tensor:
        """Images of each class: int64 [C] on the device."""
        return self._by_class[choose("split", split, self.images)][1].to(self.device)

    def sample(
        self,
        n: int,
        generator: torch.Generator,
        split: str = "train",
        classes: Sequence[int] | Tensor | None = None,
    ) -> Tensor:
        """Rows of n random images of each class (all, or those given), without replacement within a class.

        int64 [len(classes), n] on the device. Raises DDError when a class has fewer than n images. One uniform key
        for each image of the classes; the n smallest of a class are its sample, in random order.
        """
        n, generator = whole("n", n, 0), instance("generator", generator, torch.Generator)
        rows, sizes = self._by_class[choose("split", split, self.images)]
        if classes is not None:
            which = _integers("classes", classes, torch.device("cpu")).long().flatten()
            if which.numel() and not 0 <= int(which.min()) <= int(which.max()) < self.num_classes:
                raise DDError(
                    f"classes must lie in 0..{self.num_classes - 1}, not {which.tolist()[:10]}"
                )
            rows, sizes = rows[which], sizes[which]
        most = int(sizes.min()) if len(sizes) else n
        if n > most:
            raise DDError(
                f"cannot sample {n} images of each class: 0 to {most} is possible in {split}"
            )
        keys = torch.rand(rows.shape, generator=generator)
        keys.masked_fill_(torch.arange(rows.shape[1]) >= sizes[:, None], 2)
        chosen = rows.gather(1, keys.topk(n, dim=1, largest=False).indices)
        return upload(chosen, self.device)

    @cached_property
    def _by_class(self) -> dict[str, tuple[Tensor, Tensor]]:
        """split -> (row numbers of each class [C, largest class], padded; class sizes [C]), on the CPU."""
        tables = {}
        for split, labels in self.labels.items():
            labels = labels.cpu()
            order, sizes = labels.argsort(stable=True), labels.bincount(minlength=self.num_classes)
            at = (sizes.cumsum(0) - sizes)[:, None] + torch.arange(int(sizes.max()))
            tables[split] = order[at.clamp(max=max(len(order) - 1, 0))], sizes
        return tables

    def minival(self, fraction: float = 0.1, seed: int = 0) -> Dataset:
        """The dataset with a stratified share of train as a third split, val, for tuning; normalisation stays."""
        fraction, seed = instance("fraction", plain(fraction), int, float), whole("seed", seed, 0)
        if not 0 < fraction < 1:
            raise DDError(
                f"the fraction of train that becomes val must lie between 0 and 1, not {shown(fraction)}"
            )
        taken = carve(self.labels["train"], fraction, generator(seed, "minival"))
        return self._with({"train": ~taken, "val": taken}, minival_name(fraction, seed))

    def subset(self, per_class: int, seed: int = 0) -> Dataset:
        """The dataset with `per_class` random training images of each class; test and normalisation stay."""
        seed = whole("seed", seed, 0)
        rows = self.sample(per_class, generator(seed, "subset")).flatten()
        return self._with({"train": rows}, subset_name(per_class, seed))

    def _with(self, rows: dict[str, Tensor], how: str) -> Dataset:
        """The dataset whose splits `rows` are the given rows (or mask) of train."""
        images, labels = (
            {split: x["train"][index.to(x["train"].device)] for split, index in rows.items()}
            for x in (self.images, self.labels)
        )
        return replace(
            self,
            images=self.images | images,
            labels=self.labels | labels,
            checksum=derived(self.checksum, how),
            part=f"{self.part}, {how}" if self.part else how,
        )


def _integers(what: str, values: object, device: torch.device) -> Tensor:
    """Integers, or a mask, as a tensor on `device`, else a `DDError` that names `what`."""
    with suppress(TypeError, ValueError, RuntimeError):
        found = torch.as_tensor(values, device=device)
        found = found if found.numel() else found.long()  # [] would be float
        if not (found.is_floating_point() or found.is_complex()):
            return found
    raise DDError(f"{what} must be integers, not {shown(values)}")


def minival_name(fraction: float, seed: int = 0) -> str:
    return f"minival {fraction} {seed}"


def subset_name(per_class: int, seed: int = 0) -> str:
    return f"subset {per_class} {seed}"


def derived(checksum: str, how: str) -> str:
    """The checksum of the part of a dataset that `how` (`minival_name`, `subset_name`) takes."""
    return hashlib.sha256(f"{checksum} {how}".encode()).hexdigest()


def canonical(name: str) -> str:
    """The short name: "folder:cifar10" -> "cifar10", "folder:/x/y/pets" -> "pets", any other name as it is."""
    if not name.startswith("folder:"):
        return name
    return os.path.basename(os.path.abspath(os.path.expanduser(name[7:])))


def load(
    name: str,
    *,
    device: str | torch.device = "auto",
    resolution: int | None = None,
    zca: str | None = None,
    root: str | Path | None = None,
) -> Dataset:
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
    resolution = None if resolution is None else whole("resolution", resolution, 1)
    choose("zca kind", zca, (None, *KINDS))
    device = pick_device(device)
    root = _data_root(root)
    if name != "digits" and name not in TORCHVISION:
        files = tree(name, root)
        _, classes, samples = files
        pixels = resolution or _RESOLUTION.get(name)
        decoded = decoding.read(files, pixels, grey=name.startswith("folder:"))
        splits = {s: (x, _labels(samples[s])) for s, (x, _) in decoded.items()}
        sums = {s: sha for s, (_, sha) in decoded.items()}
        return _assemble(name, classes, splits, device, zca, sums)
    classes, splits = _digits() if name == "digits" else _torchvision(name, root)
    size = splits["train"][0].shape[-1]
    if resolution not in (None, size):
        raise DDError(
            f"{name} comes at resolution {size}; only folders and the ImageNets can be resized"
        )
    return _assemble(name, classes, splits, device, zca)


def _data_root(root: str | Path | None = None) -> Path:
    if not isinstance(root, (str, Path, type(None))):
        raise DDError(f"root must be a folder's path, not {shown(root)}")
    root = root or os.environ.get("DDLIB_DATA") or "~/.cache/ddlib/data"
    return Path(root).expanduser().absolute()


def _labels(samples: Sequence[tuple[str, int]]) -> Tensor:
    return torch.tensor([label for _, label in samples], dtype=torch.int64)


def _digest(sums: dict[str, str], labels: dict[str, Tensor]) -> str:
    """The checksum of a dataset from those of its images and its labels by split."""
    parts = "\n".join(
        f"{split} {sums[split]} {checksum(labels[split])}" for split in sorted(labels)
    )
    return hashlib.sha256(parts.encode()).hexdigest()


def folder_checksum(name: str, resolution: int | None = None) -> str | None:
    """The checksum that `load("folder:PATH")` would give now; None where there is no such folder at hand.

    Files whose names, sizes and times are those of the decode cache are not read again; others are decoded. A process
    asks every file once, and later only what `Watch` does.
    """
    root = _data_root()
    folder = find_folder(name, root)
    if folder is None:
        return None
    key = (folder.resolve(), resolution)
    if key in _WATCHED:
        watch, found = _WATCHED[key]
        if not watch.changed():
            return found
        del _WATCHED[key]
    started = time.time_ns()
    files = tree(name, root)
    states = decoding.states(files)
    watch = decoding.Watch(files, states, started)
    known = decoding.known_checksums(files, states, resolution, grey=True)
    if known is None:
        found = load(name, device="cpu", resolution=resolution).checksum
    else:
        found = _digest(known, {split: _labels(samples) for split, samples in files[2].items()})
    if watch.useful:
        _WATCHED[key] = watch, found
    return found


# (folder, resolution) -> what was seen of it, and the checksum of its images then
_WATCHED: dict[tuple[Path, int | None], tuple[decoding.Watch, str]] = {}


def from_arrays(
    train_images: np.ndarray | Tensor,
    train_labels: np.ndarray | Tensor,
    test_images: np.ndarray | Tensor,
    test_labels: np.ndarray | Tensor,
    *,
    classes: Sequence[str] | None = None,
    name: str = "arrays",
    device: str | torch.device = "auto",
) -> Dataset:
    """A dataset of your own: images uint8 or float in [0,1] (rounded to 8 bits), [N,H,W], [N,H,W,C] or [N,C,H,W] with
    C of 1 or 3; labels integers [N] in 0..classes-1, every class present in train; test may be empty.

    classes: names; default "0", "1", ... up to the largest train label. The arrays are copied.
    Under a name that `load` knows they serve to evaluate and import sets, but no `run` takes them for the images that
    `load` gives. Raises DDError for shapes that do not fit, other types, NaN, values outside [0,1] and labels out of
    range.
    """
    _check_names(name, classes)
    splits = {}
    for split, *pair in (("train", train_images, train_labels), ("test", test_images, test_labels)):
        x, y = (_as_tensor(f"{split} {what}", v) for what, v in zip(_PARTS, pair, strict=True))
        x = _as_pixels(f"{split} images", x)
        whole_numbers = not (y.is_floating_point() or y.is_complex() or y.dtype == torch.bool)
        if y.shape != x.shape[:1] or not whole_numbers:
            raise DDError(
                f"{split} labels must be integers of shape [{len(x)}], not {y.dtype} {list(y.shape)}"
            )
        splits[split] = x, y.long().clone()
    (train, train_y), (test, _) = splits.values()
    if not len(train):
        raise DDError("the train split is empty; at least one image of each class is needed")
    if train.shape[1:] != test.shape[1:]:
        raise DDError(
            f"train and test images must share one shape, not {[*train.shape[1:]]} and {[*test.shape[1:]]}"
        )
    if classes is None and int(train_y.max()) >= len(train_y):
        raise DDError(
            f"every class needs an image in train, so {len(train_y)} images make at most as many "
            f"classes, and the largest label is {int(train_y.max())}"
        )
    classes = tuple(map(str, classes if classes is not None else range(int(train_y.max()) + 1)))
    for split, (_, y) in splits.items():
        if len(y) and not 0 <= int(y.min()) <= int(y.max()) < len(classes):
            raise DDError(
                f"{split} labels must lie in 0..{len(classes) - 1}, not {int(y.min())}..{int(y.max())}"
            )
    absent = (torch.bincount(train_y, minlength=len(classes)) == 0).nonzero().flatten().tolist()
    if absent:
        raise DDError(
            f"every class needs an image in train, and {len(absent)} have none: {classes[absent[0]]}"
            f"{', ...' if len(absent) > 1 else ''}"
        )
    made = _assemble(name, classes, splits, pick_device(device))
    known = name in NAMES or name.startswith("folder:")
    return replace(made, part="arrays") if known else made


def _check_names(name: object, classes: object) -> None:
    if not isinstance(name, str):
        raise DDError(f"name must be a text, not {shown(name)}")
    names = isinstance(classes, (list, tuple, range, type(None)))
    if not names and not (isinstance(classes, np.ndarray) and classes.ndim == 1):
        raise DDError(f"classes must be a list of names, not {shown(classes)}")


_PARTS = ("images", "labels")


def _as_tensor(what: str, value: np.ndarray | Tensor) -> Tensor:
    """On the CPU; what is no array of numbers is a `DDError`."""
    if isinstance(value, Tensor) and value.layout == torch.strided and value.device.type != "meta":
        return value.detach().cpu()
    try:
        array = np.ascontiguousarray(value)
        # NumPy's other byte order is no type of torch's.
        return torch.as_tensor(array.astype(array.dtype.newbyteorder("="), copy=False))
    except (TypeError, ValueError, OverflowError, RuntimeError):
        raise DDError(
            f"{what} must be an array or a dense tensor of numbers, not {shown(value)}"
        ) from None


def _digits() -> tuple[Sequence[str], Splits]:
    """scikit-learn's 1,797 8x8 digits (values 0..16), split once and for all into 1,297 + 500, stratified."""
    # The file that its `load_digits` reads: importing scikit-learn takes seconds, which every first run would pay.
    package = find_spec("sklearn")
    if package is None:
        raise DDError("the digits come with scikit-learn, which is not installed")
    file = Path(package.origin).with_name("datasets") / "data" / "digits.csv.gz"
    rows = torch.as_tensor(np.loadtxt(file, delimiter=","))
    pixels = _as_pixels("digits", rows[:, :-1].view(-1, 8, 8) / 16)
    labels = rows[:, -1].long()
    test = carve(labels, 500 / 1797, generator(0, "digits"))
    return "0123456789", {
        "train": (pixels[~test], labels[~test]),
        "test": (pixels[test], labels[test]),
    }


def _torchvision(name: str, root: Path) -> tuple[Sequence[str], Splits]:
    import torchvision

    (kind, by_hand), splits = TORCHVISION[name], {}
    for split in ("train", "test"):
        which = {"split": split} if name == "svhn" else {"train": split == "train"}
        try:
            found = getattr(torchvision.datasets, kind)(str(root), download=True, **which)
        except Exception as error:
            # URLError, RuntimeError, TarError, EOFError, ...: torchvision lets all through.
            raise DDError(
                f"cannot read {name} from {root} or download it ({type(error).__name__}); "
                f"without internet, put {by_hand} into {root}"
            ) from error
        labels = found.labels if name == "svhn" else found.targets
        pixels = _as_pixels(name, torch.as_tensor(found.data))
        splits[split] = pixels, torch.as_tensor(labels, dtype=torch.int64)
    return getattr(found, "classes", "0123456789"), splits


def _as_pixels(what: str, x: Tensor) -> Tensor:
    """uint8 [N,C,H,W] in memory of its own."""
    possible = (1, 3) if x.ndim == 4 else ()
    axes = [1] if x.ndim == 3 else [axis for axis in possible if x.shape[axis] in (1, 3)]
    if len(axes) != 1 or 0 in x.shape[1:]:
        raise DDError(
            f"{what} must be [N,H,W], [N,H,W,C] or [N,C,H,W] with C of 1 or 3, not {list(x.shape)}"
            f"{', which could be either' if len(axes) == 2 else ''}"
        )
    if x.is_floating_point():
        if x.numel() and not 0 <= x.min() <= x.max() <= 1:
            raise DDError(
                f"{what} as floats must lie in [0,1], not {float(x.min()):g}..{float(x.max()):g}; "
                f"divide by 255 or give uint8, and remove any NaN"
            )
        x = (x * 255).round().to(torch.uint8)
    if x.dtype != torch.uint8:
        raise DDError(f"{what} must be uint8 or float in [0,1], not {x.dtype}")
    x = x[:, None] if x.ndim == 3 else x if axes == [1] else x.permute(0, 3, 1, 2)
    return x.clone(memory_format=torch.contiguous_format)


def _assemble(
    name: str,
    classes: Sequence[str],
    splits: Splits,
    device: torch.device,
    zca: str | None = None,
    sums: dict[str, str] | None = None,
) -> Dataset:
    images, labels = ({split: pair[i] for split, pair in splits.items()} for i in (0, 1))
    sums = sums or {split: checksum(x) for split, x in images.items()}
    digest = _digest(sums, labels)
    known = STATISTICS.get(canonical(name))
    fits = known and len(known[0]) == images["train"].shape[1]
    mean, std = (torch.tensor(known) if fits else _statistics(images["train"])).view(2, -1, 1, 1)
    whitening = zca and ZCA.fit_cached(
        images["train"], zca, device, sums["train"], decoding.cache_folder()
    )
    return Dataset(name, tuple(classes), images, labels, mean, std, digest, whitening).to(device)


def _statistics(images: Tensor) -> Tensor:
    """Mean and std [2,C] of all pixels in [0,1], from exact integer sums; a constant channel gets std 1."""
    moments = torch.zeros(2, images.shape[1], dtype=torch.int64)
    for chunk in images.split(max(1, VALUES_AT_ONCE // math.prod(images.shape[1:]))):
        x = chunk.transpose(0, 1).flatten(1).int()
        moments += torch.stack([x.sum(1), (x * x).sum(1)])
    mean, square = moments.double() / (images.numel() // images.shape[1])
    std = (square - mean**2).clamp(min=0).sqrt()
    return (torch.stack([mean, torch.where(std > 0, std, 255)]) / 255).float()


def _place(images: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    size = sum(x.nbytes for x in images.values() if x.device.type != "cuda")
    if device.type == "cuda" and 2 * size > torch.cuda.mem_get_info(device)[0]:
        return images
    return {split: x.to(device) for split, x in images.items()}
