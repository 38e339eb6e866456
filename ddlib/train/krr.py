"""Kernel ridge regression: the last layer of a network solved for in closed form (FRePo, arXiv 2206.00719, eq. 3).

With features F_s [n, d] of a training set, its targets Y [n, C] and features F_t [N, d] of a test set,

    P = F_t F_s^T (F_s F_s^T + lambda mean(diag(F_s F_s^T)) I)^-1 Y

Kernel and Cholesky factor are float64; where the factorisation fails, lambda is raised tenfold. In float32 the gradient
can be lost to rounding once n reaches the feature dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..core import DDError

RAISES = 9  # from lambda 1e-6 to 1e3; a kernel that fails there is zero or not finite


class _Solve(torch.autograd.Function):
    """A = K^-1 Y for symmetric K = L L^T; the derivative dK = -G A^T, dY = G with G = K^-1 dA needs L alone."""

    @staticmethod
    def forward(ctx, kernel: Tensor, labels: Tensor, factor: Tensor) -> Tensor:
        solution = torch.cholesky_solve(labels, factor)
        ctx.save_for_backward(solution, factor)
        return solution

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        solution, factor = ctx.saved_tensors
        grad = torch.cholesky_solve(grad, factor)
        return -grad @ solution.T, grad, None


def krr(f_test: Tensor, f_train: Tensor, labels: Tensor, lam: float = 1e-6) -> tuple[Tensor, int]:
    """Kernel ridge regression on features (the paper's equation, in the module's docstring).

    f_test [N, d], f_train [n, d], labels [n, C] -> predictions float64 [N, C], differentiable in all three, and how
    often lambda was raised tenfold before the kernel [n, n] could be factorised. Raises DDError for shapes that do not
    fit and for features that are not finite or all zero.
    """
    if labels.ndim != 2 or len(labels) != len(f_train) or f_test.shape[1:] != f_train.shape[1:]:
        raise DDError(
            f"regression needs labels [n, C] and features [n, d] and [N, d], not {list(labels.shape)}, "
            f"{list(f_train.shape)} and {list(f_test.shape)}"
        )
    f_test, f_train = f_test.double(), f_train.double()
    kernel = f_train @ f_train.T
    mean = kernel.diagonal().mean()
    eye = torch.eye(len(kernel), dtype=torch.float64, device=kernel.device)
    for raised in range(RAISES + 1):
        ridged = kernel + lam * 10**raised * mean * eye
        factor, info = torch.linalg.cholesky_ex(ridged.detach())
        if not (info.bool() | ~mean.isfinite()):  # one wait for the device
            # The last layer [d, C], solved for
            layer = f_train.T @ _Solve.apply(ridged, labels.double(), factor)
            return f_test @ layer, raised
    raise DDError(
        f"the regression kernel of {len(kernel)} images cannot be factorised (mean diagonal {mean.item():.3g}): "
        "the features are not finite or all zero"
    )
