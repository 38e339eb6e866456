"""Odd arguments for every public function and command: each is refused in one sentence, or works."""

import dataclasses
import math
import os
import random
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import hypothesis
import matplotlib.pyplot as plt
import numpy as np
import torch
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

import ddlib as dd
from ddlib import cli
from ddlib.core import DDError
from ddlib.report import docs

from .faults import EXPERTS, TINY
from .odd import BATCH, outcome

# What hypothesis does not make by itself.
SPECIAL = (
    "digits", "\0", "é" * 300, "../x", "\ud800", {1}, range(3), object(), int, print, Path("x"), np.bool_(1),
    np.array("a"),
    np.array([None]), torch.zeros(2), torch.tensor(1), torch.zeros(2, dtype=torch.bfloat16), np.int64(-1),
    np.float32(0.5),
)  # fmt: skip
HUGE = (
    st.sampled_from((2**63, 10**12, 10**400, 1e300))
    | st.just(5000).map(lambda digits: 10**digits)  # Python writes no number of so many digits
)
# No digit, which could ask for hours, and no slash, which could lead out of the folder of the case.
WORD = st.text(st.characters(exclude_categories=("Nd",), exclude_characters="/"), max_size=8)
LEAF = (
    st.none() | st.booleans() | st.integers(-9, 9) | st.floats(-9, 9) | st.sampled_from((math.nan, math.inf, -math.inf))
    | WORD | st.binary(max_size=3) | st.complex_numbers(max_magnitude=9) | st.sampled_from(SPECIAL)
    | arrays(st.sampled_from((np.int64, np.float32, np.uint8, bool)), array_shapes(max_dims=3, max_side=3))
)  # fmt: skip
VALUE = st.recursive(
    LEAF,
    lambda part: st.lists(part, max_size=2) | st.tuples(part) | st.dictionaries(WORD, part, max_size=2),
    max_leaves=3,
)  # fmt: skip
TEXTS = (
    "", "x", "1", "-1", "0", "1e400", "nan", "9" * 5000, "\0", "é" * 300, "../x", "~nouser/x", "folder:", "folder:x",
    "/",
    "folder:/dev", "/dev/null", "/dev/zero", "pipe", "pipes", "folder:pipes", "digits", "mnist", "--", "-x",
    "2001-02-30", "0x_", "-0b_", "!!float x", "[" * 3000,
    "&a [*a]", "{", "\ud800",
)  # fmt: skip
PAIRS = ("iterations", "ipc", "lr_img", "backbone", "augment", "zca", "x", "")


@dataclasses.dataclass(frozen=True)
class Call:
    """A function with arguments that make sense; those in `slow` never get a number that asks for hours."""

    function: Callable[..., Any]
    sane: Mapping[str, Any]
    slow: tuple[str, ...] = ()

    def odd(self, data: st.DataObject) -> dict[str, Any]:
        """The arguments, one of them odd, or two."""
        values = dict(self.sane)
        names = st.lists(st.sampled_from(list(values)), min_size=1, max_size=2)
        for key in data.draw(names):
            values[key] = data.draw(VALUE if key in self.slow else VALUE | HUGE)
        return values


def functions(paths: dict[str, str], draw: random.Random) -> dict[str, Call]:
    """Every public function of ddlib, and the methods of its public classes."""
    run, syn = dd.Run(Path(paths["record"])), dd.Synthetic.load(paths["set"])
    data, resolved = dd.load("digits", device="cpu"), dd.resolve("dm", "digits", 1).values
    changed = {draw.choice(list(resolved)): 1}
    device = {"device": "cpu"}
    spec = {"method": "dm", "dataset": "digits", "ipc": 1, "profile": "smoke"}
    tiny = {key: value for key, value in TINY.items() if key not in ("ipc", "device")}
    images, labels = np.zeros((4, 8, 8), np.uint8), np.array([0, 1, 0, 1])
    arrays = {"train_images": images, "train_labels": labels}
    arrays |= {"test_images": images, "test_labels": labels, "classes": ["a", "b"], "name": "mine"}
    short = lambda **values: dd.run(**tiny | {"iterations": 1} | values)
    taught = lambda **values: dd.prepare(
        **{k: tiny[k] for k in ("backbone", "progress")} | EXPERTS_OF | values
    )
    swept = lambda **values: dd.sweep(**tiny | {"iterations": 1, "device": "cpu"} | values)
    part = {field.name: getattr(syn, field.name) for field in dataclasses.fields(syn)}
    options = {"seed": 0, "results": "r", "data": data, "fresh": False, "checkpoint_every": 1}
    options |= {"teach": False, "wait": True, "any_threads": False}
    transfer = {"backbone": "mlp", "networks": 1, "protocol": "dm", "epochs": 1, "augment": "none"}
    transfer |= {"hard": False, "data": data} | device
    scored = {"backbone": "mlp", "networks": 1, "seed": 0, "recipe": syn.recipe, "split": "test"}
    imported = {"path": paths["pt"], "dataset": "digits", "method": "dm", "experiment": -1}
    imported |= {"factor": 1, "lr": 0.01}
    made = {"data": data, "images": syn.images, "labels": syn.labels, "recipe": syn.recipe}
    rows = {"n": 1, "generator": torch.Generator(), "split": "test", "classes": [0]}
    return {
        "Dataset.batch": Call(data.batch, {"split": "test", "index": [0, 1]}),
        "Dataset.class_sizes": Call(data.class_sizes, {"split": "test"}),
        "Dataset.denormalise": Call(data.denormalise, {"x": syn.images}),
        "Dataset.minival": Call(data.minival, {"fraction": 0.1, "seed": 0}),
        "Dataset.normalise": Call(data.normalise, {"pixels": data.images["test"][:2]}),
        "Dataset.sample": Call(data.sample, rows),
        "Dataset.subset": Call(data.subset, {"per_class": 1, "seed": 0}),
        "Dataset.to": Call(data.to, device),
        "Run.record": Call(lambda path: dd.Run(path).record, {"path": run.path}),
        "Run.transfer": Call(run.transfer, transfer, ("networks", "epochs")),
        "Spec.command": Call(dd.resolve("dm", "digits", 1).command, {"verb": "run"}),
        "Spec.name": Call(lambda **v: dd.resolve(**v).name, spec | {"seed": 0}),
        "Synthetic.check": Call(syn.check, {"data": data}),
        "Synthetic.load": Call(dd.Synthetic.load, {"path": paths["set"]}),
        "Synthetic.of": Call(dd.Synthetic.of, made | {"backbone": "mlp"}),
        "Synthetic.pixels": Call(syn.pixels, {"data": data, "images": syn.images}),
        "Synthetic.save": Call(syn.save, {"path": "a.safetensors"}),
        "Synthetic.to": Call(syn.to, device),
        "Synthetic.validate": Call(lambda **v: dd.Synthetic(**v).validate(), part),
        "card": Call(dd.card, {"of": run, "pictures": "x", "use": "x"}),
        "evaluate": Call(
            dd.evaluate,
            {"syn": syn, "data": data, "precision": "float32"} | scored,
            ("networks",),
        ),
        "from_arrays": Call(dd.from_arrays, arrays | device),
        "import_set": Call(dd.import_set, imported | device),
        "import_set of others": Call(
            dd.import_set, imported | {"path": paths["published .pt"]} | device
        ),
        "load": Call(
            dd.load, {"name": "digits", "resolution": None, "zca": None, "root": None} | device
        ),
        "numbers": Call(dd.numbers, {"text": "1,2", "kind": int, "least": 0}),
        "plots.images": Call(
            dd.plots.images, {"syn": syn, "data": data, "per_class": 1, "title": "t"}
        ),
        "plots.real": Call(
            dd.plots.real, {"data": data, "per_class": 1, "seed": 0, "split": "test"}
        ),
        "plots.short": Call(dd.plots.short, {"dataset": "digits"}),
        "prepare": Call(taught, spec | {"method": "mtt"} | device, ("ipc",)),
        "protocol": Call(
            dd.protocol, {"name": "dm", "epochs": 1, "augment": "none", "mirror": True}
        ),
        "resolve": Call(dd.resolve, spec | {"seed": 0} | changed),
        "run": Call(short, spec | options | device, ("checkpoint_every",)),
        "save_images": Call(dd.save_images, {"syn": syn, "folder": "images", "data": data}),
        "save_pt": Call(dd.save_pt, {"syn": syn, "path": "a.pt"}),
        "run_together": Call(
            lambda **values: dd.run_together(**tiny | {"iterations": 1} | values),
            {"method": "dm", "dataset": "digits", "ipcs": [1]} | options | device,
            ("checkpoint_every",),
        ),
        "sweep": Call(swept, {"method": "dm", "dataset": "digits", "ipcs": [1], "seeds": [0]}),
        "tables.on_other_networks": Call(dd.tables.on_other_networks, {"path": run.path}),
        "tables.runs": Call(dd.tables.runs, {"found": [run]}),
        "tables.stored": Call(dd.tables.stored, {"results": "r", "profile": "smoke"}),
        "tensor_dataset": Call(dd.tensor_dataset, {"syn": syn}),
    }


# What is not called, by the reason; "module.*" is every function of a module.
LEFT_OUT = {
    "it has no arguments": (
        "Run.synthetic",
        "Run.transferred",
        "Synthetic.hardened",
        "Synthetic.training_set",
        "tables.first_hand",
        "tables.published",
        "tables.recalled",
    ),
    "notebooks and pages call it, on what they have made themselves; it is not in `dd.__all__`": (
        "claims.*",
        "continual.*",
        "cross.*",
        "explore.*",
        "fairness.*",
        "lesson.*",
        "membership.*",
        "sampling.*",
        "scaling.*",
        "scorecard.*",
        "search.*",
        "trajectories.*",
    ),
    "it takes a table of `tables`, or a figure": (
        "plots.accuracy_vs_ipc",
        "plots.heatmap",
        "plots.intervals",
        "plots.lines",
        "plots.ordered",
        "plots.save",
        "plots.scatter",
        "tables.as_markdown",
        "tables.changes",
        "tables.compare",
        "tables.cost",
        "tables.details",
        "tables.front_page",
        "tables.headline",
        "tables.judge",
        "tables.lead",
        "tables.made",
        "tables.nearness",
        "tables.own",
        "tables.random_beside",
        "tables.summary",
        "tables.titled",
    ),
    "odd arguments are Python's own errors there": (
        "Run.has_set",
        "plots.colour_of",
        "plots.evolution",
        "plots.grid",
        "plots.history",
        "plots.place",
        "plots.setting",
        "plots.side_by_side",
        "plots.title_of",
        "tables.across",
        "tables.curve",
        "tables.mark",
        "tables.paper_settings",
        "tables.printed",
        "tables.printed_across",
        "tables.printed_figure",
        "tables.printed_runs",
        "tables.transfers",
        "tables.with_spread",
    ),
}
EXPERTS_OF = {key: value for key, value in EXPERTS.items() if key != "teach"}


def commands(paths: dict[str, str]) -> dict[str, list[str]]:
    """Words that make sense for every command."""
    spec = ["dm", "--dataset", "digits", "--ipc", "1"]
    short = [f"--set={key}={TINY[key]}" for key in ("eval_epochs", "networks", "backbone")]
    teach = ["mtt", *spec[1:], *(f"--set={key}={value}" for key, value in EXPERTS_OF.items())]
    return {
        "run": [*spec, *short, "--set=iterations=1", "--seed", "0", "--results", "r"],
        "experts": [*teach, "--backbone", "convnet:width=4"],
        "presets": [*spec, "--profile", "smoke"],
        "evaluate": [paths["set"], "--networks", "1", "--backbone", "mlp", "--dataset", "digits"],
        "export": [paths["set"], "--to", "images", "--dataset", "digits"],
        "import": [paths["pt"], "--dataset", "digits", "--out", "a.safetensors", "--method", "dm"],
        "card": [paths["set"], "--out", "a.md"],
        "look": [paths["set"], "--device", "cpu"],
        "list": ["--profile", "smoke", "--method", "dm", "--results", "r"],
        "list-methods": ["--help"],
        "reproduce": ["--only", "x", "--dataset", "digits", "--set=a=1", "--results", "r"],
        "queue": ["x.yaml", "--plan", "--profile", "smoke", "--results", "r"],
        "site": ["--out", "s", "--results", "executed"],
        "docs": ["--results", "r"],
    }


def command(words: list[str]) -> None:
    """A command as it is typed; its one sentence is a `DDError` again."""
    sys.argv = ["ddlib", *words]
    said = StringIO()
    with redirect_stdout(StringIO()), redirect_stderr(said):
        try:
            code = cli.main()
        except SystemExit as end:  # argparse's
            code = end.code
    if code:
        text = said.getvalue().strip().splitlines()[-1]
        assert text.startswith("ddlib: "), text
        raise DDError(text)


def odd_words(data: st.DataObject, sane: list[str]) -> list[str]:
    """A command's words, one of them odd."""
    words = list(sane)
    text = data.draw(st.sampled_from(TEXTS) | WORD)
    if data.draw(st.booleans()):
        text = f"--set={data.draw(st.sampled_from(PAIRS))}={text}"
    words[data.draw(st.integers(0, len(words) - 1))] = text
    return words


def harmless() -> None:
    """Let `site` and `docs`, which take minutes and write into the checkout, do all but that; make what TEXTS name."""
    from mkdocs.commands import build

    build.build = lambda config: None
    docs.pages = lambda: [Path("page.md")]
    Path("page.md").write_text("<!-- records:begin dm (ddlib docs) -->\n<!-- records:end -->\n")
    executed = Path("executed", "notebooks", "smoke")
    executed.mkdir(parents=True)
    (executed / "dm.ipynb").touch()
    os.environ["DDLIB_RESULTS"] = str(Path("executed").absolute())
    Path("pipes").mkdir()
    for path in ("pipe", "pipes/data.pt"):
        os.mkfifo(path)


def arguments(paths: dict[str, str], seed: int) -> Counter:
    """One child's cases of calls and commands with odd arguments, which hypothesis draws.

    It draws, and no more: a campaign counts what becomes of every case, in a child that may hang or die, and the short
    form must be as quick as the others. So nothing is shrunk, replayed or kept in a database; a seed makes the cases
    again.
    """
    counts, words_of = Counter(), commands(paths)
    calls = functions(paths, random.Random(seed))
    harmless()

    def case(data: st.DataObject) -> None:
        if data.draw(st.integers(0, 9)) < 3:
            name = data.draw(st.sampled_from(list(words_of)))
            words = odd_words(data, words_of[name])
            if name != "reproduce" or "x" in words:  # else it may execute them all
                outcome(counts, f"command:{name} {seed}", command, [name, *words])
            return
        name = data.draw(st.sampled_from(list(calls)))
        values = calls[name].odd(data)
        with redirect_stderr(StringIO()):
            outcome(counts, f"{name} {seed}", calls[name].function, **values)
        plt.close("all")

    drawn = hypothesis.given(st.data())(case)
    hypothesis.seed(seed)(SETTINGS(drawn))()
    return counts


SETTINGS = hypothesis.settings(
    max_examples=BATCH,
    database=None,
    deadline=None,
    phases=[hypothesis.Phase.generate],
    suppress_health_check=list(hypothesis.HealthCheck),
)
