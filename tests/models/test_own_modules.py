"""A user's modules, written as the Flax tutorials write them."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_configs
from flax import nnx
from rich.console import Console
from run_state import final_state
from tutorial_models import StacksDropout, TutorialCNN, TutorialLM

from jaxmodels.data.loader import TrainingBatches
from jaxmodels.errors import ConfigError
from jaxmodels.experiment.build import build_experiment
from jaxmodels.inference.load import load
from jaxmodels.models.functional import accept_rngs, evaluation_model, flatten, merge, split, training_model
from jaxmodels.training import trainer as trainer_lib

CNN = small_configs.config(
    small_configs.CNN, model={"name": "tutorial_models:TutorialCNN", "dropout": 0.3}, training__ema=0.9, training__steps=8, log__tensorboard=False
)
LM = small_configs.config(small_configs.LSTM, model="tutorial_models:TutorialLM", data__batch_size=8, training__ema=0.9, training__steps=8)


def config(base, **changes):
    return small_configs.config(base, checkpoint__every=4, evaluation__every=4, log__every=2, **changes)


def train(config, workdir):
    return trainer_lib.train(build_experiment(config), str(workdir), console=Console(quiet=True))


@pytest.mark.parametrize(
    ("base", "changes"),
    [(CNN, {"training__accumulate": 2}), pytest.param(LM, {"training__precision": "bfloat16"}, marks=pytest.mark.slow), (CNN, {"partition": "pmap"})],
)
def test_a_resumed_run_is_bitwise_equal_to_an_uninterrupted_one(tmp_path, base, changes):
    train(config(base, **changes), tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "stopped")
    shutil.rmtree(tmp_path / "stopped" / "checkpoints" / "8")
    train(config(base, **changes), tmp_path / "stopped")
    (arrays, lines), (arrays_2, lines_2) = final_state(tmp_path / "whole"), final_state(tmp_path / "stopped")
    assert arrays.keys() == arrays_2.keys() and lines == lines_2
    for path in arrays:
        np.testing.assert_array_equal(arrays[path], arrays_2[path], err_msg=path)
    assert not any("rngs" in path for path in arrays), "random streams are no state"


def test_a_trained_module_evaluates_without_dropout(tmp_path):
    train(config(CNN), tmp_path / "run")
    run = load(str(tmp_path / "run"))
    image = np.random.default_rng(0).normal(size=(4, 8, 8, 1)).astype(np.float32)
    one, other = (run.predict({"image": image}) for _ in range(2))
    np.testing.assert_array_equal(one, other)
    by_hand = nnx.merge(*nnx.split(run.model))
    by_hand.eval()
    np.testing.assert_allclose(one, jax.nn.softmax(by_hand(image)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cls", [TutorialCNN, TutorialLM, StacksDropout])
def test_streams_follow_the_key(cls):
    given = (11,) if cls is TutorialLM else ((8, 8, 1), 10)
    graph, params, stats = split(cls(*given, rngs=nnx.Rngs(0)))
    batch = jnp.arange(32).reshape(2, 16) % 11 if cls is TutorialLM else jnp.ones((2, 8, 8, 1))

    def loss(params, key):
        model = training_model(graph, params, stats, key)
        model(batch)
        return jnp.sum(model(batch) ** 2)

    values = [float(jax.jit(loss)(params, jax.random.key(seed))) for seed in (1, 2, 1)]
    assert values[0] == values[2] != values[1]
    model = evaluation_model(graph, params, stats)
    np.testing.assert_array_equal(model(batch), model(batch))


def test_a_stream_is_seeded_as_flax_seeds_it():
    """The mask of the layer is the one that Flax draws from the stream's key."""
    graph, params, stats = split(nnx.Dropout(0.5, rngs=nnx.Rngs(0)))
    assert params == stats == {}
    key = jax.random.key(3)
    x = jnp.ones((4, 100))
    kept = merge(graph, params, stats, key)(x)
    expected = nnx.Dropout(0.5)(x, rngs=nnx.RngStream(jax.random.fold_in(key, 0), tag="dropout"))
    np.testing.assert_array_equal(kept, expected)
    assert 100 < int((kept == 0).sum()) < 300


def test_layers_and_rows_draw_their_own_masks():
    graph, params, stats = split(StacksDropout((8, 8, 1), 10, rngs=nnx.Rngs(0)))
    model = merge(graph, params, stats, jax.random.key(0))
    keys = [variable for path, variable in nnx.to_flat_state(nnx.state(model, nnx.RngKey)) if path[0] == "layers"]
    assert [key.get_value().shape for key in keys] == [(3,)]
    assert len(np.unique(jax.random.key_data(keys[0].get_value()), axis=0)) == 3


def test_the_initial_parameters_are_those_of_the_module_alone():
    experiment = build_experiment(CNN)
    state = jax.jit(experiment.init_function())(jax.random.key(5))
    alone = split(TutorialCNN((8, 8, 1), 10, nnx.Rngs(0, params=jax.random.key(5))))[1]
    for (path, one), other in zip(flatten(state.params).items(), flatten(alone).values(), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, err_msg=path)


def test_one_step_is_that_of_flax_by_hand():
    experiment = build_experiment(small_configs.config(CNN, model__dropout=0.0, optimizer={"name": "sgd", "learning_rate": 0.1}))
    state = jax.jit(experiment.init_function())(jax.random.key(0))
    batch = TrainingBatches(experiment.dataset.splits["train"], 32, 1, seed=0, shuffle=True)[0]
    after, _ = jax.jit(experiment.step_function())(state, batch, jax.random.key(1))
    model = TutorialCNN((8, 8, 1), 10, nnx.Rngs(0), 0.0)
    nnx.update(
        model, {path: value for part in (state.params, state.stats) for path, value in part.items()} | {"norm": state.params["norm"] | state.stats["norm"]}
    )

    def loss(model):
        logits = model(batch["image"])
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), batch["label"][:, None], 1))

    grads = nnx.to_pure_dict(nnx.grad(loss)(model))
    expected = jax.tree.map(lambda p, g: p - 0.1 * g, state.params, grads)
    for (path, one), other in zip(flatten(after.params).items(), flatten(expected).values(), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6, err_msg=path)
    for path, one in flatten(after.stats).items():
        np.testing.assert_allclose(one, getattr(model.norm, path.split("/")[-1])[...], rtol=1e-5, atol=1e-6)


def test_a_random_key_outside_of_a_stream_is_one_error():
    with pytest.raises(ConfigError, match="config.model: noise holds a random key.*rngs.dropout.fork"):
        build_experiment(small_configs.config(CNN, model="tutorial_models:KeepsKey"))


def test_a_module_that_takes_rngs_is_unchanged():
    linear = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    assert type(accept_rngs(linear)) is not nnx.Linear and isinstance(linear, nnx.Linear)
    np.testing.assert_array_equal(linear(jnp.ones((1, 2)), rngs=None), linear(jnp.ones((1, 2))))
    assert type(accept_rngs(accept_rngs(linear))) is type(linear)
    dropout = nnx.Dropout(0.1)
    assert type(accept_rngs(dropout)) is nnx.Dropout


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        (
            small_configs.CNN,
            {"model__name": "resnet18"},
            "the model 'resnet18' has no features, hidden, dropout. It has: .*--config.model=resnet18 in place of --config.model.name=resnet18",
        ),
        (
            small_configs.LSTM,
            {"optimizer__name": "adam", "optimizer__momentum": 0.9, "optimizer__nesterovs": True},
            "'adam' has no momentum, nesterovs. It has",
        ),
        (small_configs.CNN, {"model__hiden": 3}, "config.model.hiden: the model 'cnn' has no such key. Did you mean 'hidden'"),
    ],
)
def test_an_override_of_a_name_lists_the_keys_that_do_not_fit(section, changes, message):
    with pytest.raises(ConfigError, match=message):
        build_experiment(small_configs.config(section, **changes))


def test_the_override_that_the_error_names_replaces_the_section():
    from jaxmodels.config import set_at

    config = small_configs.config(small_configs.CNN)
    set_at(config, "model", "resnet18")
    set_at(config, "model.width", 8)
    assert build_experiment(config).config["model"]["width"] == 8
