"""The long campaigns: python -m tests.campaigns --minutes 30 [--seed 1]; the record is results/campaigns/faults.json."""

import argparse
import os
import platform
import random
import time
from functools import partial
from pathlib import Path

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # before torch: a forked child must find no other thread

import torch

from ddlib.engine.meter import commit
from ddlib.files import write_json

from . import faults, odd

SHARES = {
    "killed at a file operation, then run again": (0.4, faults.campaign),
    "disk full at a file operation, then run again": (0.15, partial(faults.campaign, disk=True)),
    "one run and its transfers asked for by four processes at once": (0.15, faults.meetings),
    "damaged files": (0.15, partial(odd.campaign, odd.damage)),
    "crafted sets with a right checksum": (0.05, partial(odd.campaign, odd.crafted)),
    "odd arguments": (0.1, partial(odd.campaign, odd.arguments)),
}


def campaigns(seconds: float, seed: int) -> list[dict]:
    rows = []
    for what, (share, campaign) in SHARES.items():
        end = time.monotonic() + share * seconds
        counts = campaign(random.Random(seed), lambda end=end: time.monotonic() > end)
        rows.append({"campaign": what} | {key: value for key, value in counts.items() if value})
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("results/campaigns/faults.json"))
    args = parser.parse_args()
    facts = {"minutes": args.minutes, "seed": args.seed, "commit": commit()}
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    rows = campaigns(60 * args.minutes, args.seed)
    write_json(args.out, facts | {"versions": versions, "rows": rows})


if __name__ == "__main__":
    main()
