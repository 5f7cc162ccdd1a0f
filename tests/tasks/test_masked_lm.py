"""Masked language modelling: the selected tokens, and a loss of only these."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmodels.errors import ConfigError
from jaxmodels.tasks.masked_lm import MaskedLM

VOCAB, MASK, SPECIAL = 100, 3, {"unknown": 0, "start": 1, "end": 2, "mask": 3}


def make_task(**options):
    tokenizer = types.SimpleNamespace(special=SPECIAL.get)
    return MaskedLM({"vocab_size": VOCAB, "tokenizer": tokenizer}, **options)


def text_rows(rows=200, length=96, seed=0):
    """Rows of tokens 4..99 that start with <start>, end with <end>, and are padded to different lengths."""
    random = np.random.default_rng(seed)
    tokens = random.integers(4, VOCAB, (rows, length)).astype(np.int32)
    ends = random.integers(3, length, rows)
    tokens[:, 0] = 1
    tokens[np.arange(rows), ends] = 2
    tokens[np.arange(length) > ends[:, None]] = -1
    tokens[:, 1] = np.where(random.random(rows) < 0.5, 0, tokens[:, 1])
    return tokens


@functools.cache
def compiled_hide(**options):
    return jax.jit(jax.vmap(make_task(**options).hide))


def hide(tokens, key=0, **options):
    key = jax.random.key(key) if isinstance(key, int) else key
    return jax.tree.map(np.asarray, compiled_hide(**options)(tokens, jax.random.split(key, len(tokens))))


def assert_share(hidden, eligible):
    """Return 15% of the tokens of each row, rounded, at least one for a row with tokens."""
    assert ((np.abs(hidden - 0.15 * eligible) <= 0.5 + 1e-5) | ((hidden == 1) & (eligible > 0))).all()
    assert (hidden[eligible > 0] > 0).all()


def batch_of(tokens):
    return {"tokens": jnp.asarray(tokens), "weight": jnp.ones(len(tokens))}


class Lookup:
    """A model whose logits are the row of a table for the input token."""

    def __init__(self, seed=0):
        self.table = jax.random.normal(jax.random.key(seed), (VOCAB, VOCAB))

    def __call__(self, tokens, *, rngs=None):
        return self.table[jnp.maximum(tokens, 0)]


class LookupAtPositions(Lookup):
    def __call__(self, tokens, *, positions, rngs=None):
        return self.table[jnp.maximum(jnp.take_along_axis(tokens, positions, axis=1), 0)]


@jax.jit
def evaluate(batch):
    return make_task().evaluate(Lookup(), batch, None)


@jax.jit
def train(batch, seed):
    return make_task().loss(Lookup(), batch, nnx.Rngs(dropout=jax.random.key(seed)))


def test_the_share_is_exact_and_padding_and_special_tokens_are_never_hidden():
    tokens = text_rows()
    shown, positions, chosen = hide(tokens)
    eligible = tokens >= 4
    assert_share(chosen.sum(1), eligible.sum(1))
    assert np.take_along_axis(eligible, positions, 1)[chosen].all(), "targets are ordinary tokens"
    touched = np.zeros_like(eligible)
    np.put_along_axis(touched, positions, chosen, 1)
    np.testing.assert_array_equal(shown[~touched], tokens[~touched])
    for row, places in zip(positions, chosen, strict=True):
        assert len(set(row[places])) == places.sum(), "a token is a target once"


def test_80_10_10_percent_of_hidden_tokens_are_mask_random_and_unchanged():
    tokens = np.tile(np.arange(4, VOCAB, dtype=np.int32), (200, 1))
    drawn = [hide(tokens, key) for key in range(5)]
    shown, positions, chosen = (np.concatenate(parts) for parts in zip(*drawn, strict=True))
    before, after = (np.take_along_axis(x, positions, 1)[chosen] for x in (np.tile(tokens, (5, 1)), shown))
    n = len(before)
    assert n == 1000 * round(0.15 * 96)
    # A random token is any of 96 tokens, including the original one.
    expected = {"mask": 0.8, "same": 0.1 + 0.1 / 96, "other": 0.1 * 95 / 96}
    found = {"mask": after == MASK, "same": after == before, "other": (after != MASK) & (after != before)}
    for name, p in expected.items():
        assert abs(found[name].mean() - p) < 4.5 * np.sqrt(p * (1 - p) / n), name
    drawn = after[found["other"]]
    assert drawn.min() >= 4, "no special token is drawn"
    counts = np.bincount(drawn, minlength=VOCAB)[4:]
    assert ((counts - counts.mean()) ** 2 / counts.mean()).sum() < 96 + 5 * np.sqrt(2 * 96), "drawn evenly"
    places = np.bincount(positions[chosen], minlength=96)
    assert ((places - places.mean()) ** 2 / places.mean()).sum() < 96 + 5 * np.sqrt(2 * 96), "every position alike"


def test_shares_are_options():
    tokens = np.tile(np.arange(4, VOCAB, dtype=np.int32), (2, 1))
    shown, positions, chosen = hide(tokens, rate=0.5, mask_share=1.0, random_share=0.0)
    assert chosen.all() and positions.shape == (2, 48) and (np.take_along_axis(shown, positions, 1) == MASK).all()
    shown, _, _ = hide(tokens, mask_share=0.0, random_share=0.0)
    np.testing.assert_array_equal(shown, tokens)


def test_training_draws_depend_only_on_the_key():
    batch = batch_of(text_rows())
    first, again, other = (float(train(batch, seed)[0]) for seed in (0, 0, 1))
    assert first == again and first != other


def test_evaluation_hides_the_same_tokens_for_any_batch_and_padding():
    tokens = text_rows()
    whole, again, turned = (evaluate(batch_of(rows)) for rows in (tokens, tokens, tokens[::-1]))
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), whole, again))
    filler = text_rows(rows=100, seed=1)
    first = {"weight": (jnp.arange(200) < 100).astype(jnp.float32)}
    parts = [evaluate(batch_of(np.concatenate([part, filler])) | first) for part in (tokens[:100], tokens[100:])]
    wider = evaluate(batch_of(np.pad(tokens, ((0, 0), (0, 37)), constant_values=-1)))
    for name, (total, weight) in whole.items():
        for other in (turned[name], wider[name], [sum(p[name][i] for p in parts) for i in (0, 1)]):
            np.testing.assert_allclose(other, (total, weight), rtol=1e-5)


def test_rows_that_differ_are_hidden_differently():
    from jaxmodels.tasks.masked_lm import _row_hash

    tokens = text_rows(rows=2000, length=12)
    tokens = np.unique(np.concatenate([tokens, np.roll(tokens, 1, axis=1), tokens[:, ::-1]]), axis=0)
    hashes = np.asarray(jax.jit(_row_hash)(tokens))
    # So many of 2**32 numbers are unlikely to repeat by chance.
    assert len(set(hashes.tolist())) >= len(tokens) - 2
    bits = (hashes[:, None] >> np.arange(32)) & 1
    assert abs(bits.mean(0) - 0.5).max() < 0.05


def test_the_loss_is_the_cross_entropy_of_hidden_tokens_only():
    tokens = text_rows()
    weights = np.arange(200) < 60
    total, weight, metrics = train(batch_of(tokens) | {"weight": jnp.asarray(weights, jnp.float32)}, 5)
    shown, positions, chosen = hide(tokens, nnx.Rngs(dropout=jax.random.key(5)).dropout())
    table = np.asarray(Lookup().table, np.float64)
    expected, right, count = 0.0, 0, 0
    for b in np.flatnonzero(weights):
        for t in positions[b][chosen[b]]:
            logits = table[shown[b, t]]
            expected += np.log(np.exp(logits).sum()) - logits[tokens[b, t]]
            right += logits.argmax() == tokens[b, t]
            count += 1
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    assert float(weight) == count and float(metrics["accuracy"][0]) == right
    assert make_task().summarize({"loss": np.log(7.0)})["perplexity"] == pytest.approx(7)


def test_only_logits_of_hidden_positions_have_gradients():
    tokens = text_rows(rows=16)

    def loss(logits):
        return make_task().evaluate(lambda tokens, *, rngs: logits, batch_of(tokens), None)["loss"][0]

    gradient = jax.jit(jax.grad(loss))(jnp.zeros((16, 96, VOCAB)))
    touched = np.asarray(jnp.abs(gradient).sum(-1) > 0)
    eligible = tokens >= 4
    assert_share(touched.sum(1), eligible.sum(1))
    assert eligible[touched].all()


def test_a_model_with_the_argument_positions_gives_the_same():
    batch = batch_of(text_rows())
    gathered = jax.jit(lambda: make_task().loss(LookupAtPositions(), batch, nnx.Rngs(dropout=jax.random.key(1))))()
    np.testing.assert_allclose(gathered[0], train(batch, 1)[0], rtol=1e-6)


def test_rows_with_nothing_to_hide_have_weight_0():
    tokens = np.full((200, 96), -1, np.int32)
    tokens[1, :2] = [1, 2]
    metrics = evaluate(batch_of(tokens))
    assert float(metrics["loss"][1]) == 0 and float(metrics["loss"][0]) == 0


def test_rows_of_several_texts_need_a_model_with_segments():
    seen = []

    def model(tokens, *, segments, rngs=None):
        seen.append(segments)
        return jnp.zeros((*tokens.shape, VOCAB))

    batch = batch_of(text_rows(rows=2)) | {"segments": jnp.zeros((2, 96), jnp.int32)}
    jax.eval_shape(lambda batch: make_task().evaluate(model, batch, None), batch)
    assert seen[0].shape == (2, 96)
    with pytest.raises(ValueError, match="contiguous"):
        jax.eval_shape(lambda batch: make_task().evaluate(Lookup(), batch, None), batch)


def test_errors_name_what_is_missing():
    with pytest.raises(ConfigError, match="bpe:SIZE"):
        MaskedLM({"vocab_size": 10, "tokenizer": types.SimpleNamespace(special=lambda name: None)})
    with pytest.raises(ConfigError, match="source of text"):
        MaskedLM({"image_shape": (8, 8, 1)})
    with pytest.raises(ConfigError, match="task.rate"):
        make_task(rate=1.0)
    with pytest.raises(ConfigError, match="mask_share and random_share must not be negative, nor their sum above 1"):
        make_task(mask_share=0.8, random_share=0.3)
