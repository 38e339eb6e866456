"""What one update of the images costs as the problem grows, and what the papers' rows would cost.

`updates`: seconds and memory of an update, one size of the problem varied at a time.
`exponents`: the power of that size which fits them.
`forecast`: the cost of whole runs here and on other devices, as `ddlib queue --plan` counts it.

Images are noise: the cost of an update depends on how many there are and how large they are, not on what they show.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import torch

from ..config import Spec, resolve
from ..core import choose, generator, pick_device, whole
from ..data.dataset import Dataset, from_arrays
from ..engine import queue
from ..engine.cost import DEVICES, sizes_of
from ..engine.meter import machine
from ..match.trajectory import stored_weights
from ..nets.build import build
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


def updates(
    dataset: str,
    profile: str,
    sizes: Mapping[str, Sequence[int]],
    *,
    device: str = "auto",
    repeats: int = 3,
) -> pd.DataFrame:
    """One update by each of `UPDATES` at each of the `sizes` (key of `SIZES` -> values); all else stays as the
    presets of `dataset` and `profile` have it at IPC 1, but for the depth of a ConvNet, which follows the resolution.

    Columns: varied, value, method, network, seconds (median of `repeats`), graph bytes (peak of what autograd holds),
    vectors bytes (the weights that trajectory matching stores beside it), peak bytes and peak method, device. Nothing
    is compiled. Only trajectory matching unrolls steps. Kept as a study, one for each type of device.
    """
    for size, values in sizes.items():
        least = 2 if choose("size", size, SIZES) == "classes" else 1
        for value in values:
            whole(size, value, least)
    at = pick_device(device)
    points = [
        (name, varied, value)
        for varied, values in sizes.items()
        for value in values
        for name, (method, _) in UPDATES.items()
        if varied != "syn_steps" or method == "mtt"
    ]
    specs = [_spec(name, dataset, profile, {varied: value}) for name, varied, value in points]
    shapes = [_shape(dataset, {varied: value}) for _, varied, value in points]

    def compute() -> list[dict]:
        # All first, so that one that is impossible is named before anything is measured.
        nets = [build(s.run.backbone, *shape) for s, shape in zip(specs, shapes, strict=True)]
        rows, taken = [], {}
        for point, spec, shape, net in zip(points, specs, shapes, nets, strict=True):
            update = point[0], spec.name, shape
            if update not in taken:  # the presets' own size is a point of every row of sizes
                step = one_step(spec, _noise(spec, *shape, at))
                step()  # workspaces, and the optimiser's state
                taken[update] = measured(step, at, repeats)[1]
            row = dict(zip(("method", "varied", "value"), point, strict=True))
            row |= {"network": net.spec, **taken[update], "vectors bytes": 0}
            if spec.method == "mtt":
                stored = stored_weights(spec.config.gradient, spec.config.syn_steps)
                row["vectors bytes"] = 4 * sum(p.numel() for p in net.parameters()) * stored
            rows.append(row | {"device": machine(at)})
        return rows

    options = {
        "specs": [spec.name for spec in specs],
        "sizes": {size: list(values) for size, values in sizes.items()},
        "repeats": repeats,
        "device": at.type,
    }
    return cached("scaling", _spec("dm", dataset, profile, {}), options, compute)


def _shape(dataset: str, sizes: Mapping[str, int]) -> tuple[tuple[int, int, int], int]:
    """((C, H, W), classes) of a dataset, or as `sizes` have them."""
    usual = sizes_of(dataset)
    side = sizes.get("resolution", usual.shape[1])
    return (usual.shape[0], side, side), sizes.get("classes", usual.classes)


def _spec(name: str, dataset: str, profile: str, sizes: Mapping[str, int]) -> Spec:
    """The run whose update is measured: the preset's at IPC 1, with those of the `sizes` that a run itself has."""
    method, changes = UPDATES[name]
    # Snapshots cost an update nothing, and without them the study's name does not depend on them.
    changes = {**changes, "compile": False, "zca": "", "snapshots": 0}
    if "syn_steps" in sizes:
        changes["syn_steps"] = sizes["syn_steps"]
    if "width" in sizes:
        usual = resolve(method, dataset, 1, profile).run.backbone
        kind, _, rest = usual.partition(":")
        options = dict(option.split("=") for option in rest.split(",") if option)
        options["width"] = sizes["width"]
        changes["backbone"] = f"{kind}:" + ",".join(f"{k}={v}" for k, v in options.items())
    return replace(resolve(method, dataset, 1, profile, **changes), ipc=sizes.get("ipc", 1))


def _noise(spec: Spec, shape: tuple[int, int, int], classes: int, device: torch.device) -> Dataset:
    """As many images of noise as an update of a run can draw."""
    batch = getattr(spec.config, "batch_real", 1)  # FRePo's is of all classes
    each = math.ceil(batch / classes) if spec.method == "frepo" else batch
    count = classes * max(spec.ipc, each)
    rng = generator(0, "scaling", classes, *shape)
    images = torch.randint(256, (count, *shape), generator=rng, dtype=torch.uint8)
    labels = torch.arange(count) % classes
    return from_arrays(images, labels, images[:0], labels[:0], name="noise", device=device)


def exponents(table: pd.DataFrame) -> pd.DataFrame:
    """One row for each varied size and method in `table`, as `trajectories.with_memory` gives it: the exponents of time
    and of memory, by least squares on logarithms; a size with one value has none. 1 is growth in proportion."""
    rows = []
    for (varied, method), points in table.groupby(["varied", "method"], sort=False):
        if points.value.nunique() > 1:
            time, memory = (
                np.polyfit(np.log(points.value), np.log(points[column]), 1)[0]
                for column in ("seconds", "memory (MiB)")
            )
            rows.append({"varied": varied, "method": method, "time": time, "memory": memory})
    return pd.DataFrame(rows, columns=["varied", "method", "time", "memory"])


def forecast(specs: Iterable[Spec], device: str = "auto") -> pd.DataFrame:
    """The predicted cost of whole runs, cheapest first; experts and extractors are paid for by the first that needs
    them.

    Columns: method, dataset, ipc, TFLOP, peak GiB, hours here, and the hours that it takes at the published rate of
    each of `DEVICES`.
    """
    return pd.DataFrame(
        [
            {
                "method": row.spec.method,
                "dataset": row.spec.dataset,
                "ipc": row.spec.ipc,
                "TFLOP": row.cost.tflop,
                "peak GiB": row.cost.peak_bytes / 2**30,
                "here": row.cost.seconds / 3600,
                **{name: row.cost.seconds_on(name) / 3600 for name in DEVICES},
            }
            for row in queue.plan(specs, str(pick_device(device)))
        ]
    )
