"""Texts as token ids: one text, a source and a target, or words with tags.

Shapes: T `sequence_length`, U `target_length`. Arrays are padded with -1.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np

from jaxmodels import config as config_lib
from jaxmodels.data.features.base import Column, Feature, Names, Problem, Row, counts, padded
from jaxmodels.data.text_lines import is_utf8, not_utf8
from jaxmodels.errors import ConfigError
from jaxmodels.tokenizers.base import Tokenizer, cut_longest, encode_all, frame

TEXTS = ("tokens", "source", "target")
_BINS = 8
_WORDS = 100_000  # whose tokens are remembered
_SHOWN = 300  # characters of a text


@dataclasses.dataclass(kw_only=True)
class Tokenized(Feature):
    """Base class of features that are tokenized.

    Attributes:
      sequence_length: tokens of an example, T; shorter texts are padded with -1.
      tokenizer: specification of a tokenizer (see `tokenizers.factory.make_tokenizer`), trained on the training texts where it is trained.
      truncate: whether longer texts are cut, which the run reports; otherwise they are bad examples.
    """

    sequence_length: int
    tokenizer: str
    truncate: bool = True

    def __post_init__(self):
        if self.sequence_length is None or self.tokenizer is None:
            raise ConfigError(
                "config.data: set sequence_length and tokenizer for texts, image_column and size for images, or audio_column, samples and sample_rate for audio."
            )
        if self.sequence_length < 1:
            raise ConfigError(f"config.data.sequence_length must be at least 1, got {self.sequence_length}.")
        self.coder: Tokenizer | None = None
        self._ready: dict[str, np.ndarray] = {}  # tokens of texts that were encoded at once
        self._cut = 0

    def texts(self, row: Row) -> list[str]:
        """Return the texts of a row that a tokenizer is trained on."""
        raise NotImplementedError

    def encoded(self, row: Row) -> list[str]:
        """Return the texts of a row that `encode` tokenizes."""
        return self.texts(row)

    def prepare(self, rows):
        texts = list(dict.fromkeys(text for row in rows for text in self.encoded(row)))
        try:
            self._ready = dict(zip(texts, encode_all(self.coder, texts), strict=True))
        except (ValueError, ConfigError):  # one by one, which finds the row
            self._ready = {}

    def use(self, tokenizer: Tokenizer) -> None:
        """Set the tokenizer that `encode` uses."""
        self.coder = tokenizer
        self._before, self._after = frame(tokenizer)
        self.max_tokens = self.sequence_length - len(self._before) - len(self._after)
        if self.max_tokens < 1:
            raise ConfigError(
                f"config.data.sequence_length={self.sequence_length} leaves no space for a text between the "
                f"{len(self._before) + len(self._after)} special tokens that the tokenizer adds."
            )

    def info(self):
        return {"vocab_size": self.coder.vocab_size, "tokenizer": self.coder}

    def note(self, split, examples):
        cut, self._cut = self._cut, 0
        return f"{cut:,} of {examples:,} examples of {split} are longer than data.sequence_length and are cut" if cut else None

    def tokens(self, text: str) -> np.ndarray:
        """Return the token ids of a text, int32 [tokens], at least one."""
        try:
            tokens = self._ready[text] if text in self._ready else self.coder.encode(text)
        except ValueError as error:
            raise Problem(f"{error}.") from error
        if len(tokens) == 0:
            raise Problem("the tokenizer returns no token for the text.")
        return tokens

    def check_lengths(self, *lengths: tuple[int, int]) -> None:
        """Count the example as cut, or raise Problem, if any length (tokens, limit) exceeds its limit."""
        if all(size <= limit for size, limit in lengths):
            return
        if not self.truncate:
            shown = " and ".join(f"{size} tokens, where {limit} fit" for size, limit in lengths)
            raise Problem(f"{shown}; raise data.sequence_length, or cut with data.truncate=true.")
        self._cut += 1

    def framed(self, tokens: np.ndarray) -> np.ndarray:
        """Return tokens between the tokenizer's special tokens, int32 [T], cut and padded."""
        return padded(np.concatenate([self._before, tokens[: self.max_tokens], self._after]), self.sequence_length)

    def blank_tokens(self) -> np.ndarray:
        """Return the tokens of a row that is left out, int32 [T]: one token, because attention over padding alone is not finite."""
        return padded(np.zeros(1, np.int32), self.sequence_length)

    @staticmethod
    def show(name, example, info):
        tokenizer = info.get("tokenizer")
        if name in ("segments", "types"):
            return None
        if name == "counts":
            return _learned(tokenizer, np.asarray(example["tokens"]), np.asarray(example[name])) if tokenizer is not None else None
        if tokenizer is None:
            return Feature.show(name, example, info)
        return _decoded(tokenizer, np.asarray(example[name]), example.get("segments") if name == "tokens" else None)

    @staticmethod
    def describe(columns: Mapping[str, np.ndarray], info: Mapping) -> dict[str, Any]:
        texts = {name: columns[name] for name in TEXTS if name in columns}
        result = {"lengths": {name: _lengths(column) for name, column in texts.items()}} if texts else {}
        unknown = info["tokenizer"].special("unknown") if "tokenizer" in info else None
        if texts and unknown is not None:
            result["unknown"] = sum(int((c == unknown).sum()) for c in texts.values()) / max(1, sum(int((c >= 0).sum()) for c in texts.values()))
        if "segments" in columns and "tokens" in columns:
            result["segments"] = float(np.mean([len(np.unique(s[t >= 0])) for s, t in zip(columns["segments"], columns["tokens"], strict=True)]))
        return result


@dataclasses.dataclass(kw_only=True)
class Text(Tokenized):
    """One text, or two as one: `tokens` int32 [T], and of two also their `types` int32 [T]. A pretrained model's tokenizer adds its own special tokens.

    Attributes:
      text_column: the text's name, or its number from 0.
      pair_column: a second text, for tasks on two sentences. Between the two are the special tokens of a pretrained model's tokenizer, or `<end>`.
    """

    arrays: ClassVar = ("tokens", "segments", "counts", "types")
    text_column: Column
    pair_column: Column | None = None

    def columns(self):
        return {"text_column": self.text_column} | ({} if self.pair_column is None else {"pair_column": self.pair_column})

    def check(self, row):
        for column in self.columns().values():
            check_text(row.values[column], column)

    def texts(self, row):
        return [row.values[column] for column in self.columns().values()]

    def use(self, tokenizer):
        super().use(tokenizer)
        if self.pair_column is None:
            return
        self._special = len(tokenizer.wrap("", "")[0]) if hasattr(tokenizer, "wrap") else 1
        if not hasattr(tokenizer, "wrap"):
            _, self._between = start_and_end(tokenizer, self.tokenizer)

    def info(self):
        return super().info() | ({"pairs": True} if self.pair_column is not None else {})

    def _two(self, row: Row) -> dict[str, np.ndarray]:
        """Return two texts as one; if they are too long, the longer one is cut first."""
        parts = [self.tokens(text) for text in self.texts(row)]
        self.check_lengths((len(parts[0]) + len(parts[1]), self.sequence_length - self._special))
        if hasattr(self.coder, "wrap"):
            try:
                tokens, types = self.coder.join(parts, length=self.sequence_length)
            except ValueError as error:
                raise Problem(f"{error}.") from error
        else:
            one, two = cut_longest(parts, self.sequence_length - 1)
            tokens, types = np.concatenate([one, [self._between], two]), np.repeat([0, 1], [len(one) + 1, len(two)])
        return {"tokens": padded(tokens, self.sequence_length), "types": np.maximum(padded(types, self.sequence_length), 0)}

    def encode(self, row):
        if self.pair_column is not None:
            return self._two(row)
        tokens = self.tokens(row.values[self.text_column])
        self.check_lengths((len(tokens), self.max_tokens))
        return {"tokens": self.framed(tokens)}

    def blank(self):
        return {"tokens": self.blank_tokens()} | ({} if self.pair_column is None else {"types": np.zeros(self.sequence_length, np.int32)})


@dataclasses.dataclass(kw_only=True)
class Pair(Tokenized):
    """Two texts, for sequence to sequence: `source` int32 [T], and `target` int32 [U + 1]: `<start>`, the text, `<end>`.

    Attributes:
      source_column: the first text; set with target_column.
      target_column: the second text.
      target_length: tokens of a target with its `<start>` or its `<end>`, U; `sequence_length` by default.
    """

    arrays: ClassVar = ("source", "target")
    source_column: Column | None = None
    target_column: Column | None = None
    target_length: int | None = None

    def __post_init__(self):
        super().__post_init__()
        if (self.source_column is None) != (self.target_column is None):
            raise ConfigError("config.data: source_column and target_column go together: two texts, for sequence to sequence.")
        if self.target_length is not None and self.target_length < 1:
            raise ConfigError(f"config.data.target_length must be at least 1, got {self.target_length}.")

    def columns(self):
        return {"source_column": self.source_column, "target_column": self.target_column}

    def check(self, row):
        for column in self.columns().values():
            check_text(row.values[column], column)

    def texts(self, row):
        return [row.values[column] for column in self.columns().values()]

    def use(self, tokenizer):
        super().use(tokenizer)
        self._start, self._end = start_and_end(tokenizer, self.tokenizer)
        self._length = self.target_length or self.sequence_length

    def info(self):
        return super().info() | {"target_length": self._length}

    def encode(self, row):
        source, target = (self.tokens(text) for text in self.texts(row))
        self.check_lengths((len(source), self.max_tokens), (len(target), self._length - 1))
        return {"source": self.framed(source), "target": padded(np.concatenate([[self._start], target[: self._length - 1], [self._end]]), self._length + 1)}

    def blank(self):
        return {"source": self.blank_tokens(), "target": padded(np.array([self._start, self._end], np.int32), self._length + 1)}


@dataclasses.dataclass(kw_only=True)
class Tags(Names, Tokenized):
    """Words with a tag each: `tokens` int32 [T] and `tags` int32 [T], a word's tag at its first token that is not white space, -1 elsewhere.

    Words are tokenized as in running text, with a space before all but the first. Special tokens that the tokenizer adds have no tag.

    Attributes:
      words_column: list of words; set with tags_column.
      tags_column: list of tags, as many as words.
      scheme: how tags mark entities. `bio`: O, B-NAME and I-NAME, and an I-NAME must follow a B-NAME or I-NAME. Two others are converted to it:
        `iob1`, where B-NAME only begins an entity right after one of the same name, and `bioes`, with S-NAME for a single word and E-NAME for
        the last one (also written U and L). `none`: tags are any names.
    """

    arrays: ClassVar = ("tags",)
    listed: ClassVar = "tags"
    words_column: Column | None = None
    tags_column: Column | None = None
    scheme: Literal["bio", "iob1", "bioes", "none"] = "bio"

    def __post_init__(self):
        super().__post_init__()
        if self.words_column is None or self.tags_column is None:
            raise ConfigError("config.data: words_column and tags_column go together: words with a tag each.")
        self._numbers: dict[str, int] = {}
        self._pieces: dict[str, tuple[np.ndarray, int]] = {}

    def columns(self):
        return {"words_column": self.words_column, "tags_column": self.tags_column}

    def check(self, row):
        words, tags = row.values[self.words_column], row.values[self.tags_column]
        for name, values in (("words", words), ("tags", tags)):
            if isinstance(values, str) or not isinstance(values, Sequence) or not all(isinstance(value, str) for value in values):
                raise Problem(f"the {name} are {values!r}, not a list of texts.")
        if len(words) != len(tags) or not words:
            raise Problem(f"there are {len(words)} words and {len(tags)} tags.")
        before = "O"
        for i, (word, tag) in enumerate(zip(words, to_bio(tags, self.scheme), strict=True)):
            if not word.strip() or not tag.strip():
                raise Problem(f"the {'tag' if word.strip() else 'word'} is empty.", _part(row, i))
            if not is_utf8(word + tag):
                raise Problem(not_utf8(word + tag), _part(row, i))
            if self.scheme != "none" and (problem := _bio_problem(before, tag)):
                raise Problem(problem, _part(row, i))
            before = tag

    def texts(self, row):
        return [" ".join(row.values[self.words_column])]

    def encoded(self, row):
        words = row.values[self.words_column]
        return [text for text in (words[0], *(f" {word}" for word in words[1:])) if text not in self._pieces]

    def fit(self, rows):
        self._numbers = {tag: i for i, tag in enumerate(sorted({tag for row in rows for tag in self._tags(row)}))}

    def _tags(self, row: Row) -> list[str]:
        return to_bio(row.values[self.tags_column], self.scheme)

    def check_known(self, row):
        """Raise Problem for a tag that no training row has."""
        for i, tag in enumerate(self._tags(row)):
            if tag not in self._numbers:
                raise Problem(f"the tag {tag!r} is not in train, which has {', '.join(self._numbers)}.{config_lib.suggest(tag, self._numbers)}", _part(row, i))

    def use(self, tokenizer):
        super().use(tokenizer)
        self._pieces = {}

    def info(self):
        return super().info() | {"tags": list(self._numbers), "num_tags": len(self._numbers)}

    def encode(self, row):
        parts, tags = [], []
        for word, tag in zip(row.values[self.words_column], self._tags(row), strict=True):
            pieces, first = self._word(f" {word}" if parts else word)
            parts.append(pieces)
            tags += [-1] * first + [self._numbers[tag]] + [-1] * (len(pieces) - first - 1)
        tokens = np.concatenate(parts)
        self.check_lengths((len(tokens), self.max_tokens))
        tags = np.array([-1] * len(self._before) + tags[: self.max_tokens], np.int32)
        return {"tokens": self.framed(tokens), "tags": padded(tags, self.sequence_length)}

    def blank(self):
        return {"tokens": self.blank_tokens(), "tags": padded(np.zeros(0, np.int32), self.sequence_length)}

    def _word(self, text: str) -> tuple[np.ndarray, int]:
        """Return a word's tokens, and the index of the first that is not white space."""
        found = self._pieces.get(text)
        if found is None:
            try:
                pieces = self._ready[text] if text in self._ready else self.coder.encode(text)
            except ValueError as error:
                raise Problem(f"{error}.") from error
            unknown = self.coder.special("unknown")
            if len(pieces) == 0 and unknown is not None:
                pieces = np.array([unknown], np.int32)
            if len(pieces) == 0:
                raise Problem(f"the tokenizer returns no token for the word {text!r}.")
            blank = text[0] == " " and len(pieces) > 1 and not self.coder.decode(pieces[:1]).strip()
            found = pieces, int(blank)
            if len(self._pieces) >= _WORDS:
                self._pieces = {}
            self._pieces[text] = found
        return found

    @staticmethod
    def show(name, example, info):
        """Return `word/TAG word/TAG`: a word is the tokens from its tag up to the next."""
        tokenizer, tokens, tags = info.get("tokenizer"), np.asarray(example["tokens"]), np.asarray(example["tags"])
        if "tags" not in info or tokenizer is None:
            return None
        starts = np.flatnonzero(tags >= 0)
        ends = [*starts[1:], int((tokens >= 0).sum())]
        return _shortened(" ".join(f"{tokenizer.decode(tokens[a:b]).strip()}/{info['tags'][tags[a]]}" for a, b in zip(starts, ends, strict=True)))

    @staticmethod
    def describe(columns, info):
        return {"tags": counts(columns["tags"][columns["tags"] >= 0], info.get("tags"))}


def start_and_end(tokenizer: Tokenizer, spec: Any) -> tuple[int, int]:
    """Return the ids of `start` and `end`, which targets need; ConfigError where the tokenizer has none."""
    start, end = tokenizer.special("start"), tokenizer.special("end")
    if start is None or end is None:
        raise ConfigError(
            f"config.data.tokenizer={spec!r} has no token for the start and the end of a target; use byte+special, character+special, "
            "word:MAX, bpe:SIZE or a pretrained model's tokenizer that has them."
        )
    return start, end


def check_text(value: Any, column: Column) -> None:
    """Raise Problem unless a value is a text in UTF-8 that is not blank."""
    if not isinstance(value, str):
        raise Problem(f"{column!r} is {value!r}, not a text.")
    if not value.strip():
        raise Problem(f"the text of column {column!r} is empty.")
    if not is_utf8(value):
        raise Problem(f"the text of column {column!r} is not UTF-8: {not_utf8(value)}")


def _part(row: Row, index: int) -> str | None:
    return row.parts[index] if row.parts else None


def to_bio(tags: Sequence[str], scheme: str) -> list[str]:
    """Return the tags of a sentence as B-NAME, I-NAME and O; those of no known form stay, and are refused."""
    if scheme == "bioes":
        letters = {"S": "B", "U": "B", "E": "I", "L": "I"}
        return [letters.get(tag[:1], tag[:1]) + tag[1:] if tag[1:2] == "-" else tag for tag in tags]
    if scheme == "iob1":
        before = ["O", *tags[:-1]]
        return [f"B-{tag[2:]}" if tag[:2] == "I-" and last[2:] != tag[2:] else tag for last, tag in zip(before, tags, strict=True)]
    return list(tags)


def _bio_problem(before: str, tag: str) -> str | None:
    if tag == "O":
        return None
    if tag[:2] not in ("B-", "I-") or len(tag) == 2:
        other = " Tags with S- and E- are data.scheme='bioes'." if tag[:2] in ("S-", "E-", "U-", "L-") else ""
        return f"the tag {tag!r} is none of O, B-NAME and I-NAME (data.scheme='none' takes tags as they are).{other}"
    if tag[0] == "I" and before[2:] != tag[2:]:
        return f"the tag {tag!r} follows {before!r}: an entity begins with 'B-{tag[2:]}' (data.scheme='iob1' if it need not, 'none' takes tags as they are)."
    return None


def _decoded(tokenizer, tokens: np.ndarray, segments: np.ndarray | None) -> str:
    """Return a text; the segments of a packed row are separated by a bar."""
    if segments is None:
        return _shortened(tokenizer.decode(tokens[tokens >= 0]))
    parts = [tokenizer.decode(tokens[(segments == s) & (tokens >= 0)]) for s in np.unique(segments[tokens >= 0])]
    return _shortened(" | ".join(parts))


def _learned(tokenizer, tokens: np.ndarray, learned: np.ndarray) -> str:
    """Return the parts of a row that count in the loss."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], learned, [0]]))).reshape(-1, 2)
    return _shortened(" | ".join(tokenizer.decode(tokens[start:stop]) for start, stop in edges))


def _shortened(text: str) -> str:
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"


def _lengths(column: np.ndarray) -> dict[str, Any]:
    """Return statistics of lengths of texts padded with -1, the number that fill a row, and a histogram [[from, to, count], …]."""
    lengths = (column >= 0).sum(1)
    edges = np.unique(np.linspace(lengths.min(), lengths.max() + 1, _BINS + 1).astype(int))
    found, _ = np.histogram(lengths, edges)
    return {
        "least": int(lengths.min()),
        "mean": float(lengths.mean()),
        "median": float(np.median(lengths)),
        "p95": float(np.percentile(lengths, 95)),
        "most": int(lengths.max()),
        "room": column.shape[1],
        "full": int((lengths == column.shape[1]).sum()),
        "histogram": [[int(a), int(b) - 1, int(n)] for a, b, n in zip(edges[:-1], edges[1:], found, strict=True)],
    }
