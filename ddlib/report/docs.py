"""What comes from the records in README, docs and docstrings. Nothing is run.

A table stands between markers that name it:

`<!-- KIND:begin WORDS (how to renew it) -->` ... `<!-- KIND:end -->`, KIND one of `headline` (README), `results` (the
long tables), `whole` (the whole training set), `claims` (verdicts by paper) and `records`, whose words are the methods
of a page. In the docstring of a method's class the line "`METHOD` attains ..." says what its run nearest to the paper
reached.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path

import pandas as pd

from ..core import DDError
from ..files import SOURCE, write_atomically
from ..methods.coreset import KINDS as REAL
from ..studies import trajectories
from . import answers, claims, tables
from .plots import SIZES, setting, short
from .verdict import COUNTED, VERDICTS

NO_BREAK = "\N{NO-BREAK SPACE}"
BLOCK = re.compile(
    r"(<!-- (headline|results|whole|claims|records):begin([\w ]*)\(.*?\) -->\n).*?(<!-- \2:end -->)",
    re.DOTALL,
)
ATTAINS = re.compile(r"^( +)`(\w+)` attains .*?\.$", re.MULTILINE | re.DOTALL)
PROSE = 120  # columns of a docstring


def fill(text: str, results: str | Path | None = None) -> str:
    """A page, or a module, with what comes from the records renewed."""

    def renewed(block: re.Match) -> str:
        return block[1] + KINDS[block[2]](block[3].split(), results) + "\n" + block[4]

    def attained(line: re.Match) -> str:
        sentence = f"`{line[2]}` attains {_attained(line[2], results)}"
        return textwrap.fill(sentence, PROSE, initial_indent=line[1], subsequent_indent=line[1])

    return ATTAINS.sub(attained, BLOCK.sub(renewed, text))


def pages() -> list[Path]:
    """The files that have such parts: README, everything in docs, and the methods."""
    docs, methods = (SOURCE / "docs").rglob("*.md"), (SOURCE / "ddlib" / "methods").glob("*.py")
    return [SOURCE / "README.md", *sorted(docs), *sorted(methods)]


def write(results: str | Path | None = None) -> list[Path]:
    """Renew the blocks of all pages; those that changed. Raises `DDError` where there is no page."""
    if not (SOURCE / "docs").is_dir():
        raise DDError(f"docs needs the source checkout of ddlib: {SOURCE} has no docs")
    changed = []
    for path in pages():
        old = path.read_text()
        if (new := fill(old, results)) != old:
            write_atomically(path, partial(Path.write_text, data=new))
            changed.append(path)
    return changed


def _runs(results: str | Path | None) -> dict[str, pd.DataFrame]:
    """Kept profile -> its runs."""
    found = {profile: tables.stored(results, profile) for profile in answers.KEPT}
    return {profile: tables.runs(runs) for profile, runs in found.items() if runs}


def _headline(_: list[str], results: str | Path | None) -> str:
    judged = claims.judge(claims.load(), results)
    numbers = judged.kind.value_counts()

    def counted(kinds: list[str]) -> str:
        return ", ".join(f"{numbers[kind]} {kind}" for kind in kinds if kind in numbers)

    others = counted([kind for kind in VERDICTS if kind not in COUNTED])
    runs = [run for profile in answers.KEPT for run in tables.stored(results, profile)]
    front = tables.front_page(tables.runs(runs))
    if len(front):
        words_alone = front.verdict.str.partition(",")[0]  # the long table has its marks
        front = front.assign(dataset=front.dataset.map(short), verdict=words_alone)
        front = _unbroken(front.drop(columns="Δ"), "dataset", "paper", "ours", "random")
        front = front.rename(columns={"dataset": "data set", "ipc": "IPC"})
    stands = judged[judged.kind.isin(COUNTED)]
    scores = stands[stands.unit == "%"]
    real = (scores.method.isin(REAL) | (scores.variant == "iteration=0")).sum()
    line = f"Of {len(judged)} claims of the five papers {len(stands)} stand: "
    line += f"{counted(list(COUNTED))}. {len(scores) - real} are accuracies of distilled sets, "
    line += f"{real} of real images, {len(stands) - len(scores)} of memory. The rest: {others}."
    return f"{line}\n\n{tables.as_markdown(front) if len(front) else 'No record yet.'}"


def markdown(table: pd.DataFrame, methods: Collection[str] = ()) -> str:
    """`tables.compare` with the counts, the seconds and the whole verdict of each row, as a Markdown table of at most
    seven columns: dataset and IPC share one, and the difference is left to the eye.

    Only `methods`, if any are named, judged beside the random images of the table.
    """
    methods = methods or set(table.method)
    if not table.method.isin(methods).any():
        return "No record yet."
    table = _beside_random(table, methods)
    judged, rows = tables.judge(table), tables.compare(table).drop(columns=["Δ", "verdict"])
    asked = judged.method.isin(methods)
    judged, rows = judged[asked], rows[asked]
    if not any(rows.get("random", ())):
        rows = rows.drop(columns="random", errors="ignore")
    rows = _settled(rows, rows.pop("dataset"), rows.pop("ipc"))
    rows["networks; seconds"] = [
        f"{_counted(row.networks, row.seeds)}; {row.distill:.0f} + {row.evaluate:.0f}"
        for row in judged.itertuples()
    ]
    rows["verdict"] = [
        "; ".join(filter(None, (f"**{given.word}**", ", ".join(given.marks), given.why)))
        for given in judged.verdict
    ]
    return tables.as_markdown(_unbroken(rows, "paper", "ours", "random", "networks; seconds"))


def _settled(rows: pd.DataFrame, datasets: pd.Series, ipcs: pd.Series) -> pd.DataFrame:
    """The rows with a first column that says where: "CIFAR-10 (JPEG), IPC 1"."""
    rows = rows.copy()
    rows.insert(0, "setting", list(map(setting, datasets, ipcs)))
    return rows


def _unbroken(rows: pd.DataFrame, *columns: str) -> pd.DataFrame:
    """The rows with spaces at which no line breaks in these columns, where they are there."""
    return rows.assign(
        **{name: rows[name].replace(" ", NO_BREAK, regex=True) for name in columns if name in rows}
    )


def _beside_random(table: pd.DataFrame, methods: Collection[str]) -> pd.DataFrame:
    """The runs of `methods`, and the random images, which a verdict needs."""
    return table[table.method.isin({*methods, "random"})]


def _counted(networks: int, seeds: int) -> str:
    return f"{networks} in {seeds} seeds" if seeds > 1 else str(networks)


def _attained(method: str, results: str | Path | None) -> str:
    """Accuracy, number of networks, seconds and hardware of a method's run nearest to the paper, in one line.

    Where no figure is printed beside any run, the nearest of all, and the line says so.
    """
    kept = _runs(results)
    if not kept:
        return "nothing yet beside a printed figure."
    rows = tables.made(tables.judge(_beside_random(pd.concat(kept.values()), [method])))
    rows = rows[rows.method == method]
    if rows.empty:
        return "nothing yet beside a printed figure."
    beside = rows[rows.figure.notna()]
    rows = rows if beside.empty else beside
    nearest = min(rows.index, key=lambda k: tables.nearness(rows.differs[k], rows.loc[k]))
    row = rows.loc[nearest]
    score = tables.with_spread(row.accuracy, row.pooled, row.networks)
    hardware = re.sub(r"\b1 threads\b", "1 thread", row.device)
    hardware = re.sub(r"\(R\)| Processor", "", hardware)
    where = (
        f"on {short(row.dataset)} at IPC {row.ipc} (profile `{row.profile}`, n={row.networks}; "
        f"{row.distill + row.evaluate:.0f} s, {hardware})"
    )
    if beside.empty:
        return f"{score} % {where}, in {row.iterations} iterations; no printed figure."
    return f"{score} % {where}."


def _results(_: list[str], results: str | Path | None) -> str:
    parts = [
        f"### {SIZES[profile].capitalize()} (`{profile}` profile)\n\n{markdown(table)}"
        for profile, table in _runs(results).items()
    ]
    return "\n\n".join(parts) or "No record yet."


def _whole(_: list[str], results: str | Path | None) -> str:
    rows = trajectories.kept("full", results=results)
    rows = rows[rows.profile.isin(answers.KEPT)] if len(rows) else rows
    if rows.empty:
        return "No record yet."
    printed = [tables.curve("full", name) for name in rows.dataset]
    shown = {
        "data set": rows.dataset.map(short),
        "protocol": rows.protocol,
        "passes": rows.epochs,
        "precision": rows.precision,
        "networks": rows.networks.map(len),
        "paper": [
            f"{row.value.mean():.1f}{row.mark.max()}" if len(row) else "none" for row in printed
        ],
        "ours": [
            tables.with_spread(*row)
            for row in zip(rows.accuracy, rows["std"], rows.networks.map(len))
        ],
    }
    return tables.as_markdown(pd.DataFrame(shown))


def _claims(_: list[str], results: str | Path | None) -> str:
    counts = claims.by_verdict(claims.judge(claims.load(), results))
    return f"{tables.as_markdown(counts)}\n\n{claims.from_memory()}"


def _answered(rows: pd.DataFrame, printed: int) -> str:
    if printed == 0:
        return "No table of this method could be read; the claims have the figures that could."
    return tables.as_markdown(rows) if len(rows) else "No printed figure is answered by a kept run."


def _folded(title: str, rows: pd.DataFrame) -> str:
    """A table that opens at a click, on GitHub and on the site."""
    head = f'<details markdown="1"><summary>{title}</summary>'
    return f"{head}\n\n{tables.as_markdown(rows)}\n\n</details>"


def _records(methods: list[str], results: str | Path | None) -> str:
    printed = pd.concat([claims.of_method(method) for method in methods])
    printed["ipc"] = printed.ipc.astype(int)
    judged = claims.judge(printed, results)
    rows = claims.shown(judged).rename(columns={"what": "method"})
    rows["protocol"] = printed.protocol.tolist()
    rows = _settled(rows, rows.dataset, rows.IPC)
    for column in ("paper", "ours"):
        rows[column] = [text.removesuffix(" %") for text in rows[column]]
    rows = _unbroken(rows, "paper", "ours")
    columns = ["setting", "method", "protocol", "paper", "evidence", "ours", "verdict"]
    columns = [name for name in columns if name != "method" or len(methods) > 1]
    answered = judged.kind != "not attempted"
    tags = "[tags](../layout.md#evidence)"
    parts = [
        (
            "**Paper | ours**, test accuracy (%), last step, mean ± spread over networks and seeds. "
            f"*evidence* says where the printed figure was read ({tags})."
        )
    ]
    parts.append(_answered(rows.loc[answered, columns], len(rows)))
    if not answered.all():
        printed_alone = rows.loc[~answered, columns].drop(columns=["ours", "verdict"])
        parts.append(_folded(f"{len(printed_alone)} figures not attempted", printed_alone))
    kept = {
        profile: table
        for profile, table in _runs(results).items()
        if table.method.isin(methods).any()
    }
    parts += [
        f"**Kept runs and their cost**, {SIZES[profile]} (`{profile}` profile); seconds of "
        f"distillation + evaluation:\n\n{markdown(table, methods)}"
        for profile, table in kept.items()
    ]
    return "\n\n".join(parts if kept else [*parts, "No run is kept yet."])


KINDS: dict[str, Callable[[list[str], str | Path | None], str]] = {
    "headline": _headline,
    "results": _results,
    "whole": _whole,
    "claims": _claims,
    "records": _records,
}
