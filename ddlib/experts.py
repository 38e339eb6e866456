"""Expert trajectories: the weights of networks trained on the real data, epoch by epoch, plain or flat.

Plain (MTT arXiv 2203.11932, TESLA 2211.10586): SGD at a constant step size without momentum or weight decay, DSA on.
Flat (FTD 2211.11004): `sam` is the paper's eqs. 10-13, `agsam` the adaptive GSAM that its released code runs instead.
With g = grad L(theta), g' = grad L(theta + eps) on the same augmented batch:

    sam    eps = rho g / ||g||,                            direction (1 - alpha) g + alpha g'
    agsam  eps = rho theta^2 * g / || |theta| * g ||,      direction g' - alpha (g - proj_{g'} g)

One safetensors file an expert: `weights` float32 [epochs + 1, P] (the first row is the initialisation) and a header
with recipe, dataset, its checksum, ZCA id, backbone, seed and number of threads. A file of another recipe is refused,
never mixed in.

Experts are trained one after another. Four at once (vmap, so grouped convolutions) took 2.9 times the processor time
at width 32 and 32 pixels, 1.4 times at width 128, and the same on 8 pixels.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from .core import DDError, generator
from .data.dataset import Dataset
from .files import Busy, load_tensors, lock, read_json, results_folder, save_tensors, write_json
from .match.sampler import expert_batches
from .match.trajectory import FlatNet
from .nets.build import Backbone, build, initialise
from .recipe import Recipe
from .train.loop import accuracy, compiled, train


class ExpertsError(DDError):
    """The experts that a run needs are missing or unfit; whoever knows the run adds the command that makes them."""


@dataclass(frozen=True)
class ExpertRecipe:
    """How every expert of a set was trained; the defaults are MTT's and TESLA's released ones."""

    # The weights after each are kept, so train only what the start epochs can reach
    epochs: int = 50
    lr: float = 0.01
    batch: int = 256
    augment: str = "color_crop_cutout_flip_scale_rotate"
    flat: str = "plain"  # plain, sam or agsam
    rho: float = 0.01  # radius of the flatness step
    alpha: float = 1.0  # weight of the flatness term; 1 makes `sam` SAM
    sampling: str = "random"  # or dream: each image of a batch gives way to a representative of its class (ours)

    @property
    def facts(self) -> dict:
        """What names a set of experts: random sampling, the only one there once was, is left out."""
        return {
            key: value
            for key, value in asdict(self).items()
            if (key, value) != ("sampling", "random")
        }


@dataclass(frozen=True)
class Experts:
    """A set of expert trajectories: weights [E, epochs + 1, P] on the CPU."""

    weights: list[torch.Tensor]
    seconds: float = math.nan  # that training them took; NaN where one was not timed

    def __len__(self) -> int:
        return len(self.weights)


@dataclass(frozen=True)
class ExpertSet:
    """The first `count` experts of a recipe, as a method needs them."""

    recipe: ExpertRecipe
    count: int

    def make(self, data: Dataset, backbone: str, **options: Any) -> list[Path]:
        """Train those that are not there yet; their files. `options` are those of `train_experts`."""
        return train_experts(data, backbone, self.recipe, self.count, **options)

    def paths(self, data: Dataset, backbone: str) -> list[Path]:
        """Where their files are, or will be."""
        return expert_paths(folder(data, backbone, self.recipe), self.count)


def experts_folder() -> Path:
    """Where networks trained on whole datasets live: DDLIB_EXPERTS, else `experts/` among the results."""
    return Path(os.environ.get("DDLIB_EXPERTS") or results_folder() / "experts")


def folder(data: Dataset, backbone: str, recipe: ExpertRecipe) -> Path:
    """Where the experts of one dataset, network and recipe live, below `experts_folder`."""
    facts = [data.name, data.checksum, data.zca.id if data.zca else None, backbone, recipe.facts]
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:10]
    name = f"{data.name}-{backbone}-{recipe.flat}-{digest}"
    return experts_folder() / "".join(c if c.isalnum() or c in "-_" else "_" for c in name)


def expert_paths(place: Path, count: int) -> list[Path]:
    return [place / f"expert-{seed:03d}.safetensors" for seed in range(count)]


def _header(data: Dataset, net: Backbone, recipe: ExpertRecipe) -> dict:
    return {
        "dataset": data.name,
        "dataset_checksum": data.checksum,
        "zca": data.zca.id if data.zca else None,
        "backbone": net.spec,
        "recipe": recipe.facts,
    }


def flatten_gradient(
    parameters: list[torch.Tensor], closure: Callable[[], torch.Tensor], recipe: ExpertRecipe
) -> None:
    """Replace every parameter's `.grad` g by the flat direction; `closure` gives the batch's loss anew."""
    g = [p.grad.clone() for p in parameters]
    weighted = (
        g
        if recipe.flat == "sam"
        else [p.detach().abs() * a for p, a in zip(parameters, g, strict=True)]
    )
    scale = recipe.rho / (torch.cat([w.flatten() for w in weighted]).norm() + 1e-12)
    eps = [
        w * scale if recipe.flat == "sam" else p.detach().abs() * w * scale
        for p, w in zip(parameters, weighted, strict=True)
    ]
    with torch.no_grad():
        for p, e in zip(parameters, eps, strict=True):
            p.add_(e)
            p.grad = None
    closure().backward()
    with torch.no_grad():
        for p, e in zip(parameters, eps, strict=True):
            p.sub_(e)
        if recipe.flat == "sam":
            for p, a in zip(parameters, g, strict=True):
                p.grad.mul_(recipe.alpha).add_(a, alpha=1 - recipe.alpha)
            return
        inner = sum((a * p.grad).sum() for p, a in zip(parameters, g, strict=True))
        share = inner / (sum(p.grad.square().sum() for p in parameters) + 1e-24)
        for p, a in zip(parameters, g, strict=True):
            p.grad.sub_(a - share * p.grad, alpha=recipe.alpha)


def train_experts(
    data: Dataset,
    backbone: str,
    recipe: ExpertRecipe,
    count: int,
    *,
    compile: bool = False,
    progress: bool = True,
    only: int | None = None,
) -> list[Path]:
    """Train experts 0..count-1, or number `only` alone, that are not there yet and return their files.

    A stopped call goes on where it was. Expert k depends on the recipe and k alone, so several processes or machines
    that see one folder share the work: each takes those that no other is at work on.
    """
    if count < 1 or recipe.epochs < 1:
        raise DDError(
            f"experts and their epochs must be at least 1, not {count} and {recipe.epochs}"
        )
    place = folder(data, backbone, recipe)
    net = build(backbone, data.shape, data.num_classes).to(data.device)
    flat, forward = FlatNet(net), compiled(net.forward) if compile else net
    sgd = Recipe(
        "expert", recipe.epochs, recipe.lr, 0.0, 0.0, recipe.batch, (), augment=recipe.augment
    )
    adjust = (
        None
        if recipe.flat == "plain"
        else lambda closure: flatten_gradient(list(net.parameters()), closure, recipe)
    )
    paths = list(enumerate(expert_paths(place, count)))
    paths = paths if only is None else [paths[only]]

    def make(seed: int, path: Path) -> None:
        start = time.perf_counter()
        initialise(net, generator(seed, "expert", "weights"))
        weights = [flat.vector()]

        def keep(epoch: int, weights: list = weights) -> None:
            weights.append(flat.vector())

        fetch = partial(data.batch, "train")
        if recipe.sampling == "dream":
            fetch = expert_batches(
                data, net, recipe.batch, generator(seed, "expert", "representatives")
            )
        train(
            net,
            fetch,
            data.labels["train"],
            sgd,
            generator(seed, "expert"),
            forward=forward,
            after_epoch=keep,
            adjust=adjust,
        )
        score = accuracy(net, data) if len(data.labels["test"]) else None
        save_tensors(
            path,
            {"weights": torch.stack(weights)},
            _header(data, net, recipe)
            | {"seed": seed, "test_accuracy": score, "threads": torch.get_num_threads()},
        )
        # Beside it: its bytes stay the same.
        write_json(path.with_suffix(".json"), {"seconds": round(time.perf_counter() - start, 3)})

    for wait in (False, True):  # those that another process is at work on come last
        missing = [row for row in paths if not row[1].is_file()]
        show = progress and missing
        for seed, path in tqdm(missing, f"experts, {data.name}", disable=not show, leave=False):
            with suppress(Busy), lock(path, f"{path.stem} of {place.name}", wait):
                if not path.is_file():
                    make(seed, path)
    return [path for _, path in paths]


def load_experts(data: Dataset, backbone: str, recipe: ExpertRecipe, count: int) -> Experts:
    """The first `count` experts made for this dataset, network and recipe.

    Raises `ExpertsError` where one is missing, is damaged, stands still, or was made from other data, another ZCA,
    network or recipe.
    """
    net = build(backbone, data.shape, data.num_classes)
    wanted, place = _header(data, net, recipe), folder(data, backbone, recipe)
    size = FlatNet(net).size
    weights, seconds = [], 0.0
    for seed in range(count):
        path = place / f"expert-{seed:03d}.safetensors"
        if not path.is_file():
            raise ExpertsError(
                f"no expert {seed} of the {count} that this run needs at {path}; make the experts first"
            )
        try:
            tensors, header = load_tensors(path, f"expert {seed}", "delete it and make it anew")
        except DDError as error:
            raise ExpertsError(str(error)) from None
        for key, value in wanted.items():
            if header.get(key) != value:
                raise ExpertsError(
                    f"the expert {path.name} was made with {key} {header.get(key)!r}, this run has "
                    f"{value!r}; delete {path} and make it anew"
                )
        rows, shape = tensors.get("weights", torch.empty(0)), [recipe.epochs + 1, size]
        if list(rows.shape) != shape or not rows.is_floating_point():
            raise ExpertsError(
                f"the expert {path} does not hold weights {shape}; delete it and make it anew"
            )
        if not (rows[1:] != rows[:-1]).any(1).all() or not torch.isfinite(rows).all():
            raise ExpertsError(
                f"two epochs of the expert {path} hold the same weights, or weights that are not "
                "finite; delete it and make it anew"
            )
        weights.append(rows)
        seconds += _timing(path)
    return Experts(weights, seconds)


def _timing(path: Path) -> float:
    """Seconds that training the expert at `path` took; NaN where they were lost, which stops no run."""
    try:
        return float(read_json(path.with_suffix(".json"), "timing", "")["seconds"])
    except (DDError, KeyError, TypeError, ValueError):
        return math.nan


def sharpness(
    net: FlatNet, theta: torch.Tensor, data: Dataset, *, images: int = 1024, seed: int = 0
) -> float:
    """Top eigenvalue of the training loss's Hessian at `theta` [P] on a fixed sample of images.

    The largest one, not the largest magnitude: at initialisation that is, as often as not, a negative eigenvalue.
    """
    from scipy.sparse.linalg import LinearOperator, eigsh  # loaded here: it takes a second

    rows = torch.randperm(len(data.labels["train"]), generator=generator(seed, "sharpness"))
    rows = rows[:images].to(data.device)
    x, y = data.batch("train", rows), data.labels["train"][rows]
    theta = theta.to(data.device).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(net(theta, x), y), theta, create_graph=True)

    def product(vector: np.ndarray) -> np.ndarray:
        # H v = d (g v) / d theta
        along = gradient @ torch.from_numpy(vector.ravel()).to(theta)
        return torch.autograd.grad(along, theta, retain_graph=True)[0].cpu().numpy()

    start = torch.randn(net.size, generator=generator(seed, "sharpness", "start")).numpy()
    hessian = LinearOperator((net.size, net.size), matvec=product, dtype=start.dtype)
    top = eigsh(hessian, 1, which="LA", v0=start, tol=1e-3, return_eigenvectors=False)
    return float(top[0])
