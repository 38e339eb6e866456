"""One outer step of FRePo beside DM's and trajectory matching's at the same IPC: time, memory, and FRePo's roofline.

The roofline is the step's FLOPs over the rate of a large 3x3 convolution on this machine: a forward pass for every real
image, forward and input gradient for every synthetic one (mirrored copies too), forward and backward for the network's
own step, and the kernel in float64 counted as float32.
Sizes are CIFAR-10's in the paper profile (trajectory matching: 20 unrolled steps); images are random bytes, which
changes no work.
"""

from __future__ import annotations

import torch

from benchmarks import show
from benchmarks.dm import shapes
from ddlib.config import Spec, resolve
from ddlib.data.dataset import Dataset
from ddlib.engine.meter import PeakMemory, SavedTensors, conv_rate, machine, seconds
from ddlib.methods.frepo import FRePo
from ddlib.nets.build import count_flops
from ddlib.studies.trajectories import one_step


def roofline(work: FRePo, rate: float) -> float:
    """Seconds of one outer step at `rate` FLOP/s."""
    c, n = work.config, len(work.images)
    shown = n * (2 if c.flip == "on" else 1)
    images = min(c.batch_real, len(work.data.labels["train"])) + 2 * shown + 3 * min(n, c.batch_net)
    kernel = 3 * 2 * shown**2 * work.nets[0].feature_dim  # the product and its gradient
    return (images * count_flops(work.nets[0], work.data.shape) + kernel) / rate


def measure(spec: Spec, data: Dataset, repeats: int) -> dict:
    """Median seconds of an outer step, and the peaks of what autograd holds and of the process or the GPU."""
    step = one_step(spec, data)
    step()
    with PeakMemory(data.device) as peak:
        taken = seconds(step, repeats=repeats, device=data.device)
    row = {
        "what": f"{spec.method} outer step",
        "ipc": spec.ipc,
        "compiled": spec.run.compile,
        "seconds": taken,
        "peak MiB": round(peak.bytes / 2**20),
    }
    if not spec.run.compile:  # hooks would change what is compiled
        with SavedTensors() as saved:
            step()
        row["graph MiB"] = round(saved.peak / 2**20, 1)
    return row


def rows_of(
    ipc: int,
    data: Dataset,
    rate: float,
    repeats: int,
    compile: bool = False,
    profile: str = "paper",
    **overrides,
) -> list[dict]:
    """A row a method; FRePo's has its roofline. `overrides` are keys that the three methods share."""
    common = {"compile": compile, "zca": ""} | overrides
    own = {"dm": {}, "mtt": {"syn_steps": 20, "gradient": "adjoint"}, "frepo": {}}
    found = []
    for method, more in own.items():
        spec = resolve(method, "cifar10", ipc, profile, **common, **more)
        found.append(measure(spec, data, repeats))
        if method == "frepo":
            best = roofline(FRePo(spec.config, data, ipc, spec.run.backbone, 0), rate)
            found[-1] |= {"roofline seconds": best, "over roofline": found[-1]["seconds"] / best}
    return found


def main(device: torch.device) -> list[dict]:
    """Print the rows, those of an IPC as soon as they are measured, and return them."""
    rate = conv_rate(device)
    rows = [
        {
            "what": f"FRePo beside the others on {machine(device)}, 3x3 convolution {rate / 1e9:.0f} GFLOP/s"
        }
    ]
    print(rows[0]["what"], flush=True)
    data, gpu = shapes(10, 256, device), device.type == "cuda"
    for ipc in (1, 10, 50) if gpu else (1, 10):
        for compile in (False, True) if gpu else (False,):
            found = rows_of(ipc, data, rate, 15 if gpu else 1, compile)
            for row in found:
                show(row)
            rows += found
    return rows
