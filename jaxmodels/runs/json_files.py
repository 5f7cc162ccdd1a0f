"""JSON files of a run folder: written atomically, and read as far as they are valid."""

import contextlib
import errno
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jaxmodels.errors import ConfigError

_INVALID = (ValueError, RecursionError)  # of `json.loads`: no JSON, not UTF-8, too deep


def read_json(path: Path) -> Any:
    """Read a JSON file; ConfigError if it is invalid."""
    try:
        return json.loads(path.read_bytes())
    except _INVALID as error:
        raise ConfigError(f"{path} is not valid JSON ({error}); restore it, or delete the run.") from error


def write_json(path: Path, values: Mapping) -> None:
    """Write a JSON file atomically."""
    replace(path, json.dumps(values, indent=2, default=_plain, ensure_ascii=False) + "\n")


def _plain(value):
    """Convert NumPy's numbers and arrays to Python's."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{value!r} cannot be written as JSON")


def replace(path: Path, text: str) -> None:
    """Write a file atomically."""
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


def read_lines(path: Path, is_valid: Callable[[Mapping], bool]) -> tuple[list[dict], dict[int, bytes]]:
    """Read a file of JSON lines.

    Args:
      path: the file; it may be missing.
      is_valid: whether an object is a line of this file.

    Returns:
      The valid objects; and number, from 1, -> bytes of each damaged line. A last line without its end is in neither unless it is valid: a
      writer that was killed leaves it, and a writer at work has not finished it.
    """
    texts = path.read_bytes().split(b"\n") if path.is_file() else [b""]
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


def append_line(path: Path, text: str) -> None:
    """Append a line to a file, after a truncated line on a new one; on an OSError, append no part of it."""
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
