"""DREAM's sampler by hand-made features, its plug-ins in DM and trajectory matching, and what it refuses."""

import numpy as np
import pytest
import torch
from torch import nn

import ddlib as dd
from benchmarks import dream as bench_dream
from benchmarks import kmeans as bench
from ddlib.core import DDError, generator
from ddlib.data.dataset import Dataset, from_arrays
from ddlib.experts import ExpertRecipe, folder, train_experts
from ddlib.match.gradients import class_gradients, matched
from ddlib.match.sampler import (
    Sampler,
    by_distance,
    embed_rows,
    expert_batches,
    initial_rows,
    representatives,
)
from ddlib.methods.dm import DM, Config
from ddlib.methods.dream import DREAM, DREAMPlus, plug_in
from ddlib.methods.gradient import IDC
from ddlib.methods.gradient import Config as GradientConfig
from ddlib.nets.build import build, initialise
from ddlib.train.loop import _can_compile, compiled

NET = "convnet:width=8"


def arrays(sizes=(40, 40, 40), seed: int = 0) -> Dataset:
    """Classes of four tight groups of images each: noise of one grey level around 20, 80, 140 and 200."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(len(sizes)), sizes)
    level = 20 + 60 * rng.integers(0, 4, len(labels))
    images = (level[:, None, None, None] + rng.integers(0, 10, (len(labels), 1, 8, 8))).astype(
        np.uint8
    )
    return from_arrays(images, labels, images, labels, device="cpu")


class Pixels(nn.Module):
    """A network whose features are the pixels it is given."""

    feature_dim, couples_samples = 64, False

    def features(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1)


def level(data: Dataset, rows: torch.Tensor) -> torch.Tensor:
    return (
        (data.images["train"][rows].float().mean((-3, -2, -1)) - 20)
        .div(60, rounding_mode="floor")
        .long()
    )


def fresh(data: Dataset, seed: int = 0):
    return build(NET, data.shape, data.num_classes, generator(seed, "net"))


def of_their_class(data: Dataset, rows: torch.Tensor) -> bool:
    return all(
        (data.labels["train"][row] == c).all() and len(row.unique()) == len(row)
        for c, row in enumerate(rows)
    )


def test_dream_picks_one_image_of_every_group():
    data = arrays((40, 25, 31))
    for seed in range(5):
        rows = Sampler(data, 12, "dream")(Pixels(), 0, generator(seed, "s"))
        assert rows.shape == (3, 12) and of_their_class(data, rows)
        assert all(len(found.unique()) == 4 for found in level(data, rows))


def test_picks_cover_a_class_better_than_random_ones():
    data = dd.load("digits", device="cpu")
    net, rng = fresh(data), generator(0, "s")
    every = data.labels["train"].argsort(stable=True)
    x = embed_rows(net, data, every).split(data.class_sizes().tolist())

    def coverage(rows: torch.Tensor) -> float:
        return float(
            np.mean(
                [
                    torch.cdist(x[c], embed_rows(net, data, row)).min(1).values.mean()
                    for c, row in enumerate(rows)
                ]
            )
        )

    ours = coverage(Sampler(data, 16, "dream")(net, 0, rng))
    random = np.mean([coverage(Sampler(data, 16)(net, k, rng)) for k in range(5)])
    assert ours < 0.97 * random


def test_the_images_of_a_cluster_are_its_centres_neighbours():
    data = arrays()
    rows = Sampler(data, 8, "dream", subsample=2)(Pixels(), 0, generator(0, "s"))
    assert of_their_class(data, rows)
    assert torch.equal(level(data, rows[:, ::2]), level(data, rows[:, 1::2]))


@pytest.mark.parametrize(("kind", "far"), [("central", False), ("boundary", True)])
def test_central_and_boundary(kind, far):
    data = arrays((30, 17, 22))
    rows = Sampler(data, 5, kind)(Pixels(), 0, generator(0, "s"))
    for c in range(3):
        mine = (data.labels["train"] == c).nonzero().flatten()
        x = data.images["train"][mine].float().flatten(1) / 255
        order = (x - x.mean(0)).norm(dim=1).argsort(descending=far)
        assert set(rows[c].tolist()) == set(mine[order[:5]].tolist())


def test_padding_is_no_sample():
    x = torch.zeros(2, 4, 1)
    x[0, :, 0], x[1, :3, 0] = torch.tensor([1.0, 2, 3, 9]), torch.tensor([4.0, 5, 9])
    assert by_distance(x, 1, [4, 3], far=True).tolist() == [[3], [2]]
    assert by_distance(x, 3, [4, 3], far=False).tolist() == [[2, 1, 0], [1, 0, 2]]


def test_rows_are_kept_until_the_interval_is_over():
    data = arrays()
    rng, net = generator(0, "s"), Pixels()
    sampler = Sampler(data, 6, "dream", interval=3)
    rows = [sampler(net, k, rng) for k in range(7)]
    assert all(rows[k] is rows[3 * (k // 3)] for k in range(7))
    assert not torch.equal(rows[0], rows[3]) and not torch.equal(rows[3], rows[6])
    random = Sampler(data, 6, interval=3)
    assert not torch.equal(random(net, 0, rng), random(net, 1, rng))
    assert torch.equal(random(net, 0, generator(1, "s")), data.sample(6, generator(1, "s")))


def test_a_pool_is_a_random_part_of_every_class():
    data = arrays()
    rows = Sampler(data, 6, "dream", pool=6)(
        Pixels(), 0, generator(0, "s")
    )  # six of six: the pool itself
    pool = data.sample(6, generator(0, "s"))
    assert torch.equal(rows.sort(1).values, pool.sort(1).values)


def test_features_are_of_raw_pixels_unless_asked_and_the_mode_of_the_network_stays():
    data = arrays()
    net, rows = fresh(data), torch.arange(5)
    net.train()
    pixels, normal = embed_rows(net, data, rows), embed_rows(net, data, rows, pixels=False)
    torch.testing.assert_close(pixels, net.features(data.images["train"][rows] / 255))
    torch.testing.assert_close(normal, net.features(data.batch("train", rows)))
    assert (pixels - normal).abs().max() > 1e-3 and net.training
    assert not torch.equal(
        representatives(net, data, 9, generator(0, "s")),
        representatives(net, data, 9, generator(0, "s"), pixels=False),
    )


def test_compiled_features_see_one_shape_and_give_the_plain_ones():
    data, seen = arrays((90, 90, 90)), set()
    net, rows = fresh(data).train(), torch.arange(270)

    def features(x: torch.Tensor) -> torch.Tensor:
        seen.add(len(x))
        assert not net.training
        return net.features(x)

    for count in (3, 256, 270):
        torch.testing.assert_close(
            embed_rows(net, data, rows[:count], features=features),
            embed_rows(net, data, rows[:count]),
        )
    assert seen == {64} and net.training
    plain, ours = (
        representatives(net, data, 9, generator(0, "s"), features=f) for f in (None, features)
    )
    assert torch.equal(plain, ours)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("compile", [False, True])
def test_a_run_chooses_by_compiled_features_or_in_bf16(compile, precision, monkeypatch):
    seen, dtypes = [], set()
    wrap = lambda function: lambda x: seen.append(len(x)) or function(x)
    for module in ("base", "dm", "gradient"):
        monkeypatch.setattr(f"ddlib.methods.{module}.compiled", wrap)
    monkeypatch.setattr("ddlib.match.gradients.compiled", lambda function: function)
    options = {"batch_real": 6, "init": "kmeans", "sampling": "dream", "compile": compile}
    options["sampling_precision"] = precision
    for method, config in ((DM, Config(**options)), (IDC, GradientConfig(factor=1, **options))):
        made = method(config, arrays(), 2, NET, 0)
        conv = next(part for part in made.net.modules() if isinstance(part, torch.nn.Conv2d))
        conv.register_forward_hook(lambda part, given, found: dtypes.add(found.dtype))
        rows = made.sampler(made.net, 0, generator(0, "s"))
        assert len(seen) == (4 if compile else 0)  # pieces for first images, first batch
        assert dtypes == {torch.bfloat16 if precision == "bf16" else torch.float32}
        made.steps = 1
        dtypes.clear()
        made.begin() if method is DM else made.gradient(0, 1)  # what is matched stays float32
        assert dtypes == {torch.float32} and made.sampler.rows is rows
        seen.clear()
        dtypes.clear()
    with pytest.raises(
        DDError, match="unknown .*sampling_precision 'half'; allowed: float32, bf16"
    ):
        dd.resolve("dream", "digits", 1, "smoke", sampling_precision="half")


@pytest.mark.slow
def test_compiling_leaves_the_choice_alone():
    if not _can_compile():
        pytest.skip("needs a C++ compiler and Python.h for torch.compile")
    data = dd.load("digits", device="cpu")
    # In float32 rounding breaks ties between clusters, and then some of the images are others.
    net, rows = fresh(data).double(), torch.arange(300)
    fast = compiled(net.features)
    torch.testing.assert_close(
        embed_rows(net, data, rows, features=fast), embed_rows(net, data, rows)
    )
    assert torch.equal(
        representatives(net, data, 16, generator(0, "s"), features=fast),
        representatives(net, data, 16, generator(0, "s")),
    )


def test_initial_rows_and_groups_of_classes(monkeypatch):
    data = arrays((40, 25, 31))
    net = fresh(data)
    rows = initial_rows(net, data, 7, generator(0, "s"))
    assert rows.shape == (3, 7) and of_their_class(data, rows)
    assert torch.equal(rows, initial_rows(net, data, 7, generator(0, "s")))
    monkeypatch.setattr("ddlib.match.sampler.LIMIT", 1)  # a class at a time
    assert of_their_class(data, initial_rows(net, data, 7, generator(0, "s")))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"kind": "dreem"},
            "unknown sampling 'dreem'.*did you mean 'dream'.*random, dream, central, boundary",
        ),
        ({"interval": 0}, "interval must be at least 1.*not 0"),
        (
            {"each": 26},
            "cannot choose 26 representatives of the 25 samples of a class; allowed: 1 to 25",
        ),
        ({"each": 9, "pool": 8}, "of the 8 samples"),
        ({"subsample": 4}, "subsample must divide the batch of 6.*not 4"),
        ({"subsample": 0}, "subsample must divide"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(DDError, match=message):
        Sampler(arrays((40, 25, 31)), **{"each": 6, "kind": "dream"} | options)


@pytest.mark.parametrize(("name", "cls"), [("dream", DREAM), ("dream_plus", DREAMPlus)])
@pytest.mark.parametrize("dataset", ["digits", "cifar10", "tinyimagenet", "imagenet10"])
def test_a_preset_has_the_arguments_of_its_class(name, cls, dataset):
    values = dd.resolve(name, dataset, 10, "small").values
    assert {key: values[key] for key in cls.arguments} == cls.arguments


def test_plug_in_names_only_known_keys():
    for host in ("dc", "dsa", "idc", "dm", "mtt", "tesla", "ftd", "datm"):
        if host in dd.METHODS:
            values = [
                dd.resolve(host, "digits", 1, **plug_in(host, plus)).values
                for plus in (False, True)
            ]
            assert values[0] != values[1] and all(v["init"] == "kmeans" for v in values)
    with pytest.raises(DDError, match="unknown host 'herding'.*dc, dsa, idc, dm, mtt"):
        plug_in("herding")


def dm(data: Dataset, **config) -> DM:
    return DM(Config(**{"batch_real": 6} | config), data, 2, NET, 0)


def after(method: DM, steps: int) -> torch.Tensor:
    for _ in range(steps):
        method.step()
    return method.images


def test_dm_matches_the_representatives_of_its_network():
    data = arrays()
    method, net = dm(data, sampling="dream", interval=2, init="kmeans"), fresh(data)
    initialise(net, generator(0, "dm", "network", 0))  # the first step's network
    expected = representatives(net, data, 2, generator(0, "dm", "init"))
    assert torch.equal(method.images, data.batch("train", expected.flatten()))
    method.step()
    assert torch.equal(
        method.sampler.rows, representatives(net, data, 6, generator(0, "dm", "real", 0))
    )
    assert not torch.equal(after(dm(data), 3), after(dm(data, sampling="dream"), 3))


def test_dm_resumes_between_two_clusterings():
    data, options = arrays(), {"sampling": "dream", "interval": 4, "match": "both"}
    half, other = dm(data, **options), dm(data, **options)
    after(half, 3)
    other.load_state_dict({key: value.clone() for key, value in half.state_dict().items()})
    assert torch.equal(after(other, 3), after(dm(data, **options), 6))
    assert "rows" not in dm(data).state_dict()


def test_dm_plus_adds_the_gradient_term():
    data = arrays()
    methods = {
        match: dm(data, match=match, augment="none") for match in ("feature", "gradient", "both")
    }
    losses = {match: float(method.step()["loss"]) for match, method in methods.items()}
    assert losses["both"] == pytest.approx(losses["feature"] + losses["gradient"], rel=1e-5)
    velocity = {match: method.velocity for match, method in methods.items()}
    torch.testing.assert_close(
        velocity["both"], velocity["feature"] + velocity["gradient"], rtol=1e-3, atol=1e-6
    )
    # the gradient term by hand
    net, start = methods["both"].net, dm(data, augment="none").images
    real = data.batch("train", data.sample(6, generator(0, "dm", "real", 0)).flatten()).unflatten(
        0, (3, 6)
    )
    found = [
        class_gradients(
            net,
            x,
            torch.arange(3)[:, None].expand(-1, x.shape[1]),
            matched(net, "conv"),
            engine="loop",
        )
        for x in (real, start.unflatten(0, (3, 2)))
    ]
    by_hand = sum((a - b).square().sum() for a, b in zip(*found, strict=True))
    assert losses["gradient"] == pytest.approx(float(by_hand) / 3, rel=1e-4)
    with pytest.raises(DDError, match="BatchNorm.*norm=in"):
        DM(Config(match="both", batch_real=6), data, 2, NET + ",norm=bn", 0)


def test_an_experts_batch_of_representatives_keeps_its_labels():
    data = arrays()
    fetch = expert_batches(data, Pixels(), 10, generator(0, "s"), interval=2)
    index = torch.arange(0, 120, 12)
    found = fetch(index)
    rows = [
        (data.batch("train", slice(None)) == image).all((1, 2, 3)).nonzero()[0, 0]
        for image in found
    ]
    assert torch.equal(data.labels["train"][torch.stack(rows)], data.labels["train"][index])
    assert len(set(map(int, rows))) == len(rows)  # ten images, four a class and none twice
    assert torch.equal(found, fetch(index)) and not torch.equal(
        found, fetch(index)
    )  # renewed at the third call


def test_mtt_with_dream(results, monkeypatch):
    monkeypatch.setenv("DDLIB_EXPERTS", str(results / "experts"))
    data = arrays()
    recipe = ExpertRecipe(epochs=2, batch=12)
    assert "sampling" not in recipe.facts and folder(data, NET, recipe) != folder(
        data, NET, ExpertRecipe(epochs=2, batch=12, sampling="dream")
    )
    options = {
        "iterations": 2,
        "experts": 1,
        "expert_total": 3,
        "max_start": 1,
        "syn_steps": 2,
        "networks": 1,
        "eval_epochs": 1,
        "expert_batch": 12,
        "backbone": NET,
        "progress": False,
    }
    run = dd.run("mtt", "arrays", ipc=2, data=data, teach=True, **plug_in("mtt", True), **options)
    assert (
        run.record["values"]["init"] == "kmeans"
        and len(list((results / "experts").rglob("*.safetensors"))) == 1
    )
    plain = train_experts(data, NET, ExpertRecipe(3, 0.05, 12, "none"), 1, progress=False)
    dream = train_experts(
        data, NET, ExpertRecipe(3, 0.05, 12, "none", sampling="dream"), 1, progress=False
    )
    assert plain != dream and plain[0].read_bytes() != dream[0].read_bytes()
    with pytest.raises(DDError, match="init_epoch 4 is beyond"):
        dd.run("mtt", "arrays", ipc=2, data=data, **plug_in("mtt"), init_epoch=4, **options)


def test_the_benchmarks_rows():
    rows = bench.clustering(bench.pool(60, "convnet:width=64"), 4, turns=1, defaults=False)
    assert rows[0]["over ours"] == rows[0]["inertia over ours"] == 1 and len(rows) >= 2
    assert all(row["seconds"] > 0 and 0.8 < row["inertia over ours"] < 1.2 for row in rows)


def test_the_rows_of_the_choice(monkeypatch):
    monkeypatch.setattr(bench_dream, "compiled", lambda function: function)
    rows = bench_dream.choice(60, 8, torch.device("cpu"), 1, "convnet:width=8")
    ways = ["plain", "channels last", "compiled", "compiled, bf16"]
    assert [row["what"].split(": ")[1] for row in rows] == ways
    assert all(row["seconds"] > 0 and row["times faster"] > 0 for row in rows)
    assert rows[0]["same images"] == 1 and all(row["same images"] > 0.5 for row in rows)
