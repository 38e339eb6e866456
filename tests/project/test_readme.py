"""README.md's figures are those of the committed records, and its commands exist."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ddlib.report import docs

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("page", ["README.md", "docs/results.md"])
def test_the_tables_are_what_the_records_say(page):
    text = (ROOT / page).read_text()
    assert docs.BLOCK.search(text), page
    # The kept profiles alone: smoke's records are made on each machine anew, and are not committed.
    assert docs.fill(text, ROOT / "results") == text, f"{page}: run python -m ddlib docs"


def test_every_subcommand_named_exists():
    for command in sorted(set(re.findall(r"python -m ddlib (\w+)", README))):
        done = subprocess.run(
            [sys.executable, "-m", "ddlib", command, "--help"],
            cwd=ROOT,
            capture_output=True,
            check=False,
        )
        assert done.returncode == 0, command


def test_the_speed_figures_are_those_of_the_bench_rows():
    rows = [
        row
        for path in (ROOT / "results" / "bench").glob("*.json")
        for row in json.loads(path.read_text())
    ]
    speed = README.split("## Speed")[1].split("\n## ")[0].replace("\n", " ")
    steps = [row for row in rows if row["what"] == "DM iteration" and row["classes"] == 10]
    assert [row["ipc"] for row in steps] == [1, 10, 50]
    for key, digits in (("seconds", 1), ("times faster", 1), ("over roofline", 2)):
        assert " / ".join(f"{row[key]:.{digits}f}" for row in steps) in speed, key
    (score,) = (row for row in rows if row["what"].startswith("evaluation"))
    assert f"{score['times faster']:.2f} times a DataLoader loop" in speed
    (exact,) = (row for row in rows if row["what"] == "outer step, adjoint")
    assert (
        f"{exact['over tesla']:.2f} times TESLA's" in speed
        and f"{exact['over unroll']:.2f}" in speed
    )
