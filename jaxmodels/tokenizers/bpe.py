"""Tokenizers of the library `tokenizers`."""

import contextlib
import json
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import tokenizers as library
from tokenizers import decoders, models, pre_tokenizers, trainers

from jaxmodels.errors import ConfigError
from jaxmodels.tokenizers.base import KNOWN_SPECIAL, SPECIAL, Added, check_special, checked_ids, safe_cut

MOST_TOKENS = 1 << 24  # of a vocabulary that is read from a file; an embedding has a row for each id
_PIECE = 1 << 14  # minimum characters of a piece of a long text
_TOGETHER = 1 << 18  # characters encoded at once; a token takes some 200 bytes meanwhile


class TokenizersTokenizer:
    """A tokenizer of the `tokenizers` library; its JSON is that library's own."""

    def __init__(self, serialized: str):
        """serialized: the string that `tokenizers.Tokenizer.to_str` returns."""
        self._tokenizer = library.Tokenizer.from_str(serialized)
        self._tokenizer.encode_special_tokens = True  # text that looks like a special token stays text
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        if not 1 <= self.vocab_size <= MOST_TOKENS:
            raise ValueError(f"its largest id is {self.vocab_size - 1:,}; a vocabulary has 1 to {MOST_TOKENS:,} tokens")
        self.cuttable = _is_plain_byte_level(serialized)

    @classmethod
    def train(cls, texts: Iterable[str], size: int) -> "TokenizersTokenizer":
        """Train byte-level BPE (Sennrich et al. 2016; on bytes, Radford et al. 2019) with `size` tokens: four special ones, 256 bytes, merges.

        Deterministic: the same texts give the same tokenizer.
        """
        tokenizer = library.Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=size,
            special_tokens=list(SPECIAL),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        tokenizer.train_from_iterator((piece for text in texts for piece in _pieces(text)), trainer)
        return cls(tokenizer.to_str())

    def encode(self, text: str) -> np.ndarray:
        """int32 [number of tokens]."""
        if self.cuttable and len(text) > _PIECE:
            return self.encode_batch([text])[0]
        with panics_are_errors():
            return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the tokens of each text, int32; all cores encode them."""
        parts: list[list[np.ndarray]] = [[] for _ in texts]
        few: list[tuple[int, str]] = []
        size = 0

        def encode_few():
            with panics_are_errors():
                found = self._tokenizer.encode_batch_fast([piece for _, piece in few], add_special_tokens=False)
            for (number, _), each in zip(few, found, strict=True):
                parts[number].append(np.array(each.ids, np.int32))
            few.clear()

        for number, text in enumerate(texts):
            for piece in _pieces(text) if self.cuttable else [text]:
                few.append((number, piece))
                size += len(piece)
                if size >= _TOGETHER:
                    encode_few()
                    size = 0
        encode_few()
        return [part[0] if len(part) == 1 else np.concatenate([np.zeros(0, np.int32), *part]) for part in parts]

    def decode(self, tokens) -> str:
        return self._tokenizer.decode(checked_ids(tokens, self.vocab_size), skip_special_tokens=False)

    def special(self, name: str) -> int | None:
        check_special(name)
        ids = (self._tokenizer.token_to_id(token) for token in KNOWN_SPECIAL[name])
        return next((i for i in ids if i is not None), None)

    def to_json(self) -> str:
        return self._tokenizer.to_str()

    def with_added(self, tokens: Sequence[Added]) -> "TokenizersTokenizer":
        """Return the tokenizer with further tokens, whose ids follow its own; ConfigError for one that it has."""
        tokenizer = library.Tokenizer.from_str(self.to_json())
        add(tokenizer, tokens)
        return type(self)(tokenizer.to_str())

    def added_from(self, first: int) -> list[Added]:
        """Return the added tokens whose ids are `first` or above, in order."""
        return [(token.content, token.special) for number, token in sorted(self._tokenizer.get_added_tokens_decoder().items()) if number >= first]


def add(tokenizer: library.Tokenizer, tokens: Sequence[Added]) -> None:
    """Add tokens (text, whether it is special) to a tokenizer of the library, in place; ConfigError for a text that is one of its tokens already."""
    for text, special in tokens:
        if (number := tokenizer.token_to_id(text)) is not None:
            raise ConfigError(f"config.data.tokenizer: {text!r} is a token already (id {number}): do not add it.")
        tokenizer.add_tokens([library.AddedToken(text, special=special, normalized=False)])


@contextlib.contextmanager
def panics_are_errors() -> Iterator[None]:
    """Raise ConfigError for a panic of the `tokenizers` library, which is no Exception: its regular expressions end so at a limit of their steps."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ == "PanicException":
            raise ConfigError(f"config.data.tokenizer: the tokenizer cannot encode a text: {error}.") from None
        raise


def _is_plain_byte_level(serialized: str) -> bool:
    """Whether a text may be cut before a space that follows a letter, and the pieces encoded one by one."""
    values = json.loads(serialized)
    if any(" " in token["content"] for token in values.get("added_tokens") or ()):
        return False
    pre = values.get("pre_tokenizer") or {}
    return values.get("normalizer") is None and pre.get("type") == "ByteLevel" and not pre.get("add_prefix_space") and pre.get("use_regex", True)


def _pieces(text: str) -> Iterator[str]:
    """Yield a text in pieces of about `_PIECE` characters, which no token spans."""
    start = 0
    while start < len(text):
        end = safe_cut(text, start + _PIECE) or len(text)
        yield text[start:end]
        start = end
