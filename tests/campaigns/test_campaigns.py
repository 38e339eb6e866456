"""The campaigns in short: a few cases of each, in a process that has imported torch and computed nothing."""

import os
import random
from pathlib import Path

from tests import forks
from tests.campaigns.page import PAGE, filled

BAD = ("lost", "wrong", "traceback", "hung", "computed twice", "more than one line")
BAD += ("program started",)


def times(number: int):
    return lambda tried: tried >= number


def a_few() -> None:
    # Not before: a child must find a process without threads, and this one may have some.
    from tests.campaigns import calls, faults, odd, pictures

    draws = map(random.Random, range(7))
    found = {
        "kills": faults.campaign(faults.kill, next(draws), times(3), methods=["dm"]),
        "disk": faults.campaign(faults.fail, next(draws), times(2), methods=["dm"]),
        "meetings": faults.meetings(next(draws), times(2), many=2, methods=["dm"]),
        "damage": odd.campaign(odd.damage, next(draws), times(1)),
        "crafted": odd.campaign(odd.crafted, next(draws), times(1)),
        "arguments": odd.campaign(calls.arguments, next(draws), times(1)),
        "pictures": odd.campaign(pictures.pictures, next(draws), times(1)),
    }
    for name, counts in found.items():
        assert counts["tried"] and not any(counts[key] for key in BAD), (name, counts)
    for place in (faults.pictures(), odd.originals_of_all()[0]):
        place.cleanup()
    print("all", len(found))


def test_a_few_cases_of_every_campaign(tmp_path):
    root = Path(__file__).resolve().parents[2]
    env = {**os.environ, "DDLIB_RESULTS": str(tmp_path)}
    done = forks.run([a_few], env=env, cwd=root, timeout=900)
    said = done.stdout[-2000:] + done.stderr[-2000:]
    assert done.returncode == 0 and done.stdout.endswith("all 7\n"), said


def test_the_page_says_what_the_record_does():
    assert PAGE.read_text() == filled()
