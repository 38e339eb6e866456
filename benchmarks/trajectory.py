"""One outer step of trajectory matching by each engine: time and the memory of its graphs, `make bench`.

`unroll` is what MTT's released code does; `tesla` leaves out the Hessian products, so it is what the exact adjoint is
held against. `kept` holds the graphs of all steps, as `unroll` does, `1 GiB` those of as many as fit into it. The
setting is CIFAR-10 at IPC 1 with N = 20 steps, then N = 50, then IPC 10 with N = 10, where only
`COMPARED` are timed; images and weights are random, which changes no work. The engines take turns, so that a busy
machine slows all of them alike, and a ratio is the median over the turns.
"""

from __future__ import annotations

from math import inf
from statistics import median

import torch
import torch.nn.functional as F

from benchmarks import show
from ddlib.augment.siamese import draw
from ddlib.core import generator
from ddlib.engine.meter import SavedTensors, machine, seconds
from ddlib.match.inner import CompiledStep
from ddlib.match.trajectory import FlatNet, Match, Segment, match, stored_weights
from ddlib.nets.build import build

SETTING = (20, 1)  # steps N and IPC
OTHERS = ((50, 1), (10, 10))
REPEATS = 7
GIB = 2**30
# name: (engine, whether compiled, bytes of graphs that may wait in memory)
ENGINES = {
    "tesla": ("tesla", False, 0),
    "adjoint": ("adjoint", False, 0),
    "adjoint, kept": ("adjoint", False, inf),
    "adjoint, compiled": ("adjoint", True, 0),
    "adjoint, compiled, 1 GiB": ("adjoint", True, GIB),
    "adjoint, compiled, kept": ("adjoint", True, inf),
    "unroll": ("unroll", False, 0),
    "checkpoint": ("checkpoint", False, 0),
}
COMPARED = (
    "tesla",
    "adjoint, compiled",
    "adjoint, compiled, 1 GiB",
    "adjoint, compiled, kept",
    "unroll",
)


def problem(steps: int, ipc: int, device: torch.device, backbone: str = "convnet") -> tuple:
    """The arguments of `match`: `steps` full batches of `ipc` images of each of ten classes, DSA on."""
    rng, shape = generator(0, "bench"), (3, 32, 32)
    net = FlatNet(build(backbone, shape, 10).to(device).requires_grad_(False))
    labels = torch.arange(10).repeat_interleave(ipc).to(device)
    images = torch.randn(len(labels), *shape, generator=rng).to(device)
    target = net.vector() + 0.01 * torch.randn(net.size, generator=rng).to(device)
    params = [
        draw(
            "color_crop_cutout_flip_scale_rotate", len(labels), shape[1:], rng, op_every=len(labels)
        )
        for _ in range(steps)
    ]
    batches = [torch.arange(len(labels), device=device)] * steps
    rates = torch.full((steps,), 0.01, device=device)
    return net, Segment(net.vector(), target, batches, params), images, labels, rates


def outer_step(steps: int, ipc: int, device: torch.device, repeats: int) -> list[dict]:
    """A row for each engine: median seconds, that over tesla's and unroll's, graph and stored vectors in MiB."""
    arguments = problem(steps, ipc, device)
    inner = CompiledStep(arguments[0], F.cross_entropy)
    with SavedTensors() as one:
        match(*arguments, "adjoint")

    def run(name: str) -> Match:
        engine, compiled, room = ENGINES[name]
        keep = int(max(1, min(steps, room / one.peak)))
        return match(*arguments, engine, keep=keep, inner=inner if compiled else None)

    engines = ENGINES if (steps, ipc) == SETTING else COMPARED
    times: dict[str, list[float]] = {engine: [] for engine in engines}
    for turn in range(repeats + 1):
        for engine in engines:
            taken = seconds(
                lambda engine=engine: run(engine),
                repeats=1,
                warm=turn == 0,
                device=device,
            )
            times[engine] += [taken] if turn else []

    def over(engine: str, other: str) -> float:
        return median(a / b for a, b in zip(times[engine], times[other], strict=True))

    where = "" if (steps, ipc) == SETTING else f" at N = {steps}, IPC {ipc}"
    rows = []
    for engine in engines:
        with SavedTensors() as saved:
            run(engine)
        stored = 4 * arguments[0].size * stored_weights(ENGINES[engine][0], steps)
        rows.append(
            {
                "what": f"outer step{where}, {engine}",
                "steps": steps,
                "ipc": ipc,
                "seconds": median(times[engine]),
                "over tesla": over(engine, "tesla"),
                "over unroll": over(engine, "unroll"),
                "graph MiB": None
                if engine == "checkpoint" or "compiled" in engine
                else round(saved.peak / 2**20, 1),  # unseen by hooks
                "stored MiB": round(stored / 2**20, 1),
            }
        )
    return rows


def main(device: torch.device) -> list[dict]:
    """Print the rows, those of a setting as soon as they are measured, and return them."""
    print(f"trajectory matching on {machine(device)}, medians of {REPEATS} repeats that take turns")
    rows = []
    for steps, ipc in (SETTING, *OTHERS):
        found = outer_step(steps, ipc, device, REPEATS)
        for row in found:
            show(row)
        rows += found
    return rows
