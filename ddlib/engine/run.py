"""The trunk: a spec becomes a cached record, or a run that can be killed at any moment and resumed."""

from __future__ import annotations

import json
import platform
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy
import torch
from tqdm.auto import tqdm

from ..config import Spec, dataset_of, resolve
from ..core import DDError, Interrupted, pick_device
from ..data.dataset import Dataset
from ..distilled import Synthetic
from ..experts import ExpertsError, train_experts
from ..files import results_folder, write_atomically
from ..methods import METHODS
from ..nets.build import build
from ..train.evaluate import evaluate
from .checkpoint import Progress, guard
from .meter import PeakMemory, machine
from .record import Run, summary


def _points(total: int, count: int) -> set[int]:
    """`count` steps evenly spaced over 1..total, the last always among them."""
    return {min(total, max(1, round(total * (k + 1) / count))) for k in range(count)}


def _pictures(total: int, count: int) -> set[int]:
    """At most `count` steps in equal ratios up to `total`: images change most in the first steps."""
    return {max(1, round(total ** ((k + 1) / count))) for k in range(count)} if total else set()


def run(
    method: str,
    dataset: str,
    *,
    ipc: int,
    profile: str = "smoke",
    seed: int = 0,
    device: str = "auto",
    results: str | Path | None = None,
    data: Dataset | None = None,
    fresh: bool = False,
    progress: bool = True,
    checkpoint_every: int = 50,
    teach: bool = False,
    **overrides: Any,
) -> Run:
    """The record of one run: at once if `results/` holds it, else distil (or resume), evaluate and write it.

    `overrides` are keys of the method's Config or of `RunConfig`. `data` spares the loading where a notebook already
    has it. `fresh` ignores an old record and checkpoint. A killed run resumes from its last checkpoint, written every
    `checkpoint_every` steps, every five minutes and at every signal, and ends in the same bytes on the same CPU. `teach` first trains the
    experts that a run needs and lacks (`prepare`); a kept record needs none. Raises `DDError`.
    """
    spec = resolve(method, dataset, ipc, profile, seed, **overrides)
    folder = results_folder(results) / profile
    done, config = Run(folder / f"{spec.name}.json"), spec.run
    if data and (
        data.name != dataset
        or (data.zca.kind if data.zca else "") != config.zca
        or config.subset
        or config.minival
        or config.resolution not in (0, data.shape[-1])
    ):
        data = None
    if not fresh and done.path.is_file() and done.path.with_suffix(".safetensors").is_file():
        if data and data.checksum != done.record.get(
            "dataset_checksum"
        ):  # a damaged record is named here
            raise DDError(
                f"the record {done.path} was made from other images of the name {dataset!r}: give these "
                "another name, or run with fresh=True"
            )
        done.record  # noqa: B018  or here
        return done
    if checkpoint_every < 1:
        raise DDError(f"checkpoint_every must be at least 1, not {checkpoint_every}")
    at = pick_device(device)
    # An unwritable folder fails now.
    write_atomically(folder / f".{spec.name}.try", lambda path: None).unlink(missing_ok=True)
    data = data.to(at) if data else dataset_of(spec, at)
    smallest = int(data.class_sizes().min())
    if ipc > smallest:
        name = data.classes[int(data.class_sizes().argmin())]
        raise DDError(
            f"ipc {ipc} is more than the {smallest} training images of class {name!r} of {dataset}; "
            f"allowed: 1 to {smallest}"
        )
    build(
        config.eval_backbone or config.backbone, data.shape, data.num_classes
    )  # or it fails after hours of distillation
    if teach and hasattr(spec.config, "expert_recipe"):
        _teach(spec, data, progress)
    try:
        work = METHODS[method](spec.config, data, ipc, config.backbone, seed)
    except ExpertsError as error:
        raise DDError(f"{error}: {spec.command('experts')}") from None
    state = Progress(spec, folder / "checkpoints" / f"{spec.name}.safetensors", work, data.checksum)
    if fresh:
        state.path.unlink(missing_ok=True)
    state.restore()
    with PeakMemory(data.device) as peak:
        try:
            with guard() as flags:
                _loop(state, data, peak, flags, progress, checkpoint_every)
        except KeyboardInterrupt:
            raise Interrupted(
                f"stopped at step {state.step} of {state.total}; run the same command to go on"
            ) from None
    _write(done.path, state, data, peak)
    state.path.unlink(missing_ok=True)
    return done


def prepare(
    method: str,
    dataset: str,
    *,
    ipc: int,
    profile: str = "smoke",
    device: str = "auto",
    progress: bool = True,
    **overrides: Any,
) -> list[Path]:
    """Train the expert trajectories that `run` with the same arguments needs, unless they are there; their files."""
    spec = resolve(method, dataset, ipc, profile, **overrides)
    if not hasattr(spec.config, "expert_recipe"):
        raise DDError(f"{method} needs no experts; methods that do: mtt, tesla, ftd, datm")
    return _teach(spec, dataset_of(spec, pick_device(device)), progress)


def _teach(spec: Spec, data: Dataset, progress: bool) -> list[Path]:
    return train_experts(
        data,
        spec.run.backbone,
        spec.config.expert_recipe,
        spec.config.experts,
        compile=spec.run.compile,
        progress=progress,
    )


def _synthetic(state: Progress, data: Dataset, snapshots: bool = False) -> Synthetic:
    extra = {"snapshots": state.snapshots} if snapshots else {}
    recipe = state.spec.recipe
    if hasattr(state.method, "recipe") and not state.spec.run.eval_lr:
        recipe = state.method.recipe(recipe)  # a learned step size
    run = state.spec.run
    return Synthetic.of(
        data,
        state.method.images,
        state.method.labels,
        recipe,
        run.eval_backbone or run.backbone,
        factor=getattr(state.method, "factor", 1),
        spec=asdict(state.spec),
        **extra,
    )


def _loop(
    state: Progress, data: Dataset, peak: PeakMemory, flags: dict, progress: bool, every: int
) -> None:
    spec, total = state.spec, state.total
    config = spec.run
    tests, pictures = (
        _points(total, config.evaluations),
        _pictures(total, config.snapshots),
    )
    log_every, start, saved = max(1, total // 100), time.perf_counter(), state.step
    if config.snapshots and not state.snapshots:
        state.snapshots[0] = state.method.images.detach().cpu().clone()
    with tqdm(
        total=total,
        initial=state.step,
        disable=not progress,
        leave=False,
        desc=f"{spec.method} {spec.dataset} ipc {spec.ipc}",
    ) as bar:

        def save() -> None:
            nonlocal start, saved
            if not torch.isfinite(state.method.images).all():
                raise _diverged(state, saved, "the images are not finite")
            now = time.perf_counter()
            state.seconds["distill"] += now - start
            start, saved = now, state.step
            state.save(peak)

        try:
            while True:
                # At the top, so that a run that was stopped while it evaluated does not skip that evaluation.
                if state.step in tests and all(e["step"] != state.step for e in state.evaluations):
                    _test(state, data, bar)
                    start = time.perf_counter()
                if state.step == total:
                    return
                flags["stepping"] = True
                try:
                    report = state.method.step()
                except DDError as error:  # raised before anything was changed
                    if state.step > saved:
                        save()
                    raise DDError(f"{error}; {state.kept(state.step)}") from None
                state.step += 1
                if state.step % log_every == 0 or state.step == total:
                    values = {k: float(v) for k, v in report.items()}
                    if not all(map(numpy.isfinite, values.values())):
                        raise _diverged(state, saved, str(values))
                    state.history.append({"step": state.step} | values)
                    bar.set_postfix({k: f"{v:.4g}" for k, v in values.items()}, refresh=False)
                bar.update()
                if state.step in pictures:
                    state.snapshots[state.step] = state.method.images.detach().cpu().clone()
                if (
                    state.step % every == 0
                    or state.step in tests
                    or time.perf_counter() - start > 300
                ):
                    save()
                flags["stepping"] = False
                if flags["stop"]:
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            if state.step > saved:
                save()
            raise


def _diverged(state: Progress, saved: int, what: str) -> DDError:
    return DDError(
        f"{state.spec.method} diverged at step {state.step}: {what}; {state.kept(saved)}; lower the step "
        "size"
    )


def _test(state: Progress, data: Dataset, bar: tqdm) -> None:
    config = state.spec.run
    bar.set_description(
        f"{state.spec.method} ipc {state.spec.ipc}: evaluating {config.networks} networks"
    )
    result = evaluate(
        _synthetic(state, data),
        data,
        networks=config.networks,
        seed=state.spec.seed,
        compile=config.compile,
        precision=config.eval_precision,
    )
    bar.set_description(
        f"{state.spec.method} {state.spec.dataset} ipc {state.spec.ipc}, {result.mean:.1f} %"
    )
    state.seconds["evaluate"] += result.seconds
    state.evaluations = [e for e in state.evaluations if e["step"] < state.step] + [
        summary(state.step, result)
    ]


def _write(path: Path, state: Progress, data: Dataset, peak: PeakMemory) -> None:
    spec = state.spec
    _synthetic(state, data, snapshots=True).save(path.with_suffix(".safetensors"))
    judged = [
        e for e in state.evaluations if "val" in e
    ]  # the checkpoint that the validation split would choose
    best = max(state.evaluations, key=lambda e: e.get("best", e)["mean"])
    selected = {"selected": max(judged, key=lambda e: e["val"]["mean"])} if judged else {}
    record = {
        "name": spec.name,
        **{k: v for k, v in asdict(spec).items()},
        "backbone": spec.run.backbone,
        "version": METHODS[spec.method].version,
        "recipe": asdict(spec.recipe),
        "accuracy": {"last": state.evaluations[-1], "best": best, **selected},
        "evaluations": state.evaluations,
        "history": state.history,
        "extra": getattr(state.method, "record", {}),
        "seconds": {k: round(v, 3) for k, v in state.seconds.items()},
        "peak_bytes": max(state.peak, peak.bytes),
        "peak_method": peak.method,
        "device": machine(data.device),
        "dataset_checksum": data.checksum,
        "commit": state.commit,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": numpy.__version__,
        },
        "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    write_atomically(path, lambda temporary: temporary.write_text(json.dumps(record, indent=1)))
