"""Folders of images with one file in them that is none, is damaged, or would have a program started."""

import os
import random
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image

import ddlib as dd

from .odd import BATCH, harmed, outcome

POSTSCRIPT = "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"
MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I", "F", "I;16", "CMYK", "YCbCr")
ENDS = ("png", "jpg", "jpeg", "JPEG", "bmp", "webp", "tif", "gif", "ppm", "eps", "svg", "")
NAMES = ("x", ".x", "a b", "é" * 60, "x\n", "\udcff", "-x", "x" * 250)


def image(path: Path, draw: random.Random, mode: str = "L", size: tuple[int, int] = (8, 8)) -> None:
    pixels = np.frombuffer(draw.randbytes(size[0] * size[1]), np.uint8).reshape(size)
    Image.fromarray(pixels).convert(mode).save(
        path, "TIFF" if mode in ("I", "F", "I;16", "CMYK") else "PNG"
    )


def folder(root: Path, draw: random.Random) -> Path:
    for name in ("cat", "dog"):
        (root / name).mkdir(parents=True)
        for number in range(4):
            image(root / name / f"{number}.png", draw)
    return root


def bomb(path: Path, draw: random.Random) -> None:
    """A PNG that claims a size of its own choice."""
    image(path, draw)
    data = bytearray(path.read_bytes())
    side = draw.choice((0, 1, 7, 60_000, 2**31 - 1))
    data[16:20] = side.to_bytes(4, "big")
    path.write_bytes(data)


def damaged(path: Path, draw: random.Random) -> None:
    image(path, draw)
    data = path.read_bytes()
    for _ in range(draw.randint(1, 5)):
        data = harmed(data, draw) or b"x"
    path.write_bytes(data)


SPOILS: tuple[Callable[[Path, random.Random], object], ...] = (
    lambda path, draw: os.mkfifo(path),
    lambda path, draw: path.write_text(POSTSCRIPT),
    lambda path, draw: path.write_bytes(draw.randbytes(draw.choice((0, 1, 100, 5000)))),
    lambda path, draw: path.symlink_to(draw.choice((path, "/dev/zero", "/nowhere", "..", "/dev/stdin"))),
    lambda path, draw: path.mkdir(),
    lambda path, draw: image(path, draw, draw.choice(MODES)),
    lambda path, draw: image(path, draw, size=(draw.choice((1, 2, 7, 3000)), draw.choice((1, 8)))),
    lambda path, draw: path.write_text('<svg><image href="file:///etc/passwd"/></svg>'),
    bomb,
    damaged,
)  # fmt: skip


def pictures(paths: dict[str, str], seed: int) -> Counter:
    """One child's cases; a file may stand among a class, or in place of one."""
    draw, counts = random.Random(seed), Counter()
    warnings.simplefilter("ignore")
    for _ in range(BATCH):
        with TemporaryDirectory() as place:
            root = folder(Path(place) / "pets", draw)
            os.environ["DDLIB_CACHE"] = f"{place}/cache"
            name = f"{draw.choice(NAMES)}.{draw.choice(ENDS)}".rstrip(".")
            spoilt = draw.choice((root / "cat" / name, root / "cat" / "0.png", root / name))
            spoilt.unlink(missing_ok=True)
            try:
                draw.choice(SPOILS)(spoilt, draw)
            except (OSError, ValueError):  # a file that this file system or Pillow does not make
                continue
            resolution = draw.choice((None, None, 8, 64))
            outcome(
                counts,
                f"pictures {seed}",
                dd.load,
                f"folder:{root}",
                device="cpu",
                resolution=resolution,
            )
    return counts
