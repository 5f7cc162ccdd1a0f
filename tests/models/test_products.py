"""Products with gradients for CPUs, against those of JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from platforms import traced_as

from jaxmodels.models.layers import Linear
from jaxmodels.models.products import product


@pytest.mark.parametrize("dtypes", [(jnp.float32, jnp.float32), (jnp.bfloat16, jnp.bfloat16), (jnp.float32, jnp.bfloat16)])
@pytest.mark.parametrize("shape", [(5, 3, 4), (5, 8), (8,), (2, 3, 2, 16)])
def test_values_and_gradients_are_those_of_jax(shape, dtypes):
    draw = np.random.default_rng(0).normal
    x, kernel = jnp.asarray(draw(size=shape), dtypes[0]), jnp.asarray(draw(size=(shape[-1], 8)), dtypes[1])

    def loss(x, kernel):
        return jnp.sin(product(x, kernel).astype(jnp.float32)).sum()

    plain = jax.value_and_grad(loss, (0, 1))(x, kernel)
    with traced_as("cpu"):
        ours = jax.value_and_grad(loss, (0, 1))(x, kernel)
        mapped = jax.vmap(jax.grad(loss, 1), (0, None))(x[None], kernel)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtypes[1] == jnp.float32 else {"rtol": 0.05, "atol": 0.05}
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        np.testing.assert_allclose(one.astype(jnp.float32), other.astype(jnp.float32), **tolerance)
    np.testing.assert_allclose(mapped[0].astype(jnp.float32), plain[1][1].astype(jnp.float32), **tolerance)


def test_elsewhere_a_layer_is_that_of_flax():
    """Also in forward mode, which the rule for CPUs lacks."""
    ours, theirs = Linear(3, 4, rngs=nnx.Rngs(0)), nnx.Linear(3, 4, rngs=nnx.Rngs(0))
    x = jnp.ones((2, 3))
    for platform in (None, "tpu"):
        with traced_as(platform) if platform else np.errstate():
            (y, change), (other, other_change) = (jax.jvp(layer, (x,), (x,)) for layer in (ours, theirs))
        np.testing.assert_array_equal(y, other)
        np.testing.assert_array_equal(change, other_change)
