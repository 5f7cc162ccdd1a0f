"""Rows that are encoded once: their arrays are in the cache on disk, and mapped from there.

An entry of the cache is the folder `rows/KEY`, written as those of indexes are (`index.py`). Its key is of the contents of the files, the tokenizer and
the options, so that copies of a file share it.
"""

import dataclasses
import functools
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxmodels.data import access, cache, fitted, guesses
from jaxmodels.data.features.base import PAD, Feature
from jaxmodels.data.features.text import Tokenized
from jaxmodels.data.index import Index, Progress, Writer, fill_entry, read_entry
from jaxmodels.data.packing import ranges
from jaxmodels.data.source import Arrays, Dataset
from jaxmodels.data.tokens import IN_MEMORY, file_digest
from jaxmodels.storage.paths import cache_folder
from jaxmodels.tokenizers.base import Tokenizer
from jaxmodels.tokenizers.factory import LIBRARY_VERSION, from_json, is_trained

VERSION = 1
CACHE_FROM = 1 << 20  # bytes of files whose rows are cached: about a second of work
_ROWS = 4096  # padded at once for a checksum


class Ragged:
    """Rows of int32 that are padded with -1 at their end, stored without padding: an array [rows, length] that is read by index."""

    dtype, ndim = np.dtype(np.int32), 2

    def __init__(self, values: np.ndarray, ends: np.ndarray, length: int):
        """
        Args:
          values: int32, of all rows.
          ends: int64 [rows], the end of each row in `values`.
          length: of a padded row.
        """
        self.values, self.ends, self.length = values, ends, length

    def __len__(self):
        return len(self.ends)

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.ends), self.length

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self[:], dtype)

    def __getitem__(self, index):
        """int32 [..., length], of a row, a slice or an array of rows."""
        rows = np.arange(*index.indices(len(self))) if isinstance(index, slice) else np.asarray(index)
        rows = np.flatnonzero(rows) if rows.dtype == bool else np.where(rows < 0, rows + len(self), rows)
        flat = rows.reshape(-1)
        ends = self.ends[flat]
        starts = np.where(flat > 0, self.ends[flat - 1], 0)
        result = np.full((len(flat), self.length), PAD, np.int32)
        result[np.arange(self.length) < (ends - starts)[:, None]] = self.values[ranges(starts, ends - starts)]
        return result.reshape(*rows.shape, self.length)


class Stored(Arrays):
    """The examples of a split in the cache. A worker process maps the files again."""

    def __init__(self, index: Index, split: str):
        self.index, self.split = index, split
        self.arrays = {name: self._column(name, shape) for name, shape in index.header["splits"][split].items()}
        stored = (each.values if isinstance(each, Ragged) else each for each in self.arrays.values())
        self.in_memory = sum(each.nbytes for each in stored) <= IN_MEMORY

    def _column(self, name: str, shape: list[int] | None):
        values = self.index[_name(self.split, name)]
        return Ragged(values, self.index[_name(self.split, name, "ends")], shape[0]) if _is_padded(values.dtype, shape) else values.reshape(-1, *shape)

    def __getstate__(self):
        return self.index, self.split

    def __setstate__(self, state):
        self.__init__(*state)

    def fingerprint(self):
        """Return the checksum that the same arrays in memory have."""

        def compute() -> int:
            result = 0
            for array in self.arrays.values():
                result = zlib.crc32(f"{array.dtype}{array.shape}".encode(), result)
                for start in range(0, len(array), _ROWS):
                    result = zlib.crc32(np.ascontiguousarray(array[start : start + _ROWS]).view(np.uint8), result)
            return result

        return self.index.derived(["fingerprint", self.split], compute)


def _name(split: str, *parts: str) -> str:
    return ".".join((split.replace("/", "-"), *parts))


def _is_padded(dtype: np.dtype, shape: Sequence[int]) -> bool:
    """Whether the examples of an array are rows of whole numbers, which may end with padding."""
    return dtype == np.int32 and len(shape) == 1


def append(writer: Writer, split: str, arrays: Mapping[str, np.ndarray]) -> dict[str, list[int]]:
    """Append some examples to those of a split, and return the shape of one in each array.

    Args:
      writer: of the entry.
      split: its name.
      arrays: name -> array [examples, ...].
    """
    for name, array in arrays.items():
        place = _name(split, name)
        if _is_padded(array.dtype, array.shape[1:]):
            kept = np.where((array != PAD).any(1), array.shape[1] - (array[:, ::-1] != PAD).argmax(1), 0)
            before = writer.size(place)
            writer.append(place, array[np.arange(array.shape[1]) < kept[:, None]], np.int32)
            writer.append(_name(split, name, "ends"), before + np.cumsum(kept))
        else:
            writer.append(place, array.reshape(-1), array.dtype)
    return {name: list(array.shape[1:]) for name, array in arrays.items()}


Fill = Callable[[Writer], Mapping[str, Any]]


def folder_of(key: Any) -> Path:
    """Return the folder of an entry; `key` is of JSON values."""
    return cache_folder() / "rows" / cache.cache_key(VERSION, key)


def open_entry(key: Any, fill: Fill, what: str) -> tuple[Index | None, list[str]]:
    """Return an entry, read or written now, and notes for the start of a run.

    Args:
      key: JSON values that identify the contents of the files, the tokenizer and the options.
      fill: writes the arrays, and returns the header, JSON values.
      what: the files in words.

    Raises:
      OSError: the cache cannot be written.
    """
    folder = folder_of(key)
    index, problem = read_entry(folder, [])
    if index is not None:
        return index, [f"{what}: encoded rows read from {folder}"]
    notes = [f"warning: {problem}; it is written again"] if problem else []
    write = functools.partial(fill_entry, folder=folder, files=[], build=lambda _, writer: fill(writer), progress=Progress(f"encoding {what}", 0, "rows"))
    index = cache.write(folder, write, lambda: read_entry(folder, [])[0] is not None)
    return index, [*notes, f"{what}: encoded rows written to {folder}: the next start reads them"]


def can_be_stored(features: Sequence[Feature]) -> bool:
    """Whether what features derive from the rows can be stored with them."""
    return all(type(f).fit is Feature.fit or type(f).state is not Feature.state for f in features)


def is_worth_it(paths: Sequence[str]) -> bool:
    """Whether the rows of some files on a disk, or with copies there, are encoded into the cache."""
    return sum(os.path.getsize(access.on_disk(path)) for path in paths) >= CACHE_FROM


def contents(files: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Return split -> a checksum of the contents of each of its files."""
    return {split: [file_digest(access.on_disk(path)) for path in paths] for split, paths in files.items()}


def no_cache(error: OSError, what: str) -> str:
    """Return the fallback of a run whose cache cannot be written."""
    return f"no cache of encoded rows ({error}): every start encodes {what} again; set JAXMODELS_CACHE_DIR to a folder that can be written"


def cached_rows(encode: Callable, features: Sequence[Feature], text: Tokenized, tokenizer: str | Tokenizer, identity: list, what: str) -> Dataset | str:
    """Return a data set whose arrays are in the cache on disk, or the fallback where they cannot be.

    Args:
      encode: (write, progress) -> notes, and the number of skipped rows by split. Calls `write(split, arrays)` for some examples at a time.
      features: of the rows.
      text: the one that is tokenized.
      tokenizer: the specification of one that is trained on the rows, or a tokenizer.
      identity: JSON values that tell the rows and the options from others.
      what: the files in words.
    """
    options = [
        [type(f).__qualname__, {field.name: repr(getattr(f, field.name)) for field in dataclasses.fields(f) if field.name != "tokenizer"}] for f in features
    ]

    def key(spec: Any, states: list | None) -> list:
        return [[spec, LIBRARY_VERSION] if is_trained(spec) else tokenizer.to_json(), options, states, identity]

    def fill(writer: Writer) -> dict[str, Any]:
        shapes: dict[str, dict] = {}

        def write(split: str, arrays: Mapping[str, np.ndarray]) -> None:
            shapes[split] = append(writer, split, arrays)

        with guesses.collected() as found:
            notes, skipped = encode(write, writer.progress)
        states, trained = [feature.state() for feature in features], text.coder.to_json() if is_trained(tokenizer) else None
        return {"splits": shapes, "notes": notes, "skipped": skipped, "guesses": found, "states": states, "tokenizer": trained}

    index, states, notes = None, None, []
    if fitted.is_given():
        for feature in features:
            fitted.fit(feature, lambda: None)
        states = [feature.state() for feature in features]
        index = read_entry(folder_of(key(fitted.get("specification"), None)), [])[0]  # of the training
        if index is not None and (index.header["states"] != states or index.header["tokenizer"] not in (None, tokenizer.to_json())):
            index = None
    if index is None:
        try:
            index, notes = open_entry(key(tokenizer, states), fill, what)
        except OSError as error:
            return no_cache(error, what)
    for feature, state in zip(features, index.header["states"], strict=True):
        fitted.fit(feature, functools.partial(feature.restore, state))
    text.use(from_json(index.header["tokenizer"]) if is_trained(tokenizer) else tokenizer)
    for line in index.header["guesses"]:
        guesses.guess(line)
    info = {key: value for feature in features for key, value in feature.info().items()}
    splits = {split: Stored(index, split) for split in index.header["splits"]}
    return Dataset(splits, info, notes=(*index.header["notes"], *notes), skipped=dict(index.header["skipped"]))
