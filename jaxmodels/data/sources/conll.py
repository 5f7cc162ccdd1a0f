"""Files with one word and its tag a line, and a blank line between sentences (CoNLL)."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np

from jaxmodels import config as config_lib
from jaxmodels.data.features import hold_out, padded
from jaxmodels.data.files import split_files
from jaxmodels.data.skipping import Policy, Skipping
from jaxmodels.data.source import Arrays, Dataset
from jaxmodels.data.sources.rows import lines
from jaxmodels.errors import ConfigError
from jaxmodels.tokenizers.base import Tokenizer, frame
from jaxmodels.tokenizers.factory import make_tokenizer

_DOCUMENT = "-DOCSTART-"  # stands alone between documents


@dataclasses.dataclass
class _Sentence:
    """Words and their tags, where each lies, and the first thing wrong with it: (file and line, problem)."""

    words: list[str] = dataclasses.field(default_factory=list)
    tags: list[str] = dataclasses.field(default_factory=list)
    places: list[str] = dataclasses.field(default_factory=list)
    problem: tuple[str, str] | None = None


def conll(
    path: str,
    data_dir: str | None,
    *,
    sequence_length: int,
    tokenizer: str,
    token_column: int = 0,
    tag_column: int = -1,
    scheme: Literal["bio", "none"] = "bio",
    truncate: bool = True,
    train: str | None = None,
    validation: str | None = None,
    test: str | None = None,
    holdout: float = 0.1,
    on_bad_example: Policy = "error",
) -> Dataset:
    """Sentences with a tag for each word: columns between tabs, or else between spaces; UTF-8.

    Examples: `tokens` int32 [T], `tags` int32 [T]: a word's tag at its first piece (that is not white space), -1 elsewhere;
    padded with -1. Words are tokenised as in a running text, with a space before all but the first. A published tokenizer puts its own
    special tokens around a sentence, which have no tag.

    Args:
      path, data_dir, train, validation, test, holdout: as of `rows.tsv`; files end in `.conll`, `.bio`, `.iob2` or `.txt`.
      sequence_length: tokens of an example, T.
      tokenizer: see `tokenizers.make_tokenizer`; one that has to be made is made from the training sentences.
      token_column, tag_column: numbers from 0, or from the end: -1 is the last.
      scheme: `bio`: an `I-X` goes on with a `B-X` or `I-X` before it, anything else is a bad example; `none`: tags are names.
      truncate: longer sentences are cut, counted and told of; otherwise they are bad examples.
      on_bad_example: `error`, or `skip`: the sentence is left out, counted, and told of.

    Raises:
      ConfigError: no such file; with `error` also a bad line, by file and line.
    """
    if sequence_length < 1 or not 0 <= holdout < 1:
        raise ConfigError(f"config.data: sequence_length must be at least 1 and holdout in [0, 1), got {sequence_length} and {holdout}.")
    files = split_files(path, data_dir, {"train": train, "validation": validation, "test": test}, (".conll", ".bio", ".iob2", ".txt"))
    skipping = Skipping(on_bad_example)
    parts = {split: [s for file in paths for s in _read(file, (token_column, tag_column), scheme)] for split, paths in files.items()}
    known = sorted({tag for sentence in parts["train"] if sentence.problem is None for tag in sentence.tags})
    if "validation" not in parts and holdout:
        parts["train"], parts["validation"] = hold_out(parts["train"], holdout)
    good = {split: [s for s in sentences if _usable(s, split, known, skipping)] for split, sentences in parts.items()}
    skipping.check_rest("train", len(good["train"]))
    everything = tokenizer == "character"  # which has no token for other characters
    fed = [s for split in good for s in good[split]] if everything else good["train"]
    coder = make_tokenizer(tokenizer, (" ".join(sentence.words) for sentence in fed), data_dir)
    encoder = _Encoder(coder, known, sequence_length, truncate)
    splits, notes = {}, []
    for split, sentences in good.items():
        rows = []
        for sentence in sentences:
            row = encoder.encode(sentence)
            if isinstance(row, str):
                skipping.bad(split, sentence.places[0], row)
            else:
                rows.append(row)
        skipping.check_rest(split, len(rows))
        tokens, tags = zip(*rows, strict=True)
        splits[split] = Arrays({"tokens": np.stack(tokens), "tags": np.stack(tags)})
        if encoder.cut:
            notes.append(f"{encoder.cut:,} of {len(rows):,} sentences of {split} are longer than data.sequence_length={sequence_length} and are cut")
            encoder.cut = 0
    info = {"vocab_size": coder.vocab_size, "tokenizer": coder, "tags": known, "num_tags": len(known)}
    return Dataset(splits, info, notes=(*skipping.notes(), *notes), skipped=skipping.counts)


def _read(path: str, columns: tuple[int, int], scheme: str) -> Iterator[_Sentence]:
    """The sentences of a file. A bad line makes its whole sentence bad."""
    sentence = _Sentence()
    for number, line in enumerate(lines(path), 1):
        if line.strip() and not line.startswith(_DOCUMENT):
            _add(sentence, line, f"{path}, line {number}", columns, scheme)
        elif sentence.places:
            yield sentence
            sentence = _Sentence()
    if sentence.places:
        yield sentence


def _add(sentence: _Sentence, line: str, where: str, columns: tuple[int, int], scheme: str) -> None:
    fields = line.split("\t") if "\t" in line else line.split()
    sentence.places.append(where)
    if sentence.problem is not None:
        return
    need = max(c + 1 if c >= 0 else -c for c in columns)
    if len(fields) < max(need, 2):
        sentence.problem = where, f"{len(fields)} of the {max(need, 2)} columns that a word and its tag need."
        return
    word, tag = (fields[column].strip() for column in columns)
    before = sentence.tags[-1] if sentence.tags else "O"
    if not word or not tag:
        sentence.problem = where, f"the {'tag' if word else 'word'} is empty."
    elif not (word + tag).isprintable() and not _is_utf8(word + tag):
        sentence.problem = where, "not UTF-8."
    elif scheme == "bio" and (problem := _bio_problem(before, tag)):
        sentence.problem = where, problem
    else:
        sentence.words.append(word)
        sentence.tags.append(tag)


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _bio_problem(before: str, tag: str) -> str | None:
    if tag == "O":
        return None
    if tag[:2] not in ("B-", "I-") or len(tag) == 2:
        return f"the tag {tag!r} is none of O, B-NAME and I-NAME (data.scheme='none' takes tags as they are)."
    if tag[0] == "I" and before[2:] != tag[2:]:
        return f"the tag {tag!r} follows {before!r}: an entity begins with 'B-{tag[2:]}' (data.scheme='none' takes tags as they are)."
    return None


def _usable(sentence: _Sentence, split: str, known: Sequence[str], skipping: Skipping) -> bool:
    problem = sentence.problem
    for tag, where in zip(sentence.tags, sentence.places, strict=False) if problem is None else ():
        if tag not in known:
            problem = where, f"the tag {tag!r} is not in train, which has {', '.join(known)}.{config_lib.suggest(tag, known)}"
            break
    if problem is not None:
        skipping.bad(split, *problem)
    return problem is None


class _Encoder:
    """Sentences to (tokens, tags). `cut` counts those that were too long."""

    def __init__(self, tokenizer: Tokenizer, tags: Sequence[str], length: int, truncate: bool):
        self.tokenizer, self.length, self.truncate, self.cut = tokenizer, length, truncate, 0
        self.numbers = {tag: i for i, tag in enumerate(tags)}
        self.before, self.after = (part.tolist() for part in frame(tokenizer))
        self.room = length - len(self.before) - len(self.after)
        if self.room < 1:
            raise ConfigError(f"config.data.sequence_length={length} leaves no room for a word between the tokenizer's special tokens.")
        self._pieces: dict[str, tuple[np.ndarray, int]] = {}

    def encode(self, sentence: _Sentence) -> tuple[np.ndarray, np.ndarray] | str:
        """int32 [T] twice, or what is wrong."""
        tokens, tags = [], []
        for word, tag in zip(sentence.words, sentence.tags, strict=True):
            try:
                pieces, first = self._word(f" {word}" if tokens else word)
            except ValueError as error:
                return f"{error}."
            if len(pieces) == 0:
                return f"the tokenizer makes no token of the word {word!r}."
            tags += [-1] * first + [self.numbers[tag]] + [-1] * (len(pieces) - first - 1)
            tokens += pieces.tolist()
        if len(tokens) > self.room:
            if not self.truncate:
                return f"{len(tokens)} tokens, where {self.room} fit; raise data.sequence_length, or cut with data.truncate=true."
            self.cut += 1
        tokens, tags = self.before + tokens[: self.room] + self.after, [-1] * len(self.before) + tags[: self.room]
        return padded(np.array(tokens, np.int32), self.length), padded(np.array(tags, np.int32), self.length)

    def _word(self, text: str) -> tuple[np.ndarray, int]:
        """A word's pieces, and which of them is the first that is not white space."""
        if text not in self._pieces:
            pieces = self.tokenizer.encode(text)
            unknown = self.tokenizer.special("unknown")
            if len(pieces) == 0 and unknown is not None:
                pieces = np.array([unknown], np.int32)
            blank = text[0] == " " and len(pieces) > 1 and not self.tokenizer.decode(pieces[:1]).strip()
            self._pieces[text] = pieces, int(blank)
        return self._pieces[text]
