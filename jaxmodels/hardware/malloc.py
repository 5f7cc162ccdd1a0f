"""Settings of memory of the whole process: the C library's allocator, Python's garbage collector. Imports no large module, since it runs before large allocations."""

import contextlib
import ctypes
import gc
import os

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of malloc.h
_MADV_HUGEPAGE = 14  # of sys/mman.h


def tune_malloc() -> None:
    """Make glibc reuse freed memory instead of returning it to the kernel, and ask for huge pages, for the whole process; no-op without glibc.

    On a CPU, XLA allocates the temporaries of each step again. Memory from the kernel costs a page fault for every 4 KiB: a quarter
    of the step time of a small Transformer (`benchmarks/overhead.py`, its two plain loops).

    Loops that walk down the columns of a matrix miss the table of pages at each row, unless pages have 2 MiB. Where Linux gives such pages only to those
    that ask (`/sys/kernel/mm/transparent_hugepage/enabled` is `madvise`), they are asked for once, for a heap of three quarters of the machine's
    memory, of which only what is used becomes memory.

    Threads other than the main one keep heaps of their own, whose blocks above 64 MiB still go back to the kernel. One heap for all would keep them
    too, but threads then wait for each other: compiling takes 1.5 times as long, and steps of a few milliseconds 1.1 times.
    """
    try:
        libc = ctypes.CDLL("libc.so.6", use_errno=True)
        libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
        libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        pages, page = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, -1)
    except (OSError, AttributeError, ValueError):
        return
    pages = pages * 3 // 4  # Linux refuses what is more than the machine could hold
    start = libc.malloc((pages + 1) * page)
    if start:
        libc.madvise(-(-start // page) * page, pages * page, _MADV_HUGEPAGE)
        libc.free(start)


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
