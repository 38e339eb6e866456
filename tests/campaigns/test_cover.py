"""What the campaigns try is all there is to try: a new method, function or command has to be added to them."""

import random

import ddlib as dd
from ddlib import cli
from tests.campaigns import calls, faults, odd


def test_every_method_is_killed():
    assert set(faults.METHODS) == set(dd.METHODS)


def test_every_function_and_command_is_called(tmp_path, monkeypatch):
    for name in ("DDLIB_RESULTS", "DDLIB_CACHE"):
        monkeypatch.setenv(name, str(tmp_path))
    paths = odd.originals(str(tmp_path))
    tried = {name.partition(".")[0] for name in calls.functions(paths, random.Random(0))}
    plain = {"DDError", "METHODS", "PROFILES"}  # which are not called
    results = {"Dataset", "Evaluation"}  # made by load, from_arrays and evaluate
    assert set(dd.__all__) - plain - results <= tried
    assert set(calls.commands(paths)) == set(cli.COMMANDS)
