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


class Embed(nnx.Module):
    """A table of vectors, one a row: looked up, or multiplied with to score every row. Keeps the table's type."""

    def __init__(self, rows: int, width: int, *, init, rngs: nnx.Rngs):
        self.embedding = nnx.Param(init(rngs.params(), (rows, width)))

    def __call__(self, indices: jax.Array) -> jax.Array:
        """indices: int of any shape, each in [0, rows). Returns [..., width]."""
        return jnp.take(self.embedding[...], indices, axis=0, mode="clip")

    def attend(self, x: jax.Array) -> jax.Array:
        """x: [..., width]. Returns products with every row, [..., rows]."""
        return x @ self.embedding[...].T
