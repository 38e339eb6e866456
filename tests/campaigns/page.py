"""The table of docs/reliability.md, from the record of the campaigns."""

import re
from pathlib import Path

from ddlib.files import SOURCE, read_json

PAGE = SOURCE / "docs" / "reliability.md"
RECORD = SOURCE / "results" / "campaigns" / "faults.json"
COLUMNS = ("tried", "refused", "lost", "wrong", "traceback", "hung", "computed twice")


def table(record: Path = RECORD) -> str:
    """Markdown: a row per campaign."""
    kept = read_json(record, "record of the campaigns", "run make campaign")
    lines = [f"| campaign | {' | '.join(COLUMNS)} |", "| --- |" + " --- |" * len(COLUMNS)]
    for row in kept["rows"]:
        cells = " | ".join(f"{row.get(column, 0):,}" for column in COLUMNS)
        lines.append(f"| {row['campaign']} | {cells} |")
    lines += ["", "Seed, minutes, versions and commit stand in the record."]
    return "\n".join(lines)


def filled(record: Path = RECORD) -> str:
    """The page with its table anew."""
    marks = re.compile(r"(<!-- campaigns -->\n).*?(<!-- /campaigns -->)", re.DOTALL)
    return marks.sub(lambda found: f"{found[1]}{table(record)}\n{found[2]}", PAGE.read_text())


if __name__ == "__main__":
    PAGE.write_text(filled())
