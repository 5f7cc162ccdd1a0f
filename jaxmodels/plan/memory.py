"""Device memory of a train step, estimated from the traced step without a compiler: seconds of work for a model of any size.

`plan.trace` returns the operations with the sharding of each value. `live` follows them in order and adds up the arrays that are in memory at the same time.
The assumptions about the compiler are those that TPU programs confirm:

- The state is updated in place.
- An elementwise operation is fused into the operation that reads its result. It is not fused if a loop or a kernel reads the result, or if several operations
  read it and its operands are larger.
- If a single elementwise operation reads a product's result, it is fused into the product, and only its own result is written.
- Parameters are gathered before the product that needs them, once per program or iteration of a loop.
- The last two dimensions of arrays are padded to tiles, in the order that needs the least padding.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from jaxmodels.experiment.experiment import Experiment
from jaxmodels.parallel import mesh as mesh_lib
from jaxmodels.parallel import sharding as sharding_lib
from jaxmodels.plan import trace as trace_lib
from jaxmodels.plan.shardings import ELEMENTWISE, PRODUCTS, Graph, Op, Value, spec_of


@dataclasses.dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on each device at the peak of memory use.

    Attributes:
      state: parameters, optimizer, moving average.
      batch: the examples of a step.
      gradients: of parameters.
      activations: saved by the forward pass for the backward pass.
      logits: arrays with a dimension of the size of the vocabulary, or of the number of classes.
      gathered: parameters and other arrays gathered from their shards.
      temporaries: the rest.
    """

    state: int
    batch: int
    gradients: int
    activations: int
    logits: int
    gathered: int
    temporaries: int

    @property
    def total(self) -> int:
        """Bytes of all parts."""
        return sum(dataclasses.asdict(self).values())


@dataclasses.dataclass(frozen=True)
class PlannedDevice:
    """An absent device, with the attributes that meshes and shardings need."""

    id: int
    platform: str
    process_index: int = 0
    device_kind: str = "planned"
    client: None = None


def planned_mesh(sizes: mesh_lib.MeshSizes, devices: int, platform: str) -> Mesh:
    """Return a mesh of absent devices, to trace for.

    Raises:
      ConfigError: the sizes do not multiply to the number of devices.
    """
    shape = mesh_lib.mesh_shape(sizes, devices)
    grid = np.array([PlannedDevice(i, platform) for i in range(devices)], dtype=object).reshape(tuple(shape.values()))
    return Mesh(grid, tuple(shape), axis_types=(AxisType.Auto,) * len(shape))


@dataclasses.dataclass(frozen=True)
class TracedStep:
    """A train step as operations of one device.

    Attributes:
      graph: its inputs are the leaves of the state, then those of the batch, then the key.
      mesh: sizes of its axes.
      state: number of leaves of the state.
      state_bytes, batch_bytes: on a device.
      parameters: shapes of all parameters.
      wide: size of the vocabulary, or number of classes; 0 if the task has neither.
    """

    graph: Graph
    mesh: Mapping[str, int]
    state: int
    state_bytes: int
    batch_bytes: int
    parameters: frozenset[tuple[int, ...]]
    wide: int


def trace_step(experiment: Experiment, devices: int, platform: str) -> TracedStep:
    """Trace the train step of an experiment for a number of devices of a platform.

    Raises:
      ConfigError: mesh or batch does not fit.
    """
    mesh = planned_mesh(experiment.mesh, devices, platform)
    layout = sharding_lib.make_layout(mesh, experiment.sharding)
    experiment = experiment.on(platform, layout)
    size = experiment.loading.batch_size
    mesh_lib.check_batch(size, experiment.training.accumulate, mesh, "data.batch_size", layout.microbatches)
    state = sharding_lib.place_state(experiment.state_shapes(), experiment.sharding, layout)
    rows = mesh_lib.batch_sharding(mesh)
    batch = {k: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=rows) for k, s in experiment.batch_shapes(size).items()}
    key = jax.eval_shape(lambda: jax.random.key(0))
    jaxpr = jax.make_jaxpr(experiment.step_function(jax.tree.map(lambda x: x.sharding, state.params)))(state, batch, key)
    leaves, provided = jax.tree.leaves(state), experiment.task.provides
    specs = [spec_of(x) for x in (*leaves, *jax.tree.leaves(batch))] + [()]
    return TracedStep(
        graph=trace_lib.build(jaxpr, specs, mesh.shape, platform),
        mesh=dict(mesh.shape),
        state=len(leaves),
        state_bytes=mesh_lib.bytes_per_device(state),
        batch_bytes=mesh_lib.bytes_per_device(batch),
        parameters=frozenset(x.shape for part in (state.params, state.frozen) for x in jax.tree.leaves(part)),
        wide=provided.get("vocab_size") or provided.get("num_classes") or 0,
    )


def memory_model(experiment: Experiment, topology: Any) -> MemoryEstimate:
    """Return the bytes that a device of a topology needs for the train step of an experiment.

    Raises:
      ConfigError: mesh or batch does not fit the number of devices.
    """
    return peak(trace_step(experiment, topology.devices, topology.chip.platform))


def peak(step: TracedStep) -> MemoryEstimate:
    """Return the bytes that a device needs for a traced step."""
    parts = dict.fromkeys(("gradients", "activations", "logits", "gathered", "temporaries"), 0)
    for value, size in live(step.graph, step.mesh, frozenset(step.graph.outputs[: step.state])):
        if value.op.name == "gathered":
            part = "gathered"
        elif step.wide and step.wide in value.shape and value.shape not in step.parameters:
            part = "logits"
        elif value.op.backward:
            part = "gradients" if value.shape in step.parameters else "temporaries"
        else:
            part = "activations"
        parts[part] += size
    return MemoryEstimate(state=step.state_bytes, batch=step.batch_bytes, **parts)


# Liveness of arrays

# Fused into the operations that read their results.
COMPUTED_IN_PLACE = ELEMENTWISE | frozenset(
    "broadcast_in_dim reshape squeeze expand_dims transpose slice dynamic_slice pad concatenate split iota rev local whole sharding_constraint tile "
    "random_bits random_wrap random_unwrap random_fold_in random_split random_seed threefry2x32 axis_index psum_invariant pvary".split()
)
_REDUCTIONS = frozenset("reduce_sum reduce_max reduce_min reduce_and reduce_or reduce_prod argmax argmin reduce_precision".split())
_READS_THROUGH = COMPUTED_IN_PLACE | _REDUCTIONS | PRODUCTS
# These return the bytes of their operand, maybe with another shape.
_RENAMED = frozenset("layout_constraint reshape squeeze expand_dims local whole sharding_constraint name copy stop_gradient reshard".split())


def live(graph: Graph, mesh: Mapping[str, int], in_place: frozenset[Value] = frozenset()) -> list[tuple[Value, int]]:
    """Return the arrays in memory at the peak, with their bytes.

    Args:
      graph: operations of one device. Its inputs are not counted.
      mesh: sizes of the axes.
      in_place: results that are written over inputs, which need no memory.
    """
    written, roots = arrays(graph, mesh)
    size = functools.cache(lambda value: 0 if value in in_place else bytes_of(value, mesh))
    last: dict[Value, int] = {}
    first: dict[Value, int] = {}
    for i, op in enumerate(graph.ops):
        for value in op.inputs:
            for root in roots.get(value, ()):
                last[root] = i
                first.setdefault(root, i)
    for value in graph.outputs:
        for root in roots.get(value, ()):
            last[root] = len(graph.ops)
    inner, changes = {}, np.zeros(2 * len(graph.ops) + 4, np.int64)
    spans = {}
    for i, op in enumerate(graph.ops):
        bodies = [live(body, mesh, _stacked(op, body)) for body in op.bodies]
        inner[i] = max(bodies, key=_total, default=[])
        changes[2 * i] += _total(inner[i])
        changes[2 * i + 1] -= _total(inner[i])
        for value in op.outputs:
            if value not in written:
                continue
            begin = 2 * i if op.name == "scan" and value in op.outputs[op.params["num_carry"] :] else _begins(op, i, value, roots, last, size)
            # A fused function of inputs alone is computed when it is first read. So is a gathered update of parameters that are updated in place.
            adds = op.name == "gathered" and value in first and any(x in in_place for x in graph.ops[first[value]].outputs)
            if begin is None or adds:
                begin = 2 * first.get(value, i)
            spans[value] = (begin, 2 * last.get(value, i))
            changes[begin] += size(value)
            changes[max(begin, spans[value][1]) + 1] -= size(value)
    at = int(np.argmax(np.cumsum(changes)))
    found = [(value, size(value)) for value, (begin, end) in spans.items() if begin <= at <= max(begin, end)]
    return found + (inner.get(at // 2, []) if at % 2 == 0 else [])


def _total(found: Sequence[tuple[Value, int]]) -> int:
    return sum(size for _, size in found)


def _stacked(op: Op, body: Graph) -> frozenset[Value]:
    """Return the results that each iteration of a loop writes directly into the stacked results."""
    if op.name != "scan":
        return frozenset()
    return frozenset(value for value in body.outputs[op.params["num_carry"] :] if value.op is not None and value.op.name in _READS_THROUGH)


def _begins(op: Op, i: int, value: Value, roots, last, size) -> int | None:
    """Return the time from which a result needs memory; None for a fused function of inputs alone, which is computed when it is first read.

    The time is 2 i, while operation i runs; or 2 i + 1, after it, if the result replaces an operand that is read for the last time.
    """
    read = {root for x in op.inputs for root in roots.get(x, ())}
    if op.name in COMPUTED_IN_PLACE and all(root.op is None for root in read):
        return None
    dying = [root for root in read if last[root] == i and root.op is not None]
    if op.name in COMPUTED_IN_PLACE:
        # A fused function of a product's result is often computed within the next product, which reads all of it while it writes.
        dying = [] if any(map(_of_product, dying)) else dying
    if op.name in COMPUTED_IN_PLACE or op.name in ("dynamic_update_slice", "scatter", "scatter-add", "scan", "while"):
        if any(size(root) >= size(value) for root in dying):
            return 2 * i + 1
    return 2 * i


def _of_product(value: Value) -> bool:
    """Return whether a value is a product's result, maybe with another shape."""
    while value.op is not None and value.op.name in _RENAMED:
        value = value.op.inputs[0]
    return value.op is not None and value.op.name in PRODUCTS


def arrays(graph: Graph, mesh: Mapping[str, int]) -> tuple[set[Value], dict[Value, frozenset[Value]]]:
    """Return the values that are arrays in memory (the others are fused), and for each value the arrays or inputs that are read to compute it."""
    readers: dict[Value, list[Op]] = {}
    for op in graph.ops:
        for value in dict.fromkeys(op.inputs):
            readers.setdefault(value, []).append(op)
    results = set(graph.outputs)
    written: set[Value] = set()
    roots: dict[Value, frozenset[Value]] = {value: frozenset((value,)) for value in graph.inputs}
    passing: set[Value] = set()  # results of products into which the operation that reads them is fused

    def rooted(value: Value) -> frozenset[Value]:
        return roots.setdefault(value, frozenset())  # constants have no roots

    def passes_on(value: Value, by: list[Op]) -> bool:
        return (
            value not in results
            and len(by) == 1
            and by[0].name in ELEMENTWISE
            and all(math.prod(x.shape) * x.itemsize <= math.prod(value.shape) * value.itemsize for x in by[0].outputs)
        )

    for op in graph.ops:
        below = frozenset().union(*(rooted(value) for value in op.inputs))
        free = op.name in COMPUTED_IN_PLACE or _picks(op)
        for value in op.outputs:
            by = readers.get(value, [])
            if not by and value not in results:
                roots[value] = below
                continue
            produced = op.name in PRODUCTS or any(x in passing for x in op.inputs)
            if produced and passes_on(value, by):
                passing.add(value)
                roots[value] = below
                continue
            if not produced and free and not _is_written(op, value, _through(by, readers), below, value in results, mesh):
                roots[value] = below
                continue
            written.add(value)
            roots[value] = frozenset((value,))
    return written, roots


def _through(by: list[Op], readers: Mapping[Value, list[Op]]) -> list[Op]:
    """Return the operations that read a value. Behind a single conversion to a larger type, return the readers of its result: the smaller type is written."""
    while len(by) == 1 and by[0].name == "convert_element_type" and by[0].outputs[0].itemsize > by[0].inputs[0].itemsize:
        by = readers.get(by[0].outputs[0], [])
    return by


def _picks(op: Op) -> bool:
    """Return whether an operation is the gradient of selecting one value of each row, which compilers compute elementwise, by comparing indices."""
    if op.name != "scatter-add" or not op.params["dimension_numbers"].operand_batching_dims:
        return False
    return math.prod(op.inputs[2].shape) * 2 < math.prod(op.inputs[0].shape)


def _is_written(op: Op, value: Value, by: list[Op], below: frozenset[Value], result: bool, mesh: Mapping[str, int]) -> bool:
    """Return whether the result of a fusible operation becomes an array in memory."""
    if len(below) == 1 and op.name in _RENAMED:
        return False
    if result or any(reader.name not in _READS_THROUGH and not _picks(reader) for reader in by):
        return True
    if op.name in _COSTLY and len(by) > 1 or op.name == "pad" and any(inside for _, _, inside in op.params["padding_config"]):
        return True
    read, own = sum(bytes_of(root, mesh) for root in below), bytes_of(value, mesh)
    return read > 16 * own or len(by) > 1 and read > 2.1 * own


# Expensive enough that a result with several readers is written, not computed again.
_COSTLY = frozenset(("erf", "erfc", "erf_inv", "lgamma", "digamma"))
_LANES = 128


def bytes_of(value: Value, mesh: Mapping[str, int]) -> int:
    """Return the bytes of a device's shard, 0 for a value in host memory.

    From 1 MiB on, two dimensions are padded to a TPU tile: 128 values by 8 rows of 32-bit values, 16 of 16-bit or 32 of 8-bit ones.
    """
    if value.host:
        return 0
    sizes = value.local_shape(mesh)
    exact = math.prod(sizes) * value.itemsize
    large = [i for i, n in enumerate(sizes) if n > 1]
    if exact < 2**20 or len(large) < 2 or not value.itemsize:
        return exact
    rows = 8 * max(1, 4 // value.itemsize)
    rest = math.prod(sizes)
    padded = min(rest // (sizes[i] * sizes[j]) * -(-sizes[i] // rows) * rows * -(-sizes[j] // _LANES) * _LANES for i in large for j in large if i != j)
    return padded * value.itemsize
