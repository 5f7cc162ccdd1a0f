"""How long a train step takes, from shapes and a chip's figures alone: no compiler, seconds for a model of any size.

The step is traced as `plan.memory` does, and every operation takes as long as its arithmetic or its bytes need at least:

- A matrix product or convolution: its FLOPs at a share of the chip's peak (`PRODUCT_SHARE`), or its bytes where these take longer; on a GPU, whose
  blocks load before they compute, both one after the other.
- Everything else: the arrays it reads and writes, at a share of the memory's bandwidth (`BANDWIDTH_SHARE`). What is computed value by value is
  part of what reads it, as in the memory model; what is written at the same stage from the same array reads it once.
- Attention kernels: on a TPU as many cycles as its compiler schedules for the blocks that the mask leaves (`plan.splash`); on a GPU their products,
  of pairs that the mask leaves. They write no scores.
- Collectives: bytes over the bandwidth of the network that the axis lies on, in rings. Those that gather parameters and add up gradients run beside the rest, the
  others are waited for.
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
from jaxmodels.hardware.flops import operation_flops
from jaxmodels.models import rnn
from jaxmodels.models.attention import Attention, settle
from jaxmodels.models.functional import DTYPES
from jaxmodels.plan import kernels, memory, splash
from jaxmodels.plan.estimate import PARTS, Collective, Estimate
from jaxmodels.plan.graph import Graph, Op, Spec, Value, ways
from jaxmodels.plan.network import collective_seconds, network
from jaxmodels.plan.torus import SENT

# Of the peak that products reach. GPU: with their bytes beside it, within 15% of what XLA's table of measured products on an H100 says of
# 4096³, 8192³ and GPT-2's (docs/estimates_gpu.md). TPU: what its compiler's estimates of large products come to.
PRODUCT_SHARE = {"gpu": 0.85, "tpu": 0.95}
# Of the memory's bandwidth that kernels reach that copy.
BANDWIDTH_SHARE = 0.9
# cuDNN's attention kernels wait for what is between their products: on an H100 they reach 0.5 to 0.6 of the peak.
ATTENTION_SHARE = 0.5
# Its products forward, and for gradients: it computes these in one kernel, which multiplies queries by keys once for all.
_CUDNN_PRODUCTS = {"fwd": 2, "dq": 1, "dkv": 4}

_PRODUCTS = ("dot_general", "conv_general_dilated", "ragged_dot_general")
_KINDS = {
    **dict.fromkeys(("psum", "psum_invariant"), "all-reduce"),
    **dict.fromkeys(("all_gather", "all_gather_invariant"), "all-gather"),
    "reduce_scatter": "reduce-scatter",
    "all_to_all": "all-to-all",
    "ppermute": "collective-permute",
}
# What is not part of what reads it: kernels of their own, and what waits for other devices.
_APART = frozenset((*_PRODUCTS, *_KINDS, "pallas_call", "scan", "while", "cond", "gathered"))
# Axes whose collectives gather parameters and add up gradients.
_BESIDE = ("slices", "data", "fsdp")


@dataclasses.dataclass(frozen=True, eq=False)
class Exchange:
    """A collective of a step.

    Attributes:
      kind: `all-reduce`, `all-gather`, `reduce-scatter`, `all-to-all` or `collective-permute`.
      axes: of the mesh, that it goes over.
      bytes: of its operand or result on a device, whichever is larger.
      count: how often it runs in a step.
      waits: whether nothing runs beside it.
    """

    kind: str
    axes: tuple[str, ...]
    bytes: int
    count: int
    waits: bool


@dataclasses.dataclass
class Work:
    """What a device does in a step.

    Attributes:
      flops: in products and kernels.
      products, attention, other: seconds.
      collectives: in the order of the step.
    """

    flops: float = 0.0
    products: float = 0.0
    attention: float = 0.0
    other: float = 0.0
    collectives: list[Exchange] = dataclasses.field(default_factory=list)

    def add(self, work: "Work", times: int = 1) -> None:
        """Adds other work, done so many times."""
        for part in ("flops", "products", "attention", "other"):
            setattr(self, part, getattr(self, part) + times * getattr(work, part))
        self.collectives += [dataclasses.replace(each, count=each.count * times) for each in work.collectives]


def roofline(experiment: Experiment, topology: Any) -> tuple[float, dict[str, float]]:
    """Seconds of a train step, and of its parts: those of `estimate.PARTS`, which add up to it.

    Args:
      experiment: as `build_experiment` gives.
      topology: as `plan.topology.parse` gives.

    Raises:
      ConfigError: mesh or batch does not fit the topology.
    """
    return traced_roofline(experiment, trace(experiment, topology.devices, topology.chip), topology)


def traced_roofline(experiment: Experiment, step: memory.TracedStep, topology: Any) -> tuple[float, dict[str, float]]:
    """The same of a step that is traced already, as `trace` does."""
    found = traced_estimate(experiment, step, topology)
    return found.seconds, found.parts


def traced_estimate(experiment: Experiment, step: memory.TracedStep, topology: Any) -> Estimate:
    """The same with collectives; without cycles, which no compiler has counted, and with attention kernels as a part alone."""
    work = graph_work(step.graph, step.mesh, topology.chip)
    computing = work.products + work.attention + work.other
    times = [collective_time(each, step.mesh, topology) for each in work.collectives]
    beside = sum(time for time, each in zip(times, work.collectives, strict=True) if not each.waits)
    exposed = max(0.0, 1 - computing / beside) if beside else 0.0  # share of what runs beside the rest that is longer than that
    found: dict[tuple, list] = {}
    for time, each in zip(times, work.collectives, strict=True):
        row = found.setdefault((each.kind, each.axes), [0, 0.0, 0.0, 0.0])
        sent = each.count * each.bytes * SENT[each.kind](ways(each.axes, step.mesh))
        row[:] = row[0] + each.count, row[1] + sent, row[2] + time, row[3] + time * (1 if each.waits else exposed)
    collectives = [Collective(kind, axes, *row, network(axes, step.mesh, topology)) for (kind, axes), row in found.items()]
    parts = dict.fromkeys(PARTS, 0.0) | {
        "matrix products": work.products,
        "attention kernels": work.attention,
        "other": work.other,
        "exposed collectives": sum(each.exposed_seconds for each in collectives),
    }
    collectives.sort(key=lambda each: -each.seconds)
    return Estimate(None, sum(parts.values()), parts, [], collectives, [], ["no compiler: from shapes and the chip's figures alone"])


def collective_time(collective: Exchange, mesh: Mapping[str, int], topology: Any) -> float:
    """Seconds of all runs of a collective in a step."""
    return collective.count * collective_seconds(collective.kind, collective.bytes, collective.axes, mesh, topology)


def trace(experiment: Experiment, devices: int, chip: Chip) -> memory.TracedStep:
    """The train step as operations, with kernels that can be traced anywhere.

    Raises:
      ConfigError: mesh or batch does not fit so many devices.
    """
    return memory.trace_step(traceable(experiment, chip.platform), devices, "tpu")


def traceable(experiment: Experiment, platform: str) -> Experiment:
    """The experiment with kernels that can be traced anywhere: where a GPU would run cuDNN's attention, the TPU's, which has the same products.

    cuDNN's own asks for cuDNN when it is traced.
    """
    if platform != "gpu":
        return experiment

    def build(rngs: nnx.Rngs) -> nnx.Module:
        model = experiment.build(rngs)
        settle(model, "gpu", DTYPES[experiment.training.precision])
        for _, module in nnx.iter_modules(model):
            if isinstance(module, Attention) and module.implementation == "cudnn":
                module.implementation = "splash"
            if isinstance(module, rnn.Recurrent | rnn.RecurrentLM):
                module.kernel = "xla"
        return model

    return dataclasses.replace(experiment, build=build)


def product_seconds(chip: Chip, flops: float, size: float, itemsize: int = 2) -> float:
    """The time of a matrix product or convolution on a device.

    Args:
      chip: that it runs on.
      flops: two for each multiply and add.
      size: bytes of operands and result.
      itemsize: bytes of an operand's values. A GPU multiplies float32 as TF32, at half the rate of bfloat16; a TPU as bfloat16.
    """
    rate = chip.flops_per_device * PRODUCT_SHARE[chip.platform] * (0.5 if chip.platform == "gpu" and itemsize == 4 else 1)
    computing, moving = flops / rate, size * chip.devices_per_chip / chip.memory_bandwidth
    return computing + moving if chip.platform == "gpu" else max(computing, moving)


def attention_seconds(chip: Chip, flops: float) -> float:
    """The time of a fused attention kernel of a GPU, by the FLOPs of its products."""
    return flops / (chip.flops_per_device * ATTENTION_SHARE)


def splash_seconds(chip: Chip, which: str, op: Op) -> float:
    """The time of a splash attention kernel on a device; on a GPU, of cuDNN's in its place."""
    first = op.params["grid_mapping"].num_index_operands  # before them, which blocks the mask leaves
    (*heads, length, width), keys = (x.shape for x in op.inputs[first : first + 2])
    shape, heads = (length, keys[-2]), math.prod(heads)
    if chip.platform == "gpu":
        left = math.prod(shape) * (kernels.stated(op.scopes, "attended") or 1.0)
        return attention_seconds(chip, 2 * _CUDNN_PRODUCTS[which] * heads * left * width)
    block = kernels.noted_block(which, str(op.params["metadata"]))
    computed = math.prod(-(-n // of) for n, of in zip(shape, block, strict=True)) * (kernels.stated(op.scopes, "blocks") or 1.0)
    return splash.seconds(chip, which, computed=computed, shape=shape, block=block, head_width=width, heads=heads)


def other_seconds(chip: Chip, size: float) -> float:
    """The time of what moves so many bytes between a device and its memory."""
    return size * chip.devices_per_chip / (chip.memory_bandwidth * BANDWIDTH_SHARE)


def graph_work(graph: Graph, mesh: Mapping[str, int], chip: Chip) -> Work:
    """Of a program, or of one turn of a loop's body."""
    work, written = Work(), memory.written(graph, mesh)
    size = functools.cache(lambda value: _bytes(value, mesh))
    sources: dict[Value, frozenset[Value]] = {}  # the arrays in memory that a value is made of
    stages: dict[Value, int] = {}  # how many operations apart lie before it, one after the other
    fused, partial = _Fused(), {}
    differing: dict[Value, frozenset[str]] = {}  # of values in a `shard_map`: axes along which devices' own differ
    for op in graph.ops:
        below = frozenset().union(*(sources.get(x, _own(x)) for x in op.inputs))
        stage = max((stages.get(x, 0) for x in op.inputs), default=0) + (op.name in _APART)
        for value in op.outputs:
            stages[value] = stage
            cut = op.name in ("slice", "dynamic_slice", "gather")  # of whose operand a part is read
            sources[value] = frozenset((value,)) if value in written or cut else frozenset() if op.name in _APART else below
        results = [value for value in op.outputs if value in written]
        moved = sum(map(size, (*below, *results)))
        if op.name in _PRODUCTS:
            flops = _product_flops(op, mesh)
            work.flops += flops
            work.products += product_seconds(chip, flops, moved, op.inputs[0].itemsize)
        elif op.name == "pallas_call":
            flops = _flops(op)
            work.flops += flops
            if kernel := re.match(r"splash_m[hq]a_(fwd|dkv|dq)", str(op.params["name"])):
                work.attention += splash_seconds(chip, kernel[1], op)
            else:
                work.products += product_seconds(chip, flops, moved, op.inputs[-1].itemsize)
        elif op.name == "scan":
            work.add(graph_work(op.bodies[0], mesh, chip), op.params["length"])
        elif op.bodies:  # of a condition's branches the longest; a loop without a known end, once
            work.add(max((graph_work(body, mesh, chip) for body in op.bodies), key=lambda each: each.products + each.attention + each.other))
        elif op.name == "gather":
            work.other += other_seconds(chip, 2 * sum(map(size, op.outputs)))
        elif op.name in ("scatter", "scatter-add", "scatter_add", "dynamic_update_slice"):
            work.other += other_seconds(chip, 2 * size(op.inputs[-1 if op.name != "dynamic_update_slice" else 1]))
        elif op.name not in _APART:
            for value in results:
                fused.add(stage, below, value)
        found = _collectives(op, mesh, differing)
        differing |= dict.fromkeys(op.outputs, axes) if (axes := _differing(op, differing)) is not None else {}
        if op.name in ("add_any", "add") and all(x in partial for x in op.inputs) and len({partial[x].axes for x in op.inputs}) == 1:
            work.collectives.remove(partial[op.inputs[0]])  # sums of which each device has a part are added before they go round
            partial[op.outputs[0]] = partial[op.inputs[1]]
        elif op.name == "dot_general" and found:
            partial[op.outputs[0]] = found[-1]
        work.collectives += found
    work.other += other_seconds(chip, fused.bytes(size))
    return work


def _own(value: Value) -> frozenset[Value]:
    """What is given is an array in memory; constants are part of the program."""
    return frozenset() if value.constant else frozenset((value,))


class _Fused:
    """Arrays that are computed value by value, in groups of the same stage that read the same: each group reads an array once."""

    def __init__(self):
        self.groups: dict[int, list[tuple[set[Value], set[Value]]]] = {}

    def add(self, stage: int, below: frozenset[Value], value: Value) -> None:
        """An array and what it is made of."""
        groups, touched = self.groups.setdefault(stage, []), {*below, value}
        shared = [group for group in groups if any(group[0] & {x} or group[1] & {x} for x in touched if x.shape)]
        merged = (set(below).union(*(reads for reads, _ in shared)), {value}.union(*(writes for _, writes in shared)))
        self.groups[stage] = [group for group in groups if group not in shared] + [merged]

    def bytes(self, size) -> int:
        """Read and written."""
        return sum(sum(map(size, (reads - writes) | writes)) for groups in self.groups.values() for reads, writes in groups)


def _bytes(value: Value, mesh: Mapping[str, int]) -> int:
    """Of a device's part."""
    return math.prod(-(-n // ways(axes, mesh)) for n, axes in zip(value.shape, value.spec, strict=True)) * value.itemsize


def _flops(op: Op) -> int:
    return operation_flops(op.name, op.params, [x.shape for x in op.inputs], [x.shape for x in op.outputs])


def _product_flops(op: Op, mesh: Mapping[str, int]) -> float:
    """Of a device: its part of the results, and of the sums that lead to them."""
    summed = _summed(op)
    spread = {axis for axes in op.outputs[0].spec for axis in axes} - set(summed)
    return _flops(op) / ways(spread, mesh) / ways(summed, mesh)


def _summed(op: Op) -> tuple[str, ...]:
    """Axes over which the values lie that an operation sums up: each device has a part of every sum."""
    if op.name == "dot_general":
        contract, _ = op.params["dimension_numbers"]
        lost = [x.spec[i] for x, dimensions in zip(op.inputs, contract, strict=False) for i in dimensions]
    elif op.name == "conv_general_dilated":
        numbers = op.params["dimension_numbers"]
        lost = [op.inputs[0].spec[numbers.lhs_spec[1]], op.inputs[1].spec[numbers.rhs_spec[1]]]
    elif op.name == "reduce_sum":
        lost = [op.inputs[0].spec[i] for i in op.params["axes"]]
    elif op.name in ("scatter-add", "scatter_add"):
        kept = {axis for axes in op.outputs[0].spec for axis in axes}
        lost = [tuple(axis for axis in axes if axis not in kept) for axes in op.inputs[2].spec]
    else:
        return ()
    return tuple(dict.fromkeys(axis for axes in lost for axis in axes))


def _differing(op: Op, known: Mapping[Value, frozenset[str]]) -> frozenset[str] | None:
    """Axes along which an operation's results differ from device to device, inside a `shard_map`; None where that is not known."""
    if op.name in ("local", "gathered") and "spec" in op.params:
        return frozenset(_axes(op.params["spec"]))
    if op.name == "axis_index":
        return frozenset((op.params["axis_name"],))
    if any(x not in known and not x.constant for x in op.inputs) or not op.inputs or op.bodies:
        return None
    return frozenset().union(*(known[x] for x in op.inputs if x in known)) - set(op.params["axes"] if op.name == "psum" else ())


def _collectives(op: Op, mesh: Mapping[str, int], differing: Mapping[Value, frozenset[str]]) -> list[Exchange]:
    """What an operation needs of other devices. Sums of what all devices have alike, which gradients of a `shard_map` are full of, the compiler does away with."""
    found = []

    def add(kind: str, axes: Sequence[str], size: int) -> None:
        axes = tuple(axis for axis in mesh if axis in axes and mesh[axis] > 1)
        if axes:
            found.append(Exchange(kind, axes, size, 1, not set(axes) <= set(_BESIDE)))

    if summed := _summed(op):
        result = op.outputs[0]
        kept = {axis for axes in result.spec for axis in axes} & set(summed)
        add("reduce-scatter", kept, _bytes(result, mesh) * ways(kept, mesh))
        add("all-reduce", set(summed) - kept, _bytes(result, mesh))
    elif op.name in _KINDS:
        axes = op.params.get("axes") or op.params["axis_name"]
        axes = (axes,) if isinstance(axes, str) else axes
        if op.name == "psum" and all(x in differing for x in op.inputs):
            axes = [axis for axis in axes if any(axis in differing[x] for x in op.inputs)]
        add(_KINDS[op.name], axes, max(sum(_bytes(x, mesh) for x in part) for part in (op.inputs, op.outputs)))
    elif op.name == "gathered":
        after = _axes(op.outputs[0].spec if "spec" not in op.params else op.params["spec"])
        add("all-gather", _axes(op.inputs[0].spec) - after, _bytes(op.outputs[0], mesh))
    elif op.name == "sharding_constraint":
        before, after = op.inputs[0].spec, op.outputs[0].spec
        moved = {axis for old, new in zip(before, after, strict=True) for axis in old if axis not in new and axis in _axes(after)}
        add("all-to-all", moved, _bytes(op.outputs[0], mesh))
    return found


def _axes(spec: Spec) -> set[str]:
    return {axis for axes in spec for axis in axes}
