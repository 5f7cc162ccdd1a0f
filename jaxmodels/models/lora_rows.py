"""Several adapters (`models.lora`) on one copy of a model's weights: each row of a batch uses its own.

Adapter 0 is none: its matrices are zero. The others' are stacked after it, with zeros up to the largest rank and for layers that one of them lacks.
The number of each row's adapter is set while a function is traced (`use`), as a layout is; without it, all rows use none.

Shapes: B rows, D width in, F width out, R rank, A adapters and none.
"""

import contextlib
import contextvars
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmodels.models.layers import Linear, Output, first_scores
from jaxmodels.models.lora import LAYERS, MAGNITUDE, PAIR, factors, replace, take_over

_numbers: contextvars.ContextVar[jax.Array | None] = contextvars.ContextVar("adapters", default=None)


@contextlib.contextmanager
def use(numbers_B: jax.Array | None):
    """Let each row of what is traced inside the context use the adapter of this number."""
    token = _numbers.set(numbers_B)
    try:
        yield
    finally:
        _numbers.reset(token)


class LinearByRow(Linear):
    """A linear layer with adapters: (x W + x A_n B_n) · m_n + b, where n is the row's, and m_n are DoRA's factors on the columns."""

    def __init__(self, linear: nnx.Linear, lora_a: jax.Array, lora_b: jax.Array, factor: jax.Array | None):
        """lora_a: [A, D, R], lora_b: [A, R, F], scaled; factor: [A, F], None for all 1. Stacked layers have a leading axis."""
        take_over(self, linear)
        self.lora_a, self.lora_b, self.lora_m = nnx.Param(lora_a), nnx.Param(lora_b), None if factor is None else nnx.Param(factor)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x: [B, ..., D]. Returns [B, ..., F]."""
        y, numbers_B = super().__call__(x), _numbers.get()
        if numbers_B is None:
            return y
        a_BDR, b_BRF = (jnp.take(part[...], numbers_B, axis=0) for part in (self.lora_a, self.lora_b))
        change = jnp.einsum("b...r,brf->b...f", jnp.einsum("b...d,bdr->b...r", x, a_BDR), b_BRF)
        if self.lora_m is None:
            return y + change
        bias = 0 if self.bias is None else self.bias[...]
        factor_BF = jnp.take(self.lora_m[...], numbers_B, axis=0)
        return (y - bias + change) * factor_BF.reshape(len(factor_BF), *(1,) * (y.ndim - 2), -1) + bias


class OutputByRow(LinearByRow):
    """A scoring of tokens (`layers.Output`) with adapters."""

    def __call__(self, x: jax.Array) -> jax.Array:
        """x: [B, ..., D]. Returns [B, ..., V]."""
        return first_scores(super().__call__(x), self.tokens)


def add(model: nnx.Module, adapters: Sequence[tuple[Mapping[str, jax.Array], float]]) -> None:
    """Add adapters to a model, which then holds them in the order given, as 1, 2, ….

    Args:
      model: changed in place.
      adapters: the parameters of each, path -> array as `lora.add_lora` names them, and the factor on its products.

    Raises:
      ValueError: an adapter is on a layer that is not linear.
    """
    layers = {"/".join(map(str, path)): (path, module) for path, module in nnx.iter_modules(model) if type(module) in LAYERS}
    for name in sorted({path.rpartition("/")[0] for params, _ in adapters for path in params}):
        path, layer = layers[name]
        if type(layer) not in (Linear, nnx.Linear, Output):
            raise ValueError(f"{name} is an embedding, whose adapters are not served by row")
        rank = max(x.shape[-1] for params, _ in adapters for key, x in params.items() if key == f"{name}/{PAIR[0]}")
        made = [_of_layer(layer.kernel[...], params, name, scale, rank) for params, scale in [({}, 1.0), *adapters]]
        lora_a, lora_b, factor = zip(*made, strict=True)
        plain = all(f"{name}/{MAGNITUDE}" not in params for params, _ in adapters)
        kind = OutputByRow if type(layer) is Output else LinearByRow
        replace(model, path, kind(layer, jnp.stack(lora_a, -3), jnp.stack(lora_b, -3), None if plain else jnp.stack(factor, -2)))


def _of_layer(kernel, params, name, scale, rank):
    """Return an adapter's two matrices, the second scaled, with zeros up to a rank, and its factors on the columns."""
    *stack, width_in, width_out = kernel.shape
    a, b = (params.get(f"{name}/{part}") for part in PAIR)
    if a is None:
        zeros = jnp.zeros((*stack, width_in, rank)), jnp.zeros((*stack, rank, width_out))
        return *zeros, jnp.ones((*stack, width_out))
    magnitude = params.get(f"{name}/{MAGNITUDE}")
    factor = jnp.ones((*stack, width_out)) if magnitude is None else factors(kernel + scale * jnp.matmul(a, b, precision="highest"), magnitude)
    missing = rank - a.shape[-1]
    nothing = [(0, 0)] * len(stack)
    return jnp.pad(a, [*nothing, (0, 0), (0, missing)]), jnp.pad(scale * b, [*nothing, (0, missing), (0, 0)]), factor
