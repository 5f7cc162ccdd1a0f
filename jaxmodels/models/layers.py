"""Pieces that several families share."""

import jax
import jax.numpy as jnp
from flax import nnx


def dropout(x: jax.Array, rate: float, rngs: nnx.Rngs | None) -> jax.Array:
    """Inverted dropout (Srivastava et al. 2014); does nothing without `rngs`, which is how a model evaluates.

    Args:
      x: any shape.
      rate: probability that a value is dropped, in [0, 1).
      rngs: draws from its `dropout` stream.
    """
    if rngs is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(rngs.dropout(), 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros_like(x))
