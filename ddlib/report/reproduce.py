"""Execute the notebooks from top to bottom by papermill, quietly: one line a notebook, one table, where to look next."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import suppress
from pathlib import Path

from ..core import DDError, choose
from ..files import SOURCE, CannotWrite, lock, results_folder
from . import tables, terminal

# What the notebooks reproduce on where no dataset is named.
DATASETS = {"smoke": "digits", "small": "cifar10", "paper": "cifar10"}


def reproduce(
    profile: str = "smoke",
    only: Iterable[str] = (),
    dataset: str | None = None,
    device: str = "auto",
    parameters: dict[str, object] | None = None,
    results: str | Path | None = None,
) -> list[Path]:
    """Execute notebooks (all, or `only` these names) into results/notebooks/PROFILE and print what came of it.

    `parameters` are those of the notebooks' cells tagged so; one that no notebook has is a `DDError`, as is a cell that
    fails. Returns the executed notebooks' paths.
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
    names = [choose("notebook", name, notebooks) for name in only] or list(notebooks)
    known = {name: papermill.inspect_notebook(str(notebooks[name])) for name in names}
    offered = sorted({key for keys in known.values() for key in keys})
    for key in parameters or {}:
        choose("notebook parameter", key, offered)
    asked = {"profile": profile, "device": device, "dataset": dataset or DATASETS[profile]}
    asked |= parameters or {}
    folder = results_folder(results)
    figures = _environment(folder, profile)
    targets = {name: folder / "notebooks" / profile / f"{name}.ipynb" for name in names}
    _make(targets[names[0]].parent)

    def execute(name: str) -> float:
        start = time.perf_counter()
        values = {key: value for key, value in asked.items() if key in known[name]}
        _execute(papermill, notebooks[name], targets[name], values)
        return time.perf_counter() - start

    start = time.perf_counter()
    with lock(folder / "notebooks" / profile, f"the notebooks of {profile}"):
        _all(execute, names, profile, papermill.PapermillExecutionError)
    _report(folder, profile, start, targets, figures)
    return list(targets.values())


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CannotWrite(
            f"cannot write {folder}: {error.strerror}; choose a writable folder with --results DIR"
        ) from None


def _environment(folder: Path, profile: str) -> Path:
    """What the kernels inherit, which start in notebooks/: absolute paths and the checkout's ddlib. The figures' folder."""
    figures = Path(os.environ.get("DDLIB_FIGURES") or SOURCE / "figures").resolve()
    python_path = filter(None, (str(SOURCE), os.environ.get("PYTHONPATH")))
    os.environ |= {
        "DDLIB_RESULTS": str(folder.resolve()),
        "DDLIB_FIGURES": str(figures),
        "PYTHONPATH": os.pathsep.join(python_path),
    }
    if profile == "smoke":
        # On networks this small two threads wait for one another.
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    return figures / profile


def _execute(papermill: object, source: Path, target: Path, values: dict[str, object]) -> None:
    executed = papermill.execute_notebook(
        str(source),
        str(target),
        parameters=values,
        cwd=str(source.parent),
        kernel_name="python3",
        progress_bar=False,
        # The kernel's log (its port is not encrypted, its debugger is slow) is not the reader's.
        extra_arguments=["--log-level=ERROR"],
    )
    # Without this machine's paths.
    executed.metadata["papermill"] |= {"input_path": source.name, "output_path": target.name}
    papermill.iorw.write_ipynb(executed, str(target))


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
    rows = tables.compare(tables.runs(tables.stored(folder, profile)))
    if not rows.empty:
        print(f"\n{terminal.table(rows)}")
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
