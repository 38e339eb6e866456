"""DREAM: representative matching (Liu et al., ICCV 2023, arXiv 2302.14416), and DREAM+ (arXiv 2310.15052).

A plug-in for methods that match real batches. The features h of the class's real images under the current network are
clustered by K-means, and the batch is one image per cluster, kept until the next clustering, `interval` steps later:

    S_c = { argmin_{x in class c} | h(x) - mu_k | : k = 1..K },    mu = K-means of { h(x) },    K = batch

The images start from K-means too, K being the images (or tiles) of a class. The methods `dream` and `dream_plus`, and
what plugs them into other hosts: `ddlib.methods.dream`.

Differences from the released code:
1. K-means runs 15 iterations from different seeds, most of them on a sketch of the features, and an empty cluster
   keeps its centre; the released one runs to convergence from seeds drawn with replacement, and an empty cluster
   becomes the zero vector (`ddlib.match.kmeans`).
2. No image is picked twice: of two clusters with the same nearest image, the second takes its next nearest.
3. `pool` may cluster a random part of each class, which saves most of the time; the default is the whole class.
4. DC, DSA and DM as hosts, and K-means initialisation and expert batches for trajectory matching, are ours: the paper
   names these hosts, but no code for them was released.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import count
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..core import DDError, choose
from ..data.dataset import Dataset
from ..nets.build import Backbone, count_flops
from .kmeans import ITERATIONS, SKETCH, WHOLE, kmeans, nearest

SAMPLINGS = ("random", "dream", "central", "boundary")
LIMIT = 2**26  # features at a time: 256 MiB, and the same groups of classes on every device


class Sampler:
    """The real batch: `sampler(net, step, rng)` gives training rows int64 [C, each].

    random: a new draw every call. The other kinds look at the features of `net` at steps that `interval` divides, and
    repeat their rows in between. dream: the `subsample` images nearest to each of each / subsample K-means centres;
    central, boundary: the images nearest to the mean feature of the class, or farthest from it (ablations of the DREAM
    paper's figure). pixels: features of pixels in [0, 1], as the released code has, though the network is trained on
    normalised ones. pool: images of a class to choose from, drawn anew; 0 is all. features: those of `net` compiled, or
    in bf16, if there are such (`embed_rows`). `rows` is what a resumed run needs.
    """

    def __init__(
        self,
        data: Dataset,
        each: int,
        kind: str = "random",
        interval: int = 10,
        subsample: int = 1,
        pixels: bool = True,
        pool: int = 0,
        features: Callable[[Tensor], Tensor] | None = None,
    ):
        choose("sampling", kind, SAMPLINGS)
        least = int(data.class_sizes().min())
        if pool:
            least = min(pool, least)
        if interval < 1:
            raise DDError(
                f"interval must be at least 1 step between two clusterings, not {interval}"
            )
        if subsample < 1 or each % subsample:
            raise DDError(
                f"subsample must divide the batch of {each} real images a class, not {subsample}"
            )
        if each > least:
            raise DDError(
                f"cannot choose {each} representatives of the {least} samples of a class; "
                f"allowed: 1 to {least}"
            )
        self.data, self.each, self.kind, self.interval = data, each, kind, interval
        self.subsample, self.pixels, self.pool = subsample, pixels, min(pool, least)
        self.features = features
        self.rows: Tensor | None = None

    def __call__(self, net: Backbone, step: int, rng: torch.Generator) -> Tensor:
        if self.kind == "random":
            return self.data.sample(self.each, rng)
        if self.rows is None or step % self.interval == 0:
            self.rows = representatives(
                net,
                self.data,
                self.each,
                rng,
                kind=self.kind,
                subsample=self.subsample,
                pixels=self.pixels,
                pool=self.pool,
                features=self.features,
            )
        return self.rows


def initial_rows(
    net: Backbone,
    data: Dataset,
    n: int,
    rng: torch.Generator,
    features: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Rows int64 [C, n] that start the synthetic set: nearest to n K-means centres of each class under `net`.

    n is IPC x factor^2: with a decoder, one row a tile.
    """
    return representatives(net, data, n, rng, features=features)


@torch.no_grad()
def representatives(
    net: Backbone,
    data: Dataset,
    each: int,
    rng: torch.Generator,
    *,
    kind: str = "dream",
    subsample: int = 1,
    pixels: bool = True,
    pool: int = 0,
    features: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Training rows int64 [C, each] by the features of `net`; see `Sampler`."""
    table, sizes = data._by_class["train"]
    if pool:
        table, sizes = data.sample(pool, rng).cpu(), torch.full_like(sizes, pool)
    chosen = []
    for part in torch.arange(len(table)).split(max(1, LIMIT // (table.shape[1] * net.feature_dim))):
        counts = sizes[part].tolist()
        rows = torch.cat([row[:count] for row, count in zip(table[part], counts, strict=True)])
        x = pad_sequence(
            embed_rows(net, data, rows, pixels, features).split(counts), batch_first=True
        )
        if kind == "dream":
            # argmin_{x in class c} | h(x) - mu_k |, mu = K-means of { h(x) }
            found = nearest(x, kmeans(x, each // subsample, rng, counts)[0], subsample, counts)
        else:
            found = by_distance(x, each, counts, far=kind == "boundary")
        chosen.append(table[part].to(data.device).gather(1, found))
    return torch.cat(chosen)


def by_distance(x: Tensor, each: int, sizes: list[int], far: bool) -> Tensor:
    """The `each` rows [C, each] of x [C, N, D] nearest to the mean of their class, or farthest from it."""
    counts = torch.tensor(sizes, device=x.device)
    # Padding is zeros: the sum is the rows'.
    distance = (x - (x.sum(1) / counts[:, None])[:, None]).norm(dim=2)
    padding = torch.arange(x.shape[1], device=x.device) >= counts[:, None]
    return (
        distance.masked_fill_(padding, -torch.inf if far else torch.inf)
        .topk(each, dim=1, largest=far)
        .indices
    )


@torch.no_grad()
def embed_rows(
    net: Backbone,
    data: Dataset,
    rows: Tensor,
    pixels: bool = True,
    features: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Features float32 [n, d] of un-augmented training images, the network in eval mode meanwhile.

    `train.loop.embed` gives those of a whole split, in pieces of another size, so with other last bits.
    `features` are the network's own, compiled or in bf16, if there are such: the same to that rounding.
    """
    training, images, count = net.training, data.images["train"], len(rows)
    net.eval()
    # A larger piece leaves a CPU's cache; a smaller one leaves a GPU idle.
    size = (64 if features else 256) if data.device.type == "cpu" else 4096
    if features:  # one shape, so that there is one graph: the first image fills the last piece
        rows = torch.cat([rows, rows[:1].expand(-count % size)])
    features = features or net.features
    dtype = next((p.dtype for p in net.parameters()), torch.float32)
    found = []
    for piece in rows.split(size):
        if pixels:
            x = images[piece.to(images.device)].to(data.device).to(dtype) / 255
        else:
            x = data.batch("train", piece)
        found.append(features(x).float())
    net.train(training)
    return torch.cat(found)[:count]


def expert_batches(
    data: Dataset, net: Backbone, batch: int, rng: torch.Generator, interval: int = 10
) -> Callable[[Tensor], Tensor]:
    """A function from an index [b] of training rows to their stand-ins [b, C, H, W], for an expert's training (ours).

    The j-th image of a class in the batch gives way to the j-th of ceil(batch / classes) representatives of that class
    under the present `net`, renewed every `interval` calls: labels and their order stay those of random batches.
    """
    each = min(-(-batch // data.num_classes), int(data.class_sizes().min()))
    sampler, calls, labels = Sampler(data, each, "dream", interval), count(), data.labels["train"]

    def fetch(index: Tensor) -> Tensor:
        y, rows = labels[index], sampler(net, next(calls), rng)
        turn = F.one_hot(y, data.num_classes).cumsum(0).gather(1, y[:, None])[:, 0] - 1
        return data.batch("train", rows[y, turn % each])

    return fetch


def work(
    config: Any, net: Backbone, shape: tuple[int, int, int], sizes: Sequence[int], ipc: int
) -> dict[str, float]:
    """FLOPs of one outer iteration of gradient matching, by part; `config` is that of `ddlib.methods.gradient`.

    Counted in forward passes F of one image: 3 for a gradient, 7 for the second-order gradient of a synthetic image, 1
    for a feature. `sizes`: training images of each class. K-means: its products, and those of the nearest images.
    """
    f, c, each = count_flops(net, shape), len(sizes), ipc * config.factor**2
    batch = min(config.batch_real, min(sizes))
    pool = [min(config.pool or size, size) for size in sizes]
    real = -(-config.net_images // config.net_batch) * config.net_batch
    trained = real if config.net_data == "real" else config.net_epochs * c * each
    d = net.feature_dim
    sketched = SKETCH if d >= 4 * SKETCH else d
    columns = (ITERATIONS - WHOLE) * sketched + (WHOLE + 1) * d
    chosen = 0 if config.sampling == "random" else -(-config.inner // config.interval) * sum(pool)
    clusters = batch // config.subsample if config.sampling == "dream" else 0
    return {
        "matching": config.inner * c * f * (3 * batch + 7 * min(each, config.batch_syn)),
        "network": 3 * f * (config.inner - 1) * trained,
        "warm epoch": 3 * f * config.warm_epochs * sum(sizes),
        "features": chosen * f,
        "k-means": 2 * chosen * clusters * columns,
    }
