"""ddlib: a reproducible companion to the papers on dataset distillation.

import ddlib as dd
data = dd.load("digits")
run = dd.run("dm", "digits", ipc=1, profile="smoke", seed=0)
dd.plots.images(run.synthetic)
"""

from importlib import import_module

from .config import PROFILES, Spec, resolve
from .core import DDError, numbers
from .data.dataset import Dataset, from_arrays, load
from .distilled import Synthetic
from .engine.record import Run
from .engine.run import prepare, run, sweep
from .methods import METHODS
from .train.evaluate import Evaluation, evaluate, protocol

__version__ = "0.1.0"
__all__ = [
    "METHODS",
    "PROFILES",
    "DDError",
    "Dataset",
    "Evaluation",
    "Run",
    "Spec",
    "Synthetic",
    "evaluate",
    "from_arrays",
    "load",
    "numbers",
    "plots",
    "prepare",
    "protocol",
    "resolve",
    "run",
    "sweep",
    "tables",
]
LAZY = {
    "claims": "report.claims",
    "explore": "report.explore",
    "fairness": "studies.fairness",
    "plots": "report.plots",
    "tables": "report.tables",
}


def __dir__() -> list[str]:
    return sorted({*globals(), *LAZY})


def __getattr__(name: str):
    """`dd.tables`, `dd.plots` and their like load pandas and matplotlib only when they are asked for."""
    if name in LAZY:
        return import_module(f".{LAZY[name]}", __name__)
    raise AttributeError(f"module 'ddlib' has no attribute {name!r}")
