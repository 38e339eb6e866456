"""Images of a folder, decoded once: in parallel into one uint8 array a split, which is kept on disk.

The cache (folder DDLIB_CACHE, else ~/.cache/ddlib/decoded) holds one .npy [N,C,H,W] and one .json a split. Its name
is a hash of the folder, the resolution and every file's name, size and time of change, so a changed folder is decoded
anew. Nothing there is needed: it may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from .core import DDError, checksum, write_atomically
from .folders import Listing, Tree

MAP_ABOVE = 10**9  # bytes: a larger split stays memory-mapped instead of being read into memory
VERIFY_ALL_BELOW = 2 * 10**9  # bytes: a larger split is verified by its size and 64 blocks of 1 MiB spread over it
_CHUNK = 128  # images a task: keeps the threads' bookkeeping far below the decoding
_VERSION = 1  # raise when decoding changes


class _Colour(Exception):
    """A colour image turned up among what looked like grey ones."""


def cache_folder() -> Path:
    return Path(os.environ.get("DDLIB_CACHE") or "~/.cache/ddlib/decoded").expanduser()


def read(tree: Tree, resolution: int | None, grey: bool = False) -> dict[str, tuple[Tensor, str]]:
    """Split -> (uint8 images [N,C,H,W], their checksum), decoded or from the cache.

    With a resolution the shorter side is resized to it (bilinear with antialiasing) and the centre cropped, as
    torchvision's Resize and CenterCrop do; without one all images must share one size. EXIF rotation is ignored, as
    torchvision's ImageFolder does. `grey` keeps one channel where every image is grey; else images become RGB.
    """
    classes, listings = tree
    first = listings["train"].root / listings["train"].files[0]
    with _opened(first) as image:
        size = (resolution, resolution) if resolution else image.size
        grey = grey and image.mode in ("L", "1")
    for channels in (1, 3) if grey else (3,):
        with suppress(_Colour):
            return {split: _decoded(listing, split, classes, resolution, (channels, size[1], size[0]), first)
                    for split, listing in listings.items()}
    raise AssertionError("unreachable: three channels take any image")


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    try:
        with Image.open(path) as image:
            if image.mode[0] in "IF":
                raise DDError(f"the image {path} has more than 8 bits a channel; convert it to 8 bits")
            yield image
    except DDError:
        raise
    except (OSError, SyntaxError, ValueError, IndexError, EOFError, struct.error, Image.DecompressionBombError) as error:
        raise DDError(f"cannot decode the image {path}; replace or remove it ({type(error).__name__})") from error


def _pixels(path: Path, resolution: int | None, shape: tuple[int, int, int], first: Path) -> np.ndarray:
    channels, height, width = shape
    with _opened(path) as image:
        if channels == 1 and image.mode not in ("L", "1"):
            raise _Colour
        w, h = image.size
        if not resolution and (w, h) != (width, height):
            raise DDError(f"images of mixed sizes: {first} is {width}x{height} and {path} is {w}x{h}; "
                          f"give a resolution")
        image = image.convert("L" if channels == 1 else "RGB")
        if resolution and (w, h) != (width, height):
            w, h = (resolution, int(resolution * h / w)) if w <= h else (int(resolution * w / h), resolution)
            left, top = round((w - width) / 2), round((h - height) / 2)
            image = image.resize((w, h), Image.Resampling.BILINEAR).crop((left, top, left + width, top + height))
    return np.asarray(image).reshape(height, width, channels).transpose(2, 0, 1)


def _fill(out: np.ndarray, listing: Listing, resolution: int | None, first: Path, title: str) -> None:
    def work(start: int) -> int:
        files = listing.files[start:start + _CHUNK]
        for row, file in enumerate(files, start):
            out[row] = _pixels(listing.root / file, resolution, out.shape[1:], first)
        return len(files)

    with (tqdm(total=len(out), desc=title, unit="img", delay=1, leave=False, disable=None) as bar,
          ThreadPoolExecutor(min(32, os.cpu_count() or 1)) as pool):
        for done in pool.map(work, range(0, len(out), _CHUNK)):
            bar.update(done)


def _decoded(listing: Listing, split: str, classes: Sequence[str], resolution: int | None,
             shape: tuple[int, int, int], first: Path) -> tuple[Tensor, str]:
    if not listing.files:
        empty = torch.empty(0, *shape, dtype=torch.uint8)
        return empty, checksum(empty)
    key = hashlib.sha256(repr((_VERSION, str(listing.root.resolve()), resolution, shape)).encode())
    for file, stat in zip(listing.files, listing.stats, strict=True):
        key.update(f"{file}\0{stat}\0".encode(errors="surrogateescape"))
    stem = re.sub(r"[^\w.-]", "_", listing.root.name)
    path = cache_folder() / f"{stem}-{split}-{key.hexdigest()[:16]}.npy"
    shape = (len(listing.files), *shape)
    cached = _from_cache(path, shape)
    if cached:
        return cached
    title = f"decoding {listing.root.name}/{split}"
    temporary, out = _create(path, shape)
    try:
        _fill(out, listing, resolution, first, title)
        pixels = torch.from_numpy(out)
        sha = checksum(pixels)
        if temporary is None:
            return pixels, sha
        note = {"source": str(listing.root), "split": split, "resolution": resolution, "shape": shape, "sha256": sha,
                "sampled": _sampled(out), "classes": classes, "labels": listing.labels, "files": listing.files}
        out.flush()
        os.replace(temporary, path)
        with suppress(DDError):  # without its note the array is decoded again next time
            write_atomically(path.with_suffix(".json"), lambda to: to.write_text(json.dumps(note)))
    finally:
        if temporary:
            temporary.unlink(missing_ok=True)
    return _in_memory_if_small(np.load(path, mmap_mode="c")), sha


def _create(path: Path, shape: tuple[int, ...]) -> tuple[Path | None, np.ndarray]:
    """A temporary memory-mapped file with its disk space reserved, or plain memory where none can be written."""
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
        temporary = Path(name)
        out = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.uint8, shape=shape)
        if hasattr(os, "posix_fallocate"):  # a full disk is an error here, not a bus error while decoding
            with open(temporary, "r+b") as file:
                os.posix_fallocate(file.fileno(), 0, temporary.stat().st_size)
        return temporary, out
    except OSError as error:
        if temporary:
            temporary.unlink(missing_ok=True)
        warnings.warn(f"cannot write the decode cache {path.parent} ({error.strerror}), so images are decoded on each "
                      f"load; set DDLIB_CACHE to a writable folder", stacklevel=2)
        return None, np.empty(shape, np.uint8)


def _from_cache(path: Path, shape: tuple[int, ...]) -> tuple[Tensor, str] | None:
    """The cached array if it is whole; a damaged one is named in a warning and decoded anew."""
    try:
        note = json.loads(path.with_suffix(".json").read_text())
        array = np.load(path, mmap_mode="c")
        if array.shape == shape and array.dtype == np.uint8:
            if array.nbytes > VERIFY_ALL_BELOW:
                good = _sampled(array) == note["sampled"]
            else:
                good = checksum(torch.from_numpy(array)) == note["sha256"]
            if good:
                return _in_memory_if_small(array), note["sha256"]
    except OSError:  # not there, or not readable for this user
        return None
    except (ValueError, KeyError, TypeError, EOFError):
        pass
    warnings.warn(f"the decoded images {path} are damaged and are built again", stacklevel=2)
    return None


def _in_memory_if_small(array: np.ndarray) -> Tensor:
    """A copy-on-write map (writing to the tensor never reaches the file), or a copy in memory below 1 GB."""
    return torch.from_numpy(array if array.nbytes > MAP_ABOVE else np.array(array))


def _sampled(array: np.ndarray) -> str:
    """sha256 of 64 blocks of 1 MiB spread evenly over the bytes, the last block included."""
    flat, block = array.reshape(-1), 2**20
    sha = hashlib.sha256()
    for start in np.linspace(0, max(flat.size - block, 0), 64).astype(np.int64):
        sha.update(flat[start:start + block].tobytes())
    return sha.hexdigest()
