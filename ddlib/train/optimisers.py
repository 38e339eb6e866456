"""Optimisers that a method owns: made with the settings that papers mean, stepped by gradients, kept in checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor
from torch.optim import Optimizer


def lamb(tensors: Sequence[Tensor], lr: float) -> Optimizer:
    """LAMB (You et al., ICLR 2020, arXiv 1904.00962): every step moves a tensor by `lr` of its norm."""
    from timm.optim import Lamb  # here: it takes a second to import

    # One trust ratio a tensor, also without weight decay (always_adapt), and no hidden clipping of the gradient.
    return Lamb(tensors, lr=lr, weight_decay=0.0, eps=1e-6, max_grad_norm=None, always_adapt=True)


def descend(optimiser: Optimizer, gradients: Sequence[Tensor], lr: float) -> None:
    """One step at the step size `lr` along `gradients`, one for each tensor of the optimiser's only group."""
    (group,) = optimiser.param_groups
    group["lr"] = lr
    for tensor, gradient in zip(group["params"], gradients, strict=True):
        tensor.grad = gradient
    optimiser.step()


def state_of(optimiser: Optimizer, name: str) -> dict[str, Tensor]:
    """The state of an optimiser as tensors by "name.parameter.key", as a checkpoint takes them."""
    return {
        f"{name}.{i}.{key}": value
        for i, entry in optimiser.state_dict()["state"].items()
        for key, value in entry.items()
    }


def restore(optimiser: Optimizer, state: Mapping[str, Tensor], name: str) -> None:
    """Give an optimiser the state that `state_of` took from it under this name."""
    entries: dict[int, dict[str, Tensor]] = {}
    for key, value in part(state, name).items():
        i, word = key.split(".")
        entries.setdefault(int(i), {})[word] = value.clone()
    optimiser.load_state_dict(optimiser.state_dict() | {"state": entries})


def part(state: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """What stands in `state` under "name.", by the rest of its keys."""
    return {
        key.removeprefix(f"{name}."): value
        for key, value in state.items()
        if key.startswith(f"{name}.")
    }
