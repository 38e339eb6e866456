"""README.md's figures are those of the committed records, and its commands exist."""

import re
import subprocess
import sys
from pathlib import Path

from ddlib import tables

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_measured_table_is_what_the_records_say():
    block = re.search(r"<!-- measured:begin .*?-->\n(.*?)\n?<!-- measured:end -->", README, re.DOTALL)[1]
    # `small` only: smoke's records are made on each machine anew, and are not committed.
    assert block == tables.markdown(tables.runs(tables.stored(ROOT / "results", "small"))), (
        "run: python -m ddlib list --markdown --profile small, and paste its table")


def test_every_subcommand_named_exists():
    for command in sorted(set(re.findall(r"python -m ddlib (\w+)", README))):
        done = subprocess.run([sys.executable, "-m", "ddlib", command, "--help"], cwd=ROOT, capture_output=True,
                              check=False)
        assert done.returncode == 0, command
