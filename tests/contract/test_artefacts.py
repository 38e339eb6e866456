"""Files of ddlib 0.1 must load for ever; every kept record and set does."""

import math
import shutil
import subprocess
from pathlib import Path

import pytest

import ddlib as dd
from ddlib import files
from ddlib.core import checksum
from ddlib.engine.record import record_paths, resolve_record, side_file
from ddlib.experts import load_experts
from ddlib.methods import coreset
from ddlib.studies import scaling

ROOT = Path(__file__).resolve().parents[2]
PINNED = ROOT / "tests" / "data"
NAME = "dm-digits-ipc1-smoke-seed0-545a0ae6"


def test_a_run_of_version_0_1():
    run = dd.Run(PINNED / f"{NAME}.json")
    syn, (row,) = run.synthetic, side_file(PINNED / f"{NAME}.transfer.json").values()
    assert run.complete and run.sealed and files.sealed(PINNED / f"{NAME}.safetensors")
    assert resolve_record(run.record).name == NAME
    assert syn.images.shape == (10, 1, 8, 8) and syn.labels.tolist() == list(range(10))
    assert syn.recipe == dd.protocol("dsa", epochs=1, augment=syn.recipe.augment)
    assert sorted(syn.snapshots) == [0, 3] and row["backbone"].startswith("mlp")
    assert run.accuracy == run.record["accuracy"]["last"]["mean"]
    evaluation = dd.evaluate(syn, dd.load("digits", device="cpu"), networks=1)
    assert math.isfinite(evaluation.mean)


SHORT = {"eval_epochs": 1, "networks": 1, "backbone": "convnet:width=4", "snapshots": 0}


@pytest.fixture
def pinned(tmp_path, monkeypatch) -> Path:
    """A copy of the pinned results and experts, which the environment names."""
    for name in ("results", "experts"):
        shutil.copytree(PINNED / name, tmp_path / name)
        monkeypatch.setenv(f"DDLIB_{name.upper()}", str(tmp_path / name))
    return tmp_path


def test_a_checkpoint_of_version_0_1_goes_on(pinned, monkeypatch):
    (path,) = (pinned / "results").rglob("checkpoints/*.safetensors")
    begun = files.load_tensors(path, "checkpoint", "")[0]
    start, step = [], dd.METHODS["dm"].step

    def watched(method):
        start.append((method.steps, checksum(method.trained)))
        return step(method)

    monkeypatch.setattr(dd.METHODS["dm"], "step", watched)
    run = dd.run("dm", "digits", ipc=1, iterations=4, progress=False, **SHORT)
    assert start[0] == (2, checksum(begun["method.raw"])) and len(start) == 2
    assert run.complete and not path.exists()


def test_experts_extractors_and_studies_of_version_0_1_are_not_made_anew(pinned, monkeypatch):
    segment = {"experts": 1, "expert_total": 2, "max_start": 1, "expert_epochs": 1}
    spec = dd.resolve("mtt", "digits", 1, backbone="convnet:width=4", **segment)
    data = dd.load("digits", device="cpu")
    (weights,) = load_experts(data, spec.run.backbone, spec.config.expert_recipe, 1).weights
    assert checksum(weights) == ("d7cd1496e06342e0e9a846a85753f4282a90594a3dad0578b7df433d591367f4")
    monkeypatch.setattr(coreset, "train_and_count", None)
    config = dd.resolve("herding", "digits", 1, extractor_epochs=1, **SHORT).config
    found = coreset.extractor(data, "convnet:width=4", config, 0)
    assert checksum(found.events, *found.net.state_dict().values()) == (
        "d01c6c9deeac8f64516383ba415ecb9890b0a70affb7c03d4da42677101e0f36"
    )
    monkeypatch.setattr(scaling, "one_step", None)
    resolve, then = (
        scaling.resolve,
        {"dm": {"networks": 3}, "mtt": {"networks": 3, "iterations": 40}},
    )
    monkeypatch.setattr(
        scaling, "resolve", lambda method, *case, **kw: resolve(method, *case, **then[method], **kw)
    )  # as the smoke profile was at version 0.1
    steps = {"syn_steps": [1]}
    table = dd.scaling.updates("digits", "smoke", steps, device="cpu", repeats=1)
    assert list(table.method) == ["unroll", "tesla", "adjoint"]


def test_every_kept_record_and_set_loads():
    paths = record_paths(ROOT / "results")
    assert tracked("*-seed*-????????.json") <= {*paths}
    sets = set()
    for path in paths:
        run = dd.Run(path)
        assert run.record["name"] == path.stem == resolve_record(run.record).name
        if run.complete:  # a set of the paper's size may be left out of the repository
            run.synthetic.validate()
            sets.add(path.with_suffix(".safetensors"))
    assert tracked("*-seed*-????????.safetensors") <= sets


def tracked(pattern: str) -> set[Path]:
    """The files below results/ that git has; none in a copy without git, which cannot tell what was lost."""
    if not (ROOT / ".git").exists():
        return set()
    line = ["git", "ls-files", "-z", f"results/{pattern}"]
    names = subprocess.run(line, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert names
    return {ROOT / name for name in names.split("\0") if name}
