"""What nbval executes is read too: a paper's table has both columns filled in at least three rows, on the defaults."""

import os
import re
from pathlib import Path

import pytest

# Kernels, and whatever else the tests start, read tests/kernels/sitecustomize.py.
_HOOK = str(Path(__file__).parent / "tests" / "kernels")
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (_HOOK, os.environ.get("PYTHONPATH"))))

ENOUGH = 3  # rows


def rows_filled(html: str) -> int:
    """The rows of the first table in which `paper` and `ours` both hold a number."""
    first = html.partition("</table>")[0]
    rows = [
        [re.sub(r"<[^>]*>", "", cell).strip() for cell in re.findall(r"<t[dh]\b.*?</t[dh]>", row)]
        for row in re.findall(r"<tr>(.*?)</tr>", first, re.DOTALL)
    ]
    where = [rows[0].index(name) for name in ("paper", "ours")]
    return sum(all(re.match(r"\d+\.\d", row[k]) for k in where) for row in rows[1:])


@pytest.fixture(name="rows_filled")
def _rows_filled():
    return rows_filled


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """After a notebook's cell that shows a paper's table has run: look at what it gave."""
    result = yield
    cell = getattr(item, "cell", None)  # nbval's items have one
    if cell is not None and "dd.lesson.beside(" in cell.source:
        pages = [output["data"]["text/html"] for output in item.test_outputs if "data" in output]
        count = rows_filled("".join(pages))
        assert count >= ENOUGH, f"{item.nodeid}: paper and ours are filled in {count} rows alone"
    return result
