"""Tokenizers: text to whole numbers and back. The one a run used is saved in the run's folder."""

import json
from typing import Protocol

import numpy as np


class Tokenizer(Protocol):
    """What a text source and a task need."""

    vocab_size: int

    def encode(self, text: str) -> np.ndarray: ...

    def decode(self, tokens) -> str: ...

    def to_json(self) -> str: ...


class CharacterTokenizer:
    """One token for each character of an alphabet."""

    def __init__(self, alphabet: str):
        """alphabet: the characters, token 0 first; sorted and without repeats."""
        self.alphabet = "".join(sorted(set(alphabet)))
        self.codes = np.array([ord(c) for c in self.alphabet], np.uint32)

    @property
    def vocab_size(self) -> int:
        return len(self.alphabet)

    def encode(self, text: str) -> np.ndarray:
        """int32 [number of characters].

        Raises:
          ValueError: a character is not in the alphabet.
        """
        codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        tokens = np.searchsorted(self.codes, codes).clip(max=len(self.codes) - 1).astype(np.int32)
        unknown = np.flatnonzero(self.codes[tokens] != codes)
        if len(unknown):
            raise ValueError(f"character {text[unknown[0]]!r} (at {unknown[0]}) is not one of the tokenizer's {self.vocab_size}")
        return tokens

    def decode(self, tokens) -> str:
        return "".join(self.alphabet[int(t)] for t in tokens)

    def to_json(self) -> str:
        return json.dumps({"kind": "character", "alphabet": self.alphabet})


class ByteTokenizer:
    """The 256 bytes of UTF-8."""

    vocab_size = 256

    def encode(self, text: str) -> np.ndarray:
        """int32 [number of bytes]."""
        return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32)

    def decode(self, tokens) -> str:
        return bytes(int(t) for t in tokens).decode("utf-8", errors="replace")

    def to_json(self) -> str:
        return json.dumps({"kind": "byte"})


def from_json(text: str) -> Tokenizer:
    """The tokenizer whose `to_json` gave `text`."""
    values = json.loads(text)
    if values["kind"] == "character":
        return CharacterTokenizer(values["alphabet"])
    if values["kind"] == "byte":
        return ByteTokenizer()
    raise ValueError(f"unknown kind of tokenizer {values['kind']!r}; there are character and byte")
