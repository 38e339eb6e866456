"""Coresets: real training images chosen class by class, the baseline that every distilled set stands beside.

Random, herding (Welling, ICML 2009), k-center greedy (Sener and Savarese, ICLR 2018), k-means on embeddings (the
"Kmeans-emb" row of DC-BENCH, Cui et al., NeurIPS 2022, arXiv 2207.09639) and forgetting (Toneva et al., ICLR 2019).

Differences from what the distillation papers report:
1. They do not say how their extractor was trained; ours is in the record's `extra`. Forgetting events are counted
   while it trains, in as many epochs; DeepCore (Guo et al., 2022) trains 200.
2. Their classical columns were scored without augmentation (the "dc" protocol), on MNIST apparently with some. Score
   coresets under the protocol of the set that they are compared with: random gains from the "dsa" protocol alone.

Accuracy, seconds, hardware and number of runs, as `python -m ddlib docs` renews them from the
records: docs/methods/coresets.md.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch

from ..core import DDError, generator, option
from ..data.dataset import Dataset
from ..experts import experts_folder
from ..files import load_tensors, lock, save_tensors
from ..nets.build import Backbone, build
from ..recipe import PRECISIONS, Recipe
from ..train.loop import accuracy, compiled, embed, lowered, train
from .base import BaseMethod
from .registry import register

KINDS = ("random", "herding", "kcenter", "kmeans", "forgetting")


@dataclass(frozen=True)
class CoresetConfig:
    """How a coreset is chosen; the extractor's fields have no effect on `random`."""

    kind: str = option("random", allowed=KINDS)  # the rule of selection
    iterations: int = option(0, allowed=(0,))  # a coreset is chosen, not optimised
    # Passes over the whole training set that train the extractor
    extractor_epochs: int = option(20, least=1)
    # Its SGD step size; momentum 0.9 and weight decay 5e-4 as in evaluation
    extractor_lr: float = option(0.01, least=0)
    # k-means runs from new seeds; the one with the least inertia is kept
    restarts: int = option(10, least=1)
    compile: bool = False  # torch.compile the extractor's training; same numbers to about 1e-5
    # Of the extractor's training; its features are float32 in any case
    extractor_precision: str = option("float32", allowed=PRECISIONS)


def herding(features: torch.Tensor, n: int) -> torch.Tensor:
    """Rows int64 [n] of one class's features [M, d], in the order in which herding picks them.

    Step i picks, among the rows left, the one nearest to (i + 1) mu - sum(picked), mu being the class mean.
    """
    x = _points(features, n)
    mean, square = x.mean(0), (x * x).sum(1)
    residual, picked = torch.zeros_like(mean), []
    for _ in range(n):
        residual += mean
        # |x - r|^2 less the constant |r|^2.
        row = (square - 2 * (x @ residual)).argmin(keepdim=True)
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
        # Never again, even where every other row is a duplicate.
        nearest.index_fill_(0, row, -torch.inf)
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


@dataclass(frozen=True)
class Extractor:
    """A network trained on the whole training set, for every rule but `random`.

    events: forgetting events int64 [N], how often each training image went from right to wrong between two epochs.
    record: how it was trained and what it scores; stands in the record of every run that used it.
    """

    net: Backbone
    events: torch.Tensor
    record: dict


def extractor(data: Dataset, backbone: str, config: CoresetConfig, seed: int) -> Extractor:
    """The trained extractor, kept among the experts: all rules and IPCs of one seed share it.

    Without augmentation: the one choice that suits digits and photographs alike (a flipped digit is another sign).
    """
    recipe = Recipe(
        "extractor",
        epochs=config.extractor_epochs,
        lr=config.extractor_lr,
        drops=(),
        augment="none",
    )
    net = build(backbone, data.shape, data.num_classes, generator(seed, "coreset", "weights"))
    net = net.to(data.device, data.batch("train", slice(0, 1)).dtype)
    how = {k: v for k, v in asdict(recipe).items() if k not in ("name", "drops", "drop", "tests")}
    facts = how | {"backbone": net.spec, "seed": seed, "data": data.checksum}
    facts |= {"zca": data.zca.id if data.zca else None, "compile": config.compile}
    if config.extractor_precision != "float32":
        how |= {"precision": config.extractor_precision}
        facts |= how
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    path = experts_folder() / "whole" / f"{digest}.safetensors"
    with lock(path, "the extractor of this dataset"):
        if path.is_file():
            tensors, header = load_tensors(path, "extractor", "delete it and run again")
            events = tensors.pop("events").to(data.device)
            net.load_state_dict(tensors)
            return Extractor(net, events, header["record"])
        start = time.perf_counter()
        forward = lowered(net.forward, data.device, config.extractor_precision)
        forward = compiled(forward) if config.compile else forward
        events = train_and_count(data, net, recipe, seed, forward)
        record = how | {"backbone": net.spec, "train_accuracy": accuracy(net, data, "train")}
        if len(data.labels["test"]):
            record["test_accuracy"] = accuracy(net, data, "test")
        record |= {"seconds": time.perf_counter() - start, "threads": torch.get_num_threads()}
        tensors = net.state_dict() | {"events": events}
        save_tensors(path, tensors, {"record": record, "facts": facts})
    return Extractor(net, events, record)


def train_and_count(
    data: Dataset, net: Backbone, recipe: Recipe, seed: int, forward: Callable
) -> torch.Tensor:
    """Train `net` on the whole training set; its forgetting events int64 [N], counted on the batches as they come."""
    labels = data.labels["train"]
    events, right = torch.zeros_like(labels), torch.zeros_like(labels, dtype=torch.bool)
    batch: list[torch.Tensor] = []

    def fetch(index: torch.Tensor) -> torch.Tensor:
        batch[:] = [index]
        return data.batch("train", index)

    def watched(x: torch.Tensor) -> torch.Tensor:
        logits, (index,) = forward(x), batch
        now = logits.detach().argmax(1) == labels[index]
        events[index] += right[index] & ~now
        right[index] = now
        return logits

    train(net, fetch, labels, recipe, generator(seed, "train", net.spec), forward=watched)
    return events


@register("random")
@register("herding", paper="Welling, ICML 2009")
@register("kcenter", paper="Sener and Savarese, ICLR 2018")
@register("kmeans", paper="arXiv 2207.09639")
@register("forgetting", paper="Toneva et al., ICLR 2019")
class Coreset(BaseMethod):
    """A coreset as a method, chosen when it is made; see the module's docstring.

    `index` int64 [C * ipc] are the chosen training images, class by class; `extractor` is None for `random`. `seed`
    enters through the draw (random), the extractor, the k-means restarts and the order of ties (forgetting).

    `random` attains 67.0 ± 5.6 % on MNIST at IPC 1 (profile `paper`, n=175; 276 s, AMD EPYC, 1 thread, Intel Xeon, 1
    thread).
    `herding` attains 19.7 ± 0.3 % on CIFAR-10 (JPEG) at IPC 1 (profile `paper`, n=5; 63 s, AMD EPYC, 1 thread).
    `kcenter` attains 19.7 ± 0.3 % on CIFAR-10 (JPEG) at IPC 1 (profile `paper`, n=5; 172 s, AMD EPYC, 1 thread).
    `kmeans` attains nothing yet beside a printed figure.
    `forgetting` attains 15.1 ± 0.5 % on CIFAR-10 (JPEG) at IPC 1 (profile `paper`, n=5; 110 s, AMD EPYC, 1 thread).
    """

    Config, version, preset = CoresetConfig, 1, "coreset"

    def __init__(
        self, config: CoresetConfig, data: Dataset, ipc: int, backbone: str, seed: int
    ) -> None:
        super().__init__(config, data, ipc, seed)
        if config.kind == "random":
            self.extractor = None
            self.index = data.sample(ipc, generator(seed, "coreset", "random")).flatten()
        else:
            self.extractor = extractor(data, backbone, config, seed)
            self.index = self._choose(self.extractor)

    def _choose(self, trained: Extractor) -> torch.Tensor:
        order = self.data.labels["train"].argsort(stable=True)
        table = order.split(self.data.class_sizes("train").tolist())  # class -> its indices
        if self.config.kind == "forgetting":
            chosen = self._most_forgotten(trained.events, table)
        else:
            chosen = self._by_features(embed(trained.net, self.data), table)
        return torch.cat([rows[picked] for rows, picked in zip(table, chosen, strict=True)])

    def _most_forgotten(
        self, events: torch.Tensor, table: Sequence[torch.Tensor]
    ) -> list[torch.Tensor]:
        rng = generator(self.seed, "coreset", "ties")
        return [forgetting(events[rows], self.ipc, rng) for rows in table]

    def _by_features(
        self, features: torch.Tensor, table: Sequence[torch.Tensor]
    ) -> list[torch.Tensor]:
        if self.config.kind == "kmeans":
            restarts = self.config.restarts
            return [kmeans(features[rows], self.ipc, self.seed, restarts) for rows in table]
        rule = herding if self.config.kind == "herding" else kcenter
        return [rule(features[rows], self.ipc) for rows in table]

    @property
    def images(self) -> torch.Tensor:
        """The chosen images, normalised, float32 [C * ipc, C, H, W]."""
        return self.data.batch("train", self.index)

    def summary(self) -> dict:
        return {"extractor": self.extractor.record} if self.extractor else {}

    def step(self) -> dict[str, float]:
        """Nothing to optimise, hence nothing to report."""
        return {}

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"index": self.index}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.index = state["index"].to(self.data.device)
