"""Data sets of rows that stay in their files: found by an index, and encoded when an example is read.

Memory does not depend on the number of rows: an index is mapped from disk, and features are fitted in one pass over the columns that they need.
"""

import dataclasses
import functools
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from jaxmodels.data import fitted
from jaxmodels.data.evaluation_sets import is_named
from jaxmodels.data.features.base import Feature, Problem, Row
from jaxmodels.data.features.label import Label, Number
from jaxmodels.data.features.text import Tokenized
from jaxmodels.data.holdout import Draw, Part, Whole
from jaxmodels.data.index import Opened, Progress
from jaxmodels.data.order import Groups
from jaxmodels.data.rows import Holdout, check, encode, info_of, is_usable, with_labels
from jaxmodels.data.skipping import BadExample, Forgiving
from jaxmodels.data.source import Dataset, Untokenized
from jaxmodels.errors import ConfigError
from jaxmodels.tokenizers.base import Tokenizer
from jaxmodels.tokenizers.factory import LIBRARY_VERSION, from_json, is_trained, make_tokenizer

_SCANNED = 4096  # rows between two updates of progress


class IndexedRows(Protocol):
    """The rows of a split, found by an index. Instances are pickled for worker processes.

    Attributes:
      opened: the index.
      group_ends: int64 [groups], the number of rows up to the end of each group that is decoded as a whole; None without groups.
      groups_that_fit: how many of the largest groups fit in the group cache.
    """

    opened: Opened
    group_ends: np.ndarray | None
    groups_that_fit: int

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Row: ...

    def scan(self, columns: Mapping[str, Any]) -> Iterator[Row]:
        """Yield all rows in order with some columns (key of the section -> column)."""
        ...

    def fingerprint(self, part: Part | Whole) -> int:
        """Return a checksum of a part of the rows."""
        ...


class EncodedRows:
    """Examples that are encoded when they are read. A row that cannot be used raises BadExample."""

    def __init__(self, rows: IndexedRows, part: Part | Whole, features: Sequence[Feature]):
        self.rows, self.part, self.features = rows, part, list(features)

    def __len__(self):
        return len(self.part)

    def fingerprint(self) -> int:
        return self.rows.fingerprint(self.part)

    def groups(self) -> Groups | None:
        """Return the groups of the examples, or None if each is read alone."""
        if self.rows.group_ends is None:
            return None
        return Groups(self.part.before(np.asarray(self.rows.group_ends)), self.rows.groups_that_fit)

    def __getitem__(self, index):
        if not 0 <= index < len(self):
            raise IndexError(index)
        row = self.rows[self.part.row(int(index))]
        try:
            check(row, self.features)
            for feature in self.features:
                feature.check_known(row)
            return encode(row, self.features)
        except Problem as problem:
            raise BadExample(problem.where or row.where, str(problem)) from problem


def open_indexed(splits: Mapping[str, IndexedRows], features: Sequence[Feature], options: Holdout, data_dir: str | None) -> Dataset | Untokenized:
    """Return a data set whose rows are read by index.

    Args:
      splits: rows of each split.
      features: at most one of them tokenized.
      options: holdout and policy. Bad rows are found when they are read: an error then, or a row of weight 0.
      data_dir: where a tokenizer's file may be.

    Raises:
      ConfigError: a split has no rows; keys that do not fit the data or the tokenizer.
    """
    for split, rows in splits.items():
        if not len(rows):
            raise ConfigError(f"config.data: the files of {split} hold no example.")
    train = splits["train"]
    parts: dict[str, tuple[IndexedRows, Part | Whole]] = {split: (rows, Whole(len(rows))) for split, rows in splits.items()}
    if "validation" not in splits and options.holdout:
        draw = Draw(len(train), options.holdout)
        parts |= {"train": (train, Part(draw, False)), "validation": (train, Part(draw, True))}
        if not len(parts["train"][1]):
            raise ConfigError("config.data: no training row is left beside data.holdout; train has one row.")
    for feature in features:
        fitted.fit(feature, functools.partial(_fit, feature, train))
    label = next((feature for feature in features if isinstance(feature, Label | Number)), None)
    scanned = {split: rows.scan(label.columns()) for split, rows in splits.items() if split != "train"} if label else {}
    for split in scanned.keys() - set(with_labels(scanned, features)):
        del parts[split]
    text = next((feature for feature in features if isinstance(feature, Tokenized)), None)
    if text is None:
        return _dataset(parts, features, options)

    def training_texts(spec: str | Tokenizer = text.tokenizer) -> Iterator[str]:
        wanted = {split: part for split, part in parts.items() if split == "train" or (spec == "character" and not is_named(split))}
        return (value for rows, part in wanted.values() for row in _usable(rows, text, part) for value in text.texts(row))

    def tokenize(spec: str | Tokenizer) -> Dataset:
        text.use(_tokenizer(spec, functools.partial(training_texts, spec), splits, [text.columns(), options.holdout], data_dir))
        return _dataset(parts, features, options)

    return Untokenized(text.tokenizer, training_texts, tokenize)


def _dataset(parts: Mapping[str, tuple[IndexedRows, Part | Whole]], features: Sequence[Feature], options: Holdout) -> Dataset:
    blank = {name: value for feature in features for name, value in feature.blank().items()} if options.on_bad_example == "skip" else None
    sources = {split: EncodedRows(rows, part, features) for split, (rows, part) in parts.items()}
    opened = {id(rows): rows for rows, _ in parts.values()}.values()  # held-out rows have the index of train
    return Dataset(
        {split: source if blank is None else Forgiving(source, blank) for split, source in sources.items()},
        info_of(features),
        notes=tuple(note for rows in opened for note in (*rows.opened.notes, *rows.notes())),
        fallbacks=tuple(text for rows in opened for text in rows.opened.fallbacks),
    )


def _fit(feature: Feature, train: IndexedRows) -> None:
    """Fit a feature to the training rows, held-out ones included, or restore what an earlier start derived from them."""

    if not callable(feature.fit) or type(feature).fit is Feature.fit:  # an image's `fit` is a key
        return
    fitted = False

    def fit():
        nonlocal fitted
        feature.fit(_Usable(train, feature))  # type: ignore[arg-type]
        fitted = True
        return feature.state()

    settings = {field.name: repr(getattr(feature, field.name)) for field in dataclasses.fields(feature)}  # type: ignore[arg-type]
    state = train.opened.index.derived([type(feature).__module__, type(feature).__qualname__, settings], fit)
    if state is not None:
        feature.restore(state)
    elif not fitted:  # a feature without a state is fitted at each start
        fit()


class _Usable:
    """The rows of a split that a feature can use; may be iterated over repeatedly."""

    def __init__(self, rows: IndexedRows, feature: Feature):
        self._rows, self._feature = rows, feature

    def __iter__(self):
        return _usable(self._rows, self._feature, Whole(len(self._rows)))


def _usable(rows: IndexedRows, feature: Feature, part: Part | Whole) -> Iterator[Row]:
    """Yield the rows of a part that a feature can use, with its columns only."""
    progress = Progress(f"reading {', '.join(map(repr, feature.columns().values()))} of {rows.what}", len(rows), "rows")
    chosen = np.zeros(0, bool)
    for number, row in enumerate(rows.scan(feature.columns())):
        place = number % _SCANNED
        if place == 0:
            chosen = part.mask(number, min(len(rows), number + _SCANNED))
            progress.add(_SCANNED if number else 0)
        if chosen[place] and is_usable(row, [feature]):
            yield row


def _tokenizer(spec: str | Tokenizer, texts, splits: Mapping[str, IndexedRows], key: list, data_dir: str | None) -> Tokenizer:
    """Return a tokenizer; one that is trained here is trained once."""
    if not is_trained(spec):
        return make_tokenizer(spec, (), data_dir)
    identity = [spec, LIBRARY_VERSION, key, {split: [list(file) for file in rows.opened.index.files] for split, rows in splits.items() if not is_named(split)}]
    return from_json(splits["train"].opened.index.derived(["tokenizer", identity], lambda: make_tokenizer(spec, texts(), data_dir).to_json()))


class IndexedBase:
    """What readers with an index share: `opened`, notes, and the checksum of a part, from one of the whole.

    Attributes:
      opened: the index. Its header has `crc32`.
      what: the files in words, for messages.
    """

    group_ends: np.ndarray | None = None
    groups_that_fit = 0

    def __init__(self, opened: Opened, what: str):
        self.opened, self.what = opened, what

    def notes(self) -> tuple[str, ...]:
        """Return messages about the rows, for the start of a run."""
        return ()

    def fingerprint(self, part: Part | Whole) -> int:
        share = "" if isinstance(part, Whole) else f"{len(part)} {part.held}"
        return zlib.crc32(f"{self.opened.index.header['crc32']} {len(self)} {share}".encode())  # type: ignore[arg-type]
