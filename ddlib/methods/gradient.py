"""Gradient matching: DC (arXiv 2006.05929), DSA (2102.08259) and IDC (2205.14959); DREAM (2302.14416) plugs in.

Every outer iteration draws a fresh network theta. Each of its inner steps moves the images X so that every class's
gradient on them meets that on real images under the same augmentation A, then trains the network a little:

    L(X) = sum_c sum_layers d( grad_theta l(A(x_real^c)), grad_theta l(A(decode(X^c))) )

DC and DSA: d = sum over output rows of 1 - cosine, over all weights; the network is trained on X itself.
IDC: d = sum of squares (or absolute values) over the convolutions' weights; X holds pixels in [0, 1], cut into
`factor`^2 training images each (`ddlib.distilled.decode`); the network is trained on real images with CutMix.
DREAM: the real images are nearest to K-means centres (`sampling`, `ddlib.match.sampler`). DREAM+: each network first
sees one real epoch (`warm_epochs`), and the class means of the features are matched too (`match: both`).

One step is one outer iteration. Differences from the released codes:
1. All classes go through the network together (`class_gradients`); the released loops take one class after another.
2. IDC's loop steps one optimiser over all of X once a class, so that the momentum of the other classes decays and
   moves them meanwhile. Per class that is one update with the step size lr (1 - m^C) / (1 - m) and the momentum m^C,
   which is what `class_steps` does; the tail of the last classes' momentum is applied at once.
3. The network is not trained after an outer iteration's last image step, since it is thrown away.
4. IDC's first images are drawn at random; its code takes the first of each class.
5. A BatchNorm network takes its statistics from 16 real images a class before each step, in full; DC's code lets
   them move a tenth of the way.
6. Draws come from (seed, outer, inner), not from the clock.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import grad

from ..augment.siamese import DSAParams, augment, cutmix, draw
from ..core import DDError, generator, option
from ..data.dataset import Dataset
from ..distilled import check_factor, decode, encode
from ..match.gradients import DISTANCES, ENGINES, LAYERS, MATCHES, Matching, Traced
from ..match.sampler import SAMPLINGS, Sampler, initial_rows
from ..nets.build import initialise
from ..train.loop import compiled
from .base import BaseMethod, Result
from .registry import register


@dataclass(frozen=True)
class Config:
    """Hyperparameters of gradient matching; the defaults are IDC's for CIFAR-10 (released code)."""

    iterations: int = option(2000, least=0)  # outer iterations, each with a fresh network
    inner: int = option(100, least=1)  # image steps a network
    lr_img: float = option(5e-3, least=0)  # step size of the images
    lr_by_ipc: bool = True  # the step size is lr_img * IPC / 10
    momentum: float = option(0.5, least=0, below=1)  # of the image optimiser, plain SGD
    class_steps: bool = True  # as if that optimiser stepped once a class (difference 2)
    batch_real: int = option(
        64, least=1
    )  # real images a class and image step; all of a smaller class
    batch_syn: int = option(128, least=1)  # most decoded images a class and image step
    distance: str = option("mse", allowed=DISTANCES)
    layers: str = option(
        "conv", allowed=LAYERS
    )  # weights that are matched; biases and norms never are
    match: str = option("gradient", allowed=MATCHES)
    factor: int = option(2, least=1)  # training images an image side: factor^2 an image
    pixels: bool = True  # X holds pixels in [0, 1], clamped when an outer iteration starts; False: normalised images
    init: str = option(
        "mix", allowed=("real", "mix", "noise", "kmeans")
    )  # mix: factor^2 real images in each image
    augment: str = "color_crop_cutout_flip_scale_rotate"  # of matching, one draw a class
    augment_match: str = ""  # in place of `augment`
    augment_net: str = ""  # of the network's training, a draw an image; "" is that of matching
    net_data: str = option("real", allowed=("real", "synthetic"))  # what the network is trained on
    net_images: int = option(2000, least=0)  # real images between two image steps
    net_epochs: int = option(0, least=0)  # or passes over the synthetic set
    net_batch: int = option(64, least=1)
    net_lr: float = option(0.01, least=0)
    net_momentum: float = option(0.9, least=0, below=1)
    net_decay: float = option(5e-4, least=0)
    cutmix: float = option(
        0.5, least=0
    )  # share of mixed batches in the training of networks, also in evaluation
    warm_epochs: int = option(0, least=0)  # real epochs of each network before its first image step
    sampling: str = option(
        "random", allowed=SAMPLINGS
    )  # of the real images; all but random look at features
    interval: int = option(10, least=1)  # image steps between two choices of them
    subsample: int = option(1, least=1)  # images a cluster
    pool: int = option(
        0, least=0
    )  # images of a class to choose from, drawn anew each time; 0 is all
    engine: str = option("auto", allowed=ENGINES)
    chunk: int = option(
        0, least=0
    )  # images in one pass, whole classes; 0: of 32 px, 256 on a CPU, 2,048 on a GPU
    compile: bool = (
        False  # torch.compile matching and the network's training; same numbers to about 1e-5
    )


class Gradient(BaseMethod):
    """Gradient matching of `ipc` images a class on `data`; see the module's docstring for the equation."""

    Config, version, preset = Config, 1, "gradient"

    def __init__(self, config: Config, data: Dataset, ipc: int, backbone: str, seed: int):
        if config.pixels and data.zca:
            raise DDError(
                "whitened images have no pixels in [0, 1]: set pixels to false, or zca to ''"
            )
        super().__init__(config, data, ipc, seed)
        self.factor, self.each = check_factor(config.factor, data.shape), ipc * config.factor**2
        self.net = self.network(backbone)
        self.matching = Matching(
            self.net, config.distance, config.layers, config.match, config.engine
        )
        self.forward = self.net.forward
        if config.compile:
            self.forward, self.matching = compiled(self.forward), Traced(self.matching)
            if data.device.type == "cpu":
                self.net.to(
                    memory_format=torch.channels_last
                )  # a tenth faster, compiled; no matter otherwise
        self.batch = min(config.batch_real, int(data.class_sizes().min()))
        self.sampler = Sampler(
            data, self.batch, config.sampling, config.interval, config.subsample, pool=config.pool
        )
        self._order: tuple = (
            None,
            None,
        )  # (outer iteration, epoch) and its order of the real images
        self.raw = self._initial()
        self.velocity = torch.zeros_like(self.raw)
        m, n = config.momentum, data.num_classes if config.class_steps else 1
        self.momentum = m**n
        self.lr = (
            config.lr_img * sum(m**k for k in range(n)) * (ipc / 10 if config.lr_by_ipc else 1)
        )
        # On a CPU a larger chunk leaves the cache; on a GPU a smaller one leaves it idle.
        pixels = 2**21 if data.device.type == "cuda" else 2**18
        self.chunk = config.chunk or pixels // (data.shape[1] * data.shape[2])

    def _initial(self) -> Tensor:
        """X [C * IPC, ch, H, W]: pixels in [0, 1], or normalised images."""
        c, data = self.config, self.data
        rng = generator(self.seed, "gradient", "init")
        if c.init == "noise":
            x = torch.randn((len(self.labels), *data.shape), generator=rng).to(
                data.device, self.dtype
            )
            return (x / 4 + 0.5).clamp(0, 1) if c.pixels else x
        factor = 1 if c.init == "real" else c.factor
        if c.init == "kmeans":
            self._fresh(0)
            rows = initial_rows(self.net, data, self.ipc * factor**2, rng)
        else:
            rows = data.sample(self.ipc * factor**2, rng)
        x = encode(data.batch("train", rows), factor)
        return x * data.std.to(x) + data.mean.to(x) if c.pixels else x

    @property
    def images(self) -> Tensor:
        return self.normalise(self.raw)

    def normalise(self, x: Tensor) -> Tensor:
        return (x - self.data.mean.to(x)) / self.data.std.to(x) if self.config.pixels else x

    def decoded(self, raw: Tensor) -> Tensor:
        """The normalised images [n * factor^2, ch, H, W] that networks see of X [n, ch, H, W]."""
        grey = (0.5 - self.data.mean.to(raw)) / self.data.std.to(raw)
        return decode(self.normalise(raw), self.factor, grey)

    def result(self) -> Result:
        """The set with its decoder and, for a protocol that mixes, this run's share of CutMix."""
        return Result(self.images, self.labels, self.factor, {"cutmix": self.config.cutmix})

    def _rng(self, *purpose: object) -> torch.Generator:
        return generator(self.seed, "gradient", *purpose)

    def _fresh(self, outer: int) -> None:
        """theta of an outer iteration: drawn anew, and warmed up."""
        initialise(self.net, self._rng("network", outer))
        self.net_velocity = [torch.zeros_like(p) for p in self.net.parameters()]
        batches = -(-len(self.data.labels["train"]) // self.config.net_batch)
        for k in range(self.config.warm_epochs * batches):
            self._train_real(outer, k)

    def _train(self, outer: int, inner: int) -> None:
        """The network's steps after image step `inner`."""
        c = self.config
        if c.net_data == "synthetic":
            x, rng = self.decoded(self.raw), self._rng("train", outer, inner)
            y = self.labels.repeat(c.factor**2)
            for _ in range(c.net_epochs):
                for index in torch.randperm(len(y), generator=rng).to(y.device).split(c.net_batch):
                    self._update(x[index], y[index], rng)
            return
        count, epoch = (
            -(-c.net_images // c.net_batch),
            -(-len(self.data.labels["train"]) // c.net_batch),
        )
        for k in range(
            c.warm_epochs * epoch + inner * count, c.warm_epochs * epoch + (inner + 1) * count
        ):
            self._train_real(outer, k)

    def _train_real(self, outer: int, k: int) -> None:
        """Step k of the network on real images, which come in shuffled epochs, begun anew with every network."""
        labels, size = self.data.labels["train"], self.config.net_batch
        epoch, place = divmod(k, -(-len(labels) // size))
        if self._order[0] != (outer, epoch):
            self._order = (
                (outer, epoch),
                torch.randperm(len(labels), generator=self._rng("order", outer, epoch)),
            )
        rows = self._order[1][place * size : (place + 1) * size].to(labels.device)
        self._update(
            self.data.batch("train", rows), labels[rows], self._rng("train", outer, "real", k)
        )

    def _update(self, x: Tensor, y: Tensor, rng: torch.Generator) -> None:
        """One step of SGD of the network on augmented images x [n, ch, H, W]."""
        c = self.config
        strategy = c.augment_net or c.augment_match or c.augment
        x = augment(x, draw(strategy, len(x), self.data.shape[1:], rng, op_every=len(x)))
        if c.cutmix:
            x, y = cutmix(x, y, rng, c.cutmix, self.data.num_classes)
        weights = list(self.net.train().requires_grad_(True).parameters())
        gradients = grad(F.cross_entropy(self.forward(x), y), weights)
        self.net.requires_grad_(False)
        for w, v, g in zip(weights, self.net_velocity, gradients, strict=True):
            v.mul_(c.net_momentum).add_(g).add_(w, alpha=c.net_decay)
            w.sub_(v, alpha=c.net_lr)

    def step(self) -> dict[str, Tensor]:
        """One outer iteration; returns the matching loss divided by the number of classes, mean over inner steps."""
        c, outer, total = self.config, self.steps, 0.0
        self._fresh(outer)
        if c.pixels:
            self.raw = self.raw.clamp(0, 1)
        for inner in range(c.inner):
            total = total + self.move(outer, inner)
            if inner + 1 < c.inner:
                self._train(outer, inner)
        self.sampler.rows = None
        self.steps += 1
        return {"loss": total / (c.inner * self.data.num_classes)}

    def move(self, outer: int, inner: int) -> Tensor:
        """One image step; returns L(X) before it."""
        loss, gradient = self.gradient(outer, inner)
        self.velocity.mul_(self.momentum).add_(gradient)
        self.raw = self.raw - self.lr * self.velocity
        return loss

    def gradient(self, outer: int, inner: int) -> tuple[Tensor, Tensor]:
        """L(X) and its gradient [C * IPC, ch, H, W] for the present network and the draws of this step."""
        c, data = self.config, self.data
        if self.net.couples_samples:
            self._settle(self._rng("settle", outer, inner))
        rows = self.sampler(self.net, inner, self._rng("real", outer, inner))
        params = draw(
            c.augment_match or c.augment,
            data.num_classes,
            data.shape[1:],
            self._rng("augment", outer, inner),
        )
        keep = min(self.each, c.batch_syn)
        kept = torch.rand(data.num_classes, self.each, generator=self._rng("subset", outer, inner))
        kept = kept.topk(keep, dim=1).indices.to(data.device) if keep < self.each else None
        parts = self._parts(self.batch)
        target = [
            self._match(data.batch("train", rows[part]), params.select(part), part)
            for part in parts
        ]
        target = [torch.cat(layer) for layer in zip(*target, strict=True)]
        gradients, total = [], 0.0
        for part in self._parts(keep):
            raw = self.raw.unflatten(0, (-1, self.ipc))[part].detach().requires_grad_()
            x = self.decoded(raw.flatten(0, 1)).unflatten(0, (c.factor**2, -1, self.ipc))
            x = x.transpose(0, 1).flatten(1, 2)  # [c, each, ch, H, W]
            if kept is not None:
                x = x[self.classes[: len(x), None], kept[part]]
            loss, gradient = self._match(
                x, params.select(part), part, [layer[part] for layer in target], raw
            )
            gradients.append(gradient)
            total = total + loss
        return total, torch.cat(gradients).flatten(0, 1)

    def _parts(self, each: int) -> list[slice]:
        """The classes in equal groups that go through the network together, `each` images of every class.

        Slices, so that taking a group is a view: an index would make a GPU wait.
        """
        count, most = self.data.num_classes, max(1, self.chunk // each)
        size = max(k for k in range(1, count + 1) if count % k == 0 and k <= most)
        return [slice(k, k + size) for k in range(0, count, size)]

    def _match(
        self,
        x: Tensor,
        params: DSAParams,
        part: slice,
        target: list[Tensor] | None = None,
        raw: Tensor | None = None,
    ) -> list[Tensor]:
        """Statistics of images x [c, B, ch, H, W] of the classes `part`; with a target: L, and its gradient in `raw`."""
        x = augment(x.flatten(0, 1), params.repeat(x.shape[1])).unflatten(0, x.shape[:2])
        y = self.classes[part, None].expand(-1, x.shape[1])
        if target is None:
            return self.matching(x, y)
        loss, pull = self.matching(x.detach(), y, target)
        return [loss, *grad(x, raw, pull)]

    @torch.no_grad()
    def _settle(self, rng: torch.Generator) -> None:
        """BatchNorm: the statistics of 16 real images a class, then fixed."""
        norms = [m for m in self.net.modules() if isinstance(m, nn.BatchNorm2d)]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None
        rows = self.data.sample(min(16, int(self.data.class_sizes().min())), rng)
        self.net.train()(self.data.batch("train", rows.flatten()))
        self.net.eval()

    def state_dict(self) -> dict[str, Tensor]:
        return {"raw": self.raw, "velocity": self.velocity, "steps": torch.tensor(self.steps)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.raw, self.velocity = (state[k].to(self.raw.device) for k in ("raw", "velocity"))
        self.steps = int(state["steps"])


# What each paper changes. Numbers, and where they come from, stand in gradient.yaml.


@register("dc", paper="arXiv 2006.05929")
class DC(Gradient):
    """Zhao, Mopuri and Bilen, ICLR 2021: 1 - cosine over all weights, from noise, without augmentation; between two
    image steps the network is trained on the synthetic images."""


@register("dsa", paper="arXiv 2102.08259")
class DSA(DC):
    """Zhao and Bilen, ICML 2021: DC from real images, and one transform per class for real and synthetic ones."""


@register("idc", paper="arXiv 2205.14959")
class IDC(Gradient):
    """Kim et al., ICML 2022: squares over the convolutions, `factor`^2 training images in each image, and a network that
    is trained on real images with CutMix."""


@register("dream", paper="arXiv 2302.14416")
class DREAM(IDC):
    """Liu et al., ICCV 2023: IDC that begins from, and matches, the images nearest to K-means centres."""


@register("dream_plus", paper="arXiv 2310.15052")
class DREAMPlus(DREAM):
    """Liu et al., 2023: DREAM with one real epoch for each network, and the class means of features matched too."""
