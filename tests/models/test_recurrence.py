"""The loop over time for CPUs, and its gradient, against JAX's gradient of the plain loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from platforms import traced_as

from jaxmodels.models.functional import merge, split
from jaxmodels.models.rnn import GRU, LSTM

B, T, D, H = 3, 7, 4, 5
DRAW = np.random.default_rng(0)
X = jnp.asarray(DRAW.normal(size=(B, T, D)), jnp.float32)
MASKS = {"valid": jnp.asarray(DRAW.random((B, T)) < 0.7), "restart": jnp.asarray(DRAW.random((B, T)) < 0.3)}


@pytest.mark.parametrize("layer", [LSTM, GRU])
@pytest.mark.parametrize("masks", [(), ("valid",), ("restart",), ("valid", "restart")], ids="+".join)
@pytest.mark.parametrize(("reverse", "unroll"), [(False, 1), (True, 3)])
def test_outputs_states_and_gradients_are_those_of_the_plain_loop(layer, masks, reverse, unroll):
    graph, params, stats = split(layer(D, H, unroll=unroll, rngs=nnx.Rngs(0)))
    draw = np.random.default_rng(1)
    params = jax.tree.map(lambda x: x + 0.3 * draw.normal(size=x.shape).astype(x.dtype), params)
    state = jax.tree.map(lambda x: jnp.asarray(draw.normal(size=x.shape), x.dtype), merge(graph, params, stats).initial_state(B))
    options = {name: MASKS[name] for name in masks} | {"reverse": reverse}

    def loss(params, x, state):
        outputs, last = merge(graph, params, stats)(x, state, **options)
        weighted = jax.tree.map(lambda y: jnp.sum(y * jnp.sin(1.0 + jnp.arange(y.size).reshape(y.shape))), (outputs, last))
        return sum(jax.tree.leaves(weighted)), (outputs, last)

    run = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)
    plain = jax.jit(run)(params, X, state)
    with traced_as("cpu"):
        program = jax.make_jaxpr(loss)(params, X, state)
        ours = jax.jit(lambda *args: run(*args))(params, X, state)
    assert "custom_vjp" in str(program)
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5), ours, plain)


@pytest.mark.parametrize("layer", [LSTM, GRU])
def test_the_state_has_the_type_of_the_gates(layer):
    outputs, last = jax.eval_shape(lambda x: layer(D, H, rngs=nnx.Rngs(0))(x), jax.ShapeDtypeStruct((B, T, D), jnp.bfloat16))
    assert {x.dtype for x in jax.tree.leaves((outputs, last))} == {jnp.dtype(jnp.float32)}
