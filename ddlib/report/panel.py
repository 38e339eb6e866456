"""The widgets of explore.ipynb: choose a run, a step and a view; the picture is `explore.draw`'s. Needs ipywidgets."""

from __future__ import annotations

import base64
import html
import io
from typing import Any

import ipywidgets as widgets
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from ..core import DDError, choose
from ..engine.record import Run
from .explore import VIEWS, Key, draw, steps


class Panel(widgets.VBox):
    """Widgets for dataset, method, IPC, step and view above their picture.

    found: as `explore.choices` gives it; first: the key to begin with. Where no kernel runs (GitHub, a static page) the
    first picture stands in place of the widgets. A `DDError` is one sentence below the picture.
    """

    def __init__(
        self, found: dict[Key, Run], first: Key, view: str = "images", device: str = "auto"
    ) -> None:
        self.found, self.device, self.busy = found, device, False
        self.boxes = [
            widgets.Dropdown(description=name, options=[value], value=value)
            for name, value in zip(("dataset", "method", "IPC"), first, strict=True)
        ]
        self.step = widgets.SelectionSlider(
            description="step", options=[-1], continuous_update=False
        )
        self.view = widgets.ToggleButtons(options=list(VIEWS), value=choose("view", view, VIEWS))
        # Without it the box stretches the picture.
        own_size = widgets.Layout(align_self="flex-start", max_width="100%")
        self.picture, self.note = widgets.Image(format="png", layout=own_size), widgets.HTML()
        super().__init__([widgets.HBox(self.boxes), self.step, self.view, self.picture, self.note])
        self.refresh()
        for control in (*self.boxes, self.step, self.view):
            control.observe(self.refresh, "value")

    def refresh(self, change: dict | None = None) -> None:
        """Draw anew, after the later choices have been fitted to the earlier ones."""
        if self.busy:  # a change that the lines below make
            return
        self.busy = True
        for k, box in enumerate(self.boxes):  # each offers what the earlier ones leave
            before = tuple(b.value for b in self.boxes[:k])
            _offer(box, [key[k] for key in self.found if key[:k] == before])
        run = self.found[tuple(box.value for box in self.boxes)]
        try:
            _offer(self.step, steps(run), at_end=self.step.value == self.step.options[-1])
            self.picture.value = _png(draw(self.view.value, run, self.step.value, self.device))
            self.note.value = html.escape(repr(run))
        except DDError as error:
            self.note.value = html.escape(f"ddlib: {error}")
        finally:
            self.busy = False

    def _repr_mimebundle_(self, **options: Any) -> dict[str, Any]:
        return super()._repr_mimebundle_(**options) | {
            "image/png": base64.b64encode(self.picture.value).decode()
        }


def _offer(box: Any, options: list, at_end: bool = False) -> None:
    """Give a widget its options; its value stays where it can, else it is the first; `at_end` it is the last."""
    options, value = list(dict.fromkeys(options)), box.value
    if list(box.options) != options:
        box.options = options
        box.value = value if value in options and not at_end else options[-1 if at_end else 0]


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=100, bbox_inches="tight")
    plt.close(figure)  # else it lives as long as the kernel
    return file.getvalue()
