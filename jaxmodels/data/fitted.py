"""What was derived from the training data, for other data that a model of it is evaluated on.

A run keeps it as the `info` of its data and its tokenizer. While other data is opened, its tokenizer, the names of its classes and its statistics
are taken from there instead of being made from the other data.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from jaxmodels.errors import ConfigError

_info: contextvars.ContextVar[Mapping[str, Any] | None] = contextvars.ContextVar("fitted", default=None)


@contextlib.contextmanager
def to(info: Mapping[str, Any] | None, tokenizer: Any = None) -> Iterator[None]:
    """Open data within with what is known of the training data.

    Args:
      info: `Dataset.info` of the training data; None for no change: data that is not opened to be evaluated is the training data itself.
      tokenizer: the specification that the tokenizer of `info` was made by, whose cached tokens may be read.
    """
    token = _info.set(_info.get() if info is None else {**info, "specification": tokenizer})
    try:
        yield
    finally:
        _info.reset(token)


def is_given() -> bool:
    """Whether the data that is opened is evaluated with what was derived from other data, so that none of it trains."""
    return _info.get() is not None


def get(name: str) -> Any:
    """Return an entry of the `info` of the training data; None if there is none, or if the data that is opened is the training data."""
    return (_info.get() or {}).get(name)


def fit(feature: Any, fit: Callable[[], Any]) -> None:
    """Set what a feature has derived from the training data, or call `fit`, which derives it."""
    if _info.get() is None or not feature.restore_from(_info.get()):
        fit()


def agreed_info(info: Mapping, trained: Mapping, where: str = "config.data: the data has changed") -> Mapping:
    """Return `trained`, the info of the training data; raise ConfigError unless the data to evaluate is compatible. It may have fewer classes.

    Args:
      info: of the data to evaluate.
      trained: of the training data.
      where: begins the message of an error.
    """
    for key, value in trained.items():
        current = info.get(key)
        if key == "tokenizer":
            agree = current is not None and current.to_json() == value.to_json()
        elif key in ("num_classes", "num_tags", "vocab_size"):
            agree = current is None or current <= value
        elif key in ("labels", "tags"):
            agree = current is None or list(current) == list(value)[: len(current)]
        else:
            agree = current is None or np.array_equal(np.asarray(current), np.asarray(value))
        if not agree:
            shown = "not the one of the run" if key == "tokenizer" else f"{value} when the run was trained, {current} now"
            raise ConfigError(f"{where}: {key}: {shown}.")
    return trained
