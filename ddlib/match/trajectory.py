"""The gradient of trajectory matching, exact, with one step's graph in memory at a time.

N steps of SGD on the synthetic images X (labels Y, step sizes beta_i) lead from an expert's weights theta_0 to theta_N:

    g_i = grad_theta l(theta_i; A_i(X[b_i]), Y[b_i]),   v_{i+1} = mu v_i + g_i,   theta_{i+1} = theta_i - beta_i v_{i+1}
    L = ||theta_N - theta*||^2 / D,   D = ||theta_0 - theta*||^2                        (MTT, arXiv 2203.11932, eq. 3)

`adjoint` (the default) keeps the N weight vectors, or the N steps between them, and runs the adjoint recursion
backwards over them, one step's graph at a time. With lambda_N = 2 (theta_N - theta*) / D and, without momentum,
a_i = -beta_i lambda_{i+1}:

    lambda_i = lambda_{i+1} + H_i a_i,   dL/dX += (d g_i / dX)^T a_i,   dL/dbeta_i = -lambda_{i+1} . g_i

which is the derivative of the unrolled graph to rounding. `tesla` (Cui et al., arXiv 2211.10586) holds every theta_i
fixed: lambda_{i+1} := lambda_N, no Hessian products; the same numbers for the last step only. Its terms can be summed
in any order, so it walks the way a second time from theta_0 and keeps no weights at all, where the released code keeps
those of every step. `tesla_repo` halves its image gradient, as that code does. `unroll` keeps the whole graph (MTT),
`checkpoint` recomputes it step by step (torch.utils.checkpoint); both are oracles here. `window=K` is the adjoint over
the last K steps, earlier ones dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
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
from .inner import CompiledStep

ENGINES = ("adjoint", "tesla", "tesla_repo", "unroll", "checkpoint", "window=K")


class FlatNet:
    """A network as a function of one flat parameter vector theta [P]: `net(theta, x)` gives logits.

    `layout` is the memory format of images and kernels; None leaves them as they are.
    """

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

    def __call__(
        self, theta: Tensor, x: Tensor, layout: torch.memory_format | None = None
    ) -> Tensor:
        def laid(value: Tensor) -> Tensor:
            return value.contiguous(memory_format=layout) if layout and value.dim() == 4 else value

        pieces = (
            laid(piece.view(shape))
            for piece, shape in zip(theta.split(self.sizes), self.shapes, strict=True)
        )
        return functional_call(self.net, dict(zip(self.names, pieces, strict=True)), (laid(x),))

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
    keep: int = 1,
    criterion: Callable = F.cross_entropy,
    inner: CompiledStep | None = None,
) -> Match:
    """L of `segment` and its gradient by `engine`; `rates` [N] are the step sizes, one a step.

    `micro` splits every step's batch into pieces of so many images, which changes nothing but the memory (not for
    `unroll` and `checkpoint`). `keep` graphs of the last steps wait in memory for the way back, the others are built
    again: the same numbers to rounding, in less time (not with `micro`; a step at IPC 1 and width 128 takes 31 MiB).
    `criterion(logits, labels)` is the batch mean; labels are int64 [n], or float
    [n, classes], whose gradient is then returned. `inner`, of the same network and criterion, takes the steps in
    compiled graphs (not for `unroll` and `checkpoint`). Raises `DDError` for a segment of zero length.
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
    steps = _Steps(net, segment, images, labels, criterion, micro, inner)
    # In pieces the graphs are there to be small, so that none outlives its piece.
    keep = 0 if micro else min(keep, len(rates))
    if name == "adjoint":
        return _adjoint(steps, rates, momentum, window, keep)
    found = _tesla(steps, rates, keep)
    if name == "tesla_repo":
        found.images.div_(2)
    return found


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


@dataclass(frozen=True)
class _Piece:
    """`micro` images of a step with the graph of their part of g_i.

    rows: which images. g: their part, where it is known before the way back. products: from a direction to that part,
    unless `known` says that it is not needed again, its pull on these images, on their labels where those are soft, and
    H direction where that was asked for.
    """

    rows: Tensor
    g: Tensor | None
    products: Callable[[Tensor], list[Tensor]]


@dataclass(frozen=True)
class _Steps:
    """The inner steps' batches and what they minimise."""

    net: FlatNet
    segment: Segment
    images: Tensor
    labels: Tensor
    criterion: Callable
    micro: int
    inner: CompiledStep | None

    @property
    def soft(self) -> bool:
        return self.labels.is_floating_point()

    def batch(self, i: int, graph: bool) -> Iterator[tuple]:
        """Step i's images, `micro` at a time: (rows, leaf images, their augmentation, labels, share of the batch)."""
        index, params = self.segment.batches[i], self.segment.params[i]
        size = self.micro or len(index)
        for start in range(0, len(index), size):
            piece = slice(start, start + size)
            rows = index[piece]
            x = self.images[rows].requires_grad_(graph)
            y = self.labels[rows].requires_grad_(graph and self.soft)
            seen = x if params is None else augment(x, params.select(piece))
            yield rows, x, seen, y, len(rows) / len(index)

    def gradient(self, i: int, theta: Tensor) -> Tensor:
        """g_i without a graph."""

        def part(seen: Tensor, y: Tensor, share: float) -> Tensor:
            if self.inner:
                return share * self.inner.gradient(theta, seen, y)
            return grad(share * self.criterion(self.net(theta, seen), y), theta)[0]

        return sum(part(seen, y, share) for _, _, seen, y, share in self.batch(i, graph=False))

    def pieces(
        self, i: int, theta: Tensor, hessian: bool, keep: bool = False, known: bool = False
    ) -> Iterator[_Piece]:
        """g_i piece by piece with its graph; those of the way forward are to `keep`."""
        for images in self.batch(i, graph=True):
            if self.inner:
                yield self._compiled(images, theta, hessian, keep, known)
            else:
                yield self._eager(images, theta, hessian)

    def _eager(self, images: tuple, theta: Tensor, hessian: bool) -> _Piece:
        rows, x, seen, y, share = images
        loss = share * self.criterion(self.net(theta, seen), y)
        part = grad(loss, theta, create_graph=True)[0]
        wanted = [x, *([y] if self.soft else []), *([theta] if hessian else [])]
        return _Piece(rows, part.detach(), lambda a: [part.detach(), *grad(part @ a, wanted)])

    def _compiled(
        self, images: tuple, theta: Tensor, hessian: bool, keep: bool, known: bool
    ) -> _Piece:
        rows, x, seen, y, share = images
        primals = (theta.detach(), seen.detach(), y.detach())
        g, back = self.inner.split(*primals, hessian) if keep else (None, None)

        def products(a: Tensor) -> list[Tensor]:
            if keep:
                found = [*([] if known else [g]), *back(a)]
            else:
                found = self.inner.products(*primals, a, hessian, known)
            found = [share * value for value in found]
            pull = 0 if known else 1
            if seen is not x:
                found[pull] = grad(seen, x, found[pull])[0]
            return found

        return _Piece(rows, share * g if keep else None, products)


@dataclass
class _Way:
    """What the way forward leaves for the way back: from step `first` on each theta_i and, with momentum, each
    v_{i+1}; only the latter where g_i is `known` from it. And pieces of the last steps with their graphs, by step."""

    thetas: list[Tensor]
    velocities: list[Tensor]
    kept: dict[int, list[_Piece]]
    final: Tensor


def _forward(
    steps: _Steps,
    rates: Tensor,
    momentum: float,
    first: int,
    keep: int,
    hessian: Callable[[int], bool],
    known: bool = False,
) -> _Way:
    theta = steps.segment.start.detach()
    velocity, way = torch.zeros_like(theta), _Way([], [], {}, theta)
    for i, rate in enumerate(rates):
        at = theta.detach().requires_grad_()
        if i >= len(rates) - keep:
            pieces = way.kept[i] = list(steps.pieces(i, at, hessian(i), True, known))
            g = sum(piece.g for piece in pieces)
        else:
            g = steps.gradient(i, at)
        velocity = momentum * velocity + g if momentum else g
        if i >= first and not known:
            way.thetas.append(at)
        if i >= first and (known or momentum):
            way.velocities.append(velocity)
        theta = theta - rate * velocity
    way.final = theta
    return way


def _unfilled(steps: _Steps, rates: Tensor, final: Tensor) -> tuple[Match, Tensor]:
    """L at `final` with gradients of zero, which the steps are to add to; and lambda_N."""
    residual, distance = final - steps.segment.target, steps.segment.distance
    labels = torch.zeros_like(steps.labels) if steps.soft else None
    images, drates = torch.zeros_like(steps.images), torch.zeros_like(rates)
    found = Match(residual.square().sum() / distance, images, labels, drates, final)
    return found, 2 * residual / distance


def _adjoint(steps: _Steps, rates: Tensor, momentum: float, window: int | None, keep: int) -> Match:
    count = len(rates)
    first = max(0, count - (window or count))
    keep = min(keep, count - first)
    hessian = lambda i: i > first
    # A compiled step leaves out g_i where it need not give it. Then the velocities are kept in place of the weights,
    # which follow from them: theta_i = theta_{i+1} + beta_i v_{i+1}.
    known = steps.inner is not None
    way = _forward(steps, rates, momentum, first, keep, hessian, known)
    found, adjoint = _unfilled(steps, rates, way.final)  # lambda_{i+1} of theta
    carried = torch.zeros_like(adjoint)  # and of the velocity
    theta = way.final
    for i in reversed(range(first, count)):
        velocity = way.velocities.pop() if way.velocities else None
        theta = theta + rates[i] * velocity if known else way.thetas.pop()
        direction = carried - rates[i] * adjoint
        pieces = way.kept.pop(i, None) or steps.pieces(i, theta, hessian(i), known=known)
        g, product = _product(pieces, direction, hessian(i), found, known)
        found.rates[i] = -adjoint @ (g if velocity is None else velocity)
        if hessian(i):
            adjoint, carried = adjoint + product, momentum * direction
    return found


def _tesla(steps: _Steps, rates: Tensor, keep: int) -> Match:
    """The last steps' graphs first, where they were kept, and then from the start again: each step finds the next
    theta_i beside its share of the gradient."""
    count = len(rates)
    way = _forward(steps, rates, 0.0, count, keep, hessian=lambda i: False)
    found, adjoint = _unfilled(steps, rates, way.final)

    def add(i: int, pieces: Iterable[_Piece]) -> Tensor:
        g, _ = _product(pieces, -rates[i] * adjoint, hessian=False, found=found)
        found.rates[i] = -adjoint @ g
        return g

    while way.kept:
        add(*way.kept.popitem())
    theta = steps.segment.start.detach()
    for i in range(count - keep):
        at = theta.detach().requires_grad_()
        theta = theta - rates[i] * add(i, steps.pieces(i, at, hessian=False))
    return found


def _product(
    pieces: Iterable[_Piece],
    direction: Tensor,
    hessian: bool,
    found: Match,
    known: bool = False,
) -> tuple[Tensor, Tensor]:
    """g_i, unless it is `known`, and, with `hessian`, H_i times `direction` [P]; adds (d g_i / dX)^T direction to the
    images' gradient, and likewise to the labels'."""
    g, product = torch.zeros_like(direction), torch.zeros_like(direction)
    for piece in pieces:
        pulls = piece.products(direction)
        if not known:
            g += pulls.pop(0)
        if hessian:
            product += pulls.pop()
        found.images.index_add_(0, piece.rows, pulls[0])
        if found.labels is not None:
            found.labels.index_add_(0, piece.rows, pulls[1])
    return g, product


def stored_weights(engine: str, steps: int) -> int:
    """How many theta_i an engine keeps beside its graph, over so many steps: those of the adjoint's way back, which
    keeps as many velocities where there is momentum."""
    name, window = parse_engine(engine)
    return min(steps, window or steps) if name == "adjoint" else 0
