"""Pieces that several families share."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmodels.parallel.layout import gathered

Activation = Literal["gelu", "gelu_exact", "relu", "swiglu", "geglu"]

# The non-linearity of a feed-forward. The gated ones (Shazeer 2020) have a third matrix, and theirs is the gate's.
ACTIVATIONS = {
    "gelu": functools.partial(nnx.gelu, approximate=True),
    "gelu_exact": functools.partial(nnx.gelu, approximate=False),
    "relu": nnx.relu,
    "swiglu": nnx.silu,
    "geglu": functools.partial(nnx.gelu, approximate=True),
}
GATED = ("swiglu", "geglu")


def check_sizes(**sizes: int) -> None:
    """Raises ValueError, naming it, for a size below 1."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")


def check_rate(rate: float, name: str = "dropout") -> None:
    """Raises ValueError for a rate of dropout outside [0, 1)."""
    if not 0 <= rate < 1:
        raise ValueError(f"{name} must be at least 0 and below 1, got {rate}")


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


def stochastic_depth(change: jax.Array, rate: float, rngs: nnx.Rngs | None) -> jax.Array:
    """What a block adds to its input, left out for whole examples at random (Huang et al. 2016); scaled up for the others.

    Args:
      change: [B, ...].
      rate: probability that an example's change is dropped, in [0, 1).
      rngs: draws from its `dropout` stream; without it nothing is dropped.
    """
    if rngs is None or rate == 0.0:
        return change
    keep = jax.random.bernoulli(rngs.dropout(), 1.0 - rate, (change.shape[0],) + (1,) * (change.ndim - 1))
    return jnp.where(keep, change / (1.0 - rate), jnp.zeros_like(change))


class Embed(nnx.Module):
    """A table of vectors, one a row: looked up, or multiplied with to score every row. Keeps the table's type."""

    def __init__(self, rows: int, width: int, *, init, name: str | None = "vocab", rngs: nnx.Rngs):
        """`name` is that of the rows in `parallel.layout`."""
        self.embedding = nnx.Param(init(rngs.params(), (rows, width)))
        self.names = (name, "embed")

    def __call__(self, indices: jax.Array) -> jax.Array:
        """indices: int of any shape, each in [0, rows). Returns [..., width]."""
        return jnp.take(gathered(self.embedding[...], *self.names), indices, axis=0, mode="clip")

    def attend(self, x: jax.Array) -> jax.Array:
        """x: [..., width]. Returns products with every row, [..., rows]."""
        # Named this way, no compiler makes a transposed copy of the table, which one for CPUs does for a single vector.
        return jax.lax.dot_general(x, gathered(self.embedding[...], *self.names), (((x.ndim - 1,), (1,)), ((), ())))


def max_pool_2x2(image: jax.Array) -> jax.Array:
    """Max-pooling 2×2 with stride 2; an odd last row or column is left out.

    As a maximum over a reshaped axis, whose gradient is elementwise: that of a general max-pooling walks over
    windows, which is several times slower on a CPU.

    Args:
      image: [B, H, W, C].
    """
    B, H, W, C = image.shape
    return image[:, : H // 2 * 2, : W // 2 * 2].reshape(B, H // 2, 2, W // 2, 2, C).max(axis=(2, 4))
