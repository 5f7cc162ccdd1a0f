"""Matrix products whose gradients are fast on CPUs.

XLA's CPU compiler runs a product in one of two kernels, and is several times slower where an operand or the result has to be transposed. JAX derives
the gradient of a kernel W in x W as (gᵀ x)ᵀ over several axes of rows; XLA (jaxlib 0.10 and 0.12) computes that at a third of the speed of the same sum
over one axis. So for a CPU the gradient is written down. Other platforms, and what is not traced for a known platform, keep JAX's own rule, which also has a forward mode.
`benchmarks/products.py` measures both, and so tells when XLA no longer needs this.

Shapes: D width in, F width out.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxmodels.parallel.layout import traced_for


def dot_general(x: jax.Array, kernel: jax.Array, dimension_numbers: Any, precision: Any = None, out_sharding: Any = None, **options: Any) -> jax.Array:
    """The product of a linear layer, for the argument `dot_general` of `nnx.Linear`: x [..., D] times kernel [D, F] is [..., F]."""
    if kernel.ndim == 2 and precision is None and out_sharding is None and not options:
        return product(x, kernel)
    return jax.lax.dot_general(x, kernel, dimension_numbers, precision, out_sharding=out_sharding, **options)


def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Return x [..., D] times kernel [D, F]: [..., F], in the type that both are promoted to."""
    if not traced_for("cpu"):
        return x @ kernel
    dtype = jnp.result_type(x, kernel)
    return _product(x.astype(dtype), kernel.astype(dtype))


@jax.custom_vjp
def _product(x, kernel):
    return x @ kernel


def _forward(x, kernel):
    return x @ kernel, (x, kernel)


def _backward(saved, g):
    x, kernel = saved
    of_x = jax.lax.dot_general(g, kernel, (((g.ndim - 1,), (1,)), ((), ())))
    x, g = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
    rows = (((0,), (0,)), ((), ()))
    # The first operand is transposed, together with what it was computed from.
    return of_x, jax.lax.dot_general(x, g, rows) if x.shape[1] <= g.shape[1] else jax.lax.dot_general(g, x, rows).T


_product.defvjp(_forward, _backward)
