"""The fixed draw of rows that validate where no validation split is found."""

import threading
from collections.abc import Sequence

import numpy as np

_BLOCK = 1024  # rows between two stored counts
_CHUNK = 1 << 20  # rows drawn at once


_local = threading.local()  # each thread's generator, and the row that it is at: to make one takes longer than to move it


def _draws(start: int, stop: int) -> np.ndarray:
    """Return the random number of each row in [start, stop), uint64."""
    if not hasattr(_local, "generator"):
        # Raw bits of a bit generator are the same in every numpy version; its permutations need not be.
        _local.generator, _local.at = np.random.PCG64(0), 0
    _local.generator.advance((start - _local.at) % (1 << 128))
    _local.at = stop
    return _local.generator.random_raw(stop - start)


class Draw:
    """Rows of which a share, those with the smallest random numbers, is held out. Drawn, not cut off the end: files are often sorted by label.

    It needs 16 bytes for 1,024 rows, and finds a row by recomputing the random numbers around it.

    Attributes:
      count: number of rows.
      held: number of rows that are held out, at least one.
    """

    def __init__(self, count: int, share: float):
        self.count, self.held = count, max(1, round(share * count))
        self._limit, self._last = self._smallest()
        counts = [np.zeros(1, np.int64)]
        for start in range(0, count, _CHUNK):
            held = self.mask(start, min(count, start + _CHUNK))
            counts.append(np.add.reduceat(held.astype(np.int64), np.arange(0, len(held), _BLOCK)))
        self._held_before = np.cumsum(np.concatenate(counts))  # at the start of each block, and at the end
        self._others_before = np.minimum(np.arange(len(self._held_before)) * _BLOCK, count) - self._held_before

    def _smallest(self) -> tuple[int, int]:
        """Return the largest random number that is held out, and the last row that has it and is."""
        first_bits = np.zeros(1 << 16, np.int64)
        for start in range(0, self.count, _CHUNK):
            first_bits += np.bincount(_draws(start, min(self.count, start + _CHUNK)) >> np.uint64(48), minlength=1 << 16)
        ends = np.cumsum(first_bits)
        which = int(np.searchsorted(ends, self.held))  # of the numbers that begin with these bits, some are held out
        numbers, rows = [], []
        for start in range(0, self.count, _CHUNK):
            drawn = _draws(start, min(self.count, start + _CHUNK))
            here = np.flatnonzero(drawn >> np.uint64(48) == which)
            numbers.append(drawn[here])
            rows.append(here + start)
        values, places = np.concatenate(numbers), np.concatenate(rows)
        rank = self.held - int(ends[which] - first_bits[which]) - 1
        chosen = np.argsort(values, kind="stable")[rank]
        return int(values[chosen]), int(places[chosen])

    def mask(self, start: int, stop: int) -> np.ndarray:
        """Return which rows in [start, stop) are held out, bool."""
        drawn = _draws(start, stop)
        return (drawn < np.uint64(self._limit)) | ((drawn == np.uint64(self._limit)) & (np.arange(start, stop) <= self._last))

    def before(self, rows: np.ndarray, held: bool) -> np.ndarray:
        """Return how many of the rows before each of `rows` are held out (or are not), int64."""
        result = np.empty(len(rows), np.int64)
        for i, row in enumerate(np.asarray(rows).tolist()):
            block = row // _BLOCK
            result[i] = self._held_before[block] + (int(self.mask(block * _BLOCK, row).sum()) if row % _BLOCK else 0)
        return result if held else np.asarray(rows) - result

    def row(self, index: int, held: bool) -> int:
        """Return the row of an example: number `index` of those that are held out, or of the others, in their order."""
        before = self._held_before if held else self._others_before
        block = int(np.searchsorted(before, index, side="right")) - 1
        start = block * _BLOCK
        mask = self.mask(start, min(self.count, start + _BLOCK))
        return start + int(np.flatnonzero(mask if held else ~mask)[index - before[block]])


def hold_out(items: Sequence, share: float) -> tuple[list, list]:
    """Divide a list by the draw, keeping its order: the rest, and `share` of it (at least one item)."""
    held = Draw(len(items), share).mask(0, len(items))
    return [x for x, h in zip(items, held, strict=True) if not h], [x for x, h in zip(items, held, strict=True) if h]


class Part:
    """The rows of one side of a draw: index of an example -> row."""

    def __init__(self, draw: Draw, held: bool):
        self.draw, self.held = draw, held

    def __len__(self):
        return self.draw.held if self.held else self.draw.count - self.draw.held

    def row(self, index: int) -> int:
        return self.draw.row(index, self.held)

    def before(self, rows: np.ndarray) -> np.ndarray:
        """Return the number of this part's examples before each row."""
        return self.draw.before(rows, self.held)

    def mask(self, start: int, stop: int) -> np.ndarray:
        mask = self.draw.mask(start, stop)
        return mask if self.held else ~mask


class Whole:
    """All rows, as a part."""

    def __init__(self, count: int):
        self.count = count

    def __len__(self):
        return self.count

    def row(self, index: int) -> int:
        return index

    def before(self, rows: np.ndarray) -> np.ndarray:
        return rows

    def mask(self, start: int, stop: int) -> np.ndarray:
        return np.ones(stop - start, bool)
