"""The project around the library: pins that agree, one formatter, light imports, commands that exist."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONDA = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]


def declared() -> list[Requirement]:
    """Every direct dependency, core and extras."""
    return [
        Requirement(r)
        for r in sum(PROJECT["optional-dependencies"].values(), PROJECT["dependencies"])
    ]


def pins(lines: list[str]) -> dict[str, str]:
    """name -> exact version; anything but name==version is an error."""
    found = {}
    for line in lines:
        match = re.fullmatch(r"([A-Za-z0-9._-]+)==([0-9][0-9.]*)", line)
        assert match, f"{line!r} is not of the form name==version"
        name = canonicalize_name(match[1])
        assert name not in found, f"{name} is pinned twice"
        found[name] = match[2]
    return found


def constraints() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return pins([line for line in lines if line and not line.startswith("#")])


def test_every_dependency_is_pinned_within_its_bounds():
    pinned = constraints()
    for need in declared():
        name = canonicalize_name(need.name)
        assert name in pinned, f"{name} has no pin in constraints.txt"
        assert len(need.specifier) == 1 and str(need.specifier).startswith(">="), (
            f"{need} has no lower bound"
        )
        assert need.specifier.contains(pinned[name]), f"{name}=={pinned[name]} is outside {need}"


def test_environment_yml_carries_the_same_pins():
    (pip,) = [entry["pip"] for entry in CONDA if isinstance(entry, dict)]
    assert pip[0] == "-c constraints.txt" and pip[-1] == "-e .[docs,lab,test]"
    names = {canonicalize_name(need.name) for need in declared()}
    assert pins(pip[1:-1]) == {
        name: version for name, version in constraints().items() if name in names
    }


def test_python_versions_agree():
    (conda,) = [
        entry.split("=")[1]
        for entry in CONDA
        if isinstance(entry, str) and entry.startswith("python=")
    ]
    assert SpecifierSet(PROJECT["requires-python"]).contains(conda)
    floor = PROJECT["requires-python"].removeprefix(">=")
    assert f"sys.version_info < ({floor.replace('.', ', ')})" in (ROOT / "Makefile").read_text()
    ruff = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["ruff"]
    assert ruff["target-version"] == "py" + floor.replace(".", "")


@pytest.mark.parametrize("words", [["format", "--check"], ["check"]])
def test_the_formatter_and_the_linter_find_nothing(words):
    done = subprocess.run(
        [sys.executable, "-m", "ruff", *words, str(ROOT)],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_importing_the_library_needs_no_jupyter():
    code = (
        "import sys, ddlib\n"
        "assert ddlib.__file__, 'ddlib/__init__.py is missing'\n"
        "print(*[m for m in ('IPython', 'papermill', 'nbformat', 'ipykernel', 'jupyterlab') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def targets() -> set[str]:
    return set(re.findall(r"^([a-z]+):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE))


def test_makefile_targets():
    assert {"env", "reproduce", "test", "lab", "bench", "clean", "help"} <= targets()


def test_readme_names_only_commands_that_exist():
    readme = ROOT / "README.md"
    assert readme.exists(), "README.md is missing"
    # `make word` at the start of a code span or of a line, so that "make a figure" in prose is no command
    named = set(re.findall(r"(?:^|`|\$ )make ([a-z]+)", readme.read_text(), re.MULTILINE))
    assert named, "README.md names no make command"
    assert named <= targets(), (
        f"README.md names {sorted(named - targets())}, which the Makefile lacks"
    )


# A stand-in interpreter: `-m venv` copies it into .venv, `-m pip install` writes a line to log (and fails if asked to).
FAKE_PYTHON = """#!/bin/sh
case "$*" in
    "-V") echo "Python 3.9.1" ;;
    *version_info*) [ ! -e old ] ;;
    "-m venv"*) mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
    "-m pip install"*) echo "$@" >> log; [ ! -e broken ] ;;
esac
"""


@pytest.fixture
def checkout(tmp_path) -> Path:
    """The Makefile with what it reads and a stand-in for python, in a folder with a space in its name."""
    folder = tmp_path / "a clone"
    folder.mkdir()
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder)
    (folder / "python").write_text(FAKE_PYTHON)
    (folder / "python").chmod(0o755)
    return folder


def make_env(folder: Path) -> tuple[subprocess.CompletedProcess, int]:
    """`make env`, and the number of installs so far."""
    command = ["make", "-s", "env", "PYTHON=./python"]
    outside = {
        k: v for k, v in os.environ.items() if not k.startswith("MAKE")
    }  # these tests may run under make -j
    done = subprocess.run(
        command, cwd=folder, env=outside, capture_output=True, text=True, check=False
    )
    log = folder / "log"
    return done, len(log.read_text().splitlines()) if log.exists() else 0


needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


@needs_make
def test_make_env_installs_once_and_again_when_a_pin_changes(checkout):
    done, installs = make_env(checkout)
    assert (done.returncode, installs) == (0, 1), done.stderr
    assert "-c constraints.txt -e .[docs,lab,test]" in (checkout / "log").read_text()

    (checkout / "constraints.txt").touch()  # new time, same content: as in a fresh clone
    done, installs = make_env(checkout)
    assert (done.returncode, installs, done.stdout + done.stderr) == (0, 1, "")

    for n, name in enumerate(("constraints.txt", "pyproject.toml"), 2):
        text = (checkout / name).read_text()
        (checkout / name).write_text(
            text.replace("safetensors", "safetensorz")
        )  # as many lines and bytes
        assert make_env(checkout)[1] == n


@needs_make
def test_make_env_repeats_a_failed_install(checkout):
    make_env(checkout)
    pinned = checkout / "constraints.txt"
    text = pinned.read_text()
    pinned.write_text(text.replace("==", "==9"))
    (checkout / "broken").touch()
    assert make_env(checkout)[0].returncode != 0

    pinned.write_text(
        text
    )  # back to what was installed before: the failed attempt may have changed half of it
    (checkout / "broken").unlink()
    done, installs = make_env(checkout)
    assert (done.returncode, installs) == (0, 3)
    assert make_env(checkout)[1] == 3


@needs_make
def test_make_env_refuses_an_old_python(checkout):
    (checkout / "old").touch()
    done, installs = make_env(checkout)
    assert done.returncode != 0 and installs == 0
    assert "needs Python 3.11 or newer, but './python' is Python 3.9.1" in done.stderr
    assert not (checkout / ".venv").exists()
