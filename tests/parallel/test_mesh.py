"""Sizes of meshes, the order of devices, and the sharding of parameters, without devices."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_configs
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from jaxmodels.errors import ConfigError
from jaxmodels.experiment.build import build_experiment
from jaxmodels.experiment.sections import resolve
from jaxmodels.models.functional import flatten
from jaxmodels.parallel import mesh as mesh_lib
from jaxmodels.parallel import sharding as sharding_lib
from jaxmodels.parallel.layout import Layout, constrain, on_each_device, use
from jaxmodels.parallel.mesh import MeshSizes, mesh_shape
from jaxmodels.parallel.sharding import Sharding


def layout(**sizes):
    shape = dataclasses.asdict(MeshSizes(data=1)) | sizes
    return Layout(AbstractMesh(tuple(shape.values()), tuple(shape), axis_types=(AxisType.Auto,) * len(shape)))


def test_one_axis_takes_the_remaining_devices():
    assert mesh_shape(MeshSizes(fsdp=4, tensor=2), 64)["data"] == 8
    assert mesh_shape(MeshSizes(data=2, fsdp=-1), 64)["fsdp"] == 32
    assert list(mesh_shape(MeshSizes(), 3).values()) == [1, 1, 3, 1, 1, 1, 1]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"fsdp": 3}, r"data=-1 × fsdp=3 needs 3 devices, but there are 8. Sizes must divide that: 1, 2, 4, 8"),
        ({"data": 2, "tensor": 2}, r"data=2 × tensor=2 needs 4 devices, but there are 8"),
        ({"fsdp": -1}, r"only one axis may be -1, but data and fsdp are; give --config.mesh.data=1"),
        ({"context": 0}, r"context=0"),
        ({"expert": -2}, r"expert=-2"),
    ],
)
def test_sizes_that_do_not_fit(sizes, message):
    with pytest.raises(ConfigError, match=message):
        mesh_shape(MeshSizes(**sizes), 8)


def test_wrong_sections():
    for section, message in (
        ({"mesh": {"banana": 2}}, "config.mesh.banana"),
        ({"sharding": {"rules": (("embd", "fsdp"),)}}, "no name 'embd'; there are"),
        ({"sharding": {"rules": (("embed", "fdsp"),)}}, "no mesh axis 'fdsp'"),
        ({"sharding": {"parameters": (("(", "embed"),)}}, "not a regular expression"),
        ({"sharding": {"parameters": (("x", "embd"),)}}, "no name 'embd'"),
        ({"sharding": {"microbatches": 0}}, "microbatches must be above 0"),
        ({"sharding": {"rules": ((),)}}, "an empty one"),
        ({"sharding": {"parameters": ((),)}}, "an empty one"),
        ({"sharding": {"rules": (("embed", "fsdp", "fsdp"),)}}, "'embed' names a mesh axis twice"),
        ({"partition": "pjit"}, "config.partition"),
    ):
        with pytest.raises(ConfigError, match=message):
            resolve(small_configs.config(small_configs.GPT) | section)


def chips(count, **attributes):
    kind = {"platform": "tpu", "device_kind": "TPU v4", "process_index": 0, "core_on_chip": 0}
    return [types.SimpleNamespace(id=i, **kind, **{k: v(i) for k, v in attributes.items()}) for i in range(count)]


def test_slices_are_the_outermost_axis():
    devices = chips(8, slice_index=lambda i: i % 2, coords=lambda i: (i // 2, 0, 0))
    shape = mesh_shape(MeshSizes(slices=2, fsdp=4, data=1), 8)
    grid = mesh_lib._arrange(shape, devices)
    assert grid.shape == tuple(shape.values())
    for i in range(2):
        assert {device.slice_index for device in grid[i].flat} == {i}
    with pytest.raises(ConfigError, match="are in 2 slices: use --config.mesh.slices=2"):
        mesh_lib._arrange(mesh_shape(MeshSizes(), 8), devices)


def test_nodes_of_gpus_are_slices():
    kind = {"platform": "gpu", "device_kind": "H100", "slice_index": None}
    devices = [types.SimpleNamespace(id=i, process_index=i // 4, **kind) for i in range(8)]
    grid = mesh_lib._arrange(mesh_shape(MeshSizes(slices=2, data=4), 8), devices)
    for i in range(2):
        assert {device.process_index for device in grid[i].flat} == {i}
    with pytest.raises(ConfigError, match="slices=8 does not divide the 2 processes"):
        mesh_lib._arrange(mesh_shape(MeshSizes(slices=8, data=1), 8), devices)


def test_only_stacked_blocks_have_an_axis_of_layers():
    """`nnx.MultiHeadAttention` has kernels [D, heads, K], which are not a stack of matrices."""
    names = lambda path, *shape: sharding_lib.names_of(path, shape, Sharding(), layout(fsdp=8))  # noqa: E731
    assert names("blocks/attention/query/kernel", 4, 64, 64) == ("layers", "embed", "heads")
    assert names("encoder/blocks/attention/query/kernel", 4, 64, 64) == ("layers", "embed", "heads")
    assert names("blocks/3/attention/query/kernel", 64, 64) == ("embed", "heads")
    assert names("attention/query/kernel", 64, 2, 32) == ("largest", None, None)
    assert names("blocks/3/attention/query/kernel", 64, 2, 32) == ("largest", None, None)


def test_batches_divide():
    mesh = layout(data=2, fsdp=2, tensor=2).mesh
    mesh_lib.check_batch(8, 2, mesh, "data.batch_size")
    with pytest.raises(ConfigError, match="config.data.batch_size=12 does not divide over 4 devices × 2 accumulation steps; try 8 or 16"):
        mesh_lib.check_batch(12, 2, mesh, "data.batch_size")
    with pytest.raises(ConfigError, match="4 devices × 4 microbatches; try 16"):
        mesh_lib.check_batch(8, 1, mesh, "data.batch_size", 4)


def spec(path, shape, section=None, **sizes):
    section = section or Sharding()
    where = layout(**sizes)
    where = dataclasses.replace(where, rules=dict(where.rules) | {name: tuple(axes) for name, *axes in section.rules})
    return sharding_lib.parameter_spec(path, shape, section, where)


def test_paths_become_axes():
    both = {"fsdp": 2, "tensor": 4}
    assert spec("blocks/3/mlp/up/kernel", (32, 64), **both) == PartitionSpec(("fsdp",), ("tensor",))
    assert spec("blocks/attention/query/kernel", (12, 32, 32), **both, pipeline=3) == PartitionSpec(("pipeline",), ("fsdp",), ("tensor",))
    assert spec("blocks/0/mlp/experts/down/kernel", (8, 64, 32), expert=8) == PartitionSpec(("expert",), None, None)
    assert spec("blocks/0/attention_norm/scale", (32,), **both) == PartitionSpec(None)
    # A table that does not divide is replicated along its rows.
    assert spec("embed/embedding", (103, 32), **both) == PartitionSpec(None, ("fsdp",))
    # Without a pattern: the largest dimension that divides, for large parameters.
    assert spec("first/kernel", (3, 3, 64, 128), fsdp=4) == PartitionSpec(None, None, None, ("fsdp",))
    assert spec("first/kernel", (3, 3, 64, 130), fsdp=4) == PartitionSpec(None, None, ("fsdp",), None)
    assert spec("first/bias", (128,), fsdp=4) == PartitionSpec(None)
    own = Sharding(parameters=(("first/kernel$", "", "mlp"),), rules=(("mlp", "fsdp", "tensor"),))
    assert spec("first/kernel", (30, 64), own, **both) == PartitionSpec(None, ("fsdp", "tensor"))


def test_a_dimension_that_does_not_divide_is_named():
    with pytest.raises(ConfigError, match=r"dimension 1 of blocks/0/mlp/up/kernel \[32, 66\] \(mlp\) does not divide over tensor=4") as caught:
        spec("blocks/0/mlp/up/kernel", (32, 66), fsdp=2, tensor=4)
    advice = Sharding(rules=(("mlp",),))
    assert str(advice.rules[0]).replace(" ", "") in str(caught.value).replace(" ", "")
    assert spec("blocks/0/mlp/up/kernel", (32, 66), advice, fsdp=2, tensor=4) == PartitionSpec(("fsdp",), None)


def test_the_optimizer_state_is_sharded_as_the_parameters_or_also_over_replicas():
    experiment = build_experiment(small_configs.config(small_configs.GPT, training__ema=0.9, model__width=32, model__heads=4))
    shapes, where = experiment.state_shapes(), layout(data=4, fsdp=2)
    for section, moments in ((Sharding(), PartitionSpec(("fsdp",), None)), (Sharding(optimizer="data"), PartitionSpec(("fsdp",), ("data",)))):
        placed = sharding_lib.place_state(shapes, section, where)
        assert jax.tree.structure(placed) == jax.tree.structure(shapes)
        mean = next(part.mu for part in jax.tree.leaves(placed.opt_state, is_leaf=lambda x: hasattr(x, "mu")) if hasattr(part, "mu"))
        found = [tree["blocks"]["0"]["mlp"]["up"]["kernel"].sharding.spec for tree in (placed.params, mean, placed.ema)]
        assert found == [PartitionSpec(("fsdp",), None), moments, moments]
        assert placed.step.sharding.spec == PartitionSpec()
    assert sharding_lib._over_data(PartitionSpec(("fsdp",), None), (64, 32), layout(fsdp=2, data=4)) == PartitionSpec(("fsdp", "data"), None)
    assert sharding_lib._over_data(PartitionSpec(None, ("fsdp",)), (102, 64), layout(fsdp=2, data=4)) == PartitionSpec(None, ("fsdp", "data"))
    assert sharding_lib._over_data(PartitionSpec(None), (8,), layout(data=4)) == PartitionSpec(None)


def test_pmap_shards_no_model():
    with pytest.raises(ConfigError, match="excludes config.mesh.fsdp=8; use partition=jit"):
        sharding_lib.make_layout(layout(fsdp=8).mesh, Sharding(), "pmap")
    with pytest.raises(ConfigError, match="excludes config.sharding.optimizer=data"):
        sharding_lib.make_layout(layout(data=8).mesh, Sharding(optimizer="data"), "pmap")
    for task in ({"name": "contrast", "noise": 0.1}, {"name": "classify", "mixup": 0.2}):
        with pytest.raises(ConfigError, match=f"'{task['name']}' combines rows across a batch"):
            build_experiment(small_configs.config(small_configs.CNN, task=task) | {"partition": "pmap"})


def test_patterns_mean_a_parameter():
    wrong = {
        "matches no parameter; there are blocks/0": ("nothing/here", "mlp"),
        r"names 4 dimensions, but blocks/0/mlp/up/kernel is \[16, 64\]": ("mlp/up/kernel$", "embed", "", "", ""),
    }
    for message, pattern in wrong.items():
        with pytest.raises(ConfigError, match=message):
            build_experiment(small_configs.config(small_configs.GPT, sharding={"parameters": (pattern,)}))


def test_an_axis_that_shards_only_the_last_layer_is_noted():
    where = layout(tensor=2)
    sharding_lib.place_state(build_experiment(small_configs.config(small_configs.CNN)).state_shapes(), Sharding(), where)
    assert any("mesh.tensor=2" in note for note in sharding_lib.notes(where))
    data = {"source": "synthetic", "vocab_size": 103, "sequence_length": 16, "examples": 64, "batch_size": 8}
    sharding_lib.place_state(build_experiment(small_configs.config(small_configs.GPT, data=data, task__sample_length=0)).state_shapes(), Sharding(), where)
    assert sharding_lib.notes(where) == ["vocab of 103 does not divide over tensor=2: it is replicated on their devices; model.vocab_multiple rounds it up"]
    padded = small_configs.config(small_configs.GPT, data=data, task__sample_length=0, model__vocab_multiple=8)
    where = layout(tensor=2)
    state = sharding_lib.place_state(build_experiment(padded).state_shapes(), Sharding(), where)
    assert state.params["embed"]["embedding"].shape[0] == 104 and state.params["embed"]["embedding"].sharding.spec[0] == "tensor"
    assert sharding_lib.notes(where) == []


def test_names_mean_nothing_without_a_mesh():
    x = jnp.ones((2, 3))
    assert constrain(x, "batch", "mlp") is x
    assert on_each_device(jnp.sum, [("batch", None)], ()) is jnp.sum
    with use(layout()):
        assert constrain(x, "batch", "mlp") is x
    with use(layout(data=2)), pytest.raises(ValueError, match="1 logical axes for an array of 2 dimensions"):
        constrain(x, "batch")


def test_dimensions_that_are_not_sharded_are_noted():
    where = layout(tensor=4, context=2)
    assert where.spec("batch", "sequence", "vocab", shape=(8, 15, 16)) == PartitionSpec(None, None, ("tensor",))
    where.used.add("tensor")
    assert sharding_lib.notes(where) == [
        "mesh.context=2 shards no part of this model: its devices repeat the same work",
        "sequence of 15 does not divide over context=2: it is replicated on their devices",
    ]


def test_large_replicated_parameters_are_noted():
    experiment = build_experiment(small_configs.config(small_configs.CNN, sharding={"warn_mb": 0.001}))
    where = dataclasses.replace(layout(fsdp=7), rules=dict(layout().rules) | {"embed": ()})
    placed = sharding_lib.place_state(experiment.state_shapes(), experiment.sharding, where)
    whole = [note.split(" ")[0] for note in sharding_lib.replicated_notes(placed, experiment.sharding, where)]
    assert whole == [path for path, x in flatten(placed.params).items() if x.size * 4 >= 0.001 * 2**20]
    assert sharding_lib.replicated_notes(placed, experiment.sharding, layout(data=7)) == [], "there is no axis for them"


def test_rows_of_a_process_are_those_of_its_devices():
    mesh = mesh_lib.make_mesh(MeshSizes(), jax.devices()[:1])
    np.testing.assert_array_equal(mesh_lib.local_rows(mesh_lib.batch_sharding(mesh), 6), np.arange(6))

    class Part:
        def addressable_devices_indices_map(self, shape):
            return {0: (slice(4, 6),), 1: (slice(0, 2),), 2: (slice(4, 6),)}

    np.testing.assert_array_equal(mesh_lib.local_rows(Part(), 8), [0, 1, 4, 5])


@dataclasses.dataclass(frozen=True)
class Chip:
    """A TPU chip of a pod, with the attributes that determine its place in the mesh."""

    coords: tuple[int, int, int]
    id: int = 0
    device_kind: str = "TPU v6 lite"
    platform: str = "tpu"
    process_index: int = 0
    core_on_chip: int = 0


@pytest.mark.parametrize("sizes", [{"data": 4, "fsdp": 16}, {"fsdp": 16, "tensor": 4}, {"fsdp": 4, "context": 16}, {"fsdp": 2, "expert": 8, "data": 4}])
def test_axes_that_do_not_fit_a_pods_dimensions_split_them(sizes):
    pod = [Chip((x, y, 0)) for y in range(8) for x in range(8)]
    shape = mesh_shape(MeshSizes(**({"data": 1} | sizes)), len(pod))
    arranged = mesh_lib._arrange(shape, pod)
    assert set(arranged.flat) == set(pod) and arranged.shape == tuple(shape.values())
    if "tensor" in sizes:  # the last axis is on neighbouring devices
        for row in arranged.reshape(-1, 4):
            assert sorted(abs(chip.coords[0] - row[0].coords[0]) + abs(chip.coords[1] - row[0].coords[1]) for chip in row) == [0, 1, 2, 3]


LARGE = mesh_lib._LARGE // 4  # values of float32


@pytest.mark.parametrize(
    ("size", "devices", "flags", "here"),
    [(LARGE, -1, "", True), (LARGE - 1, -1, "", False), (LARGE, 8, "", False), (LARGE, 1, "--xla_force_host_platform_device_count=2", False)],
)
def test_steps_of_a_large_state_run_in_the_thread_of_the_loop_unless_devices_wait_for_each_other(size, devices, flags, here, monkeypatch):
    updates = {}
    state = {"x": jax.ShapeDtypeStruct((size,), np.float32)}
    monkeypatch.setenv("XLA_FLAGS", flags)
    with monkeypatch.context() as patch:
        patch.setattr(mesh_lib.jax, "config", types.SimpleNamespace(jax_num_cpu_devices=devices, update=updates.__setitem__))
        mesh_lib.run_large_steps_here(state)
    assert updates == ({"jax_cpu_enable_async_dispatch": False} if here else {})
