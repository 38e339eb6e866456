"""Every notebook with every parameter wrong: one sentence, before anything is trained.

The cells run in this process until one fails, which needs no kernel. That a kernel shows the sentence in place of the
traceback, and that papermill then exits non-zero, is in test_explore.py.
"""

from __future__ import annotations

import ast
import json
import tempfile
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import pytest
import torch
from test_data import tree

from ddlib.core import DDError, numbers

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))
WRONG = {
    "profile": ("smok", 3),
    "dataset": ("nothing", "folder:nowhere", 7),
    "device": ("gpu",),
    "ipcs": ("0", "1,x", ""),
    "ipc": (0, "x"),
    "seeds": ("-1", "x"),
    "seed": (-1, "x"),
    "methods": ("dm,dmm", ""),
    "method": ("dmm",),
    "baselines": ("rando",),
    "proxies": ("dmm",),
    "hosts": ("dc,dmm",),
    "gradients": ("exact",),
    "networks": (-1, "x"),
    "chunks": (-1, "x"),
    "measured": (0, "x"),
    "images": (0, "x"),
    "minival": (2.0, "x"),
    "steps": ("0", "x"),
    "orders": ("-1", "x"),
    "memory": (-1, "x"),
    "factors": ("-1", "x"),
    "resolution": (0, "x"),
    "folder": ("/nowhere",),
    "classes": ("0", "1", "x"),
    "resolutions": ("0", "x"),
    "widths": ("0", "x"),
    "datasets": ("cifar", "imagenette", ""),
}
UNUSED = {"claims": ("dataset", "device")}  # which it takes because every notebook is given them


def code(path: Path) -> list[str]:
    return [
        "".join(cell["source"])
        for cell in json.loads(path.read_text())["cells"]
        if cell["cell_type"] == "code"
    ]


def parameters(path: Path) -> dict[str, object]:
    return {
        line.targets[0].id: ast.literal_eval(line.value) for line in ast.parse(code(path)[0]).body
    }


@pytest.fixture
def untrained(results, monkeypatch):
    """Empty folders, and no gradient is taken in them."""

    def trained(*_, **__):
        raise AssertionError("a network was trained before the parameter was looked at")

    monkeypatch.setattr(torch.autograd, "grad", trained)
    monkeypatch.setattr(torch.autograd, "backward", trained)
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(results))
    for name in ("DDLIB_DATA", "DDLIB_CACHE", "DDLIB_EXPERTS", "DDLIB_FIGURES"):
        monkeypatch.setenv(name, str(results / name))
    return results


@pytest.mark.parametrize(
    ("path", "key", "value"),
    [
        pytest.param(path, key, value, id=f"{path.stem}-{key}={value}")
        for path in NOTEBOOKS
        for key, default in parameters(path).items()
        if key not in UNUSED.get(path.stem, ())
        for value in WRONG.get(key, ())
        if value != default
    ],
)
def test_a_wrong_parameter_is_one_sentence_and_nothing_is_trained(untrained, path, key, value):
    given = (
        {"folder": str(tree(untrained / "pets", n=2))} if path.stem == "bring_your_own_data" else {}
    )
    cells, space = code(path), {"display": print}
    with pytest.raises(DDError) as caught:
        exec(cells[0], space)  # noqa: S102
        space.update(given | {key: value})
        for cell in cells[1:]:
            exec(cell, space)  # noqa: S102
    assert "\n" not in str(caught.value) and not list(untrained.rglob("*.safetensors"))


def test_numbers_have_a_lower_bound():
    assert numbers("0,2", least=0) == [0, 2] and numbers(0.5, float, least=0.5) == [0.5]
    with pytest.raises(
        DDError, match="'1,0' is no list of whole numbers of at least 1; write them with commas"
    ):
        numbers("1,0", least=1)
