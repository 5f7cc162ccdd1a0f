"""Settings of the C library's allocator. Imports no large module, because it must run before large allocations."""

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of malloc.h


def tune_malloc() -> None:
    """Make glibc reuse freed memory instead of returning it to the kernel, for the whole process; no-op without glibc.

    On a CPU, XLA allocates the temporaries of each step again. Memory from the kernel costs a page fault for every 4 KiB: a quarter
    of the step time of a small Transformer (`benchmarks/overhead.py`, its two plain loops).
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
