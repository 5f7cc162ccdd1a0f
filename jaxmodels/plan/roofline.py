"""Time of a train step, predicted from the traced step without a compiler: seconds of work for a model of any size.

`plan.trace` returns the operations of one device; `plan.cost` predicts the time of each from its FLOPs and bytes. Elementwise operations are fused into the
operations that read their results, as in the memory model; those of one stage read a shared array once. Attention kernels write no scores. Collectives follow
from the shardings. Those that gather parameters and reduce gradients overlap with the computation; the others do not.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from flax import nnx

from jaxmodels.experiment.experiment import Experiment
from jaxmodels.hardware.chips import Chip
from jaxmodels.models import rnn
from jaxmodels.models.attention import Attention, resolve_implementation
from jaxmodels.models.functional import DTYPES
from jaxmodels.plan import cost, memory
from jaxmodels.plan.cost import Estimate, Seconds, operation_seconds
from jaxmodels.plan.counts import stated
from jaxmodels.plan.shardings import PRODUCTS, Graph, Op, Value, axes_of, ways

_PRODUCTS = PRODUCTS | {"ragged_dot_general"}
_KINDS = {
    **dict.fromkeys(("psum", "psum_invariant"), "all-reduce"),
    **dict.fromkeys(("all_gather", "all_gather_invariant"), "all-gather"),
    "reduce_scatter": "reduce-scatter",
    "all_to_all": "all-to-all",
    "ppermute": "collective-permute",
}
# Operations that are not fused: kernels, and those that wait for other devices.
_APART = frozenset((*_PRODUCTS, *_KINDS, "pallas_call", "scan", "while", "cond", "gathered"))
# Axes whose collectives gather parameters and reduce gradients.
_BESIDE = ("slices", "data", "fsdp")
# cuDNN computes all gradients of attention in one kernel with five products; the traced step has two kernels of the TPU instead.
_CUDNN_KERNELS = {"fwd": "fwd", "dkv": "fused", "dq": None}


@dataclasses.dataclass(frozen=True, eq=False)
class Exchange:
    """A collective of a traced step.

    Attributes:
      kind: a key of `cost.SENT`.
      axes: mesh axes of its group.
      bytes: of its operand or result on a device, whichever is larger.
      count: runs in a step.
      waits: whether it does not overlap with computation.
    """

    kind: str
    axes: tuple[str, ...]
    bytes: int
    count: int
    waits: bool


@dataclasses.dataclass
class Work(cost.Total):
    """Work of a device in a step, with its FLOPs in products and kernels, and its collectives in order."""

    flops: float = 0.0
    collectives: list[Exchange] = dataclasses.field(default_factory=list)

    def add(self, work: "Work", times: int = 1) -> None:
        """Add work that is done `times` times."""
        super().add(work, times)
        self.flops += times * work.flops
        self.collectives += [dataclasses.replace(each, count=each.count * times) for each in work.collectives]


def estimate_traced(step: memory.TracedStep, topology: Any) -> Estimate:
    """Predict the time of a traced step. Attention kernels are a part of it; the list `kernels` is empty.

    Args:
      step: as `trace` returns.
      topology: as `hardware.topologies.parse` returns.
    """
    work = graph_work(step.graph, step.mesh, topology.chip)
    groups = [cost.group_along(each.axes, step.mesh, topology) for each in work.collectives]
    times = [each.count * cost.collective_seconds(each.kind, each.bytes, group, topology) for each, group in zip(work.collectives, groups, strict=True)]
    beside = sum(time for time, each in zip(times, work.collectives, strict=True) if not each.waits)
    exposed = max(0.0, 1 - work.now / beside) if beside else 0.0  # share of the overlapped collectives that outlasts the computation
    for time, group, each in zip(times, groups, work.collectives, strict=True):
        sent = each.count * each.bytes * cost.SENT[each.kind](group.devices)
        work.transfer((each.kind, each.axes, group.network), each.count, sent, time, time * (1 if each.waits else exposed))
    return work.estimate()


def trace(experiment: Experiment, devices: int, chip: Chip) -> memory.TracedStep:
    """Trace the train step of an experiment, with kernels that can be traced anywhere.

    Raises:
      ConfigError: mesh or batch does not fit the number of devices.
    """
    return memory.trace_step(traceable(experiment, chip.platform), devices, "tpu")


def traceable(experiment: Experiment, platform: str) -> Experiment:
    """Return the experiment with kernels that can be traced anywhere. Tracing cuDNN's attention needs cuDNN, so the TPU's kernel replaces it."""
    if platform != "gpu":
        return experiment

    def build(rngs: nnx.Rngs) -> nnx.Module:
        model = experiment.build(rngs)
        resolve_implementation(model, "gpu", DTYPES[experiment.training.precision])
        for _, module in nnx.iter_modules(model):
            if isinstance(module, Attention) and module.implementation == "cudnn":
                module.implementation = "splash"
            if isinstance(module, rnn.Recurrent | rnn.RecurrentLM):
                module.kernel = "xla"
        return model

    return dataclasses.replace(experiment, build=build)


def splash_seconds(chip: Chip, kernel: str, op: Op) -> Seconds:
    """Return the time of a splash attention kernel on a device; on a GPU, that of the cuDNN kernel which replaces it.

    TPUs compute every block that the mask does not exclude, GPUs about as many scores as the mask leaves.
    """
    first = op.params["grid_mapping"].num_index_operands  # the operands before these are the mask's blocks
    (*heads, length, width), keys = (x.shape for x in op.inputs[first : first + 2])
    gpu = chip.platform == "gpu"
    kernel = _CUDNN_KERNELS[kernel] if gpu else kernel
    if kernel is None:
        return Seconds()
    share = stated(op.scopes, "attended" if gpu else "blocks") or 1.0
    return cost.attention_seconds(chip, kernel, scores=math.prod(heads) * length * keys[-2] * share, width=width)


def graph_work(graph: Graph, mesh: Mapping[str, int], chip: Chip) -> Work:
    """Return the work of a program, or of one iteration of a loop's body."""
    work, written, other = Work(), memory.arrays(graph, mesh)[0], functools.partial(operation_seconds, chip)
    size = functools.cache(lambda value: value.local_bytes(mesh))
    sources: dict[Value, frozenset[Value]] = {}  # arrays in memory that are read to compute a value
    stages: dict[Value, int] = {}  # number of unfused operations on the longest path to a value
    touched: dict[int, set[Value]] = {}  # arrays that the fused operations of a stage read and write, each once
    partial: dict[Value, Exchange] = {}  # sums that are not yet reduced
    differing: dict[Value, frozenset[str]] = {}  # axes along which a value inside a `shard_map` differs between devices
    for op in graph.ops:
        below = frozenset().union(*(sources.get(x, frozenset(() if x.constant else (x,))) for x in op.inputs))
        stage = max((stages.get(x, 0) for x in op.inputs), default=0) + (op.name in _APART)
        for value in op.outputs:
            stages[value] = stage
            cut = op.name in ("slice", "dynamic_slice", "gather")  # reads a part of its operand
            sources[value] = frozenset((value,)) if value in written or cut else frozenset() if op.name in _APART else below
        results = [value for value in op.outputs if value in written]
        moved = sum(map(size, (*below, *results)))
        if op.name in _PRODUCTS:
            flops = op.flops / ways(op.outputs[0].axes | set(_summed(op)), mesh)  # divided over the shards of the result and of the contracted dimensions
            work.flops += flops
            work.compute("matrix products", operation_seconds(chip, flops=flops, size=moved, itemsize=op.inputs[0].itemsize))
        elif op.name == "pallas_call":
            work.flops += op.flops
            if kernel := re.match(r"splash_m[hq]a_(fwd|dkv|dq)", str(op.params["name"])):
                work.compute("attention kernels", splash_seconds(chip, kernel[1], op))
            else:
                work.compute("matrix products", operation_seconds(chip, flops=op.flops, size=moved, itemsize=op.inputs[-1].itemsize))
        elif op.name == "scan":
            work.add(graph_work(op.bodies[0], mesh, chip), op.params["length"])
        elif op.bodies:  # the longest branch of a conditional; one iteration of a loop without a known length
            work.add(max((graph_work(body, mesh, chip) for body in op.bodies), key=lambda each: each.now))
        elif op.name == "gather":
            work.compute("other", other(size=2 * sum(map(size, op.outputs))))
        elif op.name in ("scatter", "scatter-add", "scatter_add", "dynamic_update_slice"):
            work.compute("other", other(size=2 * size(op.inputs[-1 if op.name != "dynamic_update_slice" else 1])))
        elif op.name not in _APART:
            if results:
                touched.setdefault(stage, set()).update(below, results)
        found = _collectives(op, mesh, differing)
        differing |= dict.fromkeys(op.outputs, axes) if (axes := _differing(op, differing)) is not None else {}
        if op.name in ("add_any", "add") and all(x in partial for x in op.inputs) and len({partial[x].axes for x in op.inputs}) == 1:
            work.collectives.remove(partial[op.inputs[0]])  # partial sums are added on each device before the all-reduce
            partial[op.outputs[0]] = partial[op.inputs[1]]
        elif op.name == "dot_general" and found:
            partial[op.outputs[0]] = found[-1]
        work.collectives += found
    work.compute("other", other(size=sum(size(value) for group in touched.values() for value in group)))
    return work


def _summed(op: Op) -> tuple[str, ...]:
    """Return the mesh axes along which an operation's summed dimensions are sharded: each device computes a partial sum."""
    if op.name in PRODUCTS:
        lost = [x.spec[i] for x, dimensions in zip(op.inputs, op.contracted, strict=False) for i in dimensions]
    elif op.name == "reduce_sum":
        lost = [op.inputs[0].spec[i] for i in op.params["axes"]]
    elif op.name in ("scatter-add", "scatter_add"):
        lost = [tuple(axis for axis in axes if axis not in op.outputs[0].axes) for axes in op.inputs[2].spec]
    else:
        return ()
    return tuple(dict.fromkeys(axis for axes in lost for axis in axes))


def _differing(op: Op, known: Mapping[Value, frozenset[str]]) -> frozenset[str] | None:
    """Return the axes along which an operation's results differ between devices, inside a `shard_map`; None if unknown."""
    if op.name in ("local", "gathered") and "spec" in op.params:
        return frozenset(axes_of(op.params["spec"]))
    if op.name == "axis_index":
        return frozenset((op.params["axis_name"],))
    if any(x not in known and not x.constant for x in op.inputs) or not op.inputs or op.bodies:
        return None
    return frozenset().union(*(known[x] for x in op.inputs if x in known)) - set(op.params["axes"] if op.name == "psum" else ())


def _collectives(op: Op, mesh: Mapping[str, int], differing: Mapping[Value, frozenset[str]]) -> list[Exchange]:
    """Return the collectives of an operation.

    Gradients of a `shard_map` have many sums over axes along which the operand is replicated; the compiler removes these, so they are left out.
    """
    found = []

    def add(kind: str, axes: Sequence[str], size: int) -> None:
        axes = tuple(axis for axis in mesh if axis in axes and mesh[axis] > 1)
        if axes:
            found.append(Exchange(kind, axes, size, 1, not set(axes) <= set(_BESIDE)))

    if summed := _summed(op):
        result = op.outputs[0]
        scattered = result.axes & set(summed)
        add("reduce-scatter", scattered, result.local_bytes(mesh) * ways(scattered, mesh))
        add("all-reduce", set(summed) - scattered, result.local_bytes(mesh))
    elif op.name in _KINDS:
        axes = op.params.get("axes") or op.params["axis_name"]
        axes = (axes,) if isinstance(axes, str) else axes
        if op.name == "psum" and all(x in differing for x in op.inputs):
            axes = [axis for axis in axes if any(axis in differing[x] for x in op.inputs)]
        add(_KINDS[op.name], axes, max(sum(x.local_bytes(mesh) for x in part) for part in (op.inputs, op.outputs)))
    elif op.name == "gathered":
        after = axes_of(op.params.get("spec", op.outputs[0].spec))
        add("all-gather", op.inputs[0].axes - after, op.outputs[0].local_bytes(mesh))
    elif op.name == "sharding_constraint":
        before, after = op.inputs[0].spec, op.outputs[0].spec
        moved = {axis for old, new in zip(before, after, strict=True) for axis in old if axis not in new and axis in axes_of(after)}
        add("all-to-all", moved, op.outputs[0].local_bytes(mesh))
    return found
