"""The disk of a run folder: its room for checkpoints, and what to say when a save fails."""

import contextlib
import errno
import logging
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from jaxmodels.errors import RunError
from jaxmodels.storage.paths import BucketPath, is_bucket

_FULL = (errno.ENOSPC, errno.EDQUOT)


def reason(error: BaseException, folder: Path | BucketPath) -> str:
    """Return one line that says why a save failed, with the free space if the disk is full.

    Args:
      error: of the operating system, or one of TensorStore, which has the operating system's words in its text.
      folder: to which was written.
    """
    if isinstance(error, RunError):
        return str(error)
    words = next((os.strerror(number) for number in _FULL if getattr(error, "errno", None) == number or os.strerror(number) in str(error)), None)
    if words is not None and not is_bucket(folder):
        return f"{words} ({in_words(free(folder))} free)"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror + (f": {error.filename}" if error.filename else "")
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}"


@contextlib.contextmanager
def must_write(folder: Path | BucketPath) -> Iterator[None]:
    """Turn an error of the operating system, while files of a run are written, into a RunError of one line."""
    try:
        yield
    except OSError as error:
        raise RunError(f"{folder} cannot be written: {reason(error, folder)}. No checkpoint was changed; the same command goes on when it can be.") from error


def room(folder: Path | BucketPath, state: Any, keep: int) -> tuple[str, bool]:
    """Return a line that says for how many checkpoints a folder has room, and whether that is enough.

    The run holds at most `keep` checkpoints, the best one, and the one that is being saved.

    Args:
      folder: `checkpoints` of the run, which may already contain some.
      state: arrays or shapes that are saved; compression is not counted on.
      keep: `checkpoint.keep`.
    """
    size = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(state))
    if is_bucket(folder):
        return f"{folder}: checkpoints of {in_words(size)} each; the room in a bucket is not checked", True
    used = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    fits, needed = (free(folder) + used) // max(size, 1), keep + 2
    line = f"{folder} has room for {fits} checkpoints of {in_words(size)}"
    if fits >= needed:
        return f"{line}; this run needs {needed}", True
    return f"warning: {line}, and this run needs {needed} (checkpoint.keep + 2). Make room, lower checkpoint.keep, or choose another --workdir.", False


def free(folder: Path) -> int:
    """Return the free bytes of a folder's disk."""
    return shutil.disk_usage(folder).free


def in_words(size: float) -> str:
    """Return a number of bytes in words."""
    unit, name = next(((unit, name) for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")) if size >= unit), (1e3, "kB"))
    return f"{size / unit:.1f} {name}"


def quiet_orbax() -> None:
    """Keep Orbax from printing the traceback of each save that fails, whose callers get the error, and that a folder is opened read-only, as asked."""
    logging.getLogger("absl").addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    of_orbax = f"{os.sep}orbax{os.sep}" in record.pathname
    return not (of_orbax and (record.exc_info or "read only" in str(record.msg) or "read_only" in str(record.msg)))
