"""A slimmed notebook shows what the executed one shows."""

import base64
import io

import numpy as np
from PIL import Image

from ddlib.report.slim import WIDGET, slim


def png(pixels: np.ndarray, mode: str = "RGB") -> str:
    file = io.BytesIO()
    Image.fromarray(pixels, mode).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def shown(encoded: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(encoded)))


def slimmed(**data) -> list[dict]:
    output = {"output_type": "display_data", "data": data, "metadata": {}}
    cell = {"cell_type": "code", "source": "1", "metadata": {"papermill": {}}, "outputs": [output]}
    done = slim({"metadata": {"widgets": {}}, "cells": [cell]})
    assert "widgets" not in done["metadata"] and done["cells"][0]["metadata"] == {}
    return [one["data"] for one in done["cells"][0]["outputs"]]


def test_progress_goes_and_a_widget_with_a_picture_keeps_the_picture():
    assert slimmed(**{WIDGET: {}, "text/plain": "0 %"}) == []
    picture = png(np.zeros((4, 4, 3), np.uint8))
    (kept,) = slimmed(**{WIDGET: {"model_id": "1"}, "image/png": picture, "text/plain": "Panel()"})
    assert set(kept) == {"image/png"}


def test_a_plot_takes_a_palette_and_a_photograph_keeps_its_colours():
    plot = np.full((64, 64, 3), 255, np.uint8)
    plot[20:22] = (0, 90, 200)
    (few,) = slimmed(**{"image/png": png(plot)})
    assert np.array_equal(np.asarray(shown(few["image/png"]).convert("RGB")), plot)
    photograph = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    (full,) = slimmed(**{"image/png": png(photograph)})
    assert np.array_equal(np.asarray(shown(full["image/png"]).convert("RGB")), photograph)
    glass = np.zeros((8, 8, 4), np.uint8)
    (same,) = slimmed(**{"image/png": png(glass, "RGBA")})
    assert same["image/png"] == png(glass, "RGBA")


def test_cells_of_a_table_lose_their_names_unless_a_style_uses_them():
    cell = '<td id="T_1_row0_col0" class="data row0 col0" >1</td>'
    (plain,) = slimmed(**{"text/html": f'<style type="text/css">\n</style>\n{cell}'})
    assert plain["text/html"] == "<td >1</td>"
    styled = f"<style>#T_1_row0_col0 {{color: red}}</style>{cell}"
    assert slimmed(**{"text/html": styled}) == [{"text/html": styled}]
