"""Expert trajectories: what is stored, what is refused, and the flat steps against their formulas."""

import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import grad

from ddlib.core import DDError, generator
from ddlib.data.dataset import from_arrays
from ddlib.experts import (
    ExpertRecipe,
    expert_paths,
    flatten_gradient,
    folder,
    load_experts,
    sharpness,
    train_experts,
)
from ddlib.files import load_tensors, lock, save_tensors
from ddlib.match.trajectory import FlatNet
from ddlib.methods.trajectory import MTT, Config
from ddlib.nets.build import build

NET = "convnet:width=4,depth=1"
RECIPE = ExpertRecipe(epochs=3, lr=0.05, batch=8, augment="crop_scale")


def dataset(seed=0, **kwargs):
    rng = generator(seed, "experts")
    labels = torch.arange(3).repeat_interleave(8)
    images = 70 * labels[:, None, None, None] + torch.randint(40, (24, 1, 8, 8), generator=rng)
    return from_arrays(
        images.to(torch.uint8),
        labels,
        images[::4].to(torch.uint8),
        labels[::4],
        device="cpu",
        **kwargs,
    )


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("DDLIB_EXPERTS", str(tmp_path / "experts"))
    return tmp_path / "experts"


def trained(count=2, recipe=RECIPE, net=NET, data=None):
    return train_experts(data or dataset(), net, recipe, count, progress=False)


def test_round_trip():
    data = dataset()
    paths = trained()
    experts = load_experts(data, NET, RECIPE, 2)
    assert len(experts) == 2 and all(p.parent == folder(data, NET, RECIPE) for p in paths)
    size = FlatNet(build(NET, data.shape, 3)).size
    for seed, rows in enumerate(experts.weights):
        assert rows.shape == (4, size) and rows.dtype == torch.float32
        start = FlatNet(build(NET, data.shape, 3, generator(seed, "expert", "weights"))).vector()
        assert torch.equal(rows[0], start)
    header = load_tensors(paths[1], "expert", "")[1]
    assert (
        header["seed"] == 1
        and header["dataset_checksum"] == data.checksum
        and header["recipe"]["lr"] == 0.05
    )
    assert 0 <= header["test_accuracy"] <= 100


def test_checkpoints_are_copies_not_one_storage():
    flat = FlatNet(build(NET, (1, 8, 8), 3))
    before = flat.vector()
    kept = before.clone()
    with torch.no_grad():
        next(iter(flat.net.parameters())).add_(1)
    assert torch.equal(before, kept) and not torch.equal(flat.vector(), kept)
    trained(1)
    rows = load_experts(dataset(), NET, RECIPE, 1).weights[0]
    assert all(not torch.equal(rows[a], rows[b]) for a in range(4) for b in range(a))


def test_one_step_of_the_stored_run_by_hand():
    """The whole set in one batch, no augmentation: the second row is the first minus lr times the direction."""
    data, net = dataset(), FlatNet(build(NET, (1, 8, 8), 3))
    x, y = data.batch("train", slice(None)), data.labels["train"]
    for flat, rho, alpha in (("plain", 0.01, 1.0), ("sam", 0.05, 0.7), ("agsam", 0.05, 0.3)):
        recipe = ExpertRecipe(1, 0.1, 24, "none", flat, rho, alpha)
        trained(1, recipe)
        first, second = load_experts(data, NET, recipe, 1).weights[0]
        wanted = direction(net, first.double(), x.double(), y, recipe)
        torch.testing.assert_close((first - second) / 0.1, wanted.float(), rtol=1e-4, atol=2e-6)


def direction(net: FlatNet, theta, x, y, recipe):
    """The formulas of the papers and of FTD's code on the flat vector."""

    def slope(at):
        at = at.detach().requires_grad_()
        return grad(F.cross_entropy(net(at, x), y), at)[0]

    g = slope(theta)
    if recipe.flat == "plain":
        return g
    if recipe.flat == "sam":
        return (1 - recipe.alpha) * g + recipe.alpha * slope(theta + recipe.rho * g / g.norm())
    ahead = slope(theta + recipe.rho * theta**2 * g / (theta.abs() * g).norm())
    cosine = g @ ahead / (g.norm() * ahead.norm())
    across = g - cosine * g.norm() * ahead / ahead.norm()
    return ahead - recipe.alpha * across


@pytest.mark.parametrize(
    ("flat", "rho", "alpha"),
    [("sam", 0.05, 1.0), ("sam", 0.5, 0.3), ("agsam", 0.5, 0.3), ("agsam", 0.05, 1.0)],
)
def test_flat_step_is_the_formula(flat, rho, alpha):
    net = build(NET, (1, 8, 8), 3, generator(1)).double()
    function = FlatNet(net)
    x, y = torch.randn(6, 1, 8, 8, generator=generator(2)).double(), torch.arange(6) % 3
    recipe, theta = replace(RECIPE, flat=flat, rho=rho, alpha=alpha), function.vector()
    F.cross_entropy(net(x), y).backward()
    plain = torch.cat([p.grad.flatten() for p in net.parameters()])
    flatten_gradient(list(net.parameters()), lambda: F.cross_entropy(net(x), y), recipe)
    found = torch.cat([p.grad.flatten() for p in net.parameters()])
    wanted = direction(function, theta, x, y, recipe)
    assert (found - wanted).norm() < 1e-10 * wanted.norm() < 1e-7 * (found - plain).norm()
    assert (function.vector() - theta).abs().max() < 1e-14  # the weights are back
    if flat == "sam" and alpha == 1:
        at = (theta + rho * plain / plain.norm()).requires_grad_()
        (sam,) = grad(F.cross_entropy(function(at, x), y), at)
        assert (found - sam).norm() < 1e-10 * sam.norm()


def test_same_files_again_and_a_stopped_call_goes_on(place):
    first = [path.read_bytes() for path in trained(3)]
    shutil.rmtree(place)
    paths = trained(1)
    os.utime(paths[0], (1, 1))
    paths = trained(3)
    assert [path.read_bytes() for path in paths] == first and len(set(first)) == 3
    assert paths[0].stat().st_mtime == 1 and paths[1].stat().st_mtime > 1


@pytest.mark.parametrize(
    "other",
    [
        {"lr": 0.01},
        {"epochs": 2},
        {"augment": "none"},
        {"flat": "sam"},
        {"flat": "sam", "rho": 0.1},
    ],
)
def test_recipes_live_apart(other):
    assert folder(dataset(), NET, replace(RECIPE, **other)) != folder(dataset(), NET, RECIPE)


def test_a_missing_expert_names_the_command():
    trained(1)
    with pytest.raises(
        DDError, match=r"no expert 1 of the 2 that this run needs at .*; make the experts first"
    ):
        load_experts(dataset(), NET, RECIPE, 2)
    with pytest.raises(DDError, match="at least 1"):
        trained(0)


@pytest.mark.parametrize(
    ("key", "source", "target"),
    [
        ("dataset_checksum", {"data": dataset(1)}, {}),
        ("dataset", {"data": dataset(name="other")}, {}),
        ("backbone", {"net": "convnet:width=4,depth=1,act=swish"}, {}),
        ("recipe", {"recipe": replace(RECIPE, lr=0.1)}, {}),
        ("zca", {}, {"zca": "f00d"}),
    ],
)
def test_foreign_experts_are_refused(key, source, target):
    """A file that was moved to another run's place, or whose header says another ZCA."""
    [path] = trained(1, **source)
    goal = folder(dataset(), NET, RECIPE) / path.name
    goal.parent.mkdir(parents=True, exist_ok=True)
    tensors, header = load_tensors(path, "expert", "")
    save_tensors(goal, tensors, header | target)
    with pytest.raises(DDError, match=f"was made with {key} .*make it anew"):
        load_experts(dataset(), NET, RECIPE, 1)


@pytest.mark.parametrize("damage", ["still", "nan"])
def test_experts_that_stand_still_or_broke_are_refused(damage):
    [path] = trained(1)
    tensors, header = load_tensors(path, "expert", "")
    tensors["weights"][2] = tensors["weights"][1] if damage == "still" else torch.nan
    save_tensors(path, tensors, header)
    with pytest.raises(DDError, match="same weights, or weights that are not finite.*make it anew"):
        load_experts(dataset(), NET, RECIPE, 1)


@pytest.mark.parametrize("other", [{"theta": 4}, {"weights": 3}, {"weights": 5}])
def test_experts_of_other_tensors_are_refused(other):
    [path] = trained(1)
    tensors, header = load_tensors(path, "expert", "")
    long = torch.cat([tensors["weights"], torch.zeros(1, tensors["weights"].shape[1])])
    save_tensors(path, {name: long[:rows] for name, rows in other.items()}, header)
    with pytest.raises(DDError, match="does not hold weights .*make it anew"):
        load_experts(dataset(), NET, RECIPE, 1)


def test_damaged_files_are_refused():
    [path] = trained(1)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(DDError, match="damaged.*make it anew"):
        load_experts(dataset(), NET, RECIPE, 1)


def test_segments_beyond_the_experts_are_refused():
    config = Config(
        experts=2, expert_total=3, expert_lr=0.05, expert_batch=8, augment="crop_scale", syn_steps=2
    )
    trained(2)
    MTT(replace(config, max_start=2, expert_epochs=2), dataset(), 1, NET, 0)
    for wrong in ({"max_start": 3, "expert_epochs": 2}, {"max_start": 1, "expert_epochs": 4}):
        with pytest.raises(DDError, match="beyond the experts' expert_total = 3 epochs"):
            MTT(replace(config, **wrong), dataset(), 1, NET, 0)
    with pytest.raises(DDError, match="min_start 2 must be below max_start 2"):
        MTT(replace(config, min_start=2), dataset(), 1, NET, 0)


def test_sharpness_is_the_top_eigenvalue_of_the_hessian():
    data, net = (
        dataset(),
        FlatNet(build("mlp:width=3,depth=1,act=swish", (1, 8, 8), 3, generator(4))),
    )
    theta = net.vector()
    x, y = data.batch("train", slice(None)), data.labels["train"]
    hessian = torch.func.hessian(lambda at: F.cross_entropy(net(at, x), y))(theta)
    top = torch.linalg.eigvalsh(hessian.double())[-1]
    assert sharpness(net, theta, data) == pytest.approx(float(top), rel=1e-4)
    net = FlatNet(build("mlp:width=3,depth=1,act=swish", (1, 8, 8), 3, generator(0)))
    theta = -3 * net.vector()
    hessian = torch.func.hessian(lambda at: F.cross_entropy(net(at, x), y))(theta)
    spectrum = torch.linalg.eigvalsh(hessian.double())
    assert (
        -spectrum[0] > 4 * spectrum[-1] > 0
    )  # a larger negative one, which plain power iteration would find
    assert sharpness(net, theta, data) == pytest.approx(float(spectrum[-1]), rel=1e-3)


def test_an_expert_that_another_process_makes_is_left_to_it(place):
    first, second = expert_paths(folder(dataset(), NET, RECIPE), 2)
    with ThreadPoolExecutor() as pool:
        with lock(first, "expert 0"):
            others = pool.submit(trained)
            deadline = time.monotonic() + 30
            while not second.is_file() and time.monotonic() < deadline:
                time.sleep(0.01)
            assert second.is_file() and not first.is_file()
        assert others.result() == [first, second]
    assert first.is_file()
