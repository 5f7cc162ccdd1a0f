"""The cache on disk: folders that are complete or absent, whatever processes write or die at the same time."""

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

_BLOCK = 1 << 24  # bytes read at once for a checksum
_ABANDONED = 24 * 3600  # seconds after which a half-written entry counts as abandoned


def cache_key(*parts: Any) -> str:
    """Return a checksum of JSON values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def checksum(path: Path) -> int:
    """Return the CRC-32 of a file."""
    result = 0
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            result = zlib.crc32(block, result)
    return result


def write(folder: Path, fill: Callable[[Path], T], is_whole: Callable[[], bool]) -> T:
    """Write an entry.

    It is written under another name and renamed when it is complete, so that a process that is killed leaves no partial entry. If several
    processes write the same entry at once, one wins.

    Args:
      folder: of the entry.
      fill: writes all files into a folder, and returns what `write` returns.
      is_whole: whether there is an entry already, and it is complete and current.

    Raises:
      OSError: the folder cannot be written.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(folder.parent)
    temporary = _new_folder(folder)
    try:
        result = fill(temporary)
        _publish(temporary, folder, is_whole)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return result


def _new_folder(folder: Path) -> Path:
    """Make a folder of this process next to an entry."""
    temporary = folder.with_name(f"{folder.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    temporary.mkdir()
    return temporary


def _publish(temporary: Path, folder: Path, is_whole: Callable[[], bool]) -> None:
    """Rename a complete entry, unless another process has completed it first."""
    with contextlib.suppress(OSError):
        os.rename(temporary, folder)
        return
    if is_whole():
        return  # another process completed it first
    aside = _new_folder(folder)  # for a damaged or outdated entry of that name
    with contextlib.suppress(OSError):  # another process may have done the same
        os.rename(folder, aside / "damaged")
    shutil.rmtree(aside, ignore_errors=True)
    with contextlib.suppress(OSError):
        os.rename(temporary, folder)
        return
    if not is_whole():
        raise OSError(f"{folder} cannot be replaced")


def _remove_abandoned(folder: Path) -> None:
    """Remove the partial entries of processes that died."""
    for path in folder.glob("*.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > _ABANDONED:
                shutil.rmtree(path, ignore_errors=True)
