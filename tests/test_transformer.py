"""The Transformer's shapes and options against plain computations and published sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmodels.models import create
from jaxmodels.training.step import split


def count(make):
    shapes = split(nnx.eval_shape(make))[1]
    return {name: sum(x.size for x in jax.tree.leaves(part)) for name, part in shapes.items()}


def test_encoders_have_the_published_parameter_counts():
    # BertModel and RobertaModel count a pooler (the dense layer of the "class" head); the tokens' heads are ForMaskedLM's.
    vocabulary = {"bert": 30522, "roberta": 50265}
    published = {
        "bert-tiny": (4_385_920, None),
        "bert-mini": (11_170_560, None),
        "bert-small": (28_763_648, None),
        "bert-medium": (41_373_184, None),
        "bert-base": (109_482_240, 109_514_298),
        "bert-large": (335_141_888, 335_174_458),
        "roberta-base": (124_645_632, 124_697_433),
        "roberta-large": (355_359_744, 355_412_057),
    }
    for name, (model, masked) in published.items():
        V = vocabulary[name.split("-")[0]]
        parts = count(lambda: create(name, V, ("class", 2), rngs=nnx.Rngs(0)))  # noqa: B023
        width = parts["embed"] // V
        assert sum(parts.values()) - (2 * width + 2) == model, name
        if masked is not None:
            assert sum(count(lambda: create(name, V, ("tokens", V), scan=True, rngs=nnx.Rngs(0))).values()) == masked, name  # noqa: B023


@pytest.mark.parametrize(("head", "shape"), [(("tokens", 11), (2, 5, 11)), (("tags", 3), (2, 5, 3)), (("class", 4), (2, 4)), (("value", 1), (2, 1))])
def test_heads_say_what_they_are_for(head, shape):
    model = create("encoder", 11, head, layers=1, width=8, heads=2, rngs=nnx.Rngs(0))
    assert model(jnp.arange(10).reshape(2, 5)).shape == shape


@pytest.mark.parametrize("pool", ["first", "mean"])
def test_padding_changes_nothing_in_an_encoder(pool):
    model = create("encoder", 11, ("class", 3), layers=2, width=8, heads=2, pool=pool, types=2, rngs=nnx.Rngs(0))
    tokens = np.random.default_rng(0).integers(0, 11, (2, 6))
    padded = np.pad(tokens, ((0, 0), (0, 5)), constant_values=-1)
    np.testing.assert_allclose(model.states(padded)[:, :6], model.states(tokens), atol=1e-5)
    np.testing.assert_allclose(model(padded), model(tokens), atol=1e-5)
