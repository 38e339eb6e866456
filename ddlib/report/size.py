"""The arithmetic of a run at the paper's size, and the least time that it takes on this machine.

FLOPs are counted on the paper's network and divided by the measured rate of a float32 matrix product, so the hours
are a floor: no run is faster, and data movement, normalisation and Python come on top.
"""

from __future__ import annotations

import pandas as pd

from ..config import resolve
from ..core import pick_device
from ..engine import meter
from ..match import sampler
from ..nets.build import build, count_flops

SHAPE, CLASSES, PER_CLASS = (3, 32, 32), 10, 5000  # CIFAR-10
IPCS = (1, 10, 50)


def dm(ipc: int) -> dict[str, float]:
    """PFLOP of a DM run on CIFAR-10: forward of the real batch, forward and backward of the images."""
    config, run, flops = _parts("dm", ipc)
    images = CLASSES * ipc
    step = flops * (CLASSES * config.batch_real + 2 * images)
    score = 3 * flops * images * (run.eval_epochs + 1) * run.networks
    return {"distillation": step * config.iterations / 1e15, "evaluation": score / 1e15}


def frepo(ipc: int) -> dict[str, float]:
    """PFLOP of a FRePo run on CIFAR-10. Mirrored copies double the images in the regression, whose forward pass and
    input gradient are counted; the pool's network is trained on at most 1,000 of them."""
    config, _, flops = _parts("frepo", ipc)
    images = CLASSES * ipc
    step = flops * (config.batch_real + 2 * 2 * images + 3 * min(images, 1000))
    return {"distillation": step * config.iterations / 1e15}


def _parts(method: str, ipc: int) -> tuple:
    spec = resolve(method, "cifar10", ipc, "paper")
    return spec.config, spec.run, count_flops(build(spec.run.backbone, SHAPE, CLASSES), SHAPE)


def by_ipc(method: str, device: str = "auto") -> pd.DataFrame:
    """`dm` or `frepo` on CIFAR-10 at IPC 1, 10 and 50: PFLOP by part and hours, at least, on this machine."""
    rate = meter.sgemm_rate(pick_device(device), size=1024)
    rows = []
    for ipc in IPCS:
        parts = {"dm": dm, "frepo": frepo}[method](ipc)
        iterations = resolve(method, "cifar10", ipc, "paper").config.iterations
        named = {f"{name} (PFLOP)": value for name, value in parts.items()}
        hours = sum(parts.values()) * 1e15 / rate / 3600
        rows.append({"ipc": ipc, "iterations": iterations, **named, "hours, at least": hours})
    return pd.DataFrame(rows)


def dream(device: str = "auto") -> pd.DataFrame:
    """IDC, DREAM and DREAM+ on CIFAR-10 at IPC 10: TFLOP of one outer iteration by part, hours of a run."""
    rate = meter.sgemm_rate(pick_device(device), size=1024)
    net, rows = build("convnet", SHAPE, CLASSES), []
    for method in ("idc", "dream", "dream_plus"):
        config = resolve(method, "cifar10", 10, "paper").config
        parts = sampler.work(config, net, SHAPE, [PER_CLASS] * CLASSES, 10)
        hours = sum(parts.values()) * config.iterations / rate / 3600
        tera = {name: value / 1e12 for name, value in parts.items()}
        rows.append({"method": method, **tera, "hours, at least": hours})
    return pd.DataFrame(rows)
