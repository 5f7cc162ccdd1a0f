"""Metrics as (sum, weight) pairs: adding them up on the device, and reading them on the host."""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from jaxmodels.errors import ConfigError

Metrics = Mapping[str, tuple[jax.Array, jax.Array]]

# Which way is better, for keeping the best checkpoint and stopping early.
HIGHER_IS_BETTER = {
    "loss": False,
    "perplexity": False,
    "mse": False,
    "mae": False,
    "huber": False,
    "accuracy": True,
    "f1": True,
    "macro_f1": True,
    "precision": True,
    "recall": True,
    "pearson": True,
    "spearman": True,
    "exact_match": True,
    "label_error_rate": False,
    "bleu": True,
    "rouge1": True,
    "rouge2": True,
    "rougeL": True,
}


def add(one: Metrics, other: Metrics) -> Metrics:
    """Sums and weights of both."""
    return jax.tree.map(jnp.add, one, other)


def zeros(shapes: Metrics) -> Metrics:
    """Metrics of nothing, shaped like `shapes`; float32, so that no sum depends on the compute type."""
    return jax.tree.map(lambda _: jnp.zeros((), jnp.float32), shapes)


def values(metrics: Metrics) -> dict[str, float]:
    """Sum over weight of each, or the sum of a count, whose weights are 0; on the host. Waits for the device."""
    return {name: float(total) / (float(weight) or 1.0) for name, (total, weight) in jax.device_get(dict(metrics)).items()}


def is_better(name: str, value: float, than: float | None) -> bool:
    """Whether a value beats another; any number beats None, and what is not a number beats nothing."""
    return not math.isnan(value) and (than is None or (value > than if HIGHER_IS_BETTER[name] else value < than))


def check_name(key: str, name: str) -> None:
    """Raises ConfigError for a metric whose better direction is not known."""
    if name not in HIGHER_IS_BETTER:
        raise ConfigError(f"config.{key}: unknown metric {name!r}; there are {', '.join(HIGHER_IS_BETTER)}.")
