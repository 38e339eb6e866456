"""The bits of every method, against checksums that earlier code gave.

`bits.json` has, for each machine that was at hand, the sha256 of images and labels after a few steps, and what the
numbers depend on beside the code: the torch build, the vector instructions and a small computation of torch's own. On a
machine that is not there the comparison says nothing, and is skipped; so it is for a case that was changed since the
machine was last at hand. A change that moves results raises the method's version; one that is meant to move their last
bits says so, and takes its cases out for all machines. `python tests/contract/test_bits.py` puts in what this machine
lacks.

The sums of the first machine are those of commit 3a9b1bf, the last before the methods were rewritten, but for TESLA's,
which moved by rounding in 24b0c67, and for those of `forgetting`, which came later.
"""

import json
import os
import tempfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import ddlib as dd
from ddlib.core import check_only, checksum
from ddlib.methods.coreset import KINDS

BITS = Path(__file__).with_name("bits.json")
RESULTS = Path(__file__).resolve().parents[2] / "results"

EVALUATION = {"eval_epochs": 1, "networks": 1, "snapshots": 0, "evaluations": 1}
TINY = {**EVALUATION, "backbone": "convnet:width=8", "compile": False}
EXPERTS = {
    "subset": 100,
    "experts": 2,
    "expert_total": 3,
    "max_start": 2,
    "expert_epochs": 1,
    "syn_steps": 4,
}
BATCHNORM = {"backbone": "convnet:width=8,norm=bn,grow=2,order=pre,init=lecun"}
TEN = TINY | {"iterations": 10}
FREPO = {"iterations": 5, "pool_size": 2, "max_age": 1}
CORESET = {"extractor_epochs": 1}

# case -> (method, images per class, profile, overrides)
CASES = {
    "random smoke": ("random", 2, "smoke", EVALUATION),
    **{
        f"{name} smoke": (name, 2, "smoke", EVALUATION | CORESET)
        for name in ("herding", "kcenter", "kmeans", "forgetting")
    },
    "random small": ("random", 2, "small", TINY),
    **{
        f"{name} small": (name, 2, "small", TINY | CORESET)
        for name in ("herding", "kcenter", "kmeans", "forgetting")
    },
    "dm smoke": ("dm", 1, "smoke", EVALUATION | {"iterations": 4}),
    "dm small": ("dm", 1, "small", TEN),
    "dm chunks": ("dm", 3, "small", TINY | {"iterations": 4, "init": "noise", "chunk": 50}),
    "dm batchnorm": (
        "dm",
        2,
        "small",
        TINY | {"iterations": 3, "backbone": "convnet:width=8,norm=bn"},
    ),
    "dm gradient": ("dm", 2, "small", TINY | {"iterations": 3, "match": "gradient"}),
    "dm with dream_plus": (
        "dm",
        2,
        "small",
        TINY
        | {"iterations": 4, "match": "both", "sampling": "dream", "init": "kmeans", "interval": 2}
        | {"batch_real": 32},
    ),
    **{
        f"{name} smoke": (name, 2, "smoke", EVALUATION | {"iterations": 2, "inner": 3})
        for name in ("dc", "dsa", "idc", "dream", "dream_plus")
    },
    **{
        f"{name} small": (name, 2, "small", TINY | {"iterations": 2, "inner": 3, "pool": 120})
        for name in ("dc", "dsa", "idc", "dream", "dream_plus")
    },
    **{
        f"{name} ten steps": (name, 2, "small", TEN | {"inner": 3, "pool": 120})
        for name in ("dc", "dsa", "idc", "dream", "dream_plus")
    },
    "idc chunks": (
        "idc",
        2,
        "small",
        TINY | {"iterations": 2, "inner": 2, "chunk": 80, "batch_syn": 3, "net_images": 64},
    ),
    "dc batchnorm": (
        "dc",
        2,
        "small",
        TINY | {"iterations": 2, "inner": 2, "backbone": "convnet:width=8,norm=bn"},
    ),
    **{
        f"{name} smoke": (name, 2, "smoke", EVALUATION | EXPERTS | {"iterations": 3})
        for name in ("mtt", "tesla", "ftd", "datm")
    },
    **{
        f"{name} small": (name, 2, "small", TINY | EXPERTS | {"iterations": 3, "segments": 2})
        for name in ("mtt", "tesla", "ftd", "datm")
    },
    **{
        f"{name} ten steps": (name, 2, "small", TEN | EXPERTS | {"segments": 2})
        for name in ("mtt", "tesla", "ftd", "datm")
    },
    "tesla assigned": (
        "tesla",
        2,
        "small",
        TINY | EXPERTS | {"iterations": 3, "labels": "assigned", "batch_syn": 7, "init": "noise"},
    ),
    "mtt with dream": (
        "mtt",
        2,
        "small",
        TINY
        | EXPERTS
        | {"iterations": 2, "init": "kmeans", "init_epoch": 1, "gradient": "window=2"},
    ),
    "frepo smoke": ("frepo", 2, "smoke", EVALUATION | FREPO),
    "frepo small": ("frepo", 2, "small", TINY | BATCHNORM | FREPO | {"zca": ""}),
    "frepo ten steps": ("frepo", 2, "small", FREPO | TEN | BATCHNORM | {"zca": ""}),
    "frepo flips": (
        "frepo",
        2,
        "small",
        TINY | BATCHNORM | FREPO | {"flip": "on", "batch_net": 7, "learn_label": False},
    ),
}


def bits(case: str, folder: Path) -> str:
    """sha256 of the images and labels of a case, on one thread."""
    method, ipc, profile, overrides = CASES[case]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        run = dd.run(
            method,
            "digits",
            ipc=ipc,
            profile=profile,
            seed=3,
            device="cpu",
            results=folder,
            progress=False,
            teach=True,
            **overrides,
        )
    finally:
        torch.set_num_threads(threads)
    return checksum(run.synthetic.images, run.synthetic.labels)


def canary() -> str:
    """sha256 of a computation of torch's alone: convolution, norm, pooling, and their second derivatives."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(64, 1, 8, 8, generator=rng, requires_grad=True)
    w = torch.randn(32, 1, 3, 3, generator=rng, requires_grad=True)
    v = torch.randn(10, 32 * 16, generator=rng, requires_grad=True)
    features = F.avg_pool2d(F.relu(F.group_norm(F.conv2d(x, w, padding=1), 32)), 2).flatten(1)
    loss = F.cross_entropy(features @ v.T, torch.arange(64) % 10)
    gradients = torch.autograd.grad(loss, (w, v), create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in gradients), (x, w, v))
    torch.set_num_threads(threads)
    return checksum(loss, *gradients, *second)


def machine() -> dict[str, str]:
    """What the bits depend on beside the code."""
    return {
        "torch": torch.__version__,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "canary": canary(),
    }


def kept_here(machines: list[dict]) -> dict[str, str]:
    """The checksums by case of the kind of machine that this is; none where it is not among them."""
    here = machine()
    return next((entry["bits"] for entry in machines if entry["machine"] == here), {})


@pytest.mark.parametrize("case", CASES)
def test_bits_are_those_of_before(case, tmp_path, monkeypatch):
    kept = kept_here(json.loads(BITS.read_text()))
    if case not in kept:
        pytest.skip("no checksum of this case was taken on this kind of machine")
    monkeypatch.setenv("DDLIB_EXPERTS", str(tmp_path / "experts"))
    assert bits(case, tmp_path) == kept[case]


def test_every_method_has_its_bits():
    machines = json.loads(BITS.read_text())
    assert all(entry["bits"].keys() <= CASES.keys() for entry in machines)
    assert CASES.keys() in [entry["bits"].keys() for entry in machines]
    assert set(dd.METHODS) == {method for method, *_ in CASES.values()}
    ten = {method for method, *_, values in CASES.values() if values.get("iterations") == 10}
    assert set(dd.METHODS) - ten == set(KINDS)  # which take no steps


def test_every_kept_record_is_found_again():
    """A record's name is the hash of its settings: a run asked for again must come to the same name."""
    from ddlib.engine.record import resolve_record

    records = [json.loads(path.read_text()) for path in RESULTS.rglob("*seed*.json")]
    records = [record for record in records if "values" in record and "name" in record]
    assert len(records) >= 40
    assert [r["name"] for r in records if resolve_record(r).name != r["name"]] == []


def test_every_kept_record_is_of_the_method_that_it_names():
    """Settings that are a method's own (`only`) have no other values in a record that goes by its name."""
    from ddlib.engine.record import resolve_record

    records = [json.loads(path.read_text()) for path in RESULTS.rglob("*seed*.json")]
    specs = [resolve_record(r) for r in records if "values" in r and r["method"] in dd.METHODS]
    for spec in specs:
        check_only(spec.name, dd.METHODS.registration(spec.method).only, spec.config)
    assert sum(bool(dd.METHODS.registration(spec.method).only) for spec in specs) >= 20


if __name__ == "__main__":
    machines = json.loads(BITS.read_text())
    kept = kept_here(machines)
    if all(entry["machine"] != machine() for entry in machines):
        machines.append({"machine": machine(), "bits": kept})
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["DDLIB_EXPERTS"] = f"{scratch}/experts"
        kept |= {case: bits(case, Path(scratch)) for case in CASES if case not in kept}
    BITS.write_text(json.dumps(machines, indent=1) + "\n")
