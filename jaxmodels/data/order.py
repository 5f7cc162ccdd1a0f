"""The order of examples in an epoch: pure functions of position, seed and epoch."""

import dataclasses
import functools
from typing import Any

import numpy as np

from jaxmodels.errors import ConfigError


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele et al. 2014): 64 bits in, 64 well-mixed bits out."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def shuffled(positions: np.ndarray, size: int, seed: int, epoch: int, rounds: int = 8) -> np.ndarray:
    """Return the image of each position under a pseudo-random permutation of range(size).

    A Feistel network over pairs of numbers below the square root of `size` (Black and Rogaway 2002), applied
    until the result is in range. It needs no memory, so reading can start anywhere in an epoch of any length.

    Args:
      positions: int [n], each in [0, size).
      size: number of examples.
      seed, epoch: choose the permutation.

    Returns:
      int64 [n].
    """
    side = np.uint64(max(1, int(np.ceil(np.sqrt(size)))))
    while int(side) ** 2 < size:  # float square roots are too small for very large sizes
        side += np.uint64(1)
    # A Python int wraps silently by the mask; numpy scalars would warn.
    keys = [_mix(np.array([(seed * 0x9E3779B97F4A7C15 + epoch * 0xD1342543DE82EF95 + r) & (2**64 - 1)], np.uint64)) for r in range(rounds)]
    keys = [_mix(key + np.uint64(r + 1)) for r, key in enumerate(keys)]

    def permute(x):
        left, right = x // side, x % side
        for key in keys:
            left, right = right, (left + _mix(right ^ key) % side) % side
        return left * side + right

    result = permute(np.asarray(positions).astype(np.uint64))
    while (outside := result >= size).any():
        result[outside] = permute(result[outside])
    return result.astype(np.int64)


@dataclasses.dataclass(frozen=True)
class Groups:
    """Examples that are decoded together.

    Attributes:
      ends: int64 [groups], number of examples up to the end of each group.
      fit: how many of the largest groups the reader holds in memory.
      what: how to hold more, for errors.
    """

    ends: np.ndarray
    fit: int
    what: str = "data.group_cache_mb"


def groups_of(source: Any, name: str = "the data") -> Groups:
    """Return the groups of a source, or of the one that it wraps; ConfigError if its examples are read one by one."""
    while not hasattr(source, "groups") and hasattr(source, "source"):
        source = source.source
    groups = source.groups() if hasattr(source, "groups") else None
    if groups is None:
        raise ConfigError(f"config.data.shuffle_window: {name} has no groups of rows that are decoded together; leave the key out.")
    return groups


def check_window(source: Any, window: int, name: str) -> None:
    """Raise ConfigError unless a source has groups, and a window of them fits in memory."""
    groups = groups_of(source, name)
    if window < 1:
        raise ConfigError(f"config.data.shuffle_window must be at least 1, got {window}.")
    if min(window, len(groups.ends)) > groups.fit:
        raise ConfigError(
            f"config.data.shuffle_window={window}: {groups.fit} of the largest groups of {name} fit in {groups.what}, so that groups would be decoded "
            f"again and again. Raise {groups.what}, or lower the window."
        )


class Windows:
    """An order that needs few groups at a time: the groups of an epoch in random order, cut into windows, and the examples of a window shuffled.

    An epoch's order needs 8 bytes for each group.
    """

    def __init__(self, ends: np.ndarray, window: int, seed: int):
        """
        Args:
          ends: int64 [groups], number of examples up to the end of each group.
          window: groups in a window.
          seed: of the order.
        """
        self.ends, self.window, self.seed = np.asarray(ends), window, seed
        self._epoch = functools.lru_cache(maxsize=2)(self._compute_epoch)

    def __getstate__(self):
        return self.ends, self.window, self.seed

    def __setstate__(self, state):
        self.__init__(*state)

    def _compute_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the groups in their order, the positions at which they end, and the positions at which windows end."""
        groups = shuffled(np.arange(len(self.ends)), len(self.ends), self.seed, epoch)
        ends = np.cumsum(np.diff(self.ends, prepend=0)[groups])
        return groups, ends, np.append(ends[self.window - 1 : -1 : self.window], ends[-1])

    def order(self, positions: np.ndarray, epoch: int) -> np.ndarray:
        """Return the examples at some positions of an epoch, int64 [n]."""
        groups, ends, window_ends = self._epoch(epoch)
        windows = np.searchsorted(window_ends, positions, side="right")
        places = np.empty(len(positions), np.int64)
        for window in np.unique(windows):
            here = windows == window
            start = int(window_ends[window - 1]) if window else 0
            own_seed = self.seed + ((int(window) + 1) << 32)  # each window has its own permutation
            places[here] = start + shuffled(positions[here] - start, int(window_ends[window]) - start, own_seed, epoch)
        which = np.searchsorted(ends, places, side="right")
        return self.ends[groups[which]] - (ends[which] - places)
