"""Data sets of rows: what readers yield, divided into splits, checked, and encoded by features."""

import dataclasses
import functools
import itertools
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from jaxmodels.data import fitted
from jaxmodels.data.encoded import cached_rows, can_be_stored
from jaxmodels.data.evaluation_sets import is_named
from jaxmodels.data.features.base import Feature, Problem, Row
from jaxmodels.data.features.label import Label, Number
from jaxmodels.data.features.text import Tokenized
from jaxmodels.data.guesses import guess
from jaxmodels.data.holdout import Draw, hold_out
from jaxmodels.data.index import Progress
from jaxmodels.data.keys import Keys
from jaxmodels.data.shared import inputs_of, shared
from jaxmodels.data.skipping import BadExample, Forgiving, Policy, Skipping
from jaxmodels.data.source import Arrays, Dataset, Untokenized, fingerprint
from jaxmodels.data.spool import Spool
from jaxmodels.errors import ConfigError
from jaxmodels.tokenizers.base import Tokenizer
from jaxmodels.tokenizers.factory import is_trained, make_tokenizer

Part = list[Row] | Spool
Splits = Mapping[str, Part]
Write = Callable[[str, Mapping[str, np.ndarray]], None]  # of a split and the arrays of some of its examples
_TOGETHER = 1024  # rows encoded at once


class Rows(Protocol):
    """The rows of a split, by index. A list of rows is one.

    Optional: `cheap(columns)`, the rows with only some columns, where others are costly to read; `fingerprint(indices, arrays)`, a
    checksum of some rows, given the arrays that are encoded already.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Row: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Holdout(Keys):
    """Keys of sources of rows.

    Attributes:
      holdout: fraction of the training rows, chosen by a fixed draw, that validates where no validation split is found; 0 for none.
      on_bad_example: `error`, or `skip`: leave bad rows out and count them as `skipped_examples`.
    """

    holdout: float = 0.1
    on_bad_example: Policy = "error"

    def __post_init__(self):
        if not 0 <= self.holdout < 1:
            raise ConfigError(f"config.data.holdout must be at least 0 and below 1, got {self.holdout}.")


def open_rows(
    read: Callable[[], Mapping[str, Iterable[Row]]],
    features: Sequence[Feature],
    options: Holdout,
    data_dir: str | None,
    *,
    identity: Callable[[], Any] | None = None,
    what: str = "the data",
) -> Dataset | Untokenized:
    """Return the data set of some features of rows.

    Args:
      read: returns the rows of each split; called anew whenever they are needed.
      features: at most one of them tokenized.
      options: holdout and policy.
      data_dir: where a tokenizer's file may be.
      identity: returns JSON values that tell these rows from all others, such as checksums of their files; then texts are encoded once, into the cache
        on disk. None if that is not worth it.
      what: the rows in words, for messages.

    Raises:
      ConfigError: bad rows, unless they are skipped; keys that do not fit the data or the tokenizer. Of tokenized data, when it is tokenized.
    """
    if any(feature.on_read for feature in features):
        if any(isinstance(feature, Tokenized) for feature in features):
            raise ConfigError("config.data.sequence_length: this source reads no texts beside images or audio; parquet, webdataset, array_record and jsonl do.")
        return open_on_read(read(), features, options)
    text = next((feature for feature in features if isinstance(feature, Tokenized)), None)
    if text is None:
        return _in_memory(read(), features, options)

    def training_texts() -> Iterator[str]:
        return _texts(_checked(read(), features, options, Skipping(options.on_bad_example), list), text, text.tokenizer)

    def tokenize(spec: str | Tokenizer) -> Dataset:
        def use(rows: Splits) -> None:
            text.use(make_tokenizer(spec, _texts(rows, text, spec), data_dir))

        if identity is None or not can_be_stored(features):
            return _in_memory(read(), features, options, use)
        spec = spec if is_trained(spec) else make_tokenizer(spec, (), data_dir)
        into = lambda write, progress: _encode_into(write, read(), features, options, use, Spool, progress)  # noqa: E731
        dataset = cached_rows(into, features, text, spec, [identity(), dataclasses.astuple(options)], what)
        return dataset if isinstance(dataset, Dataset) else dataclasses.replace(_in_memory(read(), features, options, use), fallbacks=(dataset,))

    return Untokenized(text.tokenizer, training_texts, tokenize)


def _texts(rows: Splits, text: Tokenized, spec: str | Tokenizer) -> Iterator[str]:
    """Yield what a tokenizer is trained on: `character`, which has no token for unknown characters, needs the texts of the main splits."""
    wanted = (part for split, part in rows.items() if split == "train" or (spec == "character" and not is_named(split)))
    return (value for part in wanted for row in part for value in text.texts(row))


def _checked(
    splits: Mapping[str, Iterable[Row]], features: Sequence[Feature], options: Holdout, skipping: Skipping, keep: Callable[[Iterable[Row]], Part]
) -> dict[str, Part]:
    """Return the usable rows of each split, with the features fitted to the training rows, held-out ones included.

    `keep` holds the rows: `list`, or `Spool`.
    """
    rows = {split: keep(part) for split, part in splits.items()}
    held_out = "validation" not in rows and options.holdout > 0
    if held_out:
        held = Draw(len(rows["train"]), options.holdout).mask(0, len(rows["train"]))
        rows["train"], rows["validation"] = (keep(itertools.compress(rows["train"], mask)) for mask in (~held, held))
    good = {"train": _passing("train", rows["train"], functools.partial(check, features=features), skipping)}
    if held_out:
        good["validation"] = _passing("validation", rows["validation"], functools.partial(check, features=features), skipping)
    skipping.check_rest("train", len(good["train"]))
    for feature in features:
        fitted.fit(feature, functools.partial(feature.fit, good["train"] + (good["validation"] if held_out else [])))
    for split in with_labels({split: part for split, part in rows.items() if split not in good}, features):
        good[split] = _passing(split, rows[split], functools.partial(check, features=features), skipping)
    for feature in features:
        if type(feature).check_known is not Feature.check_known:
            good = {split: _passing(split, part, feature.check_known, skipping) for split, part in good.items()}
    return good


def with_labels(splits: Mapping[str, Iterable[Row]], features: Sequence[Feature]) -> list[str]:
    """Return the splits that have labels, or that need none. Of the others, tests whose labels nobody gives away, a guess is recorded."""
    label = next((feature for feature in features if isinstance(feature, Label | Number)), None)
    if label is None:
        return list(splits)
    unlabelled = [split for split, rows in splits.items() if _has_no_label(rows, label)]
    for split in unlabelled:
        guess(f"{split} is left out: no row of it has a label in {label.label_column!r}")
    return [split for split in splits if split not in unlabelled]


def _has_no_label(rows: Iterable[Row], label: Label | Number) -> bool:
    missing = False
    for row in rows:
        missing = label.is_missing(row)
        if not missing:
            break
    return missing


def _passing(split: str, rows: Part, check: Callable[[Row], None], skipping: Skipping) -> Part:
    """Return the rows that `check` raises no Problem for."""
    passed = np.ones(len(rows), bool)
    for i, row in enumerate(rows):
        try:
            check(row)
        except Problem as problem:
            passed[i] = False
            skipping.bad(split, problem.where or row.where, str(problem))
    return rows if passed.all() else type(rows)(itertools.compress(rows, passed))


def check(row: Row, features: Sequence[Feature]) -> None:
    """Raise Problem for a row that is malformed or has raw values of the wrong kind."""
    if row.problem is not None:
        raise Problem(row.problem)
    for feature in features:
        feature.check(row)


def _encode_into(
    write: Write,
    splits: Mapping[str, Iterable[Row]],
    features: Sequence[Feature],
    options: Holdout,
    before: Callable[[Splits], None],
    keep: Callable[[Iterable[Row]], Part],
    progress: Progress | None = None,
) -> tuple[tuple[str, ...], dict[str, int]]:
    """Pass the arrays of some usable rows at a time to `write`, and return notes and the number of skipped rows by split.

    `before` is called with the usable rows before any is encoded; `keep` is that of `_checked`.
    """
    skipping = Skipping(options.on_bad_example)
    rows = _checked(splits, features, options, skipping, keep)
    before(rows)
    if progress is not None:
        progress.expect(sum(map(len, rows.values())))
    notes: list[str] = []
    inputs: dict[str, list[int]] = {split: [] for split in rows}
    for split, part in rows.items():
        count, rest = 0, iter(part)
        while few := list(itertools.islice(rest, _TOGETHER)):
            for feature in features:
                feature.prepare(few)
            examples = encode_all(split, few, functools.partial(encode, features=features), skipping)
            count += len(examples)
            if examples:
                arrays = {name: np.stack([example[name] for example in examples]) for name in examples[0]}
                inputs[split] += inputs_of(arrays) if len(rows) > 1 else []
                write(split, arrays)
            if progress is not None:
                progress.add(len(few))
        skipping.check_rest(split, count)
        notes += filter(None, (feature.note(split, count) for feature in features))
    for feature in features:
        feature.prepare([])
    for text in shared(inputs):
        guess(text)
    return (*skipping.notes(), *notes), skipping.counts


def _in_memory(splits, features: Sequence[Feature], options: Holdout, before: Callable[[Splits], None] = lambda rows: None) -> Dataset:
    """Return a data set in memory."""
    parts: dict[str, list[Mapping[str, np.ndarray]]] = {}
    notes, skipped = _encode_into(lambda split, arrays: parts.setdefault(split, []).append(arrays), splits, features, options, before, list)
    arrays = {split: Arrays({name: np.concatenate([part[name] for part in few]) for name in few[0]}) for split, few in parts.items()}
    return Dataset(arrays, info_of(features), notes=notes, skipped=skipped)


def encode(row: Row, features: Sequence[Feature]) -> dict[str, np.ndarray]:
    """Return the arrays of a row; raise Problem if a feature cannot encode it."""
    return {name: array for feature in features for name, array in feature.encode(row).items()}


def encode_all(split: str, rows: Sequence[Row], encode: Callable[[Row], Any], skipping: Skipping) -> list:
    """Return what `encode` returns for each of some rows of a split, without the rows that it raises Problem for."""
    examples = []
    for row in rows:
        try:
            examples.append(encode(row))
        except Problem as problem:
            skipping.bad(split, problem.where or row.where, str(problem))
    return examples


def info_of(features: Sequence[Feature]) -> dict[str, Any]:
    """Return the entries of `Dataset.info` of features."""
    return {key: value for feature in features for key, value in feature.info().items()}


# Rows that are decoded when they are read


class DecodedRows:
    """Examples of which some features are decoded on reading, and the others are in memory.

    A row that cannot be used raises BadExample when it is read.
    """

    def __init__(self, rows: Rows, indices: np.ndarray, features: Sequence[Feature], arrays: Mapping[str, np.ndarray], problems: Mapping[int, tuple[str, str]]):
        """
        Args:
          rows: the reader's rows.
          indices: int [examples], the row of each example.
          features: decoded on reading.
          arrays: of the other features, one entry for each example.
          problems: example -> file and line and message, of the examples that the other features cannot encode.
        """
        self.rows, self.indices, self.features, self.arrays, self.problems = rows, indices, features, dict(arrays), dict(problems)
        if hasattr(rows, "fingerprint"):
            self.fingerprint = self._fingerprint

    def __len__(self):
        return len(self.indices)

    def _fingerprint(self) -> int:
        return self.rows.fingerprint(self.indices, self.arrays)

    def __getitem__(self, index):
        if index in self.problems:
            raise BadExample(*self.problems[index])
        row = self.rows[int(self.indices[index])]
        try:
            check(row, self.features)
            decoded = encode(row, self.features)
        except Problem as problem:
            raise BadExample(problem.where or row.where, str(problem)) from problem
        return decoded | {name: array[index] for name, array in self.arrays.items()}


class FileRows(list):
    """Rows whose values may be names of files; the checksum has the size of each file."""

    def fingerprint(self, indices: np.ndarray, arrays: Mapping[str, np.ndarray]) -> int:
        result = fingerprint(*arrays.values())
        for row in (self[i] for i in indices):
            values = [(value, _size(os.path.join(row.folder, value)) if isinstance(value, str) else None) for value in row.values.values()]
            result = zlib.crc32(repr(values).encode(), result)
        return result


def _size(path: str) -> int | None:
    return os.path.getsize(path) if os.path.isfile(path) else None


def open_on_read(splits: Mapping[str, Rows], features: Sequence[Feature], options: Holdout) -> Dataset:
    """Return a data set whose features `on_read` are decoded when an example is read, and the others now."""
    eager = [feature for feature in features if not feature.on_read]
    late = [feature for feature in features if feature.on_read]
    parts = {split: (rows, range(len(rows))) for split, rows in splits.items()}
    cheap = {split: _cheap(rows, eager) for split, rows in splits.items()} if eager else {}
    for feature in eager:
        fitted.fit(feature, lambda feature=feature: feature.fit([row for row in cheap["train"] if is_usable(row, eager)]))
    if cheap:
        labelled = ["train", *with_labels({split: rows for split, rows in cheap.items() if split != "train"}, eager)]
        parts = {split: parts[split] for split in labelled}
    if "validation" not in parts and options.holdout:
        train = parts["train"][0]
        parts["train"], parts["validation"] = ((train, part) for part in hold_out(range(len(train)), options.holdout))
        cheap |= {"validation": cheap["train"]} if eager else {}
    blank = {name: value for feature in features for name, value in feature.blank().items()} if options.on_bad_example == "skip" else None
    opened = {}
    for split, (rows, numbers) in parts.items():
        arrays, problems = _encode_now([cheap[split][i] for i in numbers] if eager else [], eager)
        if problems and blank is None:
            raise BadExample(*next(iter(problems.values())))
        source = DecodedRows(rows, np.array(numbers, np.int32), late, arrays, problems)
        opened[split] = source if blank is None else Forgiving(source, blank)
    return Dataset(opened, info_of(features))


def _cheap(rows: Rows, features: Sequence[Feature]) -> Rows:
    """Return the rows with the columns of some features."""
    return rows.cheap([column for feature in features for column in feature.columns().values()]) if hasattr(rows, "cheap") else rows


def is_usable(row: Row, features: Sequence[Feature]) -> bool:
    """Whether a row can be used to fit features."""
    try:
        check(row, features)
    except Problem:
        return False
    return True


def _encode_now(rows: Sequence[Row], features: Sequence[Feature]) -> tuple[dict[str, np.ndarray], dict[int, tuple[str, str]]]:
    """Return the arrays of all rows, -1 where a row cannot be encoded, and what is wrong with those rows."""
    examples, problems = [], {}
    missing = {name: np.full_like(value, -1) for feature in features for name, value in feature.blank().items()}
    for i, row in enumerate(rows):
        try:
            check(row, features)
            examples.append(encode(row, features))
        except Problem as problem:
            problems[i] = problem.where or row.where, str(problem)
            examples.append(missing)
    return {name: np.stack([example[name] for example in examples]) for name in missing}, problems
