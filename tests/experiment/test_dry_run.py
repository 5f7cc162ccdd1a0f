"""Figures of a dry run against closed forms and against arrays."""

import functools

import jax
import jax.numpy as jnp
import pytest
import small_configs
from jax.experimental.pallas.ops.tpu.megablox import gmm
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from jaxmodels.experiment.build import build_experiment
from jaxmodels.experiment.dry_run import human_bytes, summarize
from jaxmodels.hardware.flops import count_flops
from jaxmodels.models.attention import attend


def test_flops_of_products_convolutions_and_loops():
    a, b = jax.ShapeDtypeStruct((3, 4, 5), jnp.float32), jax.ShapeDtypeStruct((3, 5, 6), jnp.float32)
    assert count_flops(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), a, b) == 2 * 3 * 4 * 5 * 6
    image, kernel = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32), jax.ShapeDtypeStruct((3, 3, 3, 7), jnp.float32)

    def convolve(x, k):
        return jax.lax.conv_general_dilated(x, k, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    assert count_flops(convolve, image, kernel) == 2 * (2 * 4 * 4 * 7) * (3 * 3 * 3)
    rows, kernels, sizes = jax.ShapeDtypeStruct((12, 3), jnp.float32), jax.ShapeDtypeStruct((4, 3, 5), jnp.float32), jnp.array([6, 0, 2, 4])
    assert count_flops(lambda x, w: jax.lax.ragged_dot(x, w, sizes), rows, kernels) == 2 * 12 * 3 * 5
    gradient = jax.grad(lambda x, w: jnp.sum(jax.lax.ragged_dot(x, w, sizes) ** 2), (0, 1))
    assert count_flops(gradient, rows, kernels) == 3 * 2 * 12 * 3 * 5
    square = jax.ShapeDtypeStruct((4, 4), jnp.float32)
    assert count_flops(lambda x: jax.lax.scan(lambda c, _: (c @ c, None), x, None, length=5)[0], square) == 5 * 2 * 4**3
    assert count_flops(lambda x: jax.lax.cond(x[0, 0] > 0, lambda: x @ x, lambda: x), square) == 2 * 4**3


def test_flops_of_kernels_and_of_shards_are_those_of_all_devices():
    q = jax.ShapeDtypeStruct((2, 512, 4, 64), jnp.bfloat16)
    products = 2 * (2 * 2 * 4 * 512 * 512 * 64)
    assert count_flops(lambda q: attend(q, q, q, causal=True, implementation="splash"), q) == products
    rows, mesh = jax.ShapeDtypeStruct((8, 16), jnp.float32), AbstractMesh((4,), ("data",), axis_types=(AxisType.Auto,))
    parts = jax.shard_map(lambda x: x @ x.T, mesh=mesh, in_specs=PartitionSpec("data"), out_specs=PartitionSpec("data"))
    assert count_flops(parts, rows) == 4 * 2 * 2 * 2 * 16


def test_flops_of_a_kernel_whose_grid_depends_on_values():
    """A TPU's grouped products: FLOPs of one product of all rows, and the same for each of two gradients."""
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((256, 128), (4, 128, 384))] + [jax.ShapeDtypeStruct((4,), jnp.int32)]
    product = functools.partial(gmm, preferred_element_type=jnp.float32)
    assert count_flops(product, *shapes) == 2 * 256 * 128 * 384
    gradient = jax.grad(lambda rows, kernels, sizes: product(rows, kernels, sizes).sum(), argnums=(0, 1))
    assert count_flops(gradient, *shapes) == 3 * 2 * 256 * 128 * 384


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_flops_of_a_gpt_step_are_six_for_each_weight_and_token_and_attention(scan, accumulate):
    config = small_configs.config(small_configs.GPT, model__scan=scan, training__accumulate=accumulate, model__dropout=0.0)
    experiment = build_experiment(config)
    shapes = experiment.state_shapes()
    layers, width, time, batch = 2, 16, 16, 16
    vocab = experiment.dataset.info["vocab_size"]
    weights = layers * 12 * width**2 + vocab * width
    attention = layers * 2 * 2 * time * width  # scores and their products with values, for a token
    expected = 3 * batch * time * (2 * weights + attention)
    key = jax.eval_shape(lambda: jax.random.key(0))
    step = experiment.step_function(), shapes, experiment.batch_shapes(batch), key
    assert count_flops(*step) == expected
    # A causal mask leaves query t the keys 0..t.
    assert count_flops(*step, attended=True) == 3 * batch * time * (2 * weights + attention * (time + 1) // (2 * time))


@pytest.mark.parametrize("options", [{"causal": True}, {"window": 5}, {"causal": True, "window": 5}, {}])
@pytest.mark.parametrize("queries, keys", [(12, 12), (12, 16)])
def test_attended_products_exclude_masked_scores(options, queries, keys):
    q, k = (jax.ShapeDtypeStruct((2, length, 4, 8), jnp.float32) for length in (queries, keys))
    window = options.get("window", 99)
    seen = sum(abs(t - s) < window and (s <= t or not options.get("causal")) for t in range(queries) for s in range(keys))

    def loss(q, k):
        return jax.checkpoint(lambda q, k: attend(q, k, k, **options).sum())(q, k)

    whole, attended = (count_flops(loss, q, k, attended=attended) for attended in (False, True))
    assert whole == 2 * 2 * 2 * 4 * 8 * queries * keys and attended == whole * seen // (queries * keys)
    whole, attended = (count_flops(jax.grad(loss, (0, 1)), q, k, attended=attended) for attended in (False, True))
    assert attended == whole * seen // (queries * keys)


def test_bytes_are_those_of_the_arrays():
    experiment = build_experiment(small_configs.config(small_configs.CNN, training__ema=0.9))
    figures = summarize(experiment)
    state = jax.jit(experiment.init_function())(jax.random.key(0))
    total = sum(x.nbytes for x in jax.tree.leaves(state))
    assert figures["state_bytes_per_device"] == figures["checkpoint_bytes"] == total
    assert figures["parameter_count"] == sum(x.size for x in jax.tree.leaves(state.params))


def test_readable_bytes():
    assert [human_bytes(n) for n in (5, 2048, 5 * 2**20, 2**41)] == ["5 B", "2.0 KiB", "5.0 MiB", "2.0 TiB"]
