"""How an engine reads prompts: in parts, one prompt after the other, beginning with what an earlier one has in common with it."""

from typing import Any

import jax
import numpy as np

from jaxmodels.models.cache import Packed
from jaxmodels.serving.prefixes import Prefixes
from jaxmodels.serving.programs import Programs
from jaxmodels.serving.text import Text


class Prompts:
    """Reads one prompt at a time, all but its last token, which the first step of its row reads.

    Attributes:
      text: whose prompt is being read; None between two.
      kept: tokens whose keys and values are kept at most, 0 in models that have none.
      read, shared: tokens of prompts that were read so far, and those that were there from earlier ones.
    """

    def __init__(self, programs: Programs, prefix_tokens: int):
        """prefix_tokens: tokens of prompts whose keys and values are kept."""
        self.programs, self.text, self.read, self.shared = programs, None, 0, 0
        blocks = prefix_tokens // programs.block if programs.keeps_prefixes else 0
        self.kept, self._prefixes = blocks * programs.block, Prefixes(programs.block, blocks) if blocks else None
        self._cache = programs.reading_cache()
        self._scores: list[Any] = []  # of the parts read so far, on the device

    def begin(self, text: Text) -> None:
        """Begin with a prompt."""
        self.text, self._scores = text, []
        if self._prefixes is None or text.scored:  # what is scored has to be read
            return
        for block in self._prefixes.find(text.request.tokens[:-1], -text.adapter):
            self._cache = self.programs.paste(self._cache, block, text.read)
            text.read += self.programs.block
        text.cached = text.read
        self.shared += text.cached

    def read_part(self, most: int) -> tuple[int, tuple[Packed, tuple[int, ...], int] | None]:
        """Read one more part of the prompt.

        Args:
          most: tokens of the part at most, but for the smallest one.

        Returns:
          The number of tokens in it, and None; or, after the last part, what `Batch.add` takes: a cache, the tokens to go on from, and how many of them
          the cache holds.
        """
        text, generator = self.text, self.programs.generator
        tokens = text.request.tokens
        if generator.reads_sources:
            size = next(size for size in self.programs.chunks if size >= len(tokens))
            self.read += len(tokens)
            self.text = None
            return size, (self.programs.read_source(padded(tokens, size), text.adapter), (generator.start,), 0)
        first, last, size = text.read, len(tokens) - 1, 0
        if first < last or first == 0:  # a recurrent state is set by reading, even no tokens
            size = self._size(last - first, min(most, self.programs.length - first))
            part = padded(tokens[first : min(first + size, last)], size)
            if text.scored:
                following = padded(tokens[first + 1 : first + 1 + size], size)
                self._cache, scores = self.programs.score(self._cache, first, part, text.adapter, following, text.request.logprobs)
                self._scores.append(scores)
            else:
                self._cache = self.programs.read(self._cache, first, part, text.adapter)
            text.read = min(first + size, last)
            self.read += text.read - first
        if text.read < last:
            return size, None
        if text.scored:
            text.score_prompt(jax.device_get(self._scores))
        self._keep(tokens[:-1], -text.adapter)
        self.text, self._scores = None, []
        return size, (self._cache, tokens, last)

    def drop(self) -> None:
        """Read no more of the prompt at hand."""
        self.text, self._scores = None, []

    def _size(self, left: int, room: int) -> int:
        """Return the size of the next part: the smallest that holds what is left, unless more than half of it would be padding."""
        sizes = [size for size in self.programs.chunks if size <= room] or [self.programs.chunks[0]]
        fitting = [size for size in sizes if size >= left]
        if fitting and (2 * left > fitting[0] or fitting[0] == sizes[0]):
            return fitting[0]
        return max((size for size in sizes if size <= left), default=sizes[0])

    def _keep(self, tokens: tuple[int, ...], root: int) -> None:
        """Keep what was read for later prompts."""
        if self._prefixes is not None:
            known = self._prefixes.find(tokens, root)
            block = self.programs.block
            starts = range(len(known) * block, len(tokens) - block + 1, block)
            self._prefixes.add(tokens, known + [self.programs.cut(self._cache, start) for start in starts], root)


def padded(tokens: Any, size: int) -> np.ndarray:
    """Return tokens with -1 after them, int32 [size]."""
    array = np.full(size, -1, np.int32)
    array[: len(tokens)] = tokens
    return array
