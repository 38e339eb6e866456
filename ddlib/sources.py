"""Where images and labels come from when they are no folder: embedded digits, torchvision's sets, arrays."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .core import DDError, checksum, generator
from .folders import carve

Splits = dict[str, tuple[Tensor, Tensor, str]]  # split -> images, labels, checksum of the images

# name -> (torchvision class, what to put into the data root by hand when there is no internet)
TORCHVISION = {
    "mnist": ("MNIST", "the four *-ubyte files in MNIST/raw/"),
    "fashionmnist": ("FashionMNIST", "the four *-ubyte files in FashionMNIST/raw/"),
    "svhn": ("SVHN", "train_32x32.mat and test_32x32.mat"),
    "cifar10": ("CIFAR10", "cifar-10-python.tar.gz or the folder cifar-10-batches-py/"),
    "cifar100": ("CIFAR100", "cifar-100-python.tar.gz or the folder cifar-100-python/"),
}


def digits() -> tuple[tuple[str, ...], Splits]:
    """scikit-learn's 1,797 8x8 digits (values 0..16), split once and for all into 1,297 + 500, stratified."""
    from sklearn.datasets import load_digits

    found = load_digits()
    pixels = torch.from_numpy((found.images * (255 / 16)).round().astype(np.uint8))[:, None]
    labels = torch.from_numpy(found.target.astype(np.int64))
    test = carve(labels, 500 / 1797, generator(0, "digits"))
    splits = {s: (pixels[keep], labels[keep], checksum(pixels[keep])) for s, keep in (("train", ~test), ("test", test))}
    return tuple("0123456789"), splits


def torchvision_set(name: str, root: Path) -> tuple[tuple[str, ...], Splits]:
    import torchvision

    kind, by_hand = TORCHVISION[name]
    splits: Splits = {}
    for split in ("train", "test"):
        which = {"split": split} if name == "svhn" else {"train": split == "train"}
        try:
            found = getattr(torchvision.datasets, kind)(str(root), download=True, **which)
        except Exception as error:  # URLError, RuntimeError, TarError, EOFError, ...: torchvision lets all through
            raise DDError(f"cannot download {name} into {root} ({type(error).__name__}); "
                          f"without internet, put {by_hand} into {root}") from error
        pixels = as_pixels(name, found.data)
        labels = torch.as_tensor(np.asarray(found.labels if name == "svhn" else found.targets), dtype=torch.int64)
        splits[split] = pixels, labels, checksum(pixels)
    return tuple(getattr(found, "classes", "0123456789")), splits


def as_pixels(what: str, images: np.ndarray | Tensor) -> Tensor:
    """uint8 [N,C,H,W] in memory of its own."""
    x = torch.as_tensor(np.ascontiguousarray(images)) if not isinstance(images, Tensor) else images.detach().cpu()
    channel_axes = [axis for axis in (1, 3) if x.ndim == 4 and x.shape[axis] in (1, 3)]
    if x.ndim not in (3, 4) or (x.ndim == 4 and not channel_axes) or 0 in x.shape[1:]:
        raise DDError(f"{what} must be [N,H,W], [N,H,W,C] or [N,C,H,W] with C of 1 or 3, not {list(x.shape)}")
    if len(channel_axes) == 2:
        raise DDError(f"{what} of shape {list(x.shape)} could be [N,H,W,C] or [N,C,H,W]; neither H nor W may be 1 or 3")
    if x.is_floating_point():
        if not torch.isfinite(x).all():
            raise DDError(f"{what} hold NaN or infinite values")
        if x.numel() and (x.min() < 0 or x.max() > 1):
            raise DDError(f"{what} as floats must lie in [0,1], not {float(x.min()):g}..{float(x.max()):g}; "
                          f"divide by 255 or give uint8")
        x = (x * 255).round().to(torch.uint8)
    elif x.dtype != torch.uint8:
        raise DDError(f"{what} must be uint8 or float in [0,1], not {x.dtype}")
    x = x[:, None] if x.ndim == 3 else x if channel_axes == [1] else x.permute(0, 3, 1, 2)
    return x.clone(memory_format=torch.contiguous_format)


def as_labels(what: str, labels: np.ndarray | Tensor, n: int) -> Tensor:
    y = labels.detach().cpu() if isinstance(labels, Tensor) else torch.as_tensor(np.asarray(labels))
    if y.shape != (n,) or y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        raise DDError(f"{what} must be integers of shape [{n}], one an image, not {y.dtype} {list(y.shape)}")
    return y.long().clone()
