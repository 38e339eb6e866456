"""Continual learning: class orders, labels among all classes, memories of the seen classes, tests on them alone."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import ddlib as dd
from ddlib.core import DDError
from ddlib.distilled import Synthetic
from ddlib.studies import continual
from ddlib.studies.continual import class_order, final, memory, seen, study
from ddlib.studies.parts import evaluated_as, part

FAST = {
    "ipc": 2,
    "steps": 5,
    "backbone": "convnet:width=8",
    "eval_epochs": 40,
    "eval_lr": 0.1,
    "networks": 2,
    "progress": False,
}


@pytest.fixture(scope="module")
def data():
    return dd.load("digits", device="cpu")


def test_orders_are_the_papers():
    for seed in range(5):
        np.random.seed(seed)  # as DM's script draws it
        assert [c for task in class_order(100, 10, seed) for c in task] == np.random.permutation(
            100
        ).tolist()
    assert [len(task) for task in class_order(100, 5, 0)] == [20] * 5
    for classes, steps, allowed in (
        (10, 10, "1, 2, 5"),
        (10, 3, "1, 2, 5"),
        (9, 9, "1, 3"),
        (10, 0, "1, 2, 5"),
    ):
        with pytest.raises(
            DDError, match=f"{classes} classes cannot come in {steps} equal .* allowed: {allowed}$"
        ):
            class_order(classes, steps, 0)


def test_a_part_keeps_its_classes_only_and_numbers_them_anew(data):
    task = part(
        data, "x", {split: seen(data, [7, 2], split) for split in ("train", "test")}, [7, 2]
    )
    assert (
        task.classes == ("7", "2")
        and task.class_sizes("test").tolist() == data.class_sizes("test")[[7, 2]].tolist()
    )
    assert torch.equal(
        task.images["train"][task.labels["train"] == 0],
        data.images["train"][data.labels["train"] == 7],
    )


def tiny(data, labels, loss="ce") -> Synthetic:
    recipe = replace(dd.protocol("dsa"), loss=loss)
    return Synthetic.of(
        data, torch.zeros(len(labels), *data.shape), labels, recipe, "convnet", factor=2
    )


def test_labels_take_their_places_among_all_classes(data):
    tasks = [[7, 2], [0, 5]]
    hard = memory([tiny(data, torch.tensor([0, 1]))] * 2, tasks, data)
    assert hard.labels.tolist() == [7, 2, 0, 5] and hard.factor == 2 and len(hard.images) == 4
    soft = torch.tensor([[0.7, 0.3], [0.2, 0.8]])
    wide = memory([tiny(data, soft)] * 2, tasks, data).labels
    assert torch.equal(wide[:2, [7, 2]], soft) and torch.equal(wide[2:, [0, 5]], soft)
    assert torch.allclose(wide.sum(1), torch.ones(4)) and wide[0, 0] == 0
    centred = memory(
        [tiny(data, (torch.eye(2) - 0.5) / 0.2**0.5, "mse")] * 2, tasks, data
    ).labels  # as FRePo begins
    assert torch.allclose(
        centred, torch.eye(10)[[7, 2, 0, 5]] - 0.1
    )  # what hard labels become under that loss


def test_memory_and_test_grow_by_the_task(results, data, monkeypatch):
    calls, true_evaluate = [], continual.evaluate

    def spy(syn, tested, **options):
        calls.append((syn, tested, options))
        return true_evaluate(syn, tested, **options)

    monkeypatch.setattr(continual, "evaluate", spy)
    rows = study("random", "digits", order=3, **FAST)
    order = np.random.RandomState(3).permutation(10)
    train = data.batch("train", slice(None)).flatten(1)
    for task, (syn, tested, options) in enumerate(calls, 1):
        classes = sorted(order[: 2 * task].tolist())
        assert torch.bincount(syn.labels, minlength=10)[classes].tolist() == [2] * len(classes)
        assert len(syn.labels) == 4 * task
        assert (
            sorted(set(tested.labels["test"].tolist())) == classes and tested.num_classes == 10
        )  # no masking
        assert len(tested.labels["test"]) == data.class_sizes("test")[classes].sum()
        assert options == {
            "networks": 2,
            "seed": 3,
            "recipe": syn.recipe,
            "precision": "float32",
        }
        assert syn.recipe.epochs == 41
    nearest = torch.cdist(calls[-1][0].images.flatten(1), train).min(1)
    assert (nearest.values < 0.02).all() and torch.equal(
        data.labels["train"][nearest.indices], calls[-1][0].labels
    )
    assert list(rows["classes seen"]) == [2, 4, 6, 8, 10]
    assert rows.accuracy.iloc[0] > 85 and 50 < rows.accuracy.iloc[-1] < rows.accuracy.iloc[0]
    monkeypatch.setattr(continual, "dataset_of", None)  # a second call is answered from the record
    assert study("random", "digits", order=3, **FAST).equals(rows)
    last = final(rows).iloc[0]
    assert (last.accuracy, last.networks, last.orders) == (
        pytest.approx(rows.accuracy.iloc[-1]),
        2,
        1,
    )


def test_frepo_takes_as_many_steps_after_every_task():
    """10,000 in its script: 20 images a class of 20 to 100 classes, in batches of 500."""
    recipe = dd.resolve("frepo", "cifar100", 20, "paper").recipe
    for images in (400, 800, 1200, 1600, 2000):
        scaled = continual._as_long_as_the_last(recipe, images, 2000)
        assert 10_000 <= scaled.epochs * -(-images // 500) < 10_000 + 4
    other = dd.resolve("dm", "cifar100", 20, "paper").recipe
    assert continual._as_long_as_the_last(other, 400, 2000) == other


def test_a_distilled_memory_under_another_evaluation(results):
    settings = evaluated_as("frepo", "digits", 2, "smoke")
    settings |= {
        "eval_epochs": 60,
        "eval_backbone": "convnet:width=8,norm=none",
        "eval_lr": 0.01,
        "networks": 1,
    }
    rows = study(
        "dm", "digits", ipc=2, progress=False, iterations=3, backbone="convnet:width=8", **settings
    )
    assert set(rows.protocol) == {"frepo"} and len(rows) == 5 and rows.accuracy.iloc[0] > 60
