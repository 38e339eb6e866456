"""Coresets: real training images chosen class by class, the baseline that every distilled set stands beside.

Random, herding (Welling, ICML 2009), k-center greedy (Sener and Savarese, ICLR 2018), k-means on embeddings (the
"Kmeans-emb" row of DC-BENCH, Cui et al., NeurIPS 2022, arXiv 2207.09639) and forgetting (Toneva et al., ICLR 2019).

Differences from what the distillation papers report:
1. They do not say how their extractor was trained; ours is in `Coreset.extractor_record`.
2. Their classical columns were scored without augmentation (the "dc" protocol). Score coresets under the protocol
   of the set that they are compared with: random gains 2 to 6 points on CIFAR-10 from the "dsa" protocol alone.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from functools import cached_property, partial

import torch

from ..core import DDError, generator, option
from ..data.dataset import Dataset
from ..nets.build import build
from ..train.loop import Recipe, accuracy, embed, train_on

KINDS = ("random", "herding", "kcenter", "kmeans")


@dataclass(frozen=True)
class CoresetConfig:
    """How a coreset is chosen; the extractor's fields have no effect on `random`."""

    kind: str = option("random", allowed=KINDS)  # the rule of selection
    iterations: int = option(0, allowed=(0,))  # a coreset is chosen, not optimised
    extractor_epochs: int = option(
        20, least=1
    )  # passes over the whole training set that train the extractor
    extractor_lr: float = option(
        0.01, least=0
    )  # its SGD step size; momentum 0.9, weight decay 5e-4 as in evaluation
    restarts: int = option(
        10, least=1
    )  # k-means runs from new seeds; the one with the least inertia is kept


def herding(features: torch.Tensor, n: int) -> torch.Tensor:
    """Rows int64 [n] of one class's features [M, d], in the order in which herding picks them.

    Step i picks, among the rows left, the one nearest to (i + 1) mu - sum(picked), mu being the class mean.
    """
    x = _points(features, n)
    mean, square = x.mean(0), (x * x).sum(1)
    residual, picked = torch.zeros_like(mean), []
    for _ in range(n):
        residual += mean
        row = (square - 2 * (x @ residual)).argmin(
            keepdim=True
        )  # |x - r|^2 less the constant |r|^2
        residual -= x[row][0]
        square.index_fill_(0, row, torch.inf)
        picked.append(row)
    return torch.cat(picked)


def kcenter(features: torch.Tensor, n: int) -> torch.Tensor:
    """Rows int64 [n] of one class's features [M, d]: the row nearest to the class mean, then farthest-point greedy.

    Each further row is the one whose nearest centre is farthest away (a 2-approximation of the k-center problem). It
    seeks outliers, which is why it is weak at few images per class.
    """
    x = _points(features, n)
    square = (x * x).sum(1)
    row = (square - 2 * (x @ x.mean(0))).argmin(keepdim=True)
    picked, nearest = [row], torch.full_like(square, torch.inf)
    for _ in range(n - 1):
        nearest = torch.minimum(nearest, square + square[row] - 2 * (x @ x[row][0]))
        nearest.index_fill_(
            0, row, -torch.inf
        )  # never again, even where every other row is a duplicate
        row = nearest.argmax(keepdim=True)
        picked.append(row)
    return torch.cat(picked)


def kmeans(features: torch.Tensor, n: int, seed: int, restarts: int = 10) -> torch.Tensor:
    """Rows int64 [n] of one class's features [M, d]: a real sample, each a different one, near every k-means centre.

    k-means++ with `restarts` restarts. Each centre in turn takes the nearest sample that no earlier centre took.
    """
    from sklearn.cluster import KMeans  # loaded here: it would double the time of `import ddlib`

    x = _points(features, n).cpu()
    fit = KMeans(n, init="k-means++", n_init=restarts, random_state=seed % 2**32).fit(x.numpy())
    distance, picked = torch.cdist(torch.from_numpy(fit.cluster_centers_), x), []
    for to_centre in distance:
        picked.append(to_centre.argmin(keepdim=True))
        distance[:, picked[-1]] = torch.inf
    return torch.cat(picked).to(features.device)


def forgetting(events: torch.Tensor, n: int, rng: torch.Generator) -> torch.Tensor:
    """Rows int64 [n] of one class with the most forgetting events [M], most first, ties in random order.

    An event is a step from right to wrong between two visits of a sample in training. A sample that was never
    learned has no events here, as in DeepCore (Guo et al., 2022); Toneva et al. count it as always forgotten.
    """
    if events.ndim != 1:
        raise DDError(f"forgetting events must have one axis [M], not shape {tuple(events.shape)}")
    _check_n(n, len(events))
    shuffled = torch.randperm(len(events), generator=rng).to(events.device)
    return shuffled[events[shuffled].argsort(descending=True, stable=True)[:n]]


def _points(features: torch.Tensor, n: int) -> torch.Tensor:
    """Checked features as float64: the sums of squares would cost float32 the digits that tell neighbours apart."""
    if features.ndim != 2 or not features.is_floating_point():
        raise DDError(
            f"features must be floats [samples, d], not {features.dtype} {tuple(features.shape)}"
        )
    _check_n(n, len(features))
    if not torch.isfinite(features).all():
        raise DDError("features hold NaN or infinity: lower extractor_lr")
    return features.detach().double()


def _check_n(n: int, available: int) -> None:
    if not 1 <= n <= available:
        raise DDError(
            f"cannot choose {n} of {available} samples of a class; allowed: 1 to {available}"
        )


def extract_features(
    data: Dataset, backbone: str, config: CoresetConfig, seed: int
) -> tuple[torch.Tensor, dict]:
    """Features [N, d] of the training images from a network trained on all of them, and how it was trained."""
    # No augmentation: the one choice that suits digits and photographs alike (a flipped digit is another sign).
    recipe = Recipe(
        "extractor",
        epochs=config.extractor_epochs,
        lr=config.extractor_lr,
        drops=(),
        augment="none",
    )
    start = time.perf_counter()
    net = build(backbone, data.shape, data.num_classes, generator(seed, "coreset", "weights")).to(
        data.device
    )
    train_on(data, net, recipe, seed)
    record = {
        key: value for key, value in asdict(recipe).items() if key not in ("name", "drops", "drop")
    }
    record |= {"backbone": net.spec, "train_accuracy": accuracy(net, data, "train")}
    return embed(net, data), record | {"seconds": time.perf_counter() - start}


class Coreset:
    """A coreset as a method, chosen when its images are first asked for; see the module's docstring.

    `seed` enters through the draw (random), the extractor and the k-means restarts. `extractor_record` says how the
    extractor was trained and is empty where none was.
    """

    Config, version, preset = CoresetConfig, 1, "coreset"

    def __init__(
        self, config: CoresetConfig, data: Dataset, ipc: int, backbone: str, seed: int
    ) -> None:
        self.config, self.data, self.ipc, self.backbone, self.seed = (
            config,
            data,
            ipc,
            backbone,
            seed,
        )
        self.extractor_record: dict = {}

    @cached_property
    def index(self) -> torch.Tensor:
        """Indices int64 [C * ipc] into the training images, class by class."""
        if self.config.kind == "random":
            return self.data.sample(self.ipc, generator(self.seed, "coreset", "random")).flatten()
        features, self.extractor_record = extract_features(
            self.data, self.backbone, self.config, self.seed
        )
        pick = {
            "herding": herding,
            "kcenter": kcenter,
            "kmeans": partial(kmeans, seed=self.seed, restarts=self.config.restarts),
        }[self.config.kind]
        order = self.data.labels["train"].argsort(stable=True)
        table = order.split(self.data.class_sizes("train").tolist())  # class -> its indices
        return torch.cat([rows[pick(features[rows], self.ipc)] for rows in table])

    @property
    def images(self) -> torch.Tensor:
        """The chosen images, normalised, float32 [C * ipc, C, H, W]."""
        return self.data.batch("train", self.index)

    @property
    def labels(self) -> torch.Tensor:
        return self.data.labels["train"][self.index]

    @property
    def record(self) -> dict:
        return {"extractor": self.extractor_record} if self.extractor_record else {}

    def step(self) -> dict[str, float]:
        """Nothing to optimise, hence nothing to report."""
        return {}

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"index": self.index}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.index = state["index"].to(self.data.device)
