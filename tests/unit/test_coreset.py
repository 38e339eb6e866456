"""The selection rules of coresets, on cases worked out by hand and against a plain loop."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from ddlib.core import DDError, generator
from ddlib.data.dataset import from_arrays
from ddlib.methods.coreset import (
    Coreset,
    CoresetConfig,
    Extractor,
    forgetting,
    herding,
    kcenter,
    kmeans,
    train_and_count,
)
from ddlib.recipe import Recipe


def line(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)[:, None]


def slow_herding(x: np.ndarray, n: int) -> list[int]:
    """The rule as it is written, every distance afresh: O(n M d)."""
    mean, picked = x.mean(0), []
    for i in range(n):
        residual = (i + 1) * mean - sum((x[j] for j in picked), np.zeros_like(mean))
        picked.append(
            min(
                (j for j in range(len(x)) if j not in picked),
                key=lambda j: ((x[j] - residual) ** 2).sum(),
            )
        )
    return picked


@pytest.fixture(scope="module")
def data():
    """Three classes of unequal size in shuffled order; the mean grey of an image tells its class."""
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.repeat([0, 1, 2], [6, 9, 12]))
    images = (80 * labels[:, None, None] + rng.integers(0, 20, (27, 8, 8))).astype(np.uint8)
    return from_arrays(images, labels, images, labels, device="cpu")


def flat(data) -> torch.Tensor:
    return data.images["train"].float().flatten(1)


def test_herding_by_hand():
    # Mean 4. Step 1 aims at 4: 3 (distance 1) beats 6 and 1. Step 2 aims at 8 - 3 = 5: 6 (1) beats 10 (5) and 1.
    # Step 3 aims at 12 - 9 = 3: 1 (2) beats 0 (3). Step 4 aims at 16 - 10 = 6: 10 (4) beats 0 (6).
    assert herding(line(0, 1, 3, 6, 10), 5).tolist() == [2, 3, 1, 4, 0]


def test_herding_never_picks_twice():
    # Mean 5, no sample at it: 4 is nearest; then the aim is 10 - 4 = 6 and 4 would be nearest again, were it left.
    assert herding(line(0, 4, 11), 2).tolist() == [1, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_herding_is_the_plain_loop(dtype):
    x = (
        torch.randn(60, 7, generator=generator(0), dtype=dtype) + 100
    )  # an offset that float32 sums would not survive
    assert herding(x, 60).tolist() == slow_herding(x.double().numpy(), 60)


def test_kcenter_by_hand():
    # Mean 4.4: 6 (1.6) is the first centre, 2 is 2.4 away. Farthest from 6 is 0 (6). Distances to {6, 0} are then
    # 1: 1, 2: 2, 13: 7 -> 13, although 13 is nearer to 6 than to 0. Last: 2 (2) beats 1 (1).
    assert kcenter(line(0, 1, 2, 6, 13), 4).tolist() == [3, 4, 0, 2]


def test_kcenter_of_duplicates_is_distinct():
    assert sorted(kcenter(line(5, 5, 5, 9), 4).tolist()) == [0, 1, 2, 3]


def test_kmeans_takes_one_sample_of_each_blob():
    centres = torch.tensor([[0.0, 0.0], [50.0, 0.0], [0.0, 50.0], [50.0, 50.0]])
    x = centres.repeat_interleave(25, 0) + torch.randn(100, 2, generator=generator(0))
    picked = kmeans(x, 4, seed=0)
    assert sorted((picked // 25).tolist()) == [0, 1, 2, 3]
    for row in picked:  # and the one nearest to the blob's own mean
        blob = x[row // 25 * 25 :][:25]
        assert row % 25 == (blob - blob.mean(0)).norm(dim=1).argmin()
    assert kmeans(x, 4, seed=0).equal(picked)


def test_kmeans_is_distinct():
    x = line(0, 0.1, 10, 10.1, 20)  # as many centres as samples: every sample once
    assert sorted(kmeans(x, 5, seed=1).tolist()) == [0, 1, 2, 3, 4]
    picked = kmeans(torch.randn(40, 3, generator=generator(3)), 30, seed=0)
    assert len(set(picked.tolist())) == 30


@pytest.mark.filterwarnings("ignore:Number of distinct clusters")
def test_kmeans_of_duplicates_is_distinct():
    assert sorted(kmeans(line(1, 1, 1, 2), 4, seed=0).tolist()) == [0, 1, 2, 3]


@pytest.mark.parametrize("n", [0, -1, 6])
@pytest.mark.parametrize("pick", [herding, kcenter, lambda x, n: kmeans(x, n, 0)])
def test_impossible_counts_are_named(pick, n):
    with pytest.raises(DDError, match=f"cannot choose {n} of 5 samples.*1 to 5"):
        pick(line(0, 1, 2, 3, 4), n)


@pytest.mark.parametrize("features", [torch.tensor([[0.0], [torch.nan]])])
def test_impossible_features_are_named(features):
    for pick in (herding, kcenter, lambda x, n: kmeans(x, n, 0)):
        with pytest.raises(DDError, match="features"):
            pick(features, 1)


def test_random_is_class_major_distinct_and_seeded(data):
    picked = Coreset(CoresetConfig("random"), data, 6, "convnet", 0).index
    assert data.labels["train"][picked].tolist() == [0] * 6 + [1] * 6 + [2] * 6
    assert len(set(picked.tolist())) == 18


@pytest.mark.parametrize(
    ("kind", "rule"),
    [("herding", herding), ("kcenter", kcenter), ("kmeans", lambda x, n: kmeans(x, n, 5))],
)
def test_coreset_applies_the_rule_to_each_class(data, kind, rule, monkeypatch):
    trained = Extractor(None, None, {"epochs": 0})
    monkeypatch.setattr("ddlib.methods.coreset.extractor", lambda *_: trained)
    monkeypatch.setattr("ddlib.methods.coreset.embed", lambda net, data: flat(data))
    chosen = Coreset(CoresetConfig(kind), data, 4, "convnet", 5)
    labels, wanted = data.labels["train"], []
    for c in range(3):
        rows = (labels == c).nonzero()[:, 0]
        wanted += rows[rule(flat(data)[rows], 4)].tolist()
    assert chosen.index.tolist() == wanted
    assert chosen.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert chosen.images.equal(data.batch("train", torch.tensor(wanted)))
    assert chosen.summary() == {"extractor": {"epochs": 0}} and chosen.step() == {}


def test_coreset_state_is_the_selection(data):
    first, second = (Coreset(CoresetConfig("random"), data, 3, "convnet", seed) for seed in (0, 1))
    assert not first.index.equal(second.index)
    second.load_state_dict(first.state_dict())
    assert first.index.equal(second.index)


def test_the_most_forgotten_come_first_and_ties_in_random_order():
    events = torch.tensor([0, 3, 1, 3, 0, 0])
    picked = forgetting(events, 4, generator(0)).tolist()
    assert set(picked[:2]) == {1, 3} and picked[2] == 2 and picked[3] in (0, 4, 5)
    draws = {tuple(forgetting(events, 4, generator(seed)).tolist()) for seed in range(20)}
    assert len(draws) > 3
    with pytest.raises(DDError, match="cannot choose 7 of 6"):
        forgetting(events, 7, generator(0))


class Scripted(torch.nn.Module):
    """A stand-in network: what it answers to each image in each epoch is written down."""

    spec = "scripted"

    def __init__(self, answers: torch.Tensor):
        super().__init__()
        self.answers, self.seen = answers, torch.zeros(answers.shape[1], dtype=torch.long)
        self.classifier = torch.nn.Linear(1, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.flatten(1).max(1).values.argsort().argsort() if len(x) > 1 else None
        assert rows is not None
        answer = self.answers[self.seen[rows], rows]
        self.seen[rows] += 1
        return torch.nn.functional.one_hot(answer, 2) + 0 * self.classifier.weight.sum()


def test_an_event_is_a_step_from_right_to_wrong():
    images = (np.arange(4, dtype=np.uint8) * 60)[:, None, None].repeat(8, 1).repeat(8, 2)
    labels = np.array([0, 0, 1, 1])
    data = from_arrays(images, labels, images, labels, device="cpu")
    answers = torch.tensor(  # one row an epoch, one column an image
        [[0, 1, 1, 1], [1, 0, 1, 0], [0, 1, 1, 1], [1, 0, 1, 0]]
    )
    recipe = Recipe("test", epochs=4, lr=0.0, batch=4, drops=(), augment="none")
    net = Scripted(answers)
    events = train_and_count(data, net, recipe, 0, net.forward)
    assert events.tolist() == [2, 1, 0, 2]


def test_all_rules_share_one_kept_extractor(data, results, monkeypatch):
    config = CoresetConfig("herding", extractor_epochs=3)
    first = Coreset(config, data, 2, "convnet:width=4,depth=1", 0)
    picked = first.index
    monkeypatch.setattr("ddlib.methods.coreset.train", None)  # nothing is trained again
    other = CoresetConfig("forgetting", extractor_epochs=3)
    again = Coreset(other, data, 2, "convnet:width=4,depth=1", 0)
    assert again.summary() == first.summary() and len(set(again.index.tolist())) == 6
    second = Coreset(config, data, 2, "convnet:width=4,depth=1", 0)
    assert second.index.equal(picked)
    low = replace(config, extractor_precision="bf16")
    with pytest.raises(TypeError):  # another precision has an extractor of its own
        _ = Coreset(low, data, 2, "convnet:width=4,depth=1", 0).index
    with pytest.raises(TypeError):  # and so has another seed
        _ = Coreset(config, data, 2, "convnet:width=4,depth=1", 1).index


def test_an_extractor_may_be_trained_in_bf16(data, results):
    config = CoresetConfig("herding", extractor_epochs=3)
    low = replace(config, extractor_precision="bf16")
    records = [
        Coreset(c, data, 2, "convnet:width=4,depth=1", 0).extractor.record for c in (config, low)
    ]
    assert "precision" not in records[0] and records[1]["precision"] == "bf16"
    nets = [Coreset(c, data, 2, "convnet:width=4,depth=1", 0).extractor.net for c in (config, low)]
    weights = [torch.cat([p.flatten() for p in net.parameters()]) for net in nets]
    assert 0 < (weights[0] - weights[1]).abs().max() < 0.05


def test_coreset_trains_its_own_extractor(data, results):
    config = CoresetConfig("herding", extractor_epochs=12, extractor_lr=0.02)
    chosen, again = (Coreset(config, data, 2, "convnet:width=4,depth=1", 0) for _ in range(2))
    assert chosen.index.equal(again.index)
    record = chosen.summary()["extractor"]
    assert record["epochs"] == 12 and record["lr"] == 0.02 and record["momentum"] == 0.9
    assert (
        record["weight_decay"] == 5e-4
        and record["augment"] == "none"
        and record["backbone"].startswith("convnet")
    )
    assert (
        record["train_accuracy"] > 60 and record["seconds"] > 0
    )  # chance is 44, the largest class
