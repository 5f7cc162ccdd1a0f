"""The protocol of tokenizers, and helpers that all tokenizers share."""

import re
from collections.abc import Sequence
from typing import Protocol

import numpy as np

SPECIAL = ("<unknown>", "<start>", "<end>", "<mask>")


# Names of the four in pretrained models' tokenizers, in order of preference.
KNOWN_SPECIAL = {
    "unknown": ("<unknown>", "<unk>", "[UNK]"),
    "start": ("<start>", "<s>", "[CLS]", "<bos>", "<|begin_of_text|>", "<|startoftext|>"),
    "end": ("<end>", "</s>", "[SEP]", "<eos>", "<|end_of_text|>", "<|endoftext|>"),
    "mask": ("<mask>", "[MASK]"),
}


_BETWEEN_WORDS = re.compile(r"(?<=[A-Za-z])(?= [A-Za-z])")
Added = tuple[str, bool]  # an added token: its text, and whether it is special


class Tokenizer(Protocol):
    """A tokenizer as text sources and tasks use it.

    `encode` returns int32 [tokens]. It adds no special tokens and recognises none: the text `<end>` is five characters.
    Optional: `encode_batch(texts)`, the tokens of several texts, if that is faster than one by one; `cuttable`, whether the tokens of a text are those of
    its parts where it is cut at a `safe_cut`.
    `decode` skips padding (-1), writes special tokens by name, and raises ValueError for other numbers that are not token ids.
    `special` returns the id of `unknown`, `start`, `end` or `mask`, or None. `to_json` returns what `factory.from_json` reads.
    """

    vocab_size: int

    def encode(self, text: str) -> np.ndarray: ...

    def decode(self, tokens) -> str: ...

    def special(self, name: str) -> int | None: ...

    def to_json(self) -> str: ...


def safe_cut(text: str, start: int) -> int | None:
    """Return the first place at or after `start` between a letter and a space before a letter: neither words nor tokens of plain BPE span it."""
    found = _BETWEEN_WORDS.search(text, start)
    return None if found is None else found.start()


def encode_all(tokenizer: Tokenizer, texts: Sequence[str]) -> list[np.ndarray]:
    """Return the tokens of each text, as `encode` returns them."""
    batch = getattr(tokenizer, "encode_batch", None)
    return [tokenizer.encode(text) for text in texts] if batch is None else batch(texts)


def frame(tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Return the special tokens that a pretrained model's tokenizer adds before and after a text, int32; none for other tokenizers."""
    none = np.zeros(0, np.int32)
    return getattr(tokenizer, "frame", (none, none))


def known_tokens(tokenizer: Tokenizer | None) -> int | None:
    """Return the number of a tokenizer's tokens; a model's vocabulary may have rows after them that no token has. None without a tokenizer."""
    return None if tokenizer is None else getattr(tokenizer, "tokens", tokenizer.vocab_size)


def cut_longest(parts: Sequence[np.ndarray], limit: int) -> list[np.ndarray]:
    """Return parts that together have at most `limit` tokens: the longer one is cut first."""
    if len(parts) == 1:
        return [parts[0][:limit]]
    short, long = sorted((len(parts[0]), len(parts[1])))
    if short + long > limit:
        long = max(short, limit - short)
    if short + long > limit:
        short, long = limit // 2, limit - limit // 2
    first, second = (long, short) if len(parts[0]) > len(parts[1]) else (short, long)
    return [parts[0][:first], parts[1][:second]]


def checked_ids(tokens, vocab_size: int) -> list[int]:
    """Return tokens as a list without padding; ValueError for numbers that are not token ids."""
    tokens = np.asarray(tokens)
    tokens = tokens[tokens != -1]
    wrong = tokens[(tokens < 0) | (tokens >= vocab_size)]
    if wrong.size:
        raise ValueError(f"{wrong[0]} is not a token: the tokenizer has {vocab_size}, from 0 on")
    return tokens.astype(np.int64).tolist()


def check_special(name: str) -> None:
    """Raise ValueError unless `name` is one of the four special tokens of `KNOWN_SPECIAL`."""
    if name not in KNOWN_SPECIAL:
        raise ValueError(f"there is no special token {name!r}; there are {', '.join(KNOWN_SPECIAL)}")


def own_special(name: str, names: tuple[str, ...]) -> int | None:
    """Return the id of a special token of a tokenizer trained here, whose first ids are `names`; None if it has no special tokens."""
    check_special(name)
    return names.index(f"<{name}>") if names else None
