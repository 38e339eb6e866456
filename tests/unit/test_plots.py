"""Figures: what is drawn, read back from the axes."""

from itertools import chain, pairwise

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.text import Text
from test_tables import record

import ddlib as dd
from ddlib.core import DDError
from ddlib.data.dataset import from_arrays
from ddlib.distilled import Synthetic
from ddlib.report import plots, tables


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


def toy(classes=3, ipc=2, **extra) -> Synthetic:
    """A set whose pixels are 0.2 in class 0, 0.4 in class 1, ..."""
    pixels = (
        torch.arange(1, classes + 1)
        .repeat_interleave(ipc)
        .mul(0.2)[:, None, None, None]
        .expand(-1, 1, 10, 10)
    )
    return Synthetic(
        pixels,
        torch.arange(classes).repeat_interleave(ipc),
        "toy",
        tuple("abcdefghijkl"[:classes]),
        torch.zeros(1, 1, 1),
        torch.ones(1, 1, 1),
        dd.protocol("dm"),
        "convnet",
        **extra,
    )


def test_every_method_has_its_own_colour():
    assert set(dd.METHODS) <= set(plots.COLOURS)
    assert len({colour.lower() for colour in plots.COLOURS.values()}) == len(plots.COLOURS)


def test_accuracy_vs_ipc_draws_ours_solid_and_the_paper_dashed(tmp_path):
    found = [
        record(
            tmp_path, dataset="cifar10", ipc=ipc, profile="small", seed=seed, scores=(m - 1, m + 1)
        )
        for ipc, m in ((1, 20.0), (10, 40.0))
        for seed in (0, 1)
    ]
    (axis,) = plots.accuracy_vs_ipc(tables.runs(found)).axes
    ours, paper = axis.containers
    assert (ours.get_label(), paper.get_label()) == ("dm, ours", "dm, paper")
    assert ours[0].get_linestyle() == "-" and list(ours[0].get_ydata()) == [20, 40]
    assert paper[0].get_linestyle() == "--" and list(paper[0].get_ydata()) == [26.0, 48.9]
    low, high = np.array(ours[2][0].get_segments())[:, :, 1].T  # the error bars: networks at ± 1
    assert list(low) == [19, 39] and list(high) == [21, 41]
    assert ours[0].get_color() == paper[0].get_color() == plots.COLOURS["dm"]
    assert axis.get_title() == "CIFAR-10, shortened run" and "%" in axis.get_ylabel()
    assert [text.get_text() for text in axis.get_xticklabels()] == ["1", "10"]


def test_a_legend_names_overrides_only_where_a_method_has_several_settings(tmp_path):
    plain, other = record(tmp_path), record(tmp_path, lr_img=0.3)

    def names(*found) -> list[str]:
        (axis,) = plots.accuracy_vs_ipc(tables.runs(found), papers=False).axes
        return [text.get_text() for text in axis.get_yticklabels()]

    assert names(other) == ["dm"]
    assert names(plain, other) == ["dm", "dm (lr_img=0.3)"]


def test_runs_of_one_ipc_are_a_row_a_method_and_no_curve_of_one_point(tmp_path):
    found = [
        record(tmp_path, name, dataset="cifar10", profile="small", scores=(m - 1, m + 1))
        for name, m in (("frepo", 39.0), ("dm", 28.0))
    ]
    figure = plots.accuracy_vs_ipc(tables.runs(found))
    (axis,) = figure.axes
    assert [text.get_text() for text in axis.get_yticklabels()] == ["dm", "frepo"]  # one order
    drawn = {bars.get_label(): bars[0].get_xdata()[0] for bars in axis.containers}
    assert drawn == {"dm, ours": 28, "dm, paper": 26.0, "frepo, ours": 39, "frepo, paper": 46.8}
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["ours", "paper"]


@pytest.mark.parametrize(("protocol", "printed"), [("dsa", True), ("frepo", False)])
def test_random_images_stand_beside_the_printed_ones_of_their_protocol_alone(
    tmp_path, protocol, printed
):
    found = [
        record(tmp_path, "random", dataset="cifar10", ipc=ipc, profile="small", protocol=protocol)
        for ipc in (1, 10)
    ]
    (axis,) = plots.accuracy_vs_ipc(tables.runs(found)).axes
    labels = [bars.get_label() for bars in axis.containers]
    assert labels == ["random, ours", *["random, paper"] * printed]


def test_names_at_the_line_ends_do_not_cover_one_another(tmp_path):
    kinds = [name for name in dd.METHODS if name != "random"]
    found = [
        record(tmp_path, name, dataset="cifar10", ipc=ipc, profile="small", scores=(50.0, 50.0))
        for name in kinds
        for ipc in (1, 10)
    ]
    figure = plots.accuracy_vs_ipc(tables.runs(found), papers=False)
    figure.canvas.draw()
    named = [[text.get_text() for text in axis.texts] for axis in figure.axes]
    assert sorted(chain(*named)) == sorted(kinds) and max(map(len, named)) <= plots.MOST
    for axis in figure.axes:
        heights = sorted(Text.get_window_extent(text).y0 for text in axis.texts)
        assert min(b - a for a, b in pairwise(heights)) > 5
    assert len(figure.legends[0].get_texts()) <= 8


def test_a_line_that_ends_at_the_first_ipc_is_named_beside_its_end(tmp_path):
    cases = [("dm", 1), ("dm", 10), ("frepo", 1)]
    found = [record(tmp_path, name, dataset="cifar10", ipc=ipc) for name, ipc in cases]
    (axis,) = plots.accuracy_vs_ipc(tables.runs(found), papers=False).axes
    places = {text.get_text(): text.get_position()[0] for text in axis.texts}
    assert places["dm"] > 1 and 0 < places["frepo"] < 0.4  # shares of the axis


def test_many_methods_are_split_by_family_on_one_scale_with_random_images_in_each(tmp_path):
    kinds = [name for names in plots.FAMILIES.values() for name in names]
    assert set(kinds) == set(dd.METHODS)
    found = [
        record(tmp_path, name, dataset="cifar10", ipc=ipc, profile=profile, scores=(k, k))
        for k, name in enumerate(kinds)
        for ipc, profile in ((1, "small"), (10, "small"), (10, "paper"))
    ]
    figure = plots.accuracy_vs_ipc(tables.runs(found), datasets=["cifar10", "svhn"], methods=kinds)
    *split, svhn = figure.axes
    titles = [axis.get_title() for axis in split]
    assert titles == [f"CIFAR-10\n{family}" for family in plots.FAMILIES]
    assert svhn.get_title() == "SVHN" and len({axis.get_ylim() for axis in split}) == 1
    for axis, names in zip(split, plots.FAMILIES.values(), strict=True):
        ours = {c.get_label() for c in axis.containers if c.get_label().endswith(", ours")}
        assert ours == {f"{name}, ours" for name in {*names, "random"}}
    (dm,) = (c for c in split[1].containers if c.get_label() == "dm, ours")
    assert len(dm[0].get_xdata()) == 2  # of two runs at IPC 10 the paper's setting


def test_accuracy_vs_ipc_without_a_published_figure(tmp_path):
    (axis,) = plots.accuracy_vs_ipc(tables.runs([record(tmp_path)])).axes
    assert [bars.get_label() for bars in axis.containers] == ["dm, ours"]


def test_accuracy_vs_ipc_by_dataset_has_all_that_the_papers_print_and_ours_on_top(tmp_path):
    ours = record(tmp_path, dataset="folder:cifar10", ipc=10, profile="small", scores=(45.0, 47.0))
    figure = plots.accuracy_vs_ipc(
        tables.runs([ours]),
        datasets=["mnist", "cifar10"],
        methods=["dm", "datm"],
        full={"folder:cifar10": 90.0},
    )
    cifar, mnist = figure.axes
    titles = [axis.get_title() for axis in figure.axes]
    assert titles == ["CIFAR-10 (JPEG), shortened run", "MNIST"]
    mine, dm, datm = cifar.containers
    assert [c.get_label() for c in cifar.containers] == ["dm, ours", "dm, paper", "datm, paper"]
    assert list(mine[0].get_ydata()) == [46] and {1, 50, 1000} < set(
        dm[0].get_xdata()
    )  # not at our IPC alone
    assert datm[0].get_linestyle() == "--" and datm[0].get_color() == plots.COLOURS["datm"]
    across = {
        line.get_label(): line for line in cifar.lines if "whole set" in str(line.get_label())
    }
    assert {name: (line.get_ydata()[0], line.get_linestyle()) for name, line in across.items()} == {
        "whole set, ours": (90, "-"),
        "whole set, paper": (84.8, "--"),
    }
    (paper,) = mnist.containers  # DATM prints none there
    assert list(paper[0].get_xdata()) == [1, 10, 50]
    hollow = [
        line.get_xdata().tolist()
        for axis in (mnist, cifar)
        for line in axis.lines
        if line.get_markerfacecolor() == "w" and len(line.get_xdata())
    ]
    assert hollow == [[1, 10, 50]]  # all of MNIST's are from memory, none of CIFAR-10's
    assert {t.get_text() for t in figure.legends[0].get_texts()} == {"ours", "paper", *across}
    assert [text.get_text() for text in mnist.texts] == ["dm"]  # named at its line's end


def test_accuracy_vs_ipc_draws_no_ceiling_unasked_and_none_where_none_is_known(tmp_path):
    table = tables.runs([record(tmp_path, dataset="cifar10", profile="small")])
    lines = [
        str(line.get_label())
        for full, place in ((None, table), ({}, table.assign(dataset="digits")))
        for line in plots.accuracy_vs_ipc(place, full=full).axes[0].lines
    ]
    assert lines and not [name for name in lines if "whole" in name]


def test_heatmap_writes_every_number_but_the_missing_one():
    table = pd.DataFrame({"mlp": [50.0, 62.25], "vgg11": [40.0, None]}, index=["random", "dm"])
    axis, bar = plots.heatmap(
        table.rename_axis("images").rename_axis(columns="network"),
        "digits",
        label="points",
        centred=True,
    ).axes
    assert {t.get_position(): t.get_text() for t in axis.texts} == {
        (0, 0): "50.0",
        (1, 0): "40.0",
        (0, 1): "62.2",
    }
    assert axis.images[0].get_clim() == (-62.25, 62.25) and axis.images[0].get_cmap().name == "RdBu"
    assert [label.get_text() for label in axis.get_xticklabels()] == ["mlp", "vgg11"]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["random", "dm"]
    assert (axis.get_xlabel(), axis.get_ylabel(), axis.get_title(), bar.get_ylabel()) == (
        "network",
        "images",
        "digits",
        "points",
    )
    axis, _ = plots.heatmap(table, "", label="", text=table.map("{:.0f}!".format)).axes
    assert [t.get_text() for t in axis.texts] == ["50!", "40!", "62!"] and axis.images[
        0
    ].get_clim()[0] == 40


def test_grid_places_the_images_row_by_row():
    pixels = torch.tensor([0.2, 0.4, 0.6])[:, None, None, None].expand(-1, 1, 10, 10)
    (axis,) = plots.grid(pixels, 2, titles=["x", "y"], rows=["one", "two"]).axes
    picture = axis.images[0].get_array()
    ys, xs = axis.get_yticks(), axis.get_xticks()
    seen = [[picture[round(y), round(x), 0] for x in xs] for y in ys]
    assert np.allclose(seen, [[0.2, 0.4], [0.6, 1.0]])  # the place left over is white
    assert [label.get_text() for label in axis.get_yticklabels()] == ["one", "two"]


def test_images_have_one_row_a_class():
    (axis,) = plots.images(toy()).axes
    picture, xs = axis.images[0].get_array(), range(6, 24, 12)
    assert [label.get_text() for label in axis.get_yticklabels()] == ["a", "b", "c"]
    assert np.allclose(
        [[picture[round(y), x, 0] for x in xs] for y in axis.get_yticks()],
        [[0.2, 0.2], [0.4, 0.4], [0.6, 0.6]],
    )


def test_evolution_names_the_steps_and_needs_snapshots():
    syn = toy()
    figure = plots.evolution(toy(snapshots={0: syn.images, 40: syn.images * 0.5}))
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["step 0", "step 40"]
    with pytest.raises(DDError, match="snapshots"):
        plots.evolution(syn)


def test_real_images_are_drawn_from_the_data():
    images = (
        torch.arange(12, dtype=torch.uint8)
        .mul(20)[:, None, None, None]
        .expand(-1, 1, 10, 10)
        .contiguous()
    )
    labels = torch.arange(3).repeat_interleave(4)
    (axis,) = plots.real(from_arrays(images, labels, images, labels), per_class=4).axes
    picture = axis.images[0].get_array()
    seen = [
        sorted(round(float(picture[round(y), 6 + 12 * k, 0]) * 255 / 20) for k in range(4))
        for y in axis.get_yticks()
    ]
    assert seen == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]


def test_history(tmp_path):
    found = [record(tmp_path, ipc=ipc, seed=seed) for ipc in (1, 10) for seed in (0, 1)]
    (axis,) = plots.history(found).axes
    assert len(axis.lines) == 4 and [t.get_text() for t in axis.get_legend().get_texts()] == [
        "IPC 1",
        "IPC 10",
    ]


def test_lines_draw_the_mean_and_spread_of_equal_x_by_group():
    table = pd.DataFrame(
        [
            {"steps": n, "engine": e, "MiB": k * n + d, "cosine": 1.0 + 1e-5 * k}
            for n in (1, 10)
            for e, k in (("unroll", 2), ("tesla", 1))
            for d in (-1, 1)
        ]
    )
    figure = plots.lines(
        table,
        "steps",
        {"MiB": "memory (MiB)", "cosine": "cosine"},
        "engine",
        "digits, smoke profile",
        log=("steps",),
    )
    memory, cosine = figure.axes
    assert (memory.get_xlabel(), memory.get_ylabel(), memory.get_xscale()) == (
        "steps",
        "memory (MiB)",
        "log",
    )
    assert [text.get_text() for text in memory.texts] == ["tesla", "unroll"]  # by height
    assert [text.get_text() for text in cosine.texts] == ["unroll, tesla"] and not figure.legends
    assert len(cosine.containers) == 1  # two lines that coincide are one
    assert [c.lines[0].get_ydata().tolist() for c in memory.containers] == [[2, 20], [1, 10]]
    (bars,) = memory.containers[1].lines[2]
    assert [segment[:, 1].tolist() for segment in bars.get_segments()] == [[0, 2], [9, 11]]
    assert memory.containers[1].lines[0].get_color() == plots.ENGINES["tesla"]
    assert not cosine.containers[0].has_yerr  # no spread, no bars
    assert figure.get_suptitle() == "digits, smoke profile"


def test_save_writes_both_formats_with_the_same_bytes_again(tmp_path, monkeypatch):
    monkeypatch.setenv("DDLIB_FIGURES", str(tmp_path))
    table = pd.DataFrame({"a": [1.0]}, index=["b"])

    def drawn():
        return plots.heatmap(table, "one", label="%")

    path = plots.save(drawn(), "set", "smoke")
    assert path == tmp_path / "smoke" / "set.png" and path.is_file()
    first = path.with_suffix(".svg").read_bytes()
    plots.save(drawn(), "set", "smoke")
    assert path.with_suffix(".svg").read_bytes() == first


def test_a_picture_of_pixels_is_kept_as_png_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("DDLIB_FIGURES", str(tmp_path))
    path = plots.save(plots.images(toy()), "set", "smoke")
    assert [file.name for file in path.parent.iterdir()] == ["set.png"]
