"""Tokenizers: text to whole numbers and back. The one a run used is saved in the run's folder, as `tokenizer.json`.

A config names one by a specification, which `make_tokenizer` reads. Four special tokens have names of their own here,
whatever a tokenizer's file calls them: `unknown`, `start`, `end`, `mask`; those made here have them as ids 0 to 3.
"""

import base64
import collections
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator
from typing import Protocol

import numpy as np
import tokenizers as library
from tokenizers import decoders, models, pre_tokenizers, trainers

from jaxmodels import config as config_lib
from jaxmodels.errors import ConfigError, optional_import

LIBRARY_VERSION = library.__version__  # another one may train to another end
SPECIAL = ("<unknown>", "<start>", "<end>", "<mask>")
FORMS = ("character", "byte", "character+special", "byte+special", "word:MAX", "word-lower:MAX", "bpe:SIZE")
FORMS += ("FILE.json", "FILE.model", "RUN", "hf:DIR_OR_ID")

# What published tokenizers call the four, in the order they are looked for.
_PUBLISHED = {
    "unknown": ("<unknown>", "<unk>", "[UNK]"),
    "start": ("<start>", "<s>", "[CLS]", "<bos>", "<|begin_of_text|>", "<|startoftext|>"),
    "end": ("<end>", "</s>", "[SEP]", "<eos>", "<|end_of_text|>", "<|endoftext|>"),
    "mask": ("<mask>", "[MASK]"),
}
SMALLEST_BPE = len(SPECIAL) + 256
_PIECE, _PIECES = 1 << 18, 16  # characters of a piece, where a text may be cut, and pieces that are encoded at once


class Tokenizer(Protocol):
    """What a text source and a task need.

    `encode` gives int32 [tokens] and adds no special tokens, nor reads any: the text `<end>` is five characters.
    `decode` leaves out padding (-1), shows special tokens by name, and raises ValueError on other numbers that are no tokens.
    `special` gives the id of `unknown`, `start`, `end` or `mask`, or None. `to_json` gives what `from_json` reads.
    """

    vocab_size: int

    def encode(self, text: str) -> np.ndarray: ...

    def decode(self, tokens) -> str: ...

    def special(self, name: str) -> int | None: ...

    def to_json(self) -> str: ...


class CharacterTokenizer:
    """One token for each character of an alphabet."""

    def __init__(self, alphabet: str, *, special: bool = False):
        """
        Args:
          alphabet: the characters; sorted and without repeats here.
          special: whether the special tokens come first, and other characters are encoded as `unknown`.
        """
        self.alphabet = "".join(sorted(set(alphabet)))
        self.codes = np.array([ord(c) for c in self.alphabet], np.uint32)
        self.names = SPECIAL if special else ()

    @property
    def vocab_size(self) -> int:
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
        return "".join(pieces[t] for t in _checked(tokens, self.vocab_size))

    def special(self, name: str) -> int | None:
        return _own_special(name, self.names)

    def to_json(self) -> str:
        return json.dumps({"kind": "character", "alphabet": self.alphabet} | ({"special": True} if self.names else {}))


class ByteTokenizer:
    """The 256 bytes of UTF-8."""

    def __init__(self, *, special: bool = False):
        """special: whether the special tokens come first."""
        self.names = SPECIAL if special else ()
        self.vocab_size = len(self.names) + 256

    def encode(self, text: str) -> np.ndarray:
        """int32 [number of bytes]."""
        return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32) + len(self.names)

    def decode(self, tokens) -> str:
        pieces = [name.encode() for name in self.names] + [bytes([b]) for b in range(256)]
        return b"".join(pieces[t] for t in _checked(tokens, self.vocab_size)).decode("utf-8", errors="replace")

    def special(self, name: str) -> int | None:
        return _own_special(name, self.names)

    def to_json(self) -> str:
        return json.dumps({"kind": "byte"} | ({"special": True} if self.names else {}))


class WordTokenizer:
    """Words between white space; those not in the vocabulary are `unknown`. White space is decoded as one space."""

    def __init__(self, words: Iterable[str], *, lower: bool = False):
        """
        Args:
          words: the vocabulary after the special tokens.
          lower: whether text is put into lower case first.
        """
        self.words, self.lower = tuple(words), lower
        self.vocab_size = len(SPECIAL) + len(self.words)
        self._ids = {word: i for i, word in enumerate(self.words, len(SPECIAL))}

    @classmethod
    def train(cls, texts: Iterable[str], size: int, *, lower: bool = False) -> "WordTokenizer":
        """The `size` most frequent words of texts; equally frequent ones by spelling."""
        counts = collections.Counter()
        for text in texts:
            counts.update((text.lower() if lower else text).split())
        return cls(sorted(counts, key=lambda word: (-counts[word], word))[:size], lower=lower)

    def encode(self, text: str) -> np.ndarray:
        """int32 [number of words]."""
        return np.array([self._ids.get(word, 0) for word in (text.lower() if self.lower else text).split()], np.int32)

    def decode(self, tokens) -> str:
        pieces = SPECIAL + self.words
        return " ".join(pieces[t] for t in _checked(tokens, self.vocab_size))

    def special(self, name: str) -> int | None:
        return _own_special(name, SPECIAL)

    def to_json(self) -> str:
        return json.dumps({"kind": "word", "lower": self.lower, "words": self.words}, ensure_ascii=False)


class TokenizersTokenizer:
    """A tokenizer of the `tokenizers` library; its JSON is that library's own."""

    def __init__(self, serialized: str):
        """serialized: as `tokenizers.Tokenizer.to_str` gives."""
        self._tokenizer = library.Tokenizer.from_str(serialized)
        self._tokenizer.encode_special_tokens = True  # text that looks like a special token stays text
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self._cuttable = _is_plain_byte_level(serialized)

    @classmethod
    def train(cls, texts: Iterable[str], size: int) -> "TokenizersTokenizer":
        """Byte-level BPE (Sennrich et al. 2016; on bytes, Radford et al. 2019) with `size` tokens: the four special, 256 bytes, merges.

        The same texts give the same tokenizer.
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
        if not self._cuttable or len(text) <= _PIECE:
            return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int32)
        pieces, parts = _pieces(text), []
        while few := list(itertools.islice(pieces, _PIECES)):  # over all cores
            parts += [np.array(e.ids, np.int32) for e in self._tokenizer.encode_batch_fast(few, add_special_tokens=False)]
        return np.concatenate(parts)

    def decode(self, tokens) -> str:
        return self._tokenizer.decode(_checked(tokens, self.vocab_size), skip_special_tokens=False)

    def special(self, name: str) -> int | None:
        _check_special(name)
        ids = (self._tokenizer.token_to_id(token) for token in _PUBLISHED[name])
        return next((i for i in ids if i is not None), None)

    def to_json(self) -> str:
        return self._tokenizer.to_str()


class SentencePieceTokenizer:
    """A SentencePiece model (Kudo and Richardson 2018). Its JSON holds the model's bytes."""

    def __init__(self, model: bytes):
        """model: the bytes of a `.model` file."""
        self._model = model
        self._processor = optional_import("sentencepiece", "text").SentencePieceProcessor(model_proto=model)
        self.vocab_size = self._processor.vocab_size()

    def encode(self, text: str) -> np.ndarray:
        """int32 [number of pieces]."""
        return np.array(self._processor.encode(text), np.int32)

    def decode(self, tokens) -> str:
        return self._processor.decode(_checked(tokens, self.vocab_size))

    def special(self, name: str) -> int | None:
        _check_special(name)
        processor = self._processor
        own = {"unknown": processor.unk_id, "start": processor.bos_id, "end": processor.eos_id}
        if name in own:
            return None if own[name]() < 0 else own[name]()
        ids = (processor.piece_to_id(piece) for piece in _PUBLISHED[name])
        return next((i for i in ids if i != processor.unk_id()), None)

    def model_bytes(self) -> bytes:
        """The bytes of the `.model` file."""
        return self._model

    def to_json(self) -> str:
        return json.dumps({"kind": "sentencepiece", "model": base64.b64encode(self._model).decode()})


class Shared(str):
    """The specification of a tokenizer that several sources are going to share: none of them makes it, all hand over their texts."""


class HandedOver(Exception):
    """Raised instead of making a tokenizer by a `Shared` specification.

    Attributes:
      texts: what it would have been made from.
    """

    def __init__(self, texts: Iterable[str]):
        super().__init__("texts")
        self.texts = texts


def make_tokenizer(spec: str | Tokenizer, texts: Iterable[str], data_dir: str | None) -> Tokenizer:
    """The tokenizer that `data.tokenizer` names.

    Args:
      spec: `character` (the alphabet of `texts`) or `byte`, both also with `+special`, which puts the special tokens first;
        `word:MAX` and `word-lower:MAX` (the most frequent words of `texts`); `bpe:SIZE` (byte-level BPE trained on `texts`);
        the path of a file of the `tokenizers` library, of a SentencePiece `.model`, or of a run's folder; or `hf:DIR_OR_ID`, that
        of a published model (`published_tokenizer`). A tokenizer is given back.
      texts: what it is trained on; read only if it is trained. One that is encoded without `unknown` (`character`) must
        be given all the text there is.
      data_dir: where relative paths are looked for, after the working directory.

    Raises:
      ConfigError: no such form or file, a file that is no tokenizer, a size out of range, or no text to train on.
      HandedOver: a `Shared` specification.
    """
    if isinstance(spec, Shared):
        raise HandedOver(texts)
    if not isinstance(spec, str):
        return spec
    if spec in ("byte", "byte+special"):
        return ByteTokenizer(special=spec.endswith("special"))
    if spec in ("character", "character+special"):
        alphabet = set().union(*texts)
        if not alphabet:
            raise ConfigError(f"config.data.tokenizer={spec!r}: the training text is empty.")
        return CharacterTokenizer("".join(alphabet), special=spec.endswith("special"))
    if is_made_from_text(spec):
        return _train(spec, texts)
    if spec.startswith("hf:"):
        from jaxmodels.data import published_tokenizer

        return published_tokenizer.from_reference(spec, data_dir)
    return _from_path(spec, data_dir)


def frame(tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """The special tokens that a published tokenizer puts before and after a text of its own accord, int32; none of any other."""
    none = np.zeros(0, np.int32)
    return getattr(tokenizer, "frame", (none, none))


def is_made_from_text(spec: str | Tokenizer) -> bool:
    """Whether a tokenizer depends on the texts it is made from."""
    return isinstance(spec, str) and re.fullmatch(r"character(\+special)?|(word|word-lower|bpe):.*", spec) is not None


def _train(spec: str, texts: Iterable[str]) -> Tokenizer:
    form, _, number = spec.partition(":")
    smallest = SMALLEST_BPE if form == "bpe" else 1
    if not (number.isascii() and number.isdigit()) or not smallest <= int(number) < 2**31:
        shown = "SIZE" if form == "bpe" else "MAX"
        raise ConfigError(f"config.data.tokenizer: {form}:{shown} takes a whole number from {smallest} on, got {spec!r}.")
    if form == "bpe":
        return TokenizersTokenizer.train(texts, int(number))
    tokenizer = WordTokenizer.train(texts, int(number), lower=form == "word-lower")
    if not tokenizer.words:
        raise ConfigError(f"config.data.tokenizer={spec!r}: there is no word in the training text.")
    return tokenizer


def _from_path(spec: str, data_dir: str | None) -> Tokenizer:
    """The tokenizer of a file or a run's folder."""
    places = [spec] + ([os.path.join(data_dir, spec)] if data_dir else [])
    path = next((place for place in places if os.path.exists(place)), None)
    if path is None:
        hint = config_lib.suggest(spec, FORMS)
        raise ConfigError(f"config.data.tokenizer: {spec!r} is none of {', '.join(FORMS)}; and there is no file {' nor '.join(places)}.{hint}")
    if os.path.isdir(path):
        path = os.path.join(path, "tokenizer.json")
        if not os.path.isfile(path):
            raise ConfigError(f"config.data.tokenizer: the folder {os.path.dirname(path)} holds no tokenizer.json: not a run on text.")
    try:
        with open(path, "rb") as file:
            content = file.read()
        return SentencePieceTokenizer(content) if path.endswith(".model") else from_json(content.decode("utf-8"))
    except ConfigError:
        raise
    except Exception as error:  # noqa: BLE001  the libraries raise bare Exception
        wanted = "a SentencePiece model" if path.endswith(".model") else "a tokenizer in JSON, as the `tokenizers` library or a run writes it"
        raise ConfigError(f"config.data.tokenizer: {path} is not {wanted}: {error}") from error


def from_json(text: str) -> Tokenizer:
    """The tokenizer whose `to_json` gave `text`; or a file of the `tokenizers` library.

    Raises:
      ValueError: it is neither.
    """
    values = json.loads(text)
    if not isinstance(values, dict):
        raise ValueError(f"a tokenizer is a JSON object, not {type(values).__name__}")
    kind = values.get("kind")
    if kind == "character":
        return CharacterTokenizer(values["alphabet"], special=values.get("special", False))
    if kind == "byte":
        return ByteTokenizer(special=values.get("special", False))
    if kind == "word":
        return WordTokenizer(values["words"], lower=values["lower"])
    if kind == "sentencepiece":
        return SentencePieceTokenizer(base64.b64decode(values["model"]))
    if kind == "published":
        from jaxmodels.data.published_tokenizer import PublishedTokenizer

        return PublishedTokenizer.from_values(values)
    if "model" in values:
        return TokenizersTokenizer(text)
    known = "character, byte, word, sentencepiece, published, and files of the `tokenizers` library"
    raise ValueError(f"unknown kind of tokenizer {kind!r}; there are {known}")


def _checked(tokens, vocab_size: int) -> list[int]:
    """Tokens as a list, without padding."""
    tokens = np.asarray(tokens)
    tokens = tokens[tokens != -1]
    wrong = tokens[(tokens < 0) | (tokens >= vocab_size)]
    if wrong.size:
        raise ValueError(f"{wrong[0]} is not a token: the tokenizer has {vocab_size}, from 0 on")
    return tokens.astype(np.int64).tolist()


def _check_special(name: str) -> None:
    if name not in _PUBLISHED:
        raise ValueError(f"there is no special token {name!r}; there are {', '.join(_PUBLISHED)}")


def _own_special(name: str, names: tuple[str, ...]) -> int | None:
    _check_special(name)
    return names.index(f"<{name}>") if names else None


def _is_plain_byte_level(serialized: str) -> bool:
    """Whether a text may be cut before a space that follows a letter, and the pieces encoded one by one."""
    values = json.loads(serialized)
    pre = values.get("pre_tokenizer") or {}
    return values.get("normalizer") is None and pre.get("type") == "ByteLevel" and not pre.get("add_prefix_space") and pre.get("use_regex", True)


def _pieces(text: str) -> Iterator[str]:
    """A text in pieces of some `_PIECE` characters, cut between a letter and a space before a letter: no token of byte-level BPE spans that."""
    start = 0
    while start < len(text):
        cut = re.compile(r"(?<=[A-Za-z])(?= [A-Za-z])").search(text, start + _PIECE)
        end = cut.start() if cut else len(text)
        yield text[start:end]
        start = end
