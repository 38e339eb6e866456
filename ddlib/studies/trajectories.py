"""What the papers plot beside accuracy, each computed once and kept as a record in the results folder.

`unrolling`: memory, time and fidelity of the matching gradient against unrolled steps (TESLA's claim, and ours).
`flatness`: sharpness and test loss of plain and flat experts, epoch by epoch (FTD, section 3).
`trajectory_error`: how far the student's test loss runs away from the expert's (FTD's accumulated error).
`full`: accuracy of networks trained on the whole training set, the ceiling of every distilled set.
`outer_steps`: time and memory of one update of the images by DM, trajectory matching and FRePo (FRePo's claim).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from functools import partial
from statistics import fmean, pstdev
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F

from ..augment.siamese import augment, draw
from ..config import Spec, dataset_of, resolve
from ..core import DDError, generator, pick_device
from ..data.dataset import Dataset
from ..engine.meter import PeakMemory, SavedTensors, machine, seconds
from ..engine.record import Run, resolve_record
from ..experts import ExpertsError, load_experts, sharpness
from ..match.trajectory import FlatNet, Segment, match, stored_weights
from ..methods import METHODS
from ..nets.build import build
from ..train.loop import accuracy, compiled, lowered, train_on
from .store import (
    cached,
    kept,  # noqa: F401  also offered here, beside the studies that it reads
)


def unrolling(
    spec: Spec,
    *,
    steps: Iterable[int] = (1, 2, 5, 10, 20),
    device: str = "auto",
    engines: Iterable[str] = ("unroll", "checkpoint", "tesla", "adjoint"),
    largest: int = 8 * 2**30,
) -> pd.DataFrame:
    """One matching gradient of the run `spec` by every engine at every number of unrolled steps.

    Columns: engine, steps, seconds; graph bytes (peak of what autograd holds, `meter.SavedTensors`; for checkpoint
    only its inputs show there); vectors bytes (the theta_i stored beside it, `stored_weights`); peak bytes (CUDA's
    allocator, else the process); and, against the exact gradient: `cosine` and `norm ratio` of the images' gradient,
    `rate ratio` of the step size's. `unroll` is left out where its graph would pass `largest` bytes, extrapolated from
    the row before.
    """
    steps, engines = sorted(steps), list(engines)

    def compute() -> list[dict]:
        at = pick_device(device)
        data, rows, last = dataset_of(spec, at), [], {}
        for n in steps:
            here = Spec(**{**vars(spec), "values": spec.values | {"syn_steps": n}})
            method = METHODS[spec.method](here.config, data, spec.ipc, spec.run.backbone, spec.seed)
            problem = partial(method.match, *method.segment(generator(spec.seed, "unrolling")))
            done = {"adjoint": measured(partial(problem, "adjoint"), at)}
            exact = done["adjoint"][0]
            for engine in engines:
                expected = last["graph bytes"] * n / last["steps"] if last else 0
                if engine == "unroll" and expected > largest:
                    continue
                found, row = done.get(engine) or measured(partial(problem, engine), at)
                a, b = found.images.double().flatten(), exact.images.double().flatten()
                rows.append(
                    {
                        "engine": engine,
                        "steps": n,
                        **row,
                        "vectors bytes": 4 * method.net.size * stored_weights(engine, n),
                        "device": machine(at),
                        "cosine": float(F.cosine_similarity(a, b, dim=0)),
                        "norm ratio": float(a.norm() / b.norm()),
                        "rate ratio": float(found.rates.sum() / exact.rates.sum()),
                    }
                )
                if engine == "unroll":
                    last = rows[-1]
        return rows

    options = {"steps": steps, "engines": engines, "largest": largest}
    return cached("unrolling", spec, options, compute)


def measured(
    work: Callable[[], Any], device: torch.device, repeats: int = 3
) -> tuple[Any, dict[str, Any]]:
    """What `work()` gives and its cost; from 30 seconds on the metered pass is the timed one too."""
    with SavedTensors() as saved, PeakMemory(device) as peak:
        start = time.perf_counter()
        found = work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        once = time.perf_counter() - start
    again = once if once > 30 else seconds(work, repeats=repeats, warm=0, device=device)
    return found, {
        "seconds": again,
        "graph bytes": saved.peak,
        "peak bytes": peak.bytes,
        "peak method": peak.method,
    }


def predicted_memory(
    backbone: str,
    shape: tuple[int, int, int],
    classes: int,
    batch: int,
    steps: int,
    engine: str,
) -> dict[str, Any]:
    """Bytes of one matching gradient, counted on the meta device: nothing is computed, so any size can be asked for.

    graph bytes: the most autograd holds (batches of `batch` images, soft labels, float32, no augmentation); vectors
    bytes: the theta_i stored beside them. The allocator's peak on a GPU is higher by temporaries and convolution
    workspaces.
    """
    net = FlatNet(build(backbone, shape, classes).to("meta"))
    start, index = torch.empty(net.size, device="meta"), torch.arange(batch, device="meta")
    images = torch.empty(batch, *shape, device="meta")
    labels = torch.empty(batch, classes, device="meta")
    segment = Segment(start, start.clone(), [index] * steps, [None] * steps)
    rates = torch.empty(steps, device="meta")
    with SavedTensors() as saved:
        match(net, segment, images, labels, rates, engine)
    return {
        "engine": engine,
        "steps": steps,
        "batch": batch,
        "graph bytes": saved.peak,
        "vectors bytes": 4 * net.size * stored_weights(engine, steps),
    }


def full(spec: Spec, *, networks: int = 2, device: str = "auto") -> pd.DataFrame:
    """Test accuracy (per cent) of networks trained on the whole training set under the protocol of `spec`: the ceiling.

    One row: dataset, profile, backbone, accuracy, std, networks, protocol, epochs, precision. As many passes as on a
    distilled set, which is the same protocol and far more steps: on CIFAR-10 a GPU's work, or fewer `eval_epochs`.
    """

    def compute() -> list[dict]:
        data = dataset_of(spec, pick_device(device))
        scores = [_on_the_whole_set(spec, data, k) for k in range(networks)]
        return [
            {
                "dataset": spec.dataset,
                "profile": spec.profile,
                "backbone": spec.run.backbone,
                "accuracy": fmean(scores),
                "std": pstdev(scores),
                "networks": scores,
                "protocol": spec.recipe.name,
                "epochs": spec.recipe.epochs,
                "precision": spec.run.eval_precision,
            }
        ]

    return cached("full", spec, {"networks": networks}, compute)


def _on_the_whole_set(spec: Spec, data: Dataset, network: int) -> float:
    """The test accuracy of one network, in per cent."""
    rng = generator(spec.seed, "full", network)
    net = build(spec.run.backbone, data.shape, data.num_classes, rng).to(data.device)
    forward = lowered(net.forward, data.device, spec.run.eval_precision)
    forward = compiled(forward) if spec.run.compile else forward
    train_on(data, net, spec.recipe, spec.seed + network, forward=forward)
    return accuracy(net, data, forward=forward)


@torch.no_grad()
def _test_loss(net: FlatNet, theta: torch.Tensor, data: Dataset) -> float:
    labels, total = data.labels["test"], 0
    for part in torch.arange(len(labels), device=data.device).split(1000):
        logits = net(theta, data.batch("test", part))
        total += F.cross_entropy(logits, labels[part], reduction="sum")
    return float(total / len(labels))


def _experts(spec: Spec, data: Dataset):
    config = spec.config
    net = FlatNet(
        build(spec.run.backbone, data.shape, data.num_classes).to(data.device).requires_grad_(False)
    )
    try:
        return net, load_experts(data, spec.run.backbone, config.expert_recipe, config.experts)
    except ExpertsError as error:
        raise DDError(f"{error}: {spec.command('experts')}") from None


def flatness(spec: Spec, *, device: str = "auto", images: int = 512) -> pd.DataFrame:
    """Sharpness (top Hessian eigenvalue of the training loss) and test loss of the experts of `spec`, by epoch.

    Columns: flat, expert, epoch, sharpness, test loss. The eigenvalue is taken on `images` fixed training images.
    """

    def compute() -> list[dict]:
        data = dataset_of(spec, pick_device(device))
        net, experts = _experts(spec, data)
        return [
            {
                "flat": spec.config.flat,
                "expert": e,
                "epoch": epoch,
                "sharpness": sharpness(net, theta.to(data.device), data, images=images),
                "test loss": _test_loss(net, theta.to(data.device), data),
            }
            for e, weights in enumerate(experts.weights)
            for epoch, theta in enumerate(weights)
        ]

    return cached("flatness", spec, {"images": images}, compute)


def trajectory_error(run: Run, *, device: str = "auto") -> pd.DataFrame:
    """Test loss of a student trained on the run's set from an expert's first weights, minus the expert's, by epoch.

    N steps of the student stand for M epochs of the expert, as in the matching. Columns: method, expert, epoch, error.
    """
    spec = resolve_record(run.record)

    def compute() -> list[dict]:
        data = dataset_of(spec, pick_device(device))
        net, experts = _experts(spec, data)
        syn, config, rows = run.synthetic.to(data.device), spec.config, []
        for e, weights in enumerate(experts.weights):
            theta, rng = weights[0].to(data.device), generator(spec.seed, "trajectory error", e)
            for epoch in range(0, len(weights), config.expert_epochs):
                error = _test_loss(net, theta, data) - _test_loss(
                    net, weights[epoch].to(data.device), data
                )
                rows.append({"method": spec.method, "expert": e, "epoch": epoch, "error": error})
                for _ in range(config.syn_steps):
                    n = len(syn.images)
                    params = draw(config.augment, n, data.shape[1:], rng, op_every=n)
                    x = augment(syn.images, params)
                    theta = theta.detach().requires_grad_()
                    loss = F.cross_entropy(net(theta, x), syn.labels)
                    theta = theta.detach() - syn.recipe.lr * torch.autograd.grad(loss, theta)[0]
        return rows

    return cached("trajectory_error", spec, {}, compute)


def outer_steps(
    dataset: str, ipc: int, profile: str, *, device: str = "auto", repeats: int = 5
) -> pd.DataFrame:
    """One update of the same number of real images of a dataset by DM, MTT (its whole graph, and the exact adjoint) and
    FRePo, each with its preset's network and real batch, all uncompiled.

    Columns: method, network, seconds (median of `repeats`), graph bytes (peak of what autograd holds), peak bytes.
    """
    # Snapshots cost an update nothing, and without them the study's name does not depend on them.
    specs = {
        name: resolve(method, dataset, ipc, profile, compile=False, zca="", snapshots=0, **more)
        for name, method, more in (
            ("dm", "dm", {}),
            ("mtt, unrolled", "mtt", {"gradient": "unroll"}),
            ("mtt, adjoint", "mtt", {}),
            ("frepo", "frepo", {}),
        )
    }

    def compute() -> list[dict]:
        at = pick_device(device)
        data, rows = dataset_of(specs["dm"], at), []
        for name, spec in specs.items():
            step = one_step(spec, data)
            step()  # workspaces, and the optimiser's state
            rows.append(
                {
                    "method": name,
                    "network": spec.run.backbone,
                    "ipc": ipc,
                    "device": machine(at),
                    **measured(step, at, repeats)[1],
                }
            )
        return rows

    names = [spec.name for spec in specs.values()]
    return cached("outer_steps", specs["frepo"], {"specs": names, "repeats": repeats}, compute)


def one_step(spec: Spec, data: Dataset) -> Callable[[], object]:
    """One update of the images as a function. Trajectory matching runs between random weights, which changes no work
    and needs no experts."""
    config = spec.config
    if spec.method != "mtt":
        return METHODS[spec.method](config, data, spec.ipc, spec.run.backbone, spec.seed).step
    rng, n = generator(spec.seed, "one step"), data.num_classes * spec.ipc
    net = FlatNet(
        build(spec.run.backbone, data.shape, data.num_classes).to(data.device).requires_grad_(False)
    )
    start, images = net.vector(), data.batch("train", data.sample(spec.ipc, rng).flatten())
    target = start + 0.01 * torch.randn(net.size, generator=rng).to(start)
    size = config.batch_syn or n
    params = [
        draw(config.augment, size, data.shape[1:], rng, op_every=size)
        for _ in range(config.syn_steps)
    ]
    batches = [torch.randperm(n, generator=rng)[:size].to(data.device) for _ in params]
    labels = torch.arange(data.num_classes, device=data.device).repeat_interleave(spec.ipc)
    rates = torch.full((len(params),), config.lr_teacher, device=data.device)
    return lambda: match(
        net, Segment(start, target, batches, params), images, labels, rates, config.gradient
    )


PANELS = {
    "memory (MiB)": "peak graph + weight vectors (MiB)\n(checkpoint: a lower bound)",
    "seconds": "seconds per gradient",
    "cosine": "cosine to the exact gradient",
    "norm ratio": "norm / exact norm",
    "rate ratio": "step-size gradient / exact",
}


def with_memory(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of `unrolling` with "memory (MiB)": the graph, and the weights that are stored beside it."""
    return table.assign(**{"memory (MiB)": (table["graph bytes"] + table["vectors bytes"]) / 2**20})


def growth(table: pd.DataFrame) -> str:
    """What `with_memory` shows in three sentences: growth with N, TESLA's fidelity, the adjoint's time."""
    few, many = table.steps.min(), table.steps.max()
    first, last = (table[table.steps == n].set_index("engine") for n in (few, many))
    ratio = (last["memory (MiB)"] / first["memory (MiB)"]).drop("checkpoint", errors="ignore")
    grows = ", ".join(f"{value:.1f}x for {name}" for name, value in ratio.items())
    tesla, adjoint = last.loc["tesla"], last.loc["adjoint"]
    return (
        f"From N = {few} to {many} the memory grows {grows}.\n"
        f"At N = {many} TESLA's gradient is {tesla['norm ratio']:.2f}x as long as the exact one, at a "
        f"cosine of {tesla.cosine:.2f}; its step-size gradient is {tesla['rate ratio']:.2f}x.\n"
        f"There the adjoint takes {adjoint.seconds / tesla.seconds:.2f}x TESLA's time (medians of "
        "three; read them on an idle machine)."
    )


def predicted(
    backbone: str,
    shape: tuple[int, int, int],
    *,
    batches: Iterable[int] = (),
    classes: Iterable[int] = (),
    steps: int = 10,
) -> pd.DataFrame:
    """Predicted GiB of graph and weight vectors by engine, for ten classes and several batch sizes, or for several
    numbers of classes with an image of each in every step.

    All but `unroll` hold the graph of one step whatever N, so two steps are traced and the vectors counted for `steps`.
    """
    sizes = [("images per step", 10, batch) for batch in batches]
    sizes += [("classes", many, many) for many in classes]
    rows = []
    for name, many, batch in sizes:
        for engine in ("unroll", "tesla", "adjoint"):
            traced = steps if engine == "unroll" else 2
            row = predicted_memory(backbone, shape, many, batch, traced, engine)
            held = row["graph bytes"] + row["vectors bytes"] * steps / traced
            rows.append({name: batch, "engine": engine, "GiB": held / 2**30})
    return pd.DataFrame(rows)


def outcomes(found: Iterable[Run]) -> pd.DataFrame:
    """One row a run: gradient, lr_img, seed, accuracy, mean matching loss of the last quarter, last step size beta."""
    rows = []
    for run in found:
        values, history = run.record["values"], run.record["history"]
        late = pd.DataFrame(history[-max(1, len(history) // 4) :])
        rows.append(
            {
                "gradient": values["gradient"],
                "lr_img": values["lr_img"],
                "seed": run.record["seed"],
                "accuracy": run.accuracy,
                "matching loss": late.loss.mean(),
                "beta": late.beta.iloc[-1],
            }
        )
    return pd.DataFrame(rows)


def paired(scores: pd.DataFrame) -> str:
    """The exact gradient against TESLA's, same seed and step size: difference, its spread, how often it is better."""
    wide = scores.pivot(index=["lr_img", "seed"], columns="gradient")
    lines = []
    for key, better in (("accuracy", 1), ("matching loss", -1)):
        gap = wide[key].adjoint - wide[key].tesla
        ahead = (better * gap > 0).sum()
        lines.append(
            f"{key}, adjoint - tesla: {gap.mean():+.3g} ± {gap.std(ddof=0):.2g}; "
            f"adjoint is better in {ahead} of {len(gap)}"
        )
    return "\n".join(lines)


def by_gradient(scores: pd.DataFrame) -> pd.DataFrame:
    """`outcomes`, mean over seeds, with the spread of the accuracy."""
    groups = scores.groupby(["gradient", "lr_img"], sort=False)
    found = groups.agg(
        accuracy=("accuracy", "mean"),
        spread=("accuracy", lambda values: values.std(ddof=0)),
        loss=("matching loss", "mean"),
        beta=("beta", "mean"),
        seeds=("seed", "size"),
    )
    return found.reset_index()
