"""One inner step of trajectory matching and its adjoint as compiled graphs of plain tensor operations.

    g = grad_theta l(theta; X, Y),      with a direction a:   H a,   (dg / dX)^T a,   (dg / dY)^T a

`torch.compile` alone refuses the second backward pass. Traced, it is part of the graph, which is compiled in one of two
ways: g and its products at once, where nothing was kept of the way forward; or parted in two, so that the way back
takes up what the way forward left, min-cut as for a training step. Values differ from eager ones by rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import grad
from torch.fx.experimental.proxy_tensor import make_fx

from ..train.loop import compiled


class CompiledStep:
    """The step of `net(theta, x, layout)` on `criterion(logits, y)`; a graph for each set of shapes, made when first
    asked for.

    theta [P], x [n, C, H, W], y int64 [n] or float [n, classes], a direction [P]. `hessian` asks for H a too.
    """

    def __init__(self, net: Callable, criterion: Callable):
        self.net, self.criterion = net, criterion
        self._graphs: dict[tuple, Any] = {}

    def _loss(self, theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
        # On a CPU the convolutions would otherwise copy images into this order and back
        layout = torch.channels_last if x.device.type == "cpu" else None
        return self.criterion(self.net(theta, x, layout), y)

    def gradient(self, theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """g [P]."""
        primals = [theta, x, y]

        def first(primals: list[Tensor]) -> Tensor:
            theta, x, y = primals
            with torch.enable_grad():
                theta = theta.detach().requires_grad_()
                return grad(self._loss(theta, x, y), theta)[0]

        return self._graph("gradient", primals, lambda: self._trace(first, primals))(primals)

    def products(
        self,
        theta: Tensor,
        x: Tensor,
        y: Tensor,
        direction: Tensor,
        hessian: bool,
        known: bool = False,
    ) -> list[Tensor]:
        """[g, (dg/dX)^T a, (dg/dY)^T a where y is soft, H a with `hessian`]; without g where it is `known`.

        No other value needs g itself, so the convolutions that give it are then left out.
        """
        primals, joint = [theta, x, y], self._joint(hessian)
        asked = (lambda *given: joint(*given)[1:]) if known else joint
        make = lambda: self._trace(asked, primals, [direction])
        kind = f"products {hessian} {known}"
        return list(self._graph(kind, primals, make)(primals, [direction]))

    def split(
        self, theta: Tensor, x: Tensor, y: Tensor, hessian: bool
    ) -> tuple[Tensor, Callable[[Tensor], list[Tensor]]]:
        """g, and a function from a direction to what `products` gives beside g.

        It holds the step's graph; where this torch cannot part it, it builds it anew, in the time of `products`.
        """
        primals = [theta, x, y]

        def make() -> tuple[Callable, Callable] | None:
            # Here, because it takes seconds to import.
            from functorch.compile import min_cut_rematerialization_partition

            example = (primals, [torch.zeros_like(theta)])
            joint = make_fx(self._joint(hessian))(*example)
            try:
                halves = min_cut_rematerialization_partition(joint, example, num_fwd_outputs=1)
            except AssertionError:  # torch 2.11 loses a node of the second derivative
                return None
            return compiled(halves[0]), compiled(halves[1])

        halves = self._graph(f"split {hessian}", primals, make)
        if halves is None:  # nothing is kept, and the way back begins anew
            again = lambda direction: self.products(theta, x, y, direction, hessian, known=True)
            return self.gradient(theta, x, y), again
        with torch.no_grad():
            g, *kept = halves[0](*primals)

        @torch.no_grad()
        def back(direction: Tensor) -> list[Tensor]:
            return list(halves[1](*kept, direction))

        return g, back

    def _joint(self, hessian: bool) -> Callable:
        """A function of primals and tangents, which are the names that the partition knows them by."""

        def joint(primals: list[Tensor], tangents: list[Tensor]) -> list[Tensor]:
            theta, x, y = primals
            with torch.enable_grad():
                theta, x = (value.detach().requires_grad_() for value in (theta, x))
                y = y.detach().requires_grad_(y.is_floating_point())
                (g,) = grad(self._loss(theta, x, y), theta, create_graph=True)
                wanted = [x, *([y] if y.requires_grad else []), *([theta] if hessian else [])]
                return [g.detach(), *grad(g @ tangents[0], wanted)]

        return joint

    @staticmethod
    def _trace(function: Callable, *arguments: list[Tensor]) -> Callable:
        return torch.no_grad()(compiled(make_fx(function)(*arguments)))

    def _graph(self, kind: str, primals: list[Tensor], make: Callable[[], Any]) -> Any:
        key = (kind, *((value.shape, value.dtype) for value in primals))
        if key not in self._graphs:
            with torch.no_grad():
                self._graphs[key] = make()
        return self._graphs[key]
