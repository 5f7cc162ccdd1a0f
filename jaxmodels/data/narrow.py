"""Numbers as JAX computes with them: 32 bits. What does not fit is refused, since JAX would wrap or overflow it without a word."""

import numpy as np


def narrowed(values: np.ndarray) -> np.ndarray:
    """Return whole numbers of 64 bits as int32, and float64 as float32; other types as they are.

    Raises:
      ValueError: a number is not finite or is too large; it names the first one.
    """
    kind = values.dtype.kind
    if kind in "iu" and values.dtype.itemsize >= 4 and values.dtype != np.int32:
        _refuse(values, (values > np.iinfo(np.int32).max) | (values < np.iinfo(np.int32).min), "is too large for int32")
        return values.astype(np.int32)
    if kind == "f":
        _refuse(values, ~np.isfinite(values), "is not finite")
        if values.dtype.itemsize > 4:
            with np.errstate(over="ignore"):
                narrow = values.astype(np.float32)
            _refuse(values, ~np.isfinite(narrow), "is too large for float32")
            return narrow
    return values


def _refuse(values: np.ndarray, bad: np.ndarray, problem: str) -> None:
    if bad.any():
        place = tuple(np.argwhere(bad)[0].tolist())
        raise ValueError(f"{values[place]} {problem}" + (f" (at {', '.join(map(str, place))})" if place else ""))
