"""Contrastive learning: partners counted by hand, and embeddings of an image's views that become similar."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmodels.data.source import get_batch
from jaxmodels.errors import ConfigError
from jaxmodels.experiment.build import build_experiment
from jaxmodels.models.functional import merge
from jaxmodels.tasks import losses
from jaxmodels.tasks.contrast import Contrast

INFO = {"image_shape": (4, 4, 1)}


class Flat(nnx.Module):
    def __call__(self, image, *, rngs=None):
        return image.reshape(len(image), -1)


def test_rows_of_weight_zero_are_not_negatives():
    task = Contrast(INFO, loss="info_nce", crop=0, brightness=0.5, temperature=0.5)  # brightness changes no cosine
    image = jax.random.normal(jax.random.key(0), (5, 4, 4, 1))
    image = image.at[4].set(image[0])  # a copy, which would be as similar as the partner
    batch = {"image": image, "weight": jnp.array([1.0, 1.0, 0.5, 1.0, 0.0])}
    total, weight, metrics = jax.jit(lambda batch: task.loss(Flat(), batch, nnx.Rngs(dropout=0)))(batch)
    flat = image[:4].reshape(4, -1)
    expected = losses.info_nce(flat, flat, temperature=0.5)
    np.testing.assert_allclose([total, weight], [jnp.sum(expected * jnp.array([1, 1, 0.5, 1])), 3.5], rtol=1e-5)
    assert metrics["accuracy"] == (3.5, 3.5)


def test_views_differ_and_those_of_evaluation_are_deterministic():
    task = Contrast(INFO, crop=1, flip=True, brightness=0.2, noise=0.1)
    batch = {"image": jax.random.uniform(jax.random.key(0), (3, 4, 4, 1)), "weight": jnp.ones(3)}

    @jax.jit
    def compute(batch, key):
        evaluated = task.evaluate(Flat(), batch, jax.random.split(jax.random.key(7), 3))
        return task.loss(Flat(), batch, nnx.Rngs(dropout=key))[0], evaluated["loss"][0], task.predict(Flat(), batch)

    (one, same, unit), (other, again, _) = (compute(batch, jax.random.key(i)) for i in (0, 1))
    assert abs(one - other) > 1e-3 and same == again
    np.testing.assert_allclose(jnp.linalg.norm(unit, axis=1), 1, rtol=1e-5)


@pytest.mark.parametrize(("options", "message"), [({"crop": 0}, "at least one of"), ({"temperature": 0.0}, "temperature"), ({"noise": -1.0}, "noise")])
def test_wrong_options(options, message):
    with pytest.raises(ConfigError, match=message):
        Contrast(INFO, **options)


def test_digits_of_a_class_become_similar_without_labels():
    config = {
        "model": {"name": "cnn", "features": (8, 16), "hidden": 32},
        "task": {"name": "contrast", "width": 16, "crop": 1, "noise": 0.1, "temperature": 0.2},
        "data": {"source": "digits", "batch_size": 64},
        "optimizer": {"name": "adam", "learning_rate": 3e-3},
        "training": {"steps": 100},
    }
    experiment = build_experiment(config)
    state = jax.jit(experiment.init_function())(jax.random.key(0))
    step = jax.jit(experiment.step_function(), donate_argnums=0)
    train, test = (jax.tree.map(jnp.asarray, get_batch(experiment.dataset.splits[name], np.arange(256))) for name in ("train", "test"))

    @jax.jit
    def judge(params, stats):
        """Return how often a view's nearest is its partner, and how often an image's nearest in the train split has the same label."""
        model = merge(experiment.graph, params, stats)
        found = experiment.task.evaluate(model, test | {"weight": jnp.ones(256)}, jax.random.split(jax.random.key(0), 256))["accuracy"][0] / 256
        nearest = jnp.argmax(experiment.task.predict(model, test) @ experiment.task.predict(model, train).T, axis=1)
        return found, jnp.mean(train["label"][nearest] == test["label"])

    before = judge(state.params, state.stats)
    for i in range(experiment.steps):
        rows = slice(64 * (i % 4), 64 * (i % 4) + 64)
        state, _ = step(state, {k: v[rows] for k, v in train.items()} | {"weight": np.ones(64, np.float32)}, jax.random.key(1))
    after = judge(state.params, state.stats)
    assert after[0] > 1.4 * before[0] and after[1] > before[1] + 0.1, (before, after)
