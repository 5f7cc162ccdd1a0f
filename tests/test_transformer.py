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


# The parameters of the released checkpoints, and for the original Transformer those that its description comes to.
PUBLISHED = {
    32000: {
        "llama2-7b": 6_738_415_616,
        "llama2-13b": 13_015_864_320,
        "llama2-70b": 68_976_648_192,
        "mistral-7b": 7_241_732_096,
    },
    128256: {
        "llama3-8b": 8_030_261_248,
        "llama3-70b": 70_553_706_496,
        "llama3.1-8b": 8_030_261_248,
        "llama3.1-70b": 70_553_706_496,
        "llama3.2-1b": 1_235_814_400,
        "llama3.2-3b": 3_212_749_824,
    },
    151936: {
        "qwen2.5-0.5b": 494_032_768,
        "qwen2.5-1.5b": 1_543_714_304,
        "qwen2.5-3b": 3_085_938_688,
        "qwen3-0.6b": 596_049_920,
        "qwen3-1.7b": 1_720_574_976,
        "qwen3-4b": 4_022_468_096,
        "qwen3-8b": 8_190_735_360,
        "qwen3-14b": 14_768_307_200,
        "qwen3-32b": 32_762_123_264,
    },
    152064: {
        "qwen2.5-7b": 7_615_616_512,
        "qwen2.5-14b": 14_770_033_664,
        "qwen2.5-32b": 32_763_876_352,
        "qwen2.5-72b": 72_706_203_648,
    },
    32128: {
        "t5-v1.1-small": 76_961_152,
        "t5-v1.1-base": 247_577_856,
        "t5-v1.1-large": 783_150_080,
        "t5-v1.1-xl": 2_849_757_184,
        "t5-v1.1-xxl": 11_135_332_352,
    },
}


@pytest.mark.parametrize(("vocabulary", "name"), [(V, name) for V, sizes in PUBLISHED.items() for name in sizes])
def test_sizes_have_the_published_parameter_counts(vocabulary, name):
    assert sum(count(lambda: create(name, vocabulary, scan=True, rngs=nnx.Rngs(0))).values()) == PUBLISHED[vocabulary][name]


@pytest.mark.parametrize(("name", "millions", "D", "F"), [("transformer-base", 65, 512, 2048), ("transformer-big", 213, 1024, 4096)])
def test_the_original_transformer_has_the_parameters_that_it_was_described_with(name, millions, D, F):
    attention, norm = 4 * (D * D + D), 2 * D
    mlp = 2 * D * F + F + D
    expected = 37000 * D + 6 * (attention + mlp + 2 * norm) + 6 * (2 * attention + mlp + 3 * norm)
    parameters = sum(count(lambda: create(name, 37000, scan=True, rngs=nnx.Rngs(0))).values())
    assert parameters == expected
    # The paper's table says 65 and 213 millions, of a vocabulary of "about 37000".
    assert abs(parameters / 1e6 - millions) < 0.035 * millions


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
        parts = count(lambda: create(name, V, ("class", 2), scan=True, rngs=nnx.Rngs(0)))  # noqa: B023
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


def test_a_head_asked_at_some_positions_says_the_same_there():
    model = create("encoder", 11, ("tokens", 11), layers=1, width=8, heads=2, rngs=nnx.Rngs(0))
    tokens, positions = jnp.arange(10).reshape(2, 5), jnp.array([[3, 1], [0, 4]])
    np.testing.assert_allclose(model(tokens, positions=positions), jnp.take_along_axis(model(tokens), positions[:, :, None], 1), atol=1e-5)
