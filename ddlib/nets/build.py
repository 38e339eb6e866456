"""The networks of the papers, from a short spec, with explicit seeds.

    build("convnet", (3, 32, 32), 10)                      # the papers' ConvNet: 320,010 parameters, 2048 features
    build("convnet:width=32,depth=2,norm=bn", (1, 8, 8), 10, generator)

    network      keys                            defaults
    convnet      width depth norm act pool       128, by image size (`default_depth`), in, relu, avg
                 grow order init                 1, post, torch
    mlp          width depth act                 128, 2 hidden layers, relu
    lenet        act pool                        relu, max
    alexnet      norm act pool                   none, relu, max
    vgg11        width norm act pool             64, in, relu, max
    resnet18     width norm act                  64, in, relu: strided convolutions, global average pool
    resnet18_ap  width norm act                  64, in, relu: stride 1 and average pooling, no global pool

norm: in (instance norm as GroupNorm(C, C)), bn, ln (over C, H, W), gn (4 groups), none.
act: sigmoid, relu, leakyrelu (0.01), swish. pool (2x2, stride 2): avg, max, and for convnet none.
grow: factor of the width from block to block. order: post (convolution, norm, activation), or pre: norm before the
convolution, none in block 0, BatchNorm with momentum 0.9. init: torch, or lecun: normal of variance 1/fan_in, cut at
two deviations, zero bias. FRePo (Zhou et al., NeurIPS 2022) distils on convnet:norm=bn,grow=2,order=pre,init=lecun.

Architectures follow the code of DC/DSA/DM (Zhao et al., ICLR 2021, ICML 2021, WACV 2023). Differences:
- Every network takes other image sizes: the classifier follows the last map. VGG11 and ResNet18 skip a halving that
  would leave less than 2x2 (instance norm of one pixel is 0), which never happens at 28 or 32 px; LeNet pads images
  under 16 px to 16. Only 1x28x28 images get the papers' wider first padding (28 -> 32 px).
- Parameters come from an explicit generator; the global random state is neither read nor changed.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ..core import DDError, choose, instance, shown

ACTIVATIONS = {"sigmoid": nn.Sigmoid, "relu": nn.ReLU, "leakyrelu": nn.LeakyReLU, "swish": nn.SiLU}
NORMS = ("in", "bn", "ln", "gn", "none")
POOLS = {"avg": nn.AvgPool2d, "max": nn.MaxPool2d, "none": None}
CHOICES = {
    "norm": NORMS,
    "act": tuple(ACTIVATIONS),
    "pool": tuple(POOLS),
    "order": ("post", "pre"),
    "init": ("torch", "lecun"),
}
GROUPS = 4

DEFAULTS: dict[str, dict[str, object]] = {
    "convnet": {
        "width": 128,
        "depth": None,
        "norm": "in",
        "act": "relu",
        "pool": "avg",
        "grow": 1,
        "order": "post",
        "init": "torch",
    },
    "mlp": {"width": 128, "depth": 2, "act": "relu"},
    "lenet": {"act": "relu", "pool": "max"},
    "alexnet": {"norm": "none", "act": "relu", "pool": "max"},
    "vgg11": {"width": 64, "norm": "in", "act": "relu", "pool": "max"},
    "resnet18": {"width": 64, "norm": "in", "act": "relu"},
    "resnet18_ap": {"width": 64, "norm": "in", "act": "relu"},
}


class Backbone(nn.Module):
    """A network as `classifier(features(x))`.

    features: [N, C, H, W] -> [N, feature_dim], the input of the last linear layer (the embedding of DM and FRePo).
    spec: canonical, with only the keys that differ from the defaults for this image size.
    couples_samples: True when it has BatchNorm, so that an image's features depend on its batch.
    """

    def __init__(
        self, spec: str, body: nn.Module, feature_dim: int, num_classes: int, init: str = "torch"
    ) -> None:
        super().__init__()
        self.spec, self.feature_dim, self.init = spec, feature_dim, init
        self.body = body
        self.classifier = nn.Linear(feature_dim, num_classes)
        self.couples_samples = any(isinstance(m, nn.BatchNorm2d) for m in body.modules())

    def features(self, x: Tensor) -> Tensor:
        return self.body(x).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x))


LARGEST = {"width": 65_536, "depth": 128, "grow": 16}  # what a network may be asked for


def build(
    spec: str,
    shape: tuple[int, int, int],
    num_classes: int,
    generator: torch.Generator | None = None,
) -> Backbone:
    """The network `spec` ("name" or "name:key=value,...", see the module) for images of `shape` (C, H, W), on the CPU.

    Parameters are drawn by `initialise` from `generator`, or from one with seed 0.
    Raises DDError for an unknown name, key or value, and for images that are too small.
    """
    (name, options), shape = _parse(instance("backbone", spec, str)), tuple(shape)
    if len(shape) != 3 or min(shape) < 1 or num_classes < 1:
        raise DDError(
            f"cannot build {spec!r} for images of shape {shape} and {num_classes} classes; "
            "expected (channels, height, width) and at least 1 class, all positive"
        )
    defaults = dict(DEFAULTS[name])
    if name == "convnet":
        defaults["depth"] = default_depth(shape)
    canonical = ",".join(
        f"{k}={options[k]}" for k in defaults if k in options and options[k] != defaults[k]
    )
    options = defaults | options
    init = options.pop("init", "torch")
    with torch.device("meta"):  # no memory, no random draws
        body = _Body(shape, **{k: options.pop(k) for k in ("norm", "act", "pool") if k in options})
        BUILDERS[name](body, **options)
        net = Backbone(
            f"{name}:{canonical}" if canonical else name,
            nn.Sequential(*body.layers),
            math.prod(body.shape),
            num_classes,
            init,
        )
    size = 4 * sum(parameter.numel() for parameter in net.parameters())
    if size > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
        raise DDError(
            f"the network {spec!r} has {size / 2**30:,.0f} GiB of weights, more than this machine's "
            "memory: give a smaller width or depth"
        )
    return initialise(net.to_empty(device="cpu"), generator or torch.Generator().manual_seed(0))


def default_depth(shape: tuple[int, int, int]) -> int:
    """ConvNet blocks for an image size: 2 up to 16 px, 3 at 28 and 32, 4 at 64, 5 at 128; round(log2(side)) - 2."""
    return max(2, round(math.log2(min(shape[1:]))) - 2)


@torch.no_grad()
def initialise(net: nn.Module, generator: torch.Generator) -> nn.Module:
    """Draw every parameter anew, in place: PyTorch's default U(-1/sqrt(fan_in), 1/sqrt(fan_in)) for weights and
    biases, or `init=lecun`; (1, 0) for the affine part of norms; running statistics are reset. Returns `net`.

    Draws are float32 on the CPU and reach the device in one copy, so a seed gives the same network on every device;
    compiled or captured graphs keep pointing at the same tensors. DDError for a layer with parameters that is neither
    convolution, linear nor norm.
    """
    drawn: list[tuple[Tensor, float]] = []
    for module in net.modules():
        own = list(module.parameters(recurse=False))
        if isinstance(module, nn.Linear | nn.Conv2d):
            drawn += [(p, 1 / math.sqrt(module.weight[0].numel())) for p in own]
        elif isinstance(module, nn.GroupNorm | nn.LayerNorm | nn.BatchNorm2d):
            module.reset_parameters()
        elif own:
            raise DDError(
                f"cannot initialise a {type(module).__name__}; allowed: Conv2d, Linear and norm layers"
            )
    sizes = [p.numel() for p, _ in drawn]
    device = drawn[0][0].device if drawn else torch.device("cpu")
    flat = torch.empty(sum(sizes), pin_memory=device.type == "cuda")
    for chunk, (p, bound) in zip(flat.split(sizes), drawn, strict=True):
        if getattr(net, "init", "torch") == "torch":
            chunk.uniform_(-bound, bound, generator=generator)
        elif p.ndim == 1:
            chunk.zero_()
        else:
            # This share of a normal lies within two deviations; what is left has a deviation of 0.8796.
            cut = math.erf(math.sqrt(2))
            chunk.uniform_(-cut, cut, generator=generator).erfinv_().mul_(
                math.sqrt(2) * bound / 0.87962566
            )
    for chunk, (p, _) in zip(flat.to(device, non_blocking=True).split(sizes), drawn, strict=True):
        p.copy_(chunk.view_as(p))
    return net


def count_flops(net: nn.Module, shape: tuple[int, int, int]) -> int:
    """FLOPs (two per multiply-add, convolutions and matrix products only) of one forward of one (C, H, W) image."""
    probe = copy.deepcopy(net).to("meta").eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        probe(torch.empty(1, *shape, device="meta", dtype=next(probe.parameters()).dtype))
    return counter.get_total_flops()


def _parse(spec: str) -> tuple[str, dict[str, object]]:
    name, _, rest = spec.partition(":")
    defaults = DEFAULTS[choose("backbone", name, DEFAULTS)]
    options: dict[str, object] = {}
    for item in rest.split(",") if rest else ():
        key, equals, value = item.partition("=")
        choose(f"key of backbone {name}", key, defaults)
        if not equals or key in options:
            raise DDError(
                f"backbone {spec!r} is not of the form {name}:key=value,... with each key once"
            )
        if key in ("width", "depth", "grow"):
            digits = value.isascii() and value.isdigit() and len(value) < 10
            if not (digits and 0 < int(value) <= LARGEST[key]):
                raise DDError(
                    f"{key}={shown(value)} in backbone {shown(spec)} is not allowed; it must be a "
                    f"whole number above 0 and at most {LARGEST[key]}"
                )
            options[key] = int(value)
        else:
            allowed = ("avg", "max") if key == "pool" and name != "convnet" else CHOICES[key]
            options[key] = choose(f"{key} of backbone {name}", value, allowed)
    return name, options


class _Body:
    """The layers so far and the (C, H, W) of the map they give."""

    def __init__(
        self, shape: tuple[int, int, int], norm: str = "none", act: str = "relu", pool: str = "none"
    ) -> None:
        self.shape, self.layers = shape, []
        self.kind, self.act, self.pooling, self.momentum = norm, ACTIVATIONS[act], POOLS[pool], 0.1
        self.mnist = shape == (1, 28, 28)

    @property
    def side(self) -> int:
        return min(self.shape[1:])

    def need(self, name: str, side: int) -> None:
        if self.side < side:
            raise DDError(
                f"images of {self.shape[1]}x{self.shape[2]} px are too small for {name}: at least {side} px "
                "a side are needed"
            )

    def conv(self, out: int, kernel: int = 3, padding: int = 1, *, norm: bool = True) -> None:
        """Convolution, norm, activation."""
        self.layers.append(nn.Conv2d(self.shape[0], out, kernel, padding=padding))
        self.shape = (out, *(s + 2 * padding - kernel + 1 for s in self.shape[1:]))
        self.layers += [*self.norm(self.shape), self.act()] if norm else [self.act()]

    def pool(self) -> None:
        if self.pooling:
            self.layers.append(self.pooling(2))
            self.shape = (self.shape[0], self.shape[1] // 2, self.shape[2] // 2)

    def linear(self, out: int) -> None:
        if not any(isinstance(layer, nn.Flatten) for layer in self.layers):
            self.layers.append(nn.Flatten())
        self.layers += [nn.Linear(math.prod(self.shape), out), self.act()]
        self.shape = (out,)

    def norm(self, shape: tuple[int, int, int]) -> list[nn.Module]:
        """The norm layer for maps of `shape`, as a list that is empty for none."""
        if self.kind == "gn" and shape[0] % GROUPS:
            raise DDError(f"norm=gn needs widths that are multiples of {GROUPS}, not {shape[0]}")
        return {
            "in": lambda c: [nn.GroupNorm(c, c)],
            "bn": lambda c: [nn.BatchNorm2d(c, momentum=self.momentum)],
            "gn": lambda c: [nn.GroupNorm(GROUPS, c)],
            "ln": lambda _: [nn.LayerNorm(shape)],
            "none": lambda _: [],
        }[self.kind](shape[0])


def _convnet(body: _Body, width: int, depth: int, grow: int, order: str) -> None:
    body.need("convnet", 2)
    side = 32 if body.mnist else body.side
    if body.pooling and 2**depth > side:
        raise DDError(
            f"a convnet of depth {depth} halves images of {body.shape[1]}x{body.shape[2]} px away; "
            f"the largest depth that fits is {int(math.log2(side))} (or pool=none)"
        )
    body.momentum = 0.9 if order == "pre" else 0.1
    for block in range(depth):
        body.layers += body.norm(body.shape) if order == "pre" and block else []
        body.conv(
            width * grow**block, padding=3 if body.mnist and block == 0 else 1, norm=order == "post"
        )
        body.pool()


def _mlp(body: _Body, width: int, depth: int) -> None:
    for _ in range(depth):
        body.linear(width)


def _lenet(body: _Body) -> None:
    body.need("lenet", 8)
    body.conv(6, 5, 2 if body.mnist else max(0, (17 - body.side) // 2), norm=False)
    body.pool()
    body.conv(16, 5, 0, norm=False)
    body.pool()
    body.linear(120)
    body.linear(84)


def _alexnet(body: _Body) -> None:
    body.need("alexnet", 8)
    for block, (out, kernel) in enumerate([(128, 5), (192, 5), (256, 3), (192, 3), (192, 3)]):
        body.conv(out, kernel, 4 if body.mnist and block == 0 else kernel // 2)
        if block in (0, 1, 4):
            body.pool()


def _vgg11(body: _Body, width: int) -> None:
    body.need("vgg11", 8)
    for block, factor in enumerate([1, 2, 4, 4, 8, 8, 8, 8]):
        body.conv(width * factor, padding=3 if body.mnist and block == 0 else 1)
        if block in (0, 1, 3, 5) and body.side >= 4 or block == 7:
            body.pool()


class _Block(nn.Module):
    """Basic residual block; `halve` is "", "stride" or "pool"."""

    def __init__(self, body: _Body, out: int, halve: str) -> None:
        super().__init__()
        channels, h, w = body.shape
        stride = 2 if halve == "stride" else 1
        small = {"": (h, w), "stride": ((h + 1) // 2, (w + 1) // 2), "pool": (h // 2, w // 2)}[
            halve
        ]
        body.shape, pool = (out, *small), [nn.AvgPool2d(2)] if halve == "pool" else []
        first = (out, h, w) if pool else body.shape  # the pooled variant normalises before pooling
        self.residual = nn.Sequential(
            nn.Conv2d(channels, out, 3, stride, 1, bias=False),
            *body.norm(first),
            body.act(),
            *pool,
            nn.Conv2d(out, out, 3, padding=1, bias=False),
            *body.norm(body.shape),
        )
        self.shortcut = nn.Identity()
        if halve or channels != out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels, out, 1, stride, bias=False), *pool, *body.norm(body.shape)
            )
        self.act = body.act()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.residual(x) + self.shortcut(x))


def _resnet(halve: str) -> Callable[..., None]:
    def builder(body: _Body, width: int) -> None:
        body.need("resnet18", 8)
        body.layers += [nn.Conv2d(body.shape[0], width, 3, padding=1, bias=False)]
        body.shape = (width, *body.shape[1:])
        body.layers += [*body.norm(body.shape), body.act()]
        for stage in range(4):
            half = halve if stage and body.side >= 4 else ""
            body.layers += [
                _Block(body, width * 2**stage, half),
                _Block(body, width * 2**stage, ""),
            ]
        if halve == "stride":
            body.layers.append(nn.AdaptiveAvgPool2d(1))
            body.shape = (body.shape[0], 1, 1)

    return builder


BUILDERS: dict[str, Callable[..., None]] = {
    "convnet": _convnet,
    "mlp": _mlp,
    "lenet": _lenet,
    "alexnet": _alexnet,
    "vgg11": _vgg11,
    "resnet18": _resnet("stride"),
    "resnet18_ap": _resnet("pool"),
}
