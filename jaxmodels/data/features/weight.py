"""Weights of examples."""

import dataclasses
from typing import ClassVar

import numpy as np

from jaxmodels.data.features.base import Column, Feature, Problem


@dataclasses.dataclass(kw_only=True)
class Weight(Feature):
    """How much an example counts in loss and metrics: `weight` float32.

    Attributes:
      weight_column: the weight, a number of at least 0.
    """

    arrays: ClassVar = ("weight",)
    weight_column: Column | None = None

    def columns(self):
        return {"weight_column": self.weight_column}

    def check(self, row):
        value = row.values[self.weight_column]
        try:
            good = not isinstance(value, bool) and 0 <= float(value) <= float(np.finfo(np.float32).max)
        except (TypeError, ValueError, OverflowError):
            good = False
        if not good:
            raise Problem(f"the weight {self.weight_column!r} is {value!r}, not a number of at least 0.")

    def encode(self, row):
        return {"weight": np.float32(row.values[self.weight_column])}

    def blank(self):
        return {"weight": np.float32(0)}
