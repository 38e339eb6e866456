"""The one SGD loop: its schedule step by step, its batches, its labels, and what happens when it cannot go on."""

import math
import sys
import sysconfig
import warnings
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ddlib.core import DDError, generator
from ddlib.data.dataset import from_arrays
from ddlib.nets.build import build
from ddlib.recipe import Recipe, halved, protocol
from ddlib.train import loop as training
from ddlib.train.loop import accuracy, compiled, predict, train

SHAPE = (1, 4, 4)


def tiny(classes: int = 2):
    return build("mlp:width=3,depth=1", SHAPE, classes, generator(0))


def images(n: int) -> torch.Tensor:
    return torch.randn(n, *SHAPE, generator=generator(1))


@pytest.fixture
def trace(monkeypatch) -> list[tuple[float, bool]]:
    """(step size, whether there is momentum from before) of every optimiser step."""
    steps = []

    class Spy(torch.optim.SGD):
        def step(self, closure=None):
            (group,) = self.param_groups
            assert (group["momentum"], group["weight_decay"], group["nesterov"]) == (
                0.9,
                5e-4,
                False,
            )
            steps.append((group["lr"], any("momentum_buffer" in s for s in self.state.values())))
            return super().step(closure)

    monkeypatch.setattr(torch.optim, "SGD", Spy)
    return steps


@pytest.mark.parametrize(
    ("name", "before", "later"), [("dsa", 502, 499), ("dm", 502, 499), ("dc", 152, 149)]
)
def test_the_schedule_of_the_released_code(trace, name, before, later):
    train(
        tiny(),
        images(2),
        torch.tensor([0, 1]),
        replace(protocol(name), augment="none"),
        generator(2),
    )
    assert [lr for lr, _ in trace] == [0.01] * before + [pytest.approx(0.001)] * later
    assert [step for step, (_, momentum) in enumerate(trace) if not momentum] == [0, before]


def test_training_is_the_plain_loop_to_the_bit():
    x, y, recipe = (
        images(7),
        torch.tensor([0, 1, 0, 1, 0, 1, 1]),
        halved("dsa", 20, augment="none", batch=3),
    )
    net, plain, rng = train(tiny(), x, y, recipe, generator(2)), tiny(), generator(2)
    for epochs, lr in ((12, 0.01), (9, 0.01 * 0.1)):
        sgd = torch.optim.SGD(plain.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)
        for _ in range(epochs):
            for index in torch.randperm(7, generator=rng).split(3):
                sgd.zero_grad()
                F.cross_entropy(plain(x[index]), y[index]).backward()
                sgd.step()
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), plain.parameters(), strict=True))
    assert not torch.equal(next(net.parameters()), next(tiny().parameters()))


def test_every_epoch_sees_every_image_once_and_the_last_batch_is_smaller():
    net, seen, x = tiny(), [], torch.arange(7.0).view(-1, 1, 1, 1).expand(7, *SHAPE)

    def forward(batch):
        seen.append(batch[:, 0, 0, 0].int().tolist())
        return net(batch)

    train(
        net,
        x,
        torch.zeros(7, dtype=torch.int64),
        Recipe(epochs=2, batch=3, augment="none"),
        generator(3),
        forward=forward,
    )
    assert [len(batch) for batch in seen] == [3, 3, 1] * 2
    first, second = (
        [image for batch in epoch for image in batch] for epoch in (seen[:3], seen[3:])
    )
    assert sorted(first) == sorted(second) == list(range(7)) and first != second


def test_a_batch_draws_one_operation_with_parameters_for_each_image(monkeypatch):
    calls = []

    def draw(*args, **options):
        calls.append((args[:3], options))
        return real(*args, **options)

    real = training.draw
    monkeypatch.setattr(training, "draw", draw)
    train(
        tiny(),
        images(5),
        torch.zeros(5, dtype=torch.int64),
        Recipe(epochs=1, batch=3, augment="color_crop"),
        generator(4),
    )
    assert calls == [
        (("color_crop", 3, (4, 4)), {"op_every": 3}),
        (("color_crop", 2, (4, 4)), {"op_every": 2}),
    ]


def test_images_may_come_from_a_function():
    x, y, recipe = (
        images(5),
        torch.tensor([0, 1, 0, 1, 1]),
        Recipe(epochs=3, batch=2, augment="crop"),
    )
    nets = [
        train(tiny(), source, y, recipe, generator(5)) for source in (x, lambda index: x[index])
    ]
    assert torch.equal(nets[0].classifier.weight, nets[1].classifier.weight)


def test_soft_labels_that_are_one_hot_are_the_hard_labels():
    x, hard, recipe = (
        images(6),
        torch.tensor([0, 1, 2, 0, 1, 2]),
        Recipe(epochs=20, lr=0.1, augment="none"),
    )
    nets = [
        train(tiny(3), x, y, recipe, generator(6))
        for y in (hard, F.one_hot(hard).float(), torch.full((6, 3), 1 / 3))
    ]
    torch.testing.assert_close(
        nets[1].classifier.weight, nets[0].classifier.weight, rtol=0, atol=1e-6
    )
    assert not torch.allclose(nets[2].classifier.weight, nets[0].classifier.weight, atol=1e-2)


def test_divergence_is_an_error_that_names_the_step_size():
    with pytest.raises(
        DDError,
        match=r"training of mlp.* ended with loss (nan|inf): lower the step size \(1e\+30\)",
    ):
        train(
            tiny(),
            images(4),
            torch.tensor([0, 1, 0, 1]),
            Recipe(epochs=9, lr=1e30, augment="none"),
            generator(7),
        )


def test_prediction_uses_the_network_in_eval_mode_and_in_batches(monkeypatch):
    rng = np.random.default_rng(0)
    data = from_arrays(
        rng.integers(0, 255, (8, 4, 4), dtype=np.uint8),
        np.arange(8) % 2,
        rng.integers(0, 255, (5, 4, 4), dtype=np.uint8),
        np.array([0, 1, 1, 0, 1]),
        device="cpu",
    )
    net = build("convnet:width=4,depth=1,norm=bn", SHAPE, 2, generator(1)).train()
    sizes: list[int] = []

    def forward(x):
        sizes.append(len(x))
        return net(x)

    monkeypatch.setattr(training, "PIXELS_AT_ONCE", 2 * 4 * 4)  # as of images that are large
    logits = predict(net, data, forward=forward)
    assert sizes == [2, 2, 1]
    monkeypatch.setattr(training, "PIXELS_AT_ONCE", 3)
    assert predict(net, data, forward=forward).shape == (5, 2) and sizes[3:] == [1] * 5
    assert not net.training and logits.shape == (5, 2) and not logits.requires_grad
    torch.testing.assert_close(logits, net(data.batch("test", range(5))).detach())
    net.classifier.weight.data.zero_()
    net.classifier.bias.data = torch.tensor([0.0, 1.0])  # class 1 always: 3 of 5
    assert accuracy(net, data) == pytest.approx(60) and accuracy(net, data, "train") == 50


@pytest.mark.parametrize(
    ("have", "cuda", "headers", "works"),
    [
        ((), False, True, False),
        (("g++",), False, True, True),
        (("g++",), False, False, False),
        (("c++", "cc", "clang"), False, True, False),  # Inductor calls g++ by that name
        ((), True, True, False),
        (("gcc",), True, True, True),
        (("gcc",), False, True, False),
    ],
)
def test_compiling_needs_a_compiler_and_says_so_once(
    monkeypatch, tmp_path, have, cuda, headers, works
):
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(training, "sys", SimpleNamespace(platform="linux"))
    monkeypatch.setattr(training, "which", lambda name: name if name in have else None)
    monkeypatch.setattr(
        sysconfig, "get_path", lambda name: str(tmp_path if headers else tmp_path / "none")
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch, "compile", lambda function, **options: ("compiled", function))
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    training._can_compile.cache_clear()
    try:
        if works:
            assert compiled(len) == ("compiled", len)
        else:
            with pytest.warns(UserWarning, match="running uncompiled") as caught:
                assert compiled(len) is len
            assert len(caught) == 1
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                assert compiled(max) is max
    finally:
        training._can_compile.cache_clear()
    assert sys.platform  # the stand-in for sys was training's alone


def test_adam_with_warm_up_and_cosine_on_centred_labels_is_the_plain_loop():
    recipe = Recipe(
        "frepo",
        12,
        0.01,
        batch=4,
        drops=(),
        augment="none",
        optimiser="adam",
        loss="mse",
        warmup=5,
        cosine=0.1,
    )
    x, y, total = images(7), torch.tensor([0, 1, 0, 1, 0, 1, 1]), 24  # two batches an epoch
    net, plain, rng, step = train(tiny(), x, y, recipe, generator(2)), tiny(), generator(2), 0
    adam, targets = torch.optim.Adam(plain.parameters()), F.one_hot(y, 2) - 0.5
    for _ in range(12):
        for index in torch.randperm(7, generator=rng).split(4):
            share = (
                step / 5
                if step < 5
                else 0.1 + 0.9 * (1 + math.cos(math.pi * (step - 5) / (total - 5))) / 2
            )
            adam.param_groups[0]["lr"] = 0.01 * share
            adam.zero_grad()
            (0.5 * ((plain(x[index]) - targets[index]) ** 2).sum(1)).mean().backward()
            adam.step()
            step += 1
    for ours, theirs in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_warm_up_takes_half_of_a_short_training_at_most():
    recipe = Recipe(epochs=4, warmup=500, cosine=0.01)
    assert [training._share(recipe, step, 4) for step in range(4)] == pytest.approx(
        [0, 0.5, 1, 0.505]
    )


def test_drops_that_keep_the_momentum(trace):
    recipe = Recipe(epochs=6, batch=2, drops=(2, 4), drop=0.2, reset=False, augment="none")
    train(tiny(), images(2), torch.tensor([0, 1]), recipe, generator(2))
    assert [lr for lr, _ in trace] == pytest.approx([0.01] * 2 + [0.002] * 2 + [0.0004] * 2)
    assert [momentum for _, momentum in trace] == [False] + [True] * 5


def test_a_teacher_may_give_the_targets():
    """Targets that are the labels change nothing; a teacher's answers, asked batch by batch, do."""
    x, y = images(6), torch.tensor([0, 1, 0, 1, 0, 1])
    recipe = Recipe(epochs=2, batch=4, drops=(), augment="color_crop")
    plain = train(tiny(), x, y, recipe, generator(2))
    same = train(tiny(), x, y, recipe, generator(2), targets=lambda batch, labels: labels)
    teacher = tiny()
    seen = []

    def answers(batch, labels):
        seen.append(tuple(batch.shape))
        return teacher(batch).detach().softmax(1)

    taught = train(tiny(), x, y, recipe, generator(2), targets=answers)
    assert all(map(torch.equal, plain.parameters(), same.parameters()))
    assert not torch.equal(next(taught.parameters()), next(plain.parameters()))
    assert seen == [(4, *SHAPE), (2, *SHAPE)] * 2


def test_optimisers_have_names():
    x, y = images(2), torch.tensor([0, 1])
    train(tiny(), x, y, Recipe(epochs=1, optimiser="adamw", augment="none"), generator(0))
    with pytest.raises(DDError, match="unknown optimiser 'adan'.*allowed: sgd, adam"):
        train(tiny(), x, y, Recipe(epochs=1, optimiser="adan", augment="none"), generator(0))
