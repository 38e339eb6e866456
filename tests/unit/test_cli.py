"""The command line as a reader meets it: help at once, examples that parse, tables that fit, quiet notebooks."""

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pandas as pd
import pytest

from ddlib import cli
from ddlib.config import PROFILES, resolve
from ddlib.core import DDError
from ddlib.report import presets, reproduce, tables, terminal

ROOT = Path(__file__).parents[2]


@pytest.fixture
def ddlib(monkeypatch, capsys):
    def call(*words):
        monkeypatch.setattr(sys, "argv", ["ddlib", *map(str, words)])
        try:
            code = cli.main()
        except SystemExit as error:
            code = error.code
        return code, *capsys.readouterr()

    return call


def test_help_needs_neither_torch_nor_pandas_and_is_there_at_once():
    code = (
        "import sys; from ddlib.cli import parser; print(parser().format_help());"
        "assert not {'torch', 'pandas', 'matplotlib', 'yaml'} & {*sys.modules}"
    )
    seconds = []
    for _ in range(3):  # the best of them: the machine may be busy
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
        )
        seconds.append(time.perf_counter() - start)
        assert done.returncode == 0, done.stderr
        assert all(f"\n    {name}" in done.stdout for name in cli.COMMANDS)
    assert min(seconds) < 1


def test_bare_ddlib_helps(ddlib):
    code, out, err = ddlib()
    assert (code, err) == (0, "") and out == cli.parser().format_help()


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_a_help_page_has_examples_that_parse(ddlib, name):
    code, out, _ = ddlib(name, "--help")
    assert max(map(len, out.splitlines())) <= terminal.WIDEST
    lines = [line for line in out.splitlines() if line.startswith(f"  ddlib {name}")]
    assert code == 0 and lines
    for line in lines:
        words = shlex.split(line.split("     ")[0])
        assert cli.parser().parse_args(words[1:]).command == name
    if "--profile" in out:
        assert all(profile in out for profile in PROFILES)


def test_presets_name_the_line_that_gives_each_value(ddlib):
    for profile in PROFILES:
        rows = presets.table("dm", "folder:cifar10", 10, profile)
        values = resolve("dm", "cifar10", 10, profile).values
        assert sorted(rows.key) == sorted(values)
        for row in rows[rows.source != "default"].itertuples():
            file, line = row.source.partition(",")[0].split(":")
            text = (ROOT / "ddlib" / "methods" / file).read_text().splitlines()[int(line) - 1]
            assert f"{row.key}:" in text and row.remark in text + row.remark
    rows = presets.table("tesla", "imagenet1k", 1, "paper").set_index("key")  # YAML's `<<: *name`
    assert rows.loc["syn_steps", "value"] == "10" and "trajectory.yaml:" in rows.source["syn_steps"]
    code, out, _ = ddlib("presets", "frepo", "--dataset", "cifar10", "--ipc", "10")
    assert code == 0 and max(map(len, out.splitlines())) <= 100
    code, out, err = ddlib("presets", "dn", "--dataset", "cifar10", "--ipc", "10")
    assert (code, out) == (2, "") and "unknown method 'dn'" in err


def test_a_table_folds_to_the_width_it_is_given():
    rows = pd.DataFrame(
        {
            "name": ["a long sentence that goes on and on", "b"],
            "count": [1.26, float("nan")],
            "none": [None, None],
        }
    )
    text = terminal.table(rows, 24)
    assert max(map(len, text.splitlines())) <= 24 and "none" not in text and "nan" not in text
    assert "1.3" in text and " ".join(text.split()).startswith("name count a long sentence")


def test_the_kept_runs_fit_a_terminal():
    rows = tables.runs(tables.stored(ROOT / "results", "small"))
    for width in (60, 100):
        text = terminal.runs(rows, width)
        assert len(text.splitlines()) > len(rows) and max(map(len, text.splitlines())) <= width
    assert all(f" {name[-8:]}" in text for name in rows.name)  # by which a shell finds the files


@pytest.fixture
def notebooks(tmp_path, monkeypatch):
    """A checkout with one notebook of three lines."""
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("papermill")
    monkeypatch.setattr(reproduce, "SOURCE", tmp_path)
    for name in ("DDLIB_RESULTS", "DDLIB_FIGURES", "PYTHONPATH", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "1" if name == "OMP_NUM_THREADS" else str(tmp_path))
    cells = [
        nbformat.v4.new_code_cell("profile = 'x'  # a remark\n# another\nfail = False"),
        nbformat.v4.new_code_cell("print(profile)\nassert not fail"),
    ]
    cells[0].metadata["tags"] = ["parameters"]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    (tmp_path / "notebooks").mkdir()
    nbformat.write(
        nbformat.v4.new_notebook(cells=cells, metadata=kernel), tmp_path / "notebooks" / "one.ipynb"
    )
    return tmp_path


def test_reproduce_is_quiet_and_says_where_to_look(notebooks, capfd, monkeypatch):
    monkeypatch.chdir(notebooks)
    paths = reproduce.reproduce(results=notebooks / "results")
    out, err = capfd.readouterr()
    assert err == "" and out.splitlines()[0].startswith("[ 1/1] one")
    assert "results/notebooks/smoke  the executed notebooks" in out
    assert max(map(len, out.splitlines())) <= 100
    text = paths[0].read_text()
    assert "smoke\\n" in json.dumps(json.loads(text)["cells"]) and str(notebooks) not in text
    with pytest.raises(DDError, match="notebook one stopped: AssertionError"):
        reproduce.reproduce(parameters={"fail": True}, results=notebooks / "results")
    with pytest.raises(DDError, match="unknown notebook parameter 'ipx'"):
        reproduce.reproduce(parameters={"ipx": 1}, results=notebooks / "results")


def test_of_two_that_reproduce_at_once_one_executes(notebooks, monkeypatch):
    """The second waits and executes nothing that the first has made meanwhile with the same parameters."""
    made, began, go_on = [], threading.Event(), threading.Event()

    def execute(papermill, source, target, values):
        made.append(values.get("fail"))
        began.set()
        assert go_on.wait(30)
        copy = {"cells": [], "metadata": {"papermill": {"parameters": values, "end_time": ""}}}
        target.parent.mkdir(exist_ok=True)
        target.write_text(json.dumps(copy))

    monkeypatch.setattr(reproduce, "_execute", execute)
    asked = {"results": notebooks / "results"}
    first, second = (threading.Thread(target=reproduce.reproduce, kwargs=asked) for _ in range(2))
    first.start()
    assert began.wait(30)
    second.start()
    time.sleep(0.5)  # until it waits
    go_on.set()
    for thread in (first, second):
        thread.join(30)
    assert made == [None]
    reproduce.reproduce(**asked)  # asked for later: made anew
    reproduce.reproduce(**asked, parameters={"fail": 0})
    assert made == [None, None, 0]


# A shell's background job ignores Ctrl-C, and what it starts does too.
INTERRUPTED = """
import signal, sys
from pathlib import Path
from ddlib.report import reproduce
signal.signal(signal.SIGINT, signal.default_int_handler)
reproduce.SOURCE = Path(sys.argv[1])
reproduce.reproduce(results=sys.argv[1] + "/results")
"""


def test_ctrl_c_ends_reproduces_kernel_within_two_seconds(notebooks):
    """The command itself ends when nbclient has seen it, which looks once a second."""
    nbformat, psutil = pytest.importorskip("nbformat"), pytest.importorskip("psutil")
    note = notebooks / "kernel"
    waits = f"import os, time\nopen({str(note)!r}, 'w').write(str(os.getpid()))\ntime.sleep(60)"
    path = notebooks / "notebooks" / "one.ipynb"
    notebook = nbformat.read(path, as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell(waits))
    nbformat.write(notebook, path)
    words = [sys.executable, "-c", INTERRUPTED, str(notebooks)]
    ours = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(words, env=ours, stderr=subprocess.DEVNULL) as process:
        while not (note.is_file() and note.read_text()):
            assert process.poll() is None
            time.sleep(0.05)
        kernel = psutil.Process(int(note.read_text()))
        process.send_signal(signal.SIGINT)
        _, alive = psutil.wait_procs([kernel], timeout=2)
        assert not alive or kernel.status() == psutil.STATUS_ZOMBIE
        assert process.wait(15) != 0


def test_what_is_executed_again_keeps_its_parameters(tmp_path):
    copy = {"cells": [], "metadata": {"papermill": {"parameters": {"ipcs": 1}, "end_time": ""}}}
    (tmp_path / "one.ipynb").write_text(json.dumps(copy))
    assert reproduce._executed_with(tmp_path) == {"one": {"ipcs": 1}}
    with pytest.raises(DDError, match="there is no executed notebook in"):
        reproduce._executed_with(tmp_path / "elsewhere")
