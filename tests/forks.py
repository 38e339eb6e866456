"""Commands of ddlib in a child that is forked where torch is imported and nothing computed: a fresh process imports for
seconds. What needs a fresh interpreter, or `python -m ddlib` as a reader types it, takes `subprocess` itself."""

import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.reduction import DupFd
from typing import Any, Self

SERVER = get_context("forkserver")  # started by the first of a test process, and ends with it
# What the library imports when it runs, as tests/campaigns/server.py does.
SERVER.set_forkserver_preload(
    ["filelock", "sklearn.datasets", "torch._dynamo", "ddlib.engine.run", "ddlib.cli"]
)


class _Descriptor:
    """An open file that a child of the server gets too."""

    def __init__(self, number: int):
        self.number = number

    def __reduce__(self):
        return _number, (DupFd(self.number),)


def _number(sent: Any) -> int:
    return sent.detach()


def _module(*words: str) -> None:
    sys.argv = [*words]
    runpy.run_module(words[0], run_name="__main__", alter_sys=True)


def _child(call: list, place: str, env: dict[str, str], out: int, err: int) -> None:
    os.dup2(out, 1), os.dup2(err, 2)
    os.chdir(place)
    os.environ.clear()
    os.environ.update(env)
    function, *arguments = call
    function(*arguments)


class Popen:
    """What tests use of `subprocess.Popen`; words: [sys.executable, "-m", "ddlib", ...] or [function, *arguments]."""

    def __init__(self, words: list, *, cwd=None, env=None, stdout=None, stderr=None):
        if words[0] == sys.executable:
            assert words[1] == "-m", words
            words = [_module, *map(str, words[2:])]
        self.files = [
            tempfile.TemporaryFile("w+") if where == subprocess.PIPE else None  # noqa: SIM115
            for where in (stdout, stderr)
        ]
        written = [
            _Descriptor(file.fileno() if file else own)
            for file, own in zip(self.files, (1, 2), strict=True)
        ]
        place, env = str(cwd or os.getcwd()), dict(os.environ if env is None else env)
        arguments = (words, place, env, *written)
        self.process = SERVER.Process(target=_child, args=arguments, daemon=True)
        self.process.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.wait()

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self.process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("a forked child", timeout)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str | None, ...]:
        self.wait(timeout)
        return tuple(file and (file.seek(0), file.read())[1] for file in self.files)

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def run(
    words: list[Any | Callable], timeout: float = 300, **options
) -> subprocess.CompletedProcess:
    """`subprocess.run` of such words, with what they print."""
    child = Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)
    try:
        out, err = child.communicate(timeout)
    finally:
        child.kill()
    return subprocess.CompletedProcess(words, child.returncode, out, err)
