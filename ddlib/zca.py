"""ZCA whitening as trajectory matching and FRePo use it: fitted once on the training pixels, exactly invertible."""

from __future__ import annotations

import dataclasses
import hashlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .core import DDError, checksum, choose, write_atomically

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
            raise DDError(f"ZCA is fitted on at least two uint8 images [N,C,H,W], not {pixels.dtype} "
                          f"{list(pixels.shape)}")
        n, channels, d = len(pixels), pixels.shape[1], pixels[0].numel()
        if d > LARGEST:
            raise DDError(f"ZCA of {d:,} values an image would need a {d:,} x {d:,} matrix; at most {LARGEST:,} "
                          f"(3x64x64) is allowed: choose a smaller resolution or no zca")
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
            by_channel = mean.view(channels, -1)
            variance = cov.diagonal().view(channels, -1).mean(1) + by_channel.var(1, correction=0)
            std = torch.where(variance > 0, variance, 1).sqrt()
            scale = std.repeat_interleave(d // channels)
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
        """`fit`, kept in `folder` under its id (CIFAR-10 takes half a minute on two cores); a damaged file is refitted.

        `pixel_sha` is `checksum(pixels)`, which the caller has at hand.
        """
        path = folder / f"zca-{kind}-{_identity(choose('zca kind', kind, KINDS), pixel_sha)}.safetensors"
        try:
            with safe_open(path, "pt") as file:
                parts = {name: file.get_tensor(name) for name in ("mean", "matrix", "inverse")}
                if checksum(*parts.values()) == (file.metadata() or {}).get("sha256"):
                    return ZCA(kind, _identity(kind, pixel_sha), **parts).to(device)
        except (OSError, SafetensorError):
            pass
        zca = ZCA.fit(pixels, kind, device)
        parts = {"mean": zca.mean.cpu(), "matrix": zca.matrix.cpu(), "inverse": zca.inverse.cpu()}
        with suppress(DDError):  # nowhere to keep it: it is fitted again next time
            write_atomically(path, lambda to: save_file(parts, to, {"sha256": checksum(*parts.values())}))
        return zca

    def to(self, device: torch.device | str) -> ZCA:
        return dataclasses.replace(self, mean=self.mean.to(device), matrix=self.matrix.to(device),
                                   inverse=self.inverse.to(device))

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
