"""What is installed is known: versions, hashes, licences."""

import importlib.util
import re
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement

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
