"""Sets that others published, in the layouts of the released codes, to be scored under the same evaluator as ours.

Nothing in a file can run: `.pt` files are read by torch's unpickler for tensors and plain values alone, `.npz` without
pickles. What each released code writes (facts read off the code; the tests write files in the same way):

- DC, DSA, DM: `res_METHOD_DATASET_MODEL_Nipc.pt`, {"data": [[images, labels], ...], a pair per experiment}; normalised.
- MTT, TESLA, FTD, DATM: `images_best.pt`, `labels_best.pt` (or `_ITERATION`); normalised or whitened. DATM's labels
  are logits, and it alone saves its step size, `lr_best.pt`: the others only logged theirs.
- IDC, DREAM: `data_best.pt`, [images, labels]; pixels in [0, 1], each image a mosaic of factor x factor.
- FRePo: `stepNNNNNN.npz` with `image` [n, H, W, C], whitened where its dataset is, and real-valued `label`.
- ddlib: the `.pt` of `ddlib export`.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import zipfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..config import load_as, resolve_anyway
from ..core import DDError, choose, instance, path_of, plain, shown, whole
from ..data.dataset import STATISTICS, Dataset, canonical
from ..distilled import Synthetic, check_factor, recipe_from
from ..files import is_there
from ..recipe import Recipe
from .outward import FORMAT

# Bytes of a file's arrays: above any published set, below what a hostile file may claim.
LARGEST = 2**32
LAYOUTS = (
    "DC's, DSA's and DM's res_*.pt, MTT's, TESLA's, FTD's and DATM's images_*.pt beside labels_*.pt, IDC's and "
    "DREAM's data_best.pt, FRePo's step*.npz, and the .pt of ddlib export"
)
MATCHING = ("mtt", "tesla", "ftd", "datm")  # trajectory matching: the step size is learned
TILED = ("idc", "dream", "dream_plus")


@dataclass(frozen=True)
class Found:
    """What a file holds: images [n, C, H, W] in the space `pixels` or not, labels, and what the layout says."""

    images: Tensor
    labels: Tensor
    methods: tuple[str, ...]  # that write this layout, the likeliest first
    pixels: bool = False  # in [0, 1], to be normalised
    lr: float | None = None


def import_set(
    path: str | Path,
    dataset: str | Dataset,
    *,
    method: str | None = None,
    experiment: int = -1,
    factor: int | None = None,
    lr: float | None = None,
    device: str = "auto",
    **settings: object,
) -> Synthetic:
    """The published set at `path` (a file, or the folder that holds it) as a `Synthetic`, ready for `dd.evaluate`.

    dataset: what it was distilled from, a name or a loaded `Dataset`; method: whose protocol, network, whitening and
    factor hold, by the preset of the paper (default: what layout and file name say); experiment: which of DC's, DSA's
    or DM's; factor: IDC's tiles per side; lr: a learned step size that the file lacks; settings: further keys of the
    preset, e.g. backbone or zca. Raises `DDError` for an unknown layout, a file that would run code, and images or
    labels that are not finite or do not fit the dataset.
    """
    path = _file(path_of("the path of a published set", path))
    instance("dataset", dataset, str, Dataset)
    instance("method", method, str, None)
    instance("lr", plain(lr), int, float, None)
    experiment = instance("experiment", plain(experiment), int)
    factor = None if factor is None else whole("factor", factor, 1)
    found = _read(path, experiment)
    source = {"file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    if isinstance(found, Synthetic):
        found = replace(found, spec=found.spec | {"imported": source})
        return _fitted(found, dataset, device)
    method = choose("method of this layout", method or found.methods[0], found.methods)
    images, labels, classes = _checked(path, found, method)
    name = dataset if isinstance(dataset, str) else dataset.name
    spec = resolve_anyway(method, name, len(images) // classes, "paper", **settings)
    data = _dataset(dataset, spec, device)
    _check_shape(path, images, classes, data)
    images = images.to(data.device)
    if method in MATCHING and canonical(name) == "cifar100" and not data.zca:
        mean, std = torch.tensor(STATISTICS["cifar10"]).to(images)[..., None, None]
        images = data.normalise(images * std + mean)  # which this family's codes take for both
    elif found.pixels:
        images = data.normalise(images)
    return Synthetic.of(
        data,
        images,
        labels.to(data.device),
        _recipe(path, found, method, spec.recipe, lr),
        spec.run.eval_backbone or spec.run.backbone,
        factor=_factor(method, spec, factor, data.shape),
        spec=asdict(spec) | {"imported": source},
    )


def _file(path: Path) -> Path:
    """The file to read: the one named, or what a released code's folder holds."""
    if is_there(path):
        return path
    if not os.path.isdir(path):
        raise DDError(f"there is no file or folder {path}")
    for pattern in ("images_best.pt", "data_best.pt", "data.pt", "res_*.pt", "step*.npz"):
        files = sorted(filter(is_there, path.glob(pattern)))
        if files:
            return files[-1]
    raise DDError(f"{path} holds no published set; known are {LAYOUTS}")


def _read(path: Path, experiment: int) -> Found | Synthetic:
    if path.suffix == ".npz":
        return _frepo(path)
    if path.suffix not in (".pt", ".pth"):
        raise DDError(f"{path} has no known layout; known are {LAYOUTS}")
    content = _load(path)
    if isinstance(content, dict) and content.get("format") == FORMAT:
        return _ours(path, content)
    if isinstance(content, dict) and "data" in content:
        return _condensation(path, content["data"], experiment)
    if isinstance(content, list | tuple) and len(content) == 2:
        return Found(*_pair(path, content), TILED, pixels=True)
    if isinstance(content, Tensor) and path.name.startswith("images_"):
        return _matching(path, content)
    raise DDError(f"{path} has no known layout; known are {LAYOUTS}")


def _load(path: Path) -> object:
    """A `.pt` file's tensors and plain values; anything that would need code is a `DDError` and does not run."""
    if path.stat().st_size > LARGEST:
        raise DDError(f"{path} is larger than {LARGEST >> 30} GiB, which no distilled set is")
    # The released codes save accuracies as numpy's scalars beside the images: values, not code.
    scalar = np._core.multiarray.scalar
    numbers = [np.dtype(kind) for kind in (np.float64, np.float32, np.int64)]
    plain = [scalar, (scalar, "numpy.core.multiarray.scalar"), np.dtype, *map(type, numbers)]
    try:
        with torch.serialization.safe_globals(plain):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        what = re.search(r"GLOBAL ([\w.]+)", str(error))
        raise DDError(
            f"{path} was not read: it holds more than tensors and plain values"
            f"{f' ({what[1]})' if what else ''}, which could run code"
        ) from error
    except Exception as error:  # a damaged archive: RuntimeError, EOFError, KeyError, ...
        raise DDError(f"{path} cannot be read as a .pt file ({type(error).__name__})") from error


def _frepo(path: Path) -> Found:
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
        if size > LARGEST:
            raise DDError(f"{path} would unpack to more than {LARGEST >> 30} GiB: refused")
        with np.load(path, allow_pickle=False) as arrays:
            pair = [torch.from_numpy(np.array(arrays[key])) for key in ("image", "label")]
    except DDError:
        raise
    except Exception as error:
        # A damaged archive: BadZipFile, zlib.error, NotImplementedError, ...
        raise DDError(
            f"{path} is not FRePo's .npz of plain arrays 'image' and 'label' ({type(error).__name__})"
        ) from error
    images, labels = _pair(path, pair)
    if images.ndim != 4:
        raise DDError(f"image of {path} must be [n, H, W, C], not {list(images.shape)}")
    return Found(images.permute(0, 3, 1, 2), labels, ("frepo",))


def _condensation(path: Path, experiments: object, which: int) -> Found:
    if not isinstance(experiments, list | tuple) or not experiments:
        raise DDError(f"'data' of {path} must be a list of [images, labels]")
    if not -len(experiments) <= which < len(experiments):
        raise DDError(
            f"{path} holds {len(experiments)} experiments; experiment {shown(which)} is none of them"
        )
    pair = _pair(path, experiments[which])
    named = re.match(r"res_(DC|DSA|DM)_", path.name)
    if named:
        return Found(*pair, (named[1].lower(),))
    return Found(*pair, ("dsa", "dm", "dc"))


def _matching(path: Path, images: Tensor) -> Found:
    if path.name.startswith("images_zca"):
        raise DDError(f"{path} holds pictures to look at; name the images_*.pt without zca")
    beside = {
        kind: path.with_name(path.name.replace("images", kind, 1)) for kind in ("labels", "lr")
    }
    if not beside["labels"].is_file():
        raise DDError(f"{path} needs its labels beside it, in {beside['labels'].name}")
    _, labels = _pair(path, (images, _load(beside["labels"])))
    rate = _rate(beside["lr"]) if beside["lr"].is_file() else None
    methods = MATCHING
    if labels.is_floating_point() and labels.ndim == 2:
        labels = labels.float()
        methods = ("tesla", "datm") if rate is None else ("datm", "tesla")
        probable = bool((labels >= 0).all()) and torch.allclose(
            labels.sum(1), torch.ones(len(labels)), atol=1e-3
        )
        labels = labels if probable else labels.softmax(1)
    return Found(images, labels, methods, lr=rate)


def _rate(path: Path) -> float:
    try:
        return float(_load(path))
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        if isinstance(error, DDError):
            raise
        raise DDError(f"{path} must hold one number, the learned step size") from error


def _ours(path: Path, content: dict) -> Synthetic:
    images, labels = _pair(path, (content.get("images"), content.get("labels")))
    try:
        syn = Synthetic(
            images,
            labels,
            content["dataset"],
            tuple(content["classes"]),
            content["mean"],
            content["std"],
            recipe_from(content["recipe"]),
            content["backbone"],
            content["zca"],
            spec=json.loads(content["spec"]),
        )
        syn.validate()
    except DDError as error:
        raise DDError(f"the distilled set {path} makes no sense: {error}") from None
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        # RuntimeError: a sparse tensor, or one without values, in place of a dense one
        raise DDError(f"{path} lacks a part of ddlib's .pt ({type(error).__name__})") from error
    return syn


def _pair(path: Path, pair: object) -> tuple[Tensor, Tensor]:
    """Images and labels, without the gradients that a released code may save with them."""
    whole = isinstance(pair, list | tuple) and len(pair) == 2
    if not whole or not all(isinstance(part, Tensor) and _dense(part) for part in pair):
        raise DDError(f"{path} must hold images and labels as two dense tensors")
    if any(part.numel() * 4 > LARGEST for part in pair):
        raise DDError(f"the set in {path} would fill more than {LARGEST >> 30} GiB: refused")
    images, labels = (part.detach() for part in pair)
    return images, labels


def _finite(path: Path, images: Tensor, labels: Tensor) -> None:
    for what, tensor in (("images", images), ("labels", labels)):
        if not bool(torch.isfinite(tensor).all()):
            raise DDError(f"{what} of {path} are not all finite")


def _dense(tensor: Tensor) -> bool:
    return (
        tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
    )


def _checked(path: Path, found: Found, method: str) -> tuple[Tensor, Tensor, int]:
    """Images float32 [n, C, H, W] and labels, class by class, and how many classes there are."""
    images, labels = found.images, found.labels
    if images.ndim != 4 or images.shape[1] not in (1, 3) or 0 in images.shape:
        raise DDError(f"images of {path} must be [n, 1 or 3, H, W], not {list(images.shape)}")
    if labels.ndim not in (1, 2) or len(labels) != len(images):
        raise DDError(
            f"labels of {path} must be [{len(images)}] or [{len(images)}, classes], not "
            f"{list(labels.shape)}"
        )
    images = images.float().contiguous()
    labels = labels.float().contiguous() if labels.ndim == 2 else labels.long()
    _finite(path, images, labels)
    if labels.ndim == 2:
        return images, labels, labels.shape[1]
    if int(labels.min()) < 0:
        raise DDError(f"labels of {path} must not be negative, as {int(labels.min())} is")
    if int(labels.max()) >= len(labels):
        raise DDError(
            f"the {len(labels)} images of {path} make at most as many classes, and the largest label "
            f"is {int(labels.max())}"
        )
    sizes = torch.bincount(labels)
    if sizes.unique().numel() > 1:
        raise DDError(
            f"every class of {path} must have as many images, and they have {int(sizes.min())} to "
            f"{int(sizes.max())}"
        )
    order = labels.argsort(stable=True)
    return images[order].contiguous(), labels[order], int(labels.max()) + 1


def _dataset(dataset: str | Dataset, spec, device: str) -> Dataset:
    if isinstance(dataset, str):
        return load_as(dataset, spec.values, device)
    run = spec.run
    kind = dataset.zca.kind if dataset.zca else ""
    if kind != run.zca:
        raise DDError(
            f"the paper's {spec.method} has zca {run.zca or 'none'}, {dataset.name} was loaded with "
            f"{kind or 'none'}: load it so, or name the set's own with zca=..."
        )
    return dataset


def _check_shape(path: Path, images: Tensor, classes: int, data: Dataset) -> None:
    if classes != data.num_classes or len(images) % classes:
        raise DDError(
            f"{path} holds {len(images)} images of {classes} classes, which are not the same number "
            f"for each of the {data.num_classes} classes of {data.name}"
        )
    if tuple(images.shape[1:]) != data.shape:
        raise DDError(
            f"images of {path} are {list(images.shape[1:])}, those of {data.name} {list(data.shape)}"
        )


def _recipe(path: Path, found: Found, method: str, recipe: Recipe, lr: float | None) -> Recipe:
    rate = found.lr if lr is None else lr
    if rate is None:
        if method in MATCHING:
            raise DDError(
                f"{path} does not hold the step size that {method} learned: name it with lr=... (--lr), as "
                "the run's log has it; 0.01 is what it began with and scores far lower"
            )
        return recipe
    recipe = recipe_from(asdict(recipe) | {"lr": rate})
    if recipe.lr == 0:
        raise DDError("a step size must be above 0")
    return recipe


def _factor(method: str, spec, factor: int | None, shape: tuple[int, int, int]) -> int:
    if method not in TILED:
        if factor not in (None, 1):
            raise DDError(f"factor is IDC's and DREAM's, {method} has none")
        return 1
    return check_factor(spec.config.factor if factor is None else factor, shape)


def _fitted(syn: Synthetic, dataset: str | Dataset, device: str) -> Synthetic:
    """A set of ours, once it is known to fit the dataset."""
    if isinstance(dataset, str):
        dataset = load_as(dataset, syn.spec.get("values", {}), device)
    syn.check(dataset)
    return syn.to(dataset.device)
