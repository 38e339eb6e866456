"""What one update of the images costs as the problem grows, and what the papers' rows would cost.

`growth`: seconds and memory of an update, one size of the problem varied at a time.
`exponents`: the power of that size which fits them.
`forecast`: the cost of whole runs here and on other devices, as `ddlib queue --plan` counts it.

Images are noise: the cost of an update depends on how many there are and how large they are, not on what they show.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pandas as pd
import torch

from ..config import Spec, resolve
from ..core import choose, generator, pick_device
from ..data.dataset import Dataset, from_arrays
from ..engine import queue
from ..engine.cost import DEVICES, sizes_of
from ..engine.meter import machine
from .store import cached
from .trajectories import measured, one_step

# Size -> what an axis says of it.
SIZES = {
    "ipc": "images per class (IPC)",
    "classes": "classes",
    "resolution": "pixels a side",
    "width": "width of the network",
    "syn_steps": "unrolled steps N",
}
# What is measured: a method, for DSA without the network's training between updates, and for trajectory matching one
# of its gradients.
UPDATES = {
    "dm": ("dm", {}),
    "dsa": ("dsa", {"inner": 1, "net_epochs": 0}),
    "frepo": ("frepo", {}),
    "unroll": ("mtt", {"gradient": "unroll"}),
    "tesla": ("mtt", {"gradient": "tesla"}),
    "adjoint": ("mtt", {"gradient": "adjoint"}),
}


def growth(
    dataset: str,
    profile: str,
    sizes: Mapping[str, Sequence[int]],
    *,
    device: str = "auto",
    repeats: int = 3,
) -> pd.DataFrame:
    """One update of every method at each of the `sizes` (key of `SIZES` -> values), the others as the presets of
    `dataset` and `profile` have them at IPC 1.

    Columns: varied, value, method, seconds (median of `repeats`), graph bytes (peak of what autograd holds), peak
    bytes, device. Nothing is compiled. Kept as a study; only trajectory matching unrolls steps.
    """
    for size in sizes:
        choose("size", size, SIZES)
    specs = {name: _spec(name, dataset, profile, {}) for name in UPDATES}

    def compute() -> list[dict]:
        at = pick_device(device)
        points = [
            (name, varied, value)
            for varied, values in sizes.items()
            for value in values
            for name, (method, _) in UPDATES.items()
            if varied != "syn_steps" or method == "mtt"
        ]
        rows = []
        for name, varied, value in points:
            spec, data = _problem(name, dataset, profile, {varied: value}, at)
            step = one_step(spec, data)
            step()  # workspaces, and the optimiser's state
            cost = measured(step, at, repeats)[1]
            point = {"varied": varied, "value": value, "method": name, "device": machine(at)}
            rows.append(point | cost)
        return rows

    names = [spec.name for spec in specs.values()]
    options = {"specs": names, "sizes": {k: list(v) for k, v in sizes.items()}, "repeats": repeats}
    return cached("scaling", specs["dm"], options, compute)


def _spec(name: str, dataset: str, profile: str, sizes: Mapping[str, int]) -> Spec:
    """The run whose update is measured: the preset's, with the `sizes` that a run itself has."""
    method, more = UPDATES[name]
    more = more | {"compile": False, "zca": ""}
    if "syn_steps" in sizes:
        more["syn_steps"] = sizes["syn_steps"]
    spec = resolve(method, dataset, sizes.get("ipc", 1), profile, **more)
    if "width" not in sizes:
        return spec
    kind, _, options = spec.run.backbone.partition(":")
    kept = [part for part in options.split(",") if part and not part.startswith("width=")]
    wide = f"{kind}:{','.join([*kept, 'width=' + str(sizes['width'])])}"
    return resolve(method, dataset, spec.ipc, profile, **more, backbone=wide)


def _problem(
    name: str, dataset: str, profile: str, sizes: Mapping[str, int], device: torch.device
) -> tuple[Spec, Dataset]:
    """A run and as much noise as an update of it can draw: a real batch of every class."""
    spec, known = _spec(name, dataset, profile, sizes), sizes_of(dataset)
    classes = sizes.get("classes", known.classes)
    channels, side, _ = known.shape
    side = sizes.get("resolution", side)
    batch = getattr(spec.config, "batch_real", 1)
    count = classes * max(spec.ipc, math.ceil(batch / classes) if name == "frepo" else batch)
    rng = generator(0, "scaling", classes, side)
    images = torch.randint(256, (count, channels, side, side), generator=rng, dtype=torch.uint8)
    labels = torch.arange(count) % classes
    return spec, from_arrays(images, labels, images[:0], labels[:0], name="noise", device=device)


def exponents(table: pd.DataFrame) -> pd.DataFrame:
    """One row a varied size and method of `growth`: the exponents of time and of graph memory, by least squares on
    logarithms. 1 is growth in proportion; points that are dominated by what does not grow pull it down."""
    rows = []
    for (varied, method), points in table.groupby(["varied", "method"], sort=False):
        if points.value.nunique() > 1:
            time, memory = (
                np.polyfit(np.log(points.value), np.log(points[column]), 1)[0]
                for column in ("seconds", "graph bytes")
            )
            rows.append({"varied": varied, "method": method, "time": time, "memory": memory})
    return pd.DataFrame(rows, columns=["varied", "method", "time", "memory"])


def forecast(specs: Iterable[Spec], device: str = "auto") -> pd.DataFrame:
    """The predicted cost of whole runs, cheapest first; experts and extractors are paid for by the first that needs
    them.

    Columns: method, dataset, ipc, TFLOP, hours here, and hours on each of `DEVICES` at its published float32 rate, which
    small networks do not reach: the least that a run there can be expected to take.
    """
    rows = queue.plan(specs, str(pick_device(device)))
    return pd.DataFrame(
        [
            {
                "method": row.spec.method,
                "dataset": row.spec.dataset,
                "ipc": row.spec.ipc,
                "TFLOP": row.cost.tflop,
                "here": row.cost.seconds / 3600,
                **{name: row.cost.seconds_on(name) / 3600 for name in DEVICES},
            }
            for row in rows
        ]
    )
