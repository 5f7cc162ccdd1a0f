"""Settings of memory of the whole process: the C library's allocator, Python's garbage collector. Imports no large module, since it runs before large allocations."""

import contextlib
import ctypes
import gc

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


@contextlib.contextmanager
def short_collections():
    """Keep Python's garbage collector off the objects that exist now: compiling leaves many, and a pass over them stops the loop for 0.2 s.

    Objects that the program has frozen itself stay frozen.
    """
    frozen = gc.get_freeze_count()
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        if not frozen:
            gc.unfreeze()
