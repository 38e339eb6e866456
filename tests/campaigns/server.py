"""A fork server: torch is imported once, and every case is a child of its own that may be killed."""

import json
import os
import select
import signal
import time
import traceback
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import filelock  # noqa: F401  here and not in every child
import sklearn.datasets  # noqa: F401
import torch._dynamo  # noqa: F401

from ddlib.core import DDError
from ddlib.engine import checkpoint

SECONDS = 600  # after which a child hangs: long, for a busy machine is none


def start(function: Callable[..., Any], *arguments: Any) -> tuple[int, int]:
    """Fork a child that calls `function(*arguments)`; its process id and the pipe of its answer."""
    reader, writer = os.pipe()
    child = os.fork()
    if child:
        os.close(writer)
        return child, reader
    try:
        _child(reader, writer, function, arguments)
    finally:  # never back into the parent's code, whatever signal comes
        os._exit(0)


def _child(reader: int, writer: int, function: Callable[..., Any], arguments: tuple) -> None:
    os.close(reader)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1), os.dup2(quiet, 2)
    checkpoint.commit = lambda: "of the campaign"  # git takes longer than a case
    answer = _answer(function, arguments)
    os.write(writer, json.dumps(answer).encode())  # at once: a signal tears no answer


def _answer(function: Callable[..., Any], arguments: tuple) -> tuple[str, Any]:
    try:
        return "done", function(*arguments)
    except DDError as error:
        return "sentence", str(error)
    except KeyboardInterrupt:
        return "stopped", ""
    except BaseException:  # noqa: BLE001  whatever comes is told
        return "traceback", traceback.format_exc()[-2000:]


def wait(started: tuple[int, int], seconds: float = SECONDS) -> tuple[str, Any]:
    """What became of a child: done, sentence, stopped, traceback, killed or hung, with its value or text."""
    child, reader = started
    end, text = time.monotonic() + seconds, b""
    with os.fdopen(reader, "rb") as pipe:
        while True:
            ready, _, _ = select.select([pipe], [], [], max(0, end - time.monotonic()))
            part = os.read(pipe.fileno(), 1 << 16) if ready else b""
            if not part:
                break
            text += part
    if not ready:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if not ready:
        return "hung", ""
    if os.WIFSIGNALED(status):
        return "killed", os.WTERMSIG(status)
    if not text:  # a signal before the child could answer
        return "stopped", ""
    return tuple(json.loads(text))


def case(function: Callable[..., Any], *arguments: Any) -> tuple[str, Any]:
    return wait(start(function, *arguments))


def interrupted(
    which: int, seconds: float, function: Callable[..., Any], *arguments: Any
) -> tuple[str, Any]:
    """A case that gets the signal `which` after so many seconds, if it is not over by then."""
    started = start(function, *arguments)
    select.select([started[1]], [], [], 0.01 + seconds)
    os.kill(started[0], which)
    return wait(started)


class Hang(BaseException):
    """A call that took too long."""


@contextmanager
def alarm(seconds: int):
    """Raise `Hang` in the block after so many seconds."""

    def ring(*_: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
