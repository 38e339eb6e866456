"""The command line: `ddlib COMMAND`, or `python -m ddlib COMMAND`.

Importing torch takes seconds, so a command imports what it needs when it runs, and help is there at once. A command is
a function whose docstring is its help page: one sentence, then examples.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import textwrap
from contextlib import suppress
from typing import NoReturn

from . import __version__

TOUR = """examples:
  ddlib run dm --dataset digits --ipc 1        seconds on a laptop, no download
  ddlib list                                   every run that is kept
  ddlib presets frepo --dataset cifar10 --ipc 10 --profile paper
  ddlib reproduce --only dm                    a paper's notebook from top to bottom
"""


def _key_values(pairs: list[str]) -> dict[str, object]:
    """`--set key=value` as a dict; values are YAML, and 1e-3, a word to YAML 1.1, is the number that it is."""
    import yaml

    from .core import DDError, shown

    values = {}
    for pair in pairs:
        key, _, text = pair.partition("=")
        # Beside its own errors YAML lets through those of dates, numbers and depth.
        with suppress(yaml.YAMLError, ValueError, TypeError, RecursionError):
            values[key] = yaml.safe_load(text)
        if values.get(key) is None:
            raise DDError(f"--set takes KEY=VALUE, not {shown(pair)}")
        if isinstance(values[key], str):
            with suppress(ValueError):
                values[key] = float(text)
    return values


def _overrides(args: argparse.Namespace) -> dict[str, object]:
    import inspect

    from .core import DDError
    from .engine.run import run

    values = _key_values(args.set)
    for key in values.keys() & inspect.signature(run).parameters.keys():
        raise DDError(f"--set takes the keys of a preset, and {key!r} is none of them")
    return {"backbone": args.backbone} | values


def _given(args: argparse.Namespace, *names: str) -> dict[str, object]:
    """What was given under these names, for a function that has the same."""
    return {name: getattr(args, name) for name in names}


def _run(args: argparse.Namespace) -> None:
    """Distil one set, evaluate it and write its record; a stopped run goes on where it stopped.

    ddlib run dm --dataset digits --ipc 1
    ddlib run frepo --dataset cifar10 --ipc 10 --profile paper --seed 1
    ddlib run dm --dataset folder:photos --ipc 1 --set resolution=32 --set iterations=500
    """
    from .engine.run import run

    case = _given(args, "method", "dataset", "ipc", "profile", "seed", "device", "results")
    ways = _given(args, "fresh", "any_threads", "checkpoint_every")
    done = run(**case, **ways, **_overrides(args))
    record = done.record
    seconds, peak = record["seconds"], record["peak_bytes"] / 2**20
    print(f"{done!r}\nrecord {done.path}\nset    {done.path.with_suffix('.safetensors')}")
    print(
        f"distilled in {seconds['distill']:.0f} s, evaluated in {seconds['evaluate']:.0f} s, "
        f"peak {peak:.0f} MiB ({record['peak_method']}), {record['device']}"
    )


def _experts(args: argparse.Namespace) -> None:
    """Train the expert trajectories that such a run needs (mtt, tesla, ftd, datm); those that are there stay.

    ddlib experts mtt --dataset digits --ipc 1
    ddlib experts ftd --dataset cifar10 --ipc 1 --profile paper --set experts=20
    """
    from .engine.run import prepare

    case = _given(args, "method", "dataset", "ipc", "profile", "device")
    paths = prepare(**case, **_overrides(args))
    print(f"{len(paths)} experts in {paths[0].parent}")


def _presets(args: argparse.Namespace) -> None:
    """Every setting of such a run: its key, its value, and the preset file and line that gives it.

    ddlib presets dm --dataset cifar10 --ipc 10 --profile paper
    ddlib presets frepo --dataset digits --ipc 1
    """
    from .report import presets, terminal

    print(terminal.table(presets.table(args.method, args.dataset, args.ipc, args.profile)))


def _data_of(syn, dataset: str | None, device: str):
    """The dataset that a set belongs to, as the run saw it: its resolution and whitening."""
    from .config import load_as
    from .core import DDError
    from .data.dataset import canonical

    place = canonical(syn.dataset)
    try:
        return load_as(dataset or syn.dataset, syn.spec.get("values", {}), device)
    except DDError as error:
        if dataset or place == syn.dataset:
            raise
        raise DDError(f"{error}; or say where its images are, e.g. --dataset {place}") from None


def _evaluate(args: argparse.Namespace) -> None:
    """Train fresh networks on a distilled set, under the protocol that it carries, and test them.

    ddlib evaluate results/small/dm/NAME.safetensors
    ddlib evaluate NAME.safetensors --dataset folder:cifar10 --backbone resnet18 --networks 3
    """
    from .distilled import Synthetic
    from .train.evaluate import evaluate

    syn = Synthetic.load(args.file)
    data = _data_of(syn, args.dataset, args.device)
    print(evaluate(syn, data, backbone=args.backbone, networks=args.networks, seed=args.seed))


def _export(args: argparse.Namespace) -> None:
    """A distilled set for use elsewhere: PNG files by class (an ImageFolder) with a card, or one .pt file of tensors.

    ddlib export results/small/dm/NAME.safetensors --to cats_and_dogs
    ddlib export results/small/dm/NAME.safetensors --to set.pt      torch.load(..., weights_only=True)
    ddlib export frepo.safetensors --to photos --dataset cifar10     whitened, no look kept
    """
    from pathlib import Path

    from .core import DDError
    from .distilled import Synthetic
    from .engine.record import Run
    from .exchange.outward import save_images, save_pt
    from .files import write_atomically
    from .report.card import of_folder, seen

    syn = Synthetic.load(args.file)
    if args.to.endswith(".pt"):
        print(f"wrote {save_pt(syn, args.to)}")
        return
    run = Run(Path(args.file).with_suffix(".json"))
    of = run if run.path.is_file() else syn
    data = _data_of(syn, args.dataset, "cpu") if args.dataset else None
    pixels = seen(of) if syn.zca and not data else None
    if syn.zca and not data and pixels is None:
        raise DDError("this set is whitened, and no look is kept beside it: name its --dataset")
    text = of_folder(of)
    folder = save_images(syn, args.to, data, seen=pixels)
    write_atomically(folder / "README.md", lambda path: path.write_text(text))
    print(f"wrote {folder}, a card in README.md")


def _import(args: argparse.Namespace) -> None:
    """A set that a released code published, as a file of ours that ddlib evaluate scores. Runs no code of the file's.

    ddlib import res_DM_CIFAR10_ConvNet_10ipc.pt --dataset cifar10 --out dm.safetensors
    ddlib import logged_files/CIFAR10/run --dataset cifar10 --lr 0.0167 --out mtt.safetensors
    ddlib import data_best.pt --dataset cifar10 --method dream --factor 2 --out dream.safetensors
    ddlib import step500000.npz --dataset cifar10 --out frepo.safetensors
    """
    from .exchange.inward import import_set

    facts = _given(args, "method", "experiment", "factor", "lr", "device")
    syn = import_set(args.path, args.dataset, **facts, **_key_values(args.set))
    path = syn.save(args.out)
    print(
        f"{len(syn.images)} images, {syn.ipc} per class, {syn.recipe.name} protocol on {syn.backbone}\n"
        f"wrote {path}; score it: ddlib evaluate {path} --dataset {args.dataset}"
    )


def _card(args: argparse.Namespace) -> None:
    """A card for a kept or imported set, as Hugging Face has them: what, from what, how well, at what cost, whose data.

    ddlib card results/small/dm/NAME.safetensors
    ddlib card results/small/dm/NAME.safetensors --out README.md     with its picture, README.png
    """
    from pathlib import Path

    from .core import DDError
    from .files import write_atomically
    from .report.card import card, of_set, picture

    of = of_set(args.file)
    if not args.out:
        print(card(of), end="")
        return
    out, drawn = Path(args.out), picture(of)
    if not out.name:
        raise DDError(f"--out must name a file, not {str(out)!r}")
    beside = out.with_suffix(".png")
    if drawn:
        print(f"wrote {write_atomically(beside, lambda path: path.write_bytes(drawn))}")
    text = card(of, pictures=f"![The images, a column a class]({beside.name})" if drawn else "")
    print(f"wrote {write_atomically(out, lambda path: path.write_text(text))}")


def _look(args: argparse.Namespace) -> None:
    """Keep beside a set what it takes to show it where its data are not at hand; trains one network.

    ddlib look results/small/dm/NAME.safetensors
    """
    from .report.card import of_file
    from .report.explore import keep

    path = keep(of_file(args.file, "a look"), args.device)
    print(f"wrote {path}, {path.stat().st_size / 1000:.0f} kB")


def _list_methods(args: argparse.Namespace) -> None:
    """Every method by name, those of installed packages too.

    ddlib list-methods
    """
    from .core import DDError
    from .methods import METHODS

    for name in METHODS:
        try:
            entry = METHODS.registration(name)
        except DDError as error:  # of an installed package; the others are there
            print(f"{name:12} cannot be used: {error}")
            continue
        print(f"{name:12} {entry.cls.__module__:28} {entry.paper}".rstrip())


def _list(args: argparse.Namespace) -> None:
    """Every record as a table: accuracy after the last step, the best on the way, what it cost.

    ddlib list --profile small
    ddlib list --method dm --json        every column, for machines
    """
    from .core import choose
    from .files import results_folder
    from .methods import METHODS
    from .report import docs, tables, terminal

    every = tables.runs(tables.stored(args.results, args.profile))
    methods = [choose("method", args.method, METHODS)] if args.method else METHODS
    table = every[every.method.isin(methods)]
    if args.json:
        print(json.dumps(json.loads(table.to_json(orient="records")), indent=1))
    elif args.markdown:
        print(docs.markdown(every, methods))
    elif table.empty:
        which = f" of {args.method}" if args.method else ""
        print(
            f"no records{which} in {results_folder(args.results)}; make one: "
            f"python -m ddlib run {args.method or 'dm'} --dataset digits --ipc 1"
        )
    else:
        print(terminal.runs(table))


def _reproduce(args: argparse.Namespace) -> None:
    """Execute the notebooks from top to bottom; their tables and figures land in results/ and figures/.

    ddlib reproduce                              the embedded digits, some minutes
    ddlib reproduce --only dm frepo
    ddlib reproduce --profile paper --dataset cifar10 --only dm --set ipcs=1,10
    ddlib reproduce --profile small --again      what lies there executed, from the records of today
    """
    from .report.reproduce import reproduce

    parameters, where = _key_values(args.set), args.results
    reproduce(
        args.profile, args.only, args.dataset, args.device, parameters, where, again=args.again
    )


def _queue(args: argparse.Namespace) -> int:
    """Work through a list of runs, cheapest first; what is kept is skipped, and the next call goes on.

    ddlib queue --plan
    ddlib queue --minutes 60
    ddlib queue my_rows.yaml --profile small
    ddlib queue --engine ray --address auto
    """
    import signal

    from .core import DDError, pick_device
    from .engine import cluster, queue

    specs = queue.read(args.file, args.profile, args.cifar10)
    try:
        device = pick_device(args.device)
    except DDError:
        if args.engine != "ray" or args.device != "cuda":
            raise
        device = "cpu"  # the nodes have what is absent here, so the times "here" are the CPU's
    rows = queue.plan(specs, str(device), args.results)
    print(queue.table(rows), flush=True)
    if args.plan:
        return 0
    rest = (args.minutes, args.device, args.results)
    # As Ctrl-C: the run is stopped first.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        if args.engine == "ray":
            well = cluster.work_through(rows, args.address, *rest, args.threads)
        else:
            well = queue.work_through(rows, *rest)
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0 if well else 1


def _site(args: argparse.Namespace) -> None:
    """Pages from what is stored: executed notebooks, claims, methods, kept sets, figures. Nothing is run.

    ddlib site
    ddlib site --out /tmp/site
    """
    from .report import site

    print(f"open {site.build(args.out, args.results)}")


def _docs(args: argparse.Namespace) -> None:
    """Renew the tables in README and docs from the records.

    ddlib docs
    """
    from .report import docs, site

    changed = docs.write(args.results)
    print("\n".join(map(str, changed)) or "the tables of README and docs are up to date")
    for command in site.stale(args.results):
        print(f"an executed notebook is older than its text: {command}")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        message = " ".join(message.split())  # on one line, whatever was typed
        self.exit(2, f"ddlib: {message}; see {self.prog} --help\n")


def _option(*names: str, **meaning: object) -> tuple:
    return names, meaning


METHOD = _option("method", help="e.g. dm, frepo, tesla, ftd, dream_plus; a wrong name lists all")
MATCHED = _option("method", help="mtt, tesla, ftd or datm, which match the trajectories of experts")
DATASET = _option(
    "--dataset", required=True, help="e.g. digits (embedded), mnist, cifar10, or folder:PATH"
)
IPC = _option("--ipc", type=int, required=True, help="images per class")
PROFILE = _option(
    "--profile", default="smoke", help="smoke (the default: seconds), small or paper (its setting)"
)
STORED = _option("--profile", default="smoke", choices=("smoke", "small", "paper"))
DEVICE = _option("--device", default="auto", help="auto (the default), cpu or cuda")
RESULTS = _option(
    "--results", help="folder of the records (default: $DDLIB_RESULTS, else results/)"
)
BACKBONE = _option("--backbone", help="e.g. convnet:width=32; default: the preset's")
SET = _option(
    "--set",
    action="append",
    default=[],
    metavar="KEY=VALUE",
    help="override a preset's key (ddlib presets shows them); may be repeated",
)
SETTING = (METHOD, DATASET, IPC, PROFILE)
COMMANDS: dict[str, tuple] = {}  # name -> its function, and its options
COMMANDS["run"] = (
    _run,
    *SETTING,
    _option("--seed", type=int, default=0, help="of distillation and evaluation (default: 0)"),
    BACKBONE,
    SET,
    _option(
        "--checkpoint-every",
        type=int,
        metavar="STEPS",
        help="default: 50, less often where writing takes long; also every five minutes",
    ),
    _option("--fresh", action="store_true", help="ignore an old record and checkpoint"),
    _option(
        "--any-threads",
        action="store_true",
        help="resume with another number of threads: other last bits",
    ),
    DEVICE,
    RESULTS,
)
COMMANDS["experts"] = (_experts, MATCHED, *SETTING[1:], BACKBONE, SET, DEVICE)
COMMANDS["presets"] = (_presets, *SETTING)
COMMANDS["evaluate"] = (
    _evaluate,
    _option("file", help="a .safetensors file that a run wrote"),
    _option("--dataset", help="where the real test images are; default: the set's own dataset"),
    _option("--backbone", help="another network than the set's own"),
    _option("--networks", type=int, default=5, help="default: 5"),
    _option("--seed", type=int, default=0, help="of the networks (default: 0)"),
    DEVICE,
)
COMMANDS["export"] = (
    _export,
    _option("file", help="a .safetensors file that a run wrote"),
    _option("--to", required=True, help="a new folder, or a file that ends in .pt"),
    _option("--dataset", help="the set's dataset, to undo its whitening"),
)
COMMANDS["import"] = (
    _import,
    _option("path", help="the published file, or the folder that holds it"),
    _option("--dataset", required=True, help="what it was distilled from, e.g. cifar10"),
    _option("--out", required=True, help="the .safetensors file to write"),
    _option("--method", help="whose protocol and network; default: what the layout says"),
    _option("--experiment", type=int, default=-1, help="of a res_*.pt; default: the last"),
    _option("--factor", type=int, help="tiles a side of IDC and DREAM; default: the paper's"),
    _option("--lr", type=float, help="learned step size, where the file lacks it"),
    SET,
    DEVICE,
)
COMMANDS["card"] = (
    _card,
    _option("file", help="a kept .safetensors file beside its record"),
    _option("--out", help="write to this file, a picture beside it; default: print"),
)
COMMANDS["look"] = (
    _look,
    _option("file", help="a kept .safetensors file beside its record"),
    DEVICE,
)
COMMANDS["list-methods"] = (_list_methods,)
COMMANDS["list"] = (
    _list,
    _option("--profile", choices=("smoke", "small", "paper")),
    _option("--method", help="only this one"),
    _option("--markdown", action="store_true", help="as Markdown: paper, ours, verdict"),
    _option("--json", action="store_true", help="every column as one JSON list, for machines"),
    RESULTS,
)
COMMANDS["reproduce"] = (
    _reproduce,
    STORED,
    _option("--dataset", help="default: digits for smoke, else cifar10"),
    _option("--only", nargs="+", default=[], metavar="NOTEBOOK", help="by name, e.g. dm"),
    _option(
        "--again",
        action="store_true",
        help="what is executed already, each notebook with its parameters",
    ),
    _option(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a parameter of the notebooks",
    ),
    DEVICE,
    RESULTS,
)
COMMANDS["queue"] = (
    _queue,
    _option("file", nargs="?", help="rows as YAML (default: the papers' rows)"),
    _option("--profile", default="paper", choices=("smoke", "small", "paper")),
    _option("--cifar10", default="cifar10", help="where CIFAR-10 is, e.g. folder:cifar10"),
    _option("--minutes", type=float, help="stop cleanly after so many (default: never)"),
    _option(
        "--plan",
        action="store_true",
        help="say what each row costs, here and on GPUs, and stop",
    ),
    _option("--engine", default="local", choices=("local", "ray"), help="ray: several machines"),
    _option("--address", help="of a Ray cluster, HOST:PORT or auto (default: a new one, here)"),
    _option("--threads", type=int, default=1, help="CPU cores that a run on Ray takes (1)"),
    DEVICE,
    RESULTS,
)
COMMANDS["site"] = (_site, _option("--out", help="folder of the pages (default: site/)"), RESULTS)
COMMANDS["docs"] = (_docs, RESULTS)


def parser() -> argparse.ArgumentParser:
    """The parser of every command; it needs none of the library's heavy imports."""
    as_written = argparse.RawDescriptionHelpFormatter
    top = _Parser(
        prog="ddlib",
        description="Dataset distillation, to run and to check.",
        epilog=TOUR,
        formatter_class=as_written,
    )
    top.add_argument("--version", action="version", version=f"ddlib {__version__}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for name, (call, *options) in COMMANDS.items():
        summary, _, examples = call.__doc__.partition("\n\n")
        lines = "\n".join(f"  {line.strip()}" for line in examples.strip().splitlines())
        command = commands.add_parser(
            name,
            help=summary,
            description=textwrap.fill(summary, 78),
            epilog=f"examples:\n{lines}",
            formatter_class=as_written,
        )
        command.set_defaults(call=call)
        for names, meaning in options:
            command.add_argument(*names, **meaning)
    return top


def _end_at_once(*_: object) -> None:
    print("ddlib: stopped", file=sys.stderr, flush=True)
    os._exit(130)


def main() -> int:
    """Run the command of `sys.argv`; 0 when it is done, 2 after an error's one sentence, 130 when stopped."""
    top = parser()
    args = top.parse_args()
    if args.command is None:
        top.print_help()
        return 0
    # What is imported here takes seconds, in which Python would answer Ctrl-C with a traceback.
    before = signal.signal(signal.SIGINT, _end_at_once)
    from .core import DDError, Interrupted
    from .engine import heap

    signal.signal(signal.SIGINT, before)
    heap.keep()
    try:
        return args.call(args) or 0
    except (Interrupted, KeyboardInterrupt) as error:
        print(f"ddlib: {str(error) or 'stopped'}", file=sys.stderr)
        return 130
    except DDError as error:
        print(f"ddlib: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader, `head` say, has seen enough
        sys.stdout = None
    return 0
