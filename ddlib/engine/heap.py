"""Freed memory stays with the process, so that the next step finds it ready: the same bits, faster on a CPU.

glibc hands large freed blocks back to the kernel, which gives them out again page by page, each zeroed at its first
touch, and a training step allocates and frees the same activations again and again. `python -m benchmarks --only dm`
has the plain loop with and without. A run and the command line call `keep`, importing ddlib does not. Only glibc is
told so; DDLIB_HEAP=0 and glibc's own MALLOC_TRIM_THRESHOLD_ or MALLOC_MMAP_THRESHOLD_ leave it alone.
"""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress

TRIM, MMAP = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h


def keep(most: int = 1 << 30) -> None:
    """Take blocks of up to `most` bytes from the heap, and keep up to so many free bytes at its end."""
    own = {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"} & os.environ.keys()
    if own or os.environ.get("DDLIB_HEAP") == "0":
        return
    with suppress(OSError, AttributeError, TypeError):  # a C library without it
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(TRIM, most), mallopt(MMAP, most)


def release() -> None:
    """Hand back what is free, so that a peak measured from here on is not an earlier run's."""
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
