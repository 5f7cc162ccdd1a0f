"""Indexes of files: where each example is. They are built once, cached on disk, and memory-mapped.

An entry of the cache is the folder `index/KEY`: `header.json`, one file for each array, and what is derived from the rows later (`Index.derived`).
Its key is of the kind of index, the paths and the options. Its header records what identifies each file, so that an index of files that have changed
is built again.
"""

import atexit
import contextlib
import dataclasses
import errno
import functools
import json
import os
import secrets
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxmodels.data import cache
from jaxmodels.data.access import FileId
from jaxmodels.data.reading import say
from jaxmodels.errors import ConfigError, RunError
from jaxmodels.storage.paths import cache_folder

VERSION = 2
_VERIFIED = 64 << 20  # bytes of an array whose checksum is verified at each start; of larger ones only the size is
_FIRST, _EVERY = 2.0, 10.0  # seconds until the first line of progress, and between lines


class Progress:
    """Lines on standard error while an index is built, after the first seconds."""

    def __init__(self, what: str, total: int, unit: str = "bytes"):
        """
        Args:
          what: what is done, such as `indexing PATH`.
          total: of all files.
          unit: of the total; bytes are shown in MiB.
        """
        self._what, self._total, self._unit, self._done = what, max(1, total), unit, 0
        self._started = time.monotonic()
        self._next = self._started + _FIRST

    def expect(self, total: int) -> None:
        """Set the total, where it was not known before."""
        self._total, self._done, self._started = max(1, total), 0, time.monotonic()

    def add(self, amount: int) -> None:
        """Note that more is done."""
        self._done += amount
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + _EVERY
        share = min(1.0, self._done / self._total)
        size = f"{self._total / 2**20:,.0f} MiB" if self._unit == "bytes" else f"{self._total:,} {self._unit}"
        left = (now - self._started) * (1 - share) / max(share, 1e-9)
        say(f"{self._what}: {share:.0%} of {size}, about {left:,.0f} s left")


class Writer:
    """Arrays of an index that is being built, written to files as they grow."""

    def __init__(self, folder: Path, progress: Progress):
        self.folder, self.progress = folder, progress
        self._files: dict[str, Any] = {}
        self.described: dict[str, dict] = {}

    def append(self, name: str, values: np.ndarray | Sequence[int], dtype: Any = np.int64) -> None:
        """Append values to an array of one dimension."""
        content = np.ascontiguousarray(values, dtype)
        if name not in self._files:
            self._files[name] = open(self.folder / f"{name}.bin", "wb")
            self.described[name] = {"dtype": np.dtype(dtype).str, "size": 0, "crc32": 0}
        data = content.tobytes()
        self._files[name].write(data)
        entry = self.described[name]
        entry["size"] += len(content)
        entry["crc32"] = zlib.crc32(data, entry["crc32"])

    def size(self, name: str) -> int:
        """Return the length of an array so far."""
        return self.described[name]["size"] if name in self.described else 0

    def close(self) -> None:
        for file in self._files.values():
            file.close()


class Index:
    """An index that is open. Worker processes map its files again.

    Attributes:
      folder: of the entry.
      header: JSON values that the builder returned.
      files: what identifies each file.
      arrays: name -> array, mapped from disk.
    """

    def __init__(self, folder: Path, content: Mapping[str, Any], place: Path | None = None):
        """
        Args:
          folder: of the entry.
          content: of `header.json`.
          place: where the files are now, if they are about to be renamed to `folder`.
        """
        self.folder, self._content = folder, content
        self.header = content["header"]
        self.files = [FileId(*identity) for identity in content["files"]]
        self.arrays = {name: _mapped((place or folder) / f"{name}.bin", entry) for name, entry in content["arrays"].items()}

    def __getstate__(self):
        return self.folder, self._content

    def __setstate__(self, state):
        self.__init__(*state)

    def __getitem__(self, name: str) -> np.ndarray:
        return self.arrays[name]

    def derived(self, key: Any, compute: Callable[[], Any]) -> Any:
        """Return a JSON value that is derived from the rows, such as class names; computed once.

        Args:
          key: JSON values that it depends on beside the files.
          compute: returns it.
        """
        files = _crc32(self._content["files"])  # another process may have replaced the entry by that of changed files
        path = self.folder / f"derived-{cache.cache_key(key, files)}.json"
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            stored = json.loads(path.read_text(encoding="utf-8"))
            if stored["crc32"] == _crc32(stored["value"]):
                return stored["value"]
        value = compute()
        temporary = path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}.part")
        with contextlib.suppress(OSError):  # computed again by the next start
            temporary.write_text(json.dumps({"crc32": _crc32(value), "value": value}), encoding="utf-8")
            os.replace(temporary, path)
        return value


def _crc32(value: Any) -> int:
    return zlib.crc32(json.dumps(value, sort_keys=True).encode())


def _mapped(path: Path, entry: Mapping[str, Any]) -> np.ndarray:
    dtype, size = np.dtype(entry["dtype"]), entry["size"]
    if os.path.getsize(path) != dtype.itemsize * size:
        raise ValueError(f"{path.name} has {os.path.getsize(path)} bytes, not {dtype.itemsize * size}")
    # As a plain array: a memmap makes an object of its own for each value that is read.
    return np.asarray(np.memmap(path, dtype, mode="r", shape=(size,))) if size else np.zeros(0, dtype)


@dataclasses.dataclass(frozen=True)
class Opened:
    """An index and what a run reports about it.

    Attributes:
      index: the index.
      notes, fallbacks: as of `Dataset`.
    """

    index: Index
    notes: tuple[str, ...] = ()
    fallbacks: tuple[str, ...] = ()


Build = Callable[[Sequence[FileId], Writer], Mapping[str, Any]]


def open_index(kind: str, files: Sequence[FileId], build: Build, *, key: Any = None, what: str = "", total: int | None = None, unit: str = "bytes") -> Opened:
    """Return the index of some files, from the cache or built now.

    Args:
      kind: of index.
      files: what identifies each file now.
      build: writes the arrays of the index and returns its header, JSON values.
      key: options that the index depends on, JSON values.
      what: the files in words, for messages.
      total, unit: of the progress; the bytes of the files by default.

    Raises:
      ConfigError: of `build`, such as a damaged file; or the disk of the cache is full.
    """
    folder = cache_folder() / "index" / cache.cache_key(VERSION, kind, [file.path for file in files], key)
    identities = [list(file) for file in files]
    index, problem = read_entry(folder, identities)
    if index is not None:
        return Opened(index, (f"{what}: index read from {folder}",))
    notes = [f"warning: {problem}; the index is built again"] if problem else []
    progress = Progress(f"indexing {what}", sum(file.size for file in files) if total is None else total, unit)
    fill = functools.partial(fill_entry, folder=folder, files=files, build=build, progress=progress)
    try:
        index = cache.write(folder, fill, lambda: read_entry(folder, identities)[0] is not None)
        notes.append(f"{what}: index written to {folder}: the next start reads it")
        return Opened(index, tuple(notes))
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ConfigError(f"{folder.parent}: the disk is full: the index of {what} does not fit. Set JAXMODELS_CACHE_DIR to a folder with room.") from error
        if _is_of_a_file(error, files):
            raise RunError(f"{what} cannot be indexed: {type(error).__name__}: {error}.") from error
        temporary = Path(tempfile.mkdtemp(prefix="jaxmodels-index-"))
        atexit.register(_remove, temporary, os.getpid())
        index = fill_entry(temporary, folder=temporary, files=files, build=build, progress=progress)
        fix = "set JAXMODELS_CACHE_DIR to a folder that can be written"
        return Opened(index, tuple(notes), (f"no cache of indexes ({error}): every start indexes {what} again; {fix}",))


def _is_of_a_file(error: OSError, files: Sequence[FileId]) -> bool:
    """Whether an error is about one of the files, and not about the cache."""
    return isinstance(error.filename, str) and any(error.filename == file.path for file in files)


def _remove(folder: Path, owner: int) -> None:
    if os.getpid() == owner:  # not at the end of a worker process
        shutil.rmtree(folder, ignore_errors=True)


def read_entry(folder: Path, identities: list) -> tuple[Index | None, str | None]:
    """Return the entry, or None and why it cannot be used (None if there is none)."""
    try:
        if not folder.exists():
            return None, None
        content = json.loads((folder / "header.json").read_text(encoding="utf-8"))
        if content.pop("crc32") != _crc32(content):
            raise ValueError("the checksum of header.json is not the recorded one")
        for name, entry in content["arrays"].items():
            path = folder / f"{name}.bin"
            if os.path.getsize(path) <= _VERIFIED and cache.checksum(path) != entry["crc32"]:
                raise ValueError(f"the checksum of {path.name} is not the recorded one")
        changed = [file[0] for file, now in zip(content["files"], identities, strict=True) if file != now]
        if changed:
            return None, f"{changed[0]} has changed" + (f", and {len(changed) - 1} more files" if len(changed) > 1 else "")
        return Index(folder, content), None
    except (OSError, ValueError, KeyError, TypeError) as error:
        return None, f"{folder} is damaged ({error})"


def fill_entry(temporary: Path, *, folder: Path, files: Sequence[FileId], build: Build, progress: Progress) -> Index:
    """Build an index in a folder that is renamed `folder` later."""
    writer = Writer(temporary, progress)
    try:
        header = build(files, writer)
    finally:
        writer.close()
    content = {"files": [list(file) for file in files], "header": json.loads(json.dumps(header)), "arrays": writer.described}
    (temporary / "header.json").write_text(json.dumps(content | {"crc32": _crc32(content)}), encoding="utf-8")
    return Index(folder, content, temporary)
