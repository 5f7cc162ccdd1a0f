"""Tokenizers of characters, bytes and words."""

import collections
import json
from collections.abc import Iterable

import numpy as np

from jaxmodels.tokenizers.base import SPECIAL, checked_ids, own_special


class CharacterTokenizer:
    """One token for each character of an alphabet."""

    cuttable = True

    def __init__(self, alphabet: str, *, special: bool = False):
        """
        Args:
          alphabet: the characters, in any order.
          special: whether ids begin with the special tokens, and other characters are encoded as `unknown`.
        """
        self.alphabet = "".join(sorted(set(alphabet)))
        self.codes = np.array([ord(c) for c in self.alphabet], np.uint32)
        self.names = SPECIAL if special else ()

    @property
    def vocab_size(self) -> int:
        """Number of ids: special tokens and characters."""
        return len(self.names) + len(self.alphabet)

    def encode(self, text: str) -> np.ndarray:
        """int32 [number of characters].

        Raises:
          ValueError: a character is not in the alphabet, and there is no `unknown`.
        """
        codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        tokens = np.searchsorted(self.codes, codes).clip(max=len(self.codes) - 1).astype(np.int32)
        unknown = self.codes[tokens] != codes
        if not self.names and unknown.any():
            place = np.flatnonzero(unknown)[0]
            raise ValueError(f"character {text[place]!r} (at {place}) is not one of the tokenizer's {self.vocab_size}")
        return np.where(unknown, 0, tokens + len(self.names)).astype(np.int32)

    def decode(self, tokens) -> str:
        pieces = (*self.names, *self.alphabet)
        return "".join(pieces[t] for t in checked_ids(tokens, self.vocab_size))

    def special(self, name: str) -> int | None:
        return own_special(name, self.names)

    def to_json(self) -> str:
        return json.dumps({"kind": "character", "alphabet": self.alphabet} | ({"special": True} if self.names else {}))


class ByteTokenizer:
    """The 256 bytes of UTF-8."""

    cuttable = True

    def __init__(self, *, special: bool = False):
        """special: whether ids begin with the special tokens."""
        self.names = SPECIAL if special else ()
        self.vocab_size = len(self.names) + 256

    def encode(self, text: str) -> np.ndarray:
        """int32 [number of bytes]."""
        return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32) + len(self.names)

    def decode(self, tokens) -> str:
        pieces = [name.encode() for name in self.names] + [bytes([b]) for b in range(256)]
        return b"".join(pieces[t] for t in checked_ids(tokens, self.vocab_size)).decode("utf-8", errors="replace")

    def special(self, name: str) -> int | None:
        return own_special(name, self.names)

    def to_json(self) -> str:
        return json.dumps({"kind": "byte"} | ({"special": True} if self.names else {}))


class WordTokenizer:
    """Words between white space; words outside the vocabulary are `unknown`. White space is decoded as one space."""

    cuttable = True

    def __init__(self, words: Iterable[str], *, lower: bool = False):
        """
        Args:
          words: the vocabulary after the special tokens.
          lower: whether text is converted to lower case first.
        """
        self.words, self.lower = tuple(words), lower
        self.vocab_size = len(SPECIAL) + len(self.words)
        self._ids = {word: i for i, word in enumerate(self.words, len(SPECIAL))}

    @classmethod
    def train(cls, texts: Iterable[str], size: int, *, lower: bool = False) -> "WordTokenizer":
        """Make a tokenizer of the `size` most frequent words of texts; ties are broken alphabetically."""
        counts = collections.Counter()
        for text in texts:
            counts.update((text.lower() if lower else text).split())
        return cls(sorted(counts, key=lambda word: (-counts[word], word))[:size], lower=lower)

    def encode(self, text: str) -> np.ndarray:
        """int32 [number of words]."""
        return np.array([self._ids.get(word, 0) for word in (text.lower() if self.lower else text).split()], np.int32)

    def decode(self, tokens) -> str:
        pieces = SPECIAL + self.words
        return " ".join(pieces[t] for t in checked_ids(tokens, self.vocab_size))

    def special(self, name: str) -> int | None:
        return own_special(name, SPECIAL)

    def to_json(self) -> str:
        return json.dumps({"kind": "word", "lower": self.lower, "words": self.words}, ensure_ascii=False)
