"""Membership inference: the AUC by hand, attackers that see one half only, and the distilled set really attacked."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import roc_auc_score

import ddlib as dd
from ddlib.core import DDError
from ddlib.engine.record import Run
from ddlib.studies import membership
from ddlib.studies.membership import ATTACKS, attack, auc, chunk, pooled, study

FAST = {
    "ipc": 1,
    "per_class": 10,
    "backbone": "convnet:width=16,norm=none",
    "augment": "none",
    "progress": False,
}


def test_auc_and_its_error_by_all_pairs():
    rng = np.random.default_rng(0)
    scores, member = rng.integers(0, 8, 60).astype(float), np.arange(60) < 25  # many ties
    pairs = (np.sign(scores[member][:, None] - scores[~member]) + 1) / 2
    value, *parts = auc(scores, member)
    assert value == pytest.approx(pairs.mean()) == pytest.approx(roc_auc_score(member, scores))
    assert parts == pytest.approx(
        [pairs.mean(1).var(ddof=1) / 25, pairs.mean(0).var(ddof=1) / 35]
    )  # DeLong's


def test_attackers_find_a_leak_in_any_direction_and_learn_nothing_of_the_half_that_scores_them():
    rng, member = np.random.default_rng(1), np.arange(200) < 100
    logits, losses = rng.normal(size=(200, 10)), rng.normal(size=200)
    noise = {row["attack"]: row for row in attack(logits, losses, member)}
    assert tuple(noise) == ATTACKS and all(row["images"] == 100 for row in noise.values())
    assert all(abs(row["auc"] - 0.5) < 0.18 for row in noise.values())  # a seen half would give 1
    for sign in (1, -1):
        leak = attack(logits + 4 * sign * member[:, None], losses - 5 * sign * member, member)
        assert min(row["auc"] for row in leak) > 0.95
    with pytest.raises(DDError, match="at least 4 members and 4 others, not 3 and 197"):
        attack(logits, losses, np.arange(200) < 3)


def test_chunks_are_disjoint_and_balanced():
    data = dd.load("digits", device="cpu")
    chunks = [chunk(data, k, 20) for k in range(5)]
    images = [set(map(bytes, c.images["train"].flatten(1).numpy())) for c in chunks]
    assert len(set.union(*images)) == sum(map(len, images))
    for c in chunks:
        assert c.class_sizes("train").tolist() == c.class_sizes("test").tolist() == [20] * 10
        assert torch.equal(c.mean, data.mean)
    assert (
        len({c.checksum for c in chunks} | {data.checksum})
        == len({c.name for c in chunks}) + 1
        == 6
    )
    with pytest.raises(DDError, match="cannot sample 140 images of each class"):
        chunk(data, 6, 20)


def test_a_network_that_overfits_its_members_gives_them_away(results):
    rows = study("members", "digits", steps=(20, 150), lr=3e-3, **FAST)
    found = pooled(rows).set_index(["steps", "attack"])
    assert found.loc[(150, "threshold"), "low"] > 0.6 and found.loc[(150, "logistic"), "low"] > 0.5
    assert found.loc[(150, "threshold"), "auc"] > found.loc[(20, "threshold"), "auc"]
    assert found.loc[(150, "threshold"), "accuracy"] > 85


def test_the_distilled_set_is_attacked_and_its_start_is_an_arm_of_its_own(results, monkeypatch):
    trained, true_train = {}, membership.train

    def spy(net, images, labels, recipe, *args, **options):
        trained[arm] = images, labels, recipe
        return true_train(net, images, labels, recipe, *args, **options)

    monkeypatch.setattr(membership, "train", spy)
    for arm in ("dm", "dm start"):
        study(arm, "digits", steps=(5, 8), **FAST)
    (path,) = (results / "smoke" / "parts" / "smoke" / "dm").glob("*.json")
    syn = Run(path).synthetic
    assert torch.equal(trained["dm"][0], syn.images) and torch.equal(
        trained["dm start"][0], syn.snapshots[0]
    )
    assert not torch.equal(syn.images, syn.snapshots[0])
    victim = chunk(dd.load("digits", device="cpu"), 0, 10)
    members = victim.batch("train", slice(None)).flatten(1)
    start, labels, recipe = trained["dm start"]
    nearest = torch.cdist(start.flatten(1), members).min(1)
    assert (nearest.values < 0.02).all() and torch.equal(
        victim.labels["train"][nearest.indices], labels
    )
    assert (recipe.loss, recipe.warmup, recipe.cosine, recipe.epochs) == ("mse", 0, 1.0, 8)
    monkeypatch.setattr(membership, "dataset_of", None)  # a second call is answered from the record
    assert list(study("dm", "digits", steps=(8, 5), **FAST).steps.unique()) == [5, 8]


def test_pooled_intervals_by_hand():
    rows = pd.DataFrame(
        {
            "arm": "a",
            "steps": 1,
            "attack": "knn",
            "chunk": [0, 1],
            "auc": [0.6, 0.8],
            "accuracy": [90.0, 92.0],
            "var members": [0.0015, 0.0017],
            "var others": [0.0001, 0.0009],
        }
    )
    row = pooled(rows).iloc[0]
    assert (row.auc, row.accuracy, row.chunks) == (pytest.approx(0.7), 91, 2)
    half = 1.96 * math.sqrt(0.0016 / 2 + 0.02**2)
    assert (row.low, row.high) == (pytest.approx(0.7 - half), pytest.approx(0.7 + half))


@pytest.mark.parametrize("arm", ["dn", "dm stat", "members start"])
def test_unknown_arms(arm):
    with pytest.raises(
        DDError, match=f"unknown arm '{arm}'.* allowed: members, random, .*dm start"
    ):
        study(arm, "digits", **FAST)
