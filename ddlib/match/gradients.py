"""The gradients of every class at once, how far apart two sets of them are, and what that distance wants of the images.

    g_c = grad_theta 1/B sum_i CE(net(x_i^c; theta), y_i^c),      L = sum_c sum_layers d(g_c(real), g_c(synthetic))

`engine` "joint": one forward and one backward pass over the images of all classes give every layer's inputs and the
gradients of its outputs; a weight's gradient is then one product per class. "loop": one class after another, for the
weights that joint cannot do. They agree to rounding where no layer couples samples. On a CPU both take the same time;
only joint compiles (`Traced`) into one graph of moderate size, and that is faster
(`python -m benchmarks --only gradient`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import grad
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.grad import conv2d_weight
from torch.utils._pytree import tree_leaves

from ..core import DDError, choose
from ..nets.build import Backbone
from ..train.loop import compiled

ENGINES = ("auto", "joint", "loop")
DISTANCES = ("dc", "mse", "l1")
MATCHES = ("gradient", "feature", "both")
LAYERS = ("conv", "all")


def distance(real: Tensor, synthetic: Tensor, kind: str) -> Tensor:
    """d of one layer's gradients [C, *weight.shape], or of mean features [C, d], summed over the C classes.

    "mse": squares; "l1": absolute values; "dc": 1 - cosine of every output row (DC, section 3.2; features are one row).
    """
    if choose("distance", kind, DISTANCES) != "dc":
        gap = synthetic - real
        return gap.square().sum() if kind == "mse" else gap.abs().sum()
    a, b = (g.flatten(2) if g.ndim > 2 else g[:, None] for g in (real, synthetic))
    return (1 - (a * b).sum(2) / (a.norm(dim=2) * b.norm(dim=2) + 1e-6)).sum()


def matched(net: Backbone, layers: str) -> list[Tensor]:
    """The weights whose gradients are compared: "conv", or "all" with at least two dimensions; never biases."""
    choose("layers", layers, LAYERS)
    return [p for p in net.parameters() if p.ndim == 4 or (layers == "all" and p.ndim > 1)]


def class_gradients(
    net: Backbone,
    x: Tensor,
    y: Tensor,
    weights: Sequence[Tensor],
    *,
    graph: bool = False,
    embed: bool = False,
    engine: str = "auto",
) -> list[Tensor]:
    """Gradients of every class's mean cross-entropy, [C, *weight.shape] for each of `weights`.

    x: images [C, B, ch, H, W]; y: labels [C, B]; weights: parameters of `net`, which must not couple samples (no
    BatchNorm in train mode). `graph` keeps them differentiable in x; `embed` appends the classes' mean features [C, d].
    engine: see the module; "auto" is joint, or loop where a weight is neither a convolution's nor a linear layer's,
    which joint cannot do. Raises `DDError` there.
    """
    owners = {id(m.weight): m for m in net.modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    layers = [owners.get(id(w)) for w in weights]
    if choose("engine", engine, ENGINES) == "auto":
        engine = "loop" if None in layers else "joint"
    if None in layers and engine != "loop":
        raise DDError(
            f"engine {engine!r} takes weights of convolutions and linear layers only; allowed here: auto, loop"
        )
    if engine == "joint":
        grads, means = _joint(net, x, y, layers, graph)
    else:
        two = _Two(net)
        names = {id(p): name for name, p in two.named_parameters()}
        values = {names[id(w)]: w.detach().requires_grad_() for w in weights}
        grads, means = _loop(two, values, x, y, graph)
    return [*grads, means] if embed else list(grads)


class _Two(nn.Module):
    """Features and logits of a network in one call."""

    def __init__(self, net: Backbone):
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.net.features(x)
        return features, self.net.classifier(features)


def _loss(two: _Two, values: dict[str, Tensor], x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    features, logits = functional_call(two, values, (x,))
    return F.cross_entropy(logits, y), features.mean(0)


def _loop(
    two: _Two, values: dict[str, Tensor], x: Tensor, y: Tensor, graph: bool
) -> tuple[list[Tensor], Tensor]:
    found, means = [], []
    for images, labels in zip(x, y, strict=True):
        loss, mean = _loss(two, values, images, labels)
        found.append(grad(loss, list(values.values()), create_graph=graph))
        means.append(mean if graph else mean.detach())
    return [torch.stack(layer) for layer in zip(*found, strict=True)], torch.stack(means)


def _joint(
    net: Backbone, x: Tensor, y: Tensor, layers: Sequence[nn.Module], graph: bool
) -> tuple[list[Tensor], Tensor]:
    seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def keep(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        output = output if output.requires_grad else output.requires_grad_()
        seen[module] = inputs[0], output
        return output

    hooks = [layer.register_forward_hook(keep) for layer in layers]
    try:
        features = net.features(x.flatten(0, 1))
        loss = F.cross_entropy(net.classifier(features), y.flatten(), reduction="sum") / x.shape[1]
    finally:
        for hook in hooks:
            hook.remove()
    deltas = grad(loss, [seen[layer][1] for layer in layers], create_graph=graph)
    found = [
        _weight_gradient(layer, seen[layer][0], delta, len(x))
        for layer, delta in zip(layers, deltas, strict=True)
    ]
    means = features.unflatten(0, (len(x), -1)).mean(1)
    return (found, means) if graph else ([g.detach() for g in found], means.detach())


def _weight_gradient(layer: nn.Module, inputs: Tensor, delta: Tensor, classes: int) -> Tensor:
    """[C, *weight.shape] from a layer's inputs and the gradient of its outputs, both [C * B, ...]."""
    inputs, delta = (t.unflatten(0, (classes, -1)) for t in (inputs, delta))
    if isinstance(layer, nn.Linear):
        return torch.einsum("cbo,cbi->coi", delta, inputs)
    return torch.stack(
        [
            conv2d_weight(x, layer.weight.shape, d, layer.stride, layer.padding, layer.dilation)
            for x, d in zip(inputs, delta, strict=True)
        ]
    )


class Matching(nn.Module):
    """What is matched of images x [C, B, ch, H, W] with labels y [C, B], and the pull on them of what it should be.

    `match` says what: "gradient" (of the weights `matched`), "feature" (class means, DM's), or "both" (DREAM+).
    """

    def __init__(
        self,
        net: Backbone,
        kind: str,
        layers: str = "conv",
        match: str = "gradient",
        engine: str = "auto",
    ):
        super().__init__()
        choose("match", match, MATCHES)
        self.net, self.kind, self.layers, self.match, self.engine = net, kind, layers, match, engine

    def statistics(self, x: Tensor, y: Tensor, graph: bool = False) -> list[Tensor]:
        if self.match == "feature":
            with torch.set_grad_enabled(graph):
                return [self.net.features(x.flatten(0, 1)).unflatten(0, (len(x), -1)).mean(1)]
        return class_gradients(
            self.net,
            x,
            y,
            matched(self.net, self.layers),
            graph=graph,
            embed=self.match == "both",
            engine=self.engine,
        )

    def forward(self, x: Tensor, y: Tensor, target: list[Tensor] | None = None) -> list[Tensor]:
        """Without a target: the statistics. With one: their distance L from it, and dL/dx."""
        with torch.enable_grad():
            if target is None:
                return self.statistics(x, y)
            x = x.detach().requires_grad_()
            pairs = zip(target, self.statistics(x, y, graph=True), strict=True)
            loss = torch.stack([distance(real, found, self.kind) for real, found in pairs]).sum()
            return [loss.detach(), grad(loss, x)[0]]


class Traced:
    """`module` as graphs of plain tensor operations, one for each set of shapes, compiled where there is a compiler.

    The double backward pass is part of the graph, which `torch.compile` alone would refuse. Values differ from the
    module's by rounding.
    """

    def __init__(self, module: nn.Module):
        self.module, self.graphs = module, {}

    def __call__(self, *arguments: Any) -> Any:
        arguments = (
            dict(self.module.named_parameters()) | dict(self.module.named_buffers()),
            *arguments,
        )
        key = tuple((t.shape, t.stride()) for t in tree_leaves(arguments) if isinstance(t, Tensor))
        with torch.no_grad():
            if key not in self.graphs:
                self.graphs[key] = compiled(make_fx(self._call)(*arguments))
            return self.graphs[key](*arguments)

    def _call(self, values: dict[str, Tensor], *rest: Any) -> Any:
        return functional_call(self.module, values, rest)
