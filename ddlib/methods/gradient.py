"""Gradient matching: DC (arXiv 2006.05929), DSA (2102.08259) and IDC (2205.14959); DREAM (`.dream`) plugs in.

Every outer iteration draws a fresh network theta. Each of its inner steps moves the images X so that every class's
gradient on them meets that on real images under the same augmentation A, then trains the network a little:

    L(X) = sum_c sum_layers d( grad_theta l(A(x_real^c)), grad_theta l(A(decode(X^c))) )

DC and DSA: d = sum over output rows of 1 - cosine, over all weights; the network is trained on X itself.
IDC: d = sum of squares (or absolute values) over the convolutions' weights; X holds pixels in [0, 1], cut into
`factor`^2 training images each (`ddlib.distilled.decode`); the network is trained on real images with CutMix.

One step is one outer iteration. Differences from the released codes:
1. All classes go through the network together (`class_gradients`); the released loops take one class after another.
2. IDC's loop steps one optimiser over all of X once a class, so that the momentum of the other classes decays and
   moves them meanwhile. Per class that is one update with the step size lr (1 - m^C) / (1 - m) and the momentum m^C,
   `IDC.image_rates`; the tail of the last classes' momentum is applied at once.
3. The network is not trained after an outer iteration's last image step, since it is thrown away.
4. IDC's first images are drawn at random; its code takes the first of each class.
5. A BatchNorm network takes its statistics from 16 real images per class before each step, in full; DC's code lets
   them move a tenth of the way.
6. Draws come from (seed, outer, inner), not from the clock; IDC's real batches are drawn anew each step, where its
   sampler goes through a class in shuffled order.
7. CIFAR-100 is normalised by its own mean and std, where IDC's and DREAM's codes take CIFAR-10's.

Accuracy, seconds, hardware and number of runs, as `python -m ddlib docs` renews them from the
records: docs/methods/dc.md, docs/methods/dsa.md and docs/methods/idc.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import grad

from ..augment.siamese import DSAParams, augment, cutmix, draw
from ..core import DDError, option, upload
from ..data.dataset import Dataset
from ..distilled import check_factor, decode, encode
from ..match.gradients import DISTANCES, ENGINES, LAYERS, MATCHES, Matching, Traced
from ..match.sampler import SAMPLINGS, initial_rows
from ..nets.build import initialise
from ..recipe import PRECISIONS
from ..train.loop import compiled
from .base import BaseMethod, Result, features_of, sampler_of
from .registry import register


@dataclass(frozen=True)
class Config:
    """Hyperparameters of gradient matching; the defaults are IDC's for CIFAR-10 (released code)."""

    iterations: int = option(2000, least=0)  # outer iterations, each with a fresh network
    inner: int = option(100, least=1)  # image steps per network
    lr_img: float = option(5e-3, least=0)  # step size of the images
    lr_by_ipc: bool = True  # the step size is lr_img * IPC / 10
    momentum: float = option(0.5, least=0, below=1)  # of the image optimiser, plain SGD
    class_steps: bool = True  # a step of that optimiser for each class (difference 2)
    # Real images per class and image step; all of a smaller class
    batch_real: int = option(64, least=1)
    batch_syn: int = option(128, least=1)  # most decoded images per class and image step
    distance: str = option("mse", allowed=DISTANCES)
    # Weights that are matched; biases and norms never are
    layers: str = option("conv", allowed=LAYERS)
    match: str = option("gradient", allowed=MATCHES)
    factor: int = option(2, least=1)  # training images per image side: factor^2 per image
    pixels: bool = True  # X holds pixels in [0, 1], clamped when an outer iteration starts; False: normalised images
    # mix: factor^2 real images in each image
    init: str = option("mix", allowed=("real", "mix", "noise", "kmeans"))
    augment: str = "color_crop_cutout_flip_scale_rotate"  # of matching, one draw per class
    augment_match: str = ""  # in place of `augment`
    augment_net: str = ""  # of the network's training, a draw per image; "" is that of matching
    net_data: str = option("real", allowed=("real", "synthetic"))  # what the network is trained on
    net_images: int = option(2000, least=0)  # real images between two image steps
    net_epochs: int = option(0, least=0)  # or passes over the synthetic set
    net_batch: int = option(64, least=1)
    net_lr: float = option(0.01, least=0)
    net_momentum: float = option(0.9, least=0, below=1)
    net_decay: float = option(5e-4, least=0)
    # Share of mixed batches in the training of networks, also in evaluation
    cutmix: float = option(0.5, least=0)
    warm_epochs: int = option(0, least=0)  # real epochs of each network before its first image step
    # Of the real images; all but random look at features
    sampling: str = option("random", allowed=SAMPLINGS)
    interval: int = option(10, least=1)  # image steps between two choices of them
    subsample: int = option(1, least=1)  # images per cluster
    # Images of a class to choose from, drawn anew each time; 0 is all
    pool: int = option(0, least=0)
    # Of the features that they are chosen by; no paper has bf16, so such a run is a changed method
    sampling_precision: str = option("float32", allowed=PRECISIONS)
    engine: str = option("auto", allowed=ENGINES)
    # Images in one pass, whole classes; 0: of 32 px, 256 on a CPU, 2,048 on a GPU
    chunk: int = option(0, least=0)
    # torch.compile: matching and the network's training; same numbers to about 1e-5
    compile: bool = False


class Gradient(BaseMethod):
    """The loop that all share; a paper's class says how its network is trained, how X is stored, seen and moved.

    Attributes: `raw` [C * IPC, ch, H, W], the images X as SGD moves them; `net`, the network theta of this outer
    iteration; `velocity`, that of X; `sampler`, rows of real images, random or DREAM's; `matching`, the distance d.
    """

    Config, version, preset, stream = Config, 1, "gradient", "gradient"

    def __init__(self, config: Config, data: Dataset, ipc: int, backbone: str, seed: int):
        super().__init__(config, data, ipc, seed)
        self.factor, self.each = check_factor(config.factor, data.shape), ipc * config.factor**2
        self.net = self.network(backbone)
        self.matching = Matching(
            self.net, config.distance, config.layers, config.match, config.engine
        )
        self.forward, self.features = self.net.forward, features_of(config, self.net, data.device)
        if config.compile:
            self.forward, self.matching = compiled(self.forward), Traced(self.matching)
            if data.device.type == "cpu":
                # A tenth faster, compiled; no matter otherwise.
                self.net.to(memory_format=torch.channels_last)
        self.batch = min(config.batch_real, int(data.class_sizes().min()))
        self.sampler = sampler_of(config, data, self.batch, self.features)
        self._order: tuple = (None, None)  # (outer iteration, epoch), its order of the real images
        self.raw = self.first_images()
        self.velocity = torch.zeros_like(self.raw)
        self.lr, self.momentum = self.image_rates()

    @property
    def at_once(self) -> int:
        """Images in one pass through the network."""
        # On a CPU a larger chunk leaves the cache; on a GPU a smaller one leaves it idle.
        pixels = 2**18 if self.data.device.type == "cpu" else 2**21
        return self.config.chunk or pixels // (self.data.shape[1] * self.data.shape[2])

    # What a paper says

    def train_network(self, outer: int, inner: int) -> None:
        """The steps of the network between image step `inner` and the next."""
        raise DDError(
            f"{type(self).__name__} does not say how its network is trained: write "
            "`train_network(outer, inner)`"
        )

    def image_rates(self) -> tuple[float, float]:
        """Step size and momentum of the images' SGD."""
        return self.config.lr_img, self.config.momentum

    def stored(self, images: Tensor) -> Tensor:
        """X of normalised images [n, ch, H, W]."""
        return images

    def normalise(self, x: Tensor) -> Tensor:
        """Normalised images of X [n, ch, H, W]: the other way round."""
        return x

    def bound(self, x: Tensor) -> Tensor:
        """X as an outer iteration starts from it."""
        return x

    # One outer iteration

    def step(self) -> dict[str, Tensor]:
        """One outer iteration; returns the matching loss divided by the number of classes, mean over inner steps."""
        outer, total = self.steps, 0.0
        self.fresh_network(outer)
        self.raw = self.bound(self.raw)
        for inner in range(self.config.inner):
            total = total + self.move(outer, inner)
            if inner + 1 < self.config.inner:
                self.train_network(outer, inner)
        self.sampler.rows = None
        self.steps += 1
        return {"loss": total / (self.config.inner * self.data.num_classes)}

    def move(self, outer: int, inner: int) -> Tensor:
        """One image step; returns L(X) before it."""
        loss, gradient = self.gradient(outer, inner)
        # v = m v + dL/dX, X = X - lr v
        self.velocity.mul_(self.momentum).add_(gradient)
        self.raw = self.raw - self.lr * self.velocity
        return loss

    def gradient(self, outer: int, inner: int) -> tuple[Tensor, Tensor]:
        """L(X) and its gradient [C * IPC, ch, H, W] for the present network and the draws of this step."""
        if self.net.couples_samples:
            self._settle(self.rng("settle", outer, inner))
        rows = self.sampler(self.net, inner, self.rng("real", outer, inner))
        omega = self.draw_augmentation(outer, inner)
        kept = self._kept_tiles(outer, inner)
        # grad_theta l(A(x_real^c)), all classes c
        target = [
            self._match(self.data.batch("train", rows[part]), omega.select(part), part)
            for part in self._parts(self.batch)
        ]
        target = [torch.cat(layer) for layer in zip(*target, strict=True)]
        gradients, total = [], 0.0
        for part in self._parts(min(self.each, self.config.batch_syn)):
            raw = self.raw.unflatten(0, (-1, self.ipc))[part].detach().requires_grad_()
            x = self._tiles(raw)
            if kept is not None:
                x = x[self.classes[: len(x), None], kept[part]]
            # sum_c sum_layers d( grad_theta l(A(x_real^c)), grad_theta l(A(decode(X^c))) )
            loss, gradient = self._match(
                x, omega.select(part), part, [layer[part] for layer in target], raw
            )
            gradients.append(gradient)
            total = total + loss
        return total, torch.cat(gradients).flatten(0, 1)

    # What serves it

    def first_images(self) -> Tensor:
        """X to begin with (`init`); of `mix` and `kmeans` an image holds factor^2 real ones."""
        if self.config.init == "noise":
            return self.noise()
        factor = 1 if self.config.init == "real" else self.factor
        count, rng = self.ipc * factor**2, self.rng("init")
        if self.config.init == "kmeans":
            self.fresh_network(0)
            rows = initial_rows(self.net, self.data, count, rng, self.features)
        else:
            rows = self.data.sample(count, rng)
        return self.stored(encode(self.data.batch("train", rows), factor))

    def noise(self) -> Tensor:
        """X of random numbers: N(0, 1)."""
        shape = (len(self.labels), *self.data.shape)
        return torch.randn(shape, generator=self.rng("init")).to(self.data.device, self.dtype)

    def fresh_network(self, outer: int) -> None:
        """theta of an outer iteration: drawn anew, and trained on real images for `warm_epochs` (DREAM+)."""
        initialise(self.net, self.rng("network", outer))
        self.net_velocity = [torch.zeros_like(p) for p in self.net.parameters()]
        for k in range(self.warm_steps):
            self.train_on_real(outer, k)

    @property
    def warm_steps(self) -> int:
        return self.config.warm_epochs * -(-len(self.data.labels["train"]) // self.config.net_batch)

    def train_on_real(self, outer: int, k: int) -> None:
        """Step k of the network on real images, which come in shuffled epochs, begun anew with every network."""
        labels, size = self.data.labels["train"], self.config.net_batch
        epoch, place = divmod(k, -(-len(labels) // size))
        if self._order[0] != (outer, epoch):
            order = torch.randperm(len(labels), generator=self.rng("order", outer, epoch))
            self._order = ((outer, epoch), upload(order, labels.device))
        rows = self._order[1][place * size : (place + 1) * size]
        rng = self.rng("train", outer, "real", k)
        self.update_network(self.data.batch("train", rows), labels[rows], rng)

    def update_network(self, x: Tensor, y: Tensor, rng: torch.Generator) -> None:
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

    def draw_augmentation(self, outer: int, inner: int) -> DSAParams:
        """One transform per class, shared by its real and its synthetic images."""
        strategy, classes = self.config.augment_match or self.config.augment, self.data.num_classes
        return draw(strategy, classes, self.data.shape[1:], self.rng("augment", outer, inner))

    def decoded(self, raw: Tensor) -> Tensor:
        """The normalised images [n * factor^2, ch, H, W] that networks see of X [n, ch, H, W]."""
        grey = (0.5 - self.data.mean.to(raw)) / self.data.std.to(raw)
        return decode(self.normalise(raw), self.factor, grey)

    def _tiles(self, raw: Tensor) -> Tensor:
        """The decoded images [c, IPC * factor^2, ch, H, W] of X [c, IPC, ch, H, W]."""
        x = self.decoded(raw.flatten(0, 1)).unflatten(0, (self.factor**2, -1, self.ipc))
        return x.transpose(0, 1).flatten(1, 2)

    def _kept_tiles(self, outer: int, inner: int) -> Tensor | None:
        """Which decoded images of each class are matched [C, batch_syn], drawn anew; None where all are."""
        keep = min(self.each, self.config.batch_syn)
        if keep == self.each:
            return None
        rng = self.rng("subset", outer, inner)
        lots = torch.rand(self.data.num_classes, self.each, generator=rng)
        return upload(lots.topk(keep, dim=1).indices, self.data.device)

    def _parts(self, each: int) -> list[slice]:
        """The classes in equal groups that go through the network together, `each` images of every class.

        Slices, so that taking a group is a view: an index would make a GPU wait.
        """
        count, most = self.data.num_classes, max(1, self.at_once // each)
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
        """Statistics of images x [c, B, ch, H, W] of the classes `part`; with a target: L, and its gradient in X."""
        x = augment(x.flatten(0, 1), params.repeat(x.shape[1])).unflatten(0, x.shape[:2])
        y = self.classes[part, None].expand(-1, x.shape[1])
        if target is None:
            return self.matching(x, y)
        loss, pull = self.matching(x.detach(), y, target)
        return [loss, *grad(x, raw, pull)]

    @torch.no_grad()
    def _settle(self, rng: torch.Generator) -> None:
        """BatchNorm: the statistics of 16 real images per class, then fixed."""
        norms = [m for m in self.net.modules() if isinstance(m, nn.BatchNorm2d)]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None
        rows = self.data.sample(min(16, int(self.data.class_sizes().min())), rng)
        self.net.train()(self.data.batch("train", rows.flatten()))
        self.net.eval()

    @property
    def images(self) -> Tensor:
        return self.normalise(self.raw)

    def result(self) -> Result:
        """The set with its decoder."""
        return Result(self.images, self.labels, self.factor)

    def state_dict(self) -> dict[str, Tensor]:
        return {"raw": self.raw, "velocity": self.velocity, "steps": torch.tensor(self.steps)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.raw, self.velocity = (state[k].to(self.raw.device) for k in ("raw", "velocity"))
        self.steps = int(state["steps"])


# What each paper changes. Numbers, and where they come from, stand in gradient.yaml.


@register("dc", paper="arXiv 2006.05929")
class DC(Gradient):
    """Zhao, Mopuri and Bilen, ICLR 2021: d is 1 - cosine over all weights, X begins as noise and is not augmented
    (A is the identity), and the network is trained on X itself (algorithm 1).

    `dc` attains 27.8 ± 0.4 % on CIFAR-10 (JPEG) at IPC 1 (profile `paper`, n=5; 5446 s, AMD EPYC, 1 thread).
    """

    only: ClassVar = {
        "net_data": ("synthetic",),
        "class_steps": (False,),
        "lr_by_ipc": (False,),
        "pixels": (False,),
        "augment_match": ("none",),
        "augment_net": ("none",),
    }

    def train_network(self, outer: int, inner: int) -> None:
        # theta = theta - eta grad_theta l(A(X)), over `net_epochs` passes
        x, rng = self.decoded(self.raw), self.rng("train", outer, inner)
        y = self.labels.repeat(self.factor**2)
        for _ in range(self.config.net_epochs):
            order = upload(torch.randperm(len(y), generator=rng), y.device)
            for rows in order.split(self.config.net_batch):
                self.update_network(x[rows], y[rows], rng)


@register("dsa", paper="arXiv 2102.08259")
class DSA(DC):
    """Zhao and Bilen, ICML 2021: DC from real images, seen through A: one transform per class for its real and its
    synthetic images alike, and one operation per batch in the network's training (`augment`).

    `dsa` attains 28.3 ± 0.4 % on CIFAR-10 (JPEG) at IPC 1 (profile `paper`, n=5; 12029 s, Intel Xeon, 1 thread).
    """

    # L(X) = sum_c d( g(A(x_real^c; omega_c)), g(A(X^c; omega_c)) ): any A, where DC's is the identity
    only: ClassVar = {
        key: values for key, values in DC.only.items() if not key.startswith("augment")
    }


@register("idc", paper="arXiv 2205.14959")
class IDC(Gradient):
    """Kim et al., ICML 2022: d is squares over the convolutions, X holds pixels in [0, 1] of `factor`^2 training images
    in each image, and the network is trained on real images with CutMix.

    `idc` attains 49.9 ± 0.1 % on CIFAR-10 (JPEG) at IPC 10 (profile `small`, n=3; 2681 s, AMD EPYC, 1 thread).
    """

    only: ClassVar = {"net_data": ("real",)} | dict.fromkeys(
        ("class_steps", "lr_by_ipc", "pixels"), (True,)
    )

    def __init__(self, config: Config, data: Dataset, ipc: int, backbone: str, seed: int):
        if data.zca:
            raise DDError("whitened images have no pixels in [0, 1], which X holds: set zca to ''")
        super().__init__(config, data, ipc, backbone, seed)

    def train_network(self, outer: int, inner: int) -> None:
        # theta = theta - eta grad_theta l(A(x_real)), on the next `net_images` real images
        count = -(-self.config.net_images // self.config.net_batch)
        first = self.warm_steps + inner * count
        for k in range(first, first + count):
            self.train_on_real(outer, k)

    def image_rates(self) -> tuple[float, float]:
        """lr (1 - m^C) / (1 - m) and m^C, the sum over a class's own step and those of the others (difference 2)."""
        m, classes = self.config.momentum, self.data.num_classes
        steps = sum(m**k for k in range(classes))
        return self.config.lr_img * steps * (self.ipc / 10), m**classes

    def result(self) -> Result:
        """The set with its decoder and, for a protocol that mixes, this run's share of CutMix."""
        return Result(self.images, self.labels, self.factor, {"cutmix": self.config.cutmix})

    def stored(self, images: Tensor) -> Tensor:
        return images * self.data.std.to(images) + self.data.mean.to(images)

    def noise(self) -> Tensor:
        return (super().noise() / 4 + 0.5).clamp(0, 1)

    def normalise(self, x: Tensor) -> Tensor:
        return (x - self.data.mean.to(x)) / self.data.std.to(x)

    def bound(self, x: Tensor) -> Tensor:
        return x.clamp(0, 1)
