"""Tokens as examples of one length: windows of a stream, or rows of whole documents.

Shapes: T `sequence_length`; an example has T + 1 tokens, the inputs and the targets shifted by one.
"""

import numpy as np

from jaxmodels.data.source import fingerprint
from jaxmodels.data.tokens import Tokens

PAD = -1  # a target that is not part of the loss


class Windows:
    """Windows of T + 1 consecutive tokens, one every `stride`.

    With `cover`, windows are consecutive, the last is padded with -1, and every token but the first is a
    target exactly once. Without, incomplete windows are dropped.
    """

    def __init__(self, tokens: np.ndarray | Tokens, length: int, stride: int, *, cover: bool = False):
        """
        Args:
          tokens: int [n].
          length: T.
          stride: tokens between the starts of two windows; with `cover`, it is T.
          cover: whether the last window may be padded.
        """
        self.tokens = tokens if isinstance(tokens, Tokens) else Tokens(tokens)
        self.length, self.stride = length, length if cover else stride
        size = len(self.tokens)
        self.count = max(0, -(-(size - 1) // length) if cover else (size - 1 - length) // stride + 1)

    def __len__(self):
        return self.count

    @property
    def in_memory(self):
        return self.tokens.in_memory

    def fingerprint(self):
        return fingerprint(np.array([self.tokens.fingerprint(), self.length, self.stride]))

    def __getitem__(self, index):
        return {key: value[0] for key, value in self.get_batch(np.array([index])).items()}

    def get_batch(self, indices):
        """`tokens` int32 [number of indices, T + 1]."""
        places = np.asarray(indices, np.int64)[:, None] * self.stride + np.arange(self.length + 1)
        inside = places < len(self.tokens)
        if inside.all():
            return {"tokens": self.tokens[places]}
        return {"tokens": np.where(inside, self.tokens[np.where(inside, places, 0)], PAD)}


class Packed:
    """Rows of T + 1 tokens, each of one or more whole documents, numbered by `segments`.

    A document longer than a row is cut into pieces of T + 1 tokens that overlap by one, so that every token of a document but its
    first is a target exactly once. Pieces are packed by best fit, the longest first. The rest of a row is padding: -1, in `segments`
    too. Documents of one token, which have no target, are left out.
    """

    def __init__(self, tokens: Tokens, ends: np.ndarray, length: int, *, counts: np.ndarray | None = None):
        """
        Args:
          tokens: tokens of all documents, concatenated.
          ends: int [documents], end of each document.
          length: T.
          counts: bool [tokens], whether each token counts in the loss; rows then have `counts` too, False at padding.
        """
        self.tokens, self.length, self.counts = tokens, length, counts
        starts = np.concatenate([[0], ends[:-1]]).astype(np.int64)
        self.starts, self.sizes = _pieces(starts, np.asarray(ends, np.int64) - starts, length)
        row_of_piece, self.count = _best_fit(self.sizes, length + 1)
        order = np.argsort(row_of_piece, kind="stable")
        self.starts, self.sizes = self.starts[order], self.sizes[order]
        # Row r holds pieces first[r] up to first[r + 1].
        self.first = np.searchsorted(row_of_piece[order], np.arange(self.count + 1))

    def __len__(self):
        return self.count

    @property
    def in_memory(self):
        return self.tokens.in_memory

    @property
    def fill(self) -> float:
        """Fraction of positions that are not padding."""
        return float(self.sizes.sum() / max(1, self.count * (self.length + 1)))

    def fingerprint(self):
        own = [] if self.counts is None else [self.counts]
        return fingerprint(np.array([self.tokens.fingerprint(), self.length]), self.starts, self.first, *own)

    def __getitem__(self, index):
        return {key: value[0] for key, value in self.get_batch(np.array([index])).items()}

    def get_batch(self, indices):
        """`tokens` and `segments`, both int32 [number of indices, T + 1], and, if given, `counts`, bool of the same shape."""
        indices = np.asarray(indices, np.int64)
        counts = self.first[indices + 1] - self.first[indices]
        pieces = ranges(self.first[indices], counts)
        sizes = self.sizes[pieces]
        used = np.add.reduceat(sizes, np.cumsum(counts) - counts)
        filled = np.arange(self.length + 1) < used[:, None]
        tokens, segments = (np.full(filled.shape, PAD, np.int32) for _ in range(2))
        places = ranges(self.starts[pieces], sizes)
        tokens[filled] = self.tokens[places]
        segments[filled] = np.repeat(ranges(np.zeros_like(counts), counts), sizes)
        if self.counts is None:
            return {"tokens": tokens, "segments": segments}
        learned = np.zeros(filled.shape, bool)
        learned[filled] = self.counts[places]
        return {"tokens": tokens, "segments": segments, "counts": learned}


def ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return [s, s + 1, …], of the length of its count, for each start, concatenated."""
    return np.repeat(starts - (np.cumsum(counts) - counts), counts) + np.arange(counts.sum())


def _pieces(starts: np.ndarray, sizes: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Return starts and sizes of the pieces of documents."""
    starts, targets = starts[sizes > 1], sizes[sizes > 1] - 1
    counts = -(-targets // length)
    before = ranges(np.zeros_like(counts), counts) * length
    return np.repeat(starts, counts) + before, np.minimum(np.repeat(targets, counts) - before, length) + 1


def _best_fit(sizes: np.ndarray, capacity: int) -> tuple[np.ndarray, int]:
    """Return the row of each piece, and the number of rows: best fit, longest first (Johnson 1974)."""
    rows = np.empty(len(sizes), np.int64)
    open_rows = [[] for _ in range(capacity + 1)]  # by free space
    spaces, count = 0, 0  # bit s is set if some row has free space s
    for piece in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[piece])
        fitting = spaces >> size
        if fitting:
            space = size + (fitting & -fitting).bit_length() - 1
            row = open_rows[space].pop()
            if not open_rows[space]:
                spaces &= ~(1 << space)
        else:
            space, row, count = capacity, count, count + 1
        rows[piece] = row
        left = space - size
        if left > 1:  # a document of one token has no target
            open_rows[left].append(row)
            spaces |= 1 << left
    return rows, count
