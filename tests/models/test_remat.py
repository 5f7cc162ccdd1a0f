"""Saved and offloaded activations, and other computations on a TPU, do not change results; exactly the named activations are saved."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_configs
from flax import nnx
from platforms import traced_as

from jaxmodels.errors import ConfigError
from jaxmodels.experiment.build import build_experiment
from jaxmodels.models import positions
from jaxmodels.models.functional import merge, split
from jaxmodels.models.positions import rotary_table, rotate
from jaxmodels.models.remat import NAMES
from jaxmodels.models.transformer import Decoder

OPTIONS = {
    "layers": 2,
    "heads": 4,
    "width": 16,
    "kv_heads": 2,
    "positions": "rotary",
    "norm": "rms",
    "activation": "swiglu",
    "bias": False,
    "tie_embeddings": False,
}
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 11, (2, 8)))


def traced(**options):
    """Return a function of parameters, and the parameters: the sum of squares of a small decoder's logits."""
    graph, params, stats = split(Decoder(11, context=8, **OPTIONS, **options, rngs=nnx.Rngs(0)))
    return lambda params: jnp.sum(merge(graph, params, stats)(TOKENS) ** 2), params


def gradients(**options):
    function, params = traced(**options)
    return jax.jit(jax.value_and_grad(function))(params)


plain = functools.cache(functools.partial(gradients, remat="none"))


def assert_close(one, other, tolerance=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), one, other)


@pytest.mark.parametrize(("remat", "scan"), [((), True), (("query", "attention"), False), (NAMES, True)])
def test_saving_by_name_changes_no_gradient(remat, scan):
    assert_close(gradients(remat=remat, scan=scan), plain(scan=scan))


def products(**options):
    """Return the number of matrix products in the program of the gradient."""
    function, params = traced(scan=True, **options)
    return str(jax.make_jaxpr(jax.grad(function))(params)).count("dot_general[")


def test_saved_activations_are_not_computed_again():
    everything, nothing = products(remat=NAMES), products(remat="full")
    assert products(remat=("gate", "up")) == nothing - 2
    assert products(remat=("query", "key", "value")) == nothing - 3
    assert everything < nothing - 5


def test_offloaded_activations_are_copied_to_the_host_and_back():
    function, params = traced(scan=True, remat=("attention",), offload=("input",))
    program = str(jax.make_jaxpr(jax.grad(function))(params))
    assert program.count("pinned_host") >= 1 or program.count("Host") >= 1


@pytest.mark.parametrize(
    ("remat", "offload", "message"),
    [
        ("some", (), "remat must be one of 'none'"),
        (("querry",), (), "no activation 'querry'"),
        ("full", ("inputs",), "no activation 'inputs'"),
        ("dots", ("input",), "needs remat='full'"),
        (("input",), ("input",), "both saved"),
    ],
)
def test_unknown_names_are_errors(remat, offload, message):
    config = small_configs.config(small_configs.GPT, model__remat=remat, model__offload=offload)
    with pytest.raises(ConfigError, match=message):
        build_experiment(config)


def test_rotation_by_a_product_equals_the_rotation():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 3, 8)), jnp.float32)
    table = rotary_table(jnp.arange(5)[None], 8, 100.0)
    here = rotate(x, *table)
    half = x.astype(jnp.bfloat16)
    with traced_as("tpu"):
        np.testing.assert_allclose(rotate(x, *table), here, rtol=1e-6, atol=1e-6)
        np.testing.assert_array_equal(rotate(half, *table), positions._rotate_by_product(half, *table))


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_a_decoder_on_a_platform_is_the_same_function(platform):
    here = plain(scan=True)
    with traced_as(platform):
        assert_close(gradients(scan=True), here)


@pytest.mark.parametrize(("tiles", "tied"), [(8, True), (16, False)])
def test_a_loss_in_tiles_equals_the_loss(tiles, tied):
    """Values, metrics and gradients; tiles of rows only, and of rows and tokens."""
    found = []
    for count in (1, tiles):
        config = small_configs.config(
            small_configs.GPT, model__dropout=0.0, model__layers=1, model__tie_embeddings=tied, task__tiles=count, task__label_smoothing=0.1, data__batch_size=8
        )
        experiment = build_experiment(config)
        state = jax.jit(experiment.init_function())(jax.random.key(0))
        tokens = np.random.default_rng(1).integers(0, experiment.dataset.info["vocab_size"], (8, 17))
        batch = {"tokens": jnp.asarray(tokens), "weight": jnp.asarray([1.0] * 7 + [0.0])}
        loss = lambda params: experiment._loss(params, {}, state.stats, batch, jax.random.key(0))  # noqa: B023, E731
        found.append(jax.jit(jax.value_and_grad(loss, has_aux=True))(state.params))
    assert_close(found[1], found[0], 1e-4)


def test_tiles_that_do_not_divide_are_errors():
    with pytest.raises(ConfigError, match="task.tiles=0|tiles must be 1 or more"):
        build_experiment(small_configs.config(small_configs.GPT, task__tiles=0))
    with pytest.raises(ConfigError, match="must divide sequences"):
        build_experiment(small_configs.config(small_configs.GPT, task__tiles=3))
    with pytest.raises(ConfigError, match="set task.tiles=1"):
        build_experiment(small_configs.config(small_configs.LSTM, task__tiles=2))
