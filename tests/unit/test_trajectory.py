"""The methods around the gradient: draws, updates, labels, windows, presets, and that each beats random images."""

import shlex
from dataclasses import replace
from statistics import fmean
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import yaml

import ddlib as dd
from ddlib.cli import parser
from ddlib.config import PRESETS
from ddlib.core import DDError, generator
from ddlib.data.dataset import from_arrays
from ddlib.engine.run import _halved as halved
from ddlib.experts import Experts, train_experts
from ddlib.files import load_tensors, save_tensors
from ddlib.match.trajectory import FlatNet, match, parse_engine
from ddlib.methods import trajectory
from ddlib.methods.trajectory import DATM, FTD, TESLA, Config, Trajectory, soft_cross_entropy
from ddlib.nets.build import build

NET, OPS = "convnet:width=8", "color_crop_cutout_scale_rotate"
CONFIG = Config(
    experts=2,
    expert_total=4,
    expert_lr=0.05,
    expert_batch=64,
    augment=OPS,
    max_start=3,
    expert_epochs=1,
    syn_steps=5,
    lr_img=30.0,
    lr_teacher=0.05,
    lr_lr=1e-4,
)
SMALL = {
    "backbone": NET,
    "experts": 2,
    "expert_total": 4,
    "max_start": 3,
    "expert_epochs": 1,
    "syn_steps": 5,
    "iterations": 4,
    "eval_epochs": 2,
    "networks": 1,
    "snapshots": 0,
    "device": "cpu",
    "progress": False,
}


@pytest.fixture(scope="module")
def data():
    return dd.load("digits", device="cpu")


@pytest.fixture(scope="module", autouse=True)
def place(tmp_path_factory, data):
    """Experts for all tests of this file; those of `CONFIG` and of `SMALL` are the same ones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DDLIB_EXPERTS", str(tmp_path_factory.mktemp("experts")))
        train_experts(data, NET, CONFIG.expert_recipe, 2, progress=False)
        yield


def work(data, seed=0, ipc=1, **changes) -> Trajectory:
    cls = {"learned": DATM, "assigned": TESLA}.get(changes.get("labels"), FTD)
    return cls(replace(CONFIG, **changes), data, ipc, NET, seed)


def tensors(method: Trajectory) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in method.state_dict().items()}


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_steps_reduce_the_matching_loss(data):
    method = work(data)
    before = method.mean_loss()
    for _ in range(15):
        method.step()
    assert method.mean_loss() < 0.9 * before


def test_one_update_by_hand(data):
    """Gradients averaged over two segments; v <- 0.5 v + g for images and beta, 0.9 for the logits."""
    method = work(data, labels="learned", segments=2, lr_label=2.0)
    method.step()
    before, found = tensors(method), []
    for k in range(2):
        segment, labels = method.segment(generator(0, "trajectory", 1, k))
        found.append(
            match(
                method.net,
                segment,
                method.raw,
                labels,
                method.rate.expand(5),
                criterion=soft_cross_entropy,
            )
        )
    method.step()
    for key, momentum, lr, gradients in (
        ("raw", 0.5, 30.0, [m.images for m in found]),
        ("rate", 0.5, 1e-4, [m.rates.sum() for m in found]),
        ("logits", 0.9, 2.0, [m.labels for m in found]),
    ):
        velocity = momentum * before[f"velocity_{key}"] + sum(gradients) / 2
        torch.testing.assert_close(getattr(method, key), before[key] - lr * velocity)
        assert not torch.equal(getattr(method, key), before[key])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"labels": "assigned", "gradient": "tesla"},
        {"ema": 0.9},
        {
            "labels": "learned",
            "lr_label": 2.0,
            "init": "correct",
            "threshold": 0.9,
            "grow_from": 1,
            "grow_until": 6,
            "batch_syn": 4,
        },
    ],
)
def test_a_restored_state_goes_on_to_the_same_bytes(data, tmp_path, changes):
    whole, first = work(data, **changes), work(data, **changes)
    for _ in range(6):
        whole.step()
    for _ in range(3):
        first.step()
    path = save_tensors(tmp_path / "state.safetensors", first.state_dict(), {})
    second = work(data, **changes)
    second.load_state_dict(load_tensors(path, "state", "")[0])
    assert same(first.state_dict(), second.state_dict())
    for _ in range(3):
        second.step()
    assert same(whole.state_dict(), second.state_dict()) and second.steps == 6
    assert torch.equal(whole.images, second.images) and torch.equal(
        whole.result().labels, second.result().labels
    )


def test_beta_stays_positive_and_is_refused_where_it_would_not(data):
    method = work(data, lr_lr=1e4, clip_rate=0.05)
    for _ in range(4):
        before = float(method.rate)
        method.velocity["rate"] += 1e3  # far enough to turn beta negative at once
        method.step()
        assert float(method.rate) == pytest.approx(0.95 * before)
    free = work(data, lr_lr=1e4, clip_rate=0.0)
    free.velocity["rate"] += 1e3
    before = tensors(free)
    with pytest.raises(
        DDError, match=r"step size beta would turn from 0.05 to -.* at step 1: lower lr_lr"
    ):
        free.step()
    assert same(free.state_dict(), before)


def test_an_update_that_is_not_finite_changes_nothing(data):
    method = work(data, lr_img=1e45)
    before = tensors(method)
    with pytest.raises(DDError, match="would not be finite after step 1: lower lr_img"):
        method.step()
    assert same(method.state_dict(), before)


def test_a_loss_that_is_not_finite_stops_the_run_at_the_last_good_state(results):
    with pytest.raises(
        DDError, match=r"matching loss is nan at step 2: lower lr_img .*state, step 1, is kept in"
    ):
        dd.run("mtt", "digits", ipc=1, lr_img=1e30, **SMALL)
    [path] = (results / "smoke" / "checkpoints").iterdir()
    kept, header = load_tensors(path, "checkpoint", "")
    assert header["step"] == 1 and kept["method.count"].tolist() == [1, 0]
    assert all(torch.isfinite(value).all() for value in kept.values())
    assert not list(results.rglob("*.json"))


def test_the_learned_rate_travels_with_the_set(results):
    done = dd.run("mtt", "digits", ipc=1, lr_lr=1e-3, **SMALL)
    syn = done.synthetic
    assert (
        syn.recipe.lr
        == done.record["extra"]["beta"]
        == pytest.approx(done.record["history"][-1]["beta"])
    )
    assert abs(syn.recipe.lr - 0.05) > 1e-3 and syn.recipe.name == "mtt"
    assert done.record["extra"]["mean loss after"] < done.record["extra"]["mean loss before"]
    assert (
        dd.run("mtt", "digits", ipc=1, lr_lr=1e-3, eval_lr=0.02, **SMALL).synthetic.recipe.lr
        == 0.02
    )


def test_a_run_without_experts_names_the_command(results, monkeypatch):
    monkeypatch.setenv("DDLIB_EXPERTS", str(results / "none"))
    options = SMALL | {
        "iterations": 1,
        "lr_lr": 1e-7,
        "zca": "mtt",
    }  # what a shell or YAML could misread
    for wanted in ({"augment": "none"}, {"zca": "", "eval_lr": 0.1}):
        with pytest.raises(
            DDError, match="make the experts first: python -m ddlib experts ftd --dataset digits"
        ) as error:
            dd.run("ftd", "digits", ipc=1, **options | wanted)
        args = parser().parse_args(shlex.split(str(error.value).partition("python -m ddlib ")[2]))
        args.call(args)  # the very command, and the run works
        assert dd.run("ftd", "digits", ipc=1, **options | wanted).accuracy > 0
    with pytest.raises(DDError, match="needs no experts"):
        dd.prepare("dm", "digits", ipc=1, device="cpu")


# DATM and TESLA on experts that are made up: three classes, and networks that answer the same to every image.


def blocks():
    labels = torch.arange(3).repeat_interleave(20)
    images = torch.randint(256, (60, 1, 8, 8), generator=generator(0)).to(torch.uint8)
    return from_arrays(images, labels, images[::5], labels[::5], device="cpu")


def made_up(monkeypatch, biases, epochs=4, noise=0.0):
    """Experts whose weights are noise, but for the classifier's bias in the last epoch."""
    net = FlatNet(build(NET, (1, 8, 8), 3))
    weights = noise * torch.randn(len(biases), epochs + 1, net.size, generator=generator(1))
    weights[:, -1] = 0
    weights[:, -1, -3:] = torch.tensor(biases)
    monkeypatch.setattr(trajectory, "load_experts", lambda *_: Experts(list(weights)))
    return weights


def test_window_grows_by_the_formula(monkeypatch):
    made_up(monkeypatch, [[0.0, 0.0, 0.0]], epochs=30, noise=0.1)
    config = replace(
        CONFIG,
        labels="learned",
        experts=1,
        expert_total=30,
        min_start=3,
        max_start=20,
        grow_from=10,
        grow_until=1000,
        syn_steps=1,
    )
    method = DATM(config, blocks(), 1, NET, 0)
    for step, window in (
        (0, 10),
        (99, 10),
        (100, 11),
        (250, 12),
        (999, 19),
        (1000, 20),
        (5000, 20),
    ):
        method.steps = step
        assert method.last_start() == window
    for step, stop in ((0, 10), (5000, 20)):
        method.steps, starts = step, set()
        for k in range(300):
            segment, _ = method.segment(generator(k, "window"))
            starts |= {e for e in range(31) if torch.equal(segment.start, method._theta(0, e))}
        assert starts == set(range(3, stop))
    fixed = DATM(replace(config, grow_from=0), blocks(), 1, NET, 0)
    assert fixed.last_start() == 20


def test_threshold_skips_images_labels_and_beta(data, monkeypatch):
    method = work(data, labels="learned", lr_label=2.0, threshold=1e-3, ema=0.5)
    before = tensors(method)
    report = method.step()
    after = tensors(method)
    assert (
        report["skipped"] == 1
        and after.pop("count").tolist() == [1, 1]
        and before.pop("count").tolist() == [0, 0]
    )
    assert same(before, after)
    match, nan = DATM.match, torch.tensor(torch.nan)
    monkeypatch.setattr(DATM, "match", lambda *given: replace(match(*given), loss=nan))
    with pytest.raises(DDError, match="the matching loss is nan at step 1"):
        work(data, labels="learned", lr_label=2.0).step()
    method = work(data, labels="learned", lr_label=2.0, threshold=1e-3)
    report = method.step()
    assert (report["skipped"], float(report["loss"])) == (1, pytest.approx(1e-3))
    monkeypatch.undo()
    method = work(data, labels="learned", lr_label=2.0, threshold=1e3, ema=0.5)
    before = tensors(method)
    assert method.step()["skipped"] == 0
    method.steps, method.skipped = 99, 95
    method.config = replace(method.config, threshold=1e-3)
    with pytest.warns(UserWarning, match="96 of the first 100 updates were skipped"):
        method.step()
    assert all(not torch.equal(before[key], value) for key, value in tensors(method).items())


def test_label_logits_are_the_mean_over_the_experts_that_are_right(monkeypatch):
    biases = [
        [3.0, 1.0, 0.0],
        [5.0, -2.0, 1.0],
        [0.0, 4.0, 2.0],
    ]  # the answers: class 0, class 0, class 1
    made_up(monkeypatch, biases)
    method = DATM(replace(CONFIG, experts=3, labels="learned"), blocks(), 2, NET, 0)
    wanted = (
        [[4.0, -0.5, 0.5]] * 2 + [[0.0, 4.0, 2.0]] * 2 + [[0.0, 0.0, 5.0]] * 2
    )  # class 2: none is right
    torch.testing.assert_close(method.logits, torch.tensor(wanted))
    torch.testing.assert_close(method.result().labels, torch.tensor(wanted).softmax(1))


def test_correct_images_are_those_that_an_expert_gets_right(data):
    """Of the whole class in random order; those of the next expert, and then others, where one is right too seldom."""
    method = work(data, ipc=60, init="correct", labels="learned", seed=1)
    size = int(data.class_sizes().min())
    pool = data.sample(size, generator(1, "trajectory", "init"))
    images = data.batch("train", pool.flatten())
    first, second = (
        method._logits(images, e, -1).argmax(1).view_as(pool) == torch.arange(10)[:, None]
        for e in (1, 0)
    )
    assert (first.sum(1) < 60).any()
    assert (first[:, :110].sum(1) < 60)[first.sum(1) >= 60].any()  # the whole class is looked at
    for c in range(10):
        rows = range(size)
        rest = [k for k in rows if not first[c, k]]
        order = [k for k in rows if first[c, k]] + sorted(rest, key=lambda k: not second[c, k])
        wanted = data.batch("train", pool[c, order[:60]])
        torch.testing.assert_close(method.raw[60 * c : 60 * c + 60], wanted)


def test_ema_formula(data):
    method = work(data, ema=0.8)
    average = method.raw.clone()
    for _ in range(3):
        method.step()
        average = 0.8 * average + 0.2 * method.raw
    torch.testing.assert_close(method.images, average)
    assert (method.images - method.raw).abs().max() > 1e-3
    assert torch.equal(work(data).images, work(data).raw)


def test_the_recorded_loss_is_that_of_the_result(data):
    """With EMA the average is what is evaluated; measuring changes nothing of the state."""
    method = work(data, ema=0.9)
    for _ in range(5):
        method.step()
    before, plain = tensors(method), method.mean_loss()
    record = method.summary()
    assert same(before, tensors(method)) and record["mean loss after"] != plain
    method.raw = method.average
    assert record["mean loss after"] == method.mean_loss()
    assert record["mean loss before"] == work(data, ema=0.9).mean_loss()


def test_radius_and_weight_make_no_other_run_of_plain_experts():
    def name(**options) -> str:
        return dd.resolve("ftd", "digits", 1, **options).name

    assert name(flat="plain", rho=0.1, alpha=0.5) == name(flat="plain") and name(
        flat="sam"
    ) != name(flat="plain")
    assert (
        len({name(flat="sam", rho=0.1), name(flat="sam", rho=0.2), name(flat="sam", alpha=0.5)})
        == 3
    )


def test_tesla_labels_come_from_the_segments_target(data):
    method = work(data, labels="assigned", gradient="tesla")
    assert torch.equal(method.result().labels, torch.arange(10))  # before the first step
    method.step()
    for k in range(4):
        segment, labels = method.segment(generator(k, "labels"))
        torch.testing.assert_close(labels, method.net(segment.target, method.raw).softmax(1))
    last = torch.stack(
        [method.net(weights[3], method.raw).softmax(1) for weights in method.experts.weights]
    )
    torch.testing.assert_close(
        method.result().labels, last.mean(0)
    )  # epoch max_start - 1 + expert_epochs = 3


def test_tesla_asks_the_teacher_only_about_images_that_a_segment_trains_on(data):
    method = work(data, ipc=3, labels="assigned", gradient="tesla", batch_syn=4, syn_steps=3)
    segment, labels = method.segment(generator(0, "labels"))
    rows = torch.cat(segment.batches)
    assert len(rows) == rows.unique().numel() < len(method.raw)
    wanted = method.net(segment.target, method.raw).softmax(1)
    torch.testing.assert_close(labels[rows], wanted[rows])
    labels[rows] = 0
    assert not labels.any()


@pytest.mark.parametrize(
    "changes, images",
    [
        ({}, 20),
        ({"batch_syn": 8}, 8),
        ({"batch_syn": 8, "micro": 3}, 3),
        ({"batch_syn": 50}, 20),
        ({"gradient": "unroll"}, 0),  # whose graph no smaller pass makes smaller
    ],
)
def test_a_retry_for_want_of_memory_begins_at_the_images_of_one_pass(data, changes, images):
    method = work(data, ipc=2, **changes)
    assert method.at_once == images
    state = SimpleNamespace(part="distill", method=method, smaller={})
    state.spec = SimpleNamespace(config=method.config, ipc=2)
    assert halved(state, data) == ({"micro": images // 2} if images else {})


def test_soft_cross_entropy_is_datms():
    logits, labels = (
        torch.randn(4, 3, generator=generator(0)),
        torch.randn(4, 3, generator=generator(1)),
    )
    wanted = -(labels.softmax(1) * logits.log_softmax(1)).sum() / 4
    torch.testing.assert_close(soft_cross_entropy(logits, labels), wanted)
    assert not torch.isclose(F.cross_entropy(logits, labels), wanted)


def test_inner_batches_are_passes_over_the_set(data):
    method = work(data, ipc=2, batch_syn=8, syn_steps=7)
    segment, _ = method.segment(generator(0, "batches"))
    assert [len(b) for b in segment.batches] == [4, 8, 8, 4, 8, 8, 4]  # the released codes' order
    assert torch.cat(segment.batches[:3]).sort().values.tolist() == list(range(20))
    assert [len(p) for p in segment.params] == [4, 8, 8, 4, 8, 8, 4]
    assert all(p.op.unique().numel() == 1 for p in segment.params)  # one operation an inner step


METHODS = yaml.safe_load((PRESETS / "trajectory.yaml").read_text())["methods"]
ROWS = [
    (method, dataset, ipc)
    for method, level in METHODS.items()
    for dataset, row in level["datasets"].items()
    for ipc in sorted({*row.get("ipc", {}), *([1, 10] if dataset.startswith("image") else [])})
]


def test_there_is_a_row_for_every_published_setting():
    assert {"mtt", "tesla", "ftd", "datm"} == set(METHODS) and len(ROWS) > 50


@pytest.mark.parametrize("profile", ["paper", "small"])
def test_every_preset_row_resolves(profile):
    for method, dataset, ipc in ROWS:
        config = dd.resolve(method, dataset, ipc, profile).config
        assert config.max_start - 1 + config.expert_epochs <= config.expert_total, (
            method,
            dataset,
            ipc,
        )
        assert config.min_start < config.max_start and config.lr_img > 0 and config.lr_teacher > 0
        assert config.flat == {"ftd": "agsam", "datm": "agsam"}.get(method, "plain")
        assert config.labels != "learned" or config.lr_label > 0
        parse_engine(config.gradient)


KEYS = ("syn_steps", "expert_epochs", "max_start", "batch_syn", "lr_img", "lr_lr", "lr_teacher")
TABLE = [  # the released settings, keys as above, then what is the row's own
    (
        "mtt",
        "cifar10",
        1,
        (50, 2, 2, 0, 100, 1e-7, 0.01),
        {"zca": "mtt", "gradient": "adjoint", "labels": "hard"},
    ),
    (
        "mtt",
        "cifar10",
        10,
        (30, 2, 20, 0, 100, 1e-5, 0.001),
        {"zca": "mtt", "ema": 0, "protocol": "mtt"},
    ),
    ("mtt", "cifar10", 50, (30, 2, 40, 0, 1000, 1e-5, 0.001), {"zca": ""}),
    ("mtt", "cifar100", 1, (20, 3, 20, 0, 1000, 1e-5, 0.01), {"zca": "mtt"}),
    ("mtt", "cifar100", 10, (20, 2, 20, 0, 1000, 1e-5, 0.01), {"zca": ""}),
    ("mtt", "cifar100", 50, (80, 2, 40, 125, 1000, 1e-5, 0.01), {"zca": "mtt", "expert_lr": 0.01}),
    (
        "mtt",
        "tinyimagenet",
        10,
        (20, 2, 40, 200, 1e4, 1e-4, 0.01),
        {"zca": "", "expert_batch": 256},
    ),
    ("mtt", "imagewoof", 1, (20, 2, 10, 0, 1e5, 1e-6, 0.01), {"zca": "", "experts": 100}),
    ("mtt", "imageyellow", 10, (20, 2, 10, 20, 1e5, 1e-6, 0.01), {"iterations": 5000}),
    (
        "tesla",
        "cifar10",
        1,
        (50, 2, 5, 0, 1000, 1e-7, 0.01),
        {"gradient": "tesla_repo", "labels": "hard"},
    ),
    (
        "tesla",
        "cifar100",
        50,
        (80, 2, 40, 125, 1000, 1e-5, 0.01),
        {"zca": "mtt", "iterations": 10000},
    ),
    (
        "tesla",
        "imagenet1k",
        1,
        (10, 3, 10, 100, 1e4, 1e-4, 0.01),
        {"labels": "assigned", "zca": "", "experts": 50},
    ),
    (
        "ftd",
        "cifar10",
        1,
        (50, 2, 2, 0, 100, 1e-7, 0.01),
        {"alpha": 0.3, "rho": 0.01, "ema": 0.9999, "zca": "mtt"},
    ),
    ("ftd", "cifar10", 50, (30, 2, 40, 0, 1000, 1e-5, 0.01), {"alpha": 1, "ema": 0.999}),
    (
        "ftd",
        "cifar100",
        1,
        (40, 3, 20, 0, 1000, 1e-5, 0.01),
        {"alpha": 1, "ema": 0.9995, "gradient": "adjoint"},
    ),
    ("ftd", "tinyimagenet", 10, (20, 2, 40, 500, 1e4, 1e-4, 0.01), {"zca": "", "ema": 0.999}),
    ("ftd", "imagefruit", 1, (20, 2, 10, 64, 1e4, 1e-4, 0.01), {"zca": "", "alpha": 1}),
    (
        "datm",
        "cifar10",
        1,
        (80, 2, 4, 10, 100, 1e-7, 0.01),
        {"lr_label": 5, "threshold": 1.1, "grow_from": 0},
    ),
    (
        "datm",
        "cifar10",
        10,
        (80, 2, 20, 100, 100, 1e-5, 0.01),
        {"lr_label": 2, "grow_from": 10, "grow_until": 1000},
    ),
    (
        "datm",
        "cifar10",
        1000,
        (100, 2, 60, 1000, 50, 1e-5, 0.01),
        {"lr_label": 10, "min_start": 40, "threshold": 1},
    ),
    (
        "datm",
        "cifar100",
        1,
        (40, 3, 20, 1000, 1000, 1e-5, 0.01),
        {"grow_from": 10, "init": "correct", "zca": "mtt"},
    ),
    (
        "datm",
        "cifar100",
        50,
        (80, 2, 70, 1000, 1000, 1e-5, 0.01),
        {"init": "real", "min_start": 20, "alpha": 0.3},
    ),
    (
        "datm",
        "tinyimagenet",
        50,
        (20, 2, 70, 1000, 100, 1e-4, 0.01),
        {"min_start": 40, "expert_total": 100},
    ),
    (
        "datm",
        "tinyimagenet",
        1,
        (40, 2, 20, 1000, 1e4, 1e-4, 0.01),
        {"grow_from": 15, "grow_until": 2000, "zca": "mtt", "protocol": "datm"},
    ),
]


@pytest.mark.parametrize(("method", "dataset", "ipc", "row", "own"), TABLE)
def test_presets_are_the_released_settings(method, dataset, ipc, row, own):
    values = dd.resolve(method, dataset, ipc, "paper").values
    assert {key: values[key] for key in (*KEYS, *own)} == dict(zip(KEYS, row, strict=True)) | own
    assert values["labels"] == own.get("labels", "learned" if method == "datm" else "hard")


def test_teslas_rows_that_are_mtts_step_as_far_as_mtts():
    """The release's half gradient belongs to its own commands, the whole one to what is taken from MTT."""
    own = set()
    for dataset, ipc in [(d, k) for method, d, k in ROWS if method == "tesla"]:
        mtt, tesla = (dd.resolve(m, dataset, ipc, "paper") for m in ("mtt", "tesla"))
        if tesla.config.gradient == "tesla":
            keys = (*KEYS, "zca")
            assert [mtt.values[k] for k in keys] == [tesla.values[k] for k in keys], (dataset, ipc)
        else:
            own.add((dataset, ipc))
    assert own == {("cifar10", 1), ("cifar100", 50), ("imagenet1k", 1), ("imagenet1k", 10)}
    assert mtt.config.lr_img == tesla.config.lr_img / 2  # imagenet1k, the other way round


def test_the_paper_profile_has_nothing_that_no_release_has():
    assert all(dd.resolve(*row, "paper").config.clip_rate == 0 for row in ROWS)


UNPUBLISHED = [
    ("ftd", "tinyimagenet", 50),
    ("mtt", "cifar100", 100),
    ("tesla", "cifar100", 100),
    ("ftd", "cifar100", 100),
    ("mtt", "cifar10", 500),
    ("tesla", "cifar10", 500),
    ("mtt", "mnist", 1),
    ("mtt", "imagenette", 50),
    ("datm", "cifar10", 100),
    ("dc", "cifar10", 5),
    ("frepo", "svhn", 10),
]


@pytest.mark.parametrize(("method", "dataset", "ipc"), UNPUBLISHED)
def test_no_default_passes_for_a_papers_setting(method, dataset, ipc):
    with pytest.raises(DDError, match="neither paper nor code gives") as refusal:
        dd.resolve(method, dataset, ipc, "paper")
    sentence = str(refusal.value)
    assert f"of {method} on {dataset} at IPC {ipc}, only for " in sentence
    values = dd.resolve(method, dataset, ipc, "small").values  # which is nobody's setting
    missing = (
        sentence.partition(" of ")[0].removeprefix("neither paper nor code gives ").split(", ")
    )
    given = {key: values[key] for key in missing}
    spec = dd.resolve(method, dataset, ipc, "paper", **given)
    assert spec.overrides.keys() <= given.keys() and spec.command()
    with pytest.raises(DDError, match=missing[-1]):
        dd.resolve(method, dataset, ipc, "paper", **dict(list(given.items())[:-1]))


@pytest.mark.slow
def test_every_method_beats_random_images_by_ten_points(monkeypatch):
    """The smoke profile as the notebooks run it: digits, IPC 1, their seed, against random images of three seeds.
    Experts are shared two by two; records and experts are the notebooks', where `make test` has made them already."""
    monkeypatch.delenv("DDLIB_EXPERTS")
    options = {"ipc": 1, "device": "cpu", "progress": False}
    random = [dd.run("random", "digits", seed=seed, **options).accuracy for seed in range(3)]
    for method in ("mtt", "tesla", "ftd", "datm"):
        reached = dd.run(method, "digits", teach=True, **options).accuracy
        assert reached > max(*random, fmean(random) + 10), (method, reached, random)
