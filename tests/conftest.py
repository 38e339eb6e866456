"""Shared by all tests: few threads, scratch results, and markers that skip with a reason."""

import ipaddress
import os
import signal
import socket
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


def _loopback(address: object) -> bool:
    """Whether a socket's address is this machine's: 127.0.0.1, ::1, localhost or a file."""
    if not isinstance(address, tuple):
        return True
    host = str(address[0])
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@pytest.fixture(scope="session", autouse=True)
def _no_network():
    """No test leaves this machine."""

    def guarded(real):
        def connect(self, address):
            assert _loopback(address), f"a test connects to {address}"
            return real(self, address)

        return connect

    with pytest.MonkeyPatch.context() as patch:
        for name in ("connect", "connect_ex"):
            patch.setattr(socket.socket, name, guarded(getattr(socket.socket, name)))
        yield


# Set by pytest for every test, by torch when it first compiles and by Ray when it is imported.
_TORCH = ("TORCHINDUCTOR_", "_TORCHINDUCTOR_", "TRITON_", "KMP_")
_OTHERS = ("PYTEST_", *_TORCH, "RAY_", "PYTHONBREAKPOINT")


def _environment() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if not key.startswith(_OTHERS)}


def _process_state() -> dict[str, object]:
    """What a test could change for all that come after it in the same process."""
    return {
        "environment": _environment(),
        "threads": torch.get_num_threads(),
        "working directory": os.getcwd(),
        "float type": torch.get_default_dtype(),
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
    }


def _restore(state: dict[str, object]) -> None:
    """Put back what `_process_state` saw."""
    for key in _environment().keys() - state["environment"].keys():
        del os.environ[key]
    os.environ.update(state["environment"])
    torch.set_num_threads(state["threads"])
    os.chdir(state["working directory"])
    torch.set_default_dtype(state["float type"])
    for number, handler in zip((signal.SIGINT, signal.SIGTERM), state["signals"], strict=True):
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def _left_as_found():
    """A test that changes the process for those after it fails, and they do not."""
    before = _process_state()
    yield
    after = _process_state()
    if after == before:
        return
    _restore(before)
    changed = {
        part: set(after[part].items()) ^ set(value.items())
        if part == "environment"
        else after[part]
        for part, value in before.items()
        if after[part] != value
    }
    pytest.fail(f"the test leaves the process changed: {changed}; use monkeypatch")


@pytest.fixture
def results(tmp_path, monkeypatch) -> Path:
    """An empty results folder for this test alone, also named by DDLIB_RESULTS."""
    folder = tmp_path / "results"
    folder.mkdir()
    monkeypatch.setenv("DDLIB_RESULTS", str(folder))
    return folder


@pytest.fixture(autouse=True)
def _device(request, _left_as_found, monkeypatch):
    """Without the marker `gpu` a test means the CPU by "auto"; with it, the CPU's float32, not TF32, is the measure."""
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
