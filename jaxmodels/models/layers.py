"""Layers and functions that several families of models share."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmodels.parallel.layout import gathered

Activation = Literal["gelu", "gelu_exact", "relu", "swiglu", "geglu"]

# Activation functions of feed-forwards. Gated ones (Shazeer 2020) have a third matrix, the gate, to which the function is applied.
ACTIVATIONS = {
    "gelu": functools.partial(nnx.gelu, approximate=True),
    "gelu_exact": functools.partial(nnx.gelu, approximate=False),
    "relu": nnx.relu,
    "swiglu": nnx.silu,
    "geglu": functools.partial(nnx.gelu, approximate=True),
}
GATED = ("swiglu", "geglu")


def check_sizes(**sizes: int) -> None:
    """Check that sizes are at least 1.

    Raises:
      ValueError: one is below 1; the message names it.
    """
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")


def check_rate(rate: float, name: str = "dropout") -> None:
    """Check that a dropout rate lies in [0, 1).

    Raises:
      ValueError: it does not.
    """
    if not 0 <= rate < 1:
        raise ValueError(f"{name} must be at least 0 and below 1, got {rate}")


def dropout(x: jax.Array, rate: float, rngs: nnx.Rngs | None) -> jax.Array:
    """Inverted dropout (Srivastava et al. 2014). Return x unchanged without `rngs`, for evaluation.

    Args:
      x: any shape.
      rate: probability that a value is dropped, in [0, 1).
      rngs: provides the `dropout` stream.
    """
    if rngs is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(rngs.dropout(), 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros_like(x))


def stochastic_depth(change: jax.Array, rate: float, rngs: nnx.Rngs | None) -> jax.Array:
    """Drop the residual of whole examples at random (Huang et al. 2016), and scale up that of the others.

    Args:
      change: residual that a block adds, [B, ...].
      rate: probability that the residual of an example is dropped, in [0, 1).
      rngs: provides the `dropout` stream. None drops nothing.
    """
    if rngs is None or rate == 0.0:
        return change
    keep = jax.random.bernoulli(rngs.dropout(), 1.0 - rate, (change.shape[0],) + (1,) * (change.ndim - 1))
    return jnp.where(keep, change / (1.0 - rate), jnp.zeros_like(change))


class Embed(nnx.Module):
    """An embedding table: looked up by index, or multiplied with vectors to score every row. Returns the dtype of the table."""

    def __init__(self, rows: int, width: int, *, init, name: str | None = "vocab", rngs: nnx.Rngs):
        """`name` is the logical axis of the rows in `parallel.layout`."""
        self.embedding = nnx.Param(init(rngs.params(), (rows, width)))
        self.names = (name, "embed")

    def __call__(self, indices: jax.Array) -> jax.Array:
        """indices: int of any shape, each in [0, rows). Returns [..., width]."""
        return jnp.take(gathered(self.embedding[...], *self.names), indices, axis=0, mode="clip")

    def attend(self, x: jax.Array) -> jax.Array:
        """x: [..., width]. Returns products with every row, [..., rows]."""
        # As a dot_general the table is not transposed: XLA for CPUs copies a transposed table for a single vector.
        return jax.lax.dot_general(x, gathered(self.embedding[...], *self.names), (((x.ndim - 1,), (1,)), ((), ())))


def max_pool_2x2(image: jax.Array) -> jax.Array:
    """Max-pool 2×2 with stride 2. An odd last row or column is dropped.

    This is a maximum over a reshaped axis, with an elementwise gradient. The gradient of a general max-pooling loops over windows, which is
    several times slower on a CPU.

    Args:
      image: [B, H, W, C].

    Returns:
      [B, H // 2, W // 2, C].
    """
    B, H, W, C = image.shape
    return image[:, : H // 2 * 2, : W // 2 * 2].reshape(B, H // 2, 2, W // 2, 2, C).max(axis=(2, 4))
