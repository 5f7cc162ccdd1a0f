"""Layers and functions that several families of models share."""

import functools
import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxmodels.models import products
from jaxmodels.parallel.layout import constrain, gathered, traced_for

Activation = Literal["gelu", "gelu_exact", "relu", "swiglu", "geglu", "geglu_exact"]


def gelu_exact(x: jax.Array) -> jax.Array:
    """Return x Φ(x), with Φ the distribution function of a normal variable (Hendrycks and Gimpel 2016). For CPUs Φ is computed from erf, as in PyTorch.

    JAX takes erfc, whose relative error is small where Φ is nearly zero, and which takes XLA's CPU compiler (jaxlib 0.10) twice as long.
    """
    if traced_for("cpu") and x.dtype == jnp.float32:
        return 0.5 * x * (1.0 + jax.lax.erf(x * np.float32(math.sqrt(0.5))))
    return nnx.gelu(x, approximate=False)


# Activation functions of feed-forwards. Gated ones (Shazeer 2020) have a third matrix, the gate, to which the function is applied.
ACTIVATIONS = {
    "gelu": functools.partial(nnx.gelu, approximate=True),
    "gelu_exact": gelu_exact,
    "relu": nnx.relu,
    "swiglu": nnx.silu,
    "geglu": functools.partial(nnx.gelu, approximate=True),
    "geglu_exact": gelu_exact,
}
GATED = ("swiglu", "geglu", "geglu_exact")


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


class Linear(nnx.Linear):
    """`nnx.Linear` whose product is that of `models.products`."""

    def __init__(self, width_in: int, width_out: int, **options):
        """width_in, width_out: D and F; the options are those of `nnx.Linear`."""
        super().__init__(width_in, width_out, dot_general=products.dot_general, **options)


class Embed(nnx.Module):
    """An embedding table: looked up by index, or multiplied with vectors to score every row. Returns the dtype of the table."""

    def __init__(self, rows: int, width: int, *, init, name: str | None = "vocab", multiple: int = 1, rngs: nnx.Rngs):
        """`name` is the logical axis of the rows in `parallel.layout`. Rows of zeros are added up to a multiple of `multiple`; they score nothing."""
        self.embedding = nnx.Param(padded_init(init, 0, multiple)(rngs.params(), (rows, width)))
        self.names, self.rows = (name, "embed"), rows

    def __call__(self, indices: jax.Array) -> jax.Array:
        """indices: int of any shape, each in [0, rows). Returns [..., width]."""
        return jnp.take(gathered(self.embedding[...], *self.names), indices, axis=0, mode="clip")

    def attend(self, x: jax.Array) -> jax.Array:
        """x: [..., width]. Returns products with every row but those of padding, [..., rows]."""
        # As a dot_general the table is not transposed: XLA for CPUs copies a transposed table for a single vector.
        return first_scores(jax.lax.dot_general(x, gathered(self.embedding[...], *self.names), (((x.ndim - 1,), (1,)), ((), ()))), self.rows)


def padded_size(size: int, multiple: int) -> int:
    """Return a size rounded up to a multiple."""
    return -(-size // multiple) * multiple


def padded_init(init: Callable, axis: int, multiple: int) -> Callable:
    """Return an initializer whose values are those of `init`, followed by zeros up to a multiple along `axis`; it is called with the shape without them."""

    def padded(key, shape, *dtype):
        extra = padded_size(shape[axis], multiple) - shape[axis]
        return jnp.pad(init(key, shape, *dtype), [(0, extra if i == axis else 0) for i in range(len(shape))])

    return init if multiple == 1 else padded


class Output(Linear):
    """A linear layer without bias that scores tokens; its columns are padded with zeros, which score nothing, up to a multiple of `multiple`."""

    def __init__(self, width: int, tokens: int, *, init, multiple: int = 1, rngs: nnx.Rngs):
        """tokens: number of scores, V."""
        super().__init__(width, tokens, use_bias=False, kernel_init=padded_init(init, 1, multiple), rngs=rngs)
        self.tokens = tokens

    def __call__(self, x: jax.Array) -> jax.Array:
        """x: [..., width]. Returns [..., tokens]."""
        return first_scores(super().__call__(x), self.tokens)


def first_scores(scores: jax.Array, tokens: int) -> jax.Array:
    """Return the scores [..., tokens] of scores [..., V] with V >= tokens: the rest is padding, and takes no part in a softmax, a maximum or a gradient."""
    if scores.shape[-1] == tokens:
        return scores
    # The sharding of all columns: the compiler divides those that are left over the same devices, unevenly.
    names = (*{1: (), 2: ("rows",), 3: ("rows", "sequence")}.get(scores.ndim, (None,) * (scores.ndim - 1)), "vocab")
    return constrain(scores, *names)[..., :tokens]


class RMSNormPlusOne(nnx.Module):
    """Root-mean-square normalization with a factor of 1 + scale, in float32 (Gemma). Small differences of the factor from 1 are exact in half precision."""

    def __init__(self, width: int, *, epsilon: float):
        self.scale = nnx.Param(jnp.zeros(width))
        self.epsilon = epsilon

    def __call__(self, x: jax.Array) -> jax.Array:
        """x: [..., width]. Return the same shape and dtype."""
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.epsilon)
        return (y * (1.0 + self.scale[...].astype(jnp.float32))).astype(x.dtype)


def max_pool_2x2(image: jax.Array) -> jax.Array:
    """Max-pool 2×2 with stride 2. An odd last row or column is dropped. Equal maxima share the gradient.

    This is a maximum over a reshaped axis, with an elementwise gradient. The gradient of a general max-pooling loops over windows, which is
    several times slower on a CPU.

    Args:
      image: [B, H, W, C].

    Returns:
      [B, H // 2, W // 2, C].
    """
    return _windows(image).max(axis=(2, 4))


_BEYOND_CACHES = 1 << 22  # values of an image batch


def relu_max_pool_2x2(image: jax.Array) -> jax.Array:
    """Return `max_pool_2x2` of the positive part of an image.

    For a CPU and images beyond its caches, the gradient of both is written down as one pass over the pixels: a step of the small CNN with 256 images takes
    0.87 of the time with XLA (jaxlib 0.10). With 32 images it takes 1.07, so smaller ones are left to XLA.
    """
    return _relu_max_pool_2x2(image) if traced_for("cpu") and image.size >= _BEYOND_CACHES else max_pool_2x2(nnx.relu(image))


def _windows(image) -> jax.Array:
    """Return the windows of 2×2 pixels, [B, H // 2, 2, W // 2, 2, C]."""
    B, H, W, C = image.shape
    return image[:, : H // 2 * 2, : W // 2 * 2].reshape(B, H // 2, 2, W // 2, 2, C)


def _corners(image) -> list[jax.Array]:
    """Return the four pixels of each window, [B, H // 2, W // 2, C] each."""
    windows = _windows(image)
    return [windows[:, :, i, :, j] for i in range(2) for j in range(2)]


@jax.custom_vjp
def _relu_max_pool_2x2(image):
    return jnp.maximum(functools.reduce(jnp.maximum, _corners(image)), 0)


def _pooled(image):
    result = _relu_max_pool_2x2(image)
    return result, (image, result)


def _of_pooled(saved, g):
    image, result = saved
    B, H, W, C = image.shape
    is_largest = [((corner == result) & (result > 0)).astype(g.dtype) for corner in _corners(image)]
    shared = g / jnp.maximum(sum(is_largest), 1)
    a, b, c, d = (shared * each for each in is_largest)
    windows = jnp.stack([jnp.stack([a, b], axis=3), jnp.stack([c, d], axis=3)], axis=2)
    return (jnp.pad(windows.reshape(B, H // 2 * 2, W // 2 * 2, C), ((0, 0), (0, H % 2), (0, W % 2), (0, 0))),)


_relu_max_pool_2x2.defvjp(_pooled, _of_pooled)
