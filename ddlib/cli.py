"""The command line: python -m ddlib run | evaluate | reproduce | site | docs | bench | list."""

from __future__ import annotations

import argparse
import inspect
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import yaml

from . import __version__
from .config import PROFILES
from .core import (
    SOURCE,
    DDError,
    Interrupted,
    choose,
    pick_device,
    results_folder,
    write_atomically,
)
from .data.dataset import NAMES, canonical, load
from .distilled import Synthetic
from .engine.run import prepare, run
from .methods import METHODS
from .train.evaluate import evaluate

DATASETS = {
    "smoke": "digits",
    "small": "cifar10",
    "paper": "cifar10",
}  # what the notebooks reproduce on


def _key_values(pairs: list[str]) -> dict[str, object]:
    """`--set key=value` as a dict; values are read as YAML, and 1e-3, a word to YAML 1.1, as the number it is."""
    values = {}
    for pair in pairs:
        key, _, text = pair.partition("=")
        with suppress(yaml.YAMLError):
            values[key] = yaml.safe_load(text)
        if values.get(key) is None:
            raise DDError(f"--set takes KEY=VALUE, not {pair!r}")
        if isinstance(values[key], str):
            with suppress(ValueError):
                values[key] = float(text)
    return values


def _overrides(args: argparse.Namespace) -> dict[str, object]:
    values = _key_values(args.set)
    for key in values.keys() & inspect.signature(run).parameters.keys():
        raise DDError(f"--set takes the keys of a preset, and {key!r} is none of them")
    return {"backbone": args.backbone} | values


def _run(args: argparse.Namespace) -> None:
    done = run(
        args.method,
        args.dataset,
        ipc=args.ipc,
        profile=args.profile,
        seed=args.seed,
        device=args.device,
        results=args.results,
        fresh=args.fresh,
        checkpoint_every=args.checkpoint_every,
        **_overrides(args),
    )
    record = done.record
    print(
        f"{done!r}\nrecord {done.path}\nset    {done.path.with_suffix('.safetensors')}\n"
        f"distilled in {record['seconds']['distill']:.0f} s, evaluated in {record['seconds']['evaluate']:.0f} s, "
        f"peak {record['peak_bytes'] / 2**20:.0f} MiB ({record['peak_method']}), {record['device']}"
    )


def _experts(args: argparse.Namespace) -> None:
    paths = prepare(
        args.method,
        args.dataset,
        ipc=args.ipc,
        profile=args.profile,
        device=args.device,
        **_overrides(args),
    )
    print(f"{len(paths)} experts in {paths[0].parent}")


def _evaluate(args: argparse.Namespace) -> None:
    syn = Synthetic.load(args.file)
    made, device = syn.spec.get("values", {}), pick_device(args.device)
    try:
        data = load(
            args.dataset or syn.dataset,
            device=device,
            resolution=made.get("resolution") or None,
            zca=made.get("zca") or None,
        )
    except DDError as error:
        if args.dataset or canonical(syn.dataset) == syn.dataset:
            raise
        raise DDError(
            f"{error}; or say where its images are, e.g. --dataset {canonical(syn.dataset)}"
        ) from None
    print(evaluate(syn, data, backbone=args.backbone, networks=args.networks, seed=args.seed))


def _list(args: argparse.Namespace) -> None:
    from .report import tables

    found = tables.stored(args.results, args.profile)
    if args.method:
        choose("method", args.method, METHODS)
        found = [run for run in found if run.record["method"] == args.method]
    table = tables.runs(found)
    if args.json:
        print(json.dumps(json.loads(table.to_json(orient="records")), indent=1))
    elif args.markdown:
        print(tables.markdown(table))
    elif table.empty:
        print(
            f"no records{f' of {args.method}' if args.method else ''} in {results_folder(args.results)}; make one: "
            f"python -m ddlib run {args.method or 'dm'} --dataset digits --ipc 1"
        )
    else:
        print(
            table.drop(columns=["networks", "device", "protocol", "changed"])
            .round(1)
            .to_string(index=False)
        )


def _reproduce(args: argparse.Namespace) -> None:
    """Execute the notebooks by papermill into results/notebooks/PROFILE and print one table of all runs."""
    try:
        import papermill
    except ImportError:
        raise DDError(
            "reproduce needs papermill: pip install 'ddlib[lab]', or make reproduce"
        ) from None
    from .report import tables

    notebooks = {path.stem: path for path in sorted((SOURCE / "notebooks").glob("*.ipynb"))}
    names = [choose("notebook", name, notebooks) for name in args.only] or list(notebooks)
    out = results_folder(args.results) / "notebooks" / args.profile
    out.mkdir(parents=True, exist_ok=True)
    figures = Path(os.environ.get("DDLIB_FIGURES") or SOURCE / "figures").resolve()
    # The kernels start in notebooks/: absolute paths, and the checkout's ddlib even where none is installed.
    os.environ |= {
        "DDLIB_RESULTS": str(results_folder(args.results).resolve()),
        "DDLIB_FIGURES": str(figures),
        "PYTHONPATH": os.pathsep.join(filter(None, (str(SOURCE), os.environ.get("PYTHONPATH")))),
    }
    if args.profile == "smoke":
        os.environ.setdefault(
            "OMP_NUM_THREADS", "1"
        )  # on networks this small two threads wait for one another
    parameters = {
        "profile": args.profile,
        "device": args.device,
        "dataset": args.dataset or DATASETS[args.profile],
    }
    known = {name: papermill.inspect_notebook(str(notebooks[name])) for name in names}
    for key, value in _key_values(args.set).items():
        choose(
            "notebook parameter", key, sorted({k for offered in known.values() for k in offered})
        )
        parameters[key] = value
    start = time.perf_counter()
    # Smoke networks keep one core busy, so notebooks run side by side; a larger profile has the machine to itself.
    workers = min(2, os.cpu_count() or 1) if args.profile == "smoke" else 1

    def execute(name: str) -> None:
        taken = {key: value for key, value in parameters.items() if key in known[name]}
        done = papermill.execute_notebook(
            str(notebooks[name]),
            target := str(out / f"{name}.ipynb"),
            parameters=taken,
            cwd=str(SOURCE / "notebooks"),
            kernel_name="python3",
            progress_bar=workers == 1 and sys.stderr.isatty(),
        )
        done.metadata["papermill"] |= {
            "input_path": f"{name}.ipynb",
            "output_path": f"{name}.ipynb",
        }
        papermill.iorw.write_ipynb(done, target)  # without this machine's paths
        print(f"{name}: {target}, {time.perf_counter() - start:.0f} s", flush=True)

    with ThreadPoolExecutor(workers) as pool:
        jobs = {pool.submit(execute, name): name for name in names}
        for job in as_completed(jobs):
            try:
                job.result()
            except papermill.PapermillExecutionError as error:
                pool.shutdown(cancel_futures=True)
                raise DDError(
                    f"notebook {jobs[job]} stopped: {error.ename}: {error.evalue}"
                ) from None
    table = tables.compare(tables.runs(tables.stored(args.results, args.profile)))
    print(
        f"\n{table.to_string(index=False)}\n\n{len(names)} notebooks in {time.perf_counter() - start:.0f} s; "
        f"figures in {figures / args.profile}"
    )


def _bench(args: argparse.Namespace) -> None:
    sys.path.insert(0, str(SOURCE))
    try:
        from benchmarks import dm, frepo, gradient, kmeans, trajectory
    except ImportError:
        raise DDError(
            "bench needs the source checkout of ddlib, which has the plain loops"
        ) from None
    parts = {
        "dm": dm,
        "trajectory": trajectory,
        "frepo": frepo,
        "gradient": gradient,
        "kmeans": kmeans,
    }
    rows: list[dict] = []
    for name in [args.only] if args.only else parts:
        rows += parts[name].main(pick_device(args.device))
    if args.out:
        write_atomically(Path(args.out), lambda path: path.write_text(json.dumps(rows, indent=1)))


def _site(args: argparse.Namespace) -> None:
    from .report import site

    print(f"open {site.build(args.profile, args.out, args.results)}")


def _docs(args: argparse.Namespace) -> None:
    from .report import site

    print(
        "\n".join(map(str, site.write_docs(args.results)))
        or "the tables of docs/methods are up to date"
    )


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"ddlib: {message}; see {self.prog} --help\n")


def parser() -> argparse.ArgumentParser:
    top = _Parser(prog="ddlib", description="Dataset distillation, reproduced.")
    top.add_argument("--version", action="version", version=f"ddlib {__version__}")
    commands = top.add_subparsers(dest="command", required=True)

    def command(name: str, call, summary: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=summary, description=summary)
        sub.set_defaults(call=call)
        sub.add_argument("--device", default="auto", help="auto, cpu or cuda")
        if name not in ("bench", "experts"):  # which live where DDLIB_EXPERTS or DDLIB_RESULTS says
            sub.add_argument(
                "--results", help="folder of the records (default: DDLIB_RESULTS, else results/)"
            )
        return sub

    one = command(
        "run", _run, "distil one set, evaluate it and write its record; a stopped run goes on"
    )
    teach = command("experts", _experts, "train the expert trajectories that such a run needs")
    for sub in (one, teach):
        sub.add_argument("method", help=", ".join(METHODS))
        sub.add_argument("--dataset", required=True, help=f"{', '.join(NAMES)}, or folder:PATH")
        sub.add_argument("--ipc", type=int, required=True, help="images per class")
        sub.add_argument(
            "--profile", default="smoke", help=f"{', '.join(PROFILES)} (default: smoke)"
        )
        sub.add_argument("--backbone", help="e.g. convnet:width=32; default: the preset's")
        sub.add_argument(
            "--set", action="append", default=[], metavar="KEY=VALUE", help="override a preset key"
        )
    one.add_argument(
        "--seed", type=int, default=0, help="of the distillation and its evaluation (default: 0)"
    )
    one.add_argument(
        "--checkpoint-every",
        type=int,
        default=50,
        metavar="STEPS",
        help="default: 50; also every five minutes",
    )
    one.add_argument("--fresh", action="store_true", help="ignore an old record and checkpoint")

    score = command("evaluate", _evaluate, "train fresh networks on a distilled set and test them")
    score.add_argument("file", help="a .safetensors file that a run wrote")
    score.add_argument(
        "--dataset", help="where the real test images are; default: the set's own dataset"
    )
    score.add_argument("--backbone", help="another network than the set's own")
    score.add_argument("--networks", type=int, default=5, help="default: 5")
    score.add_argument("--seed", type=int, default=0, help="of the networks (default: 0)")

    show = command("list", _list, "every record as a table")
    show.add_argument("--profile", choices=PROFILES)
    show.add_argument("--method", help=f"only this one: {', '.join(METHODS)}")
    show.add_argument(
        "--markdown", action="store_true", help="paper | ours | difference, as README.md has it"
    )
    show.add_argument("--json", action="store_true", help="one JSON list, for machines")

    again = command("reproduce", _reproduce, "execute the notebooks, write tables and figures")
    again.add_argument("--profile", default="smoke", choices=PROFILES)
    again.add_argument(
        "--dataset", help=f"default: {', '.join(f'{d} for {p}' for p, d in DATASETS.items())}"
    )
    again.add_argument("--only", nargs="+", default=[], help="notebooks by name, e.g. dm")
    again.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a notebook parameter"
    )

    pages = command("site", _site, "executed notebooks, claims, methods and figures as static HTML")
    pages.add_argument("--profile", default="smoke", choices=PROFILES)
    pages.add_argument("--out", help="folder of the pages (default: site/)")
    command("docs", _docs, "renew the tables in docs/methods from the records")

    bench = command("bench", _bench, "time and memory against a plain loop, and the roofline")
    bench.add_argument(
        "--only",
        choices=("dm", "trajectory", "frepo", "gradient", "kmeans"),
        help="one part; default: all",
    )
    bench.add_argument("--out", help="write the rows as JSON to this file")
    return top


def main() -> int:
    args = parser().parse_args()
    try:
        args.call(args)
    except (Interrupted, KeyboardInterrupt) as error:
        print(f"ddlib: {str(error) or 'stopped'}", file=sys.stderr)
        return 130
    except DDError as error:
        print(f"ddlib: {error}", file=sys.stderr)
        return 2
    return 0
