"""Tables over time to their next rows; see `forms`."""

from collections.abc import Mapping

import numpy as np

from jaxmodels.data.features.base import Problem
from jaxmodels.inference.form import NUMBER, TEXT, Form, Schema, numbers
from jaxmodels.inference.run import Run


class TableForm(Form):
    """The past of some variables to their future, in the units of the data."""

    title = "forecast"

    def __init__(self, run: Run):
        info = run.info
        self.lookback, self.variables = info["lookback"], info["variables"]
        self.columns = [str(name) for name in info.get("columns") or range(info["variables"])]
        # Without these the run was trained on arrays, which were used as they are.
        self.mean = np.asarray(info.get("mean", np.zeros(self.variables)))
        self.deviation = np.asarray(info.get("deviation", np.ones(self.variables)))

        def rows(least: int) -> Schema:
            row = {"type": "array", "items": NUMBER, "minItems": self.variables, "maxItems": self.variables}
            return {"type": "array", "items": row, "minItems": least}

        series = {"type": "array", "items": NUMBER, "minItems": self.lookback}
        text = f"the last {self.lookback} rows or more, each with {', '.join(self.columns[:20])}"
        by_name = {"type": "object", "properties": dict.fromkeys(self.columns, series), "required": self.columns, "additionalProperties": False}
        self.input = {"anyOf": [rows(self.lookback) | {"description": text}, by_name]}
        names = {"type": "array", "items": TEXT}
        self.output = {"type": "object", "properties": {"columns": names, "forecast": rows(info["horizon"])}}

    def encode(self, item, *, truncate=False):
        if isinstance(item, Mapping):
            if missing := [name for name in self.columns if name not in item]:
                raise Problem(f"the column {missing[0]!r} is missing; the columns are {', '.join(self.columns)}.")
            if other := [name for name in item if name not in self.columns]:
                raise Problem(f"there is no column {other[0]!r}; the columns are {', '.join(self.columns)}.")
            item = [numbers(item[name], (None,), f"the column {name!r}", np.float64) for name in self.columns]
            if len(set(map(len, item))) != 1:
                raise Problem(f"the columns have {', '.join(str(len(column)) for column in item)} values, not equally many.")
            item = np.stack(item, axis=1)
        table = numbers(item, (None, self.variables), "the table", np.float64)
        if len(table) < self.lookback:
            raise Problem(f"the table has {len(table)} rows, and the model reads the last {self.lookback}.")
        with np.errstate(over="ignore"):
            past = ((table[-self.lookback :] - self.mean) / self.deviation).astype(np.float32)
        if not np.isfinite(past).all():
            raise Problem("a value is too large for float32 when it is divided by the deviation of its column in the training data.")
        return {"past": past}

    def decode(self, item, example, output, *, top):
        values = output.astype(np.float64) * self.deviation + self.mean
        return {"columns": self.columns, "forecast": values.tolist()}

    def blanks(self):
        yield {"past": np.zeros((self.lookback, self.variables), np.float32)}
