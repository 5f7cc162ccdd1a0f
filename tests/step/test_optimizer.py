"""Optimizers and schedules: those of Optax by name, Muon, and a user's own."""

import inspect
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small_configs
from flax import nnx
from optax import contrib

from jaxmodels.data.loader import TrainingBatches
from jaxmodels.errors import ConfigError
from jaxmodels.experiment.build import build_experiment
from jaxmodels.experiment.sections import resolve
from jaxmodels.models import create
from jaxmodels.models.functional import flatten, split
from jaxmodels.step import optimizer as optimizer_lib
from jaxmodels.step.optimizer import Optimizer
from jaxmodels.step.schedule import Schedule, make_schedule

PARAMS = {"layer": {"kernel": jnp.ones((3, 3)), "bias": jnp.ones(3)}}
OWN = {"noisy_sgd": {"key": 0}}  # arguments that Optax requires


SHAPES = {
    "constant": lambda s: 1.0,
    "linear": lambda s: 1 - 0.9 * s / 90,
    "cosine": lambda s: 0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi * s / 90)),
    "wsd": lambda s: 1.0 if s < 70 else 1 - 0.9 * (s - 70) / 20,
    "inverse_sqrt": lambda s: np.sqrt(10 / (s + 10)),
}


@pytest.mark.parametrize("name", SHAPES)
def test_schedules(name):
    schedule = make_schedule(2.0, Schedule(name=name, warmup=10, decay=20 if name == "wsd" else None, final=0.1), 100)
    got = [float(schedule(s)) for s in range(100)]
    expected = [2 * (s + 1) / 10 for s in range(10)] + [2 * SHAPES[name](s) for s in range(90)]
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_every_function_of_optax_with_a_learning_rate_is_supported_or_refused_by_name():
    found = {
        name
        for module in (optax, contrib)
        for name, value in vars(module).items()
        if inspect.isfunction(value) and not name.startswith(("_", "scale_by_")) and "learning_rate" in inspect.signature(value).parameters
    }
    known = set(optimizer_lib.names())
    assert {"muon", "adopt", "prodigy", "momo"} <= known
    assert found - {"scale_by_learning_rate"} <= known | set(optimizer_lib.UNSUPPORTED)
    assert not known & set(optimizer_lib.UNSUPPORTED)


@pytest.mark.parametrize("name", optimizer_lib.names())
def test_every_listed_optimizer_makes_a_step(name):
    transform = optimizer_lib.make_optimizer(Optimizer(name=name, learning_rate=0.1, weight_decay=0.01), OWN.get(name, {}), lambda s: 0.1)
    state = transform.init(PARAMS)
    update = jax.jit(lambda grads, state: transform.update(grads, state, PARAMS, value=jnp.float32(2.0)))
    for _ in range(2):
        updates, state = update(jax.tree.map(jnp.ones_like, PARAMS), state)
    assert all(jnp.isfinite(u).all() for u in jax.tree.leaves(updates))
    assert any((u != 0).any() for u in jax.tree.leaves(updates))


OF_CONTRIB = [n for n in vars(contrib) if n in optimizer_lib.names()]


@pytest.mark.parametrize("name", [n if n in ("muon", "prodigy", "momo") else pytest.param(n, marks=pytest.mark.slow) for n in OF_CONTRIB])
def test_optimizers_of_contrib_train_as_optax_by_hand(name):
    """Three steps through the config and the train step, against the Optax function alone."""
    base = small_configs.config(small_configs.CNN, model__dropout=0.0)
    experiment = build_experiment(small_configs.config(base, optimizer={"name": name, "learning_rate": 1e-3, **OWN.get(name, {})}))
    state = jax.jit(experiment.init_function())(jax.random.key(0))
    step, batches = jax.jit(experiment.step_function()), TrainingBatches(experiment.dataset.splits["train"], 32, 3, seed=0, shuffle=True)
    loss = experiment._loss
    alone = optax.with_extra_args_support(getattr(contrib, name)(learning_rate=1e-3))
    params, opt_state = state.params, alone.init(state.params)

    @jax.jit
    def by_hand(params, opt_state, batch):
        mean = lambda params: loss(params, {}, {}, batch, jax.random.key(0))[0] / 32  # noqa: E731
        value, grads = jax.value_and_grad(mean)(params)
        updates, opt_state = alone.update(grads, opt_state, params, value=value)
        return optax.apply_updates(params, updates), opt_state

    for s in range(3):
        state, _ = step(state, batches[s], jax.random.key(1))
        params, opt_state = by_hand(params, opt_state, batches[s])
    for one, other in zip(jax.tree.leaves(state.params), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-4, atol=2e-6)


@pytest.mark.parametrize(
    ("name", "reason"),
    [("sophia", "evaluates the loss again"), ("dpsgd", "gradient of each example"), ("schedule_free_adamw", "training.ema"), ("sam", "wraps another")],
)
def test_an_optimizer_that_needs_another_step_is_refused_with_its_reason(name, reason):
    with pytest.raises(ConfigError, match=rf"config.optimizer.name: '{name}' of Optax .*{reason}"):
        resolve(small_configs.config(small_configs.CNN, optimizer={"name": name, "learning_rate": 0.1}))


def test_an_optimizer_that_decays_all_parameters_rejects_patterns():
    config = small_configs.config(small_configs.CNN, optimizer={"name": "novograd", "learning_rate": 0.1, "weight_decay": 0.1, "no_decay": ("output",)})
    with pytest.raises(ConfigError, match="no_decay: 'novograd' decays all parameters"):
        build_experiment(config)


def muon(scan, **keys):
    """Parameters of a small decoder and Muon's updates of them in two steps, by path of an unstacked model."""
    model = create("gpt", 11, context=4, layers=3, heads=2, width=4, scan=False, rngs=nnx.Rngs(0))
    params = split(model)[1]
    if scan:
        params = params | {"blocks": jax.tree.map(lambda *x: jnp.stack(x), *(params["blocks"][str(i)] for i in range(3)))}
    transform = optimizer_lib.make_optimizer(Optimizer(name="muon", learning_rate=0.1, **keys.pop("options", {})), keys, lambda s: 0.1)
    state = transform.init(params)
    for power in (1, 2):
        updates, state = transform.update(jax.tree.map(lambda x: jnp.sin(7 * x) ** power, params), state, params)  # noqa: B023
    if scan:
        updates = updates | {"blocks": {str(i): jax.tree.map(lambda x: x[i], updates["blocks"]) for i in range(3)}}  # noqa: B023
        params = params | {"blocks": {str(i): jax.tree.map(lambda x: x[i], params["blocks"]) for i in range(3)}}  # noqa: B023
    return flatten(params), flatten(updates)


def test_muon_orthogonalizes_matrices_and_adam_updates_the_rest():
    params, updates = muon(False)
    # Five Newton-Schulz steps bring singular values near 1 (Jordan et al. 2024: 0.7 to 1.2), times the rate and sqrt(wide / high).
    values = np.linalg.svd(updates["blocks/0/mlp/up/kernel"], compute_uv=False) / (0.1 * 2)
    assert values.min() > 0.5 and values.max() < 1.3
    assert np.abs(updates["blocks/0/mlp/up/bias"]).max() <= 0.11  # Adam's: at most the rate
    by_hand = contrib.muon(0.1)
    state = by_hand.init(params)
    for power in (1, 2):
        expected, state = by_hand.update(jax.tree.map(lambda x: jnp.sin(7 * x) ** power, params), state, params)  # noqa: B023
    for path, update in updates.items():
        np.testing.assert_allclose(update, expected[path], rtol=1e-4, atol=1e-6, err_msg=path)


def test_muon_of_stacked_blocks_is_that_of_each_block():
    keys = {"options": {"weight_decay": 0.1}, "adam_weight_decay": 0.2, "adam_parameters": ["embed"], "adam_learning_rate": 0.05}
    for (path, one), other in zip(muon(False, **keys)[1].items(), muon(True, **keys)[1].values(), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6, err_msg=path)


def test_muon_decays_by_path():
    params, plain = muon(False, adam_parameters=["embed", "positions"])
    _, decayed = muon(
        False, adam_parameters=["embed", "positions"], adam_weight_decay=0.2, options={"weight_decay": 0.1, "no_decay": ("bias$", "scale$", "query")}
    )
    share = {path: float(np.mean((plain[path] - decayed[path]) / (0.1 * params[path]))) for path in params if "kernel" in path or "embedding" in path}
    expected = {path: 0.2 if "embedding" in path else 0 if "query" in path else 0.1 for path in share}
    np.testing.assert_allclose(list(share.values()), list(expected.values()), atol=1e-3)
    np.testing.assert_array_equal(plain["blocks/0/mlp/up/bias"], decayed["blocks/0/mlp/up/bias"])


def test_muon_without_a_matrix_is_refused():
    config = small_configs.config(small_configs.CNN, optimizer={"name": "muon", "learning_rate": 0.1}, training__trainable=("bias",))
    with pytest.raises(ConfigError, match="no trained parameter is one"):
        build_experiment(config)


OWN_MODULE = """
import optax

def momentum(learning_rate, decay: float = 0.9, *, nesterov: bool, weight_decay: float = 0.0, mask=None):
    return optax.chain(optax.add_decayed_weights(weight_decay, mask), optax.trace(decay, nesterov), optax.scale_by_learning_rate(learning_rate))

def staircase(learning_rate, steps, *, drops: tuple[float, ...] = (0.5,), factor: float = 0.1):
    return optax.piecewise_constant_schedule(learning_rate, {int(at * steps): factor for at in drops})

def no_rate(decay=0.9):
    return optax.sgd(0.1)

def takes_a_key_of_the_section(learning_rate, clip_norm):
    return optax.sgd(learning_rate)

def nothing(learning_rate):
    return None

def constant(learning_rate, steps):
    return learning_rate
"""


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    (tmp_path / "own_optimizers.py").write_text(OWN_MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    yield "own_optimizers"
    sys.modules.pop("own_optimizers", None)


def test_a_user_function_is_an_optimizer(own_module):
    own = {"name": f"{own_module}:momentum", "learning_rate": 0.1, "decay": 0.8, "nesterov": True, "weight_decay": 0.1}
    own |= {"schedule": {"name": f"{own_module}:staircase", "drops": (0.5, 0.75)}}
    config = resolve(small_configs.config(small_configs.CNN, optimizer=own))
    assert config == resolve(json.loads(json.dumps(config))), "a saved config is the same config"
    experiment = build_experiment(config)
    np.testing.assert_allclose([experiment.schedule(s) for s in (0, 29, 31, 46)], [0.1, 0.1, 0.01, 0.001], rtol=1e-5)
    params = {"layer": {"kernel": jnp.ones((3, 3)), "bias": jnp.ones(3)}}
    state = experiment.optimizer.init(params)
    updates, _ = experiment.optimizer.update(jax.tree.map(jnp.ones_like, params), state, params)
    np.testing.assert_allclose(updates["layer"]["kernel"], -0.1 * 1.8 * 1.1, rtol=1e-5)
    np.testing.assert_allclose(updates["layer"]["bias"], -0.1 * 1.8, rtol=1e-5)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"name": "no_rate"}, "must have a parameter learning_rate"),
        ({"name": "takes_a_key_of_the_section"}, "'clip_norm', which is a key of the section already"),
        ({"name": "momentum"}, "config.optimizer.nesterov is required"),
        ({"name": "momentum", "nesterov": 3}, "config.optimizer.nesterov must be true or false"),
        ({"name": "momentum", "nesterov": True, "b1": 0.9, "b2": 0.9}, "has no b1, b2. It has: .*decay.*--config.optimizer=own_optimizers:momentum in place"),
        ({"name": "nothing"}, "must return an optax.GradientTransformation, got None"),
        ({"name": "nowhere"}, "cannot import"),
        ({"name": "momentum", "nesterov": True, "schedule": "own_optimizers:staircases"}, "config.optimizer.schedule.name: cannot import"),
        ({"name": "momentum", "nesterov": True, "schedule": "own_optimizers:nothing"}, "must have the parameters learning_rate and steps"),
        ({"name": "momentum", "nesterov": True, "schedule": "own_optimizers:constant"}, "must return an Optax schedule"),
        (
            {"name": "momentum", "nesterov": True, "schedule": {"name": "own_optimizers:staircase", "warmup": 3}},
            "config.optimizer.schedule.warmup: .*no such key",
        ),
        (
            {"name": "momentum", "nesterov": True, "schedule": {"name": "own_optimizers:staircase", "factor": "x"}},
            "config.optimizer.schedule.factor must be a number",
        ),
    ],
)
def test_a_function_that_does_not_fit_is_one_error(own_module, keys, message):
    section = keys | {"name": f"{own_module}:{keys['name']}", "learning_rate": 0.1}
    with pytest.raises(ConfigError, match=message):
        build_experiment(small_configs.config(small_configs.CNN, optimizer=section))


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_weight_decay_leaves_out_what_the_patterns_match(name):
    params = {"a": {"kernel": jnp.ones(2), "bias": jnp.ones(2)}, "head": {"kernel": jnp.ones(2)}}
    options = Optimizer(name=name, learning_rate=1.0, weight_decay=0.1, no_decay=("bias$", "^head/"))
    transform = optimizer_lib.make_optimizer(options, {}, lambda s: 1.0)
    updates, _ = transform.update(jax.tree.map(jnp.zeros_like, params), transform.init(params), params)
    np.testing.assert_allclose(updates["a"]["kernel"], -0.1, rtol=1e-6)
    np.testing.assert_array_equal(updates["a"]["bias"], 0)
    np.testing.assert_array_equal(updates["head"]["kernel"], 0)
