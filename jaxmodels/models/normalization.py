"""Normalization of vectors, with a gradient that is fast on CPUs.

JAX's gradient of the usual formula makes XLA's CPU compiler (jaxlib 0.10) write arrays of the input's size for each statistic that is broadcast, and for each
sum. Here all sums over the width, and over the rows, are products with vectors, and one pass computes the gradient of the input from them. With the
normalized x̂ = (x - mean) / deviation, the scale s and the gradient g of the result, that is

    (g s - mean(g s) - x̂ mean(g s x̂)) / deviation    of the input, and  Σ g x̂, Σ g  of scale and bias, over all rows.

Other platforms, other types than float32, and what is not traced for a known platform keep Flax's own.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmodels.parallel.layout import traced_for


class LayerNorm(nnx.LayerNorm):
    """`nnx.LayerNorm` (Ba et al. 2016) of the last axis."""

    def __call__(self, x: jax.Array) -> jax.Array:
        """x: [..., width]. Return the same shape."""
        if not _here(x, self.scale[...]):
            return super().__call__(x)
        return _normalize((self.epsilon, True), x, self.scale[...], None if self.bias is None else self.bias[...])


class RMSNorm(nnx.RMSNorm):
    """`nnx.RMSNorm` (Zhang and Sennrich 2019) of the last axis."""

    def __call__(self, x: jax.Array) -> jax.Array:
        """x: [..., width]. Return the same shape."""
        return _normalize((self.epsilon, False), x, self.scale[...], None) if _here(x, self.scale[...]) else super().__call__(x)


def _here(x, scale) -> bool:
    return traced_for("cpu") and x.dtype == scale.dtype == jnp.float32


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _normalize(options, x, scale, bias):
    return _forward(options, x, scale, bias)[0]


def _forward(options, x, scale, bias):
    epsilon, centred = options
    mean = jnp.mean(x, axis=-1, keepdims=True) if centred else 0.0
    variance = jnp.maximum(0.0, jnp.mean(x * x, axis=-1, keepdims=True) - mean * mean)
    inverse = jax.lax.rsqrt(variance + epsilon)
    y = (x - mean) * inverse * scale
    return y if bias is None else y + bias, (x, mean, inverse, scale, bias)


def _backward(options, saved, g):
    x, mean, inverse, scale, bias = saved
    centred, width = options[1], x.shape[-1]
    gx = g * x
    of_scaled, of_products = (g @ scale)[..., None], (gx @ scale)[..., None]
    along = (of_products - mean * of_scaled) * inverse / width
    of_x = inverse * (g * scale - (of_scaled / width if centred else 0.0) - (x - mean) * inverse * along)
    of_scale = _over_rows(inverse, gx) - (_over_rows(mean * inverse, g) if centred else 0.0)
    return of_x, of_scale, None if bias is None else _over_rows(jnp.ones_like(inverse), g)


def _over_rows(weight, x):
    """Return the sum of rows x [..., width] times their weights [..., 1]."""
    rows = tuple(range(x.ndim - 1))
    return jax.lax.dot_general(weight[..., 0], x, ((rows, rows), ((), ())))


_normalize.defvjp(_forward, _backward)
