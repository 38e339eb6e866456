"""Files of ddlib 0.1 must load for ever; every kept record and set does."""

import math
from pathlib import Path

import ddlib as dd
from ddlib import files
from ddlib.engine.record import record_paths, resolve_record, side_file

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


def test_every_kept_record_and_set_loads():
    paths = record_paths(ROOT / "results")
    assert len(paths) >= 70
    sets = 0
    for path in paths:
        run = dd.Run(path)
        assert run.record["name"] == path.stem == resolve_record(run.record).name
        if run.complete:  # a set of the paper's size may be left out of the repository
            run.synthetic.validate()
            sets += 1
    assert sets >= 60
