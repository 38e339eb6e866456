"""DREAM (Liu et al., ICCV 2023, arXiv 2302.14416) and DREAM+ (arXiv 2310.15052): IDC on representative real images.

With the features h(x) of a class's real images under the present network, and K-means centres mu_k of them,

    S_c = { argmin_{x in class c} | h(x) - mu_k | : k = 1..K }                       (`ddlib.match.sampler`)

are the real batch of the class (K = B / `subsample`, anew every `interval` steps) and its first images (K = IPC
`factor`^2). DREAM+ adds a term on networks that have seen one epoch of real images:

    L(X) = sum_c sum_layers d( g(A(S_c)), g(A(X^c)) )  +  sum_c d( mean h(A(S_c)), mean h(A(X^c)) )

The loop offers all of it as arguments, because the papers plug it into other methods as well: `plug_in`. Differences
from the released code: those of `ddlib.methods.gradient`, and of the clustering (`ddlib.match.sampler`).

Accuracy, seconds, hardware and number of runs, as `python -m ddlib docs` renews them from the
records: docs/methods/dream.md and docs/methods/dream_plus.md.
"""

from __future__ import annotations

from typing import Any, ClassVar

from ..core import choose
from .gradient import IDC
from .registry import register

GRADIENT_HOSTS, TRAJECTORY_HOSTS = ("dc", "dsa", "idc"), ("mtt", "tesla", "ftd", "datm")


@register("dream", paper="arXiv 2302.14416")
class DREAM(IDC):
    """IDC that begins from, and matches, the images nearest to K-means centres of their class.

    `dream` attains 52.1 ± 1.0 % on CIFAR-10 (JPEG) at IPC 10 (profile `small`, n=3; 1200 s, AMD EPYC, 1 thread).
    """

    arguments: ClassVar[dict[str, Any]] = {
        # X^c = S_c of K = IPC factor^2 clusters
        "init": "kmeans",
        # x_real^c = S_c of K = B / subsample clusters
        "sampling": "dream",
    }


@register("dream_plus", paper="arXiv 2310.15052")
class DREAMPlus(DREAM):
    """DREAM on warmed-up networks, with the class means of the features matched beside the gradients.

    `dream_plus` attains 53.8 ± 0.1 % on CIFAR-10 (JPEG) at IPC 10 (profile `small`, n=3; 3084 s, AMD EPYC, 1 thread),
    in 8 iterations; no printed figure.
    """

    arguments: ClassVar[dict[str, Any]] = DREAM.arguments | {
        # L = L_gradient + sum_c d( mean h(A(S_c)), mean h(A(X^c)) )
        "match": "both",
        # theta after one epoch of real images
        "warm_epochs": 1,
    }


def plug_in(host: str, plus: bool = False) -> dict[str, Any]:
    """What turns `dd.run(host, ...)` into host + DREAM, or + DREAM+: `dd.run("dsa", ..., **plug_in("dsa", plus=True))`.

    IDC is the papers' host; all others are ours. Gradient hosts take DREAM's arguments and DREAM+'s. DM: the same, with
    `plus` the gradient term, its networks staying untrained. Trajectory matching has no real batch: the initialisation
    and the experts' batches. Raises `DDError` for an unknown host.
    """
    choose("host", host, (*GRADIENT_HOSTS, "dm", *TRAJECTORY_HOSTS))
    if host in TRAJECTORY_HOSTS:
        return {"init": "kmeans", "expert_sampling": "dream"} | ({"init_epoch": 1} if plus else {})
    arguments = (DREAMPlus if plus else DREAM).arguments
    return {key: value for key, value in arguments.items() if host != "dm" or key != "warm_epochs"}
