"""An executed notebook without what no reader sees: progress bars, times of cells, names of table cells, 32-bit plots.

It comes to a third of the size and shows the same. Pictures of photos keep their colours. A checksum in its metadata
covers its cells and the parameters that it was executed with; notebooks of before it stay readable.
"""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path
from typing import Any

from ..core import DDError
from ..files import read_json, seal_of

WIDGET = "application/vnd.jupyter.widget-view+json"
# Pandas names every cell.
NAMES = re.compile(r' (?:id|class)="(?:T_|data |col_heading|blank|row)[^"]*"')
COLOURS = 256
UNSEEN = 2.0  # mean difference of a palette's levels (of 255) that is not seen: plots and thumbnails are below


def slim(notebook: dict[str, Any]) -> dict[str, Any]:
    """The notebook, changed in place: its widgets' states go, and its outputs as the module says."""
    notebook["metadata"].pop("widgets", None)
    for cell in notebook["cells"]:
        for name in ("execution", "papermill"):
            cell["metadata"].pop(name, None)
        if cell["cell_type"] == "code":
            cell["outputs"] = [_slim(one) for one in cell["outputs"] if not is_progress(one)]
    return notebook


def sealed(notebook: dict[str, Any]) -> dict[str, Any]:
    """The notebook, as its file says it, with its checksum."""
    notebook["metadata"]["seal"] = _seal(notebook)
    return notebook


def read(path: Path) -> dict[str, Any]:
    """An executed notebook; one that is damaged, or was altered since it was executed, is a `DDError`."""
    value = read_json(path, "notebook", "reproduce it again")
    try:
        whole = _readable(value)
        altered = "seal" in value["metadata"] and value["metadata"]["seal"] != _seal(value)
    except (KeyError, TypeError, AttributeError, ValueError):
        whole = False
    if not whole:
        raise DDError(f"the notebook {path} is damaged or not one; reproduce it again")
    if altered:
        raise DDError(f"the notebook {path} was altered since it was executed; reproduce it again")
    return value


def _seal(notebook: dict[str, Any]) -> str:
    return seal_of(notebook["cells"], notebook["metadata"].get("papermill"))


def _readable(notebook: dict[str, Any]) -> bool:
    """Whether what is read of a notebook is text; an exception where it is not even there."""
    about = notebook["metadata"].get("papermill") or {"end_time": "", "parameters": {}}
    texts = [about["end_time"], about["parameters"].get("profile", "")]
    for cell in notebook["cells"]:
        tags = cell.get("metadata", {}).get("tags", [])
        texts += [cell["cell_type"], "".join(cell["source"]), *tags]
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            shown = [data.get(kind, "") for kind in ("image/png", "text/html", "text/plain")]
            base64.b64decode("".join(shown[0]))
            texts += [output["output_type"], *map("".join, (output.get("text", ""), *shown))]
    return all(isinstance(text, str) for text in texts)


def is_progress(output: dict[str, Any]) -> bool:
    """Whether an output is a widget without a picture: what moved while the notebook ran."""
    data = output.get("data", {})
    return WIDGET in data and "image/png" not in data


def _slim(output: dict[str, Any]) -> dict[str, Any]:
    data = output.get("data", {})
    if data.pop(WIDGET, None):  # its state is gone, and its text names widgets alone
        data.pop("text/plain", None)
    if "image/png" in data:
        data["image/png"] = _picture("".join(data["image/png"]))
    if "text/html" in data:
        data["text/html"] = _table("".join(data["text/html"]))
    return output


def _table(text: str) -> str:
    """HTML without the names of its cells, unless a style sheet in it uses them."""
    plain = re.sub(r'<style type="text/css">\s*</style>\s*', "", text)
    return plain if "<style" in plain else NAMES.sub("", plain)


def _picture(encoded: str) -> str:
    """A PNG with a palette in place of 32 bits a pixel, where that looks the same and is smaller."""
    import numpy as np
    from PIL import Image

    with Image.open(io.BytesIO(base64.b64decode(encoded))) as picture:
        if "A" in picture.mode and picture.getextrema()[-1][0] < 255:
            return encoded  # see-through somewhere
        full = picture.convert("RGB")
    few = full.quantize(COLOURS, dither=Image.Dither.NONE)
    levels = [np.asarray(one.convert("RGB"), dtype=float) for one in (full, few)]
    kept = few if abs(levels[0] - levels[1]).mean() < UNSEEN else full
    file = io.BytesIO()
    kept.save(file, format="PNG", optimize=True)
    smaller = base64.b64encode(file.getvalue()).decode()
    return min(smaller, encoded, key=len)
