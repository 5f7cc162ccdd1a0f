"""Normalization and GELU for CPUs, against those of Flax and JAX, and their gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from platforms import traced_as

from jaxmodels.models.functional import merge, split
from jaxmodels.models.layers import gelu_exact
from jaxmodels.models.normalization import LayerNorm, RMSNorm

DRAW = np.random.default_rng(0)
LAYERS = {
    "layer": lambda: (LayerNorm(8, epsilon=1e-5, rngs=nnx.Rngs(0)), nnx.LayerNorm(8, epsilon=1e-5, rngs=nnx.Rngs(0))),
    "layer, no bias": lambda: (LayerNorm(8, use_bias=False, rngs=nnx.Rngs(0)), nnx.LayerNorm(8, use_bias=False, rngs=nnx.Rngs(0))),
    "root mean square": lambda: (RMSNorm(8, epsilon=0.1, rngs=nnx.Rngs(0)), nnx.RMSNorm(8, epsilon=0.1, rngs=nnx.Rngs(0))),
}


def run(module, params, x, dtype):
    graph, _, stats = split(module)

    def loss(params, x):
        y = merge(graph, jax.tree.map(lambda p: p.astype(dtype), params), stats)(x.astype(dtype))
        return (jnp.sin(3 * y.astype(jnp.float32)) * jnp.arange(1.0, y.size + 1).reshape(y.shape)).sum(), y

    return jax.value_and_grad(loss, (0, 1), has_aux=True)(params, x)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("shape", [(8,), (5, 8), (2, 3, 4, 8)])
def test_values_and_gradients_are_those_of_flax(name, shape):
    module, plain = LAYERS[name]()
    params = jax.tree.map(lambda p: p + jnp.asarray(DRAW.normal(size=p.shape), p.dtype), split(module)[1])
    x = jnp.asarray(1 + DRAW.normal(size=shape), jnp.float32)
    expected = run(plain, params, x, jnp.float32)
    with traced_as("cpu"):
        found = run(module, params, x, jnp.float32)
        assert "custom_vjp" in str(jax.make_jaxpr(module)(x))
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4 * float(jnp.abs(other).max())), found, expected)


@pytest.mark.parametrize("name", LAYERS)
def test_elsewhere_and_in_other_types_a_layer_is_that_of_flax(name):
    module, plain = LAYERS[name]()
    params, x = split(module)[1], jnp.asarray(DRAW.normal(size=(5, 8)), jnp.float32)
    for platform, dtype in (("tpu", jnp.float32), ("cpu", jnp.bfloat16)):
        with traced_as(platform):
            jax.tree.map(np.testing.assert_array_equal, run(module, params, x, dtype), run(plain, params, x, dtype))


def test_gelu_is_that_of_jax():
    x = jnp.linspace(-12, 12, 4001)
    value, gradient = jax.vmap(jax.value_and_grad(lambda x: jax.nn.gelu(x, approximate=False)))(x)
    with traced_as("cpu"):
        np.testing.assert_allclose(gelu_exact(x), value, atol=1e-6)  # of 1 + erf, rounded, times x
        np.testing.assert_allclose(jax.vmap(jax.grad(gelu_exact))(x), gradient, atol=1e-6)
    with traced_as("tpu"):
        np.testing.assert_array_equal(gelu_exact(x), value)
