"""ResNets: published sizes, shapes, and batch statistics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmodels.models import create
from jaxmodels.models.functional import merge, new_rngs, split
from jaxmodels.models.resnet import ConvNorm


@pytest.mark.parametrize(("name", "parameters"), [("resnet18", 11_689_512), ("resnet34", 21_797_672), ("resnet50", 25_557_032), ("resnet101", 44_549_160)])
def test_sizes_have_the_published_parameter_counts(name, parameters):
    model = nnx.eval_shape(lambda: create(name, (224, 224, 3), 1000, rngs=new_rngs(0)))
    assert sum(x.size for x in jax.tree.leaves(split(model)[1])) == parameters


@pytest.mark.parametrize("stem", ["imagenet", "cifar"])
def test_resolution_by_stage(stem):
    model = nnx.eval_shape(lambda: create("resnet50", (64, 64, 3), 7, stem=stem, rngs=new_rngs(0)))
    graph, params, stats = split(model)

    def sizes(params, stats):
        model = merge(graph, params, stats)
        x = model.first(jnp.zeros((1, 64, 64, 3)), False)
        x = nnx.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1))) if stem == "imagenet" else x
        shapes = []
        for block in model.blocks:
            x = block(x, False)
            shapes.append(x.shape[1:])
        return shapes

    shapes = []
    jax.eval_shape(lambda p, s: shapes.extend(sizes(p, s)), params, stats)
    start = 16 if stem == "imagenet" else 64
    assert [shapes[i] for i in (2, 6, 12, 15)] == [(start // 2**i, start // 2**i, 256 * 2**i) for i in range(4)]


def test_a_block_starts_as_the_identity():
    model = create("resnet18", (16, 16, 3), 5, stages=(1,), width=8, stem="cifar", rngs=nnx.Rngs(0))
    x = jnp.abs(jax.random.normal(jax.random.key(0), (2, 16, 16, 8)))
    np.testing.assert_allclose(model.blocks[0](x, False), x, atol=1e-6)


def test_normalization_uses_the_batch_in_training_and_running_statistics_else():
    layer = ConvNorm(3, 4, 3, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (8, 6, 6, 3)) * 3 + 1
    raw = np.asarray(layer.conv(x))
    mean, var = raw.mean((0, 1, 2)), raw.var((0, 1, 2))
    np.testing.assert_allclose(layer(x, True), (raw - mean) / np.sqrt(var + 1e-5), atol=1e-4)
    np.testing.assert_allclose(layer.norm.mean[...], 0.1 * mean, atol=1e-5)
    np.testing.assert_allclose(layer.norm.var[...], 0.9 + 0.1 * var, rtol=1e-4)
    np.testing.assert_allclose(layer(x, False), (raw - 0.1 * mean) / np.sqrt(0.9 + 0.1 * var + 1e-5), atol=1e-4)
    np.testing.assert_allclose(layer.norm.mean[...], 0.1 * mean, atol=1e-5)
