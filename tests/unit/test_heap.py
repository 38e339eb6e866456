"""Freed memory stays with the process: large blocks cost no page faults again, and can be handed back."""

import ctypes
import os
import resource
from pathlib import Path

import pytest
import torch

from ddlib.engine import heap
from tests import forks

pytestmark = pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library is not glibc"
)
ROUNDS, SIZE = 10, 64 << 20  # bytes; above glibc's largest threshold of its own
PAGES = ROUNDS * SIZE // resource.getpagesize()


def faults() -> int:
    """Page faults of allocating, writing and freeing a block again and again."""
    for _ in range(8):  # freed blocks find one another
        torch.ones(SIZE // 4)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(ROUNDS):
        torch.ones(SIZE // 4)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def counted(keep: bool) -> None:
    """Print the least `faults` of three tries, with the freed memory kept or not: now and then a round finds its block
    taken by something else."""
    if keep:
        heap.keep()
    print(min(faults() for _ in range(3)))


def faults_alone(keep: bool = True, **changes: str) -> int:
    """`faults` in a process of its own that has imported ddlib: in this one other tests' blocks may lie in the way."""
    own = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("DDLIB_HEAP", "MALLOC_"))
    }
    done = forks.run([counted, keep], env=own | changes)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_a_freed_block_is_there_again():
    assert faults_alone() < 0.1 * PAGES


@pytest.mark.parametrize("off", [{"DDLIB_HEAP": "0"}, {"MALLOC_MMAP_THRESHOLD_": "1000000"}])
def test_it_can_be_left_to_the_c_library(off):
    assert faults_alone(**off) > 0.9 * PAGES


def test_importing_ddlib_leaves_the_heap_to_the_c_library():
    assert faults_alone(keep=False) > 0.9 * PAGES


def test_what_is_free_can_be_handed_back():
    heap.keep()
    torch.ones(SIZE // 4)
    held = resident()
    heap.release()
    assert held - resident() > 0.9 * SIZE
