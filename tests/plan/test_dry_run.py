"""Figures of a dry run against closed forms and the arrays themselves."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
import small_configs
from jax.experimental.pallas.ops.tpu.megablox import gmm
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from jaxmodels.errors import ConfigError
from jaxmodels.experiment.build import build_experiment
from jaxmodels.hardware.flops import count_flops
from jaxmodels.models.attention import attend
from jaxmodels.parallel import mesh as mesh_lib
from jaxmodels.plan import topology
from jaxmodels.plan.dry_run import human_bytes, summarize


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
    rows, mesh = jax.ShapeDtypeStruct((8, 16), jnp.float32), AbstractMesh((4,), ("data",), axis_types=(AxisType.Auto,))
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
    config = small_configs.config(small_configs.GPT, model__scan=scan, training__accumulate=accumulate, model__dropout=0.0)
    experiment = build_experiment(config)
    shapes = experiment.state_shapes()
    layers, width, time, batch = 2, 16, 16, 16
    vocab = experiment.dataset.info["vocab_size"]
    weights = layers * 12 * width**2 + vocab * width
    attention = layers * 2 * 2 * time * width  # scores and their products with values, a token
    expected = 3 * batch * time * (2 * weights + attention)
    key = jax.eval_shape(lambda: jax.random.key(0))
    step = experiment.step_function(), shapes, experiment.batch_shapes(batch), key
    assert count_flops(*step) == expected
    # A causal mask leaves query t the keys 0..t.
    assert count_flops(*step, attended=True) == 3 * batch * time * (2 * weights + attention * (time + 1) // (2 * time))


@pytest.mark.parametrize("options", [{"causal": True}, {"window": 5}, {"causal": True, "window": 5}, {}])
@pytest.mark.parametrize("queries, keys", [(12, 12), (12, 16)])
def test_attended_products_are_those_that_a_mask_leaves(options, queries, keys):
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


def test_bytes_for_people():
    assert [human_bytes(n) for n in (5, 2048, 5 * 2**20, 2**41)] == ["5 B", "2.0 KiB", "5.0 MiB", "2.0 TiB"]


@pytest.mark.parametrize(
    "name, grid, slices, devices",
    [
        # docs.cloud.google.com/tpu/docs/v5p, /v4, /v5e, /v6e and /tpu7x: their tables of configurations.
        ("v5p-8", (2, 2, 1), 1, 4),
        ("v5p-32", (2, 2, 4), 1, 16),
        ("v5p-64", (2, 4, 4), 1, 32),
        ("v5p-128", (4, 4, 4), 1, 64),
        ("v5p-256", (4, 4, 8), 1, 128),
        ("v5p-512", (4, 8, 8), 1, 256),
        ("v5p-1024", (8, 8, 8), 1, 512),
        ("v5p-2048", (8, 8, 16), 1, 1024),
        ("v5p-4096", (8, 16, 16), 1, 2048),
        ("v5p-12288", (16, 16, 24), 1, 6144),
        ("v4-4096", (8, 16, 16), 1, 2048),
        ("tpu7x-128", (4, 4, 4), 1, 128),
        ("v5e-8", (2, 4), 1, 8),
        ("v5litepod-32", (4, 8), 1, 32),
        ("v6e-256", (16, 16), 1, 256),
        # Google's xpk has these.
        ("v5p-384", (4, 4, 12), 1, 192),
        ("v5p-1280", (4, 8, 20), 1, 640),
        ("v5p-4608", (12, 12, 16), 1, 2304),
        ("v5p:4x4x4", (4, 4, 4), 1, 64),
        ("v6e:8x8", (8, 8), 1, 64),
        ("4xv5p-128", (4, 4, 4), 4, 256),
        ("2xv6e:4x4", (4, 4), 2, 32),
        ("h100x8", (8,), 1, 8),
        ("2xh200x8", (8,), 2, 16),
        ("a100x4", (4,), 1, 4),
    ],
)
def test_names_of_topologies(name, grid, slices, devices):
    found = topology.parse(name)
    assert (found.name, found.grid, found.slices, found.devices) == (name, grid, slices, devices)
    assert found.chips * found.chip.devices_per_chip == found.devices


@pytest.mark.parametrize(
    "name, said",
    [
        ("v5p-1000", "no slice of 1,000 TensorCores, 2 a chip; the nearest are v5p-896 and v5p-1024"),
        ("v6e-3", "no slice of 3 chips; the nearest are v6e-1 and v6e-4"),
        ("v5p-99999", "the nearest are v5p-12160 and v5p-12288"),
        ("v5p", "Did you mean 'v5p-8'?"),
        ("tpu7-128", "Did you mean 'tpu7x-128'?"),
        ("H100x8", "Did you mean 'h100x8'?"),
        ("v9:2x2", "v4, v5e, v5p, v6e, tpu7x, a100, h100, h200"),
        ("8x8", "written v5p-128"),
        ("v6e:", "written v5p-128"),
        ("v6e:8x8x8", "chips of v6e are in 2 dimensions, such as v6e:4x8"),
        ("v5p:0x4x4", "chips of v5p are in 3 dimensions, such as v5p:4x4x4"),
        ("0xv5p-8", "the number of slices must be 1 or more"),
        ("h100-8", "h100 is written such as h100x8"),
        ("v5px8", "v5p is written such as v5p-128 or v5p:4x4x4"),
        ("h100x16", "a node has 1 to 8 GPUs; several nodes have their number in front: 2xh100x8"),
        ("h100x0", "a node has 1 to 8 GPUs"),
    ],
)
def test_names_that_are_none(name, said):
    with pytest.raises(ConfigError, match="--topology=" + re.escape(name)) as error:
        topology.parse(name)
    assert said in str(error.value)


@pytest.mark.parametrize(
    "mesh, name, said",
    [
        ({"data": 8}, "v5e:2x2", "v5e:2x2 has 4 devices.* one of these would do: --config.mesh.data=4"),
        ({"data": 1, "fsdp": 3}, "v5e:2x2", "--config.mesh.fsdp=4"),
        ({"slices": 2}, "v5e:2x2", "config.mesh.slices=2, but --topology=v5e:2x2 is 1 slice: --config.mesh.slices=1"),
        ({}, "4xv5e:2x2", "--topology=4xv5e:2x2 is 4 slices: --config.mesh.slices=4"),
    ],
)
def test_a_mesh_that_does_not_cover_the_topology(mesh, name, said):
    sizes = mesh_lib.MeshSizes(**mesh)
    topology.check_mesh(mesh_lib.MeshSizes(slices=topology.parse(name).slices), topology.parse(name))
    with pytest.raises(ConfigError, match=said):
        topology.check_mesh(sizes, topology.parse(name))


def test_without_the_tpus_compiler_its_extra_is_named(monkeypatch):
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'jaxmodels\[plan\]'"):
        topology.compile_step(build_experiment(small_configs.config(small_configs.CNN)), "v5e:2x2")


def test_pmap_is_for_devices_that_are_here():
    with pytest.raises(ConfigError, match="partition=jit"):
        topology.compile_step(build_experiment(small_configs.config(small_configs.CNN, partition="pmap")), "v5e:2x2")


def test_memory_of_a_compiled_function():
    compiled = jax.jit(lambda x, y: (x @ y, y), donate_argnums=1).lower(*(jax.ShapeDtypeStruct((256, 256), jnp.float32) for _ in range(2))).compile()
    found = topology.memory(compiled)
    assert (found["arguments"], found["outputs"], found["aliased"]) == (2 * 2**18, pytest.approx(2 * 2**18, abs=64), 2**18)
    assert found["total"] == found["arguments"] + found["outputs"] - found["aliased"] + found["temporaries"]
