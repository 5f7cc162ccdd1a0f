"""A mixture of experts against loops in numpy, counts by hand, and closed forms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_configs
from flax import nnx
from platforms import traced_as

from jaxmodels.experiment.build import build_experiment
from jaxmodels.experiment.dry_run import active_parameters
from jaxmodels.models import create, find, grouped, moe
from jaxmodels.models.functional import merge, new_rngs, split
from jaxmodels.models.moe import MoE
from jaxmodels.models.transformer import Decoder
from jaxmodels.tasks.language_model import LanguageModel

B, T, D, F, E, K = 2, 12, 8, 16, 4, 2


def make(**options):
    options = {"experts": E, "top_k": K, "init": nnx.initializers.normal(0.5), "out_init": nnx.initializers.normal(0.5)} | options
    return MoE(D, F, **options, rngs=nnx.Rngs(0))


def inputs(rows=B, time=T):
    x = jax.random.normal(jax.random.key(1), (rows, time, D))
    valid = np.ones((rows, time), bool)
    valid[0, 3] = valid[1, -4:] = False
    return x, jnp.asarray(valid)


@functools.partial(jax.jit, static_argnums=0)
def _apply(graph, params, stats, x, valid):
    return call(merge(graph, params, stats), x, valid)


def call(model, x, valid=None):
    y, sums = model(x, valid=valid)
    return y, moe.statistics(sums, model.mixture)


def apply(model, x, valid=None):
    return jax.tree.map(np.asarray, _apply(*split(model), x, valid))


def by_loop(model, x, valid, *, top_k=K, normalize=True, gated=True, capacity=None):
    """Compute every token's experts one at a time in float64; with a capacity, the first tokens of a row are computed."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), split(model)[1])
    silu = lambda a: a / (1 + np.exp(-a))  # noqa: E731
    y, dropped, load = np.zeros(x.shape), 0, np.zeros(p["router"]["kernel"].shape[-1])
    for b in range(x.shape[0]):
        taken = np.zeros(len(load), int)
        for t in range(x.shape[1]):
            if not valid[b, t]:
                continue
            token = np.asarray(x[b, t], np.float64)
            logits = token @ p["router"]["kernel"]
            probabilities = np.exp(logits) / np.exp(logits).sum()
            best = np.argsort(-probabilities)[:top_k]
            scale = probabilities[best].sum() if normalize else 1
            for e in best:
                load[e] += 1
                if capacity is not None and taken[e] == capacity:
                    dropped += 1
                    continue
                taken[e] += 1
                kernels = {name: p["experts"][name]["kernel"][e] for name in p["experts"]}
                up = token @ kernels["up"]
                hidden = silu(token @ kernels["gate"]) * up if gated else np.maximum(up, 0)
                y[b, t] += probabilities[e] / scale * (hidden @ kernels["down"])
    return y, dropped / load.sum(), load / load.sum()


@pytest.mark.parametrize(("block", "normalize", "gated", "top_k"), [(4, True, True, 2), (64, False, False, 1)])
def test_dropless_is_a_loop_over_tokens(monkeypatch, block, normalize, gated, top_k):
    monkeypatch.setattr(grouped, "BLOCK", block)  # many blocks per expert, and one
    model = make(top_k=top_k, normalize=normalize, activation="swiglu" if gated else "relu")
    x, valid = inputs()
    y, statistics = apply(model, x, valid)
    expected, _, load = by_loop(model, x, valid, top_k=top_k, normalize=normalize, gated=gated)
    np.testing.assert_allclose(y, expected, atol=1e-5)
    np.testing.assert_allclose(statistics["load"], load, atol=1e-6)
    np.testing.assert_allclose([statistics["expert_load_min"], statistics["expert_load_max"]], [E * load.min(), E * load.max()], atol=1e-5)
    assert statistics["dropped"] == 0


def test_products_by_blocks_are_ragged_dot(monkeypatch):
    # CPUs compute products by blocks. Accelerators use ragged_dot, and TPUs another gradient of the matrices.
    monkeypatch.setattr(grouped, "BLOCK", 4)
    sizes = jnp.array([8, 0, 4, 12], jnp.int32)
    x, kernels = jax.random.normal(jax.random.key(0), (28, D)), jax.random.normal(jax.random.key(1), (E, D, F))

    def total(function):
        return lambda x, kernels: jnp.sum(jnp.sin(function(x, kernels, sizes)[:24]))

    np.testing.assert_allclose(grouped.product(x, kernels, sizes)[:24], jax.lax.ragged_dot(x, kernels, sizes)[:24], atol=1e-5)
    ours = jax.grad(total(grouped.product), (0, 1))(x, kernels)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), ours, jax.grad(total(jax.lax.ragged_dot), (0, 1))(x, kernels))


@pytest.mark.parametrize("sizes", [(64, 0, 192, 64), (320,)])
def test_a_tpus_gradient_of_matrices_is_the_one_by_blocks(sizes):
    # In Pallas' interpreter; several tiles of rows, groups that end within them, an empty group, and rows without a group, with any values.
    sizes = jnp.array(sizes, jnp.int32)
    x, kernels, g = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate([(512, D), (len(sizes), D, F), (512, F)]))
    x, g = (a.at[320:].set(0) for a in (x, g))
    expected = jax.vjp(lambda x, kernels: grouped.product(x, kernels, sizes), x, kernels)[1](g)
    got = jax.jit(functools.partial(grouped._transpose_on_tpu, interpret=True))(x.at[320:].set(jnp.nan), kernels, sizes, g.at[320:].set(jnp.nan))
    np.testing.assert_allclose(got[0][:320], expected[0][:320], atol=1e-5)
    np.testing.assert_allclose(got[1], expected[1], atol=1e-4)
    if len(sizes) == 1:  # the product is then Pallas', too
        y = grouped._way_on_tpu(kernels, interpret=True)(x.at[320:].set(jnp.nan), kernels, sizes)
        np.testing.assert_allclose(y[:320], (x @ kernels[0])[:320], atol=1e-5)


def test_the_backward_pass_is_for_the_platform_of_the_forward_one():
    x, kernels, sizes = jnp.zeros((128, D)), jnp.zeros((2, D, F)), jnp.array([64, 64])

    def loss(x, kernels):
        with traced_as("tpu"):
            return grouped.product(x, kernels, sizes).sum()

    assert "pallas_call" not in str(jax.make_jaxpr(loss)(x, kernels))
    assert "pallas_call" in str(jax.make_jaxpr(jax.grad(loss, (0, 1)))(x, kernels))


def gradients(model, x, valid):
    graph, params, stats = split(model)

    def loss(params, x):
        y, statistics = call(merge(graph, params, stats), x, valid)
        return jnp.sum(jnp.sin(y)) + statistics["loss"]

    return jax.jit(jax.grad(loss, (0, 1)))(params, x)


def test_a_sufficient_capacity_equals_dropless_with_gradients():
    x, valid = inputs()
    one, other = make(), make(dispatch="capacity", capacity_factor=E / K)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), apply(one, x, valid), apply(other, x, valid))
    of_one, of_other = gradients(one, x, valid), gradients(other, x, valid)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-4), of_one, of_other)
    assert np.abs(of_one[0]["router"]["kernel"]).max() > 1e-2  # the router has a gradient from the output, not only from its losses
    # Against a finite difference, because both use the same gathers.
    step = 1e-2 * jax.random.normal(jax.random.key(2), x.shape)
    ends = [jnp.sum(jnp.sin(y)) + s["loss"] for y, s in (apply(one, x + sign * step / 2, valid) for sign in (1, -1))]
    np.testing.assert_allclose(jnp.sum(of_one[1] * step), ends[0] - ends[1], rtol=2e-2)


@pytest.mark.parametrize("factor", [0.5, 1.0])
def test_capacity_drops_later_tokens(factor):
    model = make(dispatch="capacity", capacity_factor=factor)
    x, valid = inputs()
    y, statistics = apply(model, x, valid)
    expected, dropped, load = by_loop(model, x, valid, capacity=int(np.ceil(factor * T * K / E)))
    assert 0 < dropped < 1
    np.testing.assert_allclose(y, expected, atol=1e-5)
    np.testing.assert_allclose(statistics["dropped"], dropped, atol=1e-6)
    np.testing.assert_allclose(statistics["load"], load, atol=1e-6)


@pytest.mark.parametrize("dispatch", ["capacity", "dropless"])
def test_padding_uses_no_capacity_and_is_not_counted(dispatch):
    model = make(dispatch=dispatch, capacity_factor=0.5)
    x, _ = inputs()
    valid = jnp.arange(T)[None, :] >= jnp.array([[0], [5]])
    y, statistics = apply(model, x, valid)
    assert not y[1, :5].any()
    other, same = apply(model, jnp.where(valid[..., None], x, 1e3), valid)
    np.testing.assert_allclose(other, y, atol=1e-6)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), same, statistics)
    np.testing.assert_allclose(statistics["load"].sum(), 1, rtol=1e-6)
    nothing, statistics = apply(model, x, jnp.zeros((B, T), bool))
    assert not nothing.any() and all(np.isfinite(v).all() and not np.any(v) for v in statistics.values())


@pytest.mark.parametrize("dispatch", ["capacity", "dropless"])
def test_the_order_of_experts_does_not_matter(dispatch):
    model = make(dispatch=dispatch, capacity_factor=0.5)
    graph, params, stats = split(model)
    order = np.array([2, 0, 3, 1])
    moved = {"router": {"kernel": params["router"]["kernel"][:, order]}, "experts": jax.tree.map(lambda w: w[order], params["experts"])}
    x, valid = inputs()
    (y, one), (z, other) = apply(model, x, valid), apply(merge(graph, moved, stats), x, valid)
    np.testing.assert_allclose(y, z, atol=1e-5)
    np.testing.assert_allclose(one["load"][order], other["load"], atol=1e-6)
    np.testing.assert_allclose(one["loss"], other["loss"], rtol=1e-5)


def test_capacity_depends_on_no_other_row_and_no_later_position():
    model = make(dispatch="capacity", capacity_factor=0.5)
    x, valid = inputs()
    y, _ = apply(model, x, valid)
    changed, _ = apply(model, x.at[1].add(1.0).at[0, 5:].add(1.0), valid)
    np.testing.assert_allclose(changed[0, :5], y[0, :5], atol=1e-6)
    assert np.abs(changed[0, 5:] - y[0, 5:]).max() > 1e-3


def test_losses_at_even_load_and_at_collapse():
    # Token i goes to expert i: identity router, one-hot inputs times s. Then P is uniform on average, f too.
    model = make(top_k=1, balance_coefficient=0.5, router_z_coefficient=0.25)
    model.router.kernel[...] = jnp.eye(D, E)
    s = 3.0
    even = s * jnp.tile(jnp.eye(E, D), (1, 3, 1))
    _, statistics = apply(model, even)
    z = np.log(np.exp(s) + E - 1) ** 2
    np.testing.assert_allclose(statistics["load"], 1 / E, rtol=1e-6)
    np.testing.assert_allclose(statistics["load_balance"], 1, rtol=1e-6)
    np.testing.assert_allclose(statistics["router_z"], z, rtol=1e-6)
    np.testing.assert_allclose(statistics["loss"], 0.5 + 0.25 * z, rtol=1e-6)
    _, statistics = apply(model, jnp.tile(even[:, :1], (1, T, 1)))
    assert statistics["expert_load_max"] == E and statistics["expert_load_min"] == 0
    np.testing.assert_allclose(statistics["load"], np.eye(E)[0])
    np.testing.assert_allclose(statistics["load_balance"], E * np.exp(s) / (np.exp(s) + E - 1), rtol=1e-6)


def test_the_balance_loss_leads_to_an_even_load():
    model = make(top_k=1, balance_coefficient=1.0, router_z_coefficient=0.0)
    graph, params, stats = split(model)
    x = jax.random.normal(jax.random.key(3), (4, 32, D)) + 0.5

    @jax.jit
    def update(params):
        gradient = jax.grad(lambda p: call(merge(graph, p, stats), x)[1]["loss"])(params)
        return jax.tree.map(lambda p, g: p - 0.2 * g, params, gradient)

    before = apply(model, x)[1]["load"].max()
    for _ in range(100):
        params = update(params)
    after = apply(merge(graph, params, stats), x)[1]["load"].max()
    assert after < 0.35 < before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 5}, "top_k=5"),
        ({"dispatch": "both"}, "dispatch"),
        ({"capacity_factor": 0.0}, "capacity_factor"),
        ({"activation": "no"}, "activation"),
        ({"experts": 0}, "experts"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


# Parameters of the released checkpoints, and the published number of active ones per token.
@pytest.mark.parametrize(
    ("name", "vocab_size", "parameters", "active"),
    [("mixtral-8x7b", 32000, 46_702_792_704, 12.9e9), ("qwen3-30b-a3b", 151936, 30_532_122_624, 3.3e9)],
)
def test_sizes_are_the_published_ones(name, vocab_size, parameters, active):
    params = split(nnx.eval_shape(lambda: create(name, vocab_size, scan=True, rngs=new_rngs(0))))[1]
    assert sum(x.size for x in jax.tree.leaves(params)) == parameters
    assert abs(active_parameters(params, find(name)[1]) - active) < 0.06e9


SMALL = {"layers": 2, "heads": 2, "width": 16, "context": 16, "dropout": 0.1, "norm": "rms", "activation": "swiglu", "bias": False}
SMALL |= {"mlp_width": 8, "moe": {"experts": 4, "top_k": 2}}


def test_a_decoder_of_experts_scanned_and_rematerialised_is_one_function():
    tokens = jax.random.randint(jax.random.key(0), (2, 8), 0, 11).at[1, 5:].set(-1)
    graph, _, stats = split(nnx.eval_shape(lambda: Decoder(11, **SMALL, rngs=new_rngs(0))))
    scanned, shapes, _ = split(nnx.eval_shape(lambda: Decoder(11, **SMALL, scan=True, remat="full", rngs=new_rngs(0))))
    random = np.random.default_rng(0)
    params = jax.tree.map(lambda x: jnp.asarray(random.normal(size=x.shape) * 0.3, jnp.float32), shapes)
    assert set(params["blocks"]["mlp"]) == {"router", "experts"}

    def loss(params, graph):
        logits, aux = merge(graph, params, stats).with_auxiliary(tokens, rngs=nnx.Rngs(dropout=1))
        return jnp.sum(jnp.sin(logits)) + 10 * aux["loss"], aux

    unrolled = params | {"blocks": {str(i): jax.tree.map(lambda x, i=i: x[i], params["blocks"]) for i in (0, 1)}}
    one = jax.jit(lambda params: loss(params, graph))(unrolled)
    other, gradient = jax.jit(jax.value_and_grad(lambda params: loss(params, scanned), has_aux=True))(params)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), one, other)
    assert all(np.isfinite(g).all() and g.any() for g in jax.tree.leaves(gradient))
    assert set(one[1]) == {"loss", "load_balance", "router_z", "load", "expert_load_min", "expert_load_max", "dropped"}


class Told(nnx.Module):
    """A model with uniform logits and an auxiliary loss of 0.5, which records its inputs."""

    def with_auxiliary(self, tokens, *, segments=None, rngs=None):
        self.tokens = tokens
        return jnp.zeros((*tokens.shape, 3)), {"loss": jnp.array(0.5), "dropped": jnp.array(0.25), "load": jnp.ones(4)}


def test_the_task_adds_the_auxiliary_loss_for_each_target_and_reports_the_rest():
    task, model = LanguageModel({"vocab_size": 3}), Told()
    batch = {"tokens": jnp.array([[1, 2, 0, -1], [0, 0, 0, 0], [1, 1, 1, 1]]), "weight": jnp.array([1.0, 0.5, 0.0])}
    total, weight, metrics = task.loss(model, batch, nnx.Rngs(dropout=0))
    assert weight == 2 + 0.5 * 3
    np.testing.assert_allclose(total, weight * (np.log(3) + 0.5), rtol=1e-6)
    np.testing.assert_allclose(metrics["loss"][0], weight * np.log(3), rtol=1e-6)
    assert set(metrics) == {"loss", "accuracy", "dropped"} and metrics["dropped"] == (0.25 * weight, weight)
    assert (model.tokens[2] == -1).all()  # a padding row is not routed


def test_experts_are_an_option_of_the_config():
    config = small_configs.config(small_configs.GPT, model__moe={"experts": 4, "dispatch": "capacity"}, model__mlp_width=8)
    experiment = build_experiment(config)
    assert experiment.config["model"]["moe"]["top_k"] == 2
    shapes = experiment.state_shapes()
    assert {"load_balance", "router_z", "dropped", "expert_load_min", "expert_load_max"} <= set(shapes.metrics)
    assert shapes.params["blocks"]["0"]["mlp"]["experts"]["up"]["kernel"].shape == (4, 16, 8)
    with pytest.raises(Exception, match="top_k=5"):
        build_experiment(small_configs.config(small_configs.GPT, model__moe={"experts": 4, "top_k": 5}))
