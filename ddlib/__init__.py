"""ddlib: a reproducible companion to the papers on dataset distillation.

import ddlib as dd
data = dd.load("digits")
run = dd.run("dm", "digits", ipc=1, profile="smoke", seed=0)
dd.plots.images(run.synthetic)
"""

from importlib import import_module

__version__ = "0.1.0"

# Each name is imported when it is first used: `ddlib --help` is there at once, without torch.
MODULES = {
    "claims": "report.claims",
    "continual": "studies.continual",
    "cross": "studies.cross",
    "explore": "report.explore",
    "fairness": "studies.fairness",
    "lesson": "report.lesson",
    "membership": "studies.membership",
    "panel": "report.panel",
    "plots": "report.plots",
    "sampling": "studies.sampling",
    "scaling": "studies.scaling",
    "scorecard": "report.scorecard",
    "search": "studies.architecture_search",
    "tables": "report.tables",
    "trajectories": "studies.trajectories",
}
NAMES = {
    "METHODS": "methods",
    "PROFILES": "config",
    "DDError": "core",
    "Dataset": "data.dataset",
    "Evaluation": "train.evaluate",
    "Run": "engine.record",
    "Spec": "config",
    "Synthetic": "distilled",
    "card": "report.card",
    "evaluate": "train.evaluate",
    "from_arrays": "data.dataset",
    "import_set": "exchange.inward",
    "load": "data.dataset",
    "numbers": "core",
    "prepare": "engine.run",
    "protocol": "recipe",
    "resolve": "config",
    "run": "engine.run",
    "run_together": "engine.run",
    "save_images": "exchange.outward",
    "save_pt": "exchange.outward",
    "sweep": "report.tables",
    "tensor_dataset": "exchange.outward",
}
__all__ = [*NAMES, "plots", "tables"]  # noqa: PLE0604


def __dir__() -> list[str]:
    return sorted({*globals(), *MODULES, *NAMES})


def __getattr__(name: str):
    if name in MODULES:
        return import_module(f".{MODULES[name]}", __name__)
    if name in NAMES:
        value = globals()[name] = getattr(import_module(f".{NAMES[name]}", __name__), name)
        return value
    raise AttributeError(f"module 'ddlib' has no attribute {name!r}")
