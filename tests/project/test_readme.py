"""README.md's figures are those of the committed records, and its commands exist."""

import json
import re
import subprocess
import sys
from pathlib import Path

from ddlib.report import tables

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_the_measured_table_is_what_the_records_say():
    block = re.search(
        r"<!-- measured:begin .*?-->\n(.*?)\n?<!-- measured:end -->", README, re.DOTALL
    )[1]
    # `small` only: smoke's records are made on each machine anew, and are not committed.
    assert block == tables.markdown(tables.runs(tables.stored(ROOT / "results", "small"))), (
        "run: python -m ddlib list --markdown --profile small, and paste its table"
    )


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
