"""Losses against their definitions, written out in numpy, and by enumeration."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxmodels.errors import ConfigError
from jaxmodels.tasks import losses
from jaxmodels.tasks.classify import Classify
from jaxmodels.tasks.classify_text import ClassifyText
from jaxmodels.tasks.contrast import Contrast
from jaxmodels.tasks.forecast import Forecast
from jaxmodels.tasks.regress_text import RegressText

RANDOM = np.random.default_rng(0)


def softmax(x):
    return np.exp(x) / np.exp(x).sum(axis=-1, keepdims=True)


def test_errors_of_numbers():
    predicted, target = jnp.array([0.0, 1.0, 5.0, -2.0]), jnp.array([0.5, 1.0, 1.0, 1.0])
    np.testing.assert_allclose(losses.mse(predicted, target), [0.25, 0, 16, 9])
    np.testing.assert_allclose(losses.mae(predicted, target), [0.5, 0, 4, 3])
    np.testing.assert_allclose(losses.huber(predicted, target, delta=2.0), [0.125, 0, 2 * 3, 2 * 2])


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_cross_entropy_and_focal_of_classes_and_of_distributions(smoothing):
    logits, label = RANDOM.normal(size=(2, 3, 5)), RANDOM.integers(0, 5, (2, 3))
    p, target = softmax(logits), np.eye(5)[label]
    smooth = (1 - smoothing) * target + smoothing / 5
    expected = -(smooth * np.log(p)).sum(-1)
    for given in (label, target):
        np.testing.assert_allclose(losses.cross_entropy(jnp.asarray(logits), jnp.asarray(given), label_smoothing=smoothing), expected, rtol=1e-5)
    expected = -(smooth * (1 - p) ** 1.5 * np.log(p)).sum(-1)
    for given in (label, target):
        value = losses.focal(jnp.asarray(logits), jnp.asarray(given), gamma=1.5, label_smoothing=smoothing)
        np.testing.assert_allclose(value, expected, rtol=1e-5)
    same = losses.focal(jnp.asarray(logits), jnp.asarray(label), gamma=0.0, label_smoothing=smoothing)
    np.testing.assert_allclose(same, losses.cross_entropy(jnp.asarray(logits), jnp.asarray(label), label_smoothing=smoothing), rtol=1e-5)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_focal_has_a_finite_gradient_at_probability_one(gamma):
    value, gradient = jax.value_and_grad(lambda x: losses.focal(x, jnp.array(0), gamma=gamma))(jnp.array([200.0, 0.0, -5.0]))
    assert value == 0 and np.isfinite(gradient).all()


def test_ctc_sums_over_all_alignments():
    T, C = 5, 3
    logits = RANDOM.normal(size=(3, T, C)).astype(np.float32)
    target = np.array([[1, 2, -1], [1, 1, -1], [2, -1, -1]])
    valid = np.arange(T)[None] < np.array([5, 4, 3])[:, None]
    value = losses.ctc(jnp.asarray(logits), jnp.asarray(target), valid=jnp.asarray(valid))
    p = softmax(logits)
    for row in range(3):
        real, total = valid[row].sum(), 0.0
        for path in itertools.product(range(C), repeat=int(real)):
            if [label for label, _ in itertools.groupby(path) if label] == [label for label in target[row] if label >= 0]:
                total += np.prod([p[row, t, label] for t, label in enumerate(path)])
        np.testing.assert_allclose(value[row], -np.log(total), rtol=1e-4)
    moved = losses.ctc(jnp.roll(jnp.asarray(logits), 1, axis=-1), jnp.asarray(np.where(target > 0, (target + 1) % C, target)), blank=1, valid=valid)
    np.testing.assert_allclose(moved, value, rtol=1e-4)
    assert losses.ctc(jnp.zeros((1, 2, C)), jnp.array([[1, 1]]))[0] > 1e4  # two equal labels need three frames


def pairs():
    return (jnp.asarray(RANDOM.normal(size=(6, 4)), jnp.float32) for _ in range(2))


def test_info_nce_picks_the_partner_in_both_directions():
    one, other = pairs()
    a, b = (np.asarray(x) / np.linalg.norm(x, axis=1, keepdims=True) for x in (one, other))
    scores = a @ b.T / 0.3
    expected = -(np.log(np.diag(softmax(scores))) + np.log(np.diag(softmax(scores.T)))) / 2
    compute = jax.jit(losses.info_nce)
    np.testing.assert_allclose(compute(one, other, temperature=0.3), expected, rtol=1e-4)
    np.testing.assert_allclose(compute(5 * one, other, temperature=0.3), expected, rtol=1e-4)


def test_nt_xent_is_that_of_optax():
    one, other = pairs()
    expected = jax.jit(optax.ntxent)(jnp.concatenate([one, other]), jnp.tile(jnp.arange(6), 2), temperature=0.3)
    np.testing.assert_allclose(jax.jit(losses.nt_xent)(one, other, temperature=0.3).mean(), expected, rtol=1e-5)


@pytest.mark.parametrize("loss", [losses.info_nce, losses.nt_xent])
def test_padding_rows_are_not_negatives(loss):
    one, other = pairs()
    valid = jnp.arange(6) < 4

    def first(one, other, valid):
        values = loss(one, other, temperature=0.3, valid=valid)
        return jnp.sum(values[:4] * jnp.arange(1, 5)), values

    (total, values), gradient = jax.jit(jax.value_and_grad(first, has_aux=True))(one, other, valid)
    (expected, _), same = jax.jit(jax.value_and_grad(first, has_aux=True))(one[:4], other[:4], None)
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    np.testing.assert_allclose(gradient[:4], same, rtol=1e-4, atol=1e-5)
    assert np.isfinite(values).all() and not gradient[4:].any()


class Fixed(nnx.Module):
    """A model with fixed outputs."""

    def __init__(self, answer):
        self.answer = answer

    def __call__(self, x, *, rngs=None):
        return self.answer


def test_tasks_train_on_the_configured_loss():
    weight, rngs = jnp.array([1.0, 0.5, 0.0]), nnx.Rngs(dropout=0)
    logits, label = jnp.asarray(RANDOM.normal(size=(3, 4)), jnp.float32), jnp.array([0, 3, 1])
    focal = losses.focal(logits, label, gamma=3.0, label_smoothing=0.1)
    batch = {"image": jnp.zeros((3, 2, 2, 1)), "tokens": jnp.zeros((3, 5), jnp.int32), "label": label, "weight": weight}
    info = {"image_shape": (2, 2, 1), "num_classes": 4, "vocab_size": 7}
    for task in (Classify, ClassifyText):
        total, count, metrics = task(info, loss="focal", gamma=3.0, label_smoothing=0.1).loss(Fixed(logits), batch, rngs)
        np.testing.assert_allclose([total, count], [jnp.sum(focal * weight), 1.5], rtol=1e-6)
        np.testing.assert_allclose(metrics["loss"][0], jnp.sum(losses.focal(logits, label, gamma=3.0) * weight), rtol=1e-6)

    value = jnp.array([[1.0], [-2.0], [9.0]])
    batch = {"tokens": batch["tokens"], "label": jnp.array([4.0, -2.5, 0.0]), "weight": weight}
    for name, expected in {"mse": 9 + 0.25 / 2, "mae": 3 + 0.5 / 2, "huber": 2 * 2 + 0.125 / 2}.items():
        task = RegressText({"vocab_size": 7}, loss=name, delta=2.0)
        total, count, metrics = task.loss(Fixed(value), batch, rngs)
        np.testing.assert_allclose([total, count], [expected, 1.5], rtol=1e-6)
        np.testing.assert_allclose(task.summarize({k: float(a / b) for k, (a, b) in metrics.items()})["loss"], expected / 1.5, rtol=1e-6)

    batch = {"past": jnp.zeros((2, 3, 1)), "future": jnp.array([[[4.0], [0.0]], [[1.0], [1.0]]]), "weight": jnp.array([1.0, 0.0])}
    task = Forecast({"lookback": 3, "horizon": 2, "variables": 1}, loss="mae", instance_norm=False)
    total, count, _ = task.loss(Fixed(jnp.ones((2, 2, 1))), batch, rngs)
    assert (total, count) == (4, 2)


INFO = {
    Classify: {"image_shape": (2, 2, 1), "num_classes": 4},
    ClassifyText: {"vocab_size": 7, "num_classes": 4},
    Contrast: {"image_shape": (2, 2, 1)},
    Forecast: {"lookback": 3, "horizon": 2, "variables": 1},
    RegressText: {"vocab_size": 7},
}


@pytest.mark.parametrize("task", INFO)
def test_the_error_of_an_unknown_loss_lists_the_known_ones(task):
    with pytest.raises(ConfigError) as caught:
        task(INFO[task], loss="hubr")
    table = {Contrast: losses.CONTRASTIVE, Forecast: losses.REGRESSION, RegressText: losses.REGRESSION}.get(task, losses.CLASSIFICATION)
    assert "config.task.loss: there is no loss 'hubr'" in str(caught.value)
    assert all(name in str(caught.value) for name in (*table, "package.module:function"))


def test_tasks_train_on_a_user_loss():
    weight, rngs = jnp.array([1.0, 0.5, 0.0]), nnx.Rngs(dropout=0)
    logits, label = jnp.asarray(RANDOM.normal(size=(3, 4)), jnp.float32), jnp.array([0, 3, 1])
    batch = {"image": jnp.zeros((3, 2, 2, 1)), "tokens": jnp.zeros((3, 5), jnp.int32), "label": label, "weight": weight}
    hinge = np.maximum(0, 1 + np.asarray(logits) - np.asarray(logits)[np.arange(3), label][:, None]).sum(1) - 1
    for task in (Classify, ClassifyText):
        total, count, metrics = task(INFO[task], loss="own_losses:hinge").loss(Fixed(logits), batch, rngs)
        np.testing.assert_allclose([total, metrics["loss"][0], count], [hinge @ weight, hinge @ weight, 1.5], rtol=1e-5)

    batch = {"tokens": batch["tokens"], "label": jnp.array([4.0, -2.5, 0.0]), "weight": weight}
    task = RegressText(INFO[RegressText], loss="own_losses:log_cosh")
    total, _, metrics = task.loss(Fixed(jnp.array([[1.0], [-2.0], [9.0]])), batch, rngs)
    np.testing.assert_allclose(total, np.log(np.cosh(3.0)) + 0.5 * np.log(np.cosh(0.5)), rtol=1e-5)
    values = task.summarize({name: float(a / b) for name, (a, b) in metrics.items()})
    assert values["loss"] == pytest.approx(float(total) / 1.5) and values["mae"] == pytest.approx((3 + 0.5 * 0.5) / 1.5)

    batch = {"past": jnp.zeros((2, 3, 1)), "future": jnp.full((2, 2, 1), 3.0), "weight": jnp.array([1.0, 0.0])}
    total, count, _ = Forecast(INFO[Forecast], loss="own_losses:log_cosh", instance_norm=False).loss(Fixed(jnp.zeros((2, 2, 1))), batch, rngs)
    np.testing.assert_allclose([total, count], [2 * np.log(np.cosh(3.0)), 2], rtol=1e-5)

    batch = {"image": jnp.ones((3, 2, 2, 1)), "weight": weight}
    total, count, _ = Contrast(INFO[Contrast], loss="own_losses:pull", flip=True).loss(Fixed(jnp.arange(12.0).reshape(6, 2)), batch, rngs)
    np.testing.assert_allclose([total, count], [(36 + 36) * 1.5, 1.5])  # partners differ by 6 in both coordinates


@pytest.mark.parametrize(
    ("task", "loss", "message"),
    [
        (RegressText, "own_losses:mean_error", r"\(predicted \[...\], target \[...\]\) that returns one float value for each example; it returned"),
        (Classify, "own_losses:log_cosh", "must be a function .logits .*; ValueError: Incompatible shapes"),
        (Contrast, "own_losses:log_cosh", "must be a function .one .*temperature"),
        (RegressText, "own_losses:none", "cannot import 'own_losses:none'"),
    ],
)
def test_a_function_with_another_signature_is_one_error(task, loss, message):
    with pytest.raises(ConfigError, match="config.task.loss: .*" + message):
        task(INFO[task], loss=loss)


def test_label_smoothing_needs_a_loss_with_this_argument():
    with pytest.raises(ConfigError, match="label_smoothing=0.1: the loss 'own_losses:hinge' has no argument label_smoothing"):
        ClassifyText(INFO[ClassifyText], loss="own_losses:hinge", label_smoothing=0.1)
    with pytest.raises(ConfigError, match=r"target \[..., C\]"):  # mixed labels are probabilities, which this loss cannot use as indices
        Classify(INFO[Classify], loss="own_losses:hinge", mixup=0.2)


def test_options_of_losses_are_checked():
    with pytest.raises(ConfigError, match="gamma"):
        ClassifyText({"vocab_size": 3, "num_classes": 2}, gamma=-1.0)
    with pytest.raises(ConfigError, match="delta"):
        RegressText({"vocab_size": 3}, delta=0.0)
