"""Filters of logits and sampled tokens, against `transformers` and against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from random_models import drawn

from jaxmodels.generation.generate import Generator
from jaxmodels.generation.sampling import Sampling, candidates, choose, penalize

V = 50
LOGITS = np.random.default_rng(0).normal(0, 3, (64, V)).astype(np.float32)


def kept(sampling: Sampling) -> np.ndarray:
    """Return the logits that `sampling` filters, [B, V], with -inf for excluded tokens."""
    numbers = {name: jnp.float32(value) for name, value in sampling.numbers().items()}
    logits, tokens = jax.jit(candidates, static_argnums=1)(LOGITS, sampling.shape(), numbers)
    if tokens is None:
        return np.asarray(logits)
    result = np.full_like(LOGITS, -np.inf)
    np.put_along_axis(result, np.asarray(tokens), np.asarray(logits), axis=1)
    return result


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.7},
        {"temperature": 1.5, "top_k": 7},
        {"temperature": 1.0, "top_p": 0.8},
        {"temperature": 0.9, "min_p": 0.05},
        {"temperature": 1.3, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
        {"temperature": 1.0, "top_p": 0.001},
        {"temperature": 2.0, "top_k": 1000, "top_p": 1.0, "min_p": 0.0},
    ],
    ids=str,
)
def test_filters_are_those_of_transformers(options):
    torch = pytest.importorskip("torch")
    process = pytest.importorskip("transformers.generation.logits_process")
    scores = process.TemperatureLogitsWarper(options["temperature"])(None, torch.tensor(LOGITS))
    for name, kind in (("top_k", process.TopKLogitsWarper), ("top_p", process.TopPLogitsWarper), ("min_p", process.MinPLogitsWarper)):
        if name in options:
            scores = kind(options[name])(None, scores)
    got = kept(Sampling(**options))
    np.testing.assert_array_equal(np.isfinite(got), np.isfinite(scores.numpy()))
    np.testing.assert_allclose(got, scores.numpy(), rtol=1e-6)


def test_the_penalty_is_that_of_transformers():
    torch = pytest.importorskip("torch")
    process = pytest.importorskip("transformers.generation.logits_process")
    texts = np.random.default_rng(1).integers(0, V, (64, 9))
    expected = process.RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor(texts), torch.tensor(LOGITS))
    seen = np.zeros((64, V), bool)
    np.put_along_axis(seen, texts, True, axis=1)
    np.testing.assert_allclose(penalize(LOGITS, seen, 1.7), expected.numpy(), rtol=1e-6)


def test_tokens_are_drawn_with_their_probabilities():
    """Chi-squared of 2,000 draws against the filtered probabilities, computed with NumPy."""
    logits = np.broadcast_to(LOGITS[:1], (2000, V))
    sampling = Sampling(temperature=1.2, top_k=12, min_p=0.01)
    numbers = {name: jnp.float32(value) for name, value in sampling.numbers().items()}
    drawn_tokens = np.asarray(jax.jit(choose, static_argnums=1)(logits, sampling.shape(), numbers, jax.random.key(0)))
    p = np.exp(LOGITS[0] / 1.2)
    p[np.argsort(p)[:-12]] = 0
    p[p < 0.01 * p.max()] = 0
    p /= p.sum()
    counts = np.bincount(drawn_tokens, minlength=V)
    assert counts[p == 0].sum() == 0
    likely = p * 2000 > 5
    chi = np.sum((counts - 2000 * p)[likely] ** 2 / (2000 * p[likely]))
    assert chi < 3 * likely.sum()


def whole(model, tokens):
    return model(tokens)


def penalized(model, prompt, penalty, length):
    """Return the greedy text with a repetition penalty, from the logits of the full forward pass, with NumPy."""
    call, text = nnx.jit(whole), list(prompt)
    for _ in range(length):
        tokens = np.full((1, 32), -1, np.int32)
        tokens[0, : len(text)] = text
        logits = np.asarray(call(model, tokens))[0, len(text) - 1]
        seen = np.isin(np.arange(V), text)
        text.append(int(np.argmax(np.where(seen, np.where(logits < 0, logits * penalty, logits / penalty), logits))))
    return text[len(prompt) :]


def test_a_penalty_counts_the_prompt_and_the_generated_tokens():
    model = drawn("gpt", V, layers=1, heads=2, width=16, context=64)
    generator = Generator(model)
    prompts = [[3, 1, 4], [1, 5, 9, 2, 6, 5, 3]]
    made = [c.tokens for c in generator.generate(prompts, max_tokens=16, repetition_penalty=1.5)]
    assert made == [penalized(model, prompt, 1.5, 16) for prompt in prompts]
    assert made[1] != penalized(model, prompts[1], 1.0, 16)
