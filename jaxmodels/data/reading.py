"""Reading of examples while a run goes on: input/output errors are retried, and an error names source and example."""

import contextlib
import errno
import os
import time
import traceback
from collections.abc import Iterator
from typing import Any

import numpy as np

from jaxmodels.data.source import DataSource, get_batch
from jaxmodels.errors import RunError

# Waits between attempts, in seconds: file servers restart and mounts come back within such times. A wait ends early on a signal.
RETRY_SECONDS = (0.5, 1.0, 2.0, 4.0, 8.0)

_UNAVAILABLE = {
    getattr(errno, name)
    for name in (
        *("EIO", "ESTALE", "ENOTCONN", "ETIMEDOUT", "EHOSTDOWN", "EHOSTUNREACH", "ENETDOWN", "ENETUNREACH", "ECONNRESET", "ECONNREFUSED"),
        *("ECONNABORTED", "EREMOTEIO", "ENXIO", "ENODEV", "EAGAIN", "EBUSY", "EMFILE", "ENFILE", "ENOMEM", "ESHUTDOWN"),
    )
    if hasattr(errno, name)
}


class ReadError(RunError):
    """Examples cannot be read while a run goes on. The state of the run is good."""


def is_unavailable(error: Exception) -> bool:
    """Return whether an error says that the storage is not available: the file itself may be good.

    A missing file counts if its folder is missing too, as below a mount that is lost; a missing object of a remote store does not. Access that is denied
    counts in a remote store, where credentials expire.
    """
    if not isinstance(error, OSError) or error.errno is None:  # Pillow's errors about the content of a file are OSErrors without a number
        return False
    remote = isinstance(error.filename, str) and "://" in error.filename
    if remote and error.errno in (errno.ENOENT, errno.EACCES):
        return error.errno == errno.EACCES
    if error.errno == errno.ENOENT and isinstance(error.filename, str):
        return not os.path.isdir(os.path.dirname(error.filename) or ".")
    return error.errno in _UNAVAILABLE


@contextlib.contextmanager
def errors_of(what: str) -> Iterator[None]:
    """Raise an OSError, such as of files or of a network, as a RunError: one line that names what was opened."""
    try:
        yield
    except OSError as error:
        raise RunError(f"{what} cannot be opened: {type(error).__name__}: {error}.") from error


def read(source: DataSource, indices: np.ndarray, name: str) -> dict[str, np.ndarray]:
    """Return the examples at `indices`, stacked along a new first axis; an OSError is retried.

    Args:
      source: the examples.
      indices: int [rows].
      name: of source and split, for errors.

    Raises:
      ReadError: names the example that cannot be read, and why.
      RunError: of the source itself, such as `BadExample`.
    """
    for attempt, seconds in enumerate((*RETRY_SECONDS, None), 1):
        try:
            return get_batch(source, indices)
        except RunError:
            raise
        except OSError as error:
            if seconds is None:
                raise _read_error(source, indices, name, error, f" Tried {attempt} times in {sum(RETRY_SECONDS):g} s.") from error
            if attempt == 1:
                say(f"warning: {name}: {_describe(error)}; trying again")
            time.sleep(seconds)
        except Exception as error:
            raise _read_error(source, indices, name, error) from error
    raise AssertionError("the last attempt returns or raises")


def _read_error(source: DataSource, indices: np.ndarray, name: str, error: Exception, tried: str = "") -> ReadError:
    """Return the error that ends the run."""
    bad, error = _first_bad(source, indices, error)
    which = f"examples {min(indices)} to {max(indices)}" if bad is None else _describe_example(source, bad)
    return ReadError(f"{name}: {which} cannot be read: {_describe(error)}.{tried}")


def _first_bad(source: DataSource, indices: np.ndarray, error: Exception) -> tuple[int | None, Exception]:
    """Read the examples one by one; return the first that fails and its error, or None and the batch's error if each can be read."""
    for index in indices:
        try:
            get_batch(source, np.array([index]))
        except Exception as alone:  # noqa: BLE001  reported
            return int(index), alone
    return None, error


def _describe_example(source: Any, index: int) -> str:
    """Return `example I`, and its place in a part if the source has parts."""
    while not hasattr(source, "locate") and hasattr(source, "source"):  # a cache, or another wrapper
        source = source.source
    if not (hasattr(source, "locate") and getattr(source, "names", ())):
        return f"example {index}"
    part, inside = (int(each[0]) for each in source.locate(np.array([index])))
    return f"example {index} (example {inside} of {source.names[part]!r})"


def _describe(error: Exception) -> str:
    """Return type, message and place of an error, on one line."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" (in {frames[-1].filename}, line {frames[-1].lineno})" if frames and not isinstance(error, OSError) else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}{place}"


def say(line: str) -> None:
    """Print a line on standard error from any thread or worker process, without Python's stream locks."""
    with contextlib.suppress(OSError, ValueError):
        os.write(2, f"jaxmodels: {line}\n".encode(errors="replace"))
