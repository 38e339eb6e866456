"""Nothing of ours goes into the network by itself."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

CODE = """
import ipaddress, sys

def silent(event, details):
    names = ("socket.connect", "socket.sendto", "socket.getaddrinfo", "socket.gethostbyname")
    if event not in names:
        return
    host = details[1][0] if event in names[:2] else details[0]
    assert host in ("localhost", None) or ipaddress.ip_address(host).is_loopback, (event, host)

sys.addaudithook(silent)
try:
    __import__("socket").create_connection(("192.0.2.1", 9), 0.1)
except AssertionError:
    print("guarded")
import ddlib as dd
for name in dd.__dir__():
    getattr(dd, name)
short = dict(ipc=1, iterations=2, eval_epochs=1, networks=1, backbone="convnet:width=4", progress=False)
run = dd.run("dm", "digits", **short)
run.transfer("mlp", networks=1)
run = dd.run("dm", "folder:" + sys.argv[1], **short)
print(dd.card(run)[:3])
"""


def test_import_and_runs_on_local_data_use_no_network(tmp_path):
    from PIL import Image

    for name in ("cat", "dog"):
        (tmp_path / "pets" / name).mkdir(parents=True)
        for number in range(4):
            picture = Image.new("L", (8, 8), 9 + number)
            picture.save(tmp_path / "pets" / name / f"{number}.png")
    places = {"DDLIB_RESULTS": str(tmp_path / "r"), "DDLIB_CACHE": str(tmp_path / "c")}
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(tmp_path / "pets")],
        capture_output=True,
        text=True,
        env={**os.environ, **places, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["guarded", "---"]


def test_tests_may_not_leave_this_machine():
    with pytest.raises(AssertionError, match="a test connects to"):
        socket.socket().connect(("192.0.2.1", 9))


def test_a_notebooks_kernel_may_not_leave_this_machine():
    """The hook that the root's conftest.py gives to all that the tests start."""
    code = "import socket, {}; socket.create_connection(('192.0.2.1', 9), 0.1)"
    asked = {
        module: subprocess.run(
            [sys.executable, "-c", code.format(module)],
            capture_output=True,
            text=True,
            check=False,
        ).stderr
        for module in ("ipykernel", "json")
    }
    assert "a notebook asks for the network" in asked["ipykernel"]
    assert "a notebook asks for the network" not in asked["json"]  # Ray's nodes talk to one another
