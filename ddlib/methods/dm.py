"""DM: dataset condensation with distribution matching (Zhao and Bilen, WACV 2023, arXiv 2110.04181).

Each step draws a fresh random network psi and moves the synthetic images S so that every class's mean feature
meets that of a batch of real images under the same augmentation A (eq. 6):

    L(S) = sum_c || 1/B sum_i psi(A(x_i^c; omega_c)) - 1/n sum_j psi(A(s_j^c; omega_c)) ||^2

Differences from the released code:
1. All classes go through the network together. With per-sample layers (IN, LN, GN, none) the gradient is the
   per-class loop's to rounding, and a chunk of classes at a time gives it too; BatchNorm takes the joint branch
   of the released code, which cannot be chunked.
2. One pass of `iterations` updates and the set after the last one is scored; the released loop makes 20,001 updates
   and scores the set before the last.
3. Networks, batches and augmentation come from (seed, step), not from the clock: a run can be repeated and resumed.
4. `ema` scores the moving average of the images (ours, off by default): at IPC 1 it stands for the many small steps
   that a shortened run does not have.
5. DREAM and DREAM+ plug in (`ddlib.match.sampler`, ours for this host): representative real batches, chosen every
   `interval` steps with that step's network, and the convolutions' gradients matched beside the features (`match`).

Accuracy, seconds, hardware and number of runs, as `python -m ddlib docs` renews them from the
records: docs/methods/dm.md.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..augment.siamese import augment
from ..core import DDError, option
from ..data.dataset import Dataset
from ..match.gradients import class_gradients, matched
from ..recipe import PRECISIONS
from ..train.loop import compiled, lowered
from .base import ImageConfig, ImageMethod
from .registry import register


@dataclass(frozen=True)
class Config(ImageConfig):
    """DM's hyperparameters; the defaults are the released code's for CIFAR-10 at IPC 1, 10 and 50."""

    iterations: int = option(20000, least=0)  # image updates; every one uses a fresh network
    match: str = option("feature", allowed=("feature", "gradient", "both"))  # both: DREAM+
    # Of psi's convolutions and products; no paper has bf16, so a run in it is a changed method
    precision: str = option("float32", allowed=PRECISIONS)

    def __post_init__(self) -> None:
        if self.precision != "float32" and self.match != "feature":
            raise DDError(
                f"precision {self.precision!r} is for features alone; allowed with match "
                f"{self.match!r}: float32"
            )


@register("dm", paper="arXiv 2110.04181")
class DM(ImageMethod):
    """Distribution matching of `ipc` images per class on `data`; see the module's docstring for the equation.

    `dm` attains 47.4 ± 0.5 % on CIFAR-10 (JPEG) at IPC 10 (profile `paper`, n=5; 7446 s, Intel Xeon, 1 thread).
    """

    Config, version, stream, shares = Config, 1, "dm", True

    def __init__(self, config: Config, data: Dataset, ipc: int, backbone: str, seed: int):
        super().__init__(config, data, ipc, backbone, seed)
        if self.net.couples_samples and config.match != "feature":
            raise DDError(
                f"{self.net.spec} has BatchNorm, which couples the classes' gradients; allowed with match "
                f"{config.match!r}: norm=in, ln, gn or none"
            )
        # What the real half of the loss depends on: all but how the images begin and move
        self.of_real = replace(config, iterations=0, init="real", lr_img=0.0, momentum=0.0, ema=0.0)
        psi = lowered(self.net.features, data.device, config.precision)
        self.psi = compiled(psi) if config.compile else psi
        # Without a graph a CPU takes 32 images of 32 x 32 px at a time: what a layer writes, the next reads from cache.
        whole = data.device.type == "cuda" or self.net.couples_samples
        self.piece = 0 if whole else max(1, 2**15 // data.shape[1] // data.shape[2])

    def begin(self) -> None:
        """Draw psi, omega and the real batch, and take the real half of the loss, for all classes."""
        self.fresh_network()
        self.omega = self.draw_augmentation()
        rows = self.real_rows()
        self.real = self.once(self.of_real, lambda: self.real_half(rows))

    def real_half(self, rows: Tensor) -> list[Tensor]:
        """What is matched, of the real images `rows` of every class; nothing in it depends on IPC."""
        found = []
        for classes in self.chunks(self.batch):
            real = self.data.batch("train", rows[classes].flatten())
            # mu_c = 1/B sum_i psi(A(x_i^c; omega_c))
            found.append(self.statistics(real, classes, self.batch))
        return [torch.cat(values) for values in zip(*found, strict=True)]

    def loss(self, synthetic: Tensor, classes: slice) -> Tensor:
        # mu_c = 1/B sum_i psi(A(x_i^c; omega_c)), as `begin` has them of all classes
        real = [values[classes] for values in self.real]
        # 1/n sum_j psi(A(s_j^c; omega_c))
        ours = self.statistics(synthetic, classes, self.ipc, graph=True)
        # L(S) = sum_c | mu_c - 1/n sum_j psi(A(s_j^c; omega_c)) |^2, eq. 6; with DREAM+ the same of the gradients
        return sum((a - b).square().sum() for a, b in zip(real, ours, strict=True))

    def statistics(
        self, images: Tensor, classes: slice, each: int, *, graph: bool = False
    ) -> list[Tensor]:
        """What is matched of images [c * each, C, H, W] of the classes: under `match`, the class means [c, d] of the
        features, the gradients [c, *weight.shape] of the convolutions (DREAM+'s term), or both; `graph` for images."""
        x = augment(images, self.omega.select(classes).repeat(each))
        if self.config.match == "feature":
            return [self.class_means(x, each, graph)]
        *gradients, means = class_gradients(
            self.net,
            x.unflatten(0, (-1, each)),
            self.class_labels(classes, each),
            matched(self.net, "conv"),
            graph=graph,
            embed=True,
        )
        found = [*gradients, means] if self.config.match == "both" else gradients
        return found if graph else [value.detach() for value in found]

    def class_means(self, x: Tensor, each: int, graph: bool) -> Tensor:
        """1/n sum_j psi(x_j^c): the mean features [c, d] of images x [c * each, C, H, W]."""
        with torch.set_grad_enabled(graph):
            pieces = x.split(len(x) if graph else self.piece or len(x))
            features = torch.cat([self.psi(piece) for piece in pieces])
            return features.unflatten(0, (-1, each)).mean(1)
