"""Tables over time: windows, standardisation, models and the task, against direct computations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmodels.data.registry import open_dataset
from jaxmodels.data.source import get_batch
from jaxmodels.errors import ConfigError
from jaxmodels.experiment.build import build_experiment
from jaxmodels.models import create
from jaxmodels.models.functional import split
from jaxmodels.step.step import make_eval_step, make_loss
from jaxmodels.tasks.forecast import Forecast

HEADER = "date,a,b\n"


@pytest.fixture
def table(tmp_path):
    generator = np.random.default_rng(0)
    values = generator.normal(size=(60, 2)) * [3, 0.5] + [10, -2]
    path = tmp_path / "x.csv"
    path.write_text(HEADER + "".join(f"2020-01-01 {i},{a},{b}\n" for i, (a, b) in enumerate(values)))
    return str(path), values


OPTIONS = {"lookback": 6, "horizon": 3, "rows": (30, 14, 14)}


def test_windows_and_standardisation(table, csv_reader):
    path, values = table
    dataset = open_dataset(f"csv:{path}", OPTIONS, None)
    scaled = (values - values[:30].mean(0)) / values[:30].std(0)
    assert {k: len(v) for k, v in dataset.splits.items()} == {"train": 30 - 8, "validation": 12, "test": 12}
    assert dataset.info["columns"] == ["a", "b"]
    train = get_batch(dataset.splits["train"], np.arange(22))
    np.testing.assert_allclose(train["past"][5], scaled[5:11], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(train["future"][21], scaled[27:30], rtol=1e-4, atol=1e-6)
    # Validation and test forecast all their rows, from a past that may be in the split before.
    for name, first, last in (("validation", 30, 44), ("test", 44, 58)):
        part = get_batch(dataset.splits[name], np.arange(12))
        np.testing.assert_allclose(part["future"][0], scaled[first : first + 3], rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(part["past"][0], scaled[first - 6 : first], rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(part["future"][-1], scaled[last - 3 : last], rtol=1e-4, atol=1e-6)


def test_errors_of_a_table_are_named(table, tmp_path, csv_reader):
    path, _ = table

    def error(text=None, **options):
        if text is not None:
            (tmp_path / "bad.csv").write_text(text)
        with pytest.raises(ConfigError) as caught:
            open_dataset(f"csv:{tmp_path / 'bad.csv' if text is not None else path}", OPTIONS | options, None)
        return str(caught.value)

    assert "bad.csv, line 3" in error(HEADER + "d,1,2\nd,x,2\n")
    assert "bad.csv, line 2" in error(HEADER + "d,1\n")
    assert "bad.csv, line 3: 'a' is nan, which is not finite" in error(HEADER + "d,1,2\nd,nan,2\n", rows=(1, 1, 1))
    assert "no column 'c'; it has date, a, b" in error(columns=("a", "c"))
    assert "more than the 60" in error(rows=(40, 14, 14))
    assert "hold no window" in error(lookback=29)
    assert "three numbers" in error(rows=(30, 28))
    assert "never changes" in error(HEADER + "d,1,2\n" * 60)
    with pytest.raises(ConfigError, match="there is no file"):
        open_dataset("csv:none.csv", OPTIONS, None)


def test_forecast_counts_every_value_once_and_skips_padding():
    task = Forecast({"lookback": 4, "horizon": 2, "variables": 3}, instance_norm=False)
    batch = {"past": jnp.ones((2, 4, 3)), "future": jnp.arange(12.0).reshape(2, 2, 3), "weight": jnp.array([1.0, 0.0])}
    metrics = task.evaluate(lambda past, rngs: jnp.zeros((2, 2, 3)), batch, None)
    assert float(metrics["mse"][0]) == sum(i**2 for i in range(6)) and float(metrics["mse"][1]) == 6
    assert float(metrics["mae"][0]) == sum(range(6))
    assert task.summarize({"mse": 1.0, "mae": 2.0}) == {"loss": 1.0, "mse": 1.0, "mae": 2.0}


def test_instance_norm_makes_a_forecast_follow_shift_and_scale():
    task = Forecast({"lookback": 8, "horizon": 2, "variables": 3})
    model = create("forecast_linear", 8, 2, 3, window=3, rngs=nnx.Rngs(0))
    past = jax.random.normal(jax.random.key(0), (2, 8, 3))
    batch = {"past": past}
    moved = {"past": 5 * past + 7}
    np.testing.assert_allclose(task.predict(model, moved), 5 * task.predict(model, batch) + 7, rtol=1e-3)


def test_linear_forecast_is_dlinear_by_hand():
    model = create("forecast_linear", 10, 4, 2, window=5, rngs=nnx.Rngs(0))
    for layer in (model.trend, model.rest):
        layer.kernel[...] = jax.random.normal(jax.random.key(1), layer.kernel.shape)
    past = np.random.default_rng(0).normal(size=(3, 10, 2)).astype(np.float32)
    expected = np.empty((3, 4, 2))
    for b in range(3):
        for v in range(2):
            x = past[b, :, v]
            padded = np.concatenate([[x[0]] * 2, x, [x[-1]] * 2])
            trend = np.array([padded[i : i + 5].mean() for i in range(10)])
            expected[b, :, v] = trend @ np.asarray(model.trend.kernel[...]) + (x - trend) @ np.asarray(model.rest.kernel[...])
    np.testing.assert_allclose(model(past), expected, atol=1e-4)


@pytest.mark.parametrize("name", ["forecast_linear", "forecast_lstm", "forecast_transformer"])
def test_variables_are_forecast_independently(name):
    model = create(name, 40, 5, 3, rngs=nnx.Rngs(0))
    past = jax.random.normal(jax.random.key(0), (2, 40, 3))
    changed = past.at[:, :, 1].add(1.0)
    before, after = model(past), model(changed)
    assert before.shape == (2, 5, 3)
    np.testing.assert_allclose(before[..., ::2], after[..., ::2], atol=1e-6)
    assert jnp.abs(before[..., 1] - after[..., 1]).max() > 1e-4
    np.testing.assert_allclose(model(past[..., ::-1]), before[..., ::-1], atol=1e-5)


@pytest.mark.parametrize(("name", "options"), [("forecast_linear", {"window": 4}), ("forecast_lstm", {"patch": 41}), ("forecast_transformer", {"stride": 0})])
def test_sizes_that_do_not_fit(name, options):
    with pytest.raises(ValueError):
        create(name, 40, 5, 3, **options, rngs=nnx.Rngs(0))


def test_a_forecast_experiment_builds_and_rejects_other_models(table):
    path, _ = table
    config = {
        "model": {"name": "forecast_linear"},
        "task": "forecast",
        "data": {"source": f"csv:{path}", **OPTIONS, "batch_size": 4},
        "optimizer": {"name": "adam", "learning_rate": 1e-3},
        "training": {"steps": 3},
        "checkpoint": {"best": "mse"},
    }
    assert build_experiment(config).task.provides == {"lookback": 6, "horizon": 3, "variables": 2}
    with pytest.raises(ConfigError, match="Models that fit it: forecast_linear, forecast_lstm, forecast_transformer"):
        build_experiment(config | {"model": {"name": "cnn"}})


class NoForecast(nnx.Module):
    """Forecasts 0 for every value."""

    def __init__(self, lookback: int, horizon: int, variables: int, *, rngs: nnx.Rngs):
        self.shape, self.scale = (horizon, variables), nnx.Param(jnp.zeros(()))

    def __call__(self, past, *, rngs=None):
        return jnp.zeros((len(past), *self.shape), past.dtype) * self.scale[...]


def test_targets_are_not_rounded_to_the_compute_dtype():
    """In bfloat16, 1.001 would become 1."""
    task = Forecast({"lookback": 3, "horizon": 2, "variables": 1}, instance_norm=False)
    batch = {"past": jnp.zeros((1, 3, 1)), "future": jnp.array([[[1.001], [2.003]]]), "weight": jnp.ones(1)}
    graph, params, stats = split(NoForecast(3, 2, 1, rngs=nnx.Rngs(0)))
    total, (weight, metrics, _) = make_loss(task, graph, "bfloat16")(params, {}, stats, batch, jax.random.key(0))
    np.testing.assert_allclose([total, weight], [1.001**2 + 2.003**2, 2], rtol=1e-6)
    np.testing.assert_allclose(metrics["mae"][0], 3.004, rtol=1e-6)


class LastRow(nnx.Module):
    """Forecasts the last row of the past for every row of the horizon, in the dtype of its parameter; `inputs` are the dtypes it was called with."""

    inputs = []

    def __init__(self, lookback: int, horizon: int, variables: int, *, rngs: nnx.Rngs):
        self.horizon, self.scale = horizon, nnx.Param(jnp.ones(()))

    def __call__(self, past, *, rngs=None):
        self.inputs.append(past.dtype)
        return jnp.repeat(past[:, -1:], self.horizon, axis=1) * self.scale[...]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_instance_norm_has_float32_statistics(precision):
    """Values of 300 ± 0.1: neighbouring values of bfloat16 differ by 2 there, so that mean and deviation would be lost."""
    past = (300 + 0.1 * np.random.default_rng(0).normal(size=(4, 24, 3))).astype(np.float32)
    future = np.full((4, 2, 3), 300, np.float32)
    window = past.astype(np.float64)
    mean, deviation = window.mean(1, keepdims=True), np.sqrt(window.var(1, keepdims=True) + 1e-5)
    batch = {"past": jnp.asarray(past), "future": jnp.asarray(future), "weight": jnp.ones(4)}
    task = Forecast({"lookback": 24, "horizon": 2, "variables": 3})

    def mse(module):
        graph, params, stats = split(module(24, 2, 3, rngs=nnx.Rngs(0)))
        total, (weight, _, _) = make_loss(task, graph, precision)(params, {}, stats, batch, jax.random.key(0))
        metrics, _ = make_eval_step(task, graph, precision)(params, stats, batch | {"index": jnp.arange(4)}, zeros, jax.random.key(0))
        np.testing.assert_allclose(metrics["mse"][0] / metrics["mse"][1], total / weight, rtol=1e-5)
        return float(total / weight)

    zeros = {name: (jnp.zeros(()), jnp.zeros(())) for name in ("mse", "mae")}
    # A forecast of 0 in units of the window is its mean.
    np.testing.assert_allclose(mse(NoForecast), np.mean((mean - future) ** 2), rtol=5e-3)
    # The model itself computes in the compute dtype: its input of about 1 is rounded by up to 2**-9 of it.
    LastRow.inputs.clear()
    normalised = (window[:, -1:] - mean) / deviation
    np.testing.assert_allclose(mse(LastRow), np.mean((normalised * deviation + mean - future) ** 2), rtol=2e-2)
    assert {dtype.name for dtype in LastRow.inputs} == {precision}
