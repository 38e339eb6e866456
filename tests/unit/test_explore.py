"""The views of a run, the widgets that call them, and what a notebook shows when its parameters are wrong."""

import ast
import base64
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from test_tables import record

import ddlib as dd
from ddlib import cli
from ddlib.core import DDError, generator
from ddlib.data.dataset import from_arrays
from ddlib.distilled import Synthetic
from ddlib.engine.record import Run, set_checksum
from ddlib.files import write_json
from ddlib.report import explore, look, plots

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))
QUICK = {
    "backbone": "convnet:width=8",
    "networks": 2,
    "eval_epochs": 8,
    "progress": False,
    "device": "cpu",
}


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
    """DM with pictures of steps 0, 2 and 4, and random images at IPC 2."""
    folder = tmp_path_factory.mktemp("explore")
    return explore.choices(
        [
            dd.run(
                "dm",
                "digits",
                ipc=1,
                results=folder,
                iterations=4,
                snapshots=2,
                batch_real=8,
                **QUICK,
            ),
            dd.run("random", "digits", ipc=2, results=folder, **QUICK),
        ]
    )


@pytest.fixture
def run(found) -> Run:
    return found["digits", "dm", 1]


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


def with_labels(run: Run, folder: Path, labels: torch.Tensor) -> Run:
    """The run with other labels in its file."""
    path = folder / run.path.name
    syn = replace(run.synthetic, labels=labels)
    syn.save(path.with_suffix(".safetensors"))
    return Run(write_json(path, run.record | {"set_checksum": set_checksum(syn)}))


def tiles(axis, rows: int, columns: int) -> np.ndarray:
    """The images of a `plots.grid`, [rows, columns, height, width]."""
    picture = np.asarray(axis.images[0].get_array())[..., 0]
    cells = picture.reshape(
        rows, picture.shape[0] // rows, columns, picture.shape[1] // columns
    ).swapaxes(1, 2)
    return cells[..., 1:-1, 1:-1]


def test_choices_prefer_the_preset_then_the_lowest_seed_and_need_the_set(tmp_path):
    made = [
        record(tmp_path, seed=0, networks=9),
        record(tmp_path, seed=2),
        record(tmp_path, seed=1),
    ]
    assert explore.choices(made) == {}
    for run in made:
        run.path.with_suffix(".safetensors").touch()
    assert explore.choices(made) == {("digits", "dm", 1): made[2]}  # seed 0 has an override
    assert explore.choices(made[:1]) == {("digits", "dm", 1): made[0]}
    assert explore.choices([]) == {}


def test_a_missing_run_view_or_step_is_one_sentence(found, run):
    assert explore.pick(found, "digits", "dm", 1, "smoke") is run
    with pytest.raises(
        DDError, match=r"make it: python -m ddlib run dm --dataset digits --ipc 7 --profile smoke"
    ):
        explore.pick(found, "digits", "dm", 7, "smoke")
    with pytest.raises(DDError, match="unknown method 'dmm'.*allowed"):
        explore.pick(found, "digits", "dmm", 1, "smoke")
    with pytest.raises(DDError, match="unknown profile"):
        explore.pick(found, "digits", "dm", 1, "smok")
    with pytest.raises(DDError, match="unknown step 3; allowed: 0, 2, 4"):
        explore.draw("images", run, 3)
    with pytest.raises(DDError, match="unknown view"):
        explore.draw("pictures", run)


def test_images_and_evolution_show_the_step(run):
    syn = run.synthetic
    for step, images in ((0, syn.snapshots[0]), (-1, syn.images)):
        (axis,) = explore.draw("images", run, step).axes
        assert np.allclose(tiles(axis, 1, 10)[0], syn.pixels(images=images)[:, 0])
    figure = explore.draw("evolution", run, 2)
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["step 0", "step 2"]
    assert figure.get_suptitle() == "dm, IPC 1: digits, quick run, step 2"


def test_nearest_rows_are_those_of_a_plain_search_over_all_chunks():
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (4500, 4, 4), np.uint8), np.arange(4500) % 3
    data = from_arrays(images, labels, images[:3], labels[:3], device="cpu")
    x = data.batch("train", [7, 4400, 2100]) + 0.01
    plain = (
        ((x[:, None] - data.batch("train", slice(None))) ** 2).flatten(2).sum(2).argsort(1)[:, :5]
    )
    assert (explore.nearest(x, data, 5) == plain).all() and plain[:, 0].tolist() == [7, 4400, 2100]


def test_a_random_image_is_its_own_neighbour_and_other_classes_are_named(found, run):
    figure = explore.draw("neighbours", found["digits", "random", 2])
    shown = tiles(figure.axes[0], 10, 7)
    assert np.allclose(shown[:, 0], shown[:, 1], atol=1e-6) and not np.allclose(
        shown[:, 0], shown[:, 2], atol=1e-2
    )
    data, x = dd.load("digits", device="cpu"), found["digits", "random", 2].synthetic.images[::2]
    labels = data.labels["train"][explore.nearest(x, data, 6)]
    odd = [(k, j) for k in range(10) for j in range(6) if labels[k, j] != k]
    assert odd and [text.get_text() for text in figure.axes[0].texts] == [
        str(int(labels[at])) for at in odd
    ]
    assert figure.get_suptitle().endswith(
        f"{60 - len(odd)} of 60 nearest training images are of the same class"
    )


def test_labels_are_a_heat_map_of_what_the_set_holds(run, tmp_path):
    soft = torch.rand(10, 10, generator=generator(0, "test")).softmax(1)
    (heat, _) = explore.draw("labels", with_labels(run, tmp_path, soft)).axes
    assert (
        np.allclose(heat.images[0].get_array(), soft)
        and heat.images[0].get_cmap().name == "cividis"
    )
    (heat, _) = explore.draw("labels", with_labels(run, tmp_path, soft - 0.5)).axes
    assert heat.images[0].get_cmap().name == "RdBu_r"
    assert np.allclose(
        heat.images[0].get_clim(), (-0.5 + soft.min(), 0.5 - soft.min())
    )  # zero is white
    (heat, _) = explore.draw("labels", run).axes
    assert np.array_equal(heat.images[0].get_array(), np.eye(10)) and "hard" in heat.get_title()


def test_the_confusion_matrix_is_that_of_the_records_first_network_and_is_kept(run, monkeypatch):
    counts = explore.confusion(explore.Look(run, 4, "cpu"))
    assert counts.sum(1).tolist() == dd.load("digits", device="cpu").class_sizes("test").tolist()
    first = run.record["accuracy"]["last"]["networks"][0]
    assert 100 * counts.diagonal().sum() / counts.sum() == pytest.approx(first, abs=1e-4)
    assert not torch.equal(counts, explore.confusion(explore.Look(run, 0, "cpu")))

    monkeypatch.setattr(explore, "train", None)  # the second time nothing is trained
    figure = explore.draw("accuracy", run, device="cpu")
    bars, matrix, _ = figure.axes
    share = 100 * counts / counts.sum(1, keepdim=True)
    assert np.allclose(matrix.images[0].get_array(), share)
    assert np.allclose([bar.get_width() for bar in bars.patches], share.diagonal())
    assert {matplotlib.colors.to_hex(bar.get_facecolor()).upper() for bar in bars.patches} == {
        plots.COLOURS["dm"]
    }
    assert "quick run, step 4" in figure.get_suptitle() and "%" in bars.get_xlabel()


def test_the_bars_carry_wilsons_interval(run, monkeypatch):
    counts = torch.zeros(10, 10, dtype=torch.int64)
    counts[:, 0], counts[3, 3] = 20, 20  # class 0: 20 of 20, class 3: 20 of 40, all others 0 of 20
    monkeypatch.setattr(explore, "confusion", lambda look: counts)
    (bars, *_) = explore.draw("accuracy", run).axes
    (spans,) = next(c.errorbar for c in bars.containers if hasattr(c, "errorbar")).lines[2]
    spans = np.array(spans.get_segments())[:, :, 0]
    assert np.allclose(
        spans[[0, 3, 1]], [[83.9, 100], [35.2, 64.8], [0, 16.1]], atol=0.06
    )  # hand-computed, z 1.96


def test_learned_labels_are_judged_after_the_last_step_only(run, tmp_path):
    soft = with_labels(run, tmp_path, torch.eye(10))
    assert "step 4" in explore.draw("accuracy", soft, 0, "cpu").get_suptitle()


@pytest.mark.parametrize("zca", ["", "frepo"])
def test_a_kept_look_draws_every_view_without_the_data(tmp_path, monkeypatch, zca):
    short = {"iterations": 2, "snapshots": 1, "batch_real": 8, **QUICK}
    run = dd.run("dm", "digits", ipc=2, results=tmp_path, zca=zca, **short)
    assert explore.steps(run) == [0, 2]
    drawn = {view: explore.draw(view, run) for view in explore.VIEWS}
    path = explore.keep(run, "cpu")
    assert path.name == f"{run.path.stem}.look.safetensors" and path.stat().st_size < 60_000

    def lost(*_):
        raise DDError("no data at hand")

    monkeypatch.setattr(explore, "dataset_of", lost)
    run.path.with_suffix(".confusion.json").unlink()
    for view, before in drawn.items():
        after = explore.draw(view, Run(run.path))
        assert after.get_suptitle() == before.get_suptitle(), view
        for one, other in zip(after.axes, before.axes, strict=True):
            assert one.get_title() == other.get_title()
            for mine, theirs in zip(one.images, other.images, strict=True):  # a JPEG is not exact
                assert np.abs(mine.get_array() - theirs.get_array()).mean() < 0.05, view
            for mine, theirs in zip(one.collections, other.collections, strict=True):
                assert np.allclose(mine.get_offsets(), theirs.get_offsets(), atol=0.02), view
    # a look of another set, or of an older one, is not shown for this one
    other = with_labels(run, tmp_path, run.synthetic.labels.roll(2))
    with pytest.raises(DDError, match="no data at hand"):
        explore.draw("neighbours", other)


def test_the_committed_looks_are_of_their_sets_and_small():
    results = Path(__file__).parents[2] / "results"
    kept = sorted(results.glob("*/*/*.look.safetensors"))
    assert sum(path.stat().st_size for path in kept) < 700_000
    for path in kept:
        run = Run(path.with_name(path.name.replace(".look.safetensors", ".json")))
        facts = look.load(run)
        earlier = sum(x.nbytes for name, x in facts.items() if name.startswith("pixels@"))
        assert facts and path.stat().st_size < 60_000 + earlier, path.name
        total = facts["confusion"].sum(1)
        assert total.sum() == 10_000  # test images of MNIST and of CIFAR-10
        assert (total == total[0]).all() or run.record["dataset"] == "mnist"


def test_a_kept_cifar_set_is_shown_where_there_is_no_cifar(monkeypatch, tmp_path):
    monkeypatch.setenv("DDLIB_DATA", str(tmp_path))
    run = explore.kept()["folder:cifar10", "frepo", 1]
    for view in explore.VIEWS:
        assert explore.draw(view, run).axes, view
    with pytest.raises(DDError, match="no set in .* has what it takes to be looked at"):
        explore.kept(tmp_path)


def test_the_embedding_is_the_pca_of_the_real_images(run):
    (axis,) = explore.draw("embedding", run, 2, "cpu").axes
    dots, stars = axis.collections[::2], axis.collections[1::2]
    data = dd.load("digits", device="cpu")
    each = min(60, int(data.class_sizes().min()))
    real = (
        data.batch("train", data.sample(each, generator(0, "explore", "embedding")))
        .flatten(2)
        .numpy()
    )
    pca = PCA(2).fit(real.reshape(10 * each, -1))
    signs = np.sign(pca.components_[[0, 1], np.abs(pca.components_).argmax(1)])
    syn = run.synthetic
    for k in range(10):
        assert np.allclose(dots[k].get_offsets(), pca.transform(real[k]) * signs, atol=1e-3)
        path = (
            pca.transform(
                torch.stack([syn.snapshots[step][k].flatten() for step in (0, 2)]).numpy()
            )
            * signs
        )
        assert np.allclose(axis.lines[k].get_xydata(), path, atol=1e-3)
        assert np.allclose(stars[k].get_offsets(), path[-1:], atol=1e-3)
    assert f"({100 * pca.explained_variance_ratio_[0]:.0f} % of the variance)" in axis.get_xlabel()


def test_a_decoded_set_is_drawn_too(run, tmp_path):
    path = tmp_path / run.path.name
    path.write_text(run.path.read_text())
    replace(run.synthetic, factor=2).save(path.with_suffix(".safetensors"))
    stars = explore.draw("embedding", Run(path), device="cpu").axes[0].collections[1::2]
    assert [len(star.get_offsets()) for star in stars] == [4] * 10
    explore.draw("neighbours", Run(path), device="cpu")


def test_every_title_hides_the_readers_folders():
    syn = Synthetic(
        torch.zeros(2, 1, 8, 8),
        torch.arange(2),
        "folder:/home/me/pets",
        ("cat", "dog"),
        torch.zeros(1, 1, 1),
        torch.ones(1, 1, 1),
        dd.protocol("dm"),
        "convnet",
    )
    assert (
        plots.images(syn).get_suptitle() == "folder:pets" and plots.short("cifar10") == "CIFAR-10"
    )


def test_moving_a_widget_changes_the_picture(found, run):
    panel = pytest.importorskip(
        "ddlib.report.panel", reason="needs ipywidgets", exc_type=ImportError
    )

    def png(view: str, of: Run, step: int = -1) -> bytes:
        return panel._png(explore.draw(view, of, step))

    shown = panel.Panel(found, ("digits", "dm", 1), "images", "cpu")
    dataset, method, ipc = shown.boxes
    assert (dataset.options, method.options, ipc.options) == (("digits",), ("dm", "random"), (1,))
    assert (
        shown.step.options == (0, 2, 4)
        and shown.step.value == 4
        and run.path.stem in shown.note.value
    )
    assert shown.picture.value == png("images", run)
    bundle = shown._repr_mimebundle_()  # a page without a kernel shows the picture
    assert "application/vnd.jupyter.widget-view+json" in bundle
    assert base64.b64decode(bundle["image/png"]) == shown.picture.value

    shown.step.value = 0
    assert shown.picture.value == png("images", run, 0) != png("images", run)
    method.value = "random"  # which has another IPC and no snapshots
    assert ipc.options == (2,) and shown.step.options == (0,)
    assert shown.picture.value == png("images", found["digits", "random", 2])
    method.value, shown.view.value = "dm", "evolution"
    assert shown.picture.value == png("evolution", run, shown.step.value)


def test_a_widget_says_what_is_wrong_in_one_sentence(found, monkeypatch):
    panel = pytest.importorskip(
        "ddlib.report.panel", reason="needs ipywidgets", exc_type=ImportError
    )
    shown = panel.Panel(found, ("digits", "dm", 1), "images", "cpu")
    before = shown.picture.value
    monkeypatch.setattr(
        explore, "dataset_of", lambda *_: (_ for _ in ()).throw(DDError("the images are <gone>"))
    )
    shown.view.value = "neighbours"
    assert (
        shown.note.value == "ddlib: the images are &lt;gone&gt;" and shown.picture.value == before
    )
    shown.view.value = "images"
    assert shown.note.value.startswith("Run(")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_thin_and_stored_without_outputs(path):
    book = json.loads(path.read_text())
    cells = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    assert len(book["cells"]) <= 25
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)
    assert set(book["metadata"]) == {"kernelspec", "language_info"}
    (tagged,) = [cell for cell in cells if cell["metadata"].get("tags") == ["parameters"]]
    for line in ast.parse("".join(tagged["source"])).body:
        assert isinstance(
            ast.literal_eval(line.value), (str, int, float)
        )  # scalars: what papermill's -p can set
    source = "\n".join("".join(cell["source"]) for cell in cells)
    assert "int(part)" not in source, (
        "lists of numbers are read by dd.numbers, which names a wrong one"
    )
    long = [
        node.name
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef)
        and sum(isinstance(part, ast.stmt) for part in ast.walk(node)) > 6
    ]
    assert not long, f"functions of more than five statements belong into the library: {long}"


def test_numbers_reads_a_scalar_parameter():
    assert (
        dd.numbers("1,10") == [1, 10]
        and dd.numbers(3) == [3]
        and dd.numbers("0.3, 1", float) == [0.3, 1.0]
    )
    with pytest.raises(DDError, match="'1,x' is no list of whole numbers"):
        dd.numbers("1,x")


def test_a_wrong_notebook_parameter_ends_in_one_sentence_and_papermill_fails(tmp_path):
    pytest.importorskip("papermill")
    out = tmp_path / "out.ipynb"
    source = Path(__file__).parents[2] / "notebooks" / "explore.ipynb"
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "papermill",
            source,
            out,
            "-k",
            "python3",
            "-p",
            "profile",
            "paper",
            "-p",
            "method",
            "dm",
            "--no-progress-bar",
        ],
        cwd=source.parent,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(source.parents[1]), "DDLIB_RESULTS": str(tmp_path)},
        check=False,
    )
    assert done.returncode != 0 and "ddlib: no kept set of dm on digits at IPC 1" in done.stderr
    outputs = [o for cell in json.loads(out.read_text())["cells"] for o in cell.get("outputs", ())]
    (error,) = [o for o in outputs if o["output_type"] == "error"]
    assert error["ename"] == "DDError" and len(error["traceback"]) == 1
    assert (
        error["traceback"][0].startswith("ddlib: no kept set of dm")
        and "\n" not in error["traceback"][0]
    )


def test_reproduce_refuses_a_parameter_that_no_notebook_has(monkeypatch, capsys):
    pytest.importorskip("papermill")
    words = ["ddlib", "reproduce", "--only", "start_here", "--set", "ipx=1"]
    monkeypatch.setattr(sys, "argv", words)
    assert cli.main() == 2
    assert capsys.readouterr().err.startswith(
        "ddlib: unknown notebook parameter 'ipx' (did you mean 'ipc'?); allowed: "
    )
