"""The trunk: a spec becomes a cached record, or a run that can be killed at any moment and resumed."""

from __future__ import annotations

import math
import platform
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import numpy
import torch
from tqdm.auto import tqdm

from ..config import Spec, dataset_of, resolve
from ..core import DDError, Interrupted, instance, listed, pick_device, plain, whole
from ..data.dataset import Dataset
from ..distilled import Synthetic
from ..experts import ExpertsError
from ..files import Busy, CannotWrite, lock, sweep, write_atomically, write_json
from ..methods import METHODS
from ..nets.build import build
from ..train.evaluate import check_labels, evaluate
from . import contract
from .checkpoint import Progress, Signals, guard, threads_of
from .meter import PeakMemory, machine
from .record import (
    SIDE_FILES,
    Run,
    checkpoint_path,
    record_path,
    refuse_other_images,
    set_checksum,
    summary,
    usable,
)


@dataclass(frozen=True)
class Options:
    """How runs are made, whatever they are of; see `run`."""

    device: str | torch.device
    checkpoint_every: int | None
    fresh: bool
    progress: bool
    teach: bool
    wait: bool
    any_threads: bool

    def __post_init__(self) -> None:
        for flag in ("fresh", "progress", "teach", "wait", "any_threads"):
            instance(flag, plain(getattr(self, flag)), bool)
        if self.checkpoint_every is not None:
            whole("checkpoint_every", self.checkpoint_every, 1)


@dataclass(frozen=True, eq=False)
class Job:
    """One run that is asked for, its record and its checkpoint."""

    spec: Spec
    done: Run
    checkpoint: Path

    @classmethod
    def of(cls, spec: Spec, results: str | Path | None) -> Job:
        return cls(spec, Run(record_path(spec, results)), checkpoint_path(spec, results))


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
    checkpoint_every: int | None = None,
    teach: bool = False,
    wait: bool = True,
    any_threads: bool = False,
    **overrides: Any,
) -> Run:
    """The record of one run: at once if `results/` holds it, else distil (or resume), evaluate and write it.

    `overrides` are keys of the method's Config or of `RunConfig`. `data` spares the loading where a notebook already
    has the whole dataset, as `load` gives it; others are refused. `fresh` ignores an old record and checkpoint. `teach`
    first trains the experts that a run needs and lacks (`prepare`); a kept record needs none.

    A killed run resumes from its last checkpoint, written every `checkpoint_every` steps (by default every 50, or less
    often where that would take a twentieth of the time), every five minutes and at every signal, and ends in the same
    bytes on the same CPU with the same number of threads; a resume with another number is refused unless `any_threads`,
    and the record says so. Of processes that ask for the same run one computes it and the others wait and read it, or
    raise `ddlib.files.Busy` at once unless `wait`. A kept record is refused where its folder of images, if it is at
    hand, has changed since. Raises `DDError`.
    """
    spec = resolve(method, dataset, ipc, profile, seed, **overrides)
    job = Job.of(spec, results)
    options = Options(device, checkpoint_every, fresh, progress, teach, wait, any_threads)
    _make([job], instance("data", data, Dataset, None), options)
    return job.done


def run_together(method: str, dataset: str, *, ipcs: Iterable[int], **same: Any) -> list[Run]:
    """`run` for each of `ipcs`, with the same further arguments and to the same bytes of every set.

    Where a method `shares` what its images do not enter (DM: the mean features of the real ones), the runs go in lock
    step and compute it once a step. The seconds and the peak memory of each are then those of all that went together,
    and its record names their IPCs (`together`).
    """
    given = signature(run).bind(method, dataset, ipc=None, **same)
    given.apply_defaults()
    known = given.arguments
    options = Options(**{field.name: known[field.name] for field in fields(Options)})
    data = instance("data", known["data"], Dataset, None)
    specs = [
        resolve(method, dataset, ipc, known["profile"], known["seed"], **known["overrides"])
        for ipc in listed("ipcs", ipcs)
    ]
    jobs = {spec.ipc: Job.of(spec, known["results"]) for spec in specs}
    # Presets may ask for other images or another network at another IPC
    alike = all(job.spec.run == specs[0].run for job in jobs.values())
    if specs and alike and getattr(METHODS[method], "shares", False):
        _make(list(jobs.values()), data, options)
    else:
        for job in jobs.values():
            _make([job], data, options)
    return [jobs[spec.ipc].done for spec in specs]


def _make(jobs: list[Job], data: Dataset | None, options: Options) -> None:
    """Make those of the runs that are not kept; they differ in IPC alone."""
    spec = jobs[0].spec
    data = usable(data, spec)
    jobs = _missing(jobs, data, options.fresh)
    if not jobs:
        return
    device = pick_device(options.device)
    with ExitStack() as held:
        # In one order everywhere, so that no two processes wait for one another
        for job in sorted(jobs, key=lambda job: job.spec.ipc):
            name = f"the run {job.spec.name}"
            held.enter_context(lock(job.done.path, name, options.wait))
        held.enter_context(threads_of(spec.profile))
        held.enter_context(_room(device))
        jobs = _missing(jobs, data, options.fresh)  # another process may have made them meanwhile
        if not jobs:
            return
        for job in jobs:  # an unwritable folder fails now
            trial = job.done.path.with_name(f".{job.spec.name}.try")
            write_atomically(trial, lambda path: None).unlink(missing_ok=True)
        data = data.to(device) if data else dataset_of(spec, device)
        for job in jobs:
            _check(job.spec, data)
            if options.teach:
                _teach(job.spec, data, options.progress)
            if options.fresh:
                job.checkpoint.unlink(missing_ok=True)
        _compute(jobs, data, options)


def _missing(jobs: list[Job], data: Dataset | None, fresh: bool) -> list[Job]:
    """The runs that are to be made; what a kill left beside the others is removed."""
    missing = []
    for job in jobs:
        if fresh or not _kept(job.done, job.checkpoint):
            missing.append(job)
            continue
        refuse_other_images(job.done, job.spec, data)
        _forget(job.checkpoint, job.done)
    return missing


def _compute(jobs: list[Job], data: Dataset, options: Options) -> None:
    """Distil, evaluate and write the records; where memory runs out, with fewer images in one pass from there on."""
    peak, smaller, shared = PeakMemory(data.device), {}, {}
    together = [job.spec.ipc for job in jobs] if len(jobs) > 1 else []
    while True:
        states = {job: _restored(job, data, smaller, peak, options.any_threads) for job in jobs}
        for state in states.values():
            state.together = together or state.together
            if together:
                state.method.shared = shared
        try:
            with peak:
                return _distil(states, data, options.progress, options.checkpoint_every)
        except OutOfMemory as error:
            smaller = _halved(error.state, data)
            if not smaller:
                raise
            words = ", ".join(f"{key}={value}" for key, value in smaller.items())
            warnings.warn(f"{error}; meanwhile this run goes on with {words}", stacklevel=4)
        jobs = list(states)
        shared.clear()
        del states, state  # and what they hold of the memory


def _restored(
    job: Job, data: Dataset, smaller: dict[str, int], peak: PeakMemory, any_threads: bool
) -> Progress:
    """Where the run stands; its method has the settings that were lowered, now or before a stop."""
    method = _method(job.spec, data, smaller)
    state = Progress(job.spec, job.checkpoint, method, data.checksum, peak)
    state.restore(any_threads)
    lowered = state.smaller | smaller
    if lowered != smaller:
        del state, method  # and what they hold of the memory
        return _restored(job, data, lowered, peak, any_threads)
    state.smaller = lowered
    if state.step == 0:
        syn = _synthetic(state, data)
        check_labels(syn, syn.recipe)  # what else would fail after hours of distillation
    return state


def _kept(done: Run, checkpoint: Path) -> bool:
    """Whether record and set are there, and of one run: a kill that left a checkpoint may have come between them."""
    if done.complete and checkpoint.is_file():
        syn = Synthetic.load(done.path.with_suffix(".safetensors"))
        return Run(done.path).has_set(set_checksum(syn))
    return done.complete


def _forget(checkpoint: Path, done: Run) -> None:
    """Remove what a kill left of a finished run: its checkpoint and old temporary files."""
    sweep(done.path)
    sweep(checkpoint)
    if checkpoint.is_file():
        with suppress(Busy, CannotWrite, OSError), lock(done.path, "the run", wait=False):
            checkpoint.unlink(missing_ok=True)


def _check(spec: Spec, data: Dataset) -> None:
    """Raise `DDError` for what would fail only after hours of distillation."""
    sizes, run = data.class_sizes(), spec.run
    smallest = int(sizes.min())
    if spec.ipc > smallest:
        name = data.classes[int(sizes.argmin())]
        raise DDError(
            f"ipc {spec.ipc} is more than the {smallest} training images of class {name!r} of "
            f"{spec.dataset}; allowed: 1 to {smallest}"
        )
    if not len(data.labels["test"]):
        raise DDError(
            f"{spec.dataset} has no test images, so nothing can be evaluated on it: add a test "
            "folder, or give every class two or more images, of which a share is taken for testing"
        )
    build(run.eval_backbone or run.backbone, data.shape, data.num_classes)


class OutOfMemory(DDError):
    """The device has no room for the run, which got as far as `state`."""

    state: Progress


@contextmanager
def _room(device: torch.device) -> Iterator[None]:
    """One sentence where the device has no room for what a run needs before its first step."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise OutOfMemory(
            f"{machine(device)} ran out of memory while the run was prepared; take a device with more"
        ) from None


def _halved(state: Progress, data: Dataset) -> dict[str, int]:
    """The setting of the method that halves the images in one pass, {} where it has none or can go no further.

    Such a setting moves a sum's last bits and nothing else. An evaluation knows nothing of it.
    """
    if state.part == "evaluate":
        return {}
    config = state.spec.config
    for key in ("chunk", "micro"):
        if hasattr(config, key):
            # Of a batch that fits into one pass, half is what helps.
            each = max(
                state.spec.ipc * getattr(config, "factor", 1) ** 2, getattr(config, "batch_real", 0)
            )
            most = data.num_classes * each
            lowered = state.smaller.get(key) or getattr(config, key) or most
            now = min(getattr(state.method, "at_once", lowered), most)
            return {key: now // 2} if now > 1 else {}
    return {}


def _method(spec: Spec, data: Dataset, smaller: dict[str, int]) -> Any:
    config = replace(spec.config, **smaller)
    cls = METHODS[spec.method]
    make = partial(cls, config, data, spec.ipc, spec.run.backbone, spec.seed)
    try:
        return contract.started(spec.method, make, data, spec.ipc)
    except ExpertsError as error:
        raise DDError(f"{error}: {spec.command('experts')}") from None


def _distil(states: dict[Job, Progress], data: Dataset, progress: bool, every: int | None) -> None:
    """Make all steps that are left and write the records, or save where a signal stopped it.

    The run that is furthest behind goes next, so that several meet at every step. `states` loses what is written.
    """
    loops: dict[Job, Iterator[bool]] = {}
    state = next(iter(states.values()))
    try:
        with guard() as signals, _closing(loops):
            for job, state in states.items():
                loops[job] = _loop(state, data, signals, progress, every)
            while states:
                job, state = min(states.items(), key=lambda item: item[1].step)
                if not next(loops[job], False):
                    with signals.held():
                        _write(job.done.path, state, data)
                        job.checkpoint.unlink(missing_ok=True)
                    del states[job]
    except KeyboardInterrupt:
        raise Interrupted(
            f"stopped at step {state.step} of {state.total}; run the same command to go on"
        ) from None
    except torch.OutOfMemoryError:
        place = "in the evaluation at" if state.part == "evaluate" else "at"
        error = OutOfMemory(
            f"{machine(data.device)} ran out of memory {place} step {state.step} of {state.total}; "
            f"{state.kept()}; take a device with more"
        )
        error.state = state
        raise error from None
    except torch.AcceleratorError as error:
        raise DDError(
            f"{data.device} failed at step {state.step} of {state.total} "
            f"({str(error).splitlines()[0]}); {state.kept()}; run the same command to go on"
        ) from None


@contextmanager
def _closing(loops: dict[Job, Iterator[bool]]) -> Iterator[None]:
    """Where one run ends in an error, or a signal ends them all, the others save how far they are."""
    try:
        yield
    finally:
        for loop in loops.values():
            with suppress(KeyboardInterrupt, DDError):
                loop.close()


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
    if not contract.needs(method, spec.config):
        raise DDError(f"{method} needs no experts; methods that do: {', '.join(_with_needs())}")
    device = pick_device(device)
    with threads_of(profile), _room(device):
        return _teach(spec, dataset_of(spec, device), progress)


def _with_needs() -> list[str]:
    """The methods that need something made first; one of a broken package is left out."""
    names = []
    for name in METHODS:
        with suppress(DDError):
            if contract.needs(name, METHODS[name].Config()):
                names.append(name)
    return names


def _teach(spec: Spec, data: Dataset, progress: bool) -> list[Path]:
    paths, options = [], {"compile": spec.run.compile, "progress": progress}
    for asset in contract.needs(spec.method, spec.config):
        paths += contract.made(spec.method, asset, data, spec.run.backbone, **options)
    return paths


def _synthetic(state: Progress, data: Dataset, snapshots: bool = False) -> Synthetic:
    extra = {"snapshots": state.snapshots} if snapshots else {}
    spec, run = state.spec, state.spec.run
    result = contract.result(spec.method, state.method, data.num_classes, spec.ipc)
    changes = dict(result.recipe)
    if run.eval_lr:  # a step size that was asked for stands before a learned one
        changes.pop("lr", None)
    return Synthetic.of(
        data,
        result.images,
        result.labels,
        spec.recipe.tuned(changes),
        run.eval_backbone or run.backbone,
        factor=result.factor,
        spec=asdict(spec),
        **extra,
    )


def _points(total: int, count: int) -> set[int]:
    """`count` steps evenly spaced over 1..total, the last always among them."""
    count = min(count, max(total, 1))
    return {min(total, max(1, round(total * (k + 1) / count))) for k in range(count)}


def _pictures(total: int, count: int) -> set[int]:
    """At most `count` steps in equal ratios up to `total`: images change most in the first steps."""
    return {max(1, round(total ** ((k + 1) / count))) for k in range(count)} if total else set()


def _loop(
    state: Progress, data: Dataset, signals: Signals, progress: bool, every: int | None
) -> Iterator[bool]:
    """Step, log, evaluate and save until the last step, resting after each; a signal or an end saves what is good."""
    config, total, words = state.spec.run, state.total, _words(state.spec)
    tests = _points(total, config.evaluations)
    pictures = _pictures(total, config.snapshots)
    if config.snapshots and not state.snapshots:
        _picture(state)
    state.start_clock()
    with tqdm(
        total=total, initial=state.step, disable=not progress, leave=False, desc=words
    ) as bar:
        try:
            while True:
                # At the top, so that a run that was stopped while it evaluated does not skip it.
                if state.step in tests and all(e["step"] != state.step for e in state.evaluations):
                    _test(state, data, signals, bar)
                if state.step == total:
                    return
                with signals.held():
                    _step(state, bar)
                    if state.step in pictures:
                        _picture(state)
                    if state.step in tests or state.due(every):
                        _save(state)
                yield True
        except (KeyboardInterrupt, GeneratorExit):
            if state.step > state.saved or state.scores:
                with signals.held():  # a second signal waits
                    _save(state)
            raise


def _words(spec: Spec) -> str:
    return f"{spec.method} {spec.dataset} ipc {spec.ipc}"


def _step(state: Progress, bar: tqdm) -> None:
    """One step of the method, logged a hundred times a run."""
    try:
        report = contract.step(state.spec.method, state.method)
    except contract.StepError as error:
        raise DDError(f"{error}; {state.kept()}") from error.__cause__
    except DDError as error:  # raised before anything was changed
        if state.step > state.saved:
            _save(state)
        raise DDError(f"{error}; {state.kept()}") from None
    state.step += 1
    if state.step % max(1, state.total // 100) == 0 or state.step == state.total:
        values = contract.numbers(state.spec.method, report)
        if not all(map(math.isfinite, values.values())):
            raise _diverged(state, str(values))
        state.history.append({"step": state.step} | values)
        bar.set_postfix({name: f"{value:.4g}" for name, value in values.items()}, refresh=False)
    bar.update()


def _picture(state: Progress) -> None:
    state.snapshots[state.step] = state.method.images.detach().cpu().clone()


def _save(state: Progress) -> None:
    for what in ("images", "labels"):
        if not getattr(state.method, what).isfinite().all():
            raise _diverged(state, f"the {what} are not finite")
    state.save()


def _diverged(state: Progress, what: str) -> DDError:
    return DDError(
        f"{state.spec.method} diverged at step {state.step}: {what}; {state.kept()}; lower the step "
        "size"
    )


def _test(state: Progress, data: Dataset, signals: Signals, bar: tqdm) -> None:
    """Evaluate the set as it is now; networks that are behind it are not trained again after a stop."""
    spec = state.spec
    networks = spec.run.networks
    bar.set_description(f"{spec.method} ipc {spec.ipc}: evaluating {networks} networks")

    def after_network() -> None:
        if state.late():
            with signals.held():
                _save(state)

    state.turn_to("evaluate")
    result = evaluate(
        _synthetic(state, data),
        data,
        networks=networks,
        seed=spec.seed,
        compile=spec.run.compile,
        precision=spec.run.eval_precision,
        scores=state.scores,
        after_network=after_network,
    )
    state.turn_to("distill")
    bar.set_description(f"{_words(spec)}, {result.mean:.1f} %")
    earlier = [score for score in state.evaluations if score["step"] < state.step]
    state.evaluations = [*earlier, summary(state.step, result)]
    state.scores = []


def _same(kept: Run, syn: Synthetic, data: Dataset) -> bool:
    """Whether the kept run has this set of these images, so that the rows beside it stay true."""
    images = data.checksum
    with suppress(DDError):  # no record or a damaged one: its set tells alone
        images = kept.record.get("dataset_checksum", images)
    with suppress(DDError):
        old = Synthetic.load(kept.path.with_suffix(".safetensors"))
        return images == data.checksum and set_checksum(old) == set_checksum(syn)
    return False


def _write(path: Path, state: Progress, data: Dataset) -> None:
    """The two files of a finished run: the set, then its record."""
    spec, scores = state.spec, state.evaluations
    peak = max(state.peak, state.meter.read())
    syn, path_of_set = _synthetic(state, data, snapshots=True), path.with_suffix(".safetensors")
    if not _same(Run(path), syn, data):
        for suffix in SIDE_FILES:
            path.with_suffix(suffix).unlink(missing_ok=True)
    syn.save(path_of_set)
    accuracy = {"last": scores[-1], "best": max(scores, key=lambda e: e.get("best", e)["mean"])}
    judged = [score for score in scores if "val" in score]
    if judged:  # the checkpoint that the validation split would choose
        accuracy["selected"] = max(judged, key=lambda score: score["val"]["mean"])
    record = {
        "name": spec.name,
        **asdict(spec),
        "backbone": spec.run.backbone,
        "version": METHODS[spec.method].version,
        "recipe": asdict(syn.recipe),
        "accuracy": accuracy,
        "evaluations": scores,
        "history": state.history,
        "extra": contract.summary(state.spec.method, state.method),
        "seconds": {part: round(seconds, 3) for part, seconds in state.seconds.items()},
        "peak_bytes": peak,
        "peak_method": state.meter.method,
        "device": machine(data.device),
        "threads": state.threads,
        **({"smaller": state.smaller} if state.smaller else {}),
        **({"together": state.together} if state.together else {}),
        "dataset_checksum": data.checksum,
        "set_checksum": set_checksum(syn),
        "commit": state.commit,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": numpy.__version__,
        },
        "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    write_json(path, record)
    if not path_of_set.is_file():  # its folder was removed between the two
        syn.save(path_of_set)
