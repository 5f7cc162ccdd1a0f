"""What Linux says of processes, any of which may end while it is read."""

import contextlib
from pathlib import Path


def children(pid):
    """Return the processes that are below a process, by their number."""
    below = []
    with contextlib.suppress(OSError):  # the process ends
        for task in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(OSError):  # the thread ends
                below += map(int, (task / "children").read_text().split())
    return [number for child in below for number in (child, *children(child))]


def is_worker(pid):
    """Return whether a process was made by multiprocessing to do work."""
    try:
        return b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def is_alive(pid):
    """Return whether a process runs; one that has ended and waits to be collected does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] not in (b"Z", b"X")
    except OSError:
        return False
