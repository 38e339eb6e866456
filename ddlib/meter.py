"""Wall time, peak memory, FLOPs and the roofline: what a run cost, and what it could have cost."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch


class PeakMemory:
    """Peak bytes inside a `with` block, in `.bytes`, with how they were read in `.method`.

    CUDA: torch's allocator. Linux: the process's peak resident set, reset on entry. Elsewhere the process's peak
    since its start, which can only be too high.
    """

    def __init__(self, device: torch.device):
        self.device, self.bytes, self.method = device, 0, ""

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
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
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

    def __exit__(self, *_: object) -> None:
        self.bytes = self.read()


def seconds(work: Callable[[], object], *, repeats: int = 3, warm: int = 1, device: torch.device | None = None) -> float:
    """Median wall seconds of `work()` after `warm` unmeasured calls, the device synchronised."""
    times = []
    for k in range(warm + repeats):
        start = time.perf_counter()
        work()
        if device is not None and device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return median(times[warm:])


def sgemm_rate(device: torch.device, size: int = 2048) -> float:
    """Measured float32 matrix-multiply rate in FLOP/s: the roof that a convolution is held against."""
    a, b = (torch.randn(size, size, generator=torch.Generator().manual_seed(k)).to(device) for k in (0, 1))
    return 2 * size**3 / seconds(lambda: a @ b, repeats=9, warm=3, device=device)


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
