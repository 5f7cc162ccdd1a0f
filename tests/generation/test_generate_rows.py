"""Choosing tokens with settings by row equals `generation.sampling` with the same settings for all rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels.generation import rows, sampling

B = 3


def given(**changes):
    """Return the settings of B rows; a number is that of all rows."""
    made = rows.settings(B)
    for name, value in changes.items():
        made[name][:] = value
    return made


def chosen(logits, settings, draws, texts=None, positions=None, known=None):
    """Return the tokens of many draws, [draws, B]."""
    texts = jnp.zeros((B, 1), jnp.int32) if texts is None else texts
    positions = jnp.full(texts.shape, -1) if positions is None else positions
    choose = jax.jit(jax.vmap(lambda count: rows.choose(logits, settings, texts, positions, jnp.full(B, count), known)))
    return np.asarray(choose(jnp.arange(draws)))


@pytest.mark.parametrize("options", [{}, {"top_k": 4}, {"top_p": 0.6}, {"min_p": 0.2}, {"top_k": 6, "top_p": 0.8, "min_p": 0.05, "temperature": 0.5}])
def test_draws_follow_the_distribution_of_sampling(options):
    logits = jnp.asarray(np.random.default_rng(0).normal(0, 1.5, (B, 12)), jnp.float32)
    same = sampling.Sampling(**{"temperature": 1.0} | options)
    left, tokens = sampling.candidates(logits, same.shape(), same.numbers())
    expected = np.zeros((B, 12))
    np.put_along_axis(expected, np.tile(np.arange(12), (B, 1)) if tokens is None else np.asarray(tokens), np.asarray(jax.nn.softmax(left)), axis=1)
    draws = 4000
    seen = chosen(logits, given(**{"temperature": 1.0} | options, seed=np.arange(B)), draws)
    shares = np.stack([np.bincount(seen[:, row], minlength=12) / draws for row in range(B)])
    assert (shares[expected == 0] == 0).all()
    np.testing.assert_allclose(shares, expected, atol=0.035)


@pytest.mark.parametrize("options", [{"top_p": 0.999}, {"top_k": 400}, {"top_k": 300, "top_p": 0.99}, {"top_k": 5}])
def test_filters_are_exact_beyond_the_candidates(options):
    """Nearly equal logits: top-p and top-k leave more tokens than are sorted at first."""
    logits = jnp.asarray(np.random.default_rng(1).normal(0, 0.01, (B, 600)), jnp.float32)
    same = sampling.Sampling(temperature=1.0, **options)
    left, tokens = sampling.candidates(logits, same.shape(), same.numbers())
    least = rows._least(logits, jnp.array([True, True, False]), given(**options)["top_k"], given(**options)["top_p"])
    kept = np.asarray(jnp.where(jnp.isfinite(left), jnp.take_along_axis(logits, tokens, axis=1), jnp.inf).min(axis=1))
    np.testing.assert_array_equal(least[:2], kept[:2])
    assert least[2] == -jnp.inf


def test_rows_have_settings_of_their_own():
    logits = jnp.tile(jnp.asarray(np.random.default_rng(2).normal(0, 1, 12), jnp.float32), (B, 1))
    settings = given(temperature=[0, 1, 1], top_k=[0, 1, 0], seed=[1, 2, 3])
    seen = chosen(logits, settings, 50)
    assert (seen[:, :2] == int(jnp.argmax(logits[0]))).all()
    assert len(set(seen[:, 2].tolist())) > 3
    alone = chosen(logits, settings | {"temperature": np.float32([0, 0, 1]), "top_k": np.int32([0, 0, 0])}, 50)
    np.testing.assert_array_equal(alone[:, 2], seen[:, 2])


def test_penalties_count_the_answer_and_the_prompt():
    logits = jnp.asarray([[2.0, 1.9, -1.0, 0.5]] * B)
    texts, positions = jnp.array([[0, 0, 1, 3]] * B), jnp.array([[0, 1, 2, -1]] * B)  # a prompt of one token, two of the answer, and an empty slot
    seen = rows._penalized(logits, given(prompt=1, repetition_penalty=[2, 1, 1], frequency_penalty=[0, 0.5, 0], presence_penalty=[0, 0, -1]), texts, positions)
    np.testing.assert_allclose(seen, [[1.0, 0.95, -1.0, 0.5], [1.5, 1.4, -1.0, 0.5], [3.0, 2.9, -1.0, 0.5]])


def test_unknown_tokens_and_numbers_that_are_none():
    logits = jnp.asarray([[0.0, 1.0, 5.0], [0.0, jnp.nan, 1.0], [3.0, 1.0, 9.0]])
    assert chosen(logits, given(temperature=[0, 0, 1], seed=1), 20, known=2)[:, :2].tolist() == [[1, rows.NOT_FINITE]] * 20
    assert (chosen(logits, given(temperature=[0, 0, 1], seed=1), 20, known=2)[:, 2] < 2).all()
    scores = rows.score(logits, jnp.array([0, 0, 2]), jnp.array([2, -1, 1]), known=2)
    log = np.asarray(jax.nn.log_softmax(logits))
    np.testing.assert_allclose([scores["chosen"][0], scores["chosen"][2]], [log[0, 0], log[2, 2]], rtol=1e-6)
    assert scores["tokens"][0, :2].tolist() == [1, 0] and scores["tokens"][2, 0] == 0
