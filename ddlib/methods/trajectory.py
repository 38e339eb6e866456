"""Trajectory matching: MTT (arXiv 2203.11932), TESLA (2211.10586), FTD (2211.11004) and DATM (2310.05773).

Each iteration draws an expert and a start epoch t, trains from theta*_t on the synthetic set for N steps, and moves
images X, step size beta and, where they are learned, labels Y down the gradient of

    L = ||theta_N - theta*_{t+M}||^2 / ||theta*_t - theta*_{t+M}||^2

The four methods differ by arguments only: how the gradient is taken (`ddlib.match.trajectory`), which experts are matched
(`ddlib.experts`), where segments start, and what the labels are. Differences from the released codes:
1. The default gradient is the exact adjoint, at TESLA's memory; the mtt, ftd and datm presets use it in place of the
   unrolled graph (same value), the tesla preset keeps `tesla_repo`, for which its image step sizes were chosen.
2. beta changes by at most `clip_rate` of itself an iteration, which keeps it positive; 0 switches that off.
3. TESLA's soft labels for the evaluation are the mean over experts at the last epoch that a segment can end in, not
   those of whichever segment came last.
4. The EMA of FTD is evaluated with fresh networks; the released code goes on training the raw images' networks.
5. Draws come from (seed, iteration), not from the clock.
6. DREAM plugs in (`ddlib.match.sampler`, ours for these hosts): K-means initialisation, experts on representatives.
7. DATM's first logits are a mean over experts also with `init=real`, where the release asks one expert.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.utils import vector_to_parameters

from ..augment.siamese import draw
from ..core import DDError, generator, option
from ..data.dataset import Dataset
from ..experts import ExpertRecipe, ExpertSet, load_experts
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
    grow_from: int = option(
        0, least=0
    )  # DATM: the window's upper end at iteration 0; 0 is max_start throughout
    grow_until: int = option(0, least=0)  # DATM: the iteration at which it has grown to max_start
    batch_syn: int = option(0, least=0)  # images an inner step; 0 is all of them
    lr_img: float = option(100.0, least=0)  # step size of the images
    lr_lr: float = option(1e-7, least=0)  # step size of beta
    lr_teacher: float = option(0.01, least=0)  # beta at the start
    lr_label: float = option(0.0, least=0)  # step size of learned label logits, momentum 0.9
    momentum: float = option(0.5, least=0, below=1)  # of images and beta
    labels: str = option(
        "hard", allowed=("hard", "assigned", "learned")
    )  # one-hot, TESLA's teacher, DATM's logits
    init: str = option(
        "real", allowed=("real", "correct", "noise", "kmeans")
    )  # correct: images an expert gets right
    init_epoch: int = option(
        0, least=0
    )  # kmeans: clusters features of an expert after so many epochs
    ema: float = option(
        0.0, least=0, below=1
    )  # FTD: decay of the images' moving average, then the result; 0: off
    threshold: float = option(0.0, least=0)  # DATM: skip an update whose loss is above it; 0 is off
    segments: int = option(1, least=1)  # segments an iteration, their gradients averaged
    clip_rate: float = option(
        0.05, least=0
    )  # largest relative change of beta an iteration; 0 is off
    micro: int = option(0, least=0)  # images in one graph; 0 is the whole inner batch
    keep: int = option(1, least=1)  # last steps whose graphs wait in memory; no matter otherwise
    augment: str = "color_crop_cutout_flip_scale_rotate"  # DSA, one operation an inner step
    experts: int = option(100, least=1)  # trajectories to draw from
    expert_total: int = option(50, least=1)  # epochs each expert was trained
    expert_lr: float = option(0.01, least=0)
    expert_batch: int = option(256, least=1)
    expert_sampling: str = option("random", allowed=("random", "dream"))  # of the experts' batches
    flat: str = option(
        "plain", allowed=("plain", "sam", "agsam")
    )  # FTD: paper's SAM, or its code's adaptive GSAM
    rho: float = option(0.01, least=0)  # radius of flat experts
    alpha: float = option(1.0, least=0)  # weight of flatness

    def __post_init__(self) -> None:
        parse_engine(self.gradient)  # here, so that a wrong one is named before experts are trained
        if (
            self.flat == "plain"
        ):  # where rho and alpha do nothing, and so must not make another run of it
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


def soft_cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Batch mean of -sum softmax(labels) log softmax(logits): DATM's loss on learned label logits."""
    return F.cross_entropy(logits, labels.softmax(1))


class Trajectory(BaseMethod):
    """Trajectory matching of `ipc` images a class on `data`; needs experts (`ddlib.experts.train_experts`)."""

    Config, version, preset = Config, 1, "trajectory"

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
        self.raw, self.logits = self._initial()
        self.average = self.raw.clone()
        self.rate = torch.tensor(config.lr_teacher, device=data.device)
        self.velocity = {
            "raw": torch.zeros_like(self.raw),
            "rate": torch.zeros_like(self.rate),
            "logits": torch.zeros_like(self.logits),
        }

    def _theta(self, expert: int, epoch: int) -> torch.Tensor:
        return self.experts.weights[expert][epoch].to(self.data.device, self.dtype)

    def _initial(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Images [n, C, H, W] and, for learned labels, logits [n, classes] (else empty)."""
        config, data, empty = self.config, self.data, torch.zeros(0, device=self.data.device)
        if config.init == "noise":
            images = torch.randn(
                (len(self.labels), *data.shape),
                generator=generator(self.seed, "trajectory", "noise"),
            )
            images = images.to(data.device, self.dtype)
        elif config.init == "real":
            images = data.batch(
                "train", data.sample(self.ipc, generator(self.seed, "trajectory", "init")).flatten()
            )
        elif config.init == "kmeans":
            vector_to_parameters(
                self._theta(self.seed % len(self.experts), config.init_epoch),
                self.net.net.parameters(),
            )
            rows = initial_rows(
                self.net.net, data, self.ipc, generator(self.seed, "trajectory", "init")
            )
            images = data.batch("train", rows.flatten())
        else:
            images = self._correct_images()
        if config.labels != "learned":
            return images, empty
        answers = torch.stack([self._logits(images, e, -1) for e in range(len(self.experts))])
        right = (answers.argmax(2) == self.labels).float()[..., None]
        mean = (answers * right).sum(0) / right.sum(0).clamp(
            min=1
        )  # over the experts that are right ...
        one_hot = (
            F.one_hot(self.labels, data.num_classes) * answers.abs().max()
        )  # ... or the label, if none is
        return images, torch.where(right.sum(0) > 0, mean, one_hot)

    @torch.no_grad()
    def _logits(self, images: torch.Tensor, expert: int, epoch: int) -> torch.Tensor:
        theta = self._theta(expert, epoch)
        return torch.cat([self.net(theta, x) for x in images.split(500)])

    def _correct_images(self) -> torch.Tensor:
        """`ipc` random real images a class that an expert's last weights get right, topped up with others."""
        pool = self.data.sample(
            min(50 + self.ipc, int(self.data.class_sizes().min())),
            generator(self.seed, "trajectory", "init"),
        )
        found = self._logits(
            self.data.batch("train", pool.flatten()), self.seed % len(self.experts), -1
        )
        wrong = (
            found.argmax(1).unflatten(0, pool.shape)
            != torch.arange(len(pool), device=pool.device)[:, None]
        )
        order = wrong.int().argsort(dim=1, stable=True)[:, : self.ipc]
        return self.data.batch("train", pool.gather(1, order).flatten())

    @property
    def images(self) -> torch.Tensor:
        return self.average if self.config.ema else self.raw

    def final_labels(self) -> torch.Tensor:
        """The classes, DATM's learned labels, or (TESLA) the mean answer of all experts to the images."""
        if self.config.labels == "learned":
            return self.logits.softmax(1)
        if self.config.labels == "hard" or self.steps == 0:
            return self.labels
        epoch = self.config.max_start - 1 + self.config.expert_epochs
        answers = [self._logits(self.images, e, epoch) for e in range(len(self.experts))]
        return torch.stack([logits.softmax(1) for logits in answers]).mean(0)

    def result(self) -> Result:
        """The set with its learned step size."""
        return Result(self.images, self.final_labels(), recipe={"lr": float(self.rate)})

    @classmethod
    def needs(cls, config: Config) -> list[ExpertSet]:
        return [ExpertSet(config.expert_recipe, config.experts)]

    def _window(self) -> int:
        c = self.config
        if not c.grow_from:
            return c.max_start
        return min(
            c.max_start,
            c.grow_from + int((c.max_start - c.grow_from) * self.steps / max(1, c.grow_until)),
        )

    def segment(
        self, rng: torch.Generator, place: tuple[int, int] | None = None
    ) -> tuple[Segment, torch.Tensor]:
        """A random segment, or that of `place` = (expert, start epoch), and the labels that its steps train on."""
        c, n = self.config, len(self.labels)
        expert, start = place or (
            int(torch.randint(len(self.experts), (), generator=rng)),
            int(
                torch.randint(c.min_start, max(self._window(), c.min_start + 1), (), generator=rng)
            ),
        )
        batches: list[torch.Tensor] = []
        while len(batches) < c.syn_steps:
            batches += torch.randperm(n, generator=rng).to(self.data.device).split(c.batch_syn or n)
        batches = batches[: c.syn_steps]
        params = [
            draw(c.augment, len(b), self.data.shape[1:], rng, op_every=len(b)) for b in batches
        ]
        target = self._theta(expert, start + c.expert_epochs)
        labels = {"hard": self.labels, "learned": self.logits}.get(c.labels)
        if labels is None:
            labels = self._logits(self.raw, expert, start + c.expert_epochs).softmax(1)
        return Segment(self._theta(expert, start), target, batches, params), labels

    def match(self, segment: Segment, labels: torch.Tensor, gradient: str | None = None) -> Match:
        """Loss and gradients of one segment at the present images and step size."""
        criterion = soft_cross_entropy if self.config.labels == "learned" else F.cross_entropy
        return match(
            self.net,
            segment,
            self.raw,
            labels,
            self.rate.expand(len(segment.batches)),
            gradient or self.config.gradient,
            micro=self.config.micro,
            keep=self.config.keep,
            criterion=criterion,
        )

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
            self.raw, self.logits = self._initial()
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

    def step(self) -> dict[str, float]:
        """One update of images, step size and labels; returns the matching loss and beta.

        Raises `DDError`, before anything is changed, when the loss or a gradient is not finite or beta would turn
        negative.
        """
        c = self.config
        found = [
            self.match(*self.segment(generator(self.seed, "trajectory", self.steps, k)))
            for k in range(c.segments)
        ]
        loss = torch.stack([m.loss for m in found]).mean()
        gradients = {
            "raw": torch.stack([m.images for m in found]).mean(0),
            "rate": torch.stack([m.rates.sum() for m in found]).mean(),
        }
        if c.labels == "learned":
            gradients["logits"] = torch.stack([m.labels for m in found]).mean(0)
        if not all(torch.isfinite(value).all() for value in (loss, *gradients.values())):
            raise DDError(
                f"the matching loss is {float(loss)} at step {self.steps + 1}: lower lr_img ({c.lr_img}), "
                f"lr_lr ({c.lr_lr}) or lr_teacher ({c.lr_teacher}); beta is {float(self.rate):.3g}"
            )
        if not c.threshold or loss <= c.threshold:
            self._update(gradients)
        else:
            self.skipped += 1
        self.steps += 1
        if self.steps == 100 and self.skipped > 95:
            warnings.warn(
                f"{self.skipped} of the first 100 updates were skipped, for their loss was above threshold "
                f"{c.threshold}: raise it, or let segments start earlier"
            )
        return {"loss": float(loss), "beta": float(self.rate), "skipped": self.skipped}

    def _update(self, gradients: dict[str, torch.Tensor]) -> None:
        c = self.config
        velocity = {
            key: (0.9 if key == "logits" else c.momentum) * self.velocity[key] + gradient
            for key, gradient in gradients.items()
        }
        change = -c.lr_lr * velocity["rate"]
        if c.clip_rate:
            change = change.clamp(-c.clip_rate * self.rate, c.clip_rate * self.rate)
        if not self.rate + change > 0:
            raise DDError(
                f"the step size beta would turn from {float(self.rate):.3g} to "
                f"{float(self.rate + change):.3g} at step {self.steps + 1}: lower lr_lr ({c.lr_lr}) or set "
                "clip_rate between 0 and 1"
            )
        moved = {"rate": self.rate + change, "raw": self.raw - c.lr_img * velocity["raw"]}
        if c.labels == "learned":
            moved["logits"] = self.logits - c.lr_label * velocity["logits"]
        if not all(torch.isfinite(value).all() for value in moved.values()):
            raise DDError(
                f"images, labels or beta would not be finite after step {self.steps + 1}: lower lr_img "
                f"({c.lr_img}) or lr_label ({c.lr_label})"
            )
        self.velocity |= velocity
        for key, value in moved.items():
            setattr(self, key, value)
        if c.ema:
            self.average = c.ema * self.average + (1 - c.ema) * self.raw

    def state_dict(self) -> dict[str, torch.Tensor]:
        state = {
            "raw": self.raw,
            "average": self.average,
            "rate": self.rate,
            "logits": self.logits,
            "count": torch.tensor([self.steps, self.skipped]),
        }
        return state | {f"velocity_{key}": value for key, value in self.velocity.items()}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        state = {key: value.to(self.data.device) for key, value in state.items()}
        self.steps, self.skipped = state.pop("count").tolist()
        self.velocity = {key: state.pop(f"velocity_{key}") for key in self.velocity}
        for key, value in state.items():
            setattr(self, key, value)


# What each paper changes. Numbers, and where they come from, stand in trajectory.yaml.


@register("mtt", paper="arXiv 2203.11932")
class MTT(Trajectory):
    """Cazenavette et al., CVPR 2022: hard labels, plain experts, start epochs below one bound, beta learned."""


@register("tesla", paper="arXiv 2211.10586")
class TESLA(Trajectory):
    """Cui et al., ICML 2023: the gradient as a sum over steps that treats inner weights as constants (`gradient`), and
    on ImageNet-1K labels that a teacher assigns (`labels`)."""


@register("ftd", paper="arXiv 2211.11004")
class FTD(Trajectory):
    """Du et al., CVPR 2023: experts trained to be flat (`flat`), and the images' moving average as the result (`ema`)."""


@register("datm", paper="arXiv 2310.05773")
class DATM(Trajectory):
    """Guo et al., ICLR 2024: start epochs from a window that grows (`grow_from`, `grow_until`), soft labels that are
    learned (`labels`), and images to begin with that an expert gets right (`init`)."""
