"""What the choice of the real batch does to gradient matching (DREAM, DREAM+): accuracy by iteration, work, parts.

Every function asks for its runs as any notebook does, so a kept record returns at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd

from ..config import resolve
from ..core import generator
from ..data.dataset import Dataset
from ..engine.run import run
from ..match import sampler
from ..match.gradients import class_gradients, matched
from ..methods import dream
from ..nets.build import build
from ..recipe import Recipe
from ..report import tables
from ..train.loop import train_on

# A batch of random images is IDC; central and boundary ones are IDC with the images nearest to their class's mean
# feature, or farthest from it. DREAM and DREAM+ start from K-means too, the others from random images.
LINES = {
    "random": ("idc", {}),
    "central": ("idc", {"sampling": "central"}),
    "boundary": ("idc", {"sampling": "boundary"}),
    "dream": ("dream", {}),
    "dream_plus": ("dream_plus", {}),
}


def known(hosts: Iterable[str]) -> list[str]:
    """`hosts`, or a `DDError` that names one that DREAM cannot be plugged into."""
    hosts = list(hosts)
    for host in hosts:
        dream.plug_in(host)
    return hosts


def curves(
    data: Dataset, ipc: int, seeds: Sequence[int], profile: str, **options: Any
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Accuracy by outer iteration, one row a sampling, seed and evaluation, with the work and time until there.

    Columns: sampling, seed, outer iterations, accuracy (%), TFLOP, seconds. Iteration 0 is the initialisation alone.
    `central` and `boundary` take the first seed. Returns the rows, and `cost`: GFLOP and seconds of one iteration.
    """
    options |= {"ipc": ipc, "profile": profile, "data": data}
    dataset, rows, cost = data.name, [], {}
    for name, (method, changes) in LINES.items():
        spec = resolve(method, dataset, ipc, profile, **changes)
        taken = []
        for seed in seeds[:1] if changes else seeds:
            start = run(method, dataset, seed=seed, iterations=0, evaluations=1, **options)
            whole = run(method, dataset, seed=seed, **options, **changes)
            steps = whole.record["values"]["iterations"]
            taken.append(whole.record["seconds"]["distill"] / steps)
            rows += [
                {"sampling": name, "seed": seed, "outer iterations": at["step"]}
                | {"accuracy": at["mean"]}
                for part in (start, whole)
                for at in part.record["evaluations"]
            ]
        cost[name] = _work(spec, data) | {"seconds": sum(taken) / len(taken)}
    course, cost = pd.DataFrame(rows), pd.DataFrame(cost).T
    course["TFLOP"] = course["outer iterations"] * course.sampling.map(cost.GFLOP) / 1e3
    course["seconds"] = course["outer iterations"] * course.sampling.map(cost.seconds)
    return course, cost.rename_axis("sampling").reset_index()


def _work(spec: Any, data: Dataset) -> dict[str, float]:
    net = build(spec.run.backbone, data.shape, data.num_classes)
    sizes = data.class_sizes().tolist()
    parts = sampler.work(spec.config, net, data.shape, sizes, spec.ipc)
    return {"GFLOP": sum(parts.values()) / 1e9}


def reached(course: pd.DataFrame) -> pd.DataFrame:
    """Where DREAM and DREAM+ reach what random sampling ends at: by iteration, and as shares of its work and time.

    Means over seeds. A sampling that does not get there has an empty row.
    """
    at = course.groupby(["sampling", "outer iterations"]).mean(numeric_only=True)
    end = at.loc["random"].iloc[-1]
    rows = []
    for name in ("dream", "dream_plus"):
        line = at.loc[name]
        enough = line[line.accuracy >= end.accuracy]
        first = enough.iloc[0] if len(enough) else None
        rows.append(
            {
                "sampling": name,
                "ends at (%)": line.accuracy.iloc[-1],
                "random ends at (%)": end.accuracy,
                "there at iteration": "never" if first is None else str(enough.index[0]),
                "of": at.loc["random"].index.max(),
                "share of the work": None if first is None else first.TFLOP / end.TFLOP,
                "share of the time": None if first is None else first.seconds / end.seconds,
            }
        )
    return pd.DataFrame(rows)


def finding(course: pd.DataFrame) -> str:
    """What the runs say about the papers' claim, in plain words made from `reached`."""
    lines = []
    for row in reached(course).to_dict("records"):
        name, gain = row["sampling"], row["ends at (%)"] - row["random ends at (%)"]
        if row["there at iteration"] == "never":
            lines.append(f"{name} never reaches the accuracy at which random sampling ends.")
            continue
        half = 2 * int(row["there at iteration"]) <= row["of"]
        lines.append(
            f"{name} is there at iteration {row['there at iteration']} of {row['of']}, "
            f"{'' if half else 'not '}within half of them, after {row['share of the work']:.2f} "
            f"of the work; at the end it is {gain:+.1f} points from random."
        )
    return "\n".join(lines)


def printed() -> pd.DataFrame:
    """The papers' figure of accuracy (%) by outer iteration, read off: one row a sampling, one column an iteration."""
    drawn = tables.published()
    drawn = drawn[(drawn.table == "figure") & drawn.paper.isin(["2302.14416", "2310.15052"])]
    names = drawn.variant.str.extract(r"(?:(\w+) only, )?iteration=(\d+)")
    sampling = names[0].fillna(drawn.method).replace("idc", "random")
    drawn = drawn.assign(sampling=sampling, iteration=names[1].astype(int))
    wide = drawn.pivot(index="sampling", columns="iteration", values="value")
    return wide.reindex(list(LINES)).rename_axis(columns=None).reset_index()


def gradient_norms(data: Dataset, ipc: int, profile: str, seed: int) -> pd.DataFrame:
    """The gradient norm that each picked image of the first class has alone, one column a sampling.

    The network has seen one epoch of the real data, and the gradient is that of the convolutions, which are matched.
    """
    spec = resolve("dream", data.name, ipc, profile)
    net = build(spec.run.backbone, data.shape, data.num_classes).to(data.device)
    once = Recipe("warm", epochs=1, batch=spec.config.net_batch, drops=(), augment="none")
    train_on(data, net, once, seed)
    count = min(spec.config.batch_real, int(data.class_sizes().min()))
    norms = {}
    for kind in sampler.SAMPLINGS:
        draw = sampler.Sampler(data, count, kind, pool=spec.config.pool)
        rows = draw(net, 0, generator(seed, "notebook"))[0]
        x, y = data.batch("train", rows)[:, None], data.labels["train"][rows][:, None]
        alone = class_gradients(net, x, y, matched(net, "conv"))
        norms[kind] = sum(g.flatten(1).square().sum(1) for g in alone).sqrt().tolist()
    return pd.DataFrame(norms)


def plugged(
    hosts: Iterable[str], dataset: str, ipc: int, profile: str, seed: int, **options: Any
) -> pd.DataFrame:
    """Accuracy of every host with random batches, with DREAM and with DREAM+, mean ± spread over networks.

    In the smoke profile DM and MTT take 60 and 20 steps.
    """
    short = {"dm": 60, "mtt": 20} if profile == "smoke" else {}
    scores = []
    for host in hosts:
        cases = {
            "random": (host, {}),
            "DREAM": (host, dream.plug_in(host)),
            "DREAM+": (host, dream.plug_in(host, plus=True)),
        }
        if host == "idc":
            cases |= {"DREAM": ("dream", {}), "DREAM+": ("dream_plus", {})}
        cut = {"iterations": short[host]} if host in short else {}
        for name, (method, changes) in cases.items():
            values = {"ipc": ipc, "profile": profile, "seed": seed, "teach": True}
            made = run(method, dataset, **values, **options, **cut, **changes)
            score = made.record["accuracy"]["last"]
            scores.append({"backbone": host, "method": name, **score})
    return tables.across(scores).rename(columns={"backbone": "host"})


def ablations(dataset: str, ipc: int, profile: str, seed: int, **options: Any) -> pd.DataFrame:
    """DREAM with one thing changed: accuracy (%), its distance from DREAM, spread over networks, seconds an iteration.

    In the smoke profile two outer iterations.
    """
    config = resolve("dream", dataset, ipc, profile).config
    k = config.batch_real
    few = {"iterations": 2, "evaluations": 1} if profile == "smoke" else {}
    changes = {
        "DREAM": {},
        "initialisation only": {"sampling": "random"},
        "matching only": {"init": "mix"},
        "neither": {"sampling": "random", "init": "mix"},
        "central": {"sampling": "central"},
        "boundary": {"sampling": "boundary"},
        "interval 1": {"interval": 1},
        "one clustering a network": {"interval": 10**6},
        f"K {k // 2}": {"batch_real": k // 2},
        f"K {k // 4}": {"batch_real": k // 4},
        f"K {k // 2}, two images each": {"subsample": 2},
        "feature term": {"match": "both"},
        "warm epoch": {"warm_epochs": 1},
        "both: DREAM+": {"match": "both", "warm_epochs": 1},
    }
    if config.inner <= config.interval:  # DREAM itself clusters once a network
        del changes["one clustering a network"]
    rows = []
    for name, change in changes.items():
        values = {"ipc": ipc, "profile": profile, "seed": seed}
        record = run("dream", dataset, **values, **options, **few, **change).record
        last = record["accuracy"]["last"]
        steps = record["values"]["iterations"]
        rows.append(
            {
                "variant": name,
                "accuracy": last["mean"],
                "Δ": 0.0,
                "± over networks": last["std"],
                "seconds per iteration": record["seconds"]["distill"] / steps,
            }
        )
    found = pd.DataFrame(rows)
    found["Δ"] = found.accuracy - found.accuracy[0]
    return found
