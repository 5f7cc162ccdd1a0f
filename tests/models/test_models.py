"""Models against independent computations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from platforms import traced_as

from jaxmodels.models import create
from jaxmodels.models.cnn import CNN
from jaxmodels.models.functional import merge, new_rngs, split
from jaxmodels.models.layers import dropout, max_pool_2x2, relu_max_pool_2x2
from jaxmodels.models.rnn import GRU, LSTM, RecurrentLM
from jaxmodels.models.transformer import Decoder


def count(model):
    return sum(x.size for x in jax.tree.leaves(split(model)[1]))


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("gpt2", 124_439_808), ("gpt2-medium", 354_823_168), ("gpt2-large", 774_030_080), ("gpt2-xl", 1_557_611_200)],
)
@pytest.mark.parametrize("scan", [False, True])
def test_gpt2_sizes_have_the_published_parameter_counts(name, parameters, scan):
    # Published: the sizes of the checkpoints of Radford et al. 2019 with tied embeddings.
    assert count(nnx.eval_shape(lambda: create(name, 50257, scan=scan, rngs=new_rngs(0)))) == parameters


def test_cnn_is_two_convolutions_two_poolings_and_two_dense_layers():
    model = CNN((8, 8, 1), 10, rngs=nnx.Rngs(0))
    assert count(model) == (9 * 32 + 32) + (9 * 32 * 64 + 64) + (2 * 2 * 64 * 64 + 64) + (64 * 10 + 10)
    image = np.random.default_rng(0).normal(size=(3, 8, 8, 1)).astype(np.float32)
    x = image
    for layer in model.convolutions:
        kernel, bias = np.asarray(layer.kernel[...]), np.asarray(layer.bias[...])
        padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        height, width = x.shape[1:3]
        x = sum(padded[:, i : i + height, j : j + width] @ kernel[i, j] for i in range(3) for j in range(3)) + bias
        x = np.maximum(x, 0).reshape(3, height // 2, 2, width // 2, 2, -1).max(axis=(2, 4))
    x = np.maximum(x.reshape(3, -1) @ np.asarray(model.hidden.kernel[...]) + np.asarray(model.hidden.bias[...]), 0)
    expected = x @ np.asarray(model.output.kernel[...]) + np.asarray(model.output.bias[...])
    np.testing.assert_allclose(model(image), expected, atol=1e-5)


@pytest.mark.parametrize("size", [(4, 6), (5, 7)])
def test_max_pool_2x2_is_max_pooling(size):
    x = jax.random.normal(jax.random.key(0), (2, *size, 3))
    pool = functools.partial(nnx.max_pool, window_shape=(2, 2), strides=(2, 2))
    np.testing.assert_array_equal(max_pool_2x2(x), pool(x))
    one, other = (jax.grad(lambda x, f=f: (f(x) ** 3).sum())(x) for f in (max_pool_2x2, pool))
    np.testing.assert_allclose(one, other, rtol=1e-6)


@pytest.mark.parametrize("size", [(4, 6), (5, 7)])
@pytest.mark.parametrize("coarse", [False, True])  # with equal maxima, which share the gradient
def test_relu_and_max_pooling_for_cpus_are_those_of_jax(size, coarse, monkeypatch):
    monkeypatch.setattr("jaxmodels.models.layers._BEYOND_CACHES", 0)
    x = jax.random.normal(jax.random.key(0), (2, *size, 3))
    x = jnp.round(2 * x) + 0.1 if coarse else x
    one, other = (jax.value_and_grad(lambda x, f=f: (jnp.sin(3 * f(x))).sum()) for f in (relu_max_pool_2x2, lambda x: max_pool_2x2(nnx.relu(x))))
    with traced_as("cpu"):
        found = one(x)
        assert "custom_vjp" in str(jax.make_jaxpr(relu_max_pool_2x2)(x))
    jax.tree.map(lambda ours, plain: np.testing.assert_allclose(ours, plain, rtol=1e-5, atol=1e-6), found, other(x))


def numpy_gpt2(p, tokens, heads):
    """GPT-2's forward pass, written from the paper's description, in float64."""

    def norm(x, layer):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return x * layer["scale"] + layer["bias"]

    def linear(x, layer):
        return x @ layer["kernel"] + layer["bias"]

    x = p["embed"]["embedding"][tokens] + p["positions"]["embedding"][: tokens.shape[1]]
    for i in range(len(p["blocks"])):
        b = p["blocks"][str(i)]
        q, k, v = (linear(norm(x, b["attention_norm"]), b["attention"][name]) for name in ("query", "key", "value"))
        parts = []
        for h in range(heads):
            at = slice(h * q.shape[-1] // heads, (h + 1) * q.shape[-1] // heads)
            scores = q[..., at] @ k[..., at].swapaxes(1, 2) / np.sqrt(q.shape[-1] / heads)
            scores = np.where(np.tri(tokens.shape[1], dtype=bool), scores, -np.inf)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            parts.append(weights / weights.sum(-1, keepdims=True) @ v[..., at])
        x = x + linear(np.concatenate(parts, -1), b["attention"]["out"])
        h = linear(norm(x, b["mlp_norm"]), b["mlp"]["up"])
        h = 0.5 * h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
        x = x + linear(h, b["mlp"]["down"])
    return norm(x, p["final_norm"]) @ p["embed"]["embedding"].T


def perturbed(model, seed):
    """Return the model with noise on every parameter, because initial zeros and ones hide errors."""
    graph, params, stats = split(model)
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    leaves = [x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return merge(graph, jax.tree.unflatten(tree, leaves), stats)


def test_decoder_equals_gpt2_in_numpy():
    model = perturbed(Decoder(17, context=12, layers=2, heads=3, width=12, rngs=nnx.Rngs(0)), 1)
    tokens = np.random.default_rng(0).integers(0, 17, (2, 10))
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), split(model)[1])
    np.testing.assert_allclose(model(tokens), numpy_gpt2(params, tokens, 3), atol=2e-5)


@functools.cache
def decoder_outputs(scan, remat):
    """Logits, and the gradient of their sum of squares with dropout on, in the unrolled layout."""
    plain = perturbed(Decoder(17, context=8, layers=3, heads=2, width=8, dropout=0.2, rngs=nnx.Rngs(0)), 1)
    model = Decoder(17, context=8, layers=3, heads=2, width=8, dropout=0.2, scan=scan, remat=remat, rngs=nnx.Rngs(0))
    params = dict(split(plain)[1])
    if scan:
        params["blocks"] = jax.tree.map(lambda *x: jnp.stack(x), *(params["blocks"][str(i)] for i in range(3)))
    graph, _, stats = split(model)
    tokens = jnp.arange(16).reshape(2, 8)

    def loss(params):
        return jnp.sum(merge(graph, params, stats)(tokens, rngs=nnx.Rngs(dropout=5)) ** 2)

    value, gradient = jax.jit(jax.value_and_grad(loss))(params)
    if scan:
        gradient["blocks"] = {str(i): jax.tree.map(lambda x: x[i], gradient["blocks"]) for i in range(3)}  # noqa: B023
    return value, gradient


@pytest.mark.parametrize(("scan", "remat"), [(True, "none"), (False, "full"), (True, "dots"), (True, "dots_no_batch")])
def test_scanned_and_rematerialised_layers_are_the_same_function(scan, remat):
    for one, other in zip(jax.tree.leaves(decoder_outputs(scan, remat)), jax.tree.leaves(decoder_outputs(False, "none")), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("name", ["gpt", "lstm", "gru"])
def test_language_models_do_not_see_the_future(name):
    options = {"context": 8, "width": 8, "heads": 2} if name == "gpt" else {"width": 8}
    model = create(name, 11, **options, rngs=nnx.Rngs(0))
    tokens = jnp.arange(8)[None]
    changed = tokens.at[0, 5].set(9)
    before, after = model(tokens), model(changed)
    np.testing.assert_array_equal(before[:, :5], after[:, :5])
    assert jnp.abs(before[:, 5:] - after[:, 5:]).max() > 1e-4


def test_lstm_equals_flax_cell_by_cell():
    ours = perturbed(LSTM(5, 7, rngs=nnx.Rngs(0)), 1)
    theirs = nnx.LSTMCell(5, 7, rngs=nnx.Rngs(0))
    kernel, bias, recurrent = ours.input.kernel[...], ours.input.bias[...], ours.recurrent[...]
    for i, gate in enumerate("ifgo"):
        at = slice(7 * i, 7 * (i + 1))
        getattr(theirs, "if_" if gate == "f" else f"i{gate}").kernel[...] = kernel[:, at]
        getattr(theirs, f"h{gate}").kernel[...] = recurrent[:, at]
        getattr(theirs, f"h{gate}").bias[...] = bias[at]
    x = jax.random.normal(jax.random.key(2), (3, 6, 5))
    state = (jnp.zeros((3, 7)), jnp.zeros((3, 7)))
    expected = []
    for t in range(6):
        state, y = theirs(state, x[:, t])
        expected.append(y)
    outputs, (hidden, cell) = ours(x)
    np.testing.assert_allclose(outputs, jnp.stack(expected, 1), atol=1e-5)
    np.testing.assert_allclose(cell, state[0], atol=1e-5)
    np.testing.assert_allclose(hidden, state[1], atol=1e-5)


def test_gru_equals_flax_cell_by_cell():
    ours = perturbed(GRU(5, 7, rngs=nnx.Rngs(0)), 1)
    ours.recurrent_bias[...] = jnp.zeros(7)  # Flax has none inside the reset gate
    theirs = nnx.GRUCell(5, 7, rngs=nnx.Rngs(0))
    theirs.dense_i.kernel[...], theirs.dense_i.bias[...] = ours.input.kernel[...], ours.input.bias[...]
    theirs.dense_h.kernel[...] = ours.recurrent[...]
    x = jax.random.normal(jax.random.key(2), (3, 6, 5))
    hidden, expected = jnp.zeros((3, 7)), []
    for t in range(6):
        hidden, y = theirs(hidden, x[:, t])
        expected.append(y)
    outputs, last = ours(x)
    np.testing.assert_allclose(outputs, jnp.stack(expected, 1), atol=1e-5)
    np.testing.assert_allclose(last, hidden, atol=1e-5)


def test_the_bias_inside_the_reset_gate_of_a_gru():
    gru = perturbed(GRU(5, 7, rngs=nnx.Rngs(0)), 1)
    x, hidden = jnp.ones((2, 1, 5)), jnp.full((2, 7), 0.3)
    r, z, n = jnp.split(gru.input(x[:, 0]), 3, axis=-1)
    hr, hz, hn = jnp.split(hidden @ gru.recurrent[...], 3, axis=-1)
    r, z = jax.nn.sigmoid(r + hr), jax.nn.sigmoid(z + hz)
    expected = (1 - z) * jnp.tanh(n + r * (hn + gru.recurrent_bias[...])) + z * hidden
    np.testing.assert_allclose(gru(x, hidden)[1], expected, atol=1e-6)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_a_recurrent_model_continues_from_its_state(cell):
    model = RecurrentLM(11, cell=cell, width=8, unroll=2, rngs=nnx.Rngs(0))
    tokens = jnp.arange(20).reshape(2, 10) % 11
    whole, last = model.with_state(tokens, None)
    first, state = model.with_state(tokens[:, :4], None)
    second, state = model.with_state(tokens[:, 4:], state)
    np.testing.assert_allclose(whole, jnp.concatenate([first, second], 1), atol=1e-5)
    for one, other in zip(jax.tree.leaves(last), jax.tree.leaves(state), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_dropout_keeps_the_mean_and_is_off_without_rngs():
    x = jnp.ones((200, 200))
    dropped = dropout(x, 0.25, nnx.Rngs(dropout=0))
    assert abs(float((dropped == 0).mean()) - 0.25) < 0.02
    assert abs(float(dropped.mean()) - 1.0) < 0.02
    assert dropout(x, 0.25, None) is x


@pytest.mark.parametrize("arguments", [{"width": 10, "heads": 3}, {"tie_embeddings": True, "embedding": 4, "cell": "gru", "width": 8}])
def test_sizes_that_do_not_fit_are_refused(arguments):
    model = Decoder if "heads" in arguments else RecurrentLM
    with pytest.raises(ValueError):
        model(11, **arguments, rngs=nnx.Rngs(0))


def test_models_compute_in_the_type_of_their_parameters():
    for model, batch in [
        (create("cnn", (8, 8, 1), 10, rngs=nnx.Rngs(0)), jnp.ones((2, 8, 8, 1))),
        (create("gpt", 11, context=8, width=8, heads=2, rngs=nnx.Rngs(0)), jnp.ones((2, 4), int)),
        (create("lstm", 11, width=8, rngs=nnx.Rngs(0)), jnp.ones((2, 4), int)),
    ]:
        graph, params, stats = split(model)
        half = merge(graph, jax.tree.map(lambda x: x.astype(jnp.bfloat16), params), stats)
        assert half(batch).dtype == jnp.bfloat16
