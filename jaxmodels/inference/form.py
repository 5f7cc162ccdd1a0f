"""The base class of forms (see `forms`), and what several of them share."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from jaxmodels.data.features.base import Problem
from jaxmodels.inference.run import Run

Example = dict[str, np.ndarray]
Schema = dict[str, Any]

NUMBER, TEXT = {"type": "number"}, {"type": "string"}


class Form:
    """How one task's inputs and outputs look outside of arrays.

    Attributes:
      title: what it does, in words.
      input, output: JSON Schemas of one input and of its result.
    """

    title: str
    input: Schema
    output: Schema

    def encode(self, item: Any, *, truncate: bool = False) -> Example:
        """Return the arrays of one input, without a batch axis; raise Problem if it is none. `truncate`: cut what is too long, instead of refusing it."""
        raise NotImplementedError

    def decode(self, item: Any, example: Example, output: Any, *, top: int) -> dict[str, Any]:
        """Return the result of one input as JSON values.

        Args:
          item: the input.
          example: of `encode`.
          output: the row of what the task's `predict` returns.
          top: number of labels to name, where there are many.
        """
        raise NotImplementedError

    def blanks(self) -> Iterator[Example]:
        """Yield one example of each shape that `encode` returns, to compile for."""
        raise NotImplementedError


class Labels:
    """Names of classes, and their probabilities as JSON values."""

    def __init__(self, run: Run):
        count = run.info["num_classes"]
        self.names = [str(name) for name in run.info.get("labels") or range(count)]
        self.threshold = getattr(run.task, "threshold", None)  # of tasks with several classes
        properties = {"label": {"type": "string", "enum": self.names} if count <= 100 else TEXT, "probability": NUMBER}
        properties |= {} if self.threshold is None else {"present": {"type": "boolean", "description": f"whether the probability is {self.threshold} or more"}}
        one = {"type": "object", "properties": properties, "required": list(properties)}
        self.schema = {"type": "object", "properties": {"labels": {"type": "array", "items": one, "description": "the most probable first"}}}

    def decode(self, probabilities: np.ndarray, top: int) -> dict[str, Any]:
        found = []
        for number in np.argsort(-probabilities, kind="stable")[:top].tolist():
            entry = {"label": self.names[number], "probability": float(probabilities[number])}
            found.append(entry if self.threshold is None else entry | {"present": entry["probability"] >= self.threshold})
        return {"labels": found}


def numbers(value: Any, shape: Sequence[int | None], what: str, dtype: Any = np.float32) -> np.ndarray:
    """Return nested lists of finite numbers as an array of a shape; raise Problem if they are none."""
    wanted = " × ".join("any number" if size is None else str(size) for size in shape)
    try:
        array = np.asarray(value)
    except (ValueError, OverflowError, RecursionError) as error:
        raise Problem(f"{what} must be {wanted} numbers, in rows of equal length.") from error
    if array.dtype.kind not in "iuf" or array.ndim != len(shape) or any(size not in (None, there) for size, there in zip(shape, array.shape, strict=True)):
        found = f"{' × '.join(map(str, array.shape))}" if array.dtype.kind in "iuf" else "none"
        raise Problem(f"{what} must be {wanted} numbers, got {found or 'one'}.")
    with np.errstate(over="ignore"):
        array = array.astype(dtype)
    if not np.isfinite(array).all():
        raise Problem(f"{what} has a value that is not finite.")
    return array
