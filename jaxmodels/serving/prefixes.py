"""Keys and values of prompts that were read before, by their tokens, for later prompts that begin with the same ones."""

import collections
from collections.abc import Sequence
from typing import Any


class Prefixes:
    """A tree of blocks of tokens, of which the least recently used are forgotten.

    An edge is a block's tokens, so two prompts share blocks exactly as far as their tokens are equal.
    """

    def __init__(self, size: int, limit: int):
        """size: tokens in a block; limit: number of blocks that are kept."""
        self.size, self.limit = size, limit
        self._blocks: collections.OrderedDict[tuple[int, tuple[int, ...]], tuple[int, Any]] = collections.OrderedDict()
        self._last = 0  # number of the newest block; 0 and numbers below are roots

    def __len__(self) -> int:
        return len(self._blocks)

    def find(self, tokens: Sequence[int], root: int = 0) -> list[Any]:
        """Return the longest known beginning of `tokens`, as blocks.

        Args:
          tokens: a prompt.
          root: 0 or below: prompts of different roots share nothing.
        """
        found, parent = [], root
        for key_tokens in self._split(tokens):
            if (entry := self._blocks.get((parent, key_tokens))) is None:
                break
            found.append(((parent, key_tokens), entry[1]))
            parent = entry[0]
        for key, _ in reversed(found):  # the first block is the most recent: it is needed to find the others
            self._blocks.move_to_end(key)
        return [block for _, block in found]

    def add(self, tokens: Sequence[int], blocks: Sequence[Any], root: int = 0) -> None:
        """Keep the blocks of a prompt: all of them, in order. Those that are known are left as they are."""
        keys, parent = [], root
        for key_tokens, block in zip(self._split(tokens), blocks, strict=False):
            key = (parent, key_tokens)
            if key not in self._blocks:
                self._last += 1
                self._blocks[key] = (self._last, block)
            keys.append(key)
            parent = self._blocks[key][0]
        for key in reversed(keys):
            self._blocks.move_to_end(key)
        while len(self._blocks) > self.limit:
            self._blocks.popitem(last=False)

    def _split(self, tokens):
        return [tuple(tokens[i : i + self.size]) for i in range(0, len(tokens) - self.size + 1, self.size)]
