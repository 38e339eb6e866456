"""CIFAR-10 itself, where its folder is at hand, and the committed records at the small profile, which always are."""

import os
import re
from pathlib import Path
from statistics import fmean

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import pytest
import torch

import ddlib as dd
from ddlib.data.dataset import canonical
from ddlib.engine.record import Run, record_paths, resolve_record
from ddlib.report import explore

RESULTS = Path(__file__).parents[2] / "results"
RECORDS = [Run(path) for path in record_paths(RESULTS, "small")]


@pytest.mark.real
@pytest.mark.slow
def test_the_cifar10_folder():
    data = dd.load("folder:cifar10", device="cpu")
    assert data.classes == (
        "airplane",
        "automobile",
        "bird",
        "cat",
        "deer",
        "dog",
        "frog",
        "horse",
        "ship",
        "truck",
    )
    assert data.images["train"].shape == (50_000, 3, 32, 32) and data.images["test"].shape == (
        10_000,
        3,
        32,
        32,
    )
    assert data.images["train"].dtype == torch.uint8
    assert (
        data.class_sizes().tolist() == [5000] * 10
        and data.class_sizes("test").tolist() == [1000] * 10
    )
    means = data.images["train"].float().mean((0, 2, 3)) / 255
    assert means.tolist() == pytest.approx((0.4913, 0.4821, 0.4465), abs=2e-3)
    batch = data.batch("train", data.sample(20, torch.Generator().manual_seed(0)).flatten())
    assert (
        batch.shape == (200, 3, 32, 32)
        and abs(float(batch.mean())) < 0.2
        and 0.8 < float(batch.std()) < 1.5
    )


def found(method: str, ipc: int) -> list[Run]:
    """The committed runs of CIFAR-10 at the protocol of DSA and the papers' ConvNet."""
    runs = [
        run
        for run in RECORDS
        if (run.record["method"], run.record["ipc"]) == (method, ipc)
        and canonical(run.record["dataset"]) == "cifar10"
        and run.record["recipe"]["name"] == "dsa"
        and run.record["backbone"] == "convnet"
    ]
    if not runs:
        pytest.skip(f"no record of {method} at IPC {ipc} in results/small")
    return runs


def test_random_images_are_the_papers():
    runs = found("random", 10)
    assert fmean(run.accuracy for run in runs) == pytest.approx(
        32.2, abs=1.5
    )  # DM's figure of large settings
    assert all(run.record["recipe"]["epochs"] == 1001 for run in runs)


@pytest.mark.parametrize(("ipc", "least"), [(1, 27), (10, 45)])
def test_dm_reaches_its_figure(ipc, least):
    runs = [run for run in found("dm", ipc) if not resolve_record(run.record).overrides]
    assert runs and fmean(run.accuracy for run in runs) >= least
    for run in runs:
        last = run.record["accuracy"]["last"]
        assert len(last["networks"]) >= 3 and last["step"] == run.record["values"]["iterations"]
        assert run.record["recipe"]["epochs"] == 1001


def cifar10(method: str, **values) -> list[Run]:
    """The committed CIFAR-10 runs of a method with these values."""
    return [
        run
        for run in RECORDS
        if run.record["method"] == method
        and canonical(run.record["dataset"]) == "cifar10"
        and all(run.record["values"][key] == value for key, value in values.items())
    ]


def test_frepo_is_worth_twelve_points_over_real_images_under_its_own_protocol():
    ours, real = cifar10("frepo"), cifar10("random", protocol="frepo", zca="frepo")
    assert ours and real
    for run in ours:
        same = [
            r
            for r in real
            if r.record["recipe"] == run.record["recipe"]
            and r.record["ipc"] == run.record["ipc"]
            and r.synthetic.backbone == run.synthetic.backbone
        ]
        assert not same or run.accuracy >= fmean(r.accuracy for r in same) + 12
        assert same or run.record["ipc"] != 1


def test_dream_plus_leads_dream_leads_random_sampling_after_equal_iterations():
    curves = {
        method: {
            e["step"]: e["mean"] for e in cifar10(method, iterations=8)[0].record["evaluations"]
        }
        for method in ("idc", "dream", "dream_plus")
    }
    for step in (4, 8):
        assert curves["idc"][step] < curves["dream"][step] < curves["dream_plus"][step]


def test_first_images_before_any_step():
    """At the papers' width: random (IDC), by features of an untrained network (DREAM), of a trained one (DREAM+)."""
    paper = [Run(path) for path in record_paths(RESULTS, "paper")]
    mix, untrained, warm = (
        fmean(
            run.accuracy
            for run in paper
            if run.record["method"] == method and run.record["values"]["iterations"] == 0
        )
        for method in ("idc", "dream", "dream_plus")
    )
    # The figure at iteration 0.
    assert mix == pytest.approx(49.0, abs=1.5) and warm == pytest.approx(54.5, abs=1.5)
    assert mix + 3 < untrained < warm


def test_the_executed_notebooks_name_records_that_are_kept():
    kept = {path.stem for path in (RESULTS / "small").rglob("*.json")}
    for path in sorted((RESULTS / "notebooks" / "small").glob("*.ipynb")):
        named = set(
            re.findall(
                r"[a-z_]+(?:-[a-z0-9_]+)+-ipc\d+-(?:small-seed\d+-)?[0-9a-f]{8}\b", path.read_text()
            )
        )
        assert named <= kept and (named or path.stem != "claims"), f"{path.name}: run it again"


@pytest.mark.parametrize("run", RECORDS, ids=lambda run: run.path.stem)
def test_a_committed_record_is_current_and_its_set_is_its_own(run):
    record, syn = run.record, run.synthetic
    spec = resolve_record(record)
    assert record["name"] == spec.name == run.path.stem, (
        "made by an older version of the method or the evaluation"
    )
    spec.run, spec.config, spec.recipe  # noqa: B018  each validates
    assert {
        key: syn.spec[key] for key in ("method", "dataset", "ipc", "profile", "seed", "values")
    } == {key: record[key] for key in ("method", "dataset", "ipc", "profile", "seed", "values")}
    assert syn.images.shape[0] == len(syn.classes) * record["ipc"] == len(syn.labels)
    assert syn.images.dtype == torch.float32 and torch.isfinite(syn.images).all()
    classes = syn.labels if syn.labels.ndim == 1 else syn.labels.argmax(1)
    if syn.labels.ndim == 1:
        assert torch.bincount(classes).tolist() == [record["ipc"]] * len(syn.classes)
    last = record["accuracy"]["last"]
    assert last["mean"] == pytest.approx(fmean(last["networks"])) and 0 <= last["mean"] <= 100
    best = record["accuracy"]["best"]
    assert best.get("best", best)["mean"] >= last["mean"]


NETWORK = "convnet:width=8,depth=4"  # a sixteenth of the paper's width; depth, images and classes are the real ones
FEW = {"iterations": 2, "snapshots": 1}
THOUSAND = {
    "random": {},
    "herding": {"extractor_epochs": 1},
    "dm": {**FEW, "init": "noise"},  # with one image a class a real start is the answer
    "tesla": {
        **FEW,
        "experts": 1,
        "expert_total": 1,
        "expert_epochs": 1,
        "max_start": 1,
        "syn_steps": 2,
        "batch_syn": 100,
        "labels": "assigned",
        "teach": True,
    },
    "frepo": {
        **FEW,
        "backbone": f"{NETWORK},norm=bn,grow=2,order=pre,init=lecun",
        "eval_backbone": f"{NETWORK},norm=none,grow=2,init=lecun",
    },
}


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory) -> Path:
    """A data root with imagenet1k/, both of whose splits are the shared sample: one image of each of 1,000 classes."""
    sample = Path(os.environ.get("DDLIB_DATA", "")) / "imagenet1k-sample64" / "train"
    if not os.environ.get("DDLIB_DATA") or not sample.is_dir():
        pytest.skip("needs DDLIB_DATA to name a folder with imagenet1k-sample64/train")
    root = tmp_path_factory.mktemp("imagenet")
    (root / "imagenet1k").mkdir()
    for split in ("train", "val"):
        (root / "imagenet1k" / split).symlink_to(sample.resolve(), target_is_directory=True)
    return root


@pytest.mark.slow
@pytest.mark.parametrize("method", THOUSAND)
def test_a_thousand_classes_end_to_end(method, imagenet, results, monkeypatch):
    """A run of two steps, its evaluation (one network, two epochs), its record and the views of it, at IPC 1 and
    64 px: shapes, soft labels, experts and memory at 1,000 classes, no accuracy."""
    monkeypatch.setenv("DDLIB_DATA", str(imagenet))
    run = dd.run(
        method,
        "imagenet1k",
        ipc=1,
        profile="smoke",
        device="cpu",
        progress=False,
        networks=1,
        eval_epochs=2,
        **{"backbone": NETWORK} | THOUSAND[method],
    )
    record, syn = run.record, run.synthetic
    assert (
        record["values"]["resolution"] == 0
        and syn.images.shape == (1000, 3, 64, 64)
        and len(syn.classes) == 1000
    )
    assert syn.labels.shape == ((1000, 1000) if method in ("tesla", "frepo") else (1000,))
    assert torch.isfinite(syn.images).all() and torch.isfinite(syn.labels).all()
    assert 1000 * 3 * 64 * 64 * 4 < record["peak_bytes"] < 2**33 and record["peak_method"]
    assert 0 <= record["accuracy"]["last"]["mean"] <= 100
    if method in ("random", "herding"):
        assert syn.labels.tolist() == list(range(1000))
    else:
        assert [at["step"] for at in record["history"]] == [1, 2]
        assert all(0 < at["loss"] < float("inf") for at in record["history"])
        moved = (syn.images != syn.snapshots[0]).flatten(1).any(1).float().mean()
        assert moved > (
            0.15 if method == "tesla" else 0.99
        )  # tesla: 200 of 1,000 images a step, perhaps the same
    if method == "frepo":
        assert 0 <= record["accuracy"]["last"]["krr"]["mean"] <= 100
        for view in explore.VIEWS:
            explore.draw(view, run, device="cpu")
            plt.close("all")
    print(
        f"{method}: peak {record['peak_bytes'] / 2**20:.0f} MiB ({record['peak_method']}), "
        f"{sum(record['seconds'].values()):.0f} s"
    )
