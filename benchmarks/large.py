"""A set larger than the memory it is given: decoding, a stop on the way, and batches: `python -m benchmarks.large`.

A tree of `--images` JPEG files of 64 x 64 pixels in 1,000 classes, as ImageNet-1K has them at that size. The files are
hard links to 1,000 random pictures, which asks for every image to be opened and decoded, but not for their disk space.
A process decodes the tree and is killed on the way; a second one goes on; a third one finds the cache and takes
batches of one random image of each class. `anonymous` is the memory that a process needs (its own, RssAnon), `mapped`
that of the cache's pages which it has looked at: the kernel takes those back when somebody else needs the room. To see
that it may, start the whole in a control group with little memory, where the pages count too, e.g. by `systemd-run
--scope -p MemoryMax=1500M`; the row says what the limit was.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from ddlib.core import generator, pick_device
from ddlib.data.dataset import load
from ddlib.engine.meter import machine
from ddlib.files import write_atomically

CLASSES, SIDE = 1000, 64


def plant(root: Path, images: int) -> None:
    """`images` files of training images in `CLASSES` folders, and one test image a class."""
    rng = np.random.default_rng(0)
    for number in range(CLASSES):
        name = f"{number:04d}"
        for split, count in (("train", images // CLASSES), ("test", 1)):
            folder = root / split / name
            folder.mkdir(parents=True)
            picture = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
            picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(folder / "0.jpg")
            for copy in range(1, count):
                os.link(folder / "0.jpg", folder / f"{copy}.jpg")


def resident() -> dict[str, float]:
    """MiB of this process: its own memory, and pages of files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return {
        name: int(fields[key].split()[0]) / 2**10
        for name, key in (("anonymous", "RssAnon"), ("mapped", "RssFile"))
    }


def limit() -> float | None:
    """MiB that the control group of this process may use, pages of files among them; None where it has no limit."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, kind, group = line.split(":", 2)
        if kind in ("", "memory"):  # "" in the second version of control groups
            name = "memory.limit_in_bytes" if kind else "memory.max"
            file = Path("/sys/fs/cgroup", kind, group[1:], name)
            text = file.read_text().strip() if file.is_file() else "max"
            if text != "max" and int(text) < 2**60:
                return int(text) / 2**20
    return None


def stream(root: Path, batches: int) -> dict[str, float]:
    """Load the set and take batches of one image a class; seconds, and the most memory meanwhile."""
    start = time.perf_counter()
    data = load(f"folder:{root}", resolution=SIDE, device="cpu")
    row, most = {"seconds to load": time.perf_counter() - start}, resident()
    start = time.perf_counter()
    for step in range(batches):
        data.batch("train", data.sample(1, generator(0, "large", step))[:, 0])
        most = {name: max(most[name], now) for name, now in resident().items()}
    row["images per second"] = batches * CLASSES / (time.perf_counter() - start)
    return row | {f"{name} MiB": value for name, value in most.items()}


def child(root: Path, batches: int) -> subprocess.Popen:
    words = [sys.executable, "-m", "benchmarks.large", "--root", str(root)]
    return subprocess.Popen([*words, "--batches", str(batches)], stdout=subprocess.PIPE, text=True)


def decode(root: Path, cache: Path) -> dict[str, float]:
    """Decode in a process that is killed with a third of the pixels written, then in one that goes on."""
    whole = sum(1 for _ in (root / "train").glob("*/*.jpg")) * 3 * SIDE**2
    start, first = time.perf_counter(), child(root, 0)
    while first.poll() is None:
        written = sum(part.stat().st_size for part in cache.glob("*-train-*.part"))
        if written > whole / 3:
            first.send_signal(signal.SIGKILL)
            first.wait()
        time.sleep(0.05)
    stopped = time.perf_counter()
    second = json.loads(child(root, 0).communicate()[0])
    end = time.perf_counter()
    return {
        "seconds until the kill": stopped - start,
        "share decoded before it": written / whole,
        "seconds after it": end - stopped,
        "images decoded per second": whole * (1 - written / whole) / 3 / SIDE**2 / (end - stopped),
        "anonymous MiB, decoding": second["anonymous MiB"],
    }


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=350_000, help="4.3 GB decoded (the default)")
    parser.add_argument("--batches", type=int, default=300)
    parser.add_argument("--root", type=Path, help="an existing tree: stream it alone, print JSON")
    parser.add_argument("--out", type=Path, help="write the row as JSON to this file")
    args = parser.parse_args(words)
    if args.root:
        print(json.dumps(stream(args.root, args.batches)))
        return
    with tempfile.TemporaryDirectory() as place:
        root, cache = Path(place) / "large", Path(place) / "cache"
        os.environ["DDLIB_CACHE"] = str(cache)
        plant(root, args.images)
        row = {"images": args.images, "GB": args.images * 3 * SIDE**2 / 1e9}
        row |= {"device": machine(pick_device("cpu")), "cores": len(os.sched_getaffinity(0))}
        row |= {"limit MiB": limit()}
        row |= decode(root, cache)
        row |= json.loads(child(root, args.batches).communicate()[0])
    print(json.dumps(row, indent=1))
    if args.out:
        write_atomically(args.out, lambda path: path.write_text(json.dumps([row], indent=1)))


if __name__ == "__main__":
    main()
