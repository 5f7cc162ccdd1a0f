"""How the C library keeps memory. Imports nothing heavy: it must be set before anything large is allocated."""

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of malloc.h


def keep_freed_memory() -> None:
    """Has glibc keep freed memory instead of giving it back to the kernel, for the whole process.

    XLA allocates each step's temporaries anew on a CPU; as fresh pages these cost a page fault every 4 KiB, a quarter
    of the time of a small Transformer's step (`benchmarks/overhead.py`, its two plain loops). Elsewhere than on glibc it
    does nothing.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
