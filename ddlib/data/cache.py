"""Images of a folder, decoded once: in parallel into one uint8 array a split, kept on disk and memory-mapped.

The cache (folder DDLIB_CACHE, else ~/.cache/ddlib/decoded) holds one .npy [N,C,H,W] and one .json a split. Its name
is a hash of the folder, the resolution and every file's name, size and time of change, so a changed folder is decoded
anew. A decoding that was stopped goes on where it was. Nothing there is needed: it may be deleted at any time.
"""

from __future__ import annotations

import ctypes
import hashlib
import math
import mmap
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache, partial
from itertools import groupby
from pathlib import Path
from stat import S_ISREG
from tokenize import TokenError
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from ..core import DDError, checksum
from ..files import CannotWrite, lock, read_json, write_atomically, write_json
from .folders import LABELS, Tree

LARGE = (
    2 * 10**9
)  # bytes: a larger split is verified by 64 blocks of 1 MiB, its rows are read ahead
_BATCH = 1024  # images in memory beside the map: 12 MB at 3x64x64
_BLOCK_BYTES = 2**28  # the same for large images
_MOST_PIXELS = 2**27  # of one resized image, before its centre is cropped
_FORMATS = ("JPEG", "PNG", "BMP", "DIB", "WEBP", "PPM", "TIFF")  # those of `EXTENSIONS`
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
    first, shapes = _shapes(tree, resolution, grey)
    for shape in shapes:
        with suppress(_Colour):
            return {split: _decoded(tree, split, resolution, shape, first) for split in tree[2]}
    raise AssertionError("unreachable: three channels take any image")


def read_ahead(images: Tensor, rows: Tensor) -> None:
    """Ask the disk for rows of a large split that is mapped, all at once.

    Where the memory does not hold the split, the kernel else waits for one row after another, and reads with each a
    window around it that is many times as large.
    """
    if images.nbytes <= LARGE or images.device.type != "cpu" or os.name != "posix":
        return
    first, size = images.data_ptr(), images[0].nbytes
    advise = ctypes.CDLL(None).madvise
    for row in rows.flatten().tolist():
        start = (first + row * size) // mmap.PAGESIZE * mmap.PAGESIZE
        length = first + (row + 1) * size - start
        advise(ctypes.c_void_p(start), ctypes.c_size_t(length), mmap.MADV_WILLNEED)


States = dict[str, list[tuple[int, int]]]  # split -> size and time of change (ns) of each image


def states(tree: Tree) -> States:
    """What tells that a file was changed; one that cannot be read or is no regular file is a `DDError`."""
    root, _, splits = tree
    return {
        split: _states(root, [file for file, _ in samples]) for split, samples in splits.items()
    }


def known_checksums(
    tree: Tree, found: States, resolution: int | None, grey: bool = False
) -> dict[str, str] | None:
    """Split -> checksum of its images as the cache's notes have it for these files; None where one has no note."""
    root, _, splits = tree
    for shape in _shapes(tree, resolution, grey)[1]:
        paths = {
            split: _cache_path(root, split, samples, found[split], resolution, shape)
            for split, samples in splits.items()
        }
        with suppress(DDError, KeyError):
            return {split: _noted_checksum(path) for split, path in paths.items()}
    return None


class Watch:
    """A folder of which every file was looked at: whether it has changed since, in a few hundredths of a second.

    A file that comes, goes, is renamed or replaced changes the time of its directory; all directories are asked each
    time. One that is written over does not: about `EACH_TIME` of the files, spread evenly, are asked, others each time.
    """

    EACH_TIME = 4096
    QUIET = 2 * 10**9  # ns without a change, so that none can hide behind a clock's coarse step

    def __init__(self, tree: Tree, found: States, started: int):
        """`started`: `time.time_ns()` before the folder was listed."""
        self.root, _, splits = tree
        self.files = [file for samples in splits.values() for file, _ in samples]
        self.states = [state for split in splits for state in found[split]]
        folders = {file.rpartition("/")[0] for file in self.files}
        above = {str(parent) for folder in folders for parent in Path(folder).parents}
        lists = {f"{split}/{LABELS}" for split in ("test", "val")}
        self.places = folders | above | {name for name in lists if (self.root / name).is_file()}
        self.times = self._times()
        latest = max(max(self.times), max(time for _, time in self.states))
        self.useful = latest < started - self.QUIET
        self.turn, self.turns = 0, math.ceil(len(self.files) / self.EACH_TIME)

    def changed(self) -> bool:
        """Whether a directory or one of the files whose turn it is differs from what it was."""
        part = slice(self.turn, None, self.turns)
        self.turn = (self.turn + 1) % self.turns
        with suppress(DDError):
            now = _states(self.root, self.files[part])
            return self._times() != self.times or now != self.states[part]
        return True

    def _times(self) -> list[int]:
        try:
            return [os.stat(self.root / place).st_mtime_ns for place in self.places]
        except OSError as error:
            raise DDError(f"{self.root} changes while it is read: {error.strerror}") from error


def _shapes(
    tree: Tree, resolution: int | None, grey: bool
) -> tuple[Path, list[tuple[int, int, int]]]:
    """The first image's path, and the shapes [C,H,W] that all may have: grey where it is, else colour."""
    root, _, splits = tree
    first = root / splits["train"][0][0]
    image = _open(first)
    width, height = (resolution, resolution) if resolution else image.size
    channels = (1, 3) if grey and image.mode in ("L", "1") else (3,)
    return first, [(count, height, width) for count in channels]


@cache
def _formats() -> tuple[str, ...]:
    """Those of the named formats that this Pillow was built with."""
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _open(path: Path) -> Image.Image:
    # A pipe would be waited for, and Pillow hands some formats to other programs.
    if path.exists() and not path.is_file():
        raise DDError(f"the image {path} is not a regular file; replace or remove it")
    try:
        with Image.open(path, formats=_formats()) as image:
            image.load()
    except Exception as error:  # OSError, SyntaxError, struct.error, ...: Pillow lets all through
        raise DDError(
            f"cannot decode the image {path}; replace or remove it ({type(error).__name__})"
        ) from error
    if image.mode[0] in "IF":
        raise DDError(f"the image {path} has more than 8 bits a channel; convert it to 8 bits")
    return image


def _pixels(
    path: Path, resolution: int | None, shape: tuple[int, int, int], first: Path
) -> np.ndarray:
    from torchvision.transforms.functional import center_crop, resize

    (channels, height, width), image = shape, _open(path)
    if channels == 1 and image.mode not in ("L", "1"):
        raise _Colour
    if not resolution and image.size != (width, height):
        raise DDError(
            f"images of mixed sizes: {first} is {width}x{height} and {path} is {image.width}x{image.height}; "
            f"give a resolution"
        )
    image = image.convert("L" if channels == 1 else "RGB")
    if image.size != (width, height):
        if max(image.size) * resolution**2 > min(image.size) * _MOST_PIXELS:
            raise DDError(
                f"the image {path} of {image.width}x{image.height} is too narrow to be resized to "
                f"{resolution}; replace or remove it"
            )
        image = center_crop(resize(image, resolution), resolution)
    return np.asarray(image).reshape(height, width, channels).transpose(2, 0, 1)


def _decoded(
    tree: Tree, split: str, resolution: int | None, shape: tuple[int, int, int], first: Path
) -> tuple[Tensor, str]:
    root, classes, splits = tree
    files, labels = ([sample[i] for sample in splits[split]] for i in (0, 1))
    path = _cache_path(root, split, splits[split], _states(root, files), resolution, shape)
    whole = (len(files), *shape)
    cached = _from_cache(path, whole)
    if cached:
        return cached
    decode = partial(_blocks, root, split, files, resolution, shape, first)
    try:
        _ask_for_room(path, math.prod(whole))
        with lock(path, f"the decoding of {root.name}/{split}") as alone:
            cached = _from_cache(path, whole, warn=True)  # another process may have built it
            if cached:
                return cached
            write_atomically(
                path, lambda to: _write_images(to, path if alone else to, whole, decode)
            )
            images = torch.from_numpy(np.load(path, mmap_mode="c"))
            note = {
                "source": str(root),
                "split": split,
                "resolution": resolution,
                "shape": whole,
                "sha256": checksum(images),
                "sampled": _sampled(images),
                "classes": classes,
                "labels": labels,
                "files": files,
            }
            write_json(path.with_suffix(".json"), note)
            return images, note["sha256"]
    except CannotWrite:
        warnings.warn(
            f"cannot write the decode cache {path.parent}, so images are decoded on each load; "
            f"set DDLIB_CACHE to a writable folder with free space",
            stacklevel=2,
        )
    images = torch.from_numpy(_in_memory(root, whole, decode))
    return images, checksum(images)


def _ask_for_room(path: Path, size: int) -> None:
    """Raise `CannotWrite` where `path` of `size` bytes will not go into its folder: asked before hours of decoding."""
    folder, part = path.parent, _beside(path, "part")
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        size -= part.stat().st_size
    if not os.access(folder, os.W_OK) or shutil.disk_usage(folder).free < size:
        raise CannotWrite(f"no room in {folder}")


def _beside(path: Path, ending: str) -> Path:
    return path.with_name(f"{path.name}.{ending}")


def _block_size(shape: tuple[int, ...]) -> int:
    """Images [*, C, H, W] of a shape that are decoded, and written, together."""
    return max(1, min(_BATCH, _BLOCK_BYTES // math.prod(shape[-3:])))


def _blocks(
    root: Path,
    split: str,
    files: Sequence[str],
    resolution: int | None,
    shape: tuple[int, int, int],
    first: Path,
    done: int = 0,
) -> Iterator[np.ndarray]:
    """The decoded images in their order, from number `done` on, some at a time: uint8 [n,C,H,W]."""
    size = _block_size(shape)
    starts = tqdm(
        range(done, len(files), size),
        f"decoding {root.name}/{split}",
        unit="img",
        unit_scale=size,
        initial=done // size,
        total=math.ceil(len(files) / size),
        delay=1,
        leave=False,
        disable=None,
    )
    with ThreadPoolExecutor(min(32, os.cpu_count() or 1)) as pool:
        for start in starts:
            paths = (root / file for file in files[start : start + size])
            yield np.stack(
                list(pool.map(lambda path: _pixels(path, resolution, shape, first), paths))
            )


def _write_images(
    to: Path, path: Path, shape: tuple[int, ...], decode: Callable[..., Iterator[np.ndarray]]
) -> None:
    """Move to `to` a .npy file of the images, which grows block by block as `path` with `.part` behind it.

    `.done` has a checksum of each block: a decoding that was stopped goes on behind the last one that is as it was
    written. Written, not mapped: a disk that fills up is an error, not a bus error.
    """
    part, done = (_beside(path, ending) for ending in ("part", "done"))
    part.touch()
    done.touch()
    size = _block_size(shape)
    try:
        with open(part, "r+b") as images, open(done, "r+b") as sums:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(images, header)
            blocks = _find_end(images, sums, size * math.prod(shape[1:]))
            for block in decode(done=blocks * size):
                pixels = block.tobytes()
                images.write(pixels)
                images.flush()
                sums.write(hashlib.sha256(pixels).digest())
                sums.flush()
        os.replace(part, to)
        done.unlink()
    except Exception:  # with one image changed the name is another; a full disk gets its room back
        part.unlink(missing_ok=True)
        done.unlink(missing_ok=True)
        raise


def _find_end(images: BinaryIO, sums: BinaryIO, length: int) -> int:
    """Cut both files behind the last block of `length` bytes that its checksum fits; the number of blocks."""
    blocks, end = 0, images.tell()
    while (known := sums.read(32)) and hashlib.sha256(images.read(length)).digest() == known:
        blocks, end = blocks + 1, images.tell()
    for file, place in ((images, end), (sums, 32 * blocks)):
        file.seek(place)
        file.truncate()
    return blocks


def _in_memory(
    root: Path, shape: tuple[int, ...], decode: Callable[[], Iterator[np.ndarray]]
) -> np.ndarray:
    size, memory = math.prod(shape), os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if size > memory:
        raise DDError(
            f"{shape[0]} images of {root} take {size / 2**30:,.0f} GiB at {shape[3]}x{shape[2]}, more "
            "than the memory and the disk of the decode cache: give a smaller resolution, or set "
            "DDLIB_CACHE to a folder with room"
        )
    images, start = np.empty(shape, np.uint8), 0
    for block in decode():
        images[start : start + len(block)] = block
        start += len(block)
    return images


@cache
def _noted_checksum(path: Path) -> str:
    """Read once per process: names, sizes and times of the files are part of the path, so it never changes."""
    return _note(path)["sha256"]


def _note(path: Path) -> dict:
    """What the cache says about the decoded images at `path`."""
    return read_json(path.with_suffix(".json"), "decode cache", "it is built again")


def _cache_path(
    root: Path,
    split: str,
    samples: Sequence[tuple[str, int]],
    found: Sequence[tuple[int, int]],
    resolution: int | None,
    shape: tuple,
) -> Path:
    key = hashlib.sha256(repr((_VERSION, str(root.resolve()), resolution, shape)).encode())
    lines = (
        f"{file}\0({size}, {time})\0"
        for (file, _), (size, time) in zip(samples, found, strict=True)
    )
    key.update("".join(lines).encode(errors="surrogateescape"))
    return cache_folder() / f"{root.name}-{split}-{key.hexdigest()[:16]}.npy"


def _states(root: Path, files: Sequence[str]) -> list[tuple[int, int]]:
    """Size and time of change (ns) of each file, in their order.

    Each is asked for in its folder, held open: by its path from the root of the disk it takes twice as long.
    """
    found = []
    for folder, group in groupby(files, lambda file: file.rpartition("/")[0]):
        name = folder
        try:
            handle = os.open(root / folder, os.O_RDONLY)
            try:
                for name in group:
                    stat = os.stat(name[len(folder) + 1 :], dir_fd=handle)
                    if not S_ISREG(stat.st_mode):
                        raise DDError(
                            f"the image {root / name} is not a regular file; replace or remove it"
                        )
                    found.append((stat.st_size, stat.st_mtime_ns))
            finally:
                os.close(handle)
        except OSError as error:
            raise DDError(
                f"{root} lists the image {name}, which cannot be read: {error.strerror}"
            ) from error
    return found


def _from_cache(
    path: Path, shape: tuple[int, ...], warn: bool = False
) -> tuple[Tensor, str] | None:
    """The cached images if they are whole, as a copy-on-write map: writing to the tensor never reaches the file."""
    # Images without a note are of a process that was killed between the two.
    if not (path.is_file() and path.with_suffix(".json").is_file()):
        return None
    # DDError, a ValueError, is a damaged note's; NumPy lets a damaged header's TokenError through.
    with suppress(OSError, ValueError, KeyError, TypeError, EOFError, TokenError):
        note, images = _note(path), torch.from_numpy(np.load(path, mmap_mode="c"))
        small = images.nbytes <= LARGE
        verify, name = (checksum, "sha256") if small else (_sampled, "sampled")
        if (images.shape, images.dtype, verify(images)) == (shape, torch.uint8, note[name]):
            return images, note["sha256"]
    if warn:
        warnings.warn(f"the decoded images {path} are damaged and are built again", stacklevel=2)
    return None


def _sampled(images: Tensor) -> str:
    """Checksum of 64 blocks of 1 MiB spread evenly over the bytes, the last block included."""
    flat, block = images.flatten(), 2**20
    starts = np.linspace(0, max(len(flat) - block, 0), 64).astype(np.int64)
    return checksum(*(flat[start : start + block] for start in starts))
