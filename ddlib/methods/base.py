"""What a method is (`Method`), and a base that leaves to a paper's class the paper alone (`ImageMethod`).

    class DM(ImageMethod):
        def loss(self, synthetic, classes):
            ...                               # a scalar; the base moves the images down its gradient

A method owns its synthetic images. `engine.run` calls `step` as often as its Config's `iterations` say, keeps what
`state_dict` gives in checkpoints, and asks for `result` at evaluations and for `summary` once, after the last step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from ..augment.siamese import DSAParams, draw
from ..core import DDError, check_only, generator, option
from ..data.dataset import Dataset
from ..match.sampler import SAMPLINGS, Sampler, initial_rows
from ..nets.build import Backbone, build, initialise
from ..recipe import PRECISIONS
from ..train.loop import compiled, lowered


@dataclass(frozen=True)
class Result:
    """What a method hands over for evaluation: n = classes x IPC images, class by class.

    images: normalised float32 [n, C, H, W]; labels: int64 [n], or float32 [n, classes]; factor: that of the decoder
    (`ddlib.distilled.decode`); recipe: changes of the evaluation's recipe, e.g. {"lr": 0.02} for a learned step size.
    """

    images: Tensor
    labels: Tensor
    factor: int = 1
    recipe: Mapping[str, Any] = field(default_factory=dict)


class Asset(Protocol):
    """What a method needs made before it can start: expert trajectories, a teacher, a pool of trained networks.

    One that also says `paths(data, backbone)`, a list, and whose `make` takes `only=i` for the file i alone is made
    file by file on a cluster; any other by the task of the run itself.
    """

    def make(
        self, data: Dataset, backbone: str, *, compile: bool = False, progress: bool = True
    ) -> list[Path]:
        """Make what is not there yet; the files."""


class Method(Protocol):
    """The whole contract; nothing else is looked at. `ddlib.testing.check_method` tests it."""

    Config: ClassVar[type]  # a frozen dataclass with the field `iterations`
    version: ClassVar[int]  # raised when a change moves results: old records are then made anew
    images: Tensor  # as they stand, normalised [n, C, H, W]
    labels: Tensor

    def __init__(self, config: Any, data: Dataset, ipc: int, backbone: str, seed: int): ...

    def step(self) -> Mapping[str, Tensor | float]:
        """One update; numbers by name. Raises `DDError` before anything is changed where it cannot be made."""

    def state_dict(self) -> dict[str, Tensor]:
        """All that a resumed run needs: it ends in the same bytes."""

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None: ...

    def result(self) -> Result: ...

    def summary(self) -> dict[str, Any]:
        """Numbers for the record, asked for once, after the last step."""

    @classmethod
    def needs(cls, config: Any) -> Sequence[Asset]: ...


class BaseMethod:
    """Labels class by class, random streams by purpose, and the parts of the contract that most methods leave empty."""

    version: ClassVar[int] = 1
    preset: ClassVar[str] = ""  # stem of the YAML beside the class; "" is the method's name
    stream: ClassVar[str] = ""  # first word of every random stream; "" is the class's name
    # Whether runs that differ in IPC alone may go in lock step and share what `once` makes
    shares: ClassVar[bool] = False
    # What is this method's own: settings of a Config that methods share, and the values they may have here
    only: ClassVar[Mapping[str, tuple]] = {}

    def __init__(self, config: Any, data: Dataset, ipc: int, seed: int):
        check_only(type(self).__name__, self.only, config)
        self.config, self.data, self.ipc, self.seed, self.steps = config, data, ipc, seed, 0
        self.shared: dict[str, Any] = {}  # one for all runs that go in lock step
        self.classes = torch.arange(data.num_classes, device=data.device)
        self.labels = self.classes.repeat_interleave(ipc)
        self.dtype = data.batch(
            "train", slice(0, 1)
        ).dtype  # float32, unless the data are given otherwise

    def rng(self, *purpose: object) -> torch.Generator:
        """The random stream of a purpose, e.g. `rng("augment", step)`: a resumed run draws the same again."""
        return generator(self.seed, self.stream or type(self).__name__.lower(), *purpose)

    def once(self, settings: object, make: Callable[[], Any]) -> Any:
        """What `make` gives at this step, taken over from a run in lock step whose `settings` are the same."""
        key = (self.seed, self.steps, settings)
        if self.shared.get("key") != key:
            self.shared.update(key=key, value=make())
        return self.shared["value"]

    def network(self, backbone: str) -> Backbone:
        """A network on the data's device and in its precision (float64 data make all of it float64), untrained."""
        net = build(backbone, self.data.shape, self.data.num_classes)
        return net.to(self.data.device, self.dtype).requires_grad_(False).train()

    def finite(self, *tensors: Tensor) -> bool:
        """Whether all numbers are finite, to refuse a step before anything is changed.

        On a GPU looking would wait for it at every step: there the answer is yes, a loss that is reported turns NaN,
        and the engine stops the run before such images are kept.
        """
        return self.data.device.type == "cuda" or all(t.isfinite().all() for t in tensors)

    def result(self) -> Result:
        return Result(self.images, self.labels)

    def summary(self) -> dict[str, Any]:
        return {}

    @classmethod
    def needs(cls, config: Any) -> Sequence[Asset]:
        return ()


@dataclass(frozen=True)
class ImageConfig:
    """What methods share that move images by plain SGD. A subclass gives its paper's defaults and adds fields."""

    iterations: int = option(1000, least=0)  # steps
    lr_img: float = option(1.0, least=0)  # step size of the images
    momentum: float = option(0.5, least=0, below=1)  # of the image optimiser, plain SGD
    # Decay of the images' moving average, then the result; 0 is off
    ema: float = option(0.0, least=0, below=1)
    batch_real: int = option(256, least=1)  # real images per class and step; all of a smaller class
    # IPC real images per class, N(0, 1) pixels, or the images nearest to K-means centres (DREAM)
    init: str = option("real", allowed=("real", "noise", "kmeans"))
    augment: str = "color_crop_cutout_flip_scale_rotate"  # DSA, one operation per class and step
    chunk: int = option(0, least=0)  # images in one pass, whole classes; 0: what suits the device
    compile: bool = False  # torch.compile the network; same numbers to about 1e-5
    # Of the real images (DREAM, `ddlib.match.sampler`); all but random look at features
    sampling: str = option("random", allowed=SAMPLINGS)
    interval: int = option(10, least=1)  # image steps between two choices of them
    subsample: int = option(1, least=1)  # images per cluster
    pool: int = option(0, least=0)  # images of a class to choose from, drawn anew; 0 is all
    # Of the features that they are chosen by; no paper has bf16, so such a run is a changed method
    sampling_precision: str = option("float32", allowed=PRECISIONS)


def features_of(
    config: Any, net: Backbone, device: torch.device
) -> Callable[[Tensor], Tensor] | None:
    """The features of `net` that real images are chosen by, compiled or in bf16; None where the plain ones will do."""
    if config.sampling_precision == "float32" and not config.compile:
        return None
    features = lowered(net.features, device, config.sampling_precision)
    return compiled(features) if config.compile else features


def sampler_of(
    config: Any, data: Dataset, batch: int, features: Callable[[Tensor], Tensor] | None
) -> Sampler:
    """What chooses `batch` real images of each class as the config's sampling says; see `Sampler`."""
    return Sampler(
        data,
        batch,
        config.sampling,
        config.interval,
        config.subsample,
        pool=config.pool,
        features=features,
    )


class ImageMethod(BaseMethod):
    """Moves images by plain SGD with momentum down the gradient of `loss`, a chunk of classes at a time.

    Attributes: `net`, a network on the data's device; `trained` [n, C, H, W], the images as SGD moves them, and
    `images`, their moving average where `ema` is on, else the same; `sampler`, rows of real images, random or DREAM's;
    `batch`, real images per class; `steps`, so far.
    """

    Config: ClassVar[type] = ImageConfig

    def __init__(self, config: ImageConfig, data: Dataset, ipc: int, backbone: str, seed: int):
        super().__init__(config, data, ipc, seed)
        self.net = self.network(backbone)
        self.batch = min(config.batch_real, int(data.class_sizes().min()))
        self.features = features_of(config, self.net, data.device)
        self.sampler = sampler_of(config, data, self.batch, self.features)
        self.trained = self.first_images()
        self.average, self.velocity = self.trained, torch.zeros_like(self.trained)
        self.momentum, self.lr = config.momentum, config.lr_img

    @property
    def at_once(self) -> int:
        """Images in one pass through the network."""
        if self.config.chunk:
            return self.config.chunk
        # On a CPU a larger chunk leaves the cache and is half as fast; on a GPU a smaller one leaves it idle.
        if self.data.device.type == "cpu":
            return 256
        return 2**23 // (self.data.shape[1] * self.data.shape[2])  # 8,192 of 32 x 32 pixels

    # What a paper says

    def begin(self) -> None:
        """What a step draws once, before its chunks of classes: a network, real images, augmentation."""

    def loss(self, synthetic: Tensor, classes: slice) -> Tensor:
        """The loss of a chunk: images [c * IPC, C, H, W] of the classes `classes`, summed over these classes."""
        raise NotImplementedError("write `loss(synthetic, classes)`")

    # What serves it

    def first_rows(self, count: int) -> Tensor:
        """Training rows int64 [classes, count] to begin with: random, or nearest to K-means centres (`init`)."""
        if self.config.init == "kmeans":
            self.fresh_network()
            return initial_rows(self.net, self.data, count, self.rng("init"), self.features)
        return self.data.sample(count, self.rng("init"))

    def first_images(self) -> Tensor:
        """The images before the first step [n, C, H, W]."""
        real = self.data.batch("train", self.first_rows(self.ipc).flatten())
        if self.config.init != "noise":
            return real
        return torch.randn(real.shape, generator=self.rng("noise")).to(real)

    def fresh_network(self) -> Backbone:
        """`net` with weights drawn anew for this step."""
        return initialise(self.net, self.rng("network", self.steps))

    def draw_augmentation(self) -> DSAParams:
        """One transform per class for this step, to be shared by its real and its synthetic images."""
        shape, classes = self.data.shape[1:], self.data.num_classes
        return draw(self.config.augment, classes, shape, self.rng("augment", self.steps))

    def real_rows(self) -> Tensor:
        """Rows int64 [classes, batch] of this step's real images."""
        return self.sampler(self.net, self.steps, self.rng("real", self.steps))

    def chunks(self, each: int) -> list[slice]:
        """The classes in groups that go through the network together, `each` images of every class.

        Slices, so that taking a group is a view: an index would make a GPU wait.
        """
        classes = self.data.num_classes
        size = classes if self.net.couples_samples else max(1, self.at_once // each)
        return [slice(k, min(k + size, classes)) for k in range(0, classes, size)]

    def class_labels(self, classes: slice, each: int) -> Tensor:
        """Labels int64 [c, each] of a chunk; a view."""
        return self.classes[classes, None].expand(-1, each)

    # The step

    @property
    def images(self) -> Tensor:
        return self.average if self.config.ema else self.trained

    def step(self) -> dict[str, Tensor]:
        """One update of all images; returns the loss before it, divided by the number of classes."""
        self.begin()
        loss, gradient = self.gradient()
        self.refuse(loss, gradient)
        self.move(gradient)
        self.steps += 1
        return {"loss": loss / self.data.num_classes}

    def gradient(self) -> tuple[Tensor, Tensor]:
        """The loss, summed over classes, and its gradient [n, C, H, W]."""
        images, gradients, losses = self.trained.unflatten(0, (-1, self.ipc)), [], []
        for classes in self.chunks(self.ipc):
            synthetic = images[classes].flatten(0, 1).detach().requires_grad_()
            loss = self.loss(synthetic, classes)
            gradients += torch.autograd.grad(loss, synthetic)
            losses.append(loss.detach())
        return sum(losses), torch.cat(gradients)

    def move(self, gradient: Tensor) -> None:
        """SGD: v = momentum v + gradient, x = x - lr v; and the moving average of x."""
        self.velocity = self.velocity.mul(self.momentum).add_(gradient)
        self.trained = self.trained.sub(self.velocity, alpha=self.lr)
        self.average = torch.lerp(self.trained, self.average, self.config.ema)

    def refuse(self, loss: Tensor, gradient: Tensor) -> None:
        """Raise `DDError`, before anything is changed, where loss or gradient is not `finite`."""
        if self.finite(loss, gradient):
            return
        raise DDError(
            f"{self.stream or type(self).__name__} diverged at step {self.steps + 1}: the loss is "
            f"{float(loss):.3g} or its gradient is not finite; lower the step size lr_img "
            f"({self.config.lr_img})"
        )

    # The names of these tensors stand in checkpoints.

    def state_dict(self) -> dict[str, Tensor]:
        state = {
            "raw": self.trained,
            "average": self.average,
            "velocity": self.velocity,
            "steps": torch.tensor(self.steps),
        }
        return state | ({} if self.sampler.rows is None else {"rows": self.sampler.rows})

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        device = self.data.device
        self.trained, self.velocity = state["raw"].to(device), state["velocity"].to(device)
        self.average = state.get("average", state["raw"]).to(device)
        self.steps = int(state["steps"])
        self.sampler.rows = state["rows"].to(device) if "rows" in state else None
