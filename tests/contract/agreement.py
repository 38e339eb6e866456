"""How far the numbers of a method move with what must not matter: threads, compiled code, a GPU.

Each method makes a few steps on the digits from the same seed, and the sets are compared: the largest difference of a
pixel or a label, in standard deviations of the data. `python -m tests.contract.agreement` writes the record of which
docs/reliability.md has the table; `BOUNDS` is what the tests hold every method to. The differences are those of sums in
another order; each step hands them on, so over thousands of steps two runs part, as two seeds do.
"""

import platform
import tempfile
from pathlib import Path

import pytest
import torch

import ddlib as dd
from ddlib.config import dataset_of
from ddlib.files import SOURCE, read_json, write_json

RECORD = SOURCE / "results" / "campaigns" / "agreement.json"
BOUNDS = {"threads": 1e-4, "compiled": 1e-4, "cuda": 2e-2}
# It trains its network on the real images for an epoch before the first step, which hands differences on.
LOOSE = {"dream_plus": 5e-2}
# No sum of theirs is split between threads; those that look at features share the extractor of the first call.
EXACT = ("random", "herding", "kcenter", "kmeans", "forgetting", "dm")
# One of each kind: dc, dsa, dream and dream_plus compile what idc does; tesla, ftd and datm what mtt does.
COMPILES = ("dm", "idc", "mtt", "frepo")

_NET = {"backbone": "convnet:width=8", "subset": 50}
_SHALLOW = _NET | {"backbone": "convnet:width=8,depth=1"}  # compiles in half the time
_EXTRACTOR = {"extractor_epochs": 1}
_STEPS = {"iterations": 2, "inner": 1}
_EXPERTS = {"experts": 1, "expert_total": 3, "max_start": 2, "expert_epochs": 1}
_TRAJECTORY = {"iterations": 2, "syn_steps": 3} | _EXPERTS
SETTINGS = {
    "random": {},
    **dict.fromkeys(("herding", "kcenter", "kmeans", "forgetting"), _NET | _EXTRACTOR),
    **dict.fromkeys(("dc", "dsa", "idc", "dream", "dream_plus"), _SHALLOW | _STEPS),
    "dm": _NET | {"iterations": 3},
    **dict.fromkeys(("mtt", "tesla", "ftd", "datm"), _SHALLOW | _TRAJECTORY),
    "frepo": _SHALLOW | {"iterations": 3, "pool_size": 2, "max_age": 1},
}


def made(
    method: str, folder: Path, threads: int = 1, device: str = "cpu", **changes
) -> list[torch.Tensor]:
    """Images and labels after the steps of a short run; experts are those of the first call."""
    spec = dd.resolve(method, "digits", 2, **SETTINGS[method] | changes)
    data, before = dataset_of(spec, torch.device(device)), torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DDLIB_EXPERTS", str(folder))
        torch.set_num_threads(threads)
        try:
            for asset in dd.METHODS[method].needs(spec.config):
                asset.make(data, spec.run.backbone, progress=False)
            run = dd.METHODS[method](spec.config, data, spec.ipc, spec.run.backbone, spec.seed)
            for _ in range(spec.config.iterations):
                run.step()
            result = run.result()
        finally:
            torch.set_num_threads(before)
    return [result.images, result.labels.float()]


def difference(method: str, folder: Path, what: str) -> float:
    """The largest difference between the plain run and one that differs in `what`, a key of `BOUNDS`."""
    changes = {"threads": {"threads": 2}, "compiled": {"compile": True}, "cuda": {"device": "cuda"}}
    pair = zip(made(method, folder), made(method, folder, **changes[what]), strict=True)
    return max(
        float((one.detach().cpu() - other.detach().cpu()).abs().max()) for one, other in pair
    )


def bound(method: str, what: str) -> float:
    """What `difference` may come to."""
    if what == "threads" and method in EXACT:
        return 0.0
    return max(BOUNDS[what], LOOSE.get(method, 0.0))


def table(record: Path = RECORD) -> str:
    """Markdown: a row per method, a column per kind of difference."""
    kept = read_json(record, "record of the agreement", "run python -m tests.contract.agreement")
    lines = ["| method | 1 and 2 threads | compiled and plain |", "| --- | --- | --- |"]
    for method, row in kept["rows"].items():
        lines.append(f"| `{method}` | {_shown(row, 'threads')} | {_shown(row, 'compiled')} |")
    bounds = [f"{what} {value:.0e}" for what, value in BOUNDS.items()]
    bounds += [f"`{method}` {value:.0e}" for method, value in LOOSE.items()]
    lines += ["", f"Bounds that the tests hold every method to: {', '.join(bounds)}."]
    return "\n".join(lines)


def _shown(row: dict[str, float], what: str) -> str:
    if what not in row:
        return ""
    return f"{row[what]:.0e}" if row[what] else "the same bits"


def main() -> None:
    rows = {}
    for method in SETTINGS:
        kinds = ["threads", *(["compiled"] if method in COMPILES else [])]
        with tempfile.TemporaryDirectory() as folder:
            rows[method] = {what: difference(method, Path(folder), what) for what in kinds}
        print(method, rows[method], flush=True)
    cpu = f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}"
    write_json(RECORD, {"cpu": f"{cpu}, {platform.machine()}", "rows": rows})


if __name__ == "__main__":
    main()
