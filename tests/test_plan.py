"""Figures of a dry run against closed forms and the arrays themselves."""

import functools

import jax
import jax.numpy as jnp
import pytest
import small
from jax.experimental.pallas.ops.tpu.megablox import gmm
from jax.sharding import AbstractMesh, PartitionSpec

from jaxmodels.errors import ConfigError
from jaxmodels.experiment import build_experiment
from jaxmodels.models.attention import attend
from jaxmodels.plan import topology
from jaxmodels.plan.dry_run import human_bytes, summarize
from jaxmodels.plan.flops import count_flops


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


def test_flops_of_kernels_and_of_devices_parts_are_those_of_the_whole():
    q = jax.ShapeDtypeStruct((2, 512, 4, 64), jnp.bfloat16)
    products = 2 * (2 * 2 * 4 * 512 * 512 * 64)
    assert count_flops(lambda q: attend(q, q, q, causal=True, implementation="splash"), q) == products
    rows, mesh = jax.ShapeDtypeStruct((8, 16), jnp.float32), AbstractMesh((4,), ("data",))
    parts = jax.shard_map(lambda x: x @ x.T, mesh=mesh, in_specs=PartitionSpec("data"), out_specs=PartitionSpec("data"))
    assert count_flops(parts, rows) == 4 * 2 * 2 * 2 * 16


def test_flops_of_a_kernel_whose_grid_depends_on_values():
    """A TPU's products of groups of rows: one product of all rows, and as much for each of two gradients."""
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((256, 128), (4, 128, 384))] + [jax.ShapeDtypeStruct((4,), jnp.int32)]
    product = functools.partial(gmm, preferred_element_type=jnp.float32)
    assert count_flops(product, *shapes) == 2 * 256 * 128 * 384
    gradient = jax.grad(lambda rows, kernels, sizes: product(rows, kernels, sizes).sum(), argnums=(0, 1))
    assert count_flops(gradient, *shapes) == 3 * 2 * 256 * 128 * 384


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_flops_of_a_gpt_step_are_six_for_each_weight_and_token_and_attention(scan, accumulate):
    config = small.config(small.GPT, model__scan=scan, training__accumulate=accumulate, model__dropout=0.0)
    experiment = build_experiment(config)
    shapes = experiment.state_shapes()
    layers, width, time, batch = 2, 16, 16, 16
    vocab = experiment.dataset.info["vocab_size"]
    weights = layers * 12 * width**2 + vocab * width
    attention = layers * 2 * 2 * time * width  # scores and their products with values, a token
    expected = 3 * batch * time * (2 * weights + attention)
    key = jax.eval_shape(lambda: jax.random.key(0))
    assert count_flops(experiment.step_function(), shapes, experiment.batch_shapes(batch), key) == expected


def test_bytes_are_those_of_the_arrays():
    experiment = build_experiment(small.config(small.CNN, training__ema=0.9))
    figures = summarize(experiment)
    state = jax.jit(experiment.init_function())(jax.random.key(0))
    total = sum(x.nbytes for x in jax.tree.leaves(state))
    assert figures["state_bytes_per_device"] == figures["checkpoint_bytes"] == total
    assert figures["parameter_count"] == sum(x.size for x in jax.tree.leaves(state.params))


def test_bytes_for_people():
    assert [human_bytes(n) for n in (5, 2048, 5 * 2**20, 2**41)] == ["5 B", "2.0 KiB", "5.0 MiB", "2.0 TiB"]


def test_topologies_are_named_by_generation_and_chips():
    assert topology.generation("v5p:4x4x4") == "v5p" and topology.generation("v6e:8x8") == "v6e"
    for wrong in ("v5p", "v5p-128", "v9:2x2", "v6e:", "8x8", "v6e:8x8x8x8"):
        with pytest.raises(ConfigError, match="such as v5p:4x4x4"):
            topology.devices(wrong)


def test_without_the_tpus_compiler_its_extra_is_named(monkeypatch):
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'jaxmodels\[plan\]'"):
        topology.compile_step(build_experiment(small.config(small.CNN)), "v5e:2x2")


def test_pmap_is_for_devices_that_are_here():
    with pytest.raises(ConfigError, match="partition=jit"):
        topology.compile_step(build_experiment(small.config(small.CNN, partition="pmap")), "v5e:2x2")


def test_memory_and_cost_of_a_compiled_function():
    compiled = jax.jit(lambda x, y: (x @ y, y), donate_argnums=1).lower(*(jax.ShapeDtypeStruct((256, 256), jnp.float32) for _ in range(2))).compile()
    found = topology.memory(compiled)
    assert (found["arguments"], found["outputs"], found["aliased"]) == (2 * 2**18, pytest.approx(2 * 2**18, abs=64), 2**18)
    assert found["total"] == found["arguments"] + found["outputs"] - found["aliased"] + found["temporaries"]
    assert topology.cost(compiled)["flops"] == pytest.approx(2 * 256**3, rel=0.01)
