"""Speed and memory against the plain loops: `python -m benchmarks [--only PART] [--out FILE]`, or `make bench`."""

from __future__ import annotations

import argparse
import importlib
import json
from pathlib import Path

from ddlib.core import pick_device
from ddlib.engine import heap
from ddlib.files import write_atomically

PARTS = ("dm", "trajectory", "frepo", "gradient", "kmeans", "dream")


def parser() -> argparse.ArgumentParser:
    arguments = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    arguments.add_argument("--only", choices=PARTS, help="one part; default: all")
    arguments.add_argument("--device", default="auto", help="auto (the default), cpu or cuda")
    arguments.add_argument("--out", type=Path, help="write the rows as JSON to this file")
    return arguments


def main() -> None:
    args = parser().parse_args()
    heap.keep()
    rows: list[dict] = []
    for name in [args.only] if args.only else PARTS:
        rows += importlib.import_module(f"benchmarks.{name}").main(pick_device(args.device))
    if args.out:
        write_atomically(args.out, lambda path: path.write_text(json.dumps(rows, indent=1)))


if __name__ == "__main__":
    main()
