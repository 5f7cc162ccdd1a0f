"""Labels: classes and numbers."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np

from jaxmodels import config as config_lib
from jaxmodels.data.features.base import Column, Feature, Names, Problem, Row, counts
from jaxmodels.data.text_lines import is_number, is_utf8, not_utf8
from jaxmodels.errors import ConfigError


@dataclasses.dataclass(kw_only=True)
class Label(Names, Feature):
    """A class: `label` int32.

    Attributes:
      label_column: the label's name, or its number from 0.
      label: `class`, the name or number of a class; `classes`, any number of them; `value`, a number to predict; `none`, no label is read.
      labels: class names in order; by default the distinct labels of the training rows, sorted.
    """

    arrays: ClassVar = ("label",)
    label_column: Column
    label: Literal["class", "classes", "value", "none"] = "class"
    labels: tuple[str, ...] | None = None

    def __post_init__(self):
        if self.labels is not None and (len(set(self.labels)) != len(self.labels) or self.label not in ("class", "classes")):
            raise ConfigError(f"config.data.labels names the classes of data.label='class' or 'classes', each once; got {list(self.labels)}.")
        self._numbers: dict[str, int] = {}

    def columns(self):
        return {"label_column": self.label_column}

    def check(self, row):
        value = row.values[self.label_column]
        if isinstance(value, bool) or not isinstance(value, (str, int)) or str(value).strip() == "":
            raise Problem(f"the label {self.label_column!r} is {value!r}, not the name or number of a class.")
        if not is_utf8(str(value)):
            raise Problem(f"the label {self.label_column!r} is not UTF-8: {not_utf8(value)}")

    def fit(self, rows):
        names = self.labels if self.labels is not None else class_names(rows, self.label_column)
        self._numbers = {name: i for i, name in enumerate(names)}

    def number(self, row: Row) -> int:
        """Return the number of a row's class, -1 if it has none of the known ones."""
        return -1 if row.problem is not None else self._numbers.get(str(row.values.get(self.label_column)).strip(), -1)

    def is_missing(self, row: Row) -> bool:
        """Return whether a row has no label: None, or the -1 that hidden labels of tests have, unless it is a class."""
        value = row.values.get(self.label_column)
        return row.problem is None and (value is None or (str(value).strip() == "-1" and "-1" not in self._numbers))

    def encode(self, row):
        name = str(row.values[self.label_column]).strip()
        if name not in self._numbers:
            known = ", ".join(list(self._numbers)[:10]) + (", …" if len(self._numbers) > 10 else "")
            raise Problem(f"the label {name!r} is none of {known}.{config_lib.suggest(name, self._numbers)}")
        return {"label": np.int32(self._numbers[name])}

    def blank(self):
        return {"label": np.int32(0)}

    def info(self):
        return {"num_classes": len(self._numbers), "labels": list(self._numbers)}

    @staticmethod
    def show(name, example, info):
        value = np.asarray(example[name])
        if value.dtype.kind in "iu" and info.get("labels"):
            return str(info["labels"][int(value)])
        if value.ndim == 1 and info.get("several_classes"):
            return ", ".join(str(info["labels"][i]) for i in np.flatnonzero(value)) or "none"
        return Feature.show(name, example, info)

    @staticmethod
    def describe(columns: Mapping[str, np.ndarray], info: Mapping) -> dict[str, Any]:
        column = columns["label"]
        if column.dtype.kind in "iu":
            return {"labels": counts(column, info.get("labels") or range(info.get("num_classes", 0)))}
        if info.get("several_classes"):
            return {"labels": {str(name): int(count) for name, count in zip(info["labels"], column.sum(0), strict=True)}}
        return {"label": {"least": float(column.min()), "mean": float(column.mean()), "deviation": float(column.std()), "most": float(column.max())}}


@dataclasses.dataclass(kw_only=True)
class Classes(Label):
    """Any number of classes, also none: `label` float32 [C], 1 for each of them.

    Attributes:
      label_separator: between the names in a text; a list needs none.
    """

    label_separator: str = "|"

    def __post_init__(self):
        super().__post_init__()
        if not self.label_separator.strip():
            raise ConfigError("config.data.label_separator is blank; names of classes may hold spaces. Give another one.")

    def _names(self, row: Row) -> list[str]:
        value = row.values[self.label_column]
        return [str(name).strip() for name in (value if isinstance(value, list) else str(value).split(self.label_separator)) if str(name).strip()]

    def check(self, row):
        value = row.values[self.label_column]
        if not isinstance(value, (str, list)) or (isinstance(value, list) and not all(isinstance(name, str) or type(name) is int for name in value)):
            raise Problem(f"the label {self.label_column!r} is {value!r}, not names of classes: a list, or a text with {self.label_separator!r} between them.")
        names = self._names(row)
        for name in names:
            if not is_utf8(name):
                raise Problem(f"the label {self.label_column!r} is not UTF-8: {not_utf8(name)}")
        if len(set(names)) < len(names):
            raise Problem(f"the label {self.label_column!r} names a class twice: {', '.join(names)}.")

    def fit(self, rows):
        names = self.labels if self.labels is not None else sorted({name for row in rows for name in self._names(row)})
        if not names:
            raise ConfigError(f"config.data.label_column={self.label_column!r}: no training row has a class.")
        self._numbers = {name: i for i, name in enumerate(names)}

    def is_missing(self, row):
        return row.problem is None and row.values.get(self.label_column) is None

    def encode(self, row):
        result, names = self.blank()["label"], self._names(row)
        unknown = next((name for name in names if name not in self._numbers), None)
        if unknown is not None:
            raise Problem(f"the class {unknown!r} is none of {', '.join(list(self._numbers)[:10])}.{config_lib.suggest(unknown, self._numbers)}")
        result[[self._numbers[name] for name in names]] = 1
        return {"label": result}

    def blank(self):
        return {"label": np.zeros(len(self._numbers), np.float32)}

    def info(self):
        return super().info() | {"several_classes": True}


@dataclasses.dataclass(kw_only=True)
class Number(Feature):
    """A number to predict: `label` float32.

    Attributes:
      label_column: the number's column.
    """

    arrays: ClassVar = ("label",)
    label_column: Column

    def __post_init__(self):
        self._least = -np.inf

    def columns(self):
        return {"label_column": self.label_column}

    def fit(self, rows):
        self._least = min((float(row.values[self.label_column]) for row in rows), default=-np.inf)

    def state(self):
        return self._least

    def restore(self, state):
        self._least = state

    def is_missing(self, row: Row) -> bool:
        """Return whether a row has no label: None, or the -1 that hidden labels of tests have, where all labels of train are above it."""
        value = row.values.get(self.label_column)
        return row.problem is None and (value is None or (self._least > -1 and is_number(str(value)) and float(value) == -1))

    def check(self, row):
        value = row.values[self.label_column]
        try:
            finite = not isinstance(value, bool) and abs(float(value)) <= float(np.finfo(np.float32).max)  # false for NaN, too
        except (TypeError, ValueError, OverflowError):
            finite = False
        if not finite:
            raise Problem(f"the label {self.label_column!r} is {value!r}, not a finite number of float32, as data.label='value' requires.")

    def encode(self, row):
        return {"label": np.float32(row.values[self.label_column])}

    def blank(self):
        return {"label": np.float32(0)}


def class_names(rows: Sequence[Row], column: Column) -> list[str]:
    """Return the distinct labels, sorted by value if all are whole numbers, else by name."""
    first, numbers_of = {}, {}
    for row in rows:
        name = str(row.values[column]).strip()
        first.setdefault(name, row)
        numbers_of[name] = numbers_of.get(name, 0) + 1
    numbers = {name for name in first if name.removeprefix("-").isdecimal()}
    if numbers == set(first):
        return sorted(first, key=int)
    names = sorted(set(first) - numbers)
    if len(names) == 1 and numbers and numbers_of[names[0]] == 1 and first[names[0]].where.endswith("line 1"):
        raise ConfigError(f"{first[names[0]].where}: the label is {names[0]!r}, all others are numbers: set data.header=true.")
    return sorted(first)
