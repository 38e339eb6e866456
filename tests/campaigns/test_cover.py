"""What the campaigns try is all there is to try: a new method, function or command has to be added to them."""

import fnmatch
import random
from inspect import isroutine

import ddlib as dd
from ddlib import cli
from tests.campaigns import calls, faults, odd


def test_every_method_is_killed():
    assert set(faults.METHODS) == set(dd.METHODS)


def public() -> set[str]:
    """Every public function and method, by its full name."""
    classes = (dd.Dataset, dd.Run, dd.Spec, dd.Synthetic)
    face = {name: getattr(dd, name) for name in dd.NAMES}
    owners = {"": face} | {f"{name}.": _own(getattr(dd, name), face) for name in dd.MODULES}
    owners |= {f"{each.__name__}.": vars(each) for each in classes}
    return {
        f"{owner}{name}"
        for owner, parts in owners.items()
        for name, part in parts.items()
        if not name.startswith("_") and (isroutine(part) or hasattr(part, "cache_info"))
    }


def _own(module, face: dict[str, object]) -> dict[str, object]:
    """What a module defines itself, but for what is `dd.NAME` too."""
    own = lambda name, part: (
        getattr(part, "__module__", "") == module.__name__ and (face.get(name) is not part)
    )
    return {name: part for name, part in vars(module).items() if own(name, part)}


def test_every_function_and_command_is_called(tmp_path, monkeypatch):
    for name in ("DDLIB_RESULTS", "DDLIB_CACHE", "DDLIB_DATA", "DDLIB_EXPERTS"):
        monkeypatch.setenv(name, str(tmp_path))
    paths = odd.originals(str(tmp_path))
    called = set(calls.functions(paths, random.Random(0)))
    patterns = [pattern for names in calls.LEFT_OUT.values() for pattern in names]
    left = {pattern: {*fnmatch.filter(public(), pattern)} for pattern in patterns}
    assert all(left.values()) and not called & set().union(*left.values())
    assert public() - called == set().union(*left.values())
    assert set(calls.commands(paths)) == set(cli.COMMANDS)
