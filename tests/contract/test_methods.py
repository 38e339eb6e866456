"""Every method keeps the contract; what another package may get wrong is named in one sentence."""

import dataclasses
import os
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from traceback import FrameSummary
from types import SimpleNamespace

import pytest
import torch

import ddlib as dd
from ddlib.cli import main
from ddlib.config import preset
from ddlib.core import DDError
from ddlib.engine import contract
from ddlib.engine.run import prepare
from ddlib.methods import METHODS, register
from ddlib.methods.base import ImageConfig, ImageMethod, Result
from ddlib.methods.registry import BUILT_IN, Methods
from ddlib.report import explore
from ddlib.testing import check_method
from tests import forks

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {
    "coreset": {"extractor_epochs": 1},
    "gradient": {"inner": 2, "batch_real": 16, "net_images": 32},
    "dream": {"inner": 2, "batch_real": 16, "net_images": 32},
    "dm": {"batch_real": 16},
    "trajectory": {"experts": 1, "expert_total": 2, "max_start": 1, "syn_steps": 3},
    "frepo": {
        "backbone": "convnet:width=8,norm=bn,grow=2,order=pre,init=lecun",
        "pool_size": 2,
        "max_age": 1,
        "batch_real": 64,
    },
}
OURS = [(name, family) for family, names in BUILT_IN.items() for name in names]


@pytest.mark.parametrize(("name", "family"), OURS)
def test_ours_keep_the_contract(name, family):
    settings = SETTINGS[family]
    if family == "trajectory":
        settings = settings | {"expert_epochs": 1}
    check_method(name, steps=2, **settings)


@dataclasses.dataclass(frozen=True)
class ToyConfig(ImageConfig):
    iterations: int = 3
    lr_img: float = 0.1


class Toy(ImageMethod):
    """Pulls images towards zero; without a preset, a page or a colour."""

    Config = ToyConfig

    def loss(self, synthetic, classes):
        return synthetic.square().sum()


@pytest.fixture
def registry(monkeypatch):
    """A registry that forgets what a test registers."""
    METHODS["dm"]  # ours are in
    monkeypatch.setattr(METHODS, "_registered", dict(METHODS._registered))


def run(name, results, **options):
    options = {"eval_epochs": 1, "networks": 1, "snapshots": 0, "progress": False} | options
    return dd.run(name, "digits", ipc=1, results=results, device="cpu", **options)


def test_a_toy_of_a_few_lines_is_a_method(registry, tmp_path):
    register("toy")(Toy)
    register("toy")(Toy)  # a notebook's cell is run again
    assert "toy" in dd.METHODS and "toy" not in BUILT_IN
    check_method("toy", steps=2, batch_real=16)
    done = run("toy", tmp_path)
    assert done.record["method"] == "toy" and done.synthetic.images.shape == (10, 1, 8, 8)
    with pytest.raises(DDError, match="'iterations' must be int, not 'many'"):
        dd.resolve("toy", "digits", 1, iterations="many")


@pytest.mark.parametrize(("default", "smoke"), [(20_000, 50), (3, 3), (0, 0)])
def test_a_method_without_a_preset_is_short_in_smoke_and_no_longer_than_by_default(
    registry, default, smoke
):
    config = dataclasses.make_dataclass("C", [("iterations", int, default)], frozen=True)
    register("toy")(broken(Config=config))
    assert dd.resolve("toy", "digits", 1).config.iterations == smoke
    assert dd.resolve("toy", "digits", 1, "small").config.iterations == default


def broken(**members):
    return type("Broken", (Toy,), members | {"__module__": __name__})


def refuse(self, *_):
    raise DDError("not today")


@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (broken(step=None), "'broken' .* lacks step: add it, or derive from ddlib.methods.base"),
        (broken(Config=int), "a Config that is no dataclass"),
        (
            broken(Config=dataclasses.make_dataclass("C", [("lr", float, 1.0)])),
            "no field `iterations`",
        ),
        (
            broken(
                Config=dataclasses.make_dataclass("C", [("iterations", int, 1), ("x", dict, 0)])
            ),
            "a dict in its Config, x; allowed: bool, int, float, str, tuple",
        ),
    ],
)
def test_a_class_that_is_no_method(registry, cls, message):
    with pytest.raises(DDError, match=message):
        register("broken")(cls)


@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (broken(step=lambda self: None), "step of the method 'broken' returns nothing"),
        (
            broken(step=lambda self: {"loss": torch.zeros(3)}),
            r"step of the method 'broken' returns a tensor \[3\] as 'loss', which is no number",
        ),
        (
            broken(step=lambda self: self.imagse),
            r"step of the method 'broken' fails \(AttributeError: .*imagse.*, test_methods.py:\d+\): mend it",
        ),
        (
            broken(summary=lambda self: 1 / 0),
            r"summary\(\) of the method 'broken' fails \(ZeroDivisionError.*goes on from the checkpoint",
        ),
        (
            broken(result=lambda self: self.images),
            r"result\(\) of the method 'broken' returns a tensor",
        ),
        (
            broken(first_images=lambda self: torch.zeros(3, 1, 8, 8)),
            r"'broken' starts with a tensor \[3, 1, 8, 8\] as its images: there must be 10 classes x 1",
        ),
        (
            broken(__init__=lambda self, *_: 1 / 0),
            r"__init__ of the method 'broken' fails \(ZeroDivisionError.*, test_methods.py:\d+\): mend it",
        ),
        (
            broken(result=lambda self: 1 / 0),
            r"result\(\) of the method 'broken' fails \(ZeroDivisionError.*: mend it",
        ),
        (
            broken(result=lambda self: Result(self.images[1:], self.labels)),
            r"result\(\) of the method 'broken' returns a tensor \[9, 1, 8, 8\] as its images: there must",
        ),
        (
            broken(result=lambda self: Result(self.images, torch.tensor(1))),
            r"result\(\) of the method 'broken' returns a tensor \[\] as its labels: there must be 10",
        ),
        (
            broken(state_dict=lambda self: 1 / 0),
            r"state_dict\(\) of the method 'broken' fails \(ZeroDivisionError.*: mend it",
        ),
        (
            broken(state_dict=lambda self: None),
            r"state_dict\(\) of the method 'broken' returns nothing: let it return tensors by name",
        ),
        (
            broken(state_dict=lambda self: {"steps": self.steps}),
            r"state_dict\(\) of the method 'broken' holds a int as 'steps': put it in as a tensor",
        ),
        (
            broken(needs=classmethod(lambda cls, config: 1 / 0)),
            r"needs\(\) of the method 'broken' fails \(ZeroDivisionError.*: mend it",
        ),
        (
            broken(needs=classmethod(lambda cls, config: None)),
            r"needs\(\) of the method 'broken' returns nothing: let it return a list of assets",
        ),
        (
            broken(needs=classmethod(lambda cls, config: ["a teacher"])),
            r"needs\(\) of the method 'broken' returns a str in it: let it return .* with `make`",
        ),
        (
            broken(
                needs=classmethod(
                    lambda cls, config: [SimpleNamespace(make=lambda *_, **__: 1 / 0)]
                )
            ),
            r"make\(\) of an asset of the method 'broken' fails \(ZeroDivisionError.*: mend it",
        ),
        (
            broken(summary=refuse),
            r"summary\(\) of the method 'broken' fails \(DDError: not today, .*goes on from the checkpoint",
        ),
    ],
)
def test_a_method_that_misbehaves(registry, tmp_path, cls, message):
    register("broken")(cls)
    with pytest.raises(DDError, match=message):
        run("broken", tmp_path, teach=True)


def test_what_a_method_refuses_in_its_own_words_is_left_as_it_is(registry, tmp_path):
    register("broken")(broken(__init__=refuse))
    with pytest.raises(DDError, match="^not today$"):
        run("broken", tmp_path)


def test_a_method_without_a_loss(registry, tmp_path):
    register("broken")(type("Broken", (ImageMethod,), {}))
    message = r"the method 'broken' has no loss: write `loss\(synthetic, classes\)`"
    with pytest.raises(DDError, match=message):
        run("broken", tmp_path)


def test_own_settings_that_the_config_lacks(registry):
    with pytest.raises(DDError, match="names width in `only`, which its Config lacks"):
        register("broken")(type("Broken", (ImageMethod,), {"only": {"width": (1,)}}))


def test_a_name_that_is_taken(registry):
    with pytest.raises(
        DDError, match="the method name 'dm' is taken by ddlib.methods.dm: register"
    ):
        register("dm")(Toy)


@pytest.mark.parametrize("name", ["", "a/b", "a b", "../dm", "a-b", "a.b", "ä", None])
def test_a_name_that_files_cannot_have(registry, name):
    with pytest.raises(DDError, match="has a name that files cannot have: take letters, digits"):
        register(name)(Toy)


def offered(monkeypatch, *points):
    found = [EntryPoint(name, value, "ddlib.methods") for name, value in points]
    monkeypatch.setattr("ddlib.methods.registry.entry_points", lambda group: found)
    return Methods()


def test_entry_points_that_cannot_be_used(monkeypatch):
    methods = offered(monkeypatch, ("dm", "other:DM"), ("gone", "no_such_module:Gone"))
    with pytest.warns(UserWarning, match="a method 'dm', a name that is taken: it is left out"):
        assert list(methods)[-1] == "gone"
    with pytest.raises(
        DDError, match="'gone' .* cannot be imported .*mend that package, or uninstall"
    ):
        methods["gone"]


def test_a_broken_package_does_not_hide_the_other_methods(monkeypatch, capsys):
    points = offered(monkeypatch, ("gone", "no_such_module:Gone"))._entry_points()
    monkeypatch.setattr(METHODS, "_offered", points)
    monkeypatch.setattr(sys, "argv", ["ddlib", "list-methods"])
    main()
    *others, last = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in others] == [name for name, _ in OURS]
    assert last.startswith("gone         cannot be used: the method 'gone' of the package")


def test_a_key_that_stands_twice_in_a_preset(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("defaults:\n  lr_img: 1.0\n  lr_img: 2.0\n")
    with pytest.raises(DDError, match="preset mine.yaml: key 'lr_img' stands twice.*lines 2 and 3"):
        preset(path)


def test_a_preset_that_cannot_be_used_names_its_method(registry, tmp_path, monkeypatch):
    (tmp_path / "toy.yaml").write_text("defaults: {lr_img: 1.0, lr_img: 2.0}\n")
    monkeypatch.setattr("ddlib.methods.registry._folder", lambda cls: tmp_path)
    register("toy")(Toy)
    with pytest.raises(DDError, match="the method 'toy' has presets .*: preset toy.yaml: key 'lr_"):
        dd.resolve("toy", "digits", 1)


def test_experts_of_a_method_that_needs_none(registry):
    needs = classmethod(lambda cls, config: 1 / 0)
    register("broken")(broken(needs=needs))  # is left out
    with pytest.raises(
        DDError, match="^dm needs no experts; methods that do: mtt, tesla, ftd, datm$"
    ):
        prepare("dm", "digits", ipc=1)


def test_what_a_check_finds(registry):
    def global_draw(self, synthetic, classes):
        return (synthetic * torch.rand(())).sum()

    register("broken")(broken(loss=global_draw))
    with pytest.raises(AssertionError, match="'broken' (draws|ends in other bits|depends)"):
        check_method("broken", steps=2, batch_real=16)
    register("broken")(broken(load_state_dict=lambda self, state: None))
    with pytest.raises(
        AssertionError, match="does not take back the state that it gave after step 1"
    ):
        check_method("broken", steps=2, batch_real=16)


def test_a_check_finds_what_a_refusal_has_changed(registry):
    def refuse_late(self, loss, gradient):
        self.velocity = self.velocity + 1
        ImageMethod.refuse(self, loss, gradient)

    def refuse_late_images(self, loss, gradient):
        self.trained = self.trained + 1
        ImageMethod.refuse(self, loss, gradient)

    for late in (refuse_late, refuse_late_images):
        register("broken")(broken(refuse=late))
        with pytest.raises(AssertionError, match="changes its state before it refuses"):
            check_method("broken", steps=2, batch_real=16)


def soft(*order):
    """A result with soft labels of the classes in another order than they stand."""

    def result(self):
        labels = torch.nn.functional.one_hot(self.labels, 10)[:, list(order)] * 0.6 + 0.04
        return Result(self.images, labels)

    return result


def test_a_check_finds_soft_labels_that_do_not_stand_class_by_class(registry):
    register("broken")(broken(result=soft(*range(10))))
    check_method("broken", steps=1, batch_real=16)
    register("broken")(broken(result=soft(*reversed(range(10)))))
    with pytest.raises(AssertionError, match="labels that do not stand class by class"):
        check_method("broken", steps=1, batch_real=16)


def use_idm(site: str) -> None:
    """In a process of its own, where the example is installed in the folder `site`."""
    sys.path.insert(0, site)
    check_method("idm", steps=2, batch_real=16, train_batch=16, train_steps=1, push_every=1)
    short = {"iterations": 4, "eval_epochs": 5, "networks": 1, "train_steps": 2}
    run = dd.run("idm", "digits", ipc=1, progress=False, **short)
    assert run.record["extra"]["accuracy of the queue"] > 0
    assert run.synthetic.factor == 2
    figure = dd.plots.accuracy_vs_ipc(dd.tables.runs([run]))
    artists = [line for axis in figure.axes for line in axis.lines]
    assert any(line.get_color() == "#AA3377" for line in artists), artists
    (row,) = dd.tables.compare(dd.tables.runs([run])).to_dict("records")
    assert row["method"].startswith("idm") and row["ours"] and row["paper"] == "none", row
    found = explore.choices(dd.tables.stored(profile="smoke"))
    chosen = explore.pick(found, "digits", "idm", 1, "smoke")
    for view in explore.VIEWS:
        explore.draw(view, chosen)
    sys.argv = ["ddlib", "list-methods"]
    main()


def test_the_example_package_is_installed_listed_checked_and_run(tmp_path):
    """Installed from its folder as pip does it, without a network, and found by its entry point alone."""
    module = ROOT / "examples" / "idm" / "ddlib_idm.py"
    assert len(module.read_text().splitlines()) < 150
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "ddlib_idm.py"):
        (source / name).write_text((ROOT / "examples" / "idm" / name).read_text())
    quiet = ["--quiet", "--no-deps", "--no-build-isolation", "--disable-pip-version-check"]
    pip = [sys.executable, "-m", "pip", "install", *quiet, "--target", str(tmp_path / "site")]
    subprocess.run([*pip, str(source)], check=True, env=os.environ | {"PIP_NO_INDEX": "1"})
    results = {"DDLIB_RESULTS": str(tmp_path / "results")}
    done = forks.run([use_idm, str(tmp_path / "site")], env=os.environ | results)
    assert done.returncode == 0, done.stderr[-2000:]
    assert any(
        line.split() == ["idm", "ddlib_idm", "CVPR", "2023"] for line in done.stdout.splitlines()
    )


def test_a_line_is_named_though_every_file_is_an_installed_package(monkeypatch):
    frames = [FrameSummary("/env/site-packages/idm.py", 41, "step")]
    monkeypatch.setattr("ddlib.engine.contract.extract_tb", lambda traceback: frames)
    assert contract._line(RuntimeError()) == "idm.py:41"
