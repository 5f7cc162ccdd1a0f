"""Rows that wait in a file while all are checked, and until they are encoded: memory holds a few of them."""

import itertools
import pickle
import tempfile
from collections.abc import Iterable, Iterator
from typing import Any

from jaxmodels.storage.paths import cache_folder

_TOGETHER = 1024  # rows in memory


class Spool:
    """A sequence of rows, read in order. Its file has no name, and ends with the process."""

    def __init__(self, rows: Iterable[Any] = ()):
        """
        Raises:
          OSError: the cache, where the file is, cannot be written.
        """
        self._parts: list[tuple[Any, int, int]] = []  # file, place in it, and number of rows
        rows = iter(rows)
        if few := list(itertools.islice(rows, _TOGETHER)):
            cache_folder().mkdir(parents=True, exist_ok=True)
            file = tempfile.TemporaryFile(dir=cache_folder())
            while few:
                self._parts.append((file, file.tell(), len(few)))
                pickle.dump(few, file, pickle.HIGHEST_PROTOCOL)
                few = list(itertools.islice(rows, _TOGETHER))

    def __len__(self) -> int:
        return sum(count for _, _, count in self._parts)

    def __iter__(self) -> Iterator[Any]:
        for file, place, _ in self._parts:
            file.seek(place)
            yield from pickle.load(file)

    def __add__(self, other: "Spool") -> "Spool":
        """Return the rows of both, which stay in their files."""
        result = Spool()
        result._parts = self._parts + other._parts
        return result
