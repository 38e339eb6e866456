"""One file per paper; `METHODS` has every method by name, `base` the contract, `registry` how to add one."""

from .registry import METHODS, register

__all__ = ["METHODS", "register"]
