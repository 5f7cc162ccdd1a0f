"""Arrays of numbers."""

import dataclasses
from typing import ClassVar

import numpy as np

from jaxmodels.data.features.base import Feature, Problem
from jaxmodels.data.narrow import narrowed
from jaxmodels.errors import ConfigError


@dataclasses.dataclass(kw_only=True)
class Array(Feature):
    """A column of numbers as it is, under its own name, in 32 bits.

    Attributes:
      column: name of the column and the array.
      shape: of every value; None for a dimension that differs.
      dtype: of the values.
    """

    on_read: ClassVar = True
    column: str
    shape: tuple[int | None, ...]
    dtype: np.dtype

    def columns(self):
        return {self.column: self.column}

    def encode(self, row):
        try:
            return {self.column: narrowed(np.asarray(row.values[self.column]))}
        except ValueError as error:
            raise Problem(f"{self.column!r}: {error}.") from error

    def blank(self):
        if None in self.shape:
            raise ConfigError(f"config.data.on_bad_example='skip' needs features of one size; {self.column!r} is {tuple(self.shape)}.")
        return {self.column: narrowed(np.zeros(self.shape, self.dtype))}
