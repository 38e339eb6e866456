"""The gradient of trajectory matching, exact and at constant memory.

N steps of SGD on the synthetic images X (labels Y, step sizes beta_i) lead from an expert's weights theta_0 to theta_N:

    g_i = grad_theta l(theta_i; A_i(X[b_i]), Y[b_i]),   v_{i+1} = mu v_i + g_i,   theta_{i+1} = theta_i - beta_i v_{i+1}
    L = ||theta_N - theta*||^2 / D,   D = ||theta_0 - theta*||^2                        (MTT, arXiv 2203.11932, eq. 3)

`adjoint` (the default) keeps the N weight vectors and runs the adjoint recursion backwards over them, one step's graph
at a time. With lambda_N = 2 (theta_N - theta*) / D and, without momentum, a_i = -beta_i lambda_{i+1}:

    lambda_i = lambda_{i+1} + H_i a_i,   dL/dX += (d g_i / dX)^T a_i,   dL/dbeta_i = -lambda_{i+1} . g_i

which is the derivative of the unrolled graph to rounding. `tesla` (Cui et al., arXiv 2211.10586) holds every theta_i
fixed: lambda_{i+1} := lambda_N, no Hessian products; the same numbers for the last step only. `tesla_repo` halves its
image gradient, as the released code does. `unroll` keeps the whole graph (MTT), `checkpoint` recomputes it step by step
(torch.utils.checkpoint); both are oracles here. `window=K` is the adjoint over the last K steps, earlier ones dropped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import grad
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from ..augment.siamese import DSAParams, augment
from ..core import DDError, choose
from ..nets.build import Backbone

ENGINES = ("adjoint", "tesla", "tesla_repo", "unroll", "checkpoint", "window=K")


class FlatNet:
    """A network as a function of one flat parameter vector theta [P]: `net(theta, x)` gives logits."""

    def __init__(self, net: Backbone):
        if net.couples_samples:
            raise DDError(
                f"{net.spec} has BatchNorm, whose statistics a parameter vector leaves out; allowed here: "
                "norm=in, ln, gn or none"
            )
        self.net = net
        self.names, tensors = zip(*net.named_parameters(), strict=True)
        self.shapes = [tensor.shape for tensor in tensors]
        self.sizes = [tensor.numel() for tensor in tensors]
        self.size = sum(self.sizes)

    def __call__(self, theta: Tensor, x: Tensor) -> Tensor:
        pieces = (
            piece.view(shape)
            for piece, shape in zip(theta.split(self.sizes), self.shapes, strict=True)
        )
        return functional_call(self.net, dict(zip(self.names, pieces, strict=True)), (x,))

    def vector(self) -> Tensor:
        """A copy of the network's present parameters as one vector: never a view, which would change with them."""
        return torch.cat([parameter.detach().flatten() for parameter in self.net.parameters()])


@dataclass(frozen=True)
class Segment:
    """What one outer iteration matches: from `start` [P] to `target` [P] in len(batches) steps.

    `batches[i]` is the int64 index of step i's images, `params[i]` their DSA draw, or None for no augmentation.
    """

    start: Tensor
    target: Tensor
    batches: list[Tensor]
    params: list[DSAParams | None]

    @property
    def distance(self) -> Tensor:
        return (self.start - self.target).square().sum()


@dataclass(frozen=True)
class Match:
    """The matching loss and its gradients: images [n, C, H, W], labels [n, classes] or None, rates [N]."""

    loss: Tensor
    images: Tensor
    labels: Tensor | None
    rates: Tensor
    final: Tensor  # theta_N


def parse_engine(engine: str) -> tuple[str, int | None]:
    """(name, window): "window=5" is the adjoint over the last five steps."""
    if engine.startswith("window="):
        if not engine[7:].isdecimal() or int(engine[7:]) < 1:
            raise DDError(
                f"gradient {engine!r}: K of window=K must be a whole number of at least 1"
            )
        return "adjoint", int(engine[7:])
    return str(choose("gradient", engine, ENGINES[:-1])), None


def match(
    net: FlatNet,
    segment: Segment,
    images: Tensor,
    labels: Tensor,
    rates: Tensor,
    engine: str = "adjoint",
    *,
    momentum: float = 0.0,
    micro: int = 0,
    criterion: Callable = F.cross_entropy,
) -> Match:
    """L of `segment` and its gradient by `engine`; `rates` [N] are the step sizes, one a step.

    `micro` splits every step's batch into pieces of so many images, which changes nothing but the memory (not for
    `unroll` and `checkpoint`). `criterion(logits, labels)` is the batch mean; labels are int64 [n], or float
    [n, classes], whose gradient is then returned. Raises `DDError` for a segment of zero length.
    """
    name, window = parse_engine(engine)
    if len(rates) != len(segment.batches) or len(segment.params) != len(segment.batches):
        raise DDError(
            f"{len(segment.batches)} steps need as many rates and augmentations, not {len(rates)} and "
            f"{len(segment.params)}"
        )
    if not segment.start.is_meta and not segment.distance > 0:
        raise DDError(
            "the expert stands still between the segment's ends: zero distance to match; choose another "
            "start epoch, or train the experts with a larger step size"
        )
    images, labels, rates = images.detach(), labels.detach(), rates.detach()
    if name in ("unroll", "checkpoint"):
        return _through_graph(
            net, segment, images, labels, rates, momentum, criterion, name == "checkpoint"
        )
    if name.startswith("tesla") and momentum:
        raise DDError(
            "tesla's gradient is defined for inner steps without momentum; allowed with it: adjoint, unroll"
        )
    return _adjoint(net, segment, images, labels, rates, momentum, criterion, micro, name, window)


def _through_graph(
    net: FlatNet,
    segment: Segment,
    images: Tensor,
    labels: Tensor,
    rates: Tensor,
    momentum: float,
    criterion: Callable,
    recompute: bool,
) -> Match:
    images, rates = images.requires_grad_(), rates.requires_grad_()
    labels = labels.requires_grad_() if labels.is_floating_point() else labels
    theta = segment.start.clone().requires_grad_()
    velocity = torch.zeros_like(theta)
    for i, (index, params) in enumerate(zip(segment.batches, segment.params, strict=True)):
        x = images[index] if params is None else augment(images[index], params)

        def step(
            theta: Tensor, velocity: Tensor, x: Tensor, y: Tensor, rate: Tensor
        ) -> tuple[Tensor, Tensor]:
            velocity = (
                momentum * velocity + grad(criterion(net(theta, x), y), theta, create_graph=True)[0]
            )
            return theta - rate * velocity, velocity

        arguments = (theta, velocity, x, labels[index], rates[i])
        theta, velocity = (
            checkpoint(step, *arguments, use_reentrant=False) if recompute else step(*arguments)
        )
    loss = (theta - segment.target).square().sum() / segment.distance
    wanted = [images, rates] + ([labels] if labels.is_floating_point() else [])
    dx, drates, *dy = grad(loss, wanted)
    return Match(loss.detach(), dx, dy[0] if dy else None, drates, theta.detach())


def _pieces(images: Tensor, labels: Tensor, index: Tensor, params: DSAParams | None, micro: int):
    """(rows, images, labels, augmentation, share of the batch) of a step's batch, in pieces of `micro` images."""
    size = micro or len(index)
    for start in range(0, len(index), size):
        rows = slice(start, start + size)
        at = index[rows]
        chosen = None if params is None else params.select(rows)
        yield at, images[at], labels[at], chosen, len(at) / len(index)


def _adjoint(
    net: FlatNet,
    segment: Segment,
    images: Tensor,
    labels: Tensor,
    rates: Tensor,
    momentum: float,
    criterion: Callable,
    micro: int,
    name: str,
    window: int | None,
) -> Match:
    steps, tesla, soft = len(rates), name.startswith("tesla"), labels.is_floating_point()

    def pieces(i: int, theta: Tensor, graph: bool):
        """g_i piece by piece: (rows, images, labels, their part of g_i), with a `graph` to differentiate once more."""
        for at, x, y, params, share in _pieces(
            images, labels, segment.batches[i], segment.params[i], micro
        ):
            x, y = (x.requires_grad_(), y.requires_grad_() if soft else y) if graph else (x, y)
            loss = share * criterion(net(theta, x if params is None else augment(x, params)), y)
            yield at, x, y, grad(loss, theta, create_graph=graph)[0]

    theta, thetas, velocities = segment.start.detach(), [], []
    velocity, kept = torch.zeros_like(theta), None
    for i in range(steps):
        thetas.append(theta.detach().requires_grad_())
        found = pieces(i, thetas[-1], graph=i == steps - 1 and not micro)
        if (
            i == steps - 1 and not micro
        ):  # the way back begins with this graph: no need to build it again
            found = kept = list(found)
        g = sum(part.detach() for *_, part in found)
        velocity = momentum * velocity + g if momentum else g
        if momentum:
            velocities.append(velocity)
        theta = theta - rates[i] * velocity
    residual = theta - segment.target
    loss, last = residual.square().sum() / segment.distance, 2 * residual / segment.distance

    dx, drates = torch.zeros_like(images), torch.zeros_like(rates)
    dy = torch.zeros_like(labels) if soft else None
    adjoint, carried = last, torch.zeros_like(last)  # lambda_{i+1} of theta and of the velocity
    first = max(0, steps - (window or steps))
    for i in reversed(range(first, steps)):
        direction, at_theta = carried - rates[i] * adjoint, thetas.pop()
        hessian, g, product = (
            not tesla and i > first,
            torch.zeros_like(last),
            torch.zeros_like(last),
        )
        for at, x, y, part in kept or pieces(i, at_theta, graph=True):
            g += part.detach()
            found = list(
                grad(
                    part @ direction, [x] + ([y] if soft else []) + ([at_theta] if hessian else [])
                )
            )
            if hessian:
                product += found.pop()
            dx.index_add_(0, at, found[0])
            if soft:
                dy.index_add_(0, at, found[1])
        kept = None
        drates[i] = -adjoint @ (velocities.pop() if momentum else g)
        if hessian:
            adjoint, carried = adjoint + product, momentum * direction
    if name == "tesla_repo":
        dx /= 2
    return Match(loss, dx, dy, drates, theta)
