"""A stored run under other conditions, and the checkpoint that a validation split chooses."""

from types import SimpleNamespace

import pytest
import torch

import ddlib as dd
from ddlib.core import DDError
from ddlib.engine import record

SHORT = {
    "iterations": 4,
    "eval_epochs": 2,
    "networks": 2,
    "backbone": "convnet:width=4",
    "progress": False,
}


def test_transfer_keeps_each_condition_apart(results, monkeypatch):
    run = dd.run("random", "digits", ipc=1, **{k: v for k, v in SHORT.items() if k != "iterations"})
    own = run.transfer(networks=2)
    assert (
        own["networks"] == run.record["accuracy"]["last"]["networks"]
        and own["backbone"] == "convnet:width=4"
    )
    other = run.transfer("mlp", networks=1)
    hard = run.transfer(networks=2, protocol="dsa", epochs=3, hard=True)
    assert (hard["protocol"], hard["epochs"], hard["hard"]) == ("dsa", 3, True)
    assert run.transfer(networks=2, augment="none")["augment"] == "none"
    mse = run.transfer(networks=1, protocol="frepo", epochs=3)
    assert set(mse["krr"]) == {"mean", "std", "networks"}
    monkeypatch.setattr(
        "ddlib.engine.record.dataset_of", None
    )  # a second call must not need the data
    assert (
        run.transfer("mlp", networks=1) == other
        and run.transfer(networks=2, protocol="dsa", epochs=3, hard=True) == hard
    )


def test_other_protocols_use_the_datasets_own_augmentation(results, monkeypatch):
    run = dd.run("random", "digits", ipc=1, **{k: v for k, v in SHORT.items() if k != "iterations"})
    seen = []
    monkeypatch.setattr(
        "ddlib.engine.record.evaluate", lambda *a, recipe, **k: seen.append(recipe) or 1 / 0
    )
    for options in ({"protocol": "dsa"}, {"protocol": "idc"}):
        with pytest.raises(ZeroDivisionError):
            run.transfer(networks=1, **options)
    assert (
        "flip" not in seen[0].augment and seen[0].epochs == 151
    )  # digits are not mirrored; the smoke profile's E
    assert seen[1].augment == "color+crop_scale_rotate" and seen[1].cutmix == 0.5


@pytest.mark.parametrize("name", ["dc", "dsa", "idc", "frepo"])
def test_a_transfer_is_evaluated_as_a_run_under_that_protocol(name, monkeypatch):
    spec, syn = dd.resolve("dc", "mnist", 1, "paper"), SimpleNamespace(recipe=None)
    wanted = dd.resolve("random", "mnist", 1, "paper", protocol=name).recipe
    assert record._recipe(syn, spec, {"protocol": name}) == wanted


def test_no_epochs_are_refused(results):
    with pytest.raises(DDError, match="epochs must be an integer of at least 1, not 0"):
        dd.run("dm", "digits", ipc=1, **SHORT).transfer(networks=1, epochs=0)


def test_the_validation_split_chooses_a_checkpoint_and_distillation_never_sees_it(results):
    run = dd.run("dm", "digits", ipc=1, minival=0.2, evaluations=3, **SHORT)
    scores = run.record["evaluations"]
    assert len(scores) == 3 and all(len(e["val"]["networks"]) == 2 for e in scores)
    chosen = run.record["accuracy"]["selected"]
    assert chosen["val"]["mean"] == max(e["val"]["mean"] for e in scores) and chosen in scores
    kept, whole = (
        dd.engine.record.dataset_of(
            dd.resolve("dm", "digits", 1, minival=0.2), torch.device("cpu")
        ),
        dd.load("digits"),
    )
    assert len(kept.labels["train"]) + len(kept.labels["val"]) == len(whole.labels["train"])
    assert run.record["dataset_checksum"] == kept.checksum != whole.checksum
    assert "selected" not in dd.run("dm", "digits", ipc=1, **SHORT).record["accuracy"]


def test_a_share_that_leaves_nothing(results):
    with pytest.raises(DDError, match="below 1, not 1"):
        dd.run("dm", "digits", ipc=1, minival=1.0, **SHORT)
