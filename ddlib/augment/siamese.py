"""Differentiable augmentation drawn apart from the images: DSA (Zhao & Bilen, ICML 2021, section 3.2), IDC's, FRePo's.

The parameters are drawn once, so the same transform reaches the real and the synthetic batch:

    params = draw("color_crop_cutout_flip_scale_rotate", classes, (32, 32), generator)   # one entry a class
    augment(real, params.repeat(256)), augment(synthetic, params.repeat(ipc))            # [C*256,...], [C*ipc,...]

Training on the set draws one op a mini-batch and the op's parameters per image: `draw(..., op_every=batch)`.

A strategy is a sequence of stages joined by "+"; a stage is one or more ops joined by "_", of which one is drawn:

    "color_crop_cutout_flip_scale_rotate"                    DSA: one op of six
    "color+crop+cutout", "color+flip+crop_scale_rotate"      IDC: in matching; in evaluation, before CutMix
    "frepo:flip_color_crop_rotate_translate_cutout"          FRePo's own ops (operations.py), in evaluation
    "dc:crop_scale_rotate"                                   DC's, in its evaluation on MNIST

IDC's code fixes the order flip, color, one of the others, cutout, whatever the order of its string. Here the order is
as written; color and flip may change places, since a mirror image has the same means.

Differences from the official codes: no global seeds and no clock (an explicit generator); a batch of classes instead
of a loop over classes, which is exact because no op mixes images.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from ..core import DDError, choose, instance, upload
from .operations import DC, DSA, FREPO, Table

OPS = tuple(DSA.apply)
TABLES = {"dsa": DSA, "frepo": FREPO, "dc": DC}


@dataclass(frozen=True)
class DSAParams:
    """What `draw` drew for N entries and S stages, on the CPU.

    op: int64 [S, N], index into the table's ops.
    values: float64 [S, rows, N], the parameters of every op of the table (see the tables of operations.py).
    stages: the strategy, the ops of each stage; size: (H, W) of the images.
    """

    op: Tensor
    values: Tensor
    stages: tuple[tuple[str, ...], ...]
    size: tuple[int, int]
    table: Table

    def __len__(self) -> int:
        return self.op.shape[-1]

    def repeat(self, k: int) -> DSAParams:
        """Each entry k times in a row (repeat_interleave): k images of every class share the class's transform."""
        return replace(
            self, op=self.op.repeat_interleave(k, -1), values=self.values.repeat_interleave(k, -1)
        )

    def select(self, index: Tensor | slice) -> DSAParams:
        """The entries at `index`, a slice or a CPU index or mask tensor."""
        return replace(self, op=self.op[:, index], values=self.values[..., index])


@lru_cache(maxsize=256)
def _parse(strategy: str) -> tuple[Table, tuple[tuple[str, ...], ...]]:
    """The table and the stages of a strategy."""
    if strategy in ("", "none"):
        return DSA, ()
    prefix, _, rest = strategy.rpartition(":")
    table = TABLES[choose("table of augmentations", prefix or "dsa", TABLES)]
    stages = tuple(tuple(stage.split("_")) for stage in rest.split("+"))
    for op in (op for stage in stages for op in stage):
        choose("augmentation", op, table.apply)
    return table, stages


def check_strategy(strategy: str) -> None:
    """Raise DDError when `draw` would not know an op or the table of `strategy`."""
    _parse(instance("augment", strategy, str))


def draw(
    strategy: str,
    n: int,
    size: tuple[int, int],
    generator: torch.Generator,
    *,
    op_every: int = 1,
) -> DSAParams:
    """Draw transforms for n entries of images of `size` (H, W) from the CPU `generator`.

    strategy: ops joined by "_", stages by "+"; "" or "none" is no augmentation (and draws nothing).
    Each run of `op_every` consecutive entries has one op a stage, uniform over the stage (the papers' mode S);
    parameters are independent per entry and stage. Raises DDError for an unknown op, and for op_every < 1.
    """
    if op_every < 1:
        raise DDError(f"op_every is {op_every}; it must be at least 1")
    table, stages = _parse(strategy)
    op_every = 1 if table.by_image else op_every
    # float64: floor(u * k) of a float32 u can round up to k.
    u = torch.rand(len(stages) * (table.height + 1), n, generator=generator, dtype=torch.float64)
    u = u.view(len(stages), table.height + 1, n)
    names, op = list(table.apply), torch.empty(len(stages), n, dtype=torch.int64)
    for stage, coin, row in zip(stages, u[:, -1, ::op_every], op, strict=True):
        allowed = torch.tensor([names.index(name) for name in stage])
        row.copy_(allowed[(coin * len(stage)).long()].repeat_interleave(op_every)[:n])
    return DSAParams(op, table.parameters(u[:, :-1], tuple(size)), stages, tuple(size), table)


def augment(x: Tensor, params: DSAParams) -> Tensor:
    """Transform the normalised images x [N, C, H, W] by `params` of length N; differentiable (also twice) in x.

    Raises DDError when `params` was drawn for another number or size of images.
    """
    if len(x) != len(params) or tuple(x.shape[2:]) != params.size:
        raise DDError(
            f"DSA parameters for {len(params)} images of {params.size[0]}x{params.size[1]} cannot be applied "
            f"to images of shape {tuple(x.shape)}; draw them for these images"
        )
    if not len(x):
        return x
    for op, values in zip(params.op, params.values, strict=True):
        x = _one_each(x, params.table, op, values)
    return x


def _one_each(x: Tensor, table: Table, op: Tensor, values: Tensor) -> Tensor:
    """Every image under its own op: sort by op, transform each group in one piece, sort back; all known on the CPU."""
    counts = torch.bincount(op, minlength=len(table.apply)).tolist()
    groups = [(name, count) for name, count in zip(table.apply, counts, strict=True) if count]
    if len(groups) == 1:
        name = groups[0][0]
        return table.apply[name](x, _to_device(values[table.rows[name]], x))
    order = op.argsort(stable=True)
    back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
    values = _to_device(values[:, order], x)
    order, back = _to_device(torch.stack([order, back]), x)
    sizes = [count for _, count in groups]
    pieces = x.index_select(0, order).split(sizes)
    done = [
        table.apply[name](piece, value[table.rows[name]])
        for (name, _), piece, value in zip(groups, pieces, values.split(sizes, 1), strict=True)
    ]
    return torch.cat(done).index_select(0, back)


def _to_device(table: Tensor, x: Tensor) -> Tensor:
    """One transfer that does not wait for the device; parameters in at least float32, whatever x is."""
    if table.is_floating_point() and x.dtype != torch.float64:
        table = table.float()
    return upload(table, x.device)


def cutmix(
    x: Tensor, y: Tensor, generator: torch.Generator, p: float = 0.5, n_classes: int | None = None
) -> tuple[Tensor, Tensor]:
    """CutMix (Yun et al., ICCV 2019) as in IDC's code: with probability p, one box of every image is its partner's.

    x [n, C, H, W]; y int64 [n] (with `n_classes`) or float [n, classes]. Returns x and y float [n, classes]; a pasted
    share s of the image gives label (1 - s) y + s y'. Partner: a random permutation of the batch. The box has
    2 floor(floor(side sqrt(1 - lambda)) / 2) pixels a side, lambda ~ Beta(1, 1) = U(0, 1), around a uniform pixel, and
    is clipped at the border. Raises DDError for p outside [0, 1].
    """
    if not 0 <= p <= 1:
        raise DDError(f"cutmix is a probability and must lie in [0, 1], not {p}")
    y = y if y.is_floating_point() else x.new_zeros(len(y), n_classes).scatter_(1, y[:, None], 1)
    coin, lam, *centre = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
    partner = torch.randperm(len(x), generator=generator)
    if coin >= p:
        return x, y
    partner = _to_device(partner, x)
    box, share = [slice(None), slice(None)], 1.0
    for side, u in zip(x.shape[2:], centre, strict=True):
        half, middle = int(side * math.sqrt(1 - lam)) // 2, int(u * side)
        box.append(slice(max(0, middle - half), min(side, middle + half)))
        share *= (box[-1].stop - box[-1].start) / side
    mixed = x.clone()
    mixed[tuple(box)] = x[tuple(box)][partner]
    return mixed, (1 - share) * y + share * y[partner]
