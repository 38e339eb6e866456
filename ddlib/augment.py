"""DSA: differentiable Siamese augmentation (Zhao & Bilen, ICML 2021, section 3.2), all classes in one call.

The parameters are drawn once, apart from the images, so the same transform reaches the real and the synthetic batch:

    params = draw("color_crop_cutout_flip_scale_rotate", classes, (32, 32), generator)   # one entry a class
    augment(real, params.repeat(256)), augment(synthetic, params.repeat(ipc))            # [C*256,...], [C*ipc,...]

Training on the set draws one op a mini-batch and the op's parameters per image: `draw(..., op_every=batch)`.

Differences from the official code: no global seeds and no clock (an explicit generator); a batch of classes instead
of a loop over classes, which is exact because no op mixes images.
Images are normalised, so the fill value 0 is the mean colour of the dataset, not black.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .core import DDError, choose

OPS = ("color", "crop", "cutout", "flip", "scale", "rotate")
MODES = ("S", "M")

BRIGHTNESS, SATURATION, CONTRAST = 1.0, 2.0, 0.5  # shift +-0.5; factor in [0, 2]; factor in [0.5, 1.5]
CROP, CUTOUT = 0.125, 0.5  # of the image side: 32 px -> shifts of +-4 and a 16 px hole
FLIP, SCALE, ROTATE = 0.5, 1.2, 15.0  # probability; side ratio in [1/1.2, 1.2]; degrees in +-15

# Rows of DSAParams.values, by op.
ROWS = {"color": slice(0, 3), "crop": slice(3, 5), "cutout": slice(5, 7), "flip": slice(7, 8),
        "scale": slice(8, 10), "rotate": slice(10, 11)}


@dataclass(frozen=True)
class DSAParams:
    """What `draw` drew for N entries, on the CPU.

    op: int64 [N], index into OPS (-1: leave the entry alone); unused in mode M.
    values: float64 [11, N], every op's parameters (ROWS): brightness shift, saturation and contrast factors; crop
    shift (rows, columns); cutout centre (row, column); flip 0/1; scale (x, y); angle in radians.
    ops: the strategy; size: (H, W) of the images; mode: S or M.
    """

    op: Tensor
    values: Tensor
    ops: tuple[str, ...]
    size: tuple[int, int]
    mode: str

    def __len__(self) -> int:
        return len(self.op)

    def repeat(self, k: int) -> DSAParams:
        """Each entry k times in a row (repeat_interleave): k images of every class share the class's transform."""
        return replace(self, op=self.op.repeat_interleave(k), values=self.values.repeat_interleave(k, 1))

    def select(self, index: Tensor | slice) -> DSAParams:
        """The entries at `index`, a slice or a CPU index or mask tensor."""
        return replace(self, op=self.op[index], values=self.values[:, index])


def draw(strategy: str, n: int, size: tuple[int, int], generator: torch.Generator, *, op_every: int = 1,
         mode: str = "S") -> DSAParams:
    """Draw transforms for n entries of images of `size` (H, W) from the CPU `generator`.

    strategy: op names joined by "_"; "" or "none" is no augmentation (and draws nothing).
    mode "S" (the papers' default) gives each run of `op_every` consecutive entries one op, uniform over the strategy;
    mode "M" applies all ops in the strategy's order. Parameters are independent per entry in both.
    Raises DDError for an unknown op or mode, and for op_every < 1.
    """
    choose("DSA mode", mode, MODES)
    if op_every < 1:
        raise DDError(f"op_every is {op_every}; it must be at least 1")
    ops = () if strategy in ("", "none") else tuple(strategy.split("_"))
    for op in ops:
        choose("DSA op", op, OPS)
    if not ops:
        return DSAParams(torch.full((n,), -1), torch.zeros(11, n, dtype=torch.float64), ops, tuple(size), mode)

    # float64: floor(u * k) of a float32 u can round up to k.
    u = torch.rand(12, n, generator=generator, dtype=torch.float64)
    allowed = torch.tensor([OPS.index(op) for op in ops])
    op = allowed[(u[11, ::op_every] * len(ops)).long()].repeat_interleave(op_every)[:n]

    u[0] = (u[0] - 0.5) * BRIGHTNESS
    u[1] *= SATURATION
    u[2] += CONTRAST
    for axis, side in enumerate(size):
        shift, hole = int(side * CROP + 0.5), int(side * CUTOUT + 0.5)
        u[3 + axis] = (u[3 + axis] * (2 * shift + 1)).floor() - shift
        u[5 + axis] = (u[5 + axis] * (side + 1 - hole % 2)).floor()
    u[7] = (u[7] < FLIP).double()
    u[8:10] = u[8:10] * (SCALE - 1 / SCALE) + 1 / SCALE
    u[10] = (2 * u[10] - 1) * (ROTATE * math.pi / 180)
    return DSAParams(op, u[:11], ops, tuple(size), mode)


def augment(x: Tensor, params: DSAParams) -> Tensor:
    """Transform the normalised images x [N, C, H, W] by `params` of length N; differentiable (also twice) in x.

    Raises DDError when `params` was drawn for another number or size of images.
    """
    if len(x) != len(params) or tuple(x.shape[2:]) != params.size:
        raise DDError(f"DSA parameters for {len(params)} images of {params.size[0]}x{params.size[1]} cannot be applied "
                      f"to images of shape {tuple(x.shape)}; draw them for these images")
    if not params.ops or not len(x):
        return x
    if params.mode == "M":
        values = _to_device(params.values, x)
        for op in params.ops:
            x = APPLY[op](x, values[ROWS[op]])
        return x

    # Group the entries by op: sort, transform each group in one piece, sort back. All of it is known on the CPU.
    counts = torch.bincount(params.op, minlength=len(OPS)).tolist()
    groups = [(op, count) for op, count in zip(OPS, counts, strict=True) if count]
    if len(groups) == 1:
        op = groups[0][0]
        return APPLY[op](x, _to_device(params.values[ROWS[op]], x))
    order = params.op.argsort(stable=True)
    back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
    values = _to_device(params.values[:, order], x)
    order, back = _to_device(torch.stack([order, back]), x)
    sizes = [count for _, count in groups]
    pieces = x.index_select(0, order).split(sizes)
    done = [APPLY[op](piece, value[ROWS[op]])
            for (op, _), piece, value in zip(groups, pieces, values.split(sizes, 1), strict=True)]
    return torch.cat(done).index_select(0, back)


def _to_device(table: Tensor, x: Tensor) -> Tensor:
    """One transfer that does not wait for the device; parameters in at least float32, whatever x is."""
    if table.is_floating_point() and x.dtype != torch.float64:
        table = table.float()
    return table.pin_memory().to(x.device, non_blocking=True) if x.is_cuda else table.to(x.device)


def _column(value: Tensor, x: Tensor) -> Tensor:
    """[N] -> [N, 1, 1, 1] in the type of x."""
    return value.to(x.dtype).view(-1, 1, 1, 1)


def _color(x: Tensor, value: Tensor) -> Tensor:
    shift, saturation, contrast = (_column(v, x) for v in value)
    x = x + shift
    if x.shape[1] > 1:  # with one channel the mean over channels is x itself
        mean = x.mean(1, keepdim=True)
        x = (x - mean) * saturation + mean
    mean = x.mean((1, 2, 3), keepdim=True)
    return (x - mean) * contrast + mean


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


def _cutout(x: Tensor, value: Tensor) -> Tensor:
    """Zero the rectangle of half the side around the centre, clipped at the border."""
    inside = []
    for side, centre in zip(x.shape[2:], value, strict=True):
        hole = int(side * CUTOUT + 0.5)
        offset = torch.arange(side, device=x.device) - centre[:, None] + hole // 2
        inside.append((offset >= 0) & (offset < hole))
    return x.masked_fill((inside[0][:, :, None] & inside[1][:, None])[:, None], 0)


def _flip(x: Tensor, value: Tensor) -> Tensor:
    return torch.where(_column(value[0], x) > 0, x.flip(3), x)


def _scale(x: Tensor, value: Tensor) -> Tensor:
    """theta = diag(s_x, s_y): above 1 shrinks the content."""
    zero = torch.zeros_like(value[0])
    return _affine(x, (value[0], zero, zero, zero, value[1], zero))


def _rotate(x: Tensor, value: Tensor) -> Tensor:
    cos, sin, zero = value[0].cos(), value[0].sin(), torch.zeros_like(value[0])
    return _affine(x, (cos, -sin, zero, sin, cos, zero))


def _affine(x: Tensor, theta: tuple[Tensor, ...]) -> Tensor:
    """Bilinear, zeros outside. align_corners changes nothing here: the maps keep the centre (square images)."""
    grid = F.affine_grid(torch.stack(theta, 1).view(-1, 2, 3), list(x.shape), align_corners=False)
    out = F.grid_sample(x.to(grid.dtype), grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return out.to(x.dtype)  # half precision would place the samples up to 1/16 pixel off


APPLY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "color": _color, "crop": _crop, "cutout": _cutout, "flip": _flip, "scale": _scale, "rotate": _rotate}
