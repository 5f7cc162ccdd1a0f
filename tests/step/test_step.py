"""The train step, the optimizer and the metrics, against closed forms and second paths."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small_configs
from flax import nnx
from jax.extend import core as jax_core

from jaxmodels.data.loader import TrainingBatches
from jaxmodels.experiment.build import build_experiment
from jaxmodels.models import create
from jaxmodels.models.functional import merge, split
from jaxmodels.step import metrics as metrics_lib
from jaxmodels.step import optimizer as optimizer_lib
from jaxmodels.tasks.classify import Classify
from jaxmodels.tasks.language_model import LanguageModel


def trained(config, steps=4, batches=None):
    """Return the states and metrics after each of some steps."""
    experiment = build_experiment(config)
    state = jax.jit(experiment.init_function())(jax.random.key(0))
    source = batches or TrainingBatches(experiment.dataset.splits["train"], experiment.loading.batch_size, steps, seed=0, shuffle=True)
    step = jax.jit(experiment.step_function())
    history = []
    for s in range(steps):
        state, metrics = step(state, source[s], jax.random.key(1))
        history.append((state, metrics))
    return experiment, history


def assert_close(one, other, **tolerance):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, **tolerance)


def test_a_module_with_more_than_ten_layers_survives_split_and_merge():
    model = create("gpt", 11, context=4, layers=12, heads=1, width=4, rngs=nnx.Rngs(0))
    for i, block in enumerate(model.blocks):
        block.mlp.up.bias[...] = jnp.full(16, float(i))
    again = merge(*split(model))
    assert [float(block.mlp.up.bias[...][0]) for block in again.blocks] == list(range(12))
    tokens = jnp.arange(4)[None]
    np.testing.assert_array_equal(again(tokens), model(tokens))


@pytest.mark.parametrize("name", ["cnn", "lstm", "gpt"])
def test_accumulation_changes_nothing(name):
    base = small_configs.config(small_configs.ALL[name], model__dropout=0.0, optimizer={"name": "sgd", "learning_rate": 0.1})
    _, whole = trained(base)
    _, parts = trained(small_configs.config(base, training__accumulate=4))
    assert_close(whole[-1][0].params, parts[-1][0].params, rtol=1e-4, atol=1e-6)
    for (_, one), (_, other) in zip(whole, parts, strict=True):
        for key in ("loss", "accuracy"):
            np.testing.assert_allclose(one[key][0] / one[key][1], other[key][0] / other[key][1], rtol=1e-4)


def test_rows_of_weight_zero_change_nothing_even_unevenly_spread_over_microbatches():
    base = small_configs.config(small_configs.CNN, model__dropout=0.0, optimizer={"name": "sgd", "learning_rate": 0.1})
    experiment = build_experiment(base)
    batch = TrainingBatches(experiment.dataset.splits["train"], 24, 1, seed=0, shuffle=True)[0]
    padded = {k: np.concatenate([v, np.repeat(v[:1], 8, 0)]) for k, v in batch.items()}
    padded["weight"][24:] = 0
    order = np.r_[0:5, 24:32, 5:24]
    padded = {k: v[order] for k, v in padded.items()}
    _, plain = trained(small_configs.config(base, data__batch_size=24), 1, [batch])
    _, with_padding = trained(small_configs.config(base, training__accumulate=4), 1, [padded])
    assert_close(plain[0][0].params, with_padding[0][0].params, rtol=1e-4, atol=1e-6)


def test_one_step_is_optax_by_hand():
    config = small_configs.config(small_configs.GPT, model__dropout=0.0, data__batch_size=4)
    config["optimizer"] |= {"b1": 0.8, "schedule": {"name": "linear", "warmup": 3, "final": 0.1}}
    experiment, history = trained(config, 3)
    state = jax.jit(experiment.init_function())(jax.random.key(0))
    rates = [1e-3, 2e-3, 3e-3]
    mask = optimizer_lib.decay_mask(state.params, optimizer_lib.NO_DECAY)
    by_hand = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(lambda s: jnp.array(rates)[s], b1=0.8, weight_decay=0.01, mask=mask))
    params, opt_state = state.params, by_hand.init(state.params)
    batches = TrainingBatches(experiment.dataset.splits["train"], 4, 3, seed=0, shuffle=True)

    @jax.jit
    def gradient(params, tokens):
        def loss(params):
            logits = merge(experiment.graph, params, {})(tokens[:, :-1])
            return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

        return jax.grad(loss)(params)

    for s in range(3):
        updates, opt_state = by_hand.update(gradient(params, batches[s]["tokens"]), opt_state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(history[s][1]["learning_rate"][0], rates[s], rtol=1e-6)
    assert_close(history[-1][0].params, params, rtol=1e-3, atol=1e-5)


def test_ema_is_the_weighted_sum_of_all_parameters():
    _, history = trained(small_configs.config(small_configs.CNN, training__ema=0.3), 5)
    experiment = build_experiment(small_configs.CNN)
    expected = jax.jit(experiment.init_function())(jax.random.key(0)).params
    for step, (state, _) in enumerate(history):
        decay = min(0.3, (1 + step) / (10 + step))
        expected = jax.tree.map(lambda a, b: decay * a + (1 - decay) * b, expected, state.params)  # noqa: B023
    assert_close(history[-1][0].ema, expected, rtol=1e-5, atol=1e-7)


def test_training_metrics_are_means_since_the_last_line():
    _, every = trained(small_configs.config(small_configs.CNN, log__every=1), 6)
    _, window = trained(small_configs.config(small_configs.CNN, log__every=3), 6)
    for end in (3, 6):
        for key in ("loss", "accuracy", "grad_norm"):
            mean = np.mean([every[i][1][key][0] / every[i][1][key][1] for i in range(end - 3, end)])
            total, weight = window[end - 1][1][key]
            np.testing.assert_allclose(total / weight, mean, rtol=1e-5)
    assert metrics_lib.values({"x": (jnp.float32(3), jnp.float32(4))}) == {"x": 0.75}


def test_dropout_differs_between_steps_and_is_the_same_again():
    experiment = build_experiment(small_configs.config(small_configs.CNN, optimizer={"name": "sgd", "learning_rate": 1e-30}))
    state = jax.jit(experiment.init_function())(jax.random.key(0))
    batch = TrainingBatches(experiment.dataset.splits["train"], 32, 1, seed=0, shuffle=True)[0]
    step = jax.jit(experiment.step_function())
    losses = [float(step(state.replace(step=jnp.int32(s)), batch, jax.random.key(0))[1]["grad_norm"][0]) for s in (10, 20, 10)]
    assert losses[0] == losses[2] != losses[1]


def test_bfloat16_computes_in_half_precision_with_float32_parameters():
    config = small_configs.config(small_configs.GPT, model__dropout=0.0)
    experiment, full = trained(config)
    half_experiment, half = trained(small_configs.config(config, training__precision="bfloat16"))
    state = half[-1][0]
    assert {x.dtype for x in jax.tree.leaves((state.params, state.opt_state, state.metrics))} <= {jnp.dtype("float32"), jnp.dtype("int32")}
    one, other = (np.array([m["loss"][0] / m["loss"][1] for _, m in history]) for history in (full, half))
    assert (one != other).any()
    np.testing.assert_allclose(one, other, rtol=0.02)
    shapes = half_experiment.state_shapes()
    jaxpr = jax.make_jaxpr(half_experiment.step_function())(shapes, half_experiment.batch_shapes(16), jax.random.key(0))
    # Attention may sum its scores in float32; every product with a parameter is in bfloat16, forward and backward.
    products = [types for types in matrix_products(jaxpr.jaxpr) if all(t.ndim <= 3 for t in types)]
    assert len(products) > 20 and all(t.dtype == jnp.bfloat16 for types in products for t in types)


def matrix_products(jaxpr):
    """Return the operand types of every dot_general, at any depth."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield [v.aval for v in equation.invars]
        for inner in jax_core.jaxprs_in_params(equation.params):
            yield from matrix_products(inner)


def test_the_first_step_that_is_not_finite_is_recorded():
    config = small_configs.config(small_configs.CNN, optimizer={"name": "sgd", "learning_rate": 1e15})
    _, history = trained(config, 5)
    at = [int(state.diverged_at) for state, _ in history]
    first = next(i for i, (_, m) in enumerate(history) if not np.isfinite(m["loss"][0]) or not np.isfinite(m["grad_norm"][0]))
    assert at[first:] == [first + 1] * (5 - first) and not any(at[:first])


def test_label_smoothing_is_that_of_optax():
    logits = jax.random.normal(jax.random.key(0), (4, 6, 11))
    labels = jnp.arange(24).reshape(4, 6) % 11
    expected = optax.softmax_cross_entropy(logits, optax.smooth_labels(jax.nn.one_hot(labels, 11), 0.1)).sum()

    class Fixed:
        def __call__(self, x, rngs=None):
            return logits if x.ndim == 2 else logits[:, 0]

    task = LanguageModel({"vocab_size": 11}, label_smoothing=0.1)
    tokens = jnp.concatenate([jnp.zeros((4, 1), int), labels], 1)
    total, weight, metrics = task.loss(Fixed(), {"tokens": tokens, "weight": jnp.ones(4)}, None)
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    assert weight == 24
    task = Classify({"image_shape": (2, 2, 1), "num_classes": 11}, label_smoothing=0.1)
    batch = {"image": jnp.zeros((4, 2, 2, 1)), "label": labels[:, 0], "weight": jnp.array([1, 1, 0, 1.0])}
    total, weight, metrics = task.loss(Fixed(), batch, None)
    losses = optax.softmax_cross_entropy(logits[:, 0], optax.smooth_labels(jax.nn.one_hot(labels[:, 0], 11), 0.1))
    np.testing.assert_allclose(total, losses[jnp.array([0, 1, 3])].sum(), rtol=1e-5)
    assert weight == 3 and metrics["loss"][0] != total


def test_padded_targets_do_not_count():
    task = LanguageModel({"vocab_size": 5})

    class Uniform:
        def __call__(self, x, rngs=None):
            return jnp.zeros((*x.shape, 5))

    tokens = jnp.array([[0, 1, 2, -1], [0, -1, -1, -1], [1, 2, 3, 4]])
    metrics = task.evaluate(Uniform(), {"tokens": tokens, "weight": jnp.array([1.0, 1.0, 0.0])}, None)
    assert float(metrics["loss"][1]) == 2
    np.testing.assert_allclose(metrics["loss"][0] / metrics["loss"][1], np.log(5), rtol=1e-6)
    np.testing.assert_allclose(task.summarize({"loss": np.log(5)})["perplexity"], 5)
