"""Tables for a terminal: at most 100 columns wide, long cells folded."""

from __future__ import annotations

import math
import shutil
import textwrap

import pandas as pd

WIDEST = 100  # columns, whatever the terminal
NARROWEST = 6  # of a folded column
GAP = "  "


def width_of_terminal() -> int:
    """Columns to print in: the terminal's (or those that COLUMNS says), at most `WIDEST`."""
    return min(WIDEST, shutil.get_terminal_size((WIDEST, 24)).columns)


def table(rows: pd.DataFrame, width: int | None = None) -> str:
    """The rows as lines of at most `width` columns; numbers to the right, columns without a value left out."""
    rows = rows.dropna(axis=1, how="all")
    right = [pd.api.types.is_numeric_dtype(rows[name]) for name in rows]
    cells = [[str(name) for name in rows]]
    cells += [[_text(value) for value in row] for row in rows.itertuples(index=False)]
    widths = _fitted([max(map(len, column)) for column in zip(*cells, strict=True)], width)
    lines = [line for row in cells for line in _folded(row, widths, right)]
    return "\n".join(lines)


def runs(rows: pd.DataFrame, width: int | None = None) -> str:
    """The rows of `tables.runs` as a table; what all have in common stands above it, once.

    "best" is shown where an evaluation on the way was better than the last; "name" is the end of the
    files' names, by which a shell finds them: results/PROFILE/METHOD/*NAME.safetensors.
    """
    counts = [
        f"{mean:.1f} ± {spread:.1f}"
        for mean, spread in zip(rows.accuracy, rows["std"], strict=True)
    ]
    shown = pd.DataFrame(
        {
            "method": rows.method,
            "dataset": rows.dataset,
            "IPC": rows.ipc,
            "profile": rows.profile,
            "seed": rows.seed,
            "accuracy (%)": counts,
            "best (%)": rows.best.where(rows.best.round(1) > rows.accuracy.round(1)),
            "seconds": rows.seconds.round().astype(int),
            "name": rows.name.str[-8:] + rows.sealed.map({True: "", False: "*"}),
            "settings": rows.overrides.replace("", None),
        }
    )
    common, shown = shared(shown.dropna(axis=1, how="all"))
    above = ", ".join(f"{name} {value}" for name, value in common.items())
    below = "" if rows.sealed.all() else "* has no checksum, as an older ddlib wrote it"
    return "\n\n".join(filter(None, (above, table(shown, width), below)))


def shared(rows: pd.DataFrame) -> tuple[dict[str, object], pd.DataFrame]:
    """Of two rows or more, the columns that say the same in each, as a dict, and the table without them."""
    if len(rows) < 2:
        return {}, rows
    same = [name for name in rows if rows[name].nunique(dropna=False) == 1]
    return {name: rows[name].iloc[0] for name in same}, rows.drop(columns=same)


def _text(value: object) -> str:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.1f}"
    return "" if value is None else str(value)


def _fitted(widths: list[int], width: int | None) -> list[int]:
    """Column widths that fit: the widest column gives first."""
    room = (width or width_of_terminal()) - len(GAP) * (len(widths) - 1)
    while sum(widths) > room and max(widths) > NARROWEST:
        widths[widths.index(max(widths))] -= 1
    return widths


def _folded(row: list[str], widths: list[int], right: list[bool]) -> list[str]:
    folded = [textwrap.wrap(cell, width) or [""] for cell, width in zip(row, widths, strict=True)]
    lines = []
    for k in range(max(map(len, folded))):
        parts = [cell[k] if k < len(cell) else "" for cell in folded]
        aligned = [
            part.rjust(width) if numeric else part.ljust(width)
            for part, width, numeric in zip(parts, widths, right, strict=True)
        ]
        lines.append(GAP.join(aligned).rstrip())
    return lines
