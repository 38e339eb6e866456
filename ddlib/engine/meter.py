"""Wall time, peak memory, FLOPs and the roofline: what a run cost, and what it could have cost."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Self

import torch
import torch.nn.functional as F

from ..files import SOURCE
from . import heap


class PeakMemory:
    """Peak bytes inside a `with` block, in `.bytes`, with how they were read in `.method`.

    CUDA: torch's allocator. Linux: the process's peak resident set, reset on entry. Elsewhere the process's peak
    since its start, which can only be too high.
    """

    def __init__(self, device: torch.device):
        self.device, self.bytes, self.method = device, 0, ""

    def __enter__(self) -> Self:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            heap.release()
            try:
                Path("/proc/self/clear_refs").write_text("5")
                self.method = "resident set of the process"
            except OSError:
                self.method = "resident set of the process since its start"
        return self

    def read(self) -> int:
        """Peak bytes so far."""
        if self.device.type == "cuda":
            self.method = "CUDA allocator"
            return torch.cuda.max_memory_allocated(self.device)
        try:
            status = Path("/proc/self/status").read_text()
            return int(status.split("VmHWM:")[1].split()[0]) * 1024
        except (OSError, IndexError):
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
                1 if sys.platform == "darwin" else 1024
            )

    def __exit__(self, *_: object) -> None:
        self.bytes = self.read()


class SavedTensors:
    """Peak bytes that autograd graphs hold inside a `with` block, in `.peak`; `.live` is what they hold now.

    Every tensor that a graph saves, also one built by a backward pass with `create_graph=True`, goes through
    `torch.autograd.graph.saved_tensors_hooks`: its storage counts from then until the last graph that saved it lets
    go, and once however many saved views it has. Temporaries and tensors that only Python holds do not count. Works on
    every device, `meta` too, where nothing is computed. A `torch.utils.checkpoint` region keeps its tensors from
    outer hooks, so only its inputs count.
    """

    def __enter__(self) -> Self:
        self.peak = self.live = 0
        self._owners: dict[int, int] = {}  # storage -> saved tensors that hold it
        self._hooks = torch.autograd.graph.saved_tensors_hooks(
            partial(_Saved, self), lambda saved: saved.tensor
        )
        self._hooks.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.__exit__(*_)


class _Saved:
    """One saved tensor; the graph drops this object when it frees the tensor."""

    def __init__(self, meter: SavedTensors, tensor: torch.Tensor):
        self.meter = meter
        self.tensor = tensor.detach()  # a saved output would hold its own graph alive
        storage = tensor.untyped_storage()
        self.key, self.bytes = storage._cdata, storage.nbytes()
        owners = meter._owners[self.key] = meter._owners.get(self.key, 0) + 1
        if owners == 1:
            meter.live += self.bytes
            meter.peak = max(meter.peak, meter.live)

    def __del__(self) -> None:
        self.meter._owners[self.key] -= 1
        if not self.meter._owners[self.key]:
            del self.meter._owners[self.key]
            self.meter.live -= self.bytes


def seconds(
    work: Callable[[], object],
    *,
    repeats: int = 3,
    warm: int = 1,
    device: torch.device | None = None,
) -> float:
    """Median wall seconds of `work()` after `warm` unmeasured calls, the device synchronised."""
    times = []
    for k in range(warm + repeats):
        start = time.perf_counter()
        work()
        if device is not None and device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return median(times[warm:])


def conv_rate(device: torch.device, batch: int = 128, width: int = 128, side: int = 32) -> float:
    """Measured FLOP/s of a large 3x3 convolution, float32, channels last, as PyTorch runs it by default: the roof.

    On a CPU that is oneDNN's, on a GPU it is in TF32.
    """
    rng = torch.Generator().manual_seed(0)
    last = {"device": device, "memory_format": torch.channels_last}
    x = torch.randn(batch, width, side, side, generator=rng).to(**last)
    kernels = torch.randn(width, width, 3, 3, generator=rng).to(**last)
    flops = 2 * 9 * width**2 * batch * side**2
    with torch.no_grad():
        taken = seconds(lambda: F.conv2d(x, kernels, padding=1), repeats=9, warm=3, device=device)
    return flops / taken


def machine(device: torch.device) -> str:
    """The device in words: the GPU's name, or the processor's and how many threads are used."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration, IndexError):
        name = "CPU"
    return f"{name}, {torch.get_num_threads()} threads"


def commit() -> str | None:
    """The git commit of the checkout, with -dirty where the code differs from it; None where there is none.

    A copy without `.git` is told by the environment variable DDLIB_COMMIT which commit it is of.
    """
    if not (SOURCE / ".git").exists():  # a copy, or installed into another project's environment
        return os.environ.get("DDLIB_COMMIT") or None
    try:
        git = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=SOURCE,
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:  # no git here
        return None
    return git.stdout.strip() or None
