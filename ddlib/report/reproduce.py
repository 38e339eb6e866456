"""Execute the notebooks from top to bottom by papermill: one line per notebook, one table, where to look next."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import suppress
from pathlib import Path

from ..core import DDError, choose
from ..files import (
    SOURCE,
    environment,
    figures_folder,
    lock,
    results_folder,
    write_atomically,
)
from . import tables, terminal
from .plots import short
from .slim import read, sealed, slim

# What the notebooks reproduce on where no dataset is named.
DATASETS = {"smoke": "digits", "small": "cifar10", "paper": "cifar10"}


def reproduce(
    profile: str = "smoke",
    only: Iterable[str] = (),
    dataset: str | None = None,
    device: str = "auto",
    parameters: dict[str, object] | None = None,
    results: str | Path | None = None,
    again: bool = False,
) -> list[Path]:
    """Execute notebooks (all, or `only` these names) into results/notebooks/PROFILE and print what came of it.

    `parameters` are those of the notebooks' cells tagged so; one that no notebook has is a `DDError`, as is a cell that
    fails. `again` takes those that lie there executed, each with the parameters that it was executed with: where their
    runs are kept, they follow new records and texts in a minute each. Returns the executed notebooks' paths.
    """
    try:
        import papermill
    except ImportError:
        raise DDError(
            "reproduce needs papermill: pip install 'ddlib[lab]', or make reproduce"
        ) from None
    # It warns of every comment in a cell of parameters.
    logging.getLogger("papermill").setLevel(logging.ERROR)
    notebooks = {path.stem: path for path in sorted((SOURCE / "notebooks").glob("*.ipynb"))}
    if not notebooks:
        raise DDError(f"reproduce needs the source checkout of ddlib: {SOURCE} has no notebooks")
    folder = results_folder(results)
    earlier = _executed_with(folder / "notebooks" / profile) if again else {}
    offers = sorted(notebooks.keys() & earlier) if again else notebooks
    if not offers:
        raise DDError(f"no notebook of {folder / 'notebooks' / profile} is there any more")
    names = [choose("notebook", name, offers) for name in only] or list(offers)
    known = {name: papermill.inspect_notebook(str(notebooks[name])) for name in names}
    offered = sorted({key for keys in known.values() for key in keys})
    for key in parameters or {}:
        choose("notebook parameter", key, offered)
    given = {"profile": profile, "device": device}
    given |= ({"dataset": dataset} if dataset else {}) | (parameters or {})
    targets = {name: folder / "notebooks" / profile / f"{name}.ipynb" for name in names}

    def execute(name: str) -> float:
        start = time.perf_counter()
        asked = {"dataset": DATASETS[profile]} | earlier.get(name, {}) | given
        values = {key: value for key, value in asked.items() if key in known[name]}
        if not _made_since(asked_at, targets[name], values):
            _execute(papermill, notebooks[name], targets[name], values)
        return time.perf_counter() - start

    start, asked_at = time.perf_counter(), time.time()
    figures = figures_folder().resolve()
    with (
        lock(folder / "notebooks" / profile, f"the notebooks of {profile}"),
        environment(**_inherited(folder, figures, profile)),
    ):
        _all(execute, names, profile, papermill.PapermillExecutionError)
    _report(folder, profile, start, targets, figures / profile)
    return list(targets.values())


def _made_since(moment: float, target: Path, values: dict[str, object]) -> bool:
    """Whether a process that this one waited for has executed this notebook with these parameters."""
    if not target.is_file() or target.stat().st_mtime < moment:
        return False
    return _executed_with(target.parent)[target.stem] == values


def _executed_with(folder: Path) -> dict[str, dict[str, object]]:
    """Name of a notebook that lies executed in `folder` -> the parameters; no such notebook is a `DDError`."""
    copies = {path.stem: read(path) for path in sorted(folder.glob("*.ipynb"))}
    if not copies:
        raise DDError(f"there is no executed notebook in {folder} to be executed again")
    about = {name: copy["metadata"].get("papermill") or {} for name, copy in copies.items()}
    return {name: facts.get("parameters", {}) for name, facts in about.items()}


def _inherited(folder: Path, figures: Path, profile: str) -> dict[str, str]:
    """The environment variables of kernels, in notebooks/: absolute paths and the checkout's ddlib."""
    python_path = filter(None, (str(SOURCE), os.environ.get("PYTHONPATH")))
    values = {
        "DDLIB_RESULTS": str(folder.resolve()),
        "DDLIB_FIGURES": str(figures),
        "PYTHONPATH": os.pathsep.join(python_path),
    }
    if profile == "smoke":
        # On networks this small two threads wait for one another.
        values["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", "1")
    return values


def _execute(papermill: object, source: Path, target: Path, values: dict[str, object]) -> None:
    """Execute a notebook and write it once it is whole: one that is killed or fails leaves the old one."""
    import nbformat

    executed = papermill.execute_notebook(
        str(source),
        None,
        parameters=values,
        cwd=str(source.parent),
        kernel_name="python3",
        progress_bar=False,
        # The kernel's log (its port is not encrypted, its debugger is slow) is not the reader's.
        extra_arguments=["--log-level=CRITICAL"],
    )
    # Without this machine's paths.
    executed.metadata["papermill"] |= {"input_path": source.name, "output_path": target.name}
    whole = sealed(json.loads(nbformat.writes(slim(executed))))
    text = json.dumps(whole, indent=1, ensure_ascii=False) + "\n"
    write_atomically(target, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _all(execute, names: list[str], profile: str, failure: type[Exception]) -> None:
    """Execute the notebooks: side by side on smoke's networks, which keep one core busy, else one after the other."""
    workers = min(2, os.cpu_count() or 1) if profile == "smoke" else 1
    width = max(map(len, names))
    pool = ThreadPoolExecutor(workers)
    jobs = {pool.submit(execute, name): name for name in names}
    try:
        for count, job in enumerate(as_completed(jobs), 1):
            name = jobs[job]
            try:
                seconds = job.result()
            except failure as error:
                raise DDError(f"notebook {name} stopped: {error.ename}: {error.evalue}") from None
            except RuntimeError as error:  # nbclient's DeadKernelError
                raise DDError(f"notebook {name} stopped: {error} (out of memory?)") from None
            print(f"[{count:2}/{len(names)}] {name:{width}} {seconds:6.0f} s", flush=True)
    except KeyboardInterrupt:
        pool.shutdown(wait=False, cancel_futures=True)
        _end_kernels(jobs)
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _end_kernels(jobs: Iterable[Future], seconds: float = 10) -> None:
    """End the kernels that this process started, which have sessions of their own, until no job needs one."""
    import psutil  # ipykernel brings it

    end = time.monotonic() + seconds
    while not all(job.done() for job in jobs) and time.monotonic() < end:
        for child in psutil.Process().children():
            with suppress(psutil.Error):
                if any("ipykernel" in word for word in child.cmdline()):
                    child.kill()
        time.sleep(0.05)


def _report(folder: Path, profile: str, start: float, targets: dict, figures: Path) -> None:
    runs = tables.runs(tables.stored(folder, profile))
    if not runs.empty:
        setting = list(tables.SETTING)
        nearest = tables.headline(runs).set_index(setting).index
        main = tables.judge(runs).set_index(setting).index.isin(nearest)
        rows = tables.compare(runs)[main]
        print(f"\n{terminal.table(rows.assign(dataset=rows.dataset.map(short)))}")
        print(
            f"\nThe setting nearest to each method's preset, of {len(runs)} runs; the notebooks have the rest."
        )
    notebooks = next(iter(targets.values())).parent
    print(
        f"\n{len(targets)} notebooks in {time.perf_counter() - start:.0f} s. Look next at\n"
        f"  {_short(notebooks)}  the executed notebooks, in JupyterLab (make lab)\n"
        f"  {_short(figures)}  their figures\n"
        f"  python -m ddlib site  all of it as pages\n"
        f"  python -m ddlib list --profile {profile}  every run and its cost",
        file=sys.stdout,
    )


def _short(path: Path) -> str:
    """Relative to the working directory where the path lies below it."""
    path, here = path.resolve(), Path.cwd().resolve()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)
