"""The papers' evaluation and the artefact that carries its protocol."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from ddlib.config import resolve
from ddlib.core import DDError, generator
from ddlib.data.dataset import from_arrays, load
from ddlib.distilled import Synthetic
from ddlib.engine.run import run as distil
from ddlib.files import save_tensors
from ddlib.methods.frepo import FRePo
from ddlib.nets.build import build
from ddlib.recipe import (
    PRECISIONS,
    PROTOCOLS,
    EvaluationProtocol,
    Recipe,
    protocol,
    register_protocol,
)
from ddlib.train import evaluate as evaluation
from ddlib.train.evaluate import Evaluation, evaluate
from ddlib.train.loop import lowered, predict, train

BACKBONE = "convnet:width=4"


@pytest.fixture(scope="module")
def digits():
    return load("digits", device="cpu")


@pytest.fixture(scope="module")
def syn(digits):
    rows = digits.sample(2, generator(0)).flatten()
    return Synthetic.of(
        digits,
        digits.batch("train", rows),
        digits.labels["train"][rows],
        protocol("dsa", epochs=6, augment="crop_scale"),
        BACKBONE,
    )


def test_networks_differ_and_are_reproducible(syn, digits):
    three = evaluate(syn, digits, networks=3)
    assert len(set(three.accuracies)) == 3 and all(0 <= a <= 100 for a in three.accuracies)
    assert evaluate(syn, digits, networks=3).accuracies == three.accuracies
    assert (
        evaluate(syn, digits, networks=2).accuracies == three.accuracies[:2]
    )  # whatever else is evaluated
    assert evaluate(syn, digits, networks=3, seed=1).accuracies != three.accuracies
    assert three.backbone == "convnet:width=4" and three.recipe is syn.recipe and three.seconds > 0


def test_networks_start_from_weights_of_their_own(syn, digits, monkeypatch):
    starts, real = [], evaluation.train

    def train(net, *args, **options):
        starts.append(net.classifier.weight.detach().clone())
        return real(net, *args, **options)

    monkeypatch.setattr(evaluation, "train", train)
    evaluate(syn, digits, networks=2)
    evaluate(syn, digits, networks=2)
    assert torch.equal(starts[0], starts[2]) and torch.equal(starts[1], starts[3])
    assert not torch.equal(starts[0], starts[1])


def test_batchnorm_statistics_do_not_leak_into_the_next_network(syn, digits):
    options = {"backbone": "convnet:width=4,norm=bn", "recipe": Recipe(epochs=2)}
    first = evaluate(syn, digits, networks=1, **options)
    assert evaluate(syn, digits, networks=1, **options).accuracies == first.accuracies


def test_a_set_of_real_images_teaches_something(syn, digits):
    long = evaluate(
        syn,
        digits,
        networks=1,
        backbone="convnet:width=16",
        recipe=protocol("dsa", epochs=60, augment="crop"),
    )
    assert long.mean > 40  # chance is 10
    assert long.backbone == "convnet:width=16" and long.recipe.epochs == 61


def test_other_splits(syn, digits):
    data = digits.minival()
    assert (
        evaluate(syn, data, networks=1, split="val").accuracies
        != evaluate(syn, data, networks=1).accuracies
    )
    with pytest.raises(DDError, match="unknown split 'dev'"):
        evaluate(syn, data, networks=1, split="dev")


def test_the_spread_is_the_population_one():
    result = Evaluation((1.0, 2.0, 6.0), Recipe(), "convnet", 1.0)
    assert result.mean == 3 and result.std == pytest.approx((14 / 3) ** 0.5)
    assert Evaluation((5.0,), Recipe(), "convnet", 1.0).std == 0
    assert str(result) == "3.0 ± 2.2 % (3 x convnet, dsa protocol, 1001 epochs)"


def test_protocols():
    assert protocol("dsa") == Recipe("dsa", 1001, 0.01, 0.9, 5e-4, 256, (502,), 0.1)
    assert protocol("dm") == replace(protocol("dsa"), name="dm")
    assert protocol("dc") == Recipe("dc", 301, 0.01, 0.9, 5e-4, 256, (152,), 0.1, "none")
    assert protocol("dsa", epochs=300, augment="crop") == Recipe(
        "dsa", 301, drops=(152,), augment="crop"
    )
    assert protocol("dc", augment="crop").augment == "none"  # DC evaluates without
    idc = Recipe(
        "idc",
        1000,
        batch=64,
        drops=(666, 833),
        drop=0.2,
        reset=False,
        cutmix=0.5,
        augment="color+flip+crop_scale_rotate",
        tests=(250, 500, 750, 1000),
    )
    assert protocol("idc") == idc and protocol("idc", epochs=2).tests == (1, 1, 1, 2)
    assert protocol("idc", mirror=False).augment == "color+crop_scale_rotate"
    assert protocol("frepo", mirror=False).augment == "frepo:color_crop_rotate_translate_cutout"
    frepo = protocol("frepo", epochs=2000)
    assert (frepo.epochs, frepo.lr, frepo.batch, frepo.optimiser, frepo.loss) == (
        2000,
        3e-4,
        500,
        "adam",
        "mse",
    )
    assert (frepo.warmup, frepo.cosine, frepo.drops) == (500, 0.01, ())
    for wrong, message in (
        ({"name": "dcc"}, r"unknown protocol 'dcc' \(did you mean 'dc'\?\); allowed: dc, dsa"),
        ({"name": "dsa", "epochs": 0}, "at least 1, not 0"),
        ({"name": "dsa", "augment": "crop_blur"}, "unknown augmentation 'blur'"),
    ):
        with pytest.raises(DDError, match=message):
            protocol(**wrong)


def arrays(test: int = 6, offset: int = 0, **options):
    rng = np.random.default_rng(0)
    images = rng.integers(offset, offset + 100, (20, 8, 8), dtype=np.uint8)
    return from_arrays(
        images, np.arange(20) % 10, images[:test], np.arange(test) % 10, device="cpu", **options
    )


def of(data) -> Synthetic:
    return Synthetic.of(
        data, data.batch("train", range(10)), data.labels["train"][:10], Recipe(epochs=1), BACKBONE
    )


def test_a_set_and_data_that_do_not_belong_together(syn, digits):
    with pytest.raises(DDError, match="normalised with mean"):
        evaluate(of(arrays(classes=digits.classes)), digits)
    with pytest.raises(DDError, match="normalised with mean"):
        evaluate(of(arrays()), arrays(offset=20))
    with pytest.raises(DDError, match=r"from digits \(10 classes.*cannot be used with arrays"):
        evaluate(syn, arrays(classes=list("abcdefghij")))
    with pytest.raises(
        DDError, match=r"images \(1, 8, 4\)\) cannot be used with digits .*images \(1, 8, 8\)"
    ):
        evaluate(replace(syn, images=syn.images[..., :4]), digits)
    whitened = load("digits", device="cpu", zca="mtt")
    for one, data in (
        (syn, whitened),
        (of(whitened), digits),
        (of(whitened), load("digits", device="cpu", zca="frepo")),
    ):
        with pytest.raises(DDError, match="the set's ZCA is .*load the data as the run did"):
            evaluate(one, data)
    assert evaluate(of(whitened), whitened, networks=1).mean >= 0


def test_nothing_to_evaluate_on(digits, syn):
    with pytest.raises(DDError, match="arrays has no test images"):
        evaluate(of(arrays(test=0)), arrays(test=0))
    with pytest.raises(DDError, match="networks must be an integer of at least 1, not 0"):
        evaluate(syn, digits, networks=0)


@pytest.fixture
def rich(syn) -> Synthetic:
    """Soft labels, snapshots, a spec and a recipe that is no protocol's."""
    soft = torch.nn.functional.one_hot(syn.labels, 10).float() * 0.9 + 0.01
    return replace(
        syn,
        labels=soft,
        spec={"method": "dm", "ipc": 2, "values": {"lr_img": 1.5}},
        recipe=Recipe("own", 7, 0.123, drops=(3, 5), augment="none"),
        snapshots={10: syn.images + 1, 0: syn.images, 9: syn.images * 2},
    )


def test_round_trip(rich, tmp_path):
    path = rich.save(tmp_path / "deep" / "set.safetensors")
    again = Synthetic.load(path)
    for name in ("images", "labels", "mean", "std"):
        assert (
            torch.equal(getattr(again, name), getattr(rich, name))
            and getattr(again, name).dtype == torch.float32
        )
    assert list(again.snapshots) == [0, 9, 10] and torch.equal(
        again.snapshots[9], rich.snapshots[9]
    )
    for name in ("dataset", "classes", "recipe", "backbone", "zca", "spec", "ipc"):
        assert getattr(again, name) == getattr(rich, name)
    assert [p.name for p in path.parent.iterdir()] == ["set.safetensors"]
    assert again.save(tmp_path / "b.safetensors").read_bytes() == path.read_bytes()


def test_a_loaded_set_evaluates_as_the_one_in_memory(syn, rich, digits, tmp_path):
    for one in (syn, rich):
        again = Synthetic.load(one.save(tmp_path / "set.safetensors"))
        assert (
            evaluate(again, digits, networks=1).accuracies
            == evaluate(one, digits, networks=1).accuracies
        )


def test_pixels_undo_the_normalisation(syn, digits):
    rows = digits.sample(2, generator(0)).flatten()
    torch.testing.assert_close(syn.pixels(), digits.images["train"][rows].float() / 255)
    assert (
        0 <= float(syn.pixels(images=syn.images * 9).min())
        and float(syn.pixels(images=syn.images * 9).max()) <= 1
    )
    whitened = load("digits", device="cpu", zca="mtt")
    with pytest.raises(DDError, match="pass its dataset"):
        of(whitened).pixels()
    torch.testing.assert_close(
        of(whitened).pixels(whitened),
        whitened.images["train"][:10].float() / 255,
        atol=1e-3,
        rtol=0,
    )


def test_damaged_files_are_refused(rich, tmp_path):
    path = rich.save(tmp_path / "set.safetensors")
    whole = path.read_bytes()
    for size in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(
            DDError, match="set.safetensors is damaged or not ddlib's .*delete it and run again"
        ):
            Synthetic.load(path)
    for at in (-1, -1000, len(whole) // 2):
        altered = bytearray(whole)
        altered[at] ^= 1
        path.write_bytes(altered)
        with pytest.raises(
            DDError, match="set.safetensors was altered: its checksum does not match"
        ):
            Synthetic.load(path)
    path.write_bytes(whole)
    assert Synthetic.load(path).ipc == 2


def test_foreign_files_are_refused(tmp_path):
    from safetensors.torch import save_file

    with pytest.raises(DDError, match="no distilled set at .*none.safetensors"):
        Synthetic.load(tmp_path / "none.safetensors")
    save_file({"images": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    with pytest.raises(DDError, match="not ddlib's"):
        Synthetic.load(tmp_path / "foreign.safetensors")
    (tmp_path / "text.safetensors").write_text("not tensors at all")
    with pytest.raises(DDError, match="not ddlib's"):
        Synthetic.load(tmp_path / "text.safetensors")
    with pytest.raises(DDError, match="not a distilled set"):  # a checkpoint, say
        Synthetic.load(
            save_tensors(
                tmp_path / "other.safetensors", {"method.images": torch.zeros(1)}, {"step": 3}
            )
        )


def test_the_best_epoch_and_the_validation_split_are_noted_beside_the_last_epoch():
    data = arrays(test=20).minival(0.5)
    syn = replace(
        of(data), recipe=Recipe("x", 4, batch=10, drops=(), augment="none", tests=(1, 2, 4))
    )
    result = evaluate(syn, data, networks=2)
    assert set(result.extras) == {"best", "val"} and all(
        len(v) == 2 for v in result.extras.values()
    )
    assert all(
        best >= last for best, last in zip(result.extras["best"], result.accuracies, strict=True)
    )
    plain = evaluate(replace(syn, recipe=replace(syn.recipe, tests=())), data, networks=2)
    assert plain.accuracies == result.accuracies  # looking changes nothing
    assert plain.extras == {"val": evaluate(syn, data, networks=2, split="val").accuracies}


def test_bf16_trains_float32_weights_on_nearly_the_same_way(syn, digits):
    """The same first weights and order; logits and weights differ by bf16's rounding, and are float32 outside."""
    nets = {}
    for precision in PRECISIONS:
        net = build("convnet:width=8", digits.shape, 10)
        forward, seen = lowered(net.forward, digits.device, precision), []
        net.body[0].register_forward_hook(lambda *call, seen=seen: seen.append(call[2].dtype))
        recipe = Recipe(epochs=5, drops=(), augment="none")
        train(net, syn.images, syn.labels, recipe, generator(0), forward=forward)
        logits = predict(net, digits, forward=forward)
        assert set(seen) == {torch.bfloat16 if precision == "bf16" else torch.float32}
        assert logits.dtype == torch.float32 and net.classifier.weight.grad.dtype == torch.float32
        nets[precision] = torch.cat([p.flatten() for p in net.parameters()]), logits
    (weights, logits), (low_weights, low_logits) = nets["float32"], nets["bf16"]
    assert 0 < (low_weights - weights).norm() < 0.01 * weights.norm()
    assert 0 < (low_logits - logits).norm() < 0.05 * logits.norm()


def test_bf16_evaluates_by_the_runs_key(syn, digits, tmp_path):
    with pytest.raises(DDError, match="unknown precision 'fp8'; allowed: float32, bf16"):
        evaluate(syn, digits, networks=1, precision="fp8")
    with pytest.raises(DDError, match="unknown preset eval_precision 'half'; allowed: float32"):
        resolve("random", "digits", 1, eval_precision="half")
    plain = resolve("random", "digits", 1)
    assert resolve("random", "digits", 1, eval_precision="float32").name == plain.name
    low = {"eval_precision": "bf16", "networks": 2, "eval_epochs": 3, "compile": False}
    assert resolve("random", "digits", 1, **low).name != plain.name
    run = distil("random", "digits", ipc=1, results=tmp_path, progress=False, **low)
    data, chosen = load("digits"), run.synthetic
    networks = run.record["accuracy"]["last"]["networks"]
    both = [evaluate(chosen, data, networks=2, precision=p).accuracies for p in PRECISIONS]
    assert networks == list(both[1]) and both[0] != both[1]


def test_another_package_may_register_a_protocol(monkeypatch):
    monkeypatch.setattr("ddlib.recipe.PROTOCOLS", dict(PROTOCOLS))
    mine = EvaluationProtocol(lambda name, epochs: Recipe(name, epochs, augment="none"), epochs=7)
    register_protocol("mine", mine)
    register_protocol("mine", mine)  # a module may be imported twice
    assert protocol("mine") == Recipe("mine", 7, augment="none")
    assert resolve("dm", "digits", 1, protocol="mine", eval_epochs=3).recipe.epochs == 3
    with pytest.raises(DDError, match="the protocol name 'dsa' is taken"):
        register_protocol("dsa", mine)


@pytest.mark.parametrize(
    "method, other, augment",
    [
        ("dc", "dsa", "color_crop_cutout_scale_rotate"),
        ("idc", "dsa", "color_crop_cutout_scale_rotate"),
        ("frepo", "dsa", "color_crop_cutout_scale_rotate"),
        ("dc", "idc", "color+crop_scale_rotate"),
        ("dsa", "dc", "dc:crop_scale_rotate"),
    ],
)
def test_another_protocol_brings_its_own_augmentation(method, other, augment):
    """The preset's `eval_augment` belongs to the preset's protocol."""
    assert resolve(method, "mnist", 1, "paper").recipe.augment != augment
    found = resolve(method, "mnist", 1, "paper", protocol=other)
    assert found.recipe.augment == augment
    plain = resolve("random", "mnist", 1, "paper", protocol=other)
    assert found.recipe == plain.recipe
    asked = resolve(method, "mnist", 1, "paper", protocol=other, eval_augment="crop")
    assert asked.recipe.augment == "crop"


@pytest.mark.parametrize("method, share", [("dsa", 0.5), ("dc", 0.5), ("idc", 1.0)])
def test_only_idc_brings_its_share_of_cutmix(method, share, tmp_path):
    changes = {"cutmix": 1.0} if method == "idc" else {}
    few = {"backbone": "convnet:width=4", "iterations": 0, "eval_epochs": 1, "networks": 1}
    made = distil(
        method, "digits", ipc=1, results=tmp_path, progress=False, protocol="idc", **few, **changes
    )
    assert made.synthetic.recipe.cutmix == share == made.record["recipe"]["cutmix"]


def test_labels_that_are_no_distribution_meet_no_cross_entropy(tmp_path, monkeypatch):
    """Before the first step, where a run would fail after the last one."""
    few = {"backbone": "convnet:width=4", "iterations": 2, "eval_epochs": 1, "networks": 1}
    options = {"ipc": 1, "results": tmp_path, "progress": False, **few}
    monkeypatch.setattr(FRePo, "step", None)
    with pytest.raises(DDError, match=r"dsa protocol trains by cross-entropy.*hard=True"):
        distil("frepo", "digits", protocol="dsa", **options)
    monkeypatch.undo()
    made = distil("frepo", "digits", **options)
    with pytest.raises(DDError, match="no distributions over the classes"):
        made.transfer(networks=1, protocol="dsa")
    assert made.transfer(networks=1, protocol="dsa", hard=True)["hard"]


def test_a_set_changes_only_what_its_protocol_has():
    assert protocol("mtt").tuned({"lr": 0.5}) == replace(protocol("mtt"), lr=0.5)
    assert protocol("mtt").tuned({"cutmix": 1.0}) == protocol("mtt")
    assert protocol("idc").tuned({"cutmix": 1.0}).cutmix == 1.0
    with pytest.raises(DDError, match="unknown change of the recipe 'rate'"):
        protocol("mtt").tuned({"rate": 0.5})
