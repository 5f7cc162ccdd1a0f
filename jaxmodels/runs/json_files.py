"""JSON files of a run folder: written atomically, and read as far as they are valid."""

import contextlib
import errno
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jaxmodels.errors import ConfigError
from jaxmodels.storage.paths import BucketPath

_INVALID = (ValueError, RecursionError)  # of `json.loads`: no JSON, not UTF-8, too deep


def read_json(path: Path | BucketPath) -> Any:
    """Read a JSON file; ConfigError if it is invalid."""
    try:
        return json.loads(path.read_bytes())
    except _INVALID as error:
        raise ConfigError(f"{path} is not valid JSON ({error}); restore it, or delete the run.") from error


def write_json(path: Path | BucketPath, values: Mapping) -> None:
    """Write a JSON file atomically."""
    replace(path, json.dumps(values, indent=2, default=_plain, ensure_ascii=False) + "\n")


def _plain(value):
    """Convert NumPy's numbers and arrays to Python's."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{value!r} cannot be written as JSON")


def replace(path: Path | BucketPath, text: str) -> None:
    """Write a file atomically."""
    if isinstance(path, BucketPath):
        path.write_text(text, errors="backslashreplace")
        return
    temporary = path.with_name(path.name + ".tmp")
    try:
        # A name of a file that is not UTF-8 becomes an escape, which JSON reads as the same name.
        with open(temporary, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)  # on a full disk, its bytes are missed elsewhere
        raise


def read_lines(path: Path | BucketPath, is_valid: Callable[[Mapping], bool]) -> tuple[list[dict], dict[int, bytes]]:
    """Read a file of JSON lines.

    Args:
      path: the file; it may be missing.
      is_valid: whether an object is a line of this file.

    Returns:
      The valid objects; and number, from 1, -> bytes of each damaged line. A last line without its end is in neither unless it is valid: a
      writer that was killed leaves it, and a writer at work has not finished it.
    """
    texts = read_if_there(path).split(b"\n")
    valid, damaged = [], {}
    for number, text in enumerate(texts, 1):
        try:
            line = json.loads(text)
            if not (isinstance(line, dict) and is_valid(line)):
                raise ValueError
            valid.append(line)
        except _INVALID:
            if text.strip() and number < len(texts):
                damaged[number] = text
    return valid, damaged


def read_if_there(path: Path | BucketPath) -> bytes:
    """Return the contents of a file; empty if there is none."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""


def append_text(path: Path | BucketPath, text: str) -> None:
    """Append whole lines to a file. An object in a bucket is written anew, again if another process has changed it in between."""
    if not isinstance(path, BucketPath):
        with open(path, "a", encoding="utf-8", newline="") as file:
            file.write(text)
        return
    while True:
        content, generation = path.read_with_generation()
        truncated = content and not content.endswith(b"\n")
        whole = (content or b"") + (b"\n" if truncated else b"") + text.encode()
        if path.write_if(whole, generation) is not None or path.read_with_generation()[0] == whole:  # the second: its answer was lost
            return


def append_line(path: Path | BucketPath, text: str) -> None:
    """Append a line to a file, after a truncated line on a new one; on an OSError, append no part of it."""
    if isinstance(path, BucketPath):
        append_text(path, text + "\n")
        return
    with open(path, "ab+", buffering=0) as file:
        if end := file.tell():
            file.seek(-1, os.SEEK_END)
            text = text if file.read(1) == b"\n" else "\n" + text
        line = (text + "\n").encode()
        try:
            if file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            with contextlib.suppress(OSError):
                file.truncate(end)
            raise
