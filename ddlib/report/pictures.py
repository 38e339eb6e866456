"""The pictures of README.md, made anew by `python -m ddlib.report.pictures` from the kept sets.

`real_to_distilled.png`: real images, and what FRePo and DM made of such. `forming.gif`: one FRePo set from its first
step to its last, by its snapshots.
"""

from __future__ import annotations

from pathlib import Path

import torch
from matplotlib import pyplot as plt
from PIL import Image

from ..files import SOURCE
from . import explore, lesson, look, plots

ENLARGED = 2  # pixels of the animation for each pixel of an image


def forming() -> dict[int, torch.Tensor]:
    """Step -> pixels [10, 3, 32, 32] of FRePo's kept CIFAR-10 set at IPC 1."""
    run = lesson.kept_run("frepo", "cifar10", 1)
    return {step: explore.Look(run, step).pixels.float() / 255 for step in explore.steps(run)}


def strip(shots: dict[int, torch.Tensor]) -> plt.Figure:
    """Three rows of ten classes: the real images that FRePo began with, its set, and DM's at IPC 10."""
    dm = lesson.kept_run("dm", "cifar10", 10, lr_img=1.0).synthetic  # the paper's step size
    rows = [shots[0], shots[max(shots)], dm.pixels()[:: dm.ipc]]
    names = ["real", "FRePo, IPC 1", f"DM, IPC {dm.ipc}"]
    return plots.grid(torch.cat(rows), len(dm.classes), titles=dm.classes, rows=names, scale=0.75)


def animation(shots: dict[int, torch.Tensor], path: Path) -> Path:
    """An animated GIF of two rows of five classes; it dwells on the first and the last frame."""
    frames = []
    for pixels in shots.values():
        tiles = torch.nn.functional.pad(pixels, (1, 1, 1, 1), value=1.0)
        picture = look.mosaic((tiles * 255).round().byte().unflatten(0, (2, 5)))
        width, height = picture.size
        frames.append(picture.resize((width * ENLARGED, height * ENLARGED), Image.NEAREST))
    palette = [frame.quantize(64, dither=Image.Dither.NONE) for frame in frames]
    pauses = [1200, *[700] * (len(palette) - 2), 2500]
    first, *others = palette
    first.save(path, save_all=True, append_images=others, duration=pauses, loop=0, optimize=True)
    return path


def main() -> None:
    folder = SOURCE / "docs" / "images"
    folder.mkdir(parents=True, exist_ok=True)
    shots = forming()
    strip(shots).savefig(folder / "real_to_distilled.png", dpi=100, bbox_inches="tight")
    animation(shots, folder / "forming.gif")
    print(f"{folder}: real_to_distilled.png, forming.gif")


if __name__ == "__main__":
    main()
