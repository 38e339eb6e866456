"""The long campaigns: python -m tests.campaigns --minutes 30 [--seed 1] [--only kills disk] [--whole].

The record is results/campaigns/faults.json. A campaign that is run again at the same commit with another seed is added
to its row there, else its row is made anew; so the whole may be run in parts.
"""

import argparse
import os
import platform
import random
import time
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path

# Before torch: a forked child must find no other thread.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from ddlib.core import DDError
from ddlib.engine.meter import commit
from ddlib.files import read_json, write_json

from . import calls, faults, odd, pictures

RECORD = Path("results/campaigns/faults.json")


@dataclass(frozen=True)
class Campaign:
    """What is tried, how often where the whole is asked for, and else for which share of the time."""

    what: str
    cases: int
    share: float
    run: object


CAMPAIGNS = {
    "kills": Campaign(
        "killed, at a file operation or any moment, then run again",
        1000,
        0.35,
        partial(faults.campaign, faults.kill),
    ),
    "disk": Campaign(
        "disk full, over quota, read-only, broken or folder gone, then run again",
        100,
        0.1,
        partial(faults.campaign, faults.fail),
    ),
    "meetings": Campaign(
        "runs that share files, one run and its transfers asked for by four processes at once",
        500,
        0.15,
        faults.meetings,
    ),
    "damage": Campaign("damaged files", 10_000, 0.1, partial(odd.campaign, odd.damage)),
    "crafted": Campaign(
        "crafted sets with a right checksum", 2000, 0.05, partial(odd.campaign, odd.crafted)
    ),
    "pictures": Campaign(
        "folders with a crafted or damaged image",
        2000,
        0.05,
        partial(odd.campaign, pictures.pictures),
    ),
    "arguments": Campaign(
        "odd arguments of functions and commands",
        5000,
        0.2,
        partial(odd.campaign, calls.arguments),
    ),
}


def kept(out: Path) -> dict[str, dict]:
    """The rows of the record so far, by what was tried."""
    try:
        rows = read_json(out, "record of the campaigns", "")["rows"]
    except DDError:
        rows = []
    return {row["campaign"]: row for row in rows if "commit" in row}


def added(row: dict, old: dict | None) -> dict:
    """The row with the counts of an earlier call at the same commit."""
    same = old and old["commit"] == row["commit"] and not set(row["seeds"]) & set(old["seeds"])
    if not same:
        return row
    summed = Counter({key: value for key, value in row.items() if isinstance(value, (int, float))})
    summed.update({key: value for key, value in old.items() if isinstance(value, (int, float))})
    return row | summed | {"seeds": sorted(old["seeds"] + row["seeds"])}


def run(campaign: Campaign, seconds: float, seed: int, whole: bool) -> dict:
    """One campaign's row."""
    start = time.monotonic()
    if whole:
        end = lambda tried: tried >= campaign.cases
    else:
        end = lambda tried: time.monotonic() - start > campaign.share * seconds
    counts = campaign.run(random.Random(f"{campaign.what} {seed}"), end)
    facts = {"commit": commit(), "seeds": [seed], "minutes": (time.monotonic() - start) / 60}
    return {"campaign": campaign.what} | {k: v for k, v in counts.items() if v} | facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=CAMPAIGNS, default=[*CAMPAIGNS])
    parser.add_argument("--whole", action="store_true", help="all cases, however long it takes")
    parser.add_argument("--out", type=Path, default=RECORD)
    args = parser.parse_args()
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for name in args.only:
        campaign = CAMPAIGNS[name]
        row = run(campaign, 60 * args.minutes, args.seed, args.whole)
        print(row, flush=True)
        rows = kept(args.out)
        rows[campaign.what] = added(row, rows.get(campaign.what))
        order = [each.what for each in CAMPAIGNS.values() if each.what in rows]
        write_json(args.out, {"versions": versions, "rows": [rows[what] for what in order]})


if __name__ == "__main__":
    main()
