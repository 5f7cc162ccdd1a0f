"""Encoders after BERT: ModernBERT's layers and DeBERTa's attention, against plain computations. Logits are in tests/pretrained/test_pretrained.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmodels.models import create
from jaxmodels.models.disentangled import by_distance, log_buckets
from jaxmodels.models.functional import new_rngs

SMALL = {"layers": 3, "heads": 2, "width": 8, "mlp_width": 12, "context": 16}
MODELS = {
    "modernbert-base": SMALL | {"window": 3},
    "deberta-v3-base": SMALL | {"relative_buckets": 4, "relative_distance": 16},
    "distilbert-base": SMALL,
}


def made(name, head=("tags", 5), **options):
    model = create(name, 11, head, **MODELS[name] | options, rngs=new_rngs(0))
    random = np.random.default_rng(0)
    for _, parameter in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        parameter.set_value(parameter[...] + jnp.asarray(random.normal(0, 0.3, parameter[...].shape), jnp.float32))
    return model


@pytest.mark.parametrize("name", ["modernbert-base", "deberta-v3-base"])
def test_a_text_in_a_packed_row_gives_the_same_as_alone(name):
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, 11, (1, 12)))
    segments = jnp.asarray([[0] * 5 + [1] * 7])
    model = jax.jit(made(name))
    packed = model(tokens, segments=segments)
    np.testing.assert_allclose(packed[:, :5], model(tokens.at[:, 5:].set(-1))[:, :5], atol=1e-5)
    np.testing.assert_allclose(packed[:, 5:], model(tokens[:, 5:]), atol=1e-5)
    assert np.abs(packed - model(tokens)).max() > 1e-3


def test_recomputed_gradients_are_the_same():
    def gradients(remat):
        graph, state = nnx.split(made("deberta-v3-base", remat=remat))
        return jax.jit(jax.grad(lambda state: jnp.sum(jnp.square(nnx.merge(graph, state)(jnp.arange(8)[None])))))(state)

    saved, recomputed = (jax.tree.leaves(gradients(remat)) for remat in ("none", ("attention",)))
    assert all(np.abs(x).max() > 0 for x in saved if x.ndim > 1)
    for one, other in zip(saved, recomputed, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_distances_have_the_buckets_of_transformers():
    torch = pytest.importorskip("torch")
    from transformers.models.deberta_v2.modeling_deberta_v2 import make_log_bucket_position

    for buckets, longest in ((256, 512), (8, 64), (7, 40), (48, 64)):
        distances = np.arange(-longest + 1, longest)
        theirs = make_log_bucket_position(torch.tensor(distances), buckets, longest).long().numpy()
        np.testing.assert_array_equal(log_buckets(distances, buckets, longest), theirs)
        assert np.abs(theirs).max() < buckets and (np.diff(theirs) >= 0).all()


@pytest.mark.parametrize("T", [1, 2, 7])
def test_products_by_distance(T):
    x = np.random.default_rng(0).normal(size=(2, 3, T, 2 * T - 1)).astype(np.float32)
    y = np.asarray(by_distance(jnp.asarray(x)))
    for i in range(T):
        for j in range(T):
            np.testing.assert_array_equal(y[:, :, i, j], x[:, :, i, T - 1 - i + j])


def test_the_first_attention_has_no_normalization_after_that_of_the_embedding():
    model = made("modernbert-base")
    assert [block.attention_norm is None for block in model.blocks] == [True, False, False]
    assert [block.attention.window for block in model.blocks] == [None, 3, 3]
    assert made("modernbert-base", embedding_norm=None).blocks[0].attention_norm is not None
    with pytest.raises(ValueError, match="differ .layer_types, embedding_norm.; use scan=False"):
        made("modernbert-base", window=None, layer_types=None, scan=True)
    with pytest.raises(ValueError, match="relative_distance above half of that"):
        made("deberta-v3-base", relative_buckets=32)
    with pytest.raises(ValueError, match="one key head for each query head"):
        made("deberta-v3-base", kv_heads=1)


@pytest.mark.parametrize(("name", "parts"), [("modernbert-base", {"dense", "norm", "output"}), ("distilbert-base", {"dense", "output"})])
def test_heads_for_the_sequence(name, parts):
    model = made(name, ("class", 3))
    assert {part for part in ("dense", "norm", "output") if getattr(model.head, part, None) is not None} == parts
    assert model(jnp.arange(6).reshape(2, 3)).shape == (2, 3)
