"""Shared by all tests: few threads, scratch results, and markers that skip with a reason."""

import os
from pathlib import Path

# Set before torch is imported, so that subprocesses and notebook kernels get it too. The test networks are tiny: one
# thread takes half the CPU time of two, which wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def _scratch_results(tmp_path_factory):
    """Plain `pytest` writes nothing into results/; `make test` has named a scratch folder already."""
    os.environ.setdefault("DDLIB_RESULTS", str(tmp_path_factory.mktemp("results")))


@pytest.fixture
def results(tmp_path, monkeypatch) -> Path:
    """An empty results folder for this test alone, also named by DDLIB_RESULTS."""
    folder = tmp_path / "results"
    folder.mkdir()
    monkeypatch.setenv("DDLIB_RESULTS", str(folder))
    return folder


@pytest.fixture(autouse=True)
def _device(request, monkeypatch):
    """Without the marker `gpu` a test means the CPU by "auto"; with it, the CPU's float32 and not TF32 is the measure."""
    if request.node.get_closest_marker("gpu"):
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    else:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if item.get_closest_marker("real"):
        root = os.environ.get("DDLIB_DATA")
        if not root or not (Path(root) / "cifar10" / "train").is_dir():
            pytest.skip("needs DDLIB_DATA to name a folder with cifar10/train")
