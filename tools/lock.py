"""requirements.lock and docs/licences.md: every package that `make env` installs, with hashes and licences.

python tools/lock.py REPORT.json... reads what pip's resolver said, one report for each Python:

    python -m pip install --dry-run --ignore-installed --report REPORT.json -c constraints.txt '.[docs,lab,test]'

(with --python-version 3.12 --only-binary :all: --target x for another Python than the running one). Without a report it
renews the licences alone. The hashes are those of Linux wheels on x86-64; elsewhere constraints.txt has the versions.
"""

from __future__ import annotations

import json
import re
import sys
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOCK = ROOT / "requirements.lock"
PAGE = ROOT / "docs" / "licences.md"
HEAD = """# Every package of `make env` on Linux, x86-64, with the sha256 of its wheels: made by tools/lock.py.
# python -m pip install --require-hashes -r requirements.lock
# python -m pip install --no-deps --no-build-isolation -e .
"""
INTRO = """# Licences of the dependencies

What `make env` installs and under which licence, as each package says of itself; made by `python tools/lock.py`, and a
test compares it with `requirements.lock`. ddlib's own is MIT. The data sets have licences of their own: see
[data](data.md).

| package | version | licence |
| --- | --- | --- |
"""


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def locked() -> dict[str, tuple[str, list[str]]]:
    """Package -> (version, hashes) of the lock."""
    packages: dict[str, tuple[str, list[str]]] = {}
    for entry in LOCK.read_text().replace("\\\n", " ").splitlines():
        if entry and not entry.startswith("#"):
            pin, *hashes = entry.split()
            name, version = pin.split("==")
            packages[name] = (version, [text.partition(":")[2] for text in hashes])
    return packages


def read(reports: list[str]) -> dict[str, tuple[str, list[str]]]:
    """The same, from pip's reports; ddlib itself is left out."""
    packages: dict[str, tuple[str, list[str]]] = {}
    for report in reports:
        for item in json.loads(Path(report).read_text())["install"]:
            name, version = canonical(item["metadata"]["name"]), item["metadata"]["version"]
            if name == "ddlib":
                continue
            known, hashes = packages.setdefault(name, (version, []))
            if known != version:
                raise SystemExit(f"{name} is {known} and {version}: pin it in constraints.txt")
            sha256 = item["download_info"]["archive_info"]["hashes"]["sha256"]
            if sha256 not in hashes:
                hashes.append(sha256)
    return packages


def written(packages: dict[str, tuple[str, list[str]]]) -> str:
    lines = [HEAD.rstrip()]
    for name, (version, hashes) in sorted(packages.items()):
        lines.append(
            " \\\n    ".join([f"{name}=={version}", *(f"--hash=sha256:{h}" for h in hashes)])
        )
    return "\n".join(lines) + "\n"


def licence(name: str) -> str:
    """One line: the SPDX expression, else the classifiers, else the first line of the field."""
    try:
        about = metadata(name)
    except PackageNotFoundError:
        return "not installed here"
    if about.get("License-Expression"):
        return about["License-Expression"]
    kinds = [
        text.split(" :: ")[-1] for text in about.get_all("Classifier", []) if "License ::" in text
    ]
    first = (about.get("License") or "").strip().splitlines()
    return ", ".join(kinds) or (first[0][:60] if first else "it says none")


def page(packages: dict[str, tuple[str, list[str]]]) -> str:
    rows = (f"| {name} | {packages[name][0]} | {licence(name)} |" for name in sorted(packages))
    return INTRO + "\n".join(rows) + "\n"


if __name__ == "__main__":
    if sys.argv[1:]:
        LOCK.write_text(written(read(sys.argv[1:])))
    PAGE.write_text(page(locked()))
