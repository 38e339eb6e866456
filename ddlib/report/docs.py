"""The tables in README and docs that come from the records, each between markers that name it. Nothing is run.

`<!-- KIND:begin WORDS (how to renew it) -->` ... `<!-- KIND:end -->`, KIND one of `headline` (README), `results` (the
long tables), `claims` (verdicts by paper) and `records`, whose words are the methods of a page.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from ..files import SOURCE
from . import answers, claims, tables
from .plots import short
from .verdict import COUNTED, VERDICTS

BLOCK = re.compile(
    r"(<!-- (headline|results|claims|records):begin([\w ]*)\(.*?\) -->\n).*?(<!-- \2:end -->)",
    re.DOTALL,
)


def fill(text: str, results: str | Path | None = None) -> str:
    """A page with its blocks renewed from the records."""

    def renewed(block: re.Match) -> str:
        return block[1] + KINDS[block[2]](block[3].split(), results) + "\n" + block[4]

    return BLOCK.sub(renewed, text)


def pages() -> list[Path]:
    """The files that have such blocks: README and everything in docs."""
    return [SOURCE / "README.md", *sorted((SOURCE / "docs").rglob("*.md"))]


def write(results: str | Path | None = None) -> list[Path]:
    """Renew the blocks of all pages; those that changed."""
    changed = []
    for path in pages():
        old = path.read_text()
        if (new := fill(old, results)) != old:
            path.write_text(new)
            changed.append(path)
    return changed


def _runs(results: str | Path | None, methods: list[str]) -> dict[str, pd.DataFrame]:
    """Kept profile -> its runs, of all methods where none is named."""
    found = {profile: tables.stored(results, profile) for profile in answers.KEPT}
    kept = {
        profile: [run for run in runs if not methods or run.record["method"] in methods]
        for profile, runs in found.items()
    }
    return {profile: tables.runs(runs) for profile, runs in kept.items() if runs}


def _headline(_: list[str], results: str | Path | None) -> str:
    judged = claims.judge(claims.load(), results)
    numbers = judged.kind.value_counts()
    words = ", ".join(f"{numbers[word]} {word}" for word in VERDICTS if word in numbers)
    runs = [run for profile in answers.KEPT for run in tables.stored(results, profile)]
    front = tables.front_page(tables.runs(runs))
    if len(front):
        words_alone = front.verdict.str.partition(",")[0]  # the long table has its marks
        front = front.assign(dataset=front.dataset.map(short), verdict=words_alone)
        front = front.drop(columns="Δ").rename(columns={"dataset": "data set", "ipc": "IPC"})
    stand = numbers.reindex(COUNTED).sum()
    line = f"Of {len(judged)} claims of the five papers {stand:.0f} stand: {words}."
    return f"{line}\n\n{tables.as_markdown(front) if len(front) else 'No record yet.'}"


def _results(_: list[str], results: str | Path | None) -> str:
    parts = [
        f"### Profile `{profile}`\n\n{tables.markdown(table)}"
        for profile, table in _runs(results, []).items()
    ]
    return "\n\n".join(parts) or "No record yet."


def _claims(_: list[str], results: str | Path | None) -> str:
    counts = claims.counts(claims.judge(claims.load(), results))
    titles = {paper: facts["title"].partition(":")[0] for paper, facts in claims.papers().items()}
    table = tables.as_markdown(counts.assign(paper=counts.paper.map(titles)))
    return f"{table}\n\n{claims.from_memory()}"


def _records(methods: list[str], results: str | Path | None) -> str:
    printed = pd.concat([claims.of_method(method) for method in methods])
    printed["ipc"] = printed.ipc.astype(int)
    rows = claims.shown(claims.judge(printed, results)).rename(columns={"what": "method"})
    rows["protocol"] = printed.protocol.tolist()
    for column in ("paper", "ours"):
        rows[column] = [text.removesuffix(" %") for text in rows[column]]
    columns = ["method", "dataset", "IPC", "protocol", "paper", "evidence", "ours", "verdict"]
    columns = columns[1:] if len(methods) == 1 else columns
    parts = [
        "**Paper | ours**, test accuracy (%), last step, mean ± spread over networks and seeds:",
        tables.as_markdown(rows[columns])
        if len(rows)
        else "No table of this method could be read; the claims have the figures that could.",
    ]
    kept = _runs(results, methods)
    parts += [
        f"**Kept runs and their cost**, `{profile}` profile:\n\n{tables.markdown(table)}"
        for profile, table in kept.items()
    ]
    return "\n\n".join(parts if kept else [*parts, "No run is kept yet."])


KINDS: dict[str, Callable[[list[str], str | Path | None], str]] = {
    "headline": _headline,
    "results": _results,
    "claims": _claims,
    "records": _records,
}
