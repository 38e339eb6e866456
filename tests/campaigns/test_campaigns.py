"""The campaigns in short: a few cases of each, in a process that has imported torch and computed nothing."""

import os
import subprocess
import sys
from pathlib import Path

from tests.campaigns.page import PAGE, filled

CODE = """
import random
from tests.campaigns import calls, faults, odd, pictures

def times(number):
    return lambda tried: tried >= number

bad = ("lost", "wrong", "traceback", "hung", "computed twice", "more than one line", "program started")
found = {
    "kills": faults.campaign(faults.kill, random.Random(0), times(5), methods=["dm"]),
    "disk": faults.campaign(faults.fail, random.Random(1), times(3), methods=["dm"]),
    "meetings": faults.meetings(random.Random(2), times(4), many=2, methods=["dm"]),
    "damage": odd.campaign(odd.damage, random.Random(3), times(1)),
    "crafted": odd.campaign(odd.crafted, random.Random(4), times(1)),
    "arguments": odd.campaign(calls.arguments, random.Random(5), times(1)),
    "pictures": odd.campaign(pictures.pictures, random.Random(6), times(1)),
}
for name, counts in found.items():
    assert counts["tried"] and not any(counts[key] for key in bad), (name, counts)
"""


def test_a_few_cases_of_every_campaign(tmp_path):
    root = str(Path(__file__).resolve().parents[2])
    env = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", "DDLIB_RESULTS": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", CODE], capture_output=True, text=True, env=env, cwd=root, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def test_the_page_says_what_the_record_does():
    assert PAGE.read_text() == filled()
