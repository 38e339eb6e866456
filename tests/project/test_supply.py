"""What is installed is known: versions, hashes, licences, and what a wheel can do."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests import forks

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def lock():
    """tools/lock.py as a module."""
    spec = importlib.util.spec_from_file_location("lock", ROOT / "tools" / "lock.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def closure(name: str, extras: tuple[str, ...]) -> set[str]:
    """Every package that `name[extras]` needs here."""
    wanted, todo = set(), [(name, extras)]
    while todo:
        name, extras = todo.pop()
        try:
            needs = map(Requirement, requires(name) or ())
        except PackageNotFoundError:
            continue
        for need in needs:
            marker = need.marker
            if marker and not any(marker.evaluate({"extra": extra}) for extra in ("", *extras)):
                continue
            key = re.sub(r"[-_.]+", "-", need.name).lower()
            if key not in wanted or need.extras:
                wanted.add(key)
                todo.append((key, tuple(need.extras)))
    return wanted - {"ddlib"}


def test_the_lock_has_every_package_with_its_hashes(lock):
    locked = lock.locked()
    assert closure("ddlib", ("docs", "lab", "test")) <= locked.keys()
    for name, (_, hashes) in locked.items():
        assert hashes and all(re.fullmatch("[0-9a-f]{64}", each) for each in hashes), name


def test_the_lock_and_the_constraints_agree(lock):
    locked = lock.locked()
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        name, found, version = line.partition("==")
        if found:
            assert locked[lock.canonical(name)][0] == version, name


def test_the_licences_are_those_of_what_is_locked(lock):
    rows = re.findall(r"^\| ([a-z0-9-]+) \| (\S+) \| (.+) \|$", lock.PAGE.read_text(), re.MULTILINE)
    listed = {
        name: version for name, version, _ in rows if name[0].isalnum() and version != "version"
    }
    assert listed == {name: version for name, (version, _) in lock.locked().items()}
    assert all(licence.strip() for _, _, licence in rows)
    assert (
        lock.licence("numpy").startswith("BSD") and lock.licence("nowhere") == "not installed here"
    )


WITH_CHECKOUT = ("reproduce", "site", "docs")


def use_wheel(place: str) -> None:
    """In a process of its own, which takes every module of ddlib from the folder `place`."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "ddlib"]:
        del sys.modules[name]
    sys.path.insert(0, place)
    import ddlib as dd
    from ddlib import cli

    for command in WITH_CHECKOUT:
        sys.argv = ["ddlib", command]
        print(cli.main())
    run = dd.run("random", "digits", ipc=1, eval_epochs=1, networks=1, progress=False)
    print(dd.plots.save(dd.plots.images(run.synthetic), "set", "smoke"))
    ours = [module for name, module in sys.modules.items() if name.partition(".")[0] == "ddlib"]
    assert len(ours) > 30 and all(Path(each.__file__).is_relative_to(place) for each in ours), ours


@pytest.mark.slow
def test_a_wheel_runs_and_says_what_needs_the_checkout(tmp_path):
    """Built from a copy, unpacked into a folder of its own, and asked from another one."""
    source, place, here = (tmp_path / name for name in ("source", "place", "here"))
    shutil.copytree(ROOT / "ddlib", source / "ddlib", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, source)
    build = ["wheel", ".", "--no-deps", "--no-build-isolation", "--quiet", "-w", str(tmp_path)]
    subprocess.run([sys.executable, "-m", "pip", *build], cwd=source, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(place)
    here.mkdir()
    ours = {key: value for key, value in os.environ.items() if not key.startswith("DDLIB_")}
    done = forks.run([use_wheel, str(place)], cwd=here, env=ours)
    assert done.returncode == 0, done.stderr
    *refused, figure = done.stdout.splitlines()
    assert refused == ["2", "2", "2"]
    said = [f"ddlib: {command} needs the source checkout" for command in WITH_CHECKOUT]
    lines = done.stderr.splitlines()
    assert all(line.startswith(words) for line, words in zip(lines, said, strict=True))
    assert figure == str(here / "figures" / "smoke" / "set.png")
    assert list((here / "results" / "smoke" / "random").glob("*.json"))
    written = {path.name for path in place.iterdir()}
    assert written == {"ddlib", *(path.name for path in place.glob("ddlib-*.dist-info"))}
