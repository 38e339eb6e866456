"""What an augmentation's name does to images: DSA's operations (Zhao & Bilen, ICML 2021), FRePo's and DC's.

A `Table` turns uniform numbers into the parameters of its operations and applies them; `augment.draw` picks.
IDC (Kim et al., ICML 2022) uses DSA's operations and ranges. FRePo's (Zhou et al., NeurIPS 2022, released code) differ:

            DSA                                          FRePo
    color   brightness +-0.5, saturation x [0, 2],       brightness +-0.25, contrast x e^+-0.25,
            contrast x [0.5, 1.5]                        saturation x e^+-0.25
    crop    shift of +-12.5 %, whole pixels              zoom in [0.8, 1.25], centre anywhere in the slack
    cutout  half the side, may stick out                 a quarter of the side, inside the image
    rotate  +-15 degrees                                 +-15 degrees
    others  flip, scale                                  flip, translate +-12.5 % in parts of a pixel
    border  0                                            the edge pixel, repeated

DC's (Zhao et al., ICLR 2021, released code), for evaluation alone: an operation of its own for every image; crop shifts
of -4 to 3 pixels, scale in [0.8, 1.2] by the nearest pixel, rotation by -45 to 44 whole degrees. Its code fills with
the batch's mean and rotates by cubic splines; here the fill value is 0 as elsewhere, and the rotation is bilinear.

Saturation keeps a pixel's mean over channels, contrast the image's mean. Images are normalised, so the fill value 0
is the mean colour of the dataset, not black. Every function takes x [N, C, H, W] and its rows of parameters [rows, N],
on the device of x.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

# Of the image side: 32 px -> shifts of +-4, holes of 16 px and 8 px.
CROP, CUTOUT, FREPO_CUTOUT = 0.125, 0.5, 0.25
SCALE, ZOOM, ROTATE = 1.2, 1.25, 15.0  # side ratios in [1/1.2, 1.2] and [1/1.25, 1.25]; degrees


@dataclass(frozen=True, eq=False)
class Table:
    """Operations and where the parameters come from.

    apply: by name, (x, rows) -> x. rows: the slice of the parameter table an operation reads.
    ranges(H, W): a row's (a, b, c); its parameter is (u a + b) c for uniform u, or (floor(u a) + b) c in rows `whole`.
    by_image: every image draws its own operation, whatever runs of entries `draw` is asked for.
    """

    apply: dict[str, Callable[[Tensor, Tensor], Tensor]]
    rows: dict[str, slice]
    whole: slice
    ranges: Callable[[int, int], list[tuple[float, float, float]]]
    by_image: bool = False

    @property
    def height(self) -> int:
        return max(rows.stop for rows in self.rows.values())

    def parameters(self, u: Tensor, size: tuple[int, int]) -> Tensor:
        """Uniform u float64 [..., height, N], overwritten by the parameters for images of `size` (H, W)."""
        a, b, c = _coefficients(self, size)
        u *= a
        u[..., self.whole, :].floor_()
        u += b
        u *= c
        return u


@lru_cache(maxsize=64)
def _coefficients(table: Table, size: tuple[int, int]) -> tuple[Tensor, ...]:
    """a, b, c [height, 1]."""
    return torch.tensor(table.ranges(*size), dtype=torch.float64)[:, :, None].unbind(1)


def _column(value: Tensor, x: Tensor) -> Tensor:
    """[N] -> [N, 1, 1, 1] in the type of x."""
    return value.to(x.dtype).view(-1, 1, 1, 1)


def _about(x: Tensor, dims: int | tuple[int, ...], factor: Tensor) -> Tensor:
    """x with its distance from its mean over `dims` multiplied."""
    mean = x.mean(dims, keepdim=True)
    return (x - mean) * factor + mean


def _color(x: Tensor, value: Tensor) -> Tensor:
    shift, saturation, contrast = (_column(v, x) for v in value)
    x = x + shift
    if x.shape[1] > 1:  # with one channel the mean over channels is x itself
        x = _about(x, 1, saturation)
    return _about(x, (1, 2, 3), contrast)


def _crop(x: Tensor, value: Tensor) -> Tensor:
    """out[i, j] = in[i + t_i, j + t_j], 0 outside: an exact gather from the zero-padded image."""
    n, c, h, w = x.shape
    ph, pw = int(h * CROP + 0.5), int(w * CROP + 0.5)
    shift = value.long()
    rows = torch.arange(ph, ph + h, device=x.device) + shift[0, :, None]  # [N, H]
    columns = torch.arange(pw, pw + w, device=x.device) + shift[1, :, None]
    index = (rows[:, :, None] * (w + 2 * pw) + columns[:, None]).view(n, 1, h * w)
    padded = F.pad(x, (pw, pw, ph, ph)).flatten(2)
    return padded.gather(2, index.expand(n, c, h * w)).view_as(x)


def _hole(x: Tensor, start: Iterable[Tensor], sides: list[int]) -> Tensor:
    """Zero the rectangle of `sides` that starts at (row, column) `start`, each [N]; clipped at the border."""
    inside = []
    for side, first, hole in zip(x.shape[2:], start, sides, strict=True):
        offset = torch.arange(side, device=x.device) - first[:, None]
        inside.append((offset >= 0) & (offset < hole))
    return x.masked_fill((inside[0][:, :, None] & inside[1][:, None])[:, None], 0)


def _cutout(x: Tensor, value: Tensor) -> Tensor:
    """Zero the rectangle of half the side around the centre, clipped at the border."""
    holes = [int(side * CUTOUT + 0.5) for side in x.shape[2:]]
    return _hole(x, [centre - hole // 2 for centre, hole in zip(value, holes, strict=True)], holes)


def _flip(x: Tensor, value: Tensor) -> Tensor:
    return torch.where(_column(value[0], x) > 0, x.flip(3), x)


def _scale(x: Tensor, value: Tensor) -> Tensor:
    """theta = diag(s_x, s_y): above 1 shrinks the content."""
    zero = torch.zeros_like(value[0])
    return _affine(x, (value[0], zero, zero, zero, value[1], zero))


def _rotate(x: Tensor, value: Tensor) -> Tensor:
    cos, sin, zero = value[0].cos(), value[0].sin(), torch.zeros_like(value[0])
    return _affine(x, (cos, -sin, zero, sin, cos, zero))


def _affine(
    x: Tensor, theta: tuple[Tensor, ...], border: str = "zeros", mode: str = "bilinear"
) -> Tensor:
    """Without translations align_corners changes nothing: the maps keep the centre (square images)."""
    grid = F.affine_grid(torch.stack(theta, 1).view(-1, 2, 3), list(x.shape), align_corners=False)
    out = F.grid_sample(x.to(grid.dtype), grid, mode=mode, padding_mode=border, align_corners=False)
    return out.to(x.dtype)  # half precision would place the samples up to 1/16 pixel off


def _dsa_ranges(h: int, w: int) -> list[tuple[float, float, float]]:
    shifts = [int(side * CROP + 0.5) for side in (h, w)]
    centres = [side + 1 - int(side * CUTOUT + 0.5) % 2 for side in (h, w)]
    stretch = (SCALE - 1 / SCALE, 1 / SCALE, 1)
    return [
        (1, -0.5, 1),
        (2, 0, 1),
        (1, 0.5, 1),
        *((2 * t + 1, -t, 1) for t in shifts),
        *((k, 0, 1) for k in centres),
        (2, -1, -1),
        stretch,
        stretch,
        (2, -1, ROTATE * math.pi / 180),
    ]


# Rows: brightness shift, saturation and contrast factors; crop shift (rows, columns); cutout centre (row, column);
# flip 0/1; scale (x, y); angle in radians.
DSA = Table(
    {
        "color": _color,
        "crop": _crop,
        "cutout": _cutout,
        "flip": _flip,
        "scale": _scale,
        "rotate": _rotate,
    },
    {
        "color": slice(0, 3),
        "crop": slice(3, 5),
        "cutout": slice(5, 7),
        "flip": slice(7, 8),
        "scale": slice(8, 10),
        "rotate": slice(10, 11),
    },
    slice(3, 8),
    _dsa_ranges,
)


def _jitter(x: Tensor, value: Tensor) -> Tensor:
    shift, contrast, saturation = _column(value[0], x), *(_column(v, x) for v in value[1:].exp())
    x = _about(x + shift, (1, 2, 3), contrast)
    return _about(x, 1, saturation) if x.shape[1] > 1 else x


def _zoom(x: Tensor, value: Tensor) -> Tensor:
    """Read the window of 1/zoom of the side (k), its centre anywhere that keeps window in image or image in window."""
    k = (-value[0]).exp()
    ty, tx = value[1:] * (1 - k).abs()
    zero = torch.zeros_like(k)
    return _affine(x, (k, zero, tx, zero, k, ty), "border")


def _rotate_pixels(x: Tensor, value: Tensor) -> Tensor:
    """As `_rotate`, but in pixels: an image that is not square is not sheared."""
    cos, sin, zero = value[0].cos(), value[0].sin(), torch.zeros_like(value[0])
    aspect = x.shape[2] / x.shape[3]
    return _affine(x, (cos, -sin * aspect, zero, sin / aspect, cos, zero), "border")


def _translate(x: Tensor, value: Tensor) -> Tensor:
    one, zero = torch.ones_like(value[0]), torch.zeros_like(value[0])
    # [-1, 1] spans the image.
    return _affine(x, (one, zero, 2 * value[1], zero, one, 2 * value[0]), "border")


def _square(x: Tensor, value: Tensor) -> Tensor:
    return _hole(x, value, [int(side * FREPO_CUTOUT) for side in x.shape[2:]])


def _frepo_ranges(h: int, w: int) -> list[tuple[float, float, float]]:
    jitter, symmetric = (0.5, -0.25, 1), (2, -1, 1)
    starts = [(side - int(side * FREPO_CUTOUT) + 1, 0, 1) for side in (h, w)]
    return [
        jitter,
        jitter,
        jitter,
        (2, -1, math.log(ZOOM)),
        symmetric,
        symmetric,
        *starts,
        (2, -1, -1),
        (2, -1, ROTATE * math.pi / 180),
        (2, -1, CROP),
        (2, -1, CROP),
    ]


# Rows: brightness shift, log contrast, log saturation; log zoom, its centre (row, column; +-1 is the slack's end);
# cutout's first row and column; flip 0/1; angle in radians; shift (rows, columns) as a share of the side.
FREPO = Table(
    {
        "color": _jitter,
        "crop": _zoom,
        "cutout": _square,
        "flip": _flip,
        "rotate": _rotate_pixels,
        "translate": _translate,
    },
    {
        "color": slice(0, 3),
        "crop": slice(3, 6),
        "cutout": slice(6, 8),
        "flip": slice(8, 9),
        "rotate": slice(9, 10),
        "translate": slice(10, 12),
    },
    slice(6, 9),
    _frepo_ranges,
)


def _stretch(x: Tensor, value: Tensor) -> Tensor:
    """The content grows by `value` (x, y), each pixel the nearest one."""
    zero = torch.zeros_like(value[0])
    return _affine(x, (1 / value[0], zero, zero, zero, 1 / value[1], zero), mode="nearest")


def _dc_ranges(h: int, w: int) -> list[tuple[float, float, float]]:
    shifts = [int(side * CROP + 0.5) for side in (h, w)]
    return [
        *((2 * t, -t, 1) for t in shifts),
        (90, -45, math.pi / 180),
        (0.4, 0.8, 1),
        (0.4, 0.8, 1),
    ]


# Rows: crop shift (rows, columns); angle in radians; scale (x, y).
DC = Table(
    {"crop": _crop, "scale": _stretch, "rotate": _rotate},
    {"crop": slice(0, 2), "rotate": slice(2, 3), "scale": slice(3, 5)},
    slice(0, 3),
    _dc_ranges,
    by_image=True,
)
