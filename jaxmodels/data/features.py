"""Rows of text with labels, as arrays of tokens: what the sources that read rows share.

Shapes: T tokens of a text (`sequence_length`), U of a target (`target_length`).
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from jaxmodels import config as config_lib
from jaxmodels.data.skipping import Policy, Skipping
from jaxmodels.data.source import Arrays, Dataset
from jaxmodels.errors import ConfigError
from jaxmodels.tokenizers.base import frame
from jaxmodels.tokenizers.factory import make_tokenizer

PAD = -1
Column = int | str
Label = Literal["class", "value", "none"]


@dataclasses.dataclass(frozen=True)
class Row:
    """A row as it is read.

    Attributes:
      where: file and line.
      values: of the wanted columns.
      problem: why the row is malformed, if it is.
    """

    where: str
    values: Sequence[Any] = ()
    problem: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What a row's columns are and what becomes of them; the keys of every source that reads rows, described at `rows.tsv`."""

    text_column: Column
    label_column: Column
    label: Label
    labels: tuple[str, ...] | None
    source_column: Column | None
    target_column: Column | None
    sequence_length: int
    target_length: int | None
    tokenizer: str
    truncate: bool
    holdout: float
    on_bad_example: Policy

    def __post_init__(self):
        if (self.source_column is None) != (self.target_column is None):
            raise ConfigError("config.data: source_column and target_column go together: two texts, for sequence to sequence.")
        if self.sequence_length < 1 or (self.target_length is not None and self.target_length < 1):
            raise ConfigError(f"config.data: sequence_length and target_length must be at least 1, got {self.sequence_length}, {self.target_length}.")
        if not 0 <= self.holdout < 1:
            raise ConfigError(f"config.data.holdout must be at least 0 and below 1, got {self.holdout}.")
        if self.labels is not None and (len(set(self.labels)) != len(self.labels) or self.label != "class" or self.pairs):
            raise ConfigError(f"config.data.labels names the classes of data.label='class', each once; got {list(self.labels)}.")

    @property
    def pairs(self) -> bool:
        """Whether an example is two texts."""
        return self.source_column is not None

    @property
    def columns(self) -> dict[str, Column]:
        """The wanted columns: the config's key -> name or number."""
        if self.pairs:
            return {"source_column": self.source_column, "target_column": self.target_column}
        return {"text_column": self.text_column} | ({"label_column": self.label_column} if self.label != "none" else {})


def hold_out(items: Sequence, share: float) -> tuple[list, list]:
    """Cuts a list in two by a fixed draw, each part in the list's order: the rest, and `share` of it (at least one).

    Drawn, not cut off the end: files are often sorted by label.
    """
    # Raw bits of a bit generator are the same in every numpy version; its permutations need not be.
    order = np.argsort(np.random.PCG64(0).random_raw(len(items)), kind="stable")
    taken = set(order[: max(1, round(share * len(items)))].tolist())
    return [x for i, x in enumerate(items) if i not in taken], [x for i, x in enumerate(items) if i in taken]


def open_rows(splits: Mapping[str, Iterable[Row]], options: Options, data_dir: str | None) -> Dataset:
    """Checks rows, makes the tokenizer from the texts that train, and tokenises.

    Returns:
      A data set of `tokens` int32 [T] with `label` int32 or float32, or of `source` int32 [T] and `target` int32 [U + 1]
      (`<start>`, the text, `<end>`); all padded with -1. A published tokenizer puts its own special tokens around texts and sources.

    Raises:
      ConfigError: bad rows, unless they are to be left out; options that do not fit the data or the tokenizer.
    """
    skipping = Skipping(options.on_bad_example)
    parts = {split: list(rows) for split, rows in splits.items()}
    held_out = "validation" not in parts and options.holdout > 0
    if held_out:
        parts["train"], parts["validation"] = hold_out(parts["train"], options.holdout)
    good = {split: [row for row in rows if _usable(row, split, options, skipping)] for split, rows in parts.items()}
    info = {}
    if not options.pairs and options.label == "class":
        names = list(options.labels) if options.labels is not None else class_names(good["train"] + (good["validation"] if held_out else []))
        info = {"num_classes": len(names), "labels": names}
    texts = 2 if options.pairs else 1
    skipping.check_rest("train", len(good["train"]))
    everything = options.tokenizer == "character"  # which has no token for other characters
    fed = [row for split in good for row in good[split]] if everything else good["train"]
    tokenizer = make_tokenizer(options.tokenizer, (text for row in fed for text in row.values[:texts]), data_dir)
    encoder = _Encoder(tokenizer, options, info.get("labels"))
    notes, arrays = [], {}
    for split, rows in good.items():
        examples = []
        for row in rows:
            example = encoder.encode(row)
            if isinstance(example, str):
                skipping.bad(split, row.where, example)
            else:
                examples.append(example)
        skipping.check_rest(split, len(examples))
        arrays[split] = Arrays({key: np.stack([e[key] for e in examples]) for key in examples[0]})
        if encoder.cut:
            notes.append(f"{encoder.cut:,} of {len(examples):,} examples of {split} are longer than data.sequence_length and are cut")
            encoder.cut = 0
    info |= {"vocab_size": tokenizer.vocab_size, "tokenizer": tokenizer}
    if options.pairs:
        info["target_length"] = encoder.target_length
    return Dataset(arrays, info, notes=(*skipping.notes(), *notes), skipped=skipping.counts)


def _usable(row: Row, split: str, options: Options, skipping: Skipping) -> bool:
    problem = row.problem or _problem(row, options)
    if problem is not None:
        skipping.bad(split, row.where, problem)
    return problem is None


def _problem(row: Row, options: Options) -> str | None:
    """What is wrong with a row's values, before it is tokenised; labels' names are checked later."""
    for (key, column), value in zip(options.columns.items(), row.values, strict=True):
        if key == "label_column":
            problem = _number_problem(value, column) if options.label == "value" else _name_problem(value, column)
            if problem is not None:
                return problem
            continue
        if not isinstance(value, str):
            return f"{column!r} is {value!r}, not a text."
        if not value.strip():
            return f"the text of column {column!r} is empty."
        try:
            value.encode()
        except UnicodeEncodeError:
            return f"the text of column {column!r} is not UTF-8."
    return None


def _name_problem(value: Any, column: Column) -> str | None:
    if isinstance(value, bool) or not isinstance(value, (str, int)) or str(value).strip() == "":
        return f"the label {column!r} is {value!r}, not the name or number of a class."
    return None


def _number_problem(value: Any, column: Column) -> str | None:
    try:
        finite = not isinstance(value, bool) and math.isfinite(float(value))
    except (TypeError, ValueError):
        finite = False
    return None if finite else f"the label {column!r} is {value!r}, not a finite number, which data.label='value' asks for."


def class_names(rows: Sequence[Row]) -> list[str]:
    """The distinct labels: by value where all are whole numbers, else by name."""
    counts = {}
    for row in rows:
        counts.setdefault(str(row.values[1]).strip(), []).append(row)
    numbers = {name for name in counts if name.removeprefix("-").isdecimal()}
    if numbers == set(counts):
        return sorted(counts, key=int)
    names = sorted(set(counts) - numbers)
    if len(names) == 1 and numbers and len(counts[names[0]]) == 1 and counts[names[0]][0].where.endswith("line 1"):
        raise ConfigError(f"{counts[names[0]][0].where}: the label is {names[0]!r}, all others are numbers: set data.header=true.")
    return sorted(counts)


class _Encoder:
    """Rows to arrays. `cut` counts the texts that were too long."""

    def __init__(self, tokenizer, options: Options, names: list[str] | None):
        self.tokenizer, self.options, self.cut = tokenizer, options, 0
        self.classes = {name: i for i, name in enumerate(names)} if names is not None else None
        self.target_length = options.target_length or options.sequence_length
        self.start, self.end = tokenizer.special("start"), tokenizer.special("end")
        self.before, self.after = frame(tokenizer)
        self.room = options.sequence_length - len(self.before) - len(self.after)
        if self.room < 1:
            raise ConfigError(
                f"config.data.sequence_length={options.sequence_length} leaves no room for a text between the "
                f"{len(self.before) + len(self.after)} special tokens that {options.tokenizer!r} puts around it."
            )
        if options.pairs and (self.start is None or self.end is None):
            raise ConfigError(
                f"config.data.tokenizer={options.tokenizer!r} has no token for the start and the end of a target; "
                "take byte+special, character+special, word:MAX or bpe:SIZE, or a published model's that has them."
            )

    def encode(self, row: Row) -> dict[str, np.ndarray] | str:
        """The arrays of one row, or what is wrong with it."""
        length = self.options.sequence_length
        try:
            tokens = [self.tokenizer.encode(text) for text in row.values[: 2 if self.options.pairs else 1]]
        except ValueError as error:
            return f"{error}."
        if any(len(t) == 0 for t in tokens):
            return "the tokenizer makes no token of the text."
        limits = (self.room, self.target_length - 1)[: len(tokens)]
        if any(len(t) > limit for t, limit in zip(tokens, limits, strict=True)):
            if not self.options.truncate:
                shown = " and ".join(f"{len(t)} tokens, where {limit} fit" for t, limit in zip(tokens, limits, strict=True))
                return f"{shown}; raise data.sequence_length, or cut with data.truncate=true."
            self.cut += 1
        framed = padded(np.concatenate([self.before, tokens[0][: self.room], self.after]), length)
        if self.options.pairs:
            target = np.concatenate([[self.start], tokens[1][: limits[1]], [self.end]])
            return {"source": framed, "target": padded(target, self.target_length + 1)}
        result = {"tokens": framed}
        if self.options.label == "value":
            result["label"] = np.float32(row.values[1])
        elif self.options.label == "class":
            name = str(row.values[1]).strip()
            if name not in self.classes:
                known = ", ".join(list(self.classes)[:10]) + (", …" if len(self.classes) > 10 else "")
                return f"the label {name!r} is none of {known}.{config_lib.suggest(name, self.classes)}"
            result["label"] = np.int32(self.classes[name])
        return result


def padded(values: np.ndarray, length: int) -> np.ndarray:
    """int32 [length]: the values that fit, then -1."""
    result = np.full(length, PAD, np.int32)
    result[: min(length, len(values))] = values[:length]
    return result
