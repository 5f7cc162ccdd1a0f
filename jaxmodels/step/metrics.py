"""Metrics as pairs (sum, weight): added on the device, read on the host."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

Metrics = Mapping[str, tuple[jax.Array, jax.Array]]


def add(one: Metrics, other: Metrics) -> Metrics:
    """Return the sums of both, and the weights."""
    return jax.tree.map(jnp.add, one, other)


def zeros(shapes: Metrics) -> Metrics:
    """Return metrics of no rows. They are float32, so that no sum depends on the compute dtype."""
    return jax.tree.map(lambda _: jnp.zeros((), jnp.float32), shapes)


def values(metrics: Metrics) -> dict[str, float]:
    """Return the sum divided by the weight of each metric, or the sum of a count, whose weight is 0. Waits for the device."""
    return {name: float(total) / (float(weight) or 1.0) for name, (total, weight) in jax.device_get(dict(metrics)).items()}
