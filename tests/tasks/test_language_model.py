"""The language-modelling task: which targets count, by hand; models are tables of logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmodels.tasks.language_model import LanguageModel
from jaxmodels.tokenizers.factory import make_tokenizer


class Table(nnx.Module):
    """A model whose logits depend on the current token, and which records its inputs."""

    def __init__(self, size):
        self.table = nnx.Param(jax.random.normal(jax.random.key(0), (size, size)))

    def __call__(self, tokens, *, segments=None, rngs=None):
        self.seen = segments
        return self.table[...][tokens]


class Plain(Table):
    def __call__(self, tokens, *, rngs=None):
        return super().__call__(tokens)


def by_hand(model, pairs):
    return -sum(jax.nn.log_softmax(model.table[...][a])[b] for a, b in pairs)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_targets_across_segments_and_padding_do_not_count(label_smoothing):
    model, task = Table(6), LanguageModel({"vocab_size": 6}, label_smoothing=label_smoothing)
    batch = {
        "tokens": jnp.array([[1, 2, 3, 4, 5, 1], [5, 4, -1, -1, -1, -1]]),
        "segments": jnp.array([[0, 0, 0, 1, 1, 2], [0, 0, -1, -1, -1, -1]]),
        "weight": jnp.array([1.0, 0.5]),
    }
    total, weight, metrics = task.loss(model, batch, None)
    expected = by_hand(model, [(1, 2), (2, 3), (4, 5)]) + 0.5 * by_hand(model, [(5, 4)])
    assert weight == 3.5
    np.testing.assert_allclose(metrics["loss"][0], expected, rtol=1e-5)
    np.testing.assert_allclose(task.evaluate(model, batch, None)["loss"][0], expected, rtol=1e-5)
    assert label_smoothing or total == metrics["loss"][0]
    np.testing.assert_array_equal(model.seen, batch["segments"][:, :-1])


def test_without_segments_every_target_counts():
    model, task = Plain(6), LanguageModel({"vocab_size": 6})
    batch = {"tokens": jnp.array([[1, 2, 3, -1]]), "weight": jnp.ones(1)}
    total, weight, _ = task.loss(model, batch, None)
    assert weight == 2
    np.testing.assert_allclose(total, by_hand(model, [(1, 2), (2, 3)]), rtol=1e-5)


def test_a_model_without_segments_is_an_error():
    batch = {"tokens": jnp.zeros((1, 3), int), "segments": jnp.zeros((1, 3), int), "weight": jnp.ones(1)}
    with pytest.raises(ValueError, match="Plain.*packing='contiguous'"):
        LanguageModel({"vocab_size": 6}).loss(Plain(6), batch, None)


def test_samples_follow_the_end_of_a_text():
    class After(Table):
        def __call__(self, tokens, *, rngs=None):  # always the token read, plus one
            return jax.nn.one_hot(tokens + 1, 9)

    for spec, first in (("character", 0), ("character+special", 2)):
        info = {"vocab_size": 9, "tokenizer": make_tokenizer(spec, ["abcdefghi"], None)}
        task = LanguageModel(info, sample_length=3, temperature=0.0)
        outputs = task.samples(After(9), jax.random.key(0))
        np.testing.assert_array_equal(outputs["sample"], first + np.array([1, 2, 3]))
        text = info["tokenizer"].decode([first + 1, first + 2, first + 3])
        assert task.show(jax.device_get(outputs)) == [("sample", "text", text, {})]


def test_without_a_tokenizer_or_a_length_there_are_no_samples():
    tokenizer = make_tokenizer("character", ["abcdefghi"], None)
    for info, length in (({"vocab_size": 9}, 3), ({"vocab_size": 9, "tokenizer": tokenizer}, 0)):
        assert LanguageModel(info, sample_length=length).samples(Plain(9), jax.random.key(0)) == {}
