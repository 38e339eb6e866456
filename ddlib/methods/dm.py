"""DM: dataset condensation with distribution matching (Zhao and Bilen, WACV 2023, arXiv 2110.04181).

Each step draws a fresh random network psi and moves the synthetic images S so that every class's mean feature
meets that of a batch of real images under the same augmentation A (eq. 6):

    L(S) = sum_c || 1/B sum_i psi(A(x_i^c; w_c)) - 1/n sum_j psi(A(s_j^c; w_c)) ||^2

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
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..augment.siamese import augment, draw
from ..core import DDError, generator, option
from ..data.dataset import Dataset
from ..match.gradients import class_gradients, matched
from ..match.sampler import SAMPLINGS, Sampler, initial_rows
from ..nets.build import build, initialise
from ..train.loop import compiled


@dataclass(frozen=True)
class Config:
    """DM's hyperparameters; the defaults are the released code's for CIFAR-10 at IPC 1, 10 and 50."""

    iterations: int = option(20000, least=0)  # image updates; every one uses a fresh network
    lr_img: float = option(1.0, least=0)  # step size of the images; the gradient shrinks as 1/IPC
    momentum: float = option(0.5, least=0, below=1)  # of the image optimiser, plain SGD
    ema: float = option(
        0.0, least=0, below=1
    )  # decay of the images' moving average, then the result; 0 is off
    batch_real: int = option(256, least=1)  # real images a class and step; all of a smaller class
    init: str = option(
        "real", allowed=("real", "noise", "kmeans")
    )  # IPC real images a class, or N(0, 1) pixels
    augment: str = "color_crop_cutout_flip_scale_rotate"  # DSA, one operation a class and step
    chunk: int = option(
        0, least=0
    )  # images at a time, whole classes; 0: 256 on a CPU, 8,192 on a GPU
    compile: bool = False  # torch.compile the network; same numbers to about 1e-5
    sampling: str = option(
        "random", allowed=SAMPLINGS
    )  # of the real images; all but random look at features
    interval: int = option(10, least=1)  # steps between two choices of them
    subsample: int = option(1, least=1)  # images a cluster
    pool: int = option(
        0, least=0
    )  # images of a class that are clustered, drawn anew each time; 0 is all
    match: str = option("feature", allowed=("feature", "gradient", "both"))  # both: DREAM+


class DM:
    """Distribution matching of `ipc` images a class on `data`; see the module's docstring for the equation."""

    Config, version, preset = Config, 1, "dm"

    def __init__(self, config: Config, data: Dataset, ipc: int, backbone: str, seed: int):
        self.config, self.data, self.ipc, self.seed, self.steps = config, data, ipc, seed, 0
        self.net = (
            build(backbone, data.shape, data.num_classes)
            .to(data.device)
            .requires_grad_(False)
            .train()
        )
        self.psi = compiled(self.net.features) if config.compile else self.net.features
        if self.net.couples_samples and config.match != "feature":
            raise DDError(
                f"{self.net.spec} has BatchNorm, which couples the classes' gradients; allowed with match "
                f"{config.match!r}: norm=in, ln, gn or none"
            )
        if config.init == "kmeans":
            initialise(self.net, generator(seed, "dm", "network", 0))
            chosen = initial_rows(self.net, data, ipc, generator(seed, "dm", "init"))
        else:
            chosen = data.sample(ipc, generator(seed, "dm", "init"))
        if config.init != "noise":
            self.raw = data.batch("train", chosen.flatten())
        else:
            shape = (chosen.numel(), *data.shape)
            self.raw = torch.randn(shape, generator=generator(seed, "dm", "noise")).to(data.device)
        self.labels = torch.arange(data.num_classes, device=data.device).repeat_interleave(ipc)
        self.average, self.velocity = self.raw, torch.zeros_like(self.raw)
        self.batch = min(config.batch_real, int(data.class_sizes().min()))
        self.sampler = Sampler(
            data, self.batch, config.sampling, config.interval, config.subsample, pool=config.pool
        )
        # On a CPU a larger chunk leaves the cache and is half as fast; on a GPU a smaller one leaves it idle.
        gpu = data.device.type == "cuda"
        self.chunk = config.chunk or (8192 if gpu else 256)
        # Without a graph a CPU takes 32 images of 32 x 32 px at a time: what a layer writes, the next reads from cache.
        self.piece = (
            0
            if gpu or self.net.couples_samples
            else max(1, 2**15 // data.shape[1] // data.shape[2])
        )

    @property
    def images(self) -> torch.Tensor:
        return self.average if self.config.ema else self.raw

    def parts(self, each: int) -> list[torch.Tensor]:
        """The classes in groups that go through the network together, `each` images of every class."""
        size = self.data.num_classes if self.net.couples_samples else max(1, self.chunk // each)
        return list(torch.arange(self.data.num_classes).split(size))

    def means(
        self, images: torch.Tensor, params, each: int, part: torch.Tensor, graph: bool
    ) -> list[torch.Tensor]:
        """What is matched of augmented images [c * each, C, H, W] of the classes `part`: the class means [c, d] of the
        features, or with `match` the gradients [c, *weight.shape] of the convolutions, or both; `graph` for images."""
        x = augment(images, params.repeat(each))
        if self.config.match == "feature":
            with torch.set_grad_enabled(graph):
                features = torch.cat(
                    [
                        self.psi(piece)
                        for piece in x.split(len(x) if graph else self.piece or len(x))
                    ]
                )
                return [features.unflatten(0, (-1, each)).mean(1)]
        y = part.to(x.device)[:, None].expand(-1, each)
        found = class_gradients(
            self.net,
            x.unflatten(0, (-1, each)),
            y,
            matched(self.net, "conv"),
            graph=graph,
            embed=True,
        )
        return [
            value if graph else value.detach()
            for value in found[: None if self.config.match == "both" else -1]
        ]

    def step(self) -> dict[str, torch.Tensor]:
        """One update of all images; returns the loss divided by the number of classes, as the released log does."""
        rng = lambda purpose: generator(self.seed, "dm", purpose, self.steps)
        initialise(self.net, rng("network"))
        real = self.sampler(self.net, self.steps, rng("real"))
        params = draw(
            self.config.augment, self.data.num_classes, self.data.shape[1:], rng("augment")
        )
        target = [
            self.means(
                self.data.batch("train", real[part].flatten()),
                params.select(part),
                self.batch,
                part,
                graph=False,
            )
            for part in self.parts(self.batch)
        ]
        target = [torch.cat(values) for values in zip(*target, strict=True)]
        gradient, total = [], 0.0
        images = self.raw.unflatten(0, (-1, self.ipc))
        for part in self.parts(self.ipc):
            x = images[part].flatten(0, 1).requires_grad_()
            found = self.means(x, params.select(part), self.ipc, part, graph=True)
            loss = sum(
                (real[part] - value).square().sum()
                for real, value in zip(target, found, strict=True)
            )
            gradient += torch.autograd.grad(loss, x)
            total = total + loss.detach()
        self.velocity.mul_(self.config.momentum).add_(torch.cat(gradient))
        self.raw = self.raw.detach().sub(self.velocity, alpha=self.config.lr_img)
        self.average = torch.lerp(self.raw, self.average, self.config.ema)
        self.steps += 1
        return {"loss": total / self.data.num_classes}

    def state_dict(self) -> dict[str, torch.Tensor]:
        state = {
            "raw": self.raw,
            "average": self.average,
            "velocity": self.velocity,
            "steps": torch.tensor(self.steps),
        }
        return state | ({} if self.sampler.rows is None else {"rows": self.sampler.rows})

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.raw, self.average, self.velocity = (
            state[k].to(self.raw.device) for k in ("raw", "average", "velocity")
        )
        self.steps = int(state["steps"])
        self.sampler.rows = state["rows"].to(self.raw.device) if "rows" in state else None
