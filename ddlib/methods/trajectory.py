"""Trajectory matching: MTT (arXiv 2203.11932), TESLA (2211.10586), FTD (2211.11004) and DATM (2310.05773).

Each iteration draws an expert and a start epoch t, trains from theta*_t on the synthetic set for N steps, and moves
images X, step size beta and, where they are learned, labels Y down the gradient of

    L = ||theta_N - theta*_{t+M}||^2 / ||theta*_t - theta*_{t+M}||^2

`Trajectory` is that loop. The four methods below it say what the labels are, where segments start, what the result is,
and which updates count; how the gradient is taken (`ddlib.match.trajectory`) and which experts are matched
(`ddlib.experts`) are arguments of all four. Differences from the released codes:
1. The default gradient is the exact adjoint, with one step's graph; mtt, ftd and datm presets use it in place of the
   unrolled graph (same value), the tesla preset keeps `tesla_repo`, for which its image step sizes were chosen.
2. beta changes by at most `clip_rate` of itself an iteration, which keeps it positive; 0 switches that off.
3. TESLA's soft labels for the evaluation are the mean over experts at the last epoch that a segment can end in, not
   those of whichever segment came last.
4. The EMA of FTD is evaluated with fresh networks; the released code goes on training the raw images' networks.
5. Draws come from (seed, iteration), not from the clock.
6. DREAM plugs in (`ddlib.match.sampler`, ours for these hosts): K-means initialisation, experts on representatives.
7. DATM's first logits are a mean over experts also with `init=real`, where the release asks one expert.
8. CIFAR-100 without whitening is normalised by its own mean and std, where these releases take CIFAR-10's.
9. The ImageNet subsets are resized by their shorter side and cropped, where MTT's release squashes them to a square.

Accuracy, seconds, hardware and number of runs, as `python -m ddlib docs` renews them from the
records: docs/methods/mtt.md, docs/methods/tesla.md, docs/methods/ftd.md and docs/methods/datm.md.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils import vector_to_parameters

from ..augment.siamese import draw
from ..core import DDError, generator, option, upload
from ..data.dataset import Dataset
from ..experts import ExpertRecipe, ExpertSet, load_experts
from ..match.inner import CompiledStep
from ..match.sampler import initial_rows
from ..match.trajectory import FlatNet, Match, Segment, match, parse_engine
from .base import BaseMethod, Result
from .registry import register


@dataclass(frozen=True)
class Config:
    """Hyperparameters of trajectory matching; the defaults are MTT's for CIFAR-10 at IPC 1."""

    iterations: int = option(5000, least=0)  # updates of the images
    gradient: str = "adjoint"  # adjoint, tesla, tesla_repo, unroll, checkpoint or window=K
    syn_steps: int = option(50, least=1)  # N, unrolled steps on the synthetic set
    expert_epochs: int = option(2, least=1)  # M, epochs of the expert that N steps should match
    max_start: int = option(2, least=1)  # T+, start epochs are below it
    min_start: int = option(0, least=0)  # T-, the first start epoch
    # DATM: the window's upper end at iteration 0; 0 is max_start throughout
    grow_from: int = option(0, least=0)
    grow_until: int = option(0, least=0)  # DATM: the iteration at which it has grown to max_start
    batch_syn: int = option(0, least=0)  # images an inner step; 0 is all of them
    lr_img: float = option(100.0, least=0)  # step size of the images
    lr_lr: float = option(1e-7, least=0)  # step size of beta
    lr_teacher: float = option(0.01, least=0)  # beta at the start
    lr_label: float = option(0.0, least=0)  # step size of learned label logits, momentum 0.9
    momentum: float = option(0.5, least=0, below=1)  # of images and beta
    # One-hot, TESLA's teacher, DATM's logits
    labels: str = option("hard", allowed=("hard", "assigned", "learned"))
    # correct: images an expert gets right
    init: str = option("real", allowed=("real", "correct", "noise", "kmeans"))
    # kmeans: clusters features of an expert after so many epochs
    init_epoch: int = option(0, least=0)
    # FTD and DATM: decay of the images' moving average, then the result; 0 is off
    ema: float = option(0.0, least=0, below=1)
    threshold: float = option(0.0, least=0)  # DATM: skip an update whose loss is above it; 0 is off
    segments: int = option(1, least=1)  # segments an iteration, their gradients averaged
    # Largest relative change of beta an iteration; 0 is off
    clip_rate: float = option(0.05, least=0)
    micro: int = option(0, least=0)  # images in one graph; 0 is the whole inner batch
    keep: int = option(1, least=1)  # last steps whose graphs wait in memory; no matter otherwise
    compile: bool = False  # torch.compile the inner steps; same numbers to about 1e-5
    augment: str = "color_crop_cutout_flip_scale_rotate"  # DSA, one operation an inner step
    experts: int = option(100, least=1)  # trajectories to draw from
    expert_total: int = option(50, least=1)  # epochs each expert was trained
    expert_lr: float = option(0.01, least=0)
    expert_batch: int = option(256, least=1)
    expert_sampling: str = option("random", allowed=("random", "dream"))  # of the experts' batches
    # FTD: paper's SAM, or its code's adaptive GSAM
    flat: str = option("plain", allowed=("plain", "sam", "agsam"))
    rho: float = option(0.01, least=0)  # radius of flat experts
    alpha: float = option(1.0, least=0)  # weight of flatness

    def __post_init__(self) -> None:
        parse_engine(self.gradient)  # here, so that a wrong one is named before experts are trained
        # Of plain experts rho and alpha do nothing, and so must not make another run of it.
        if self.flat == "plain":
            for name in ("rho", "alpha"):
                object.__setattr__(self, name, getattr(ExpertRecipe, name))

    @property
    def expert_recipe(self) -> ExpertRecipe:
        return ExpertRecipe(
            self.expert_total,
            self.expert_lr,
            self.expert_batch,
            self.augment,
            self.flat,
            self.rho,
            self.alpha,
            self.expert_sampling,
        )


def soft_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Batch mean of -sum softmax(labels) log softmax(logits): DATM's loss on learned label logits."""
    return F.cross_entropy(logits, labels.softmax(1))


class Trajectory(BaseMethod):
    """The loop that all four share; it needs experts (`ddlib.experts.train_experts`).

    Attributes: `raw` [n, C, H, W], the images X as SGD moves them; `rate`, beta; `logits`, DATM's learned labels, else
    empty; `experts`, their weights theta* by epoch; `steps`, and `skipped` of them.
    """

    Config, version, preset, stream = Config, 1, "trajectory", "trajectory"
    criterion: Callable = staticmethod(F.cross_entropy)  # of the steps on the synthetic set

    def __init__(self, config: Config, data: Dataset, ipc: int, backbone: str, seed: int):
        super().__init__(config, data, ipc, seed)
        self.skipped = 0
        last = config.max_start - 1 + config.expert_epochs
        if config.min_start >= config.max_start:
            raise DDError(
                f"min_start {config.min_start} must be below max_start {config.max_start}"
            )
        if last > config.expert_total:
            raise DDError(
                f"a segment from epoch max_start - 1 = {config.max_start - 1} over {config.expert_epochs} "
                f"epochs ends at {last}, beyond the experts' expert_total = {config.expert_total} epochs"
            )
        if config.init_epoch > config.expert_total:
            raise DDError(
                f"init_epoch {config.init_epoch} is beyond the experts' expert_total = {config.expert_total}"
            )
        self.experts = load_experts(data, backbone, config.expert_recipe, config.experts)
        self.net = FlatNet(self.network(backbone))
        self.inner = CompiledStep(self.net, self.criterion) if config.compile else None
        self.raw = self.first_images()
        self.logits = self.first_logits(self.raw)
        self.average = self.raw.clone() if config.ema else self.raw.new_zeros(0)
        self.rate = torch.tensor(config.lr_teacher, device=data.device)
        self.velocity = {
            "raw": torch.zeros_like(self.raw),
            "rate": torch.zeros_like(self.rate),
            "logits": torch.zeros_like(self.logits),
        }

    def _theta(self, expert: int, epoch: int) -> Tensor:
        return upload(self.experts.weights[expert][epoch], self.data.device).to(self.dtype)

    @property
    def at_once(self) -> int:
        """Images in one pass through the network; 0 where the gradient holds the whole graph."""
        if self.config.gradient in ("unroll", "checkpoint"):
            return 0
        return self.config.micro or min(self.config.batch_syn or len(self.raw), len(self.raw))

    # What a paper says

    def first_images(self) -> Tensor:
        """X to begin with [n, C, H, W] (`init`): real images, N(0, 1), or those nearest to K-means centres."""
        if self.config.init == "noise":
            shape = (len(self.labels), *self.data.shape)
            return torch.randn(shape, generator=self.rng("noise")).to(self.data.device, self.dtype)
        if self.config.init == "kmeans":
            theta = self._theta(self.seed % len(self.experts), self.config.init_epoch)
            vector_to_parameters(theta, self.net.net.parameters())
            rows = initial_rows(self.net.net, self.data, self.ipc, self.rng("init"))
        else:
            rows = self.data.sample(self.ipc, self.rng("init"))
        return self.data.batch("train", rows.flatten())

    def first_logits(self, images: Tensor) -> Tensor:
        """Label logits [n, classes] to begin with where labels are learned, else empty."""
        return torch.zeros(0, device=self.data.device)

    def segment_labels(self, expert: int, epoch: int, batches: list[Tensor]) -> Tensor:
        """What the steps of a segment train on that ends at this epoch of the expert; int64 [n], or float [n, classes].

        Only the rows in `batches` are read.
        """
        return self.labels

    def final_labels(self) -> Tensor:
        """Labels of the result."""
        return self.labels

    @property
    def images(self) -> Tensor:
        """The result as it stands, normalised [n, C, H, W]."""
        return self.raw

    def last_start(self) -> int:
        """The bound that start epochs of this step stay below, T+."""
        return self.config.max_start

    def counts(self, loss: Tensor) -> bool:
        """Whether a step of this loss moves anything."""
        return True

    def gradients(self, found: list[Match]) -> dict[str, Tensor]:
        """dL/dX and dL/dbeta, by the names of what they move; means over the segments."""
        return {
            "raw": torch.stack([m.images for m in found]).mean(0),
            "rate": torch.stack([m.rates.sum() for m in found]).mean(),
        }

    def moved(self, velocity: dict[str, Tensor], change: Tensor) -> dict[str, Tensor]:
        """X and beta after SGD with this velocity; `change` is that of beta."""
        return {
            "rate": self.rate + change,
            "raw": self.raw - self.config.lr_img * velocity["raw"],
        }

    # One iteration

    def step(self) -> dict[str, Tensor | int]:
        """One update of images, step size and labels; returns the matching loss and beta.

        Raises `DDError`, before anything is changed, when the loss or a gradient of an update that counts is not
        finite or beta would turn negative.
        """
        found = [
            self.match(*self.segment(self.rng(self.steps, k))) for k in range(self.config.segments)
        ]
        loss = torch.stack([m.loss for m in found]).mean()
        gradients = self.gradients(found)
        counts = self.counts(loss)
        if counts:
            velocity = self.velocities(gradients)
            moved = self.moved(velocity, self.beta_change(velocity["rate"]))
            self.refuse([loss, *gradients.values()], moved)
            self.update(velocity, moved)
        else:
            self.skipped += 1
        self.steps += 1
        return {"loss": loss, "beta": self.rate, "skipped": self.skipped}

    def velocities(self, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        """v = m v + gradient, of everything that has a gradient; the momentum of DATM's labels is 0.9."""
        momentum = {key: 0.9 if key == "logits" else self.config.momentum for key in gradients}
        return {
            key: momentum[key] * self.velocity[key] + gradient
            for key, gradient in gradients.items()
        }

    def beta_change(self, velocity: Tensor) -> Tensor:
        """What beta moves by: at most `clip_rate` of itself (difference 2)."""
        change, clip = -self.config.lr_lr * velocity, self.config.clip_rate
        return change.clamp(-clip * self.rate, clip * self.rate) if clip else change

    def refuse(self, seen: list[Tensor], moved: dict[str, Tensor]) -> None:
        """Raise `DDError` where loss, a gradient in `seen` or what would move is not finite, or beta is not positive.

        All of it is one question, for which a GPU is waited for once.
        """
        good = [value.isfinite().all() for value in (*seen, *moved.values())]
        if moved:
            good.append(moved["rate"] > 0)
        if torch.stack(good).all():
            return
        c, beta = self.config, float(self.rate)
        if not torch.stack(good[: len(seen)]).all():
            raise DDError(
                f"the matching loss is {float(seen[0])} at step {self.steps + 1}: lower lr_img ({c.lr_img}), "
                f"lr_lr ({c.lr_lr}) or lr_teacher ({c.lr_teacher}); beta is {beta:.3g}"
            )
        if not good[-1]:
            raise DDError(
                f"the step size beta would turn from {beta:.3g} to {float(moved['rate']):.3g} at step "
                f"{self.steps + 1}: lower lr_lr ({c.lr_lr}) or set clip_rate between 0 and 1"
            )
        raise DDError(
            f"images, labels or beta would not be finite after step {self.steps + 1}: lower lr_img "
            f"({c.lr_img}) or lr_label ({c.lr_label})"
        )

    def update(self, velocity: dict[str, Tensor], moved: dict[str, Tensor]) -> None:
        """Take what has moved, by SGD with momentum."""
        self.velocity |= velocity
        for key, value in moved.items():
            setattr(self, key, value)

    def segment(
        self, rng: torch.Generator, place: tuple[int, int] | None = None
    ) -> tuple[Segment, Tensor]:
        """A random segment, or that of `place` = (expert, start epoch), and the labels that its steps train on."""
        c, n = self.config, len(self.labels)
        expert, start = place or (
            int(torch.randint(len(self.experts), (), generator=rng)),
            int(
                torch.randint(
                    c.min_start, max(self.last_start(), c.min_start + 1), (), generator=rng
                )
            ),
        )
        batches: list[Tensor] = []
        while len(batches) < c.syn_steps:
            order = upload(torch.randperm(n, generator=rng), self.data.device)
            *whole, last = order.split(c.batch_syn or n)
            batches += [last, *whole]  # the released codes take the batches from the end
        batches = batches[: c.syn_steps]
        params = [
            draw(c.augment, len(b), self.data.shape[1:], rng, op_every=len(b)) for b in batches
        ]
        end = start + c.expert_epochs
        segment = Segment(self._theta(expert, start), self._theta(expert, end), batches, params)
        return segment, self.segment_labels(expert, end, batches)

    def match(self, segment: Segment, labels: Tensor, gradient: str | None = None) -> Match:
        """Loss and gradients of one segment at the present images and step size."""
        return match(
            self.net,
            segment,
            self.raw,
            labels,
            self.rate.expand(len(segment.batches)),
            gradient or self.config.gradient,
            micro=self.config.micro,
            keep=self.config.keep,
            criterion=self.criterion,
            inner=self.inner,
        )

    # What serves it

    @torch.no_grad()
    def _logits(self, images: Tensor, expert: int, epoch: int) -> Tensor:
        theta = self._theta(expert, epoch)
        return torch.cat([self.net(theta, x) for x in images.split(500)])

    def result(self) -> Result:
        """The set with its learned step size."""
        return Result(self.images, self.final_labels(), recipe={"lr": float(self.rate)})

    @classmethod
    def needs(cls, config: Config) -> list[ExpertSet]:
        return [ExpertSet(config.expert_recipe, config.experts)]

    def mean_loss(self, most: int = 24) -> float:
        """Matching loss, mean over all segments of all experts, or `most` of them evenly spread."""
        c = self.config
        places = [(e, t) for e in range(len(self.experts)) for t in range(c.min_start, c.max_start)]
        places = places[:: math.ceil(len(places) / most)]
        losses = [
            self.match(*self.segment(generator(0, "mean loss", *place), place), "window=1").loss
            for place in places
        ]
        return float(torch.stack(losses).mean())

    def summary(self) -> dict[str, float]:
        """Mean matching loss before and after, the learned step size, how many updates were skipped, and the seconds
        that the experts took, where they were timed."""
        kept = self.raw, self.logits, self.rate
        try:
            self.raw = self.images  # of the result, which is the EMA if there is one
            after = self.mean_loss()
            self.raw = self.first_images()
            self.logits = self.first_logits(self.raw)
            self.rate = torch.full_like(self.rate, self.config.lr_teacher)
            before = self.mean_loss()
        finally:
            self.raw, self.logits, self.rate = kept
        timed = (
            {}
            if math.isnan(self.experts.seconds)
            else {"expert seconds": round(self.experts.seconds, 3)}
        )
        return {
            "mean loss before": before,
            "mean loss after": after,
            "beta": float(self.rate),
            "skipped": self.skipped,
            **timed,
        }

    def state_dict(self) -> dict[str, Tensor]:
        state = {
            "raw": self.raw,
            "average": self.average,
            "rate": self.rate,
            "logits": self.logits,
            "count": torch.tensor([self.steps, self.skipped]),
        }
        return state | {f"velocity_{key}": value for key, value in self.velocity.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        state = {key: value.to(self.data.device) for key, value in state.items()}
        self.steps, self.skipped = state.pop("count").tolist()
        self.velocity = {key: state.pop(f"velocity_{key}") for key in self.velocity}
        for key, value in state.items():
            setattr(self, key, value)


# What each paper changes. Numbers, and where they come from, stand in trajectory.yaml.


@register("mtt", paper="arXiv 2203.11932")
class MTT(Trajectory):
    """Cazenavette et al., CVPR 2022: the loop as it is (algorithm 1), with one-hot labels, plain experts, start epochs
    below one bound T+, and a learned beta.

    `mtt` attains 27.2 ± 1.4 % on CIFAR-10 (JPEG) at IPC 1 (profile `small`, n=9; 261 s, AMD EPYC, 1 thread).
    """

    only: ClassVar = {
        "labels": ("hard",),
        "init": ("real", "noise", "kmeans"),
        "ema": (0.0,),
        "grow_from": (0,),
        "threshold": (0.0,),
    }


@register("tesla", paper="arXiv 2211.10586")
class TESLA(MTT):
    """Cui et al., ICML 2023: the gradient as a sum over steps that treats inner weights as constants (`gradient`:
    tesla), and on ImageNet-1K labels that a teacher assigns (`labels`: assigned), the expert at the segment's end.

    Its sums moved by rounding in commit 24b0c67, with the version as it was: ten steps of the case `tesla ten steps` of
    tests/contract/test_bits.py gave images that differ by less than a millionth of the largest value.

    `tesla` attains 27.2 ± 1.3 % on CIFAR-10 (JPEG) at IPC 1 (profile `small`, n=9; 737 s, Intel Xeon, 1 thread).
    """

    only: ClassVar = MTT.only | {"labels": ("hard", "assigned")}

    def segment_labels(self, expert: int, epoch: int, batches: list[Tensor]) -> Tensor:
        if self.config.labels == "hard":
            return self.labels
        # Y = softmax f(X; theta*_{t+M})
        if sum(map(len, batches)) >= len(self.raw):
            return self._logits(self.raw, expert, epoch).softmax(1)
        labels = self.raw.new_zeros(len(self.raw), self.data.num_classes)
        rows = torch.cat(batches)
        labels[rows] = self._logits(self.raw[rows], expert, epoch).softmax(1)
        return labels

    def final_labels(self) -> Tensor:
        """The classes, or the mean answer of all experts to the images (difference 3)."""
        if self.config.labels == "hard" or self.steps == 0:
            return self.labels
        epoch = self.config.max_start - 1 + self.config.expert_epochs
        blocks = []  # of images, so that few of the answers are in memory at once
        for images in self.images.split(500):
            answers = [self._logits(images, e, epoch) for e in range(len(self.experts))]
            blocks.append(torch.stack([logits.softmax(1) for logits in answers]).mean(0))
        return torch.cat(blocks)


@register("ftd", paper="arXiv 2211.11004")
class FTD(MTT):
    """Du et al., CVPR 2023: experts trained to be flat (`flat`), and the images' moving average as the result (`ema`).

    `ftd` attains 26.9 ± 1.4 % on CIFAR-10 (JPEG) at IPC 1 (profile `small`, n=9; 508 s, AMD EPYC, 1 thread).
    """

    only: ClassVar = {key: value for key, value in MTT.only.items() if key != "ema"}

    @property
    def images(self) -> Tensor:
        return self.average if self.config.ema else self.raw

    def update(self, velocity: dict[str, Tensor], moved: dict[str, Tensor]) -> None:
        super().update(velocity, moved)
        if self.config.ema:
            # X_ema = ema X_ema + (1 - ema) X
            self.average = self.config.ema * self.average + (1 - self.config.ema) * self.raw


@register("datm", paper="arXiv 2310.05773")
class DATM(FTD):
    """Guo et al., ICLR 2024: FTD whose start epochs come from a window that grows (`grow_from`, `grow_until`), whose
    labels Y = softmax(L) are learned from what the experts answer (`lr_label`), whose first images an expert gets right
    (`init`: correct), and which skips updates of a loss above `threshold`.

    `datm` attains 25.4 ± 2.0 % on CIFAR-10 (JPEG) at IPC 1 (profile `small`, n=9; 496 s, AMD EPYC, 1 thread).
    """

    only: ClassVar = {"labels": ("learned",)}
    criterion = staticmethod(soft_cross_entropy)

    def last_start(self) -> int:
        c = self.config
        if not c.grow_from:
            return c.max_start
        # T+(s) = grow_from + (T+ - grow_from) s / grow_until
        grown = int((c.max_start - c.grow_from) * self.steps / max(1, c.grow_until))
        return min(c.max_start, c.grow_from + grown)

    def segment_labels(self, expert: int, epoch: int, batches: list[Tensor]) -> Tensor:
        return self.logits

    def final_labels(self) -> Tensor:
        return self.logits.softmax(1)

    def first_images(self) -> Tensor:
        """`ipc` random real images of each class that an expert's last weights get right; where a class has too few,
        those that the next experts get right, and in the end others."""
        if self.config.init != "correct":
            return super().first_images()
        pool = self.data.sample(int(self.data.class_sizes().min()), self.rng("init"))
        turn = torch.full_like(pool, len(self.experts))  # of the experts, the first that is right
        for k in range(len(self.experts)):
            expert = (self.seed + k) % len(self.experts)
            blocks = (self.data.batch("train", rows) for rows in pool.flatten().split(500))
            answers = torch.cat([self._logits(images, expert, -1).argmax(1) for images in blocks])
            right = answers.unflatten(0, pool.shape) == self.classes[:, None]
            turn[right & (turn > k)] = k
            if ((turn <= k).sum(1) >= self.ipc).all():
                break
        order = turn.argsort(dim=1, stable=True)[:, : self.ipc]
        return self.data.batch("train", pool.gather(1, order).flatten())

    def first_logits(self, images: Tensor) -> Tensor:
        """The mean answer of the experts that are right about an image; the label, if none is."""
        total, count, largest = 0.0, 0.0, 0.0
        for expert in range(len(self.experts)):
            answers = self._logits(images, expert, -1)
            right = (answers.argmax(1) == self.labels).float()[:, None]
            total, count = total + answers * right, count + right
            largest = max(largest, answers.abs().max())
        one_hot = F.one_hot(self.labels, self.data.num_classes) * largest
        return torch.where(count > 0, total / count.clamp(min=1), one_hot)

    def gradients(self, found: list[Match]) -> dict[str, Tensor]:
        labels = torch.stack([m.labels for m in found]).mean(0)
        return super().gradients(found) | {"logits": labels}

    def moved(self, velocity: dict[str, Tensor], change: Tensor) -> dict[str, Tensor]:
        # L = L - lr_label v
        logits = self.logits - self.config.lr_label * velocity["logits"]
        return super().moved(velocity, change) | {"logits": logits}

    def counts(self, loss: Tensor) -> bool:
        return not self.config.threshold or bool(loss <= self.config.threshold)

    def step(self) -> dict[str, Tensor | int]:
        """As `Trajectory.step`; the loss of a skipped update is reported as `threshold` where it is not finite."""
        report, threshold = super().step(), self.config.threshold
        if threshold:
            report["loss"] = report["loss"].nan_to_num(threshold, posinf=threshold)
        if self.steps == 100 and self.skipped > 95:
            warnings.warn(
                f"{self.skipped} of the first 100 updates were skipped, for their loss was above threshold "
                f"{threshold}: raise it, or let segments start earlier"
            )
        return report
