"""The tables of docs/reliability.md: from the campaigns, from what must not move a number and from the versions."""

import re
from pathlib import Path

from ddlib.files import SOURCE, read_json
from tests.contract import agreement

PAGE = SOURCE / "docs" / "reliability.md"
RECORD = SOURCE / "results" / "campaigns" / "faults.json"
PAIRS = SOURCE / "results" / "campaigns" / "compat.json"
COLUMNS = ("tried", "refused", "lost", "wrong", "traceback", "hung")
RARE = ("computed twice", "program started", "more than one line")


def table(record: Path = RECORD) -> str:
    """Markdown: a row per campaign."""
    kept = read_json(record, "record of the campaigns", "run make campaign")
    columns = (*COLUMNS, *RARE)
    lines = [f"| campaign | {' | '.join(columns)} |", "| --- |" + " --- |" * len(columns)]
    for row in kept["rows"]:
        cells = " | ".join(f"{row.get(column, 0):,}" for column in columns)
        lines.append(f"| {row['campaign']} | {cells} |")
    lines += ["", "Seeds, minutes, versions and the commit of each row stand in the record."]
    return "\n".join(lines)


def compat(record: Path = PAIRS) -> str:
    """Markdown: a row per pair of Python and torch that was tried."""
    kept = read_json(record, "record of the pairs", "run make compat")
    lines = ["| Python | torch | torchvision | tests | of commit |", "| --- |" + " --- |" * 4]
    for _, row in sorted(kept.items()):
        cells = [f"`{row[name]}`" for name in ("python", "torch", "torchvision")]
        cells += [row["tests"].partition(" in ")[0], row["commit"][:7]]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def filled() -> str:
    """The page with its tables anew."""
    text = PAGE.read_text()
    tables = {"campaigns": table(), "agreement": agreement.table(), "compat": compat()}
    for name, made in tables.items():
        marks = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        text = marks.sub(lambda found, made=made: f"{found[1]}{made}\n{found[2]}", text)
    return text


if __name__ == "__main__":
    PAGE.write_text(filled())
