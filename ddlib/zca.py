"""ZCA whitening as trajectory matching and FRePo use it: fitted once on the training pixels, exactly invertible."""

from __future__ import annotations

import hashlib
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from .core import DDError, checksum, choose, load_tensors, save_tensors

KINDS = ("mtt", "frepo")
LARGEST = 12_288  # 3 x 64 x 64: the matrix takes 0.6 GB, its float64 eigendecomposition four times that
_ROWS = 1024  # |pixel - 128| <= 128 and 128^2 * 1024 = 2^24, so float32 adds a chunk's products without rounding


@dataclass(frozen=True, eq=False)
class ZCA:
    """The affine map z = (x - mean) @ matrix of flattened [0,1] pixels, with x = z @ inverse + mean.

    kind "mtt" (MTT, Cazenavette et al. 2022; semantics of `kornia.enhance.ZCAWhitening`): covariance of the [0,1]
        pixels over N - 1, plus an absolute 0.1 on each eigenvalue; no mean/std normalisation.
    kind "frepo" (FRePo, Zhou et al. 2022): covariance over N of the channel-standardised pixels, plus 0.1 times the
        mean eigenvalue; with N < D the D - N + 1 eigenvalues of the null space become 1 (the released code: all
        but one of them). The channel std is that of the fitted pixels (the paper's constants are these, rounded to
        four digits) and is part of `matrix`.
    mean [D], matrix [D,D], inverse [D,D]: float32. id: 12 hex digits fixed by the kind and the fitted pixels.
    """

    kind: str
    id: str
    mean: Tensor
    matrix: Tensor
    inverse: Tensor

    @staticmethod
    def fit(pixels: Tensor, kind: str, device: torch.device | str | None = None) -> ZCA:
        """Fit on uint8 pixels [N,C,H,W]; the work runs on `device` (default: where the pixels are).

        Raises DDError for an unknown kind, pixels that are not uint8 [N>=2,C,H,W], and D = C*H*W above 12,288.
        """
        choose("zca kind", kind, KINDS)
        if pixels.dtype != torch.uint8 or pixels.ndim != 4 or len(pixels) < 2:
            raise DDError(f"ZCA needs two or more uint8 images [N,C,H,W], not {pixels.dtype} {list(pixels.shape)}")
        n, channels, d = len(pixels), pixels.shape[1], pixels[0].numel()
        if d > LARGEST:
            raise DDError(f"ZCA of {d:,} values an image is too large; at most {LARGEST:,} (3x64x64) is allowed: "
                          f"choose a smaller resolution or no zca")
        device = torch.device(device if device is not None else pixels.device)
        total = torch.zeros(d, dtype=torch.float64, device=device)
        cov = torch.zeros(d, d, dtype=torch.float64, device=device)
        with torch.autocast(device.type, enabled=False):
            for chunk in pixels.flatten(1).split(_ROWS):
                x = chunk.to(device).float() - 128
                total += x.sum(0)
                cov += x.T @ x
        cov.addr_(total, total, alpha=-1 / n).div_(255**2 * (n - 1 if kind == "mtt" else n))
        mean = (total / n + 128) / 255
        scale, eps = torch.ones_like(mean), 0.1
        if kind == "frepo":
            variance = cov.diagonal().view(channels, -1).mean(1) + mean.view(channels, -1).var(1, correction=0)
            scale = torch.where(variance > 0, variance, 1).sqrt().repeat_interleave(d // channels)
            cov.div_(scale).div_(scale[:, None])
            eps = 0.1 * cov.trace() / d
        values, vectors = torch.linalg.eigh(cov)
        values = values.clamp(min=0) + eps
        if kind == "frepo" and n < d:
            values[: d - n + 1] = 1  # n centred images have rank n - 1: the whole null space, so no basis is preferred
        root = values.sqrt()
        matrix = (vectors / root) @ vectors.T / scale[:, None]
        inverse = (vectors * root) @ vectors.T * scale
        return ZCA(kind, _identity(kind, checksum(pixels)), mean.float(), matrix.float(), inverse.float())

    @staticmethod
    def fit_cached(pixels: Tensor, kind: str, device: torch.device, pixel_sha: str, folder: Path) -> ZCA:
        """`fit`, kept in `folder` under its id; a damaged file is refitted. `pixel_sha` is `checksum(pixels)`."""
        name = _identity(kind, pixel_sha)
        path = folder / f"zca-{kind}-{name}.safetensors"
        with suppress(DDError, OSError):
            return ZCA(kind, name, **load_tensors(path, "ZCA", "it is fitted again")[0]).to(device)
        zca = ZCA.fit(pixels, kind, device)
        with suppress(DDError):  # nowhere to keep it: it is fitted again next time
            save_tensors(path, {"mean": zca.mean, "matrix": zca.matrix, "inverse": zca.inverse}, {})
        return zca

    def to(self, device: torch.device | str) -> ZCA:
        return replace(self, **{name: getattr(self, name).to(device) for name in ("mean", "matrix", "inverse")})

    def whiten(self, x: Tensor) -> Tensor:
        """[...,C,H,W] in [0,1] -> whitened, same shape."""
        with torch.autocast(x.device.type, enabled=False):
            return ((x.flatten(-3) - self.mean) @ self.matrix).view(x.shape)

    def colour(self, z: Tensor) -> Tensor:
        """The inverse of `whiten`."""
        with torch.autocast(z.device.type, enabled=False):
            return (z.flatten(-3) @ self.inverse + self.mean).view(z.shape)


def _identity(kind: str, pixel_sha: str) -> str:
    return hashlib.sha256(f"1 {kind} {pixel_sha}".encode()).hexdigest()[:12]
