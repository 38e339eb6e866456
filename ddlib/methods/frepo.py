"""FRePo: dataset distillation using neural feature regression (Zhou, Nezhadarya, Ba, NeurIPS 2022, arXiv 2206.00719).

The body f of a network stays as it is and its last layer is solved for: with F_s = f(X) of the synthetic images, their
learned labels Y, and F_t of a batch of real images with targets T = one-hot - 1/C,

    P = F_t F_s^T (F_s F_s^T + lambda mean(diag(F_s F_s^T)) I)^-1 Y                        (kernel ridge regression)
    L = mean_t 1/2 |P_t - T_t|^2  -  mean_j min(top1(Y_j) - top2(Y_j), 1/C)                (label margin: a barrier)

LAMB moves X and Y down L, without second derivatives. The network is one of a pool of m whose ages are staggered:
after its visit it trains one step on the new (X, Y), or a fresh one takes its place once it is older than K steps.
In the regression it runs on its running BatchNorm statistics, real and synthetic images alike.

Differences from the released JAX code:
1. The kernels and their Cholesky factor are float64; where the factorisation fails, lambda is raised tenfold and the
   step is counted. In float32 the gradient can be lost to rounding once n reaches the feature dimension.
2. Real batches are slices of a random order drawn for every epoch, its tail dropped, not of a shuffle buffer.
3. The first images are drawn uniformly from each class; networks, batches and orders come from (seed, step).
4. BatchNorm's running variance is PyTorch's unbiased one.
5. The result is the set after the last step, not the one of best test accuracy.

Accuracy, seconds, hardware and number of runs, as `python -m ddlib docs` renews them from the
records: docs/methods/frepo.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..core import DDError, option, upload
from ..data.dataset import Dataset
from ..nets.build import Backbone, initialise
from ..train.krr import krr
from ..train.loop import compiled
from ..train.optimisers import descend, lamb, part, restore, state_of
from .base import BaseMethod
from .registry import register


@dataclass(frozen=True)
class Config:
    """FRePo's hyperparameters; the defaults are the released code's, the same for almost every dataset."""

    iterations: int = option(500_000, least=0)  # updates of the images
    # Of LAMB: every step moves X, and Y, by this share of its norm; cosine to 10 %
    lr_img: float = option(3e-4, least=0)
    learn_label: bool = True  # False: the labels stay centred one-hot rows
    batch_real: int = option(1024, least=1)  # real images per step, of all classes
    pool_size: int = option(10, least=1)  # m, networks
    max_age: int = option(100, least=0)  # K: a network older than this many steps is replaced
    lr_net: float = option(3e-4, least=0)  # of the networks' Adam, constant
    # Synthetic images in a network's step; fewer are all taken
    batch_net: int = option(1000, least=1)
    ridge: float = option(1e-6, least=0)  # lambda, relative to the mean diagonal of the kernel
    # Mirrored copies in the regression; "": unknown, refused
    flip: str = option("", allowed=("", "on", "off"))
    # Synthetic images in one graph, recomputed in the backward pass; 0: all, kept
    recompute: int = option(0, least=0)
    compile: bool = False  # torch.compile the networks; same images to about 2e-4 after 3 steps


@register("frepo", paper="arXiv 2206.00719")
class FRePo(BaseMethod):
    """Feature regression of `ipc` images per class on `data`, with learned labels [n, C]; `backbone` is the pool's.

    `frepo` attains 39.0 ± 0.5 % on CIFAR-10 (JPEG) at IPC 1 (profile `small`, n=3; 1433 s, Intel Xeon, 1 thread).
    """

    Config, version, preset, stream = Config, 1, "frepo", "frepo"

    def __init__(self, config: Config, data: Dataset, ipc: int, backbone: str, seed: int):
        if not config.flip:
            raise DDError(
                f"no flip setting is known for {data.name} at ipc {ipc}: choose flip=on (mirrored copies in "
                "the regression; helps small sets of things without a handedness) or flip=off"
            )
        super().__init__(config, data, ipc, seed)
        self.raised = 0
        classes, device = data.num_classes, data.device
        rows = data.sample(ipc, self.rng("init")).flatten()
        self.images = data.batch("train", rows).requires_grad_()
        one_hot = torch.eye(classes, device=device, dtype=self.dtype).repeat_interleave(ipc, 0)
        self.labels = ((one_hot - 1 / classes) / math.sqrt(classes / 10)).requires_grad_(
            config.learn_label
        )
        self.learned = [self.images, self.labels] if config.learn_label else [self.images]
        self.lamb = lamb(self.learned, config.lr_img)
        self.nets = [self.network(backbone) for _ in range(config.pool_size)]
        self.adams: list[torch.optim.Adam] = [None] * config.pool_size
        for i in range(config.pool_size):
            self._renew(i)
        self.ages = [i * (config.max_age // config.pool_size) for i in range(config.pool_size)]
        wrap = compiled if config.compile else lambda function: function
        self.features, self.forward = wrap(Backbone.features), wrap(Backbone.forward)
        self.order: tuple = (None, None)  # epoch, and its order of the real images
        self.real = self._whitened()

    def _whitened(self) -> Tensor | None:
        """All real images in ZCA space where they fit (1 GiB, on a GPU a quarter of what is free), else None."""
        data, pixels = self.data, self.data.images["train"]
        room = torch.cuda.mem_get_info(data.device)[0] // 4 if data.device.type == "cuda" else 2**30
        if not data.zca or 4 * pixels.numel() > room:
            return None
        return torch.cat(
            [data.batch("train", rows) for rows in torch.arange(len(pixels)).split(1000)]
        )

    def _renew(self, i: int) -> None:
        """A fresh network i of age 0, and its optimiser."""
        net = initialise(self.nets[i], self.rng("network", i, self.steps))
        self.adams[i] = torch.optim.Adam(net.parameters(), lr=self.config.lr_net)
        net.eval().requires_grad_(False)

    def _batch(self) -> tuple[Tensor, Tensor]:
        """This step's real images and their targets: one-hot less 1/C, float64."""
        labels, classes = self.data.labels["train"], self.data.num_classes
        size = min(self.config.batch_real, len(labels))
        epoch, k = divmod(self.steps, len(labels) // size)
        if self.order[0] != epoch:
            order = torch.randperm(len(labels), generator=self.rng("epoch", epoch))
            self.order = (epoch, order)
        rows = upload(self.order[1][k * size : (k + 1) * size], labels.device)
        x = self.data.batch("train", rows) if self.real is None else self.real[rows]
        return x, F.one_hot(labels[rows], classes).double() - 1 / classes

    def losses(self, net: Backbone, x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, int]:
        """Regression loss of the real images `x`, label margin, and how often lambda was raised."""
        c, z, y = self.config, self.images, self.labels
        if c.flip == "on":
            z, y = torch.cat([z, z.flip(3)]), y.repeat(2, 1)
        f_t, f_s = self._real_features(net, x), self._synthetic_features(net, z)
        # P = F_t F_s^T (F_s F_s^T + lambda mean(diag(F_s F_s^T)) I)^-1 Y
        predicted, raised = krr(f_t, f_s, y, c.ridge)
        # - mean_j min(top1(Y_j) - top2(Y_j), 1/C)
        first, second = self.labels.topk(2, dim=1).values.unbind(1)
        margin = -(first - second).clamp(max=1 / self.data.num_classes).mean()
        # mean_t 1/2 |P_t - T_t|^2
        regression = 0.5 * (predicted - targets).square().sum(1).mean()
        return regression, margin, raised

    @torch.no_grad()
    def _real_features(self, net: Backbone, x: Tensor) -> Tensor:
        """F_t = f(x), without a graph."""
        # On a CPU a larger chunk leaves the cache; on a GPU this is the released batch.
        pieces = x.split(1024 if x.is_cuda else 128)
        return torch.cat([self.features(net, piece) for piece in pieces])

    def _synthetic_features(self, net: Backbone, z: Tensor) -> Tensor:
        """F_s = f(z); where `recompute` says so, a piece's graph lives in its own backward pass alone."""
        if not self.config.recompute:
            return self.features(net, z)
        pieces = z.split(self.config.recompute)
        return torch.cat(
            [checkpoint(self.features, net, piece, use_reentrant=False) for piece in pieces]
        )

    def step(self) -> dict[str, Tensor | int]:
        """One update of images, labels and one network; returns the regression loss, the margin term and how many
        times lambda was raised so far. Raises DDError, before anything is changed, where features or gradients are
        not `finite`, of which a GPU is asked about the features alone."""
        c = self.config
        i = int(torch.randint(c.pool_size, (), generator=self.rng("model", self.steps)))
        # L of network i; X = LAMB(X, dL/dX), Y = LAMB(Y, dL/dY)
        loss, margin, raised = self.losses(self.nets[i], *self._batch())
        gradients = torch.autograd.grad(loss + margin, self.learned)
        if not self.finite(loss, *gradients):
            raise DDError(
                f"the regression loss is {loss.item():.3g} and its gradient is not finite at step "
                f"{self.steps + 1} (network {i} of the pool, {self.ages[i]} steps old)"
            )
        wave = (1 + math.cos(math.pi * self.steps / c.iterations)) / 2
        descend(self.lamb, gradients, c.lr_img * (0.1 + 0.9 * wave))
        self.steps, self.raised = self.steps + 1, self.raised + raised
        if self.ages[i] > c.max_age:
            self._renew(i)
            self.ages[i] = 0
        else:
            self._train(i)
            self.ages[i] += 1
        return {"loss": loss.detach(), "margin": margin.detach(), "raised": self.raised}

    def _train(self, i: int) -> None:
        """One step of network i on the synthetic set: half the squared error, BatchNorm in train mode."""
        net, n = self.nets[i].train().requires_grad_(True), len(self.images)
        x, y = self.images.detach(), self.labels.detach()
        if n > self.config.batch_net:
            rows = torch.randperm(n, generator=self.rng("online", self.steps))
            rows = upload(rows[: self.config.batch_net], x.device)
            x, y = x[rows], y[rows]
        (0.5 * (self.forward(net, x) - y).square().sum(1).mean()).backward()
        self.adams[i].step()
        self.adams[i].zero_grad()
        net.eval().requires_grad_(False)

    def state_dict(self) -> dict[str, Tensor]:
        state = {
            "images": self.images.detach(),
            "labels": self.labels.detach(),
            "ages": torch.tensor(self.ages),
            "count": torch.tensor([self.steps, self.raised]),
        }
        for i, (net, adam) in enumerate(zip(self.nets, self.adams, strict=True)):
            state |= {f"net{i}.{key}": value for key, value in net.state_dict().items()}
            state |= state_of(adam, f"adam{i}")
        return state | state_of(self.lamb, "lamb")

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.images.data.copy_(state["images"])
        self.labels.data.copy_(state["labels"])
        self.ages, (self.steps, self.raised) = state["ages"].tolist(), state["count"].tolist()
        # LAMB counts for all tensors together
        self.lamb.param_groups[0]["step"] = torch.tensor(float(self.steps))
        restore(self.lamb, state, "lamb")
        for i, (net, adam) in enumerate(zip(self.nets, self.adams, strict=True)):
            net.load_state_dict(part(state, f"net{i}"))
            restore(adam, state, f"adam{i}")
