"""The analytic memory model against closed forms, and against the TPU compiler.

pytest -m tpu_compiler -n 0 -s tests/plan/test_memory_model.py      # prints a line for each of `memory_points.POINTS`
"""

import dataclasses
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
import small_configs
from jax.sharding import NamedSharding, PartitionSpec
from memory_points import POINTS, TOLERANCE

from jaxmodels.errors import ConfigError
from jaxmodels.experiment.build import build_experiment
from jaxmodels.hardware import topologies
from jaxmodels.parallel import mesh as mesh_lib
from jaxmodels.parallel import sharding as sharding_lib
from jaxmodels.plan import compiler, memory, shardings
from jaxmodels.plan import trace as trace_lib

# A mesh with two axes, for single functions.
MESH = {"data": 4, "tensor": 2}


def place(devices: int) -> SimpleNamespace:
    """The attributes of a topology that the model needs."""
    return SimpleNamespace(devices=devices, chip=SimpleNamespace(platform="tpu"))


def built(function, *given) -> shardings.Graph:
    """Return the graph of a function of float32 arrays, given as (shape, spec) pairs."""
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape, _ in given]
    return trace_lib.build(jax.make_jaxpr(function)(*shapes), [spec for _, spec in given], MESH, "tpu")


def live(graph: shardings.Graph) -> int:
    return sum(size for _, size in memory.live(graph, MESH))


# Shardings


def test_products_are_sharded_as_their_operands_and_gather_fsdp_shards():
    rows, kernel = ((32, 256), (("data",), ())), ((256, 512), (("data",), ("tensor",)))
    graph = built(lambda x, w: x @ w, rows, kernel)
    (result,) = graph.outputs
    assert result.spec == (("data",), ("tensor",))
    (gathered,) = [op for op in graph.ops if op.name == "gathered"]
    assert gathered.inputs == [graph.inputs[1]] and gathered.outputs[0].spec == ((), ("tensor",))


def test_a_sum_over_a_sharded_axis_is_replicated_and_its_constraint_shards_it():
    def gradient(x, g):
        return jax.lax.with_sharding_constraint((x.T @ g).astype(jnp.bfloat16), sharding(PartitionSpec("data", None)))

    mesh = memory.planned_mesh(mesh_lib.MeshSizes(data=4), 4, "tpu")

    def sharding(spec):
        return NamedSharding(mesh, spec)

    graph = built(gradient, ((32, 256), (("data",), ())), ((32, 512), (("data",), ())))
    assert graph.outputs[0].spec == (("data",), ())
    assert not [op for op in graph.ops if op.name == "gathered"]  # each device computes a partial sum: no operand is gathered


def test_reshapes_and_loops_carry_shardings():
    def loop(x, stacked):
        def body(x, w):
            return jnp.tanh(x @ w), x.reshape(8, 4, 16)

        return jax.lax.scan(body, x, stacked)

    graph = built(loop, ((8, 64), (("data",), ())), ((3, 64, 64), ((), (), ())))
    carry, stacked = graph.outputs
    assert carry.spec == (("data",), ()) and stacked.spec == ((), ("data",), (), ())
    assert shardings._reshaped((1, 0), ((), ()), (0,)) == ((),)  # empty arrays, as in ring attention
    assert shardings._reshaped((8, 6, 64), (("data",), (), ("tensor",)), (48, 4, 16)) == (("data",), ("tensor",), ())


def test_kinds_of_loop_arguments_in_both_versions_of_jax():
    # From 0.12 on in trees, whose parts are the constant, the carried and the scanned arguments.
    trees = SimpleNamespace(unpack=lambda: (iter([None]), iter([None, None]), iter([])))
    assert trace_lib._scan_counts({"ft_in": trees, "length": 3}) == {"num_consts": 1, "num_carry": 2}
    assert trace_lib._scan_counts({"num_consts": 1, "num_carry": 2}) == {}


def test_branches_by_platform_are_those_of_the_platform():
    def function(x):
        return jax.lax.platform_dependent(x, tpu=jnp.sin, default=lambda x: jnp.cos(jnp.cos(x)))

    jaxpr = jax.make_jaxpr(function)(jax.ShapeDtypeStruct((4,), jnp.float32))
    names = {platform: [op.name for op in trace_lib.build(jaxpr, [((),)], MESH, platform).ops] for platform in ("tpu", "gpu")}
    assert "sin" in names["tpu"] and names["gpu"].count("cos") == 2 and "cond" not in names["tpu"]


# Liveness


def test_products_are_written_and_elementwise_operations_are_not():
    x, w = ((1024, 1024), ((), ())), ((1024, 1024), ((), ()))
    size = 4 * 1024**2
    assert live(built(lambda x, w: jnp.sum(jnp.tanh(x) * 2 + w), x, w)) < size
    assert live(built(lambda x, w: (x @ w) @ w, x, w)) == 2 * size
    assert live(built(lambda x, w: jnp.tanh(x @ w) + 1, x, w)) == size
    # Shards of a device, with both axes.
    x, w = ((1024, 1024), (("data",), ())), ((1024, 1024), ((), ("tensor",)))
    assert live(built(lambda x, w: x @ w, x, w)) == size // 8


def test_a_loop_needs_its_stacked_results_and_the_arrays_of_one_iteration():
    layers, rows, width = 6, 512, 1024
    one = 4 * rows * width

    def forward(x, kernels):
        return jax.lax.scan(lambda x, w: (jnp.sin(x @ w), None), x, kernels)[0].sum()

    graph = built(jax.grad(forward, argnums=1), ((rows, width), ((), ())), ((layers, width, width), ((), (), ())))
    kernels = 4 * layers * width**2
    # For each layer its input and the cosine of its product; then the gradients of all kernels, and a few arrays of one layer.
    assert 2 * layers * one + kernels <= live(graph) <= 2 * layers * one + kernels + 5 * one


def test_rematerialised_layers_save_only_their_inputs():
    def kept(remat: str) -> int:
        config = small_configs.config(POINTS["gpt full"][0], model__remat=remat, mesh__fsdp=1, mesh__data=4)
        return memory.memory_model(build_experiment(config), place(4)).activations

    config = POINTS["gpt full"][0]
    rows = config["data"]["batch_size"] // 4 * config["data"]["sequence_length"]
    inputs = config["model"]["layers"] * rows * config["model"]["width"] * 2
    parameters = 2 * 12 * config["model"]["layers"] * config["model"]["width"] ** 2  # in bfloat16: the inputs of the loop
    assert kept("full") == pytest.approx(inputs + parameters, rel=0.2)
    assert kept("full") < kept("dots") < kept("none")


def test_values_are_padded_to_tiles_in_the_order_with_the_least_padding():
    def size(*shape, itemsize=4):
        return memory.bytes_of(shardings.Value(shape, itemsize, ((),) * len(shape)), {})

    assert size(1024, 1024) == 4 * 1024**2
    assert size(1024, 64, 64) == 4 * 1024 * 64 * 64  # 1024 along the lanes
    assert size(8, 100, 20000) == 4 * 8 * 100 * 20096  # the 8 along the rows
    assert size(16, 1000, 1000, itemsize=2) == 2 * 16 * 1000 * 1024
    assert size(1) == 4


@pytest.mark.parametrize("name", ["llama context", "moe full", "llama pipeline"])
def test_state_and_batch_are_those_of_the_arrays(name):
    config, _ = POINTS[name]
    experiment = build_experiment(config)
    found = memory.memory_model(experiment, place(4))
    mesh = memory.planned_mesh(experiment.mesh, 4, "cpu")
    layout = sharding_lib.make_layout(mesh, experiment.sharding)
    shapes = sharding_lib.place_state(experiment.state_shapes(), experiment.sharding, layout)
    assert found.state == mesh_lib.bytes_per_device(shapes)
    batch = experiment.batch_shapes(experiment.loading.batch_size)
    ways = math.prod(mesh.shape[axis] for axis in mesh_lib.BATCH_AXES)
    assert found.batch == sum(math.prod(x.shape) * x.dtype.itemsize // ways for x in batch.values())
    assert found.total == sum(dataclasses.asdict(found).values())


def test_accumulation_needs_the_memory_of_one_microbatch():
    def model(accumulate: int) -> memory.MemoryEstimate:
        return memory.memory_model(build_experiment(small_configs.config(POINTS["gpt none"][0], training__accumulate=accumulate)), place(4))

    whole, parts = model(1), model(4)
    assert parts.state == whole.state and parts.batch == whole.batch
    assert parts.activations + parts.logits < (whole.activations + whole.logits) / 2


def test_offloaded_activations_need_no_device_memory():
    base = POINTS["gpt full"][0]
    here = memory.memory_model(build_experiment(base), place(4))
    away = memory.memory_model(build_experiment(small_configs.config(base, model__offload=("input",))), place(4))
    rows = base["data"]["batch_size"] // 4 * base["data"]["sequence_length"]
    inputs = base["model"]["layers"] * rows * base["model"]["width"] * 2
    assert here.activations - away.activations == pytest.approx(inputs, rel=0.25)


def test_a_mesh_that_does_not_multiply_to_the_devices_is_an_error():
    with pytest.raises(ConfigError, match="needs 4 devices, but there are 8"):
        memory.memory_model(build_experiment(POINTS["gpt full"][0]), place(8))


# The compiler


@pytest.mark.tpu_compiler
@pytest.mark.parametrize("name", POINTS)
def test_the_model_is_near_the_compiler(name):
    pytest.importorskip("libtpu")
    config, where = POINTS[name]
    experiment = build_experiment(config)
    model = memory.memory_model(experiment, topologies.parse(where))
    peak = compiler.compile_step(experiment, where).compiled.memory_analysis().peak_memory_in_bytes
    print(f"\n{name} | {where} | model {model.total / 1e9:.3f} GB | compiler {peak / 1e9:.3f} GB | {model.total / peak - 1:+.1%}", flush=True)
    assert model.total == pytest.approx(peak, rel=TOLERANCE.get(name, 0.1))
