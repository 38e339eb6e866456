"""What it takes to look at a kept set where its data are not at hand: NAME.look.safetensors beside the record.

The file holds, after the run's last step: the pixels of a whitened set, thumbnails of the nearest real images (a JPEG),
test images by true and predicted class, and the places of real and synthetic images on two axes; and the pixels of a
whitened set's snapshots. Tens of kilobytes.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..core import DDError
from ..engine.record import Run, set_checksum
from ..files import load_tensors, save_tensors
from ..recipe import VERSION

QUALITY = 80  # of the thumbnails' JPEG: six a class stay below 30 KB at 32 px
CURE = "delete it, or make it again: ddlib look FILE"


def path_of(run: Run) -> Path:
    return run.path.with_suffix(".look.safetensors")


def save(run: Run, facts: dict[str, Tensor]) -> Path:
    """Write the facts: pixels uint8 [n, C, H, W], near uint8 [classes, count, C, H, W], anything else as it is."""
    kept = {name: value for name, value in facts.items() if name != "near"}
    rows, columns = facts["near"].shape[:2]
    header = {
        "set": _identity(run),
        "version": VERSION,
        "grid": [rows, columns],
        "step": run.record["accuracy"]["last"]["step"],
    }
    return save_tensors(path_of(run), kept | {"near": _squeezed(facts["near"])}, header)


def load(run: Run) -> dict[str, Tensor]:
    """What `save` wrote; {} where there is no file, or one of another set or an older evaluation."""
    if not path_of(run).is_file():
        return {}
    facts, header = load_tensors(path_of(run), "file to look at a set", CURE)
    if header.get("set") != _identity(run) or header.get("version") != VERSION:
        return {}
    try:
        facts["near"] = _spread(facts["near"], *header["grid"])
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise DDError(f"{path_of(run)} is damaged ({type(error).__name__}); {CURE}") from error
    return facts


def _identity(run: Run) -> str:
    return set_checksum(run.synthetic)[:16]


def mosaic(images: Tensor) -> Image.Image:
    """uint8 [rows, columns, C, H, W] as one picture."""
    array = images.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1).cpu().numpy()
    return Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)


def _squeezed(images: Tensor) -> Tensor:
    """uint8 [rows, columns, C, H, W] as the bytes of one JPEG: uint8 [length]."""
    file = io.BytesIO()
    mosaic(images).save(file, format="JPEG", quality=QUALITY)
    return torch.from_numpy(np.frombuffer(file.getvalue(), np.uint8).copy())


def _spread(squeezed: Tensor, rows: int, columns: int) -> Tensor:
    """The inverse of `_squeezed`, as near as a JPEG keeps it."""
    with Image.open(io.BytesIO(squeezed.numpy().tobytes()), formats=["JPEG"]) as picture:
        pixels = torch.from_numpy(np.array(picture))
    height, width = pixels.shape[0] // rows, pixels.shape[1] // columns
    cells = pixels.reshape(rows, height, columns, width, -1)
    return cells.permute(0, 2, 4, 1, 3).contiguous()
