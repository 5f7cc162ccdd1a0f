"""Recurrent layers, encoders and encoder–decoders: padding, directions, attention, and cuDNN's order of parameters."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental import rnn as jax_rnn

from jaxmodels.generation import decoding
from jaxmodels.models import create, cudnn
from jaxmodels.models.functional import merge, split
from jaxmodels.models.recurrent import RecurrentEncoder, RecurrentSeq2Seq
from jaxmodels.models.rnn import CELLS, Recurrent, RecurrentLM, resolve_implementation


def drawn(build):
    """Return a module with all parameters drawn by NumPy, including biases, without compilation."""
    graph, params, stats = split(nnx.eval_shape(lambda: build(rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(1)
    return merge(graph, jax.tree.map(lambda p: jnp.asarray(rng.normal(0, 0.5, p.shape), p.dtype), params), stats)


def numpy_layer(cell, x, kind):
    """Return the outputs [T, H] for one row without padding, by the papers' equations, in float64."""
    kernel, bias, recurrent = (np.asarray(p[...], np.float64) for p in (cell.input.kernel, cell.input.bias, cell.recurrent))
    sigmoid = lambda a: 1 / (1 + np.exp(-a))  # noqa: E731
    hidden = memory = np.zeros(cell.width)
    outputs = []
    for row in np.asarray(x, np.float64):
        if kind == "lstm":
            i, f, g, o = np.split(row @ kernel + bias + hidden @ recurrent, 4)
            memory = sigmoid(f) * memory + sigmoid(i) * np.tanh(g)
            hidden = sigmoid(o) * np.tanh(memory)
        else:
            (r, z, n), (hr, hz, hn) = np.split(row @ kernel + bias, 3), np.split(hidden @ recurrent, 3)
            r, z = sigmoid(r + hr), sigmoid(z + hz)
            n = np.tanh(n + r * (hn + np.asarray(cell.recurrent_bias[...], np.float64)))
            hidden = (1 - z) * n + z * hidden
        outputs.append(hidden)
    return np.stack(outputs)


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_padding_does_not_change_a_layer_in_either_direction(kind):
    layer = drawn(functools.partial(Recurrent, 5, 4, cell=kind, bidirectional=True))
    x = jax.random.normal(jax.random.key(2), (3, 6, 5))
    valid = jnp.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [0, 1, 0, 1, 1, 0]], bool)
    outputs, ((ahead, back),) = jax.jit(lambda x: layer(x, valid=valid))(x)
    assert not np.asarray(outputs)[~np.asarray(valid)].any()
    for row in range(3):
        real = np.asarray(x[row])[np.asarray(valid[row])]
        forward = numpy_layer(layer.forward[0], real, kind)
        backward = numpy_layer(layer.backward[0], real[::-1], kind)
        np.testing.assert_allclose(np.asarray(outputs)[row][np.asarray(valid[row])], np.concatenate([forward, backward[::-1]], 1), atol=1e-5)
        last = (ahead[0], back[0]) if kind == "lstm" else (ahead, back)
        np.testing.assert_allclose(last[0][row], forward[-1], atol=1e-5)
        np.testing.assert_allclose(last[1][row], backward[-1], atol=1e-5)


TOKENS = np.array([[3, 1, 4, 1, 5], [2, 7, -1, -1, -1], [-1, -1, -1, -1, -1]], np.int32)
PADDED = np.pad(TOKENS, ((0, 0), (0, 3)), constant_values=-1)


@pytest.mark.parametrize(
    ("head", "pool"), [(("class", 3), "max"), (("class", 3), "mean"), (("value", 1), "last"), (("class", 3), "attention"), (("tags", 4), "max")]
)
def test_padding_does_not_change_an_encoder(head, pool):
    model = drawn(functools.partial(RecurrentEncoder, 9, head, width=4, pool=pool))
    short, long = (np.asarray(jax.jit(lambda tokens: model(tokens))(tokens)) for tokens in (TOKENS, PADDED))
    if head[0] == "tags":
        assert short.shape == (3, 5, 4)
        short, long = short[TOKENS >= 0], long[PADDED >= 0]
    else:
        assert short.shape == (3, head[1])
    np.testing.assert_allclose(short, long, atol=1e-6)
    assert np.isfinite(long).all()  # also for a row without a token
    assert np.ptp(short[:2], axis=0).min() > 1e-4


def test_a_row_without_a_token_has_gradients():
    model = drawn(functools.partial(RecurrentEncoder, 9, ("class", 3), width=4, pool="attention"))
    graph, params, stats = split(model)
    gradient = jax.jit(jax.grad(lambda params: jnp.sum(merge(graph, params, stats)(TOKENS) ** 2)))(params)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradient)) and np.abs(gradient["head"]["score"]["kernel"]).max() > 0


def test_pools_equal_their_definitions():
    models = {p: drawn(functools.partial(RecurrentEncoder, 9, ("class", 2), width=4, pool=p)) for p in ("max", "mean", "last")}
    model = models["max"]
    valid = TOKENS[:2] >= 0
    x, (states,) = model.encoder(model.embed(TOKENS[:2]), valid=valid)
    rows = [np.asarray(x)[i][valid[i]] for i in range(2)]
    wanted = {
        "max": np.stack([row.max(0) for row in rows]),
        "mean": np.stack([row.mean(0) for row in rows]),
        "last": np.concatenate([states[0][0], states[1][0]], -1),
    }
    for pool, pooled in wanted.items():
        np.testing.assert_allclose(models[pool](TOKENS[:2]), models[pool].head.output(pooled), atol=1e-6)


def test_head_parameters_are_under_head():
    model = drawn(functools.partial(RecurrentEncoder, 9, ("class", 3), width=4, pool="attention"))
    other = drawn(functools.partial(RecurrentEncoder, 9, ("tokens", 9), width=4))
    paths = [{path for path, _ in nnx.to_flat_state(nnx.state(m, nnx.Param))} for m in (model, other)]
    assert {p for p in paths[0] if p[0] != "head"} == {p for p in paths[1] if p[0] != "head"}
    assert {p[1] for p in paths[0] if p[0] == "head"} == {"score", "output"}


@pytest.mark.parametrize("bidirectional", [False, True])
def test_parameters_are_passed_in_cudnns_order(bidirectional):
    layer = drawn(functools.partial(Recurrent, 5, 4, bidirectional=bidirectional))
    cells = [layer.forward[0]] + ([layer.backward[0]] if bidirectional else [])
    weights = cudnn.pack(cells)
    assert weights.size == jax_rnn.get_num_params_in_lstm(5, 4, 1, bidirectional)
    x = jax.random.normal(jax.random.key(2), (3, 6, 5))
    lengths = jnp.array([6, 3, 1], jnp.int32)
    zeros = jnp.zeros((len(cells), 3, 4))
    expected = jax_rnn.lstm_ref(x, zeros, zeros, *jax_rnn.unpack_lstm_weights(weights, 5, 4, 1, bidirectional), lengths, 5, 4, 1, 0.0, bidirectional)
    outputs, (states,) = layer(x, valid=jnp.arange(6) < lengths[:, None])
    np.testing.assert_allclose(outputs, expected[0], atol=1e-5)
    for i, (hidden, cell) in enumerate(states):
        np.testing.assert_allclose(hidden, expected[1][i], atol=1e-5)
        np.testing.assert_allclose(cell, expected[2][i], atol=1e-5)


def test_the_layer_that_calls_cudnn_equals_the_xla_one(monkeypatch):
    """With JAX's reference instead of the kernel: lengths, states, empty rows and outputs."""

    def reference(x, hidden, cell, weights, lengths, width_in, width, layers, rate, both):
        parts = jax_rnn.unpack_lstm_weights(weights, width_in, width, layers, both)
        return jax_rnn.lstm_ref(x, hidden, cell, *parts, lengths, width_in, width, layers, rate, both)

    monkeypatch.setattr(cudnn.rnn, "lstm", reference)
    layer = drawn(functools.partial(Recurrent, 5, 4, bidirectional=True, layers=2))
    x = jax.random.normal(jax.random.key(2), (3, 6, 5))
    valid = jnp.arange(6) < jnp.array([6, 0, 4])[:, None]
    state = tuple(tuple((0.1 * jnp.ones((3, 4)), -0.2 * jnp.ones((3, 4))) for _ in range(2)) for _ in range(2))
    ours = layer(x, state, valid=valid)
    layer.kernel = "cudnn"
    for one, other in zip(jax.tree.leaves(layer(x, state, valid=valid)), jax.tree.leaves(ours), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    with pytest.raises(ValueError, match="float32"):
        layer(x.astype(jnp.bfloat16))


@pytest.mark.parametrize(("options", "message"), [({"kernel": "cudnn"}, "needs a GPU"), ({"kernel": "cudnn", "cell": "gru"}, "LSTMs only")])
@pytest.mark.parametrize("name", ["lstm", "lstm_encoder", "lstm_seq2seq"])
def test_cudnn_is_an_error_if_it_cannot_run(name, options, message):
    arguments = (9, ("class", 2)) if name == "lstm_encoder" else (9,)
    with pytest.raises(ValueError, match=message):
        create(name, *arguments, **options, width=4, rngs=nnx.Rngs(0))


def test_the_kernel_is_resolved_before_compiling():
    model = nnx.eval_shape(lambda: RecurrentEncoder(9, ("value", 1), width=4, rngs=nnx.Rngs(0)))
    assert resolve_implementation(model, "cpu")["used"] == "xla"
    model.encoder.kernel = "cudnn"  # as on a GPU
    assert resolve_implementation(model, "gpu")["used"] == "cudnn"
    for options, message in (
        ({"platform": "cpu"}, "needs a GPU"),
        ({"platform": "gpu", "dtype": jnp.bfloat16}, "float32, not bfloat16"),
    ):
        with pytest.raises(ValueError, match=message):
            resolve_implementation(model, **options)
    assert resolve_implementation(nnx.eval_shape(lambda: nnx.Linear(2, 2, rngs=nnx.Rngs(0))), "cpu") == {}


def test_packed_sequences_reset_the_state():
    model = drawn(functools.partial(RecurrentLM, 9, layers=2, width=4))
    tokens, segments = jnp.array([[3, 1, 4, 1, 5, 2]]), jnp.array([[7, 7, 8, 8, 8, 8]])
    packed = model(tokens, segments=segments)
    np.testing.assert_allclose(packed, jnp.concatenate([model(tokens[:, :2]), model(tokens[:, 2:])], axis=1), atol=1e-6)
    assert np.abs(packed - model(tokens))[:, 2:].max() > 1e-3


@functools.cache
def seq2seq(kind):
    return drawn(functools.partial(RecurrentSeq2Seq, 9, cell=kind, layers=2 if kind == "lstm" else 1, width=4))


TARGET = np.array([[0, 4, 2, 6], [0, 5, -1, -1]], np.int32)


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_a_decoder_sees_the_whole_source_and_no_padding(kind):
    model = seq2seq(kind)
    call = jax.jit(lambda source, target: model(source, target))
    short, long = call(TOKENS[:2], TARGET), call(PADDED[:2], np.pad(TARGET, ((0, 0), (0, 2)), constant_values=-1))
    real = TARGET >= 0
    np.testing.assert_allclose(short[real], long[:, :4][real], atol=1e-6)
    later = call(TOKENS[:2], np.where(np.arange(4) == 2, 8, TARGET))
    np.testing.assert_array_equal(short[:, :2], later[:, :2])  # the future changes nothing
    for place in (0, 4):  # every token of the source does
        changed = TOKENS[:2].copy()
        changed[0, place] = 8
        assert np.abs(call(changed, TARGET)[0] - short[0]).min(axis=-1).max() > 1e-6


def test_attention_is_luongs_in_numpy():
    model = seq2seq("lstm")
    memory = model.encode(TOKENS[:2])
    logits = model.decode(TARGET, memory)
    h, _ = model.decoder(model.embed(TARGET), ((tuple(memory["states"][:2]),), (tuple(memory["states"][2:]),)))
    for row, position in ((0, 3), (1, 1)):
        s = np.asarray(memory["outputs"][row])[TOKENS[row] >= 0]
        scores = s @ (np.asarray(h[row, position]) @ np.asarray(model.score.kernel[...]))
        weights = np.exp(scores) / np.exp(scores).sum()
        attended = np.tanh(np.concatenate([weights @ s, h[row, position]]) @ model.combine.kernel[...] + model.combine.bias[...])
        np.testing.assert_allclose(logits[row, position], attended @ model.output.kernel[...] + model.output.bias[...], atol=1e-5)


class WithoutStates:
    """The same model with only `encode` and `decode`."""

    def __init__(self, model):
        self.encode, self.decode = model.encode, model.decode


@pytest.mark.parametrize("shortcut", [True, False])
def test_greedy_decoding_is_a_loop_over_tokens(shortcut):
    model = seq2seq("lstm")
    source = np.random.default_rng(0).integers(0, 9, (6, 5)).astype(np.int32)
    length, start = 7, 0
    target = np.full((6, 1), start, np.int32)
    call = jax.jit(lambda source, target: model(source, target))
    for _ in range(length):
        padded = np.pad(target, ((0, 0), (0, length + 1 - target.shape[1])), constant_values=-1)
        chosen = np.argmax(np.asarray(call(source, padded))[:, target.shape[1] - 1], axis=-1)
        target = np.concatenate([target, chosen[:, None].astype(np.int32)], axis=1)
    end = int(target[0, 3])  # a token that occurs
    expected = [row[: row.index(end) + 1] + [-1] * (length - row.index(end) - 1) if end in row else row for row in target[:, 1:].tolist()]
    assert any(-1 in row for row in expected)
    decode = jax.jit(lambda source: decoding.greedy(model if shortcut else WithoutStates(model), source, length, start=start, end=end))
    np.testing.assert_array_equal(decode(source), expected)


def test_cells_by_name():
    models = [nnx.eval_shape(lambda n=n: create(f"{n}_encoder", 9, ("value", 1), width=4, rngs=nnx.Rngs(0))) for n in CELLS]
    assert [type(m.encoder.forward[0]) for m in models] == list(CELLS.values())
