"""The scorecard: scores against cases by hand, the nested bootstrap, and baselines that differ in images alone."""

import json
import math
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

import ddlib as dd
from ddlib.core import DDError
from ddlib.experts import ExpertRecipe, load_experts, train_experts
from ddlib.report import scorecard
from ddlib.studies import fairness
from ddlib.studies.fairness import HARD, PLAIN, TAUGHT

TINY = {"eval_epochs": 2, "networks": 2, "backbone": "convnet:width=4", "profile": "smoke"}
EXPERTS = {"experts": 2, "expert_total": 3, "max_start": 1, "syn_steps": 2}
RUNS = {
    "dm": {},
    "idc": {"inner": 1, "net_images": 20},
    "tesla": {**EXPERTS, "labels": "assigned", "lr_lr": 1.0},
    "frepo": {"eval_backbone": "convnet:width=4,norm=none"},
}


def made(method, **more):
    return dd.run(
        method,
        "digits",
        ipc=1,
        teach=True,
        progress=False,
        **TINY,
        **{"iterations": 1} | RUNS[method] | more,
    )


# --- scores


def test_scores_by_hand():
    assert fairness.hlr(0.9, 0.6) == pytest.approx(0.3) and fairness.ior(0.7, 0.5) == pytest.approx(
        0.2
    )
    # alpha = 0.5 * 0.2 - 0.5 * 0.3 = -0.05; (0.951229 - 0.367879) / (2.718282 - 0.367879) = 0.248191
    assert fairness.lrs(0.9, 0.6, 0.7, 0.5) == pytest.approx(0.248191, abs=1e-6)
    # beta = 0.5 * 0.2 + 0.5 * 0.1 = 0.15; (1.161834 - 0.367879) / 2.350402 = 0.337795
    assert fairness.ars(0.7, 0.5, 0.6, 0.5) == pytest.approx(0.337795, abs=1e-6)
    # w = 1 asks for IOR alone: (1.221403 - 0.367879) / 2.350402 = 0.363140; gamma = 0 for the plain half alone
    assert fairness.lrs(0.9, 0.6, 0.7, 0.5, w=1) == pytest.approx(0.363140, abs=1e-6)
    assert fairness.ars(0.1, 0.9, 0.7, 0.5, gamma=0) == pytest.approx(0.363140, abs=1e-6)
    assert (fairness.lrs(0, 1, 1, 0), fairness.lrs(1, 0, 0, 1)) == (
        pytest.approx(1),
        pytest.approx(0),
    )
    assert fairness.lrs(
        np.array([0.9, 0]), np.array([0.6, 1]), np.array([0.7, 1]), np.array([0.5, 0])
    ) == pytest.approx([0.248191, 1], abs=1e-6)


@pytest.mark.parametrize(
    "call",
    [
        lambda: fairness.hlr(90.0, 0.6),
        lambda: fairness.ior(0.5, -0.1),
        lambda: fairness.lrs(0.9, 0.6, 0.7, 0.5, w=2),
        lambda: fairness.ars(0.7, 0.5, 60, 0.5),
        lambda: fairness.ior(np.array([0.1, 10]), 0.1),
    ],
)
def test_per_cent_and_other_weights_are_refused(call):
    with pytest.raises(DDError, match="fraction between 0 and 1"):
        call()


# --- the bootstrap


def test_bootstrap_by_hand():
    found = fairness.nested_bootstrap([[1, 3], [5, 9]])
    assert found["mean"] == 4.5 and found["over seeds"] == 2.5 and found["over networks"] == 1.5
    assert found == fairness.nested_bootstrap([[1, 3], [5, 9]])
    assert found != fairness.nested_bootstrap([[1, 3], [5, 9]], seed=1, resamples=10)
    ragged = fairness.nested_bootstrap([[0, 0, 0], [1]])
    assert ragged["mean"] == 0.5 and math.isnan(ragged["over networks"])


def test_bootstrap_resamples_seeds_and_then_networks():
    seeds = fairness.nested_bootstrap(
        [[0.0] * 10, [1.0] * 10]
    )  # both draws of a seed: 1/4, so the whole range
    assert (seeds["low"], seeds["high"], seeds["over networks"]) == (0, 1, 0)
    flat = fairness.nested_bootstrap(
        [[0.0] * 10 + [1.0] * 10]
    )  # the same scores from one seed: 0.5 ± 1.96 * 0.112
    assert (flat["low"], flat["high"]) == pytest.approx((0.28, 0.72), abs=0.051) and math.isnan(
        flat["over seeds"]
    )
    # Equal seeds of 0 and 1: the mean of four networks, of which 1/16 are all 0, and the seeds say nothing.
    networks = fairness.nested_bootstrap([[0, 1], [0, 1]])
    assert (networks["low"], networks["high"], networks["over seeds"]) == (0, 1, 0)
    # A seed that is drawn twice draws its networks twice: 0.5 - 1.96 * 0.125 = 0.25, where shared draws give 0.16.
    assert fairness.nested_bootstrap([[0, 1]] * 8)["low"] == pytest.approx(0.25, abs=0.04)


@pytest.mark.parametrize(("scores", "resamples"), [([], 9), ([[1], []], 9), ([[1]], 0)])
def test_bootstrap_of_nothing(scores, resamples):
    with pytest.raises(DDError, match="at least one"):
        fairness.nested_bootstrap(scores, resamples)


# --- what a set takes


def test_bytes_by_hand():
    data = dd.load("digits")
    images, hard = data.images["train"][:10].float().view(10, 1, 8, 8), torch.arange(10)
    values = {"lr_lr": 1e-6, "eval_lr": 0.0, "zca": ""}
    syn = dd.Synthetic.of(data, images, hard, dd.protocol("dm"), "mlp")
    assert fairness.storage(syn) == {
        "images": 2560,
        "labels": 80,
        "step size": 0,
        "whitening": 0,
        "decoder": 0,
        "teacher": 0,
        "total": 2640,
        "images as uint8": 640,
    }
    soft = fairness.storage(replace(syn, labels=torch.zeros(10, 10), spec={"values": values}))
    assert (soft["labels"], soft["step size"], soft["total"]) == (400, 4, 2964)
    assert (
        fairness.storage(replace(syn, spec={"values": values | {"lr_lr": 0.0}}))["step size"] == 0
    )
    assert fairness.storage(replace(syn, zca="x"))["whitening"] == 4 * (64 * 64 + 64)
    halves = replace(syn, zca="x", spec={"values": {"zca": "frepo_checkerboard"}})
    assert fairness.storage(halves)["whitening"] == 4 * (16 * 16 + 16)


def test_experts_are_timed_and_counted(results):
    data, recipe, net = dd.load("digits"), ExpertRecipe(epochs=1), "convnet:width=4,depth=1"
    paths = train_experts(data, net, recipe, 2, progress=False)
    seconds = [json.loads(path.with_suffix(".json").read_text())["seconds"] for path in paths]
    assert min(seconds) > 0 and load_experts(data, net, recipe, 2).seconds == pytest.approx(
        sum(seconds)
    )
    assert load_experts(data, net, recipe, 1).seconds == pytest.approx(seconds[0])
    paths[1].with_suffix(".json").unlink()
    assert math.isnan(load_experts(data, net, recipe, 2).seconds)


def test_cost_counts_experts():
    def cost(method, **extra):
        record = asdict(dd.resolve(method, "digits", 1)) | {
            "seconds": {"distill": 2.0, "evaluate": 9.0},
            "extra": extra,
        }
        return fairness.cost(SimpleNamespace(record=record))

    assert cost("dm") == {"distillation": 2, "experts": 0, "total": 2}
    assert cost("tesla", **{"expert seconds": 5.0})["total"] == 7
    assert math.isnan(cost("tesla")["total"]) and cost("tesla")["distillation"] == 2


# --- the conditions


@pytest.mark.parametrize("method", RUNS)
def test_baselines_differ_in_the_images_alone(results, method):
    run = made(method)
    random = fairness.baseline("random", run)
    assert random.synthetic.recipe == replace(run.synthetic.recipe, lr=random.synthetic.recipe.lr)
    assert random.synthetic.recipe.lr == pytest.approx(run.synthetic.recipe.lr, rel=1e-5)
    assert random.synthetic.backbone == run.synthetic.backbone
    assert len(random.record["accuracy"]["last"]["networks"]) == 2


def test_without_training_only_what_is_kept(results):
    run = made("dm")
    assert fairness.find("dm", "digits", ipc=1, profile="smoke", train=False) is None
    found = fairness.conditions(run, train=False)
    assert list(found.condition) == ["native", "best checkpoint", HARD]
    assert list(fairness.scorecard(found).quantity) == ["native", "best checkpoint", HARD]
    fairness.baseline("random", run)
    both = pd.concat(
        [fairness.conditions(run, train=False), found.assign(seed=1)]
    )  # of which one has random images
    card = fairness.scorecard(both).set_index("quantity")
    assert list(card.index) == ["native", "best checkpoint", HARD, "random", "IOR"]
    assert (card.seeds["native"], card.seeds["random"], card.seeds["IOR"]) == (2, 1, 1)


def test_the_methods_stand_in_the_order_of_all_figures():
    def find(method, dataset, *, seed, **_):
        return (method, seed)

    named = ["mine", "frepo", "dream_plus", "dm"]
    found = scorecard.runs(find, named, "digits", [1, 0], "smoke")
    order = ["dm", "frepo", "dream_plus", "mine"]
    assert list(found) == [(method, seed) for method in order for seed in (1, 0)]


def test_the_scorecard_of_soft_labels(results, monkeypatch):
    runs = [made("tesla", seed=seed, minival=0.2, evaluations=2, iterations=2) for seed in (0, 1)]
    options = {"epochs": 1, "unseen": ["mlp"]}
    rows = pd.concat([fairness.conditions(run, **options) for run in runs])
    names = {
        "native",
        "best checkpoint",
        "validation-selected",
        HARD,
        "random",
        "herding",
        "whole",
        TAUGHT,
        TAUGHT + PLAIN,
        "native" + PLAIN,
        "random" + PLAIN,
        "native on mlp",
        "random on mlp",
    }
    assert (
        set(rows.condition) == names
        and set(rows.labels) == {"soft"}
        and len(rows) == 2 * len(names)
    )
    for module in ("engine.record", "engine.run", "studies.fairness"):
        monkeypatch.setattr(f"ddlib.{module}.evaluate", None)  # a second call must not train
    assert pd.concat([fairness.conditions(run, **options) for run in runs]).equals(rows)

    card = fairness.scorecard(rows).set_index("quantity")
    mean = {
        name: part.networks.map(np.mean).mean() / 100 for name, part in rows.groupby("condition")
    }
    assert (
        card["mean"][HARD] == pytest.approx(100 * mean[HARD])
        and card.seeds["whole"] == card.networks["whole"] == 2
    )
    assert card["mean"]["HLR"] == pytest.approx(mean["whole"] - mean[HARD])
    assert card["mean"]["IOR"] == pytest.approx(
        mean["native"] - mean[TAUGHT]
    )  # soft labels against a teacher's
    alpha = 0.5 * card["mean"]["IOR"] - 0.5 * card["mean"]["HLR"]
    assert card["mean"]["LRS"] == pytest.approx(
        fairness.scaled(alpha), abs=0.01
    )  # a mean of s(x) over networks
    beta = 0.5 * card["mean"]["IOR"] + 0.5 * (mean["native" + PLAIN] - mean[TAUGHT + PLAIN])
    assert card["mean"]["ARS"] == pytest.approx(fairness.scaled(beta), abs=0.01)
    assert (card.low["LRS"], card.high["LRS"]) != (card["mean"]["LRS"],) * 2
    first = rows[rows.seed == 0].assign(labels="hard")
    assert fairness.scorecard(first).set_index("quantity")["mean"]["IOR"] == pytest.approx(
        np.mean(
            [
                a - b
                for a, b in zip(
                    *(first.set_index("condition").networks[n] for n in ("native", "random")),
                    strict=True,
                )
            ]
        )
        / 100
    )


@pytest.mark.parametrize("method", ["dm", "frepo"])
def test_a_teacher_answers_in_the_labels_that_the_loss_takes(results, monkeypatch, method):
    seen, random = [], fairness.baseline("random", made(method))
    monkeypatch.setattr(
        fairness,
        "evaluate",
        lambda syn, *a, **k: (
            seen.append((syn, k)) or SimpleNamespace(accuracies=(0.0,), seconds=0.0)
        ),
    )
    fairness.teacher(random, epochs=1)
    (syn, own), (_, plain) = seen
    assert torch.equal(syn.images, random.synthetic.images) and syn.labels.shape == (10, 10)
    assert torch.allclose(syn.labels.sum(1), torch.ones(10), atol=1e-5) == (
        method == "dm"
    )  # else raw outputs
    assert own["recipe"] == random.synthetic.recipe and plain["recipe"].augment == "none"


def test_no_augmentation_is_no_cutmix_either(results, monkeypatch):
    run, seen = made("idc"), []
    monkeypatch.setattr(
        "ddlib.engine.record.evaluate", lambda *a, recipe, **k: seen.append(recipe) or 1 / 0
    )
    with pytest.raises(ZeroDivisionError):
        run.transfer(augment="none")
    assert run.synthetic.recipe.cutmix > 0 and (seen[0].augment, seen[0].cutmix) == ("none", 0)


def test_the_table_of_bytes_leaves_out_parts_that_no_set_has():
    runs = {("dm", 0): 30, ("frepo", 0): 40}
    found = {
        key: SimpleNamespace(synthetic=size, record={"device": "a CPU"})
        for key, size in runs.items()
    }
    storage = lambda size: {"images": size, "labels": size - 30, "decoder": 0}
    sizes, _ = scorecard.bytes_and_seconds(found, storage, lambda run: {"distill": 1.0}, "digits")
    assert list(sizes.data) == ["method", "images", "labels"]
    assert sizes.data.labels.tolist() == [0, 10]
