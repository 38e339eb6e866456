"""What the notebook of a paper shows: its table beside ours, the settings that differ, details that fold away.

Each verb makes one thing to look at, from records and from `published.csv`; nothing is trained here, but for
`controls`, which asks for random images as any sweep does. The kept records are the checkout's own, so that the
column *ours* is filled beside the column *paper* before the reader has run anything.
"""

from __future__ import annotations

import html
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
from pandas.io.formats.style import Styler
from PIL import Image

from ..config import PROFILES, dataset_of, resolve
from ..core import DDError, choose, pick_device
from ..data.dataset import Dataset, canonical, load
from ..engine import meter
from ..engine.record import Run, resolve_record
from ..engine.run import run
from ..files import home
from ..methods import METHODS
from ..studies import scaling
from . import claims, plots, tables
from .claims import KEPT

# What random images need to be evaluated as a method's own sets are, by protocol.
EVALUATION = {
    "frepo": (
        "eval_backbone",
        "protocol",
        "eval_epochs",
        "eval_augment",
        "eval_lr",
        "networks",
        "zca",
        "resolution",
        "compile",
    ),
    "idc": ("protocol", "eval_epochs", "eval_augment"),
    "mtt": ("backbone", "protocol", "augment", "zca", "compile"),
    "dm": (),
}


@dataclass(frozen=True)
class Page:
    """Something to show in a notebook: HTML there, plain text elsewhere."""

    html: str
    text: str

    def __add__(self, below: Page) -> Page:
        return Page(self.html + below.html, f"{self.text}\n\n{below.text}")

    def _repr_html_(self) -> str:
        return self.html

    def __repr__(self) -> str:
        return self.text


def page(part: object) -> Page:
    """A table, a text or a page as a page."""
    if isinstance(part, Page):
        return part
    if isinstance(part, pd.DataFrame):
        part = tables.titled(part, "")
    if isinstance(part, Styler):
        return Page(part.to_html(), part.data.to_string(index=False))
    return Page(f"<pre>{html.escape(str(part))}</pre>", str(part))


def fold(title: str, *parts: object) -> Page:
    """Parts under a title that opens at a click."""
    pages = [page(part) for part in parts]
    inside = "".join(one.html for one in pages)
    summary = f"<summary>{html.escape(title)}</summary>"
    text = "\n\n".join([title, *(one.text for one in pages)])
    return Page(f"<details>{summary}{inside}</details>", text)


def kept(methods: Iterable[str], *, every: bool = False) -> pd.DataFrame:
    """The checkout's kept runs of `methods`, one row each: the setting nearest to each preset, or `every` one."""
    wanted = set(methods)
    found = [run for profile in KEPT for run in tables.stored(home() / "results", profile)]
    rows = tables.runs(run for run in found if run.record["method"] in wanted)
    return rows if every or rows.empty else tables.headline(rows)


def kept_run(method: str, dataset: str, ipc: int, **values: Any) -> Run:
    """The checkout's kept run of a method, its preset's own setting first, then the lowest seed.

    `values` are settings that it must have. Raises `DDError` where none is kept.
    """
    rows = kept([method], every=True)
    rows = rows[(rows.ipc == ipc) & (rows.dataset.map(canonical) == canonical(dataset))]
    rows = rows.assign(changes=rows.overrides.str.count("=")).sort_values(["changes", "seed"])
    for row in rows.itertuples():
        run = Run(home() / "results" / row.profile / method / f"{row.name}.json")
        if values.items() <= run.record["values"].items():
            return run
    raise DDError(f"no run of {method} on {dataset} at IPC {ipc} is kept in {home() / 'results'}")


def control(method: str, dataset: str, ipc: int, profile: str, **changes: Any) -> dict[str, Any]:
    """The overrides that evaluate random images as the sets of `method` are: network, loss, step size, epochs."""
    values = resolve(method, dataset, ipc, profile, **changes).values
    same = {key: values[key] for key in EVALUATION.get(values["protocol"], ())}
    return same | ({"eval_lr": values["lr_teacher"]} if values["protocol"] == "mtt" else {})


def controls(
    method: str,
    dataset: str,
    *,
    ipcs: Iterable[int],
    profile: str,
    changes: Mapping[str, Any] | None = None,
    **options: Any,
) -> pd.DataFrame:
    """Random images under the evaluation of `method`, one row per run; `changes` are the method's own overrides."""
    parts = []
    for ipc in ipcs:
        same = control(method, dataset, ipc, profile, **(changes or {}))
        parts.append(
            tables.sweep("random", dataset, ipcs=[ipc], profile=profile, **options, **same)
        )
    return pd.concat(parts, ignore_index=True)


def beside(live: pd.DataFrame, methods: Iterable[str], *, every: bool = False) -> Page:
    """The main table of a notebook, paper | ours, with all that stands behind it folded below: `paper_and_ours`."""
    return _shown(*paper_and_ours(live, methods, every=every))


def _shown(main: pd.DataFrame, details: pd.DataFrame) -> Page:
    caption = "Test accuracy (%), last step, mean ± spread over all networks of all seeds"
    folded = fold("Seeds, spreads, cost and every setting that differs", details)
    return page(tables.titled(main, caption)) + folded


def paper_and_ours(
    live: pd.DataFrame, methods: Iterable[str], *, every: bool = False
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The kept runs of `methods` (the setting nearest to each preset, or `every` one), then the `live` ones, together
    with the kept runs of other seeds of their settings.

    The first table has at most seven columns, the second the rest, row by row. Both follow the order of `methods`, with
    random images last. Those are under the evaluation of the first of `methods`; a row of them that no paper has a
    figure for stands in its column alone.
    """
    first, *others = methods
    if live.empty:
        raise DDError("there is no run to show: give the table of at least one")
    where = live.iloc[0]
    protocol = resolve(first, where.dataset, int(where.ipc), where.profile).run.protocol
    stored = [kept(["random"], every=True), kept([first, *others], every=every)]
    stored = pd.concat(stored, ignore_index=True)
    real = stored.method == "random"  # what is live stands beside the kept runs too
    setting = list(tables.SETTING)
    again = stored.set_index(setting).index.isin(live.set_index(setting).index)
    seeds = stored[again & ~stored.name.isin(live.name)]
    live = pd.concat([live, seeds], ignore_index=True)
    parts = [part for part in (stored[real | ~again], live) if len(part)]
    parts = [part.reset_index(drop=True) for part in parts]
    shown = [_ordered(tables.compare(part), [first, *others]) for part in parts]
    rows = pd.concat(shown, keys=range(len(parts)))
    details, judged = (
        pd.concat([make(part) for part in parts], keys=range(len(parts))).loc[rows.index]
        for make in (tables.details, tables.judge)
    )
    baseline = details.method == "random"
    told = (rows.paper != "none") & (judged.protocol == protocol)
    asked = rows.index.get_level_values(0) == len(parts) - 1  # the live runs are the last part
    same = details.duplicated(["dataset", "ipc", "method", "profile", "overrides"], keep="last")
    plain = ~baseline | ((told | asked) & ~same)
    main = _main(rows[plain].reset_index(drop=True), baseline[plain])
    return main, details[plain].reset_index(drop=True)


def _ordered(rows: pd.DataFrame, methods: list[str]) -> pd.DataFrame:
    """The rows of `tables.compare` by dataset and IPC, in the order of `methods`, those with fewest overrides first."""
    rank = {name: k for k, name in enumerate(methods)}
    names = rows.method.str.partition(", ")[0]
    order = rows.assign(
        rank=names.map(lambda name: rank.get(name, len(rank) + (name == "random"))),
        changes=rows.method.str.count("="),
    )
    return rows.loc[order.sort_values(["dataset", "ipc", "rank", "changes"], kind="stable").index]


def _main(rows: pd.DataFrame, baseline: pd.Series) -> pd.DataFrame:
    """The rows of `tables.compare` in at most seven columns: dataset and IPC share one, long names are cut."""
    setting = list(map(plots.setting, rows.dataset, rows.ipc))
    names = [_cut(name) for name in rows.method]
    names = ["random" if real else name for name, real in zip(names, baseline, strict=True)]
    rows = rows.assign(method=names).drop(columns=["dataset", "ipc"])
    rows.insert(0, "setting", setting)
    if "random" in rows:  # the kept runs may have none beside them, and then it came last
        rows.insert(rows.columns.get_loc("ours") + 1, "random", rows.pop("random"))
    return rows.fillna("")


def _cut(name: str, most: int = 44) -> str:
    """A method with its overrides; of many the last ones, since the method's own come after the evaluation's."""
    method, _, overrides = name.partition(", ")
    parts = overrides.split(", ")
    while len(name) > most and len(parts) > 1:
        parts = parts[1:]
        name = f"{method}, ..., {', '.join(parts)}"
    return name


def published(methods: Iterable[str], datasets: Iterable[str]) -> Page:
    """The papers' own table, folded, five methods at a time, so that it stays seven columns wide."""
    methods, datasets, parts = list(methods), list(datasets), []
    note = "Test accuracy (%); full: the whole training set. * from memory, ~ read off a plot"
    for first in range(0, len(methods), 5):
        table = tables.printed(methods[first : first + 5], datasets)
        table["dataset"] = [plots.short(name) for name in table.dataset]
        parts.append(tables.titled(table, note))
    return fold("The table as published", *parts)


def cost(table: pd.DataFrame) -> Page:
    """Seconds and memory of the runs in `table`, mean over seeds, folded."""
    rows = tables.cost(table)
    machines = "; ".join(sorted({*rows.device, *rows.memory}))
    columns = ["ipc", "method", "steps", "distillation (s)", "ms / step", "evaluation (s)"]
    note = f"One run, mean over seeds; {machines}"
    return fold("What a run cost", tables.titled(rows[[*columns, "peak MiB"]], note))


def settings(method: str, dataset: str, ipc: int, profile: str, **changes: Any) -> Page:
    """Folded: what this run's settings have in place of the paper's, and the differences that the code states.

    Where the paper has none for the dataset and IPC, its settings for CIFAR-10 stand in, as the caption says.
    """
    ours = resolve(method, dataset, ipc, profile, **changes).values
    places = [(dataset, ipc), ("cifar10", ipc), ("cifar10", 1)]
    known = ((where, tables.paper_settings(method, *where)) for where in places)
    (other, images), paper = next((where, values) for where, values in known if values)
    rows = [
        {"setting": key, "here": str(value), "paper": str(paper[key])}
        for key, value in ours.items()
        if value != paper[key]
    ]
    caption = (
        f"{method}, IPC {ipc}: {plots.place(dataset, profile)}; {len(rows)} settings differ from "
        f"the paper's for {plots.short(other)}, IPC {images}"
    )
    differ = fold("Settings that differ", tables.titled(pd.DataFrame(rows), caption))
    module = sys.modules[METHODS[method].__module__]
    coded = fold(f"The method as coded: ddlib/{_path(module.__name__)}", module.__doc__ or "")
    return differ + coded


def _path(module: str) -> str:
    return module.partition(".")[2].replace(".", "/") + ".py"


def paper_size(method: str, device: str = "auto") -> Page:
    """Folded: what `method` is predicted to cost on CIFAR-10 at the paper's size; DREAM+ beside IDC and DREAM."""
    asked = [(method, ipc) for ipc in (1, 10, 50)]
    if method == "dream_plus":
        asked = [(name, 10) for name in ("idc", "dream", "dream_plus")]
    specs = [resolve(name, "cifar10", ipc, "paper") for name, ipc in asked]
    table = scaling.forecast(specs, device).drop(columns="dataset")
    caption = (
        "CIFAR-10 at the paper's setting, predicted: work, memory, hours here "
        f"({meter.machine(pick_device(device))}) and at the printed rate of GPUs"
    )
    shown = tables.titled(table, caption).format(precision=2)
    return fold("What the paper's size costs on this machine", shown)


def across(
    runs: Mapping[str, Any],
    backbones: Iterable[str],
    *,
    networks: int = 2,
    device: str = "auto",
    hard: str = "",
) -> pd.DataFrame:
    """Accuracy by network (rows) and set (columns) of `runs`, set name -> run, on each set's own network and others.

    `hard` names a network on which the images' classes are learned under DSA's protocol, in a last row.
    """
    backbones = list(backbones)
    scores = [
        {"method": name, "backbone": one.synthetic.backbone, **one.record["accuracy"]["last"]}
        for name, one in runs.items()
    ]
    for backbone in backbones:
        for name, one in runs.items():
            score = one.transfer(backbone, networks=networks, device=device)
            scores.append({"method": name, **score})
    for name, one in runs.items() if hard else ():
        score = one.transfer(hard, protocol="dsa", hard=True, device=device)
        scores.append({"method": name, **score, "backbone": "DSA protocol, hard labels"})
    return tables.across(scores)


def data_of(run: Run, device: str = "auto") -> Dataset | None:
    """The dataset that a whitened set needs to be seen in pixels; None for a set that needs none."""
    if not run.synthetic.zca:
        return None
    return dataset_of(resolve_record(run.record), pick_device(device))


def steps(rows: pd.DataFrame, place: str) -> Styler:
    """`trajectories.outer_steps` as a table: milliseconds, graph and peak MiB of one update of the images."""
    rows = rows.assign(ms=1e3 * rows.seconds)
    for kind in ("graph", "peak"):
        rows[f"{kind} (MiB)"] = rows[f"{kind} bytes"] / 2**20
    shown = rows[["ipc", "method", "network", "ms", "graph (MiB)", "peak (MiB)"]]
    return tables.titled(shown, f"One step, uncompiled: {place}; {rows.device.iloc[0]}")


def gradients(rows: pd.DataFrame, place: str) -> Styler:
    """`trajectories.unrolling` at one N as a table: MiB of graph and stored weights, seconds."""
    rows = rows.assign(graph=rows["graph bytes"] / 2**20, vectors=rows["vectors bytes"] / 2**20)
    shown = rows.rename(columns={"graph": "graph (MiB)", "vectors": "stored weights (MiB)"})
    shown = shown[["engine", "steps", "graph (MiB)", "stored weights (MiB)", "seconds"]]
    caption = f"One gradient: {place}; {rows.device.iloc[0]}"
    return tables.titled(shown, caption).format(precision=3)


def by_value(table: pd.DataFrame, key: str) -> pd.DataFrame:
    """Runs that differ in one setting, a row per value of it: accuracy, its spreads, seeds and networks."""
    rows = tables.summary(table, by=("dataset", "profile", "ipc", key))
    return rows[[key, "accuracy", "pooled", "over seeds", "over networks", "seeds", "networks"]]


def gap(table: pd.DataFrame, key: str, one: Any, other: Any) -> str:
    """How far two values of a setting lie apart, and whether that is more than the spread over seeds."""
    rows = by_value(table, key).set_index(key)
    far = rows.accuracy[one] - rows.accuracy[other]
    noise = rows["over seeds"][one] + rows["over seeds"][other]
    side = "outside" if abs(far) > noise else "inside"
    return f"{one} minus {other}: {far:+.1f} points, {side} the spread over seeds ({noise:.1f})."


def against(table: pd.DataFrame, by: str, base: str, keys: Iterable[str]) -> pd.DataFrame:
    """The last rows of `table` by `by`: each of `keys`, its change (%) against `base`, and the spread of `base` (%)."""
    keys = list(keys)
    groups = table[table.epoch == table.epoch.max()].groupby(by, sort=False)[keys]
    mean, spread = groups.mean(), groups.std(ddof=0)
    shown = mean.copy()
    for key in keys:
        shown[f"{key}, change (%)"] = 100 * (mean[key] / mean[key][base] - 1)
        shown[f"{key}, ± (%)"] = 100 * spread[key][base] / mean[key][base]
    return shown.reset_index()


def ema_share(places: Iterable[tuple[str, int]]) -> pd.DataFrame:
    """The share (%) of the first images that is left in FTD's moving average at the paper's settings."""
    rows = []
    for dataset, ipc in places:
        values = resolve("ftd", dataset, ipc, "paper").values
        left = 100 * values["ema"] ** values["iterations"]
        facts = {key: values[key] for key in ("ema", "iterations")}
        rows.append(
            {"dataset": plots.short(dataset), "ipc": ipc, **facts, "first images (%)": left}
        )
    return pd.DataFrame(rows)


def imagenet(predict: Callable[..., dict], known: pd.DataFrame) -> Styler:
    """Memory of one TESLA gradient at ImageNet-1K's size, predicted on the meta device, and measured where kept.

    `predict` is `trajectories.predicted_memory`, `known` the rows of `trajectories.kept("unrolling", "imagenet1k")`.
    """
    v = resolve("tesla", "imagenet1k", 1, "paper").values
    shape, engines = (3, 64, 64), ("unroll", "tesla", "adjoint")
    sizes = ("convnet:depth=4", shape, 1000, v["batch_syn"], v["syn_steps"])
    table = pd.DataFrame([predict(*sizes, engine) for engine in engines])
    table["predicted (GiB)"] = (table["graph bytes"] + table["vectors bytes"]) / 2**30
    table["unroll / this"] = table["predicted (GiB)"][0] / table["predicted (GiB)"]
    known = known[known.steps == v["syn_steps"]].groupby("engine").first() if len(known) else known
    table["measured (GiB)"] = [
        f"{known.loc[name, ['graph bytes', 'vectors bytes']].sum() / 2**30:.2f}"
        if name in known.index
        else "not measured"
        for name in table.engine
    ]
    shown = table[["engine", "predicted (GiB)", "unroll / this", "measured (GiB)"]]
    caption = f"ImageNet-1K, 64 x 64: one gradient, batch {v['batch_syn']}, N = {v['syn_steps']}"
    return tables.titled(shown, caption).format({"predicted (GiB)": "{:.2f}"}, precision=1)


def wanted(word: str, profile: str) -> bool:
    """Whether what no record holds is to be computed: "yes" or "no"; "" is yes in the smoke profile alone."""
    word = word or ("yes" if choose("profile", profile, PROFILES) == "smoke" else "no")
    return choose("missing", word, ("yes", "no")) == "yes"


def chosen(methods: str, profile: str) -> list[str]:
    """Methods named with commas, "all" of them, or for "" in the smoke profile one a paper, and else all."""
    few = "random,dm,frepo,tesla,ftd,dream_plus" if profile == "smoke" else "all"
    names = methods or few
    return list(METHODS) if names == "all" else checked(names)


def checked(methods: str) -> list[str]:
    """Methods named with commas; a wrong one is a `DDError`."""
    return [choose("method", name, METHODS) for name in methods.split(",")]


def made(
    methods: Iterable[str],
    dataset: str,
    ipcs: Iterable[int],
    seeds: Iterable[int],
    profile: str,
    *,
    train: bool,
    **options: Any,
) -> list[Run]:
    """The runs of every method, IPC and seed; without `train` those that are kept, the nearest to each preset."""
    methods, ipcs = list(methods), list(ipcs)
    if train:
        values = {"profile": profile, "teach": True, **options}
        cases = product(methods, ipcs, seeds)
        return [run(method, dataset, ipc=ipc, seed=seed, **values) for method, ipc, seed in cases]
    found = tables.stored(profile=profile)
    rows = tables.runs(found)
    if rows.empty:
        return []
    rows = tables.headline(rows)
    rows = rows[(rows.dataset == dataset) & rows.ipc.isin(ipcs) & rows.method.isin(methods)]
    return [one for one in found if one.record["name"] in set(rows.name)]


def absent(methods: Iterable[str], found: Iterable[Run]) -> str:
    """A sentence on the methods without a run."""
    there = {one.record["method"] for one in found}
    return f"without a record: {', '.join(m for m in methods if m not in there) or 'none'}"


def compared(table: pd.DataFrame) -> Page:
    """The main table of any runs, in seven columns, with the rest folded; a sentence where there are none.

    They are judged beside all kept random images, whether the table has these or not.
    """
    if table.empty:
        return page("no record")
    real = kept(["random"], every=True)
    whole = pd.concat([table, real[~real.name.isin(table.name)]], ignore_index=True)
    details, setting = tables.details(whole), ["dataset", "ipc", "method", "profile", "overrides"]
    asked = details.set_index(setting).index.isin(table.set_index(setting).index)
    rows, details = (t[asked].reset_index(drop=True) for t in (tables.compare(whole), details))
    return _shown(_main(rows, details.method == "random"), details)


def share_closed(table: pd.DataFrame, top: float) -> pd.DataFrame:
    """By method and IPC, the share of the way from random images (0) to `top`, the whole training set (1)."""
    mean = tables.summary(table, by=("method", "ipc"))
    mean = mean.pivot(index="method", columns="ipc", values="accuracy")
    if "random" not in mean.index:
        return pd.DataFrame()
    share = (mean - mean.loc["random"]) / (top - mean.loc["random"])
    order = [method for method in plots.ordered(share.index) if method != "random"]
    return share.loc[order].add_prefix("IPC ").rename_axis(columns=None).reset_index()


def answered(judged: pd.DataFrame, paper: str) -> Page:
    """A paper's claims that a kept record answers, in six columns, with evidence and records folded below."""
    facts = claims.papers()[paper]
    rows = judged[(judged.kind != "not attempted") & (judged.paper == paper)]
    if rows.empty:
        return page(f"{facts['title']}: no claim has a kept record yet")
    lines = claims.shown(rows)
    lines["setting"] = list(map(plots.setting, lines.dataset, lines.IPC))
    caption = f"{facts['title']} ({facts['venue']}; version read: {facts['version']})"
    main = lines[["setting", "what", "where", "paper", "ours", "verdict"]]
    behind = lines[["what", "setting", "network", "evidence", "records"]]
    return page(tables.titled(main, caption)) + fold("Networks, evidence and records", behind)


def on_file(column: str, start: str) -> Page:
    """The papers' claims whose `column` starts with `start`, folded: what is printed, and how it was read."""
    known = claims.load()
    known = known[known[column].fillna("").str.startswith(start)].astype({"ipc": "Int64"})
    shown = known[["paper", "method", "dataset", "ipc", "quantity", "printed", "evidence"]]
    return fold("As published; RECALLED: from memory, not yet checked", shown)


def module_notes(module: Any) -> Page:
    """The formulas and differences that a study's docstring states, folded."""
    return fold(f"The study as coded: ddlib/{_path(module.__name__)}", module.__doc__ or "")


def datasets(names: str) -> list[str]:
    """Datasets named with commas, each one that a paper has figures for; a wrong one is a `DDError`."""
    known = sorted(set(tables.published().dataset))
    return [choose("dataset", name, known) for name in names.split(",")]


def counts(data: Dataset) -> pd.DataFrame:
    """Images of each class by split."""
    sizes = {split: data.class_sizes(split).tolist() for split in data.labels}
    return pd.DataFrame(sizes, index=data.classes).rename_axis("class").reset_index()


def digits_folder(place: Path, count: int = 1000) -> Path:
    """`count` of the embedded digits as PNG files, one folder a class: something to try a folder with."""
    data = load("digits", device="cpu")
    for k in range(count):
        path = place / f"class {int(data.labels['train'][k])}" / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(data.images["train"][k, 0].numpy()).save(path)
    return place
