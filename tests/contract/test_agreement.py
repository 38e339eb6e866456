"""Threads, compiled code and a GPU move no method's numbers by more than is stated."""

import pytest
from torch._dynamo.utils import counters

import ddlib as dd
from ddlib.train.loop import _can_compile
from tests.contract.agreement import COMPILES, EXACT, SETTINGS, bound, difference


def test_every_method_is_held():
    assert set(SETTINGS) == set(dd.METHODS) and {*EXACT, *COMPILES} <= set(SETTINGS)


@pytest.mark.parametrize("method", SETTINGS)
def test_one_thread_and_two(method, tmp_path):
    assert difference(method, tmp_path, "threads") <= bound(method, "threads")


@pytest.mark.parametrize("method", COMPILES)
def test_compiled_and_plain(method, tmp_path):
    if not _can_compile():
        pytest.skip("needs a C++ compiler and Python.h for torch.compile")
    before = counters["stats"]["unique_graphs"]
    assert difference(method, tmp_path, "compiled") <= bound(method, "compiled")
    assert counters["stats"]["unique_graphs"] > before


@pytest.mark.gpu
@pytest.mark.parametrize("method", SETTINGS)
def test_a_gpu_and_the_cpu(method, tmp_path):
    assert difference(method, tmp_path, "cuda") <= bound(method, "cuda")
