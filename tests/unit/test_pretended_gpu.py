"""Every method on a pretended GPU (`pretended_gpu`): nothing mixes devices, and a step hardly waits for one."""

from collections import Counter
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from pretended_gpu import DeviceMixed, PretendedGPU

from ddlib.augment import siamese
from ddlib.config import Spec, defaults, resolve
from ddlib.core import generator
from ddlib.data.dataset import load
from ddlib.engine.record import Run
from ddlib.engine.run import run
from ddlib.match.kmeans import kmeans, nearest
from ddlib.methods import METHODS
from ddlib.nets.build import build
from ddlib.recipe import Recipe
from ddlib.report import explore
from ddlib.studies import (
    architecture_search,
    continual,
    fairness,
    membership,
    sampling,
    scaling,
    trajectories,
)
from ddlib.train import evaluate as evaluation
from ddlib.train.loop import train

SLOW = ("herding", "kcenter", "forgetting", "tesla", "ftd", "datm", "dream_plus")
CORESETS = ("random", "herding", "kcenter", "kmeans", "forgetting")
FEW = {
    "iterations": 3,
    "inner": 2,
    "online": 2,
    "factor": 2,  # four training images an image, of which three are matched
    "batch_syn": 3,
    "net_images": 40,  # ten batches
    "net_batch": 4,
    "syn_steps": 5,
    "experts": 1,
    "expert_total": 2,
    "expert_epochs": 1,
    "max_start": 1,
    "min_start": 0,
    "grow_from": 0,
    "grow_until": 0,
    "warm_epochs": 0,
}
NET = "convnet:width=4"
SHORT = {"backbone": NET, "networks": 1, "eval_epochs": 2, "compile": False}
LIMITS = {"dm": 0, "frepo": 1, "dc": 0, "dsa": 0, "idc": 0, "mtt": 2, "datm": 2}  # waits a step
# What a step may wait for in the files below the methods: a segment's length is checked before it is matched.
BELOW = {"match/trajectory.py": 1}


@pytest.fixture
def gpu():
    evaluation._network.cache_clear()  # networks that another device has seen
    with PretendedGPU() as gpu:
        yield gpu
    evaluation._network.cache_clear()


@pytest.fixture(scope="module")
def waits(tmp_path_factory):
    """A function from a method to what the last of its steps waited for; each method runs once."""
    folder = tmp_path_factory.mktemp("gpu")

    @cache
    def of(method: str) -> Counter:
        cls, last = METHODS[method], Counter()
        evaluation._network.cache_clear()
        with pytest.MonkeyPatch.context() as patch, PretendedGPU() as gpu:
            patch.setenv("DDLIB_EXPERTS", str(folder / "experts"))

            def step(self, original=cls.step):
                gpu.waits.clear()
                report = original(self)
                last.clear()
                last.update(gpu.waits)
                return report

            patch.setattr(cls, "step", step)
            options = {"ipc": 1, "device": "cuda", "teach": True, "progress": False}
            done = run(method, "digits", results=folder, **options, **settings(method))
            assert done.record["accuracy"]["last"]["mean"] >= 0
        evaluation._network.cache_clear()
        return last

    return of


def marked(methods) -> list:
    return [pytest.param(m, marks=pytest.mark.slow) if m in SLOW else m for m in methods]


@pytest.mark.parametrize("method", marked(METHODS))
def test_a_run_mixes_no_devices(method, waits):
    """Distilled, with its experts, and evaluated; what lies below the methods waits for nothing more than BELOW."""
    files = Counter()
    for (_, line), count in waits(method).items():
        files[line.split(":")[0]] += count
    below = {name: n for name, n in files.items() if not name.startswith("methods/")}
    below.pop("match/sampler.py", None)  # renews its choice once in many steps
    below.pop("train/krr.py", None)  # a solver's one check, counted in LIMITS
    assert all(count <= BELOW.get(name, 0) for name, count in below.items()), below


@pytest.mark.parametrize("method", marked(LIMITS))
def test_a_step_hardly_waits(method, waits):
    assert sum(waits(method).values()) <= LIMITS[method], waits(method)


def settings(method: str) -> dict:
    known = set(defaults(method)) - ({"iterations"} if method in CORESETS else set())
    return SHORT | {key: value for key, value in FEW.items() if key in known}


def spec(method: str) -> Spec:
    return resolve(method, "digits", 1, **settings(method))


def made(method: str) -> Run:
    place = {"ipc": 1, "device": "cuda", "teach": True, "progress": False}
    return run(method, "digits", **place, **settings(method))


def views() -> None:
    for view in explore.VIEWS:
        explore.draw(view, made("dm"), device="cuda")


ON = {"device": "cuda", "profile": "smoke"}
STUDIES = {
    "memory by engine": lambda: [
        made("mtt"),
        trajectories.unrolling(spec("mtt"), steps=[1, 2], device="cuda"),
    ],
    "the whole set": lambda: trajectories.full(spec("random"), networks=1, device="cuda"),
    "flatness": lambda: [
        made("mtt"),
        trajectories.flatness(spec("mtt"), images=20, device="cuda"),
    ],
    "trajectory error": lambda: trajectories.trajectory_error(made("mtt"), device="cuda"),
    "outer steps": lambda: trajectories.outer_steps("digits", 1, "smoke", repeats=1, device="cuda"),
    "scaling": lambda: scaling.updates("digits", "smoke", {"width": [4]}, repeats=1, device="cuda"),
    "continual": lambda: [
        continual.study(m, "digits", ipc=1, steps=2, **ON, **settings(m)) for m in ("dm", "frepo")
    ],
    "membership": lambda: [
        membership.study(arm, "digits", ipc=1, per_class=40, steps=(2,), backbone=NET, **ON)
        for arm in ("members", "random", "random start")
    ],
    "architecture search": lambda: [
        architecture_search.study(proxy, "digits", [NET], ipc=1, epochs=1, whole_epochs=1, **ON)
        for proxy in ("whole", "early stop", "random")
    ],
    "gradient norms": lambda: sampling.gradient_norms(load("digits", device="cuda"), 1, "smoke", 0),
    "fairness": lambda: fairness.conditions(made("dm"), unseen=["mlp"], epochs=1, device="cuda"),
    "views": views,
}


@pytest.mark.parametrize("study", [pytest.param(name, marks=pytest.mark.slow) for name in STUDIES])
def test_a_study_mixes_no_devices(study, gpu, tmp_path, monkeypatch):
    monkeypatch.setenv("DDLIB_RESULTS", str(tmp_path))
    monkeypatch.setenv("DDLIB_EXPERTS", str(tmp_path / "experts"))
    STUDIES[study]()


def test_training_waits_once_at_its_end(gpu):
    data = load("digits", device="cuda")
    net = build("convnet:width=4", data.shape, 10).to(data.device)
    x, y = data.batch("train", slice(0, 12)), data.labels["train"][:12]
    gpu.waits.clear()
    train(net, x, y, Recipe(epochs=4, batch=5, drops=(2,)), generator(0))
    assert sum(gpu.waits.values()) == 1, gpu.waits


def test_clustering_does_not_wait(gpu):
    x = torch.randn(3, 20, 5, generator=generator(0)).to("cuda")
    gpu.waits.clear()
    centres = kmeans(x, 4, generator(1), [20, 18, 19])[0]
    rows = nearest(x, centres, 2, [20, 18, 19])
    assert rows.device.type == "cuda" and not gpu.waits, gpu.waits


def _augmented(images: torch.Tensor) -> torch.Tensor:
    params = siamese.draw("color_crop_scale", len(images), (8, 8), generator(0), op_every=1)
    return siamese.augment(images, params)


def _on(images: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    return table.to(images.device)


# name -> (what a careless line does with images [4, 1, 8, 8] on the GPU, "mixed" or what it waits for)
FAULTS = {
    "a table stays on the CPU": (lambda x: x * torch.ones(4, 1, 1, 1), "mixed"),
    "a network stays on the CPU": (lambda x: build("convnet:width=4", (1, 8, 8), 10)(x), "mixed"),
    "labels stay on the CPU": (lambda x: F.cross_entropy(x.flatten(1), torch.arange(4)), "mixed"),
    "a sum over rows by CPU rows": (lambda x: x.index_add(0, torch.arange(4), x), "mixed"),
    "an array of a GPU tensor": (lambda x: x.numpy(), "mixed"),
    "a CPU generator": (lambda x: torch.rand(3, device=x.device, generator=generator(0)), "mixed"),
    "a mixture in a backward pass": (
        lambda x: torch.autograd.grad(x.requires_grad_() * x, x, torch.ones(4, 1, 8, 8)),
        "mixed",
    ),
    "a pageable copy": (lambda x: _on(x, torch.arange(4)), "copy"),
    "a list becomes a tensor there": (lambda x: torch.tensor([1, 2], device=x.device), "copy"),
    "an index on the CPU": (lambda x: x[torch.tensor([0, 2])], "index on the CPU"),
    "a mask": (lambda x: x[x > 0], "index by a mask"),
    "a number is read": (lambda x: float(x.sum()), "__float__"),
    "a condition is read": (lambda x: 1 if torch.isfinite(x).all() else 0, "__bool__"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault, gpu):
    work, kind = FAULTS[fault]
    images = torch.randn(4, 1, 8, 8, generator=generator(0)).to("cuda")
    gpu.waits.clear()
    if kind == "mixed":
        with pytest.raises(DeviceMixed, match=r"\.py:\d+"):
            work(images)
    else:
        work(images)
        assert [what for what, _ in gpu.waits] == [kind], gpu.waits


def test_a_table_that_is_not_pinned_is_found_in_the_library(gpu, monkeypatch):
    images = torch.randn(4, 1, 8, 8, generator=generator(0)).to("cuda")
    gpu.waits.clear()
    assert _augmented(images).device.type == "cuda" and not gpu.waits
    monkeypatch.setattr(siamese, "upload", lambda table, device: table.to(device))
    _augmented(images)
    assert {what for what, _ in gpu.waits} == {"copy"}
    monkeypatch.setattr(siamese, "upload", lambda table, device: table)
    with pytest.raises(DeviceMixed):
        _augmented(images)


def test_values_are_the_cpus(gpu):
    data = {device: load("digits", device=device) for device in ("cpu", "cuda")}
    rows = data["cuda"].sample(2, generator(0))
    assert rows.device == torch.device("cuda:0") and data["cpu"].device.type == "cpu"
    assert torch.equal(rows.cpu(), data["cpu"].sample(2, generator(0)))
