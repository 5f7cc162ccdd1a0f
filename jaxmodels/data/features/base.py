"""Rows as readers yield them, and the base class of features, which encode columns of rows as arrays."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from jaxmodels.data.keys import Keys

PAD = -1
Column = int | str


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """One row of a file or table.

    Attributes:
      where: file and line.
      values: column -> raw value; at least the columns that the features read.
      problem: why the row is malformed, or None.
      parts: file and line of each item of list-valued columns, where they differ from `where`.
      folder: directory that relative paths in `values` start from.
    """

    where: str
    values: Mapping[Column, Any] = dataclasses.field(default_factory=dict)
    problem: str | None = None
    parts: Sequence[str] = ()
    folder: str = ""


class Problem(ValueError):
    """A row cannot be used; `where` is a file and line more precise than the row's own, or None."""

    def __init__(self, message: str, where: str | None = None):
        super().__init__(message)
        self.where = where


class Feature(Keys):
    """How one or more columns of a row become arrays of a fixed shape.

    Subclasses are keyword-only dataclasses. Their fields are keys of the `data` section; a source declares them with `keys.takes`.

    Attributes:
      arrays: names of the arrays that `encode` may return.
      on_read: whether values are decoded each time an example is read (images, audio), not once when the data set is opened.
    """

    arrays: ClassVar[tuple[str, ...]] = ()
    on_read: ClassVar[bool] = False

    def columns(self) -> dict[str, Column]:
        """Columns to read: key of the section -> name or number."""
        raise NotImplementedError

    def check(self, row: Row) -> None:
        """Raise Problem if the raw values of a row are of the wrong kind. Called before `fit`."""

    def fit(self, rows: Sequence[Row]) -> None:
        """Derive what `encode` needs, such as the class names, from the training rows."""

    def state(self) -> Any:
        """Return what `fit` derived, as JSON values, so that rows with an index are fitted once; None if `fit` is to be called at each start."""

    def restore(self, state: Any) -> None:
        """Set what `state` returned, in place of a call of `fit`."""

    def restore_from(self, info: Mapping[str, Any]) -> bool:
        """Set what `fit` derives from the `info` of the training data, where it is there; return whether it is. For data that is evaluated alone."""
        return False

    def check_known(self, row: Row) -> None:
        """Raise Problem if a row has names that the training rows lack. Called after `fit`, before a tokenizer is trained."""

    def encode(self, row: Row) -> dict[str, np.ndarray]:
        """Return the arrays of a row; raise Problem if its values cannot be encoded."""
        raise NotImplementedError

    def prepare(self, rows: Sequence[Row]) -> None:
        """Do at once what `encode` would do for each of these rows, if that is faster. They have passed `check`. No rows: forget it."""

    def blank(self) -> dict[str, np.ndarray]:
        """Return arrays of zeros, of the shapes and types that `encode` returns, for a row that is skipped on reading."""
        raise NotImplementedError

    def info(self) -> dict[str, Any]:
        """Return the feature's entries of `Dataset.info`."""
        return {}

    def note(self, split: str, examples: int) -> str | None:
        """Return a message about the examples encoded since the last call, or None."""

    @staticmethod
    def show(name: str, example: Mapping[str, np.ndarray], info: Mapping) -> str | None:
        """Return the array `name` of an example in readable form; None hides it."""
        value = np.asarray(example[name])
        if value.ndim == 0:
            return f"{value:.6g}" if value.dtype.kind == "f" else str(value)
        return f"{value.dtype} {list(value.shape)} from {value.min():.6g} to {value.max():.6g}"

    @staticmethod
    def describe(columns: Mapping[str, np.ndarray], info: Mapping) -> dict[str, Any]:
        """Return statistics of the feature's arrays, stacked over the examples of a split."""
        return {}


class Names:
    """Mixin of features whose values are names, which `fit` numbers from 0 in `_numbers`.

    Attributes:
      listed: key of `Dataset.info` that lists the names.
    """

    listed: ClassVar[str] = "labels"
    labels: tuple[str, ...] | None = None
    _numbers: dict[str, int]

    def state(self):
        return list(self._numbers)

    def restore(self, state):
        self._numbers = {name: i for i, name in enumerate(state)}

    def restore_from(self, info):
        if self.listed in info and self.labels is None:  # names that the config gives stay, and are compared with those of the run
            self.restore(info[self.listed])
            return True
        return False


def padded(values: np.ndarray, length: int) -> np.ndarray:
    """Return the first `length` values as int32 [length], padded with -1."""
    result = np.full(length, PAD, np.int32)
    result[: min(length, len(values))] = values[:length]
    return result


def counts(numbers: np.ndarray, names: Sequence | None) -> dict[str, int]:
    """Return name -> number of occurrences, for every name."""
    names = list(names or range(int(numbers.max()) + 1))
    return {str(name): int(count) for name, count in zip(names, np.bincount(numbers.ravel(), minlength=len(names)), strict=True)}
