"""ZCA whitening as trajectory matching and FRePo use it: fitted once on the training pixels, exactly invertible."""

from __future__ import annotations

import hashlib
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..core import DDError, checksum, choose
from ..files import CannotWrite, load_tensors, lock, save_tensors

_PARTS = ("mean", "matrix", "inverse")
KINDS = ("mtt", "frepo", "frepo_checkerboard")
# 3 x 64 x 64: the matrix takes 0.6 GB, its float64 eigendecomposition four times that.
LARGEST = 12_288
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
    kind "frepo_checkerboard" (the same, for 128 px): one matrix for the four sub-images of every other row and column,
        D = 3 x 64 x 64, fitted to their average covariance, each about its own mean; with N < D the D - N smallest
        eigenvalues become 1, as in the released code, although four sub-images per image leave no null space.
    mean [D] or [4,D], matrix [D,D], inverse [D,D]: float32. id: 12 hex digits fixed by the kind and the fitted pixels.
    """

    kind: str
    id: str
    mean: Tensor
    matrix: Tensor
    inverse: Tensor

    @staticmethod
    def fit(pixels: Tensor, kind: str, device: torch.device | str | None = None) -> ZCA:
        """Fit on uint8 pixels [N,C,H,W]; the work runs on `device` (default: where the pixels are).

        Raises DDError for an unknown kind, pixels that are not uint8 [N>=2,C,H,W], D above 12,288, where D = C*H*W or
        a quarter of it, and a checkerboard of odd height or width.
        """
        choose("zca kind", kind, KINDS)
        if pixels.dtype != torch.uint8 or pixels.ndim != 4 or len(pixels) < 2:
            raise DDError(
                f"ZCA needs two or more uint8 images [N,C,H,W], not {pixels.dtype} {list(pixels.shape)}"
            )
        tiles, odd = _tiles(kind), pixels.shape[2] % 2 or pixels.shape[3] % 2
        n, channels, d = len(pixels), pixels.shape[1], pixels[0].numel() // tiles
        if d > LARGEST or tiles > 1 and odd:
            raise DDError(
                f"ZCA {kind!r} cannot whiten images of {list(pixels.shape[1:])}; at most {LARGEST:,} values "
                "(3x64x64) an image are allowed, four times that and even sides for 'frepo_checkerboard': "
                "choose another resolution or no zca"
            )
        device = torch.device(device if device is not None else pixels.device)
        total = torch.zeros(tiles, d, dtype=torch.float64, device=device)
        cov = torch.zeros(d, d, dtype=torch.float64, device=device)
        with torch.autocast(device.type, enabled=False):
            for chunk in pixels.split(_ROWS // tiles):
                x = _split(chunk.to(device).float() - 128, tiles)
                total += x.sum(0)
                cov += x.flatten(0, 1).T @ x.flatten(0, 1)
        for row in total:
            cov.addr_(row, row, alpha=-1 / n)
        cov.div_(255**2 * tiles * (n - 1 if kind == "mtt" else n))
        mean = (total / n + 128) / 255
        scale, eps = torch.ones_like(mean[0]), 0.1
        if kind != "mtt":
            variance = cov.diagonal().view(channels, -1).mean(1)
            variance += mean.view(tiles, channels, -1).var((0, 2), correction=0)
            scale = torch.where(variance > 0, variance, 1).sqrt().repeat_interleave(d // channels)
            cov.div_(scale).div_(scale[:, None])
            eps = 0.1 * cov.trace() / d
            if not eps > 0:
                raise DDError(f"ZCA {kind!r} needs images that differ, and all of these are one")
        values, vectors = torch.linalg.eigh(cov)
        values = values.clamp(min=0) + eps
        if kind != "mtt" and n < d:
            # n centred images have rank n - 1: the whole null space, so no basis is preferred.
            values[: d - n + (kind == "frepo")] = 1
        root = values.sqrt()
        matrix = (vectors / root) @ vectors.T / scale[:, None]
        inverse = (vectors * root) @ vectors.T * scale
        return ZCA(
            kind,
            _identity(kind, checksum(pixels)),
            mean.squeeze(0).float(),
            matrix.float(),
            inverse.float(),
        )

    @staticmethod
    def fit_cached(
        pixels: Tensor, kind: str, device: torch.device, pixel_sha: str, folder: Path
    ) -> ZCA:
        """`fit`, kept in `folder` under its id; a damaged file is refitted. `pixel_sha` is `checksum(pixels)`."""
        name = _identity(kind, pixel_sha)
        path = folder / f"zca-{kind}-{name}.safetensors"
        size = pixels[0].numel() // _tiles(kind)
        with suppress(DDError, OSError):
            return _kept(path, kind, name, size).to(device)
        zca = None
        with suppress(CannotWrite), lock(path, "the whitening of these images"):
            with suppress(DDError, OSError):  # another process may have fitted it
                return _kept(path, kind, name, size).to(device)
            zca = ZCA.fit(pixels, kind, device)
            save_tensors(path, {part: getattr(zca, part) for part in _PARTS}, {})
        return zca or ZCA.fit(pixels, kind, device)  # nowhere to keep it: it is fitted again

    def to(self, device: torch.device | str) -> ZCA:
        return replace(self, **{part: getattr(self, part).to(device) for part in _PARTS})

    def whiten(self, x: Tensor) -> Tensor:
        """[...,C,H,W] in [0,1] -> whitened, same shape."""
        with torch.autocast(x.device.type, enabled=False):
            return _join((_split(x, _tiles(self.kind)) - self.mean) @ self.matrix, x.shape)

    def colour(self, z: Tensor) -> Tensor:
        """The inverse of `whiten`."""
        with torch.autocast(z.device.type, enabled=False):
            return _join(_split(z, _tiles(self.kind)) @ self.inverse + self.mean, z.shape)


def _kept(path: Path, kind: str, name: str, size: int) -> ZCA:
    parts, _ = load_tensors(path, "ZCA", "it is fitted again")
    square, mean = (size, size), (size,) if _tiles(kind) == 1 else (_tiles(kind), size)
    shapes = {name: tuple(part.shape) for name, part in parts.items()}
    if shapes != {"mean": mean, "matrix": square, "inverse": square}:
        raise DDError(f"the ZCA {path} is of other images; it is fitted again")
    return ZCA(kind, name, **parts)


def _tiles(kind: str) -> int:
    return 4 if kind == "frepo_checkerboard" else 1


def _split(x: Tensor, tiles: int) -> Tensor:
    """[...,C,H,W] -> [...,1,D], or its four sub-images [...,4,D] of rows i::2 and columns j::2."""
    if tiles == 1:
        return x.flatten(-3).unsqueeze(-2)
    x = x.unflatten(-1, (-1, 2)).unflatten(-3, (-1, 2))  # [...,C,H/2,2,W/2,2]
    return x.movedim((-3, -1), (-5, -4)).flatten(-3).flatten(-3, -2)


def _join(x: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of `_split` for images of `shape`."""
    if x.shape[-2] == 1:
        return x.view(shape)
    *_, channels, height, width = shape
    x = x.unflatten(-1, (channels, height // 2, width // 2)).unflatten(-4, (2, 2))
    return x.movedim((-5, -4), (-3, -1)).reshape(shape)


def _identity(kind: str, pixel_sha: str) -> str:
    return hashlib.sha256(f"1 {kind} {pixel_sha}".encode()).hexdigest()[:12]
