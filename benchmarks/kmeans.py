"""K-means of one class pool, 5,000 x 2,048 features and K 128, against scikit-learn in the same process: `make bench`.

The features are an untrained ConvNet's, as DREAM clusters them, of 5,000 random pictures with the 1/f amplitudes of
photographs, whose inertia falls from iteration to iteration as that of CIFAR-10's features does. Times are the wall's
on all threads that torch and scikit-learn take by themselves; they take turns, so that a busy machine slows both alike,
and a ratio is the median over the turns, each with its own seed. scikit-learn runs `KMeans(init="random", n_init=1)`:
20 iterations, and the fewest whose mean inertia is ours or less; and once with its defaults, whose k-means++ seeding
takes most of the time.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from statistics import fmean, median

import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning

from benchmarks import show
from ddlib.core import generator
from ddlib.engine.meter import machine
from ddlib.match.kmeans import ITERATIONS, kmeans
from ddlib.nets.build import build

FEWER = (4, 6, 8, 10, 12, 14, 16)  # iterations at which scikit-learn may have reached our inertia


def pictures(rows: int, rng: torch.Generator) -> torch.Tensor:
    """Random pictures [rows, 3, 32, 32] in [0, 1]: octaves of noise, each half as strong as the next coarser one."""
    octaves = (
        F.interpolate(
            torch.randn(rows, 3, side, side, generator=rng) / side, size=32, mode="bilinear"
        )
        for side in (1, 2, 4, 8, 16, 32)
    )
    return (0.5 + 0.25 * sum(octaves)).clamp(0, 1)


@torch.no_grad()
def pool(rows: int, backbone: str = "convnet", device: torch.device | str = "cpu") -> torch.Tensor:
    """Features [rows, d] of random pictures."""
    rng = generator(0, "bench", "kmeans")
    net = build(backbone, (3, 32, 32), 10, rng).to(device)
    return torch.cat([net.features(piece.to(device)) for piece in pictures(rows, rng).split(250)])


def timed(work: Callable[[], float], device: torch.device) -> tuple[float, float]:
    """Wall seconds of `work` and what it returned."""
    start = time.perf_counter()
    value = work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start, value


def clustering(x: torch.Tensor, k: int, turns: int, defaults: bool = True) -> list[dict]:
    """A row for ours and each of scikit-learn's settings: median seconds, mean inertia over ours, times as slow."""
    points, device = x.cpu().numpy(), x.device

    def theirs(seed: int, **settings: object) -> Callable[[], float]:
        settings = {"init": "random", "n_init": 1, **settings}
        return lambda: KMeans(k, random_state=seed, **settings).fit(points).inertia_

    jobs = {
        f"ours, {ITERATIONS} iterations": lambda seed: (
            lambda: float(kmeans(x[None], k, generator(seed, "bench"))[2])
        )
    }
    jobs |= {
        f"scikit-learn, {n} iterations": lambda seed, n=n: theirs(seed, max_iter=n)
        for n in (*FEWER, 20)
    }
    found = {name: [] for name in jobs}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        for turn in range(turns + 1):  # the first one warms up
            for name, job in jobs.items():
                found[name] += [timed(job(turn), device)] if turn else []
        if defaults:
            found["scikit-learn, defaults"] = [timed(theirs(0, init="k-means++"), device)]
    name, *others = found
    ours, inertia = (
        found[name],
        {other: fmean(value for _, value in pairs) for other, pairs in found.items()},
    )
    fewest = next((other for other in others if inertia[other] <= inertia[name]), others[-1])
    shown = dict.fromkeys(
        (
            name,
            fewest,
            "scikit-learn, 20 iterations",
            *(o for o in others if o.endswith("defaults")),
        )
    )
    return [
        {
            "what": f"k-means, {len(x)} x {x.shape[1]}, K {k}: {other}",
            "seconds": median(s for s, _ in found[other]),
            "over ours": median(
                theirs / mine for (theirs, _), (mine, _) in zip(found[other], ours, strict=False)
            ),
            "inertia over ours": inertia[other] / inertia[name],
        }
        for other in shown
    ]


def main(device: torch.device, turns: int = 5) -> list[dict]:
    """Print the rows and return them."""
    rows = [
        {"what": f"k-means on {machine(device)}"},
        *clustering(pool(5000, device=device), 128, turns),
    ]
    for row in rows:
        show(row)
    return rows
