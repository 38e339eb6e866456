"""The fairness notebook's tables, from the rows of `ddlib.studies.fairness`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from pandas.io.formats.style import Styler

from ..core import DDError
from ..engine.record import Run
from . import plots, tables

# In the smoke profile a tenth of the training images is kept to select a checkpoint on, and TESLA's labels are soft.
QUICK = {"minival": 0.1, "evaluations": 2}
EXTRA = {"tesla": {"labels": "assigned"}}

Key = tuple[str, int]


def runs(
    find: Callable[..., Run | None],
    methods: Iterable[str],
    dataset: str,
    seeds: Iterable[int],
    profile: str,
    **options: Any,
) -> dict[Key, Run]:
    """(method, seed) -> its run by `fairness.find`, those that are there, methods in the figures' order; a `DDError`
    where none is."""
    methods, seeds, found = plots.ordered(methods), list(seeds), {}
    for method in methods:
        more = QUICK | EXTRA.get(method, {}) if profile == "smoke" else {}
        for seed in seeds:
            run = find(method, dataset, seed=seed, profile=profile, **options, **more)
            if run:
                found[method, seed] = run
    if not found:
        names = ", ".join(methods)
        raise DDError(
            f"no run of {names} on {dataset}, {profile} profile, is kept; train='yes' makes them"
        )
    return found


@dataclass(frozen=True)
class Card:
    """`fairness.scorecard`'s rows, with the methods in their order and the place that every caption names."""

    rows: pd.DataFrame
    place: str

    def only(self, names: Sequence[str]) -> pd.DataFrame:
        """The rows of some quantities, in the order of `names`."""
        names = list(names)
        rows = self.rows[self.rows.quantity.isin(names)]
        return rows.sort_values("quantity", key=lambda q: q.map(names.index), kind="stable")

    def table(self, names: Sequence[str], caption: str, digits: int = 1) -> Styler:
        """Quantities (rows) by method (columns), mean and 95 % interval, or the mean alone where there is none; a
        caption says so where there is no row at all."""
        part = self.only(names)
        cells = [
            f"{r.mean:.{digits}f}"
            + (f" [{r.low:.{digits}f}, {r.high:.{digits}f}]" if r.high > r.low else "")
            for r in part.itertuples()
        ]
        wide = part.assign(cell=cells).pivot(index="quantity", columns="method", values="cell")
        methods = list(dict.fromkeys(self.rows.method))
        wide = wide.reindex(index=list(names), columns=methods).dropna(how="all")
        wide = wide.rename_axis(columns=None).reset_index()
        return tables.titled(wide, f"{caption}: {self.place}{'' if len(wide) else ', no record'}")

    def spread(self) -> Styler:
        """The native accuracy with its spread by seed and by network."""
        columns = ["method", "mean", "low", "high", "over seeds", "over networks", "networks"]
        caption = f"Native test accuracy (%), 95 % interval, standard deviations: {self.place}"
        return tables.titled(self.only(["native"])[columns], caption)


def bytes_and_seconds(
    found: Mapping[Key, Run], storage: Callable[..., dict], cost: Callable[..., dict], place: str
) -> tuple[Styler, Styler]:
    """Bytes of a method's set, by the parts that any of the sets has, and seconds of a distillation by part, mean over
    seeds."""
    first = {method: run for (method, _), run in reversed(found.items())}
    sizes = pd.DataFrame(
        {"method": method, **storage(run.synthetic)} for method, run in reversed(first.items())
    )
    sizes = sizes.loc[:, (sizes != 0).any()]
    spent = [{"method": method, **cost(run)} for (method, _), run in found.items()]
    mean = pd.DataFrame(spent).groupby("method", sort=False).mean()
    mean = mean.map(lambda s: "not measured" if pd.isna(s) else f"{s:.1f}").reset_index()
    machines = "; ".join(sorted({run.record["device"] for run in found.values()}))
    return (
        tables.titled(sizes, f"Bytes stored: {place}"),
        tables.titled(mean, f"Seconds of one distillation: {place}; {machines}"),
    )
