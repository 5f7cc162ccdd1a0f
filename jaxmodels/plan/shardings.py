"""Operations of a traced step, and the propagation of shardings over their values: from shapes alone, without a compiler or devices."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax

from jaxmodels.hardware.flops import operation_flops

Spec = tuple[tuple[str, ...], ...]

PRODUCTS = frozenset(("dot_general", "conv_general_dilated"))
_SCATTERS = ("scatter", "scatter-add")


@dataclasses.dataclass(eq=False)
class Value:
    """An array of the program.

    Attributes:
      shape: of the global array; inside `shard_map`, of one device's shard.
      itemsize: bytes of an element.
      spec: for each dimension the mesh axes that it is sharded over.
      op: that computes it; None for inputs.
      constant: known when tracing.
      fixed: whether a constraint states its sharding.
      host: whether it is in host memory.
    """

    shape: tuple[int, ...]
    itemsize: int
    spec: Spec
    op: "Op | None" = None
    constant: bool = False
    fixed: bool = False
    host: bool = False

    @property
    def axes(self) -> set[str]:
        """Mesh axes that it is sharded over."""
        return axes_of(self.spec)

    def shards(self, mesh: Mapping[str, int]) -> int:
        """Return the number of shards, without replicas."""
        return ways(self.axes, mesh)

    def local_shape(self, mesh: Mapping[str, int]) -> list[int]:
        """Return the shape of a device's shard."""
        return [-(-n // ways(axes, mesh)) for n, axes in zip(self.shape, self.spec, strict=True)]

    def local_bytes(self, mesh: Mapping[str, int]) -> int:
        """Return the bytes of a device's shard, without padding."""
        return math.prod(self.local_shape(mesh)) * self.itemsize


@dataclasses.dataclass(eq=False)
class Op:
    """One operation.

    Attributes:
      name: of the primitive; `local` and `whole` around the operations of a `shard_map`, `gathered` where shards are gathered.
      params: of the primitive.
      inputs, outputs: values.
      bodies: of loops and branches.
      scopes: names of its scopes and transformations, from the outermost to the innermost.
    """

    name: str
    params: Mapping[str, Any]
    inputs: list[Value]
    outputs: list[Value]
    bodies: "tuple[Graph, ...]" = ()
    scopes: str = ""

    @property
    def backward(self) -> bool:
        """Whether it belongs to the gradient."""
        return "transpose(" in self.scopes

    @property
    def contracted(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Dimensions that a product or convolution sums over: those of the first operand, and, in the same order, those of the second."""
        numbers = self.params["dimension_numbers"]
        return numbers[0] if self.name == "dot_general" else ((numbers.lhs_spec[1],), (numbers.rhs_spec[1],))

    @property
    def flops(self) -> int:
        """FLOPs in products and convolutions, over all devices."""
        return operation_flops(self.name, self.params, [x.shape for x in self.inputs], [x.shape for x in self.outputs])


@dataclasses.dataclass(eq=False)
class Graph:
    """A function: operations in order, from inputs to outputs."""

    inputs: list[Value]
    ops: list[Op]
    outputs: list[Value]


def axes_of(spec: Spec) -> set[str]:
    """Return the mesh axes that a sharding uses."""
    return {axis for axes in spec for axis in axes}


def spec_along(spec: jax.sharding.PartitionSpec, rank: int) -> Spec:
    """Return a `PartitionSpec` as mesh axes for each of `rank` dimensions; dimensions that it leaves out, or leaves open, are not sharded."""
    parts = [() if part is None or part is jax.sharding.PartitionSpec.UNCONSTRAINED else (part,) if isinstance(part, str) else tuple(part) for part in spec]
    return tuple(parts) + ((),) * (rank - len(parts))


def spec_of(x: jax.ShapeDtypeStruct) -> Spec:
    """Return the sharding of a shape with a `NamedSharding`."""
    return spec_along(x.sharding.spec, len(x.shape))


# Propagation of shardings: dimensions of operands and results that correspond get the same sharding


def propagate(graph: Graph, mesh: Mapping[str, int]) -> None:
    """Shard all values of a graph: from operands to results, and from constraints back to operands. Then insert the gathers that products need."""
    for _ in range(2):
        _forward(graph, mesh)
        _backward(graph, mesh)
    _forward(graph, mesh)
    _gather(graph, mesh)


def _forward(graph: Graph, mesh: Mapping[str, int]) -> None:
    """Propagate from operands to results. If two operands use the same axis, the larger one keeps it and the other is gathered."""
    for op in graph.ops:
        if op.name == "scan":
            _scan_forward(op, mesh)
        elif op.bodies:
            _branches_forward(op, mesh)
        elif op.name == "sharding_constraint":
            _constrain(op)
        elif op.name in ("whole", "local"):  # as the `shard_map` states
            op.outputs[0].spec, op.outputs[0].fixed = op.params["spec"] if op.name == "whole" else op.outputs[0].spec, True
        elif op.name == "reshape":
            _fill(op.outputs[0], _reshaped(op.inputs[0].shape, op.inputs[0].spec, op.outputs[0].shape), mesh)
        else:
            order = sorted(range(len(op.inputs)), key=lambda k: -math.prod(op.inputs[k].shape))
            for number, value in enumerate(op.outputs):
                spec, used = [()] * len(value.shape), set()
                for k in order:
                    for i, j in _same(op, k, number):
                        axes = tuple(axis for axis in op.inputs[k].spec[i] if axis not in used)
                        if axes and not spec[j]:
                            spec[j] = axes
                            used.update(axes)
                _fill(value, tuple(spec), mesh)


def _backward(graph: Graph, mesh: Mapping[str, int]) -> None:
    """Propagate from results to operands, for elementwise operations and those that only move data."""
    for op in reversed(graph.ops):
        if op.name == "scan":
            (body,), consts, carries = op.bodies, op.params["num_consts"], op.params["num_carry"]
            for i, (inner, outer) in enumerate(zip(body.outputs, op.outputs, strict=True)):
                _fill(inner, outer.spec if i < carries else outer.spec[1:], mesh)
            _backward(body, mesh)
            for i, (outer, inner) in enumerate(zip(op.inputs, body.inputs, strict=True)):
                _fill(outer, ((), *inner.spec) if i >= consts + carries else inner.spec, mesh)
        elif op.name in ("reshape", "squeeze"):
            _fill(op.inputs[0], _reshaped(op.outputs[0].shape, op.outputs[0].spec, op.inputs[0].shape), mesh)
        elif op.name == "local":
            _fill(op.inputs[0], op.params["spec"], mesh)
        elif op.name in ELEMENTWISE or op.name in ("transpose", "broadcast_in_dim", "sharding_constraint", "device_put", *_SCATTERS):
            for k, x in enumerate(op.inputs):
                for number, y in enumerate(op.outputs):
                    spec = [()] * len(x.shape)
                    for i, j in _same(op, k, number):
                        spec[i] = y.spec[j]
                    _fill(x, tuple(spec), mesh)


def _fill(value: Value, spec: Spec, mesh: Mapping[str, int]) -> bool:
    """Shard dimensions that are not sharded yet and that the axes divide. Return whether anything changed."""
    if value.fixed:
        return False
    used = value.axes
    result = list(value.spec)
    for i, axes in enumerate(spec):
        new = tuple(axis for axis in axes if axis not in used and mesh.get(axis, 1) > 1)
        if new and not result[i] and value.shape[i] % ways(new, mesh) == 0:
            result[i] = new
            used.update(new)
    changed = tuple(result) != value.spec
    value.spec = tuple(result)
    return changed


def ways(axes: Iterable[str], mesh: Mapping[str, int]) -> int:
    """Return the number of shards along axes."""
    return math.prod(mesh.get(axis, 1) for axis in axes)


def _same(op: Op, k: int, number: int) -> list[tuple[int, int]]:
    """Return the dimensions of operand `k` that correspond to dimensions of a result, as pairs (of the operand, of the result)."""
    x, y, params = op.inputs[k], op.outputs[number], op.params
    match op.name:
        case "broadcast_in_dim":
            return [(i, j) for i, j in enumerate(params["broadcast_dimensions"]) if k == 0 and x.shape[i] == y.shape[j]]
        case "transpose":
            return [(i, j) for j, i in enumerate(params["permutation"])]
        case "squeeze" | "reduce_sum" | "reduce_max" | "reduce_min" | "reduce_and" | "reduce_or" | "reduce_prod" | "argmax" | "argmin":
            gone = {i % len(x.shape) for i in params["dimensions" if op.name == "squeeze" else "axes"]}
            return [(i, j) for j, i in enumerate(i for i in range(len(x.shape)) if i not in gone)]
        case "dot_general":
            contract, batch = params["dimension_numbers"]
            free = [[i for i in range(len(each.shape)) if i not in (*contract[side], *batch[side])] for side, each in enumerate(op.inputs[:2])]
            return [(i, j) for j, i in enumerate(batch[k])] + [(i, len(batch[0]) + k * len(free[0]) + j) for j, i in enumerate(free[k])]
        case "conv_general_dilated":
            numbers = params["dimension_numbers"]
            return [(numbers.rhs_spec[0], numbers.out_spec[1]) if k else (numbers.lhs_spec[0], numbers.out_spec[0])]
        case "gather":
            return _gathered(op, k)
        case "scatter" | "scatter-add" | "dynamic_update_slice" if k > 0 or len(x.shape) != len(y.shape):
            return []
        case "expand_dims" | "pallas_call":  # unknown without a constraint
            return []
        case "slice" | "pad" if k == 0 and len(x.shape) == len(y.shape):  # scores of tokens without those of padding, and their gradients
            return [(i, i) for i, (m, n) in enumerate(zip(x.shape, y.shape, strict=True)) if m == n or (_from_start(op, i) and 2 * min(m, n) > max(m, n))]
    return [(i, i) for i, n in enumerate(x.shape) if n == y.shape[i]] if len(x.shape) == len(y.shape) else []


def _from_start(op: Op, i: int) -> bool:
    """Return whether a slice or padding keeps the beginning of a dimension where it is."""
    if op.name == "pad":
        low, _, between = op.params["padding_config"][i]
        return low == between == 0
    return op.params["start_indices"][i] == 0 and (op.params["strides"] is None or op.params["strides"][i] == 1)


def _gathered(op: Op, k: int) -> list[tuple[int, int]]:
    """Return the same for a gather: the rows of its result correspond to the indices, the dimensions within a row to those of the operand."""
    numbers, x, rank = op.params["dimension_numbers"], op.inputs[0], len(op.outputs[0].shape)
    if k == 1:
        return list(enumerate(j for j in range(rank) if j not in numbers.offset_dims))
    gone = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    kept = [i for i in range(len(x.shape)) if i not in gone]
    return [(i, j) for i, j in zip(kept, numbers.offset_dims, strict=True) if k == 0 and op.params["slice_sizes"][i] == x.shape[i]]


def _constrain(op: Op) -> None:
    """Give the result of a sharding constraint its sharding; dimensions that it leaves open keep that of the operand."""
    (x,), (y,) = op.inputs, op.outputs
    spec = list(spec_along(op.params["sharding"].spec, len(x.shape)))
    open_dimensions = op.params.get("unconstrained_dims", ())
    for i in open_dimensions:
        spec[i] = tuple(axis for axis in x.spec[i] if axis not in {a for part in spec for a in part})
    y.spec, y.fixed = tuple(spec), not open_dimensions


def _reshaped(before: tuple[int, ...], spec: Spec, after: tuple[int, ...]) -> Spec:
    """Return the sharding after a reshape. The axes of a group of dimensions that becomes another group go to the dimension of the same size, else to the first."""
    result: list[tuple[str, ...]] = [()] * len(after)
    i = j = 0 if math.prod(before) else len(before)
    while i < len(before) and j < len(after):
        first, target, left, right = i, j, before[i], after[j]
        while left != right:
            if left < right:
                i += 1
                left *= before[i]
            else:
                j += 1
                right *= after[j]
        parts = [k for k in range(first, i + 1) if spec[k]]
        goal = [k for k in range(target, j + 1) if after[k] > 1] or [target]
        for k in parts:
            same = [g for g in goal if after[g] == before[k] and not result[g]]
            result[same[0] if same else goal[0]] += spec[k]
        i, j = i + 1, j + 1
    return tuple(result)


def _scan_forward(op: Op, mesh: Mapping[str, int]) -> None:
    (body,), consts, carries = op.bodies, op.params["num_consts"], op.params["num_carry"]
    for outer, inner in zip(op.inputs, body.inputs, strict=True):
        _fill(inner, outer.spec[len(outer.shape) - len(inner.shape) :], mesh)
    for _ in range(3):
        _forward(body, mesh)
        pairs = list(zip(body.inputs[consts : consts + carries], body.outputs[:carries], strict=True))
        changed = [_fill(inner, out.spec, mesh) for inner, out in pairs]  # a list: all of them are filled
        if not any(changed):
            break
    for i, (inner, outer) in enumerate(zip(body.outputs, op.outputs, strict=True)):
        _fill(outer, inner.spec if i < carries else ((), *inner.spec), mesh)


def _branches_forward(op: Op, mesh: Mapping[str, int]) -> None:
    for body in op.bodies:
        for outer, inner in zip(op.inputs[len(op.inputs) - len(body.inputs) :], body.inputs, strict=True):
            _fill(inner, outer.spec, mesh)
        _forward(body, mesh)
        for outer, inner in zip(op.outputs, body.outputs, strict=True):
            _fill(outer, inner.spec, mesh)


ELEMENTWISE = frozenset(
    "add add_any sub mul div max min neg sign abs exp exp2 expm1 log log1p tanh logistic erf erf_inv erfc sin cos tan sqrt rsqrt cbrt pow integer_pow square "
    "convert_element_type reduce_precision copy copy_p name select_n clamp eq ne lt le gt ge lt_to le_to is_finite and or not xor shift_left "
    "shift_right_logical shift_right_arithmetic rem floor ceil round nextafter stop_gradient layout_constraint reshard bitcast_convert_type optimization_barrier".split()
)


def _gather(graph: Graph, mesh: Mapping[str, int]) -> None:
    """Insert an operation `gathered` before each product with an operand that must be gathered."""
    together: dict[tuple, Value] = {}
    ops = []
    for op in graph.ops:
        for body in op.bodies:
            _gather(body, mesh)
        if op.name in PRODUCTS:
            _gather_operands(op, ops, together)
        elif op.name in ("sharding_constraint", "local"):
            after = op.outputs[0].axes if op.name == "sharding_constraint" else axes_of(op.params["spec"])
            op.name = "gathered" if op.inputs[0].axes - after else op.name
        ops.append(op)
    graph.ops[:] = ops


def _gather_operands(op: Op, ops: list[Op], together: dict) -> None:
    operands, contract, result = op.inputs[:2], op.contracted, op.outputs[0].axes
    for k, x in enumerate(operands):
        other, partner = operands[1 - k], dict(zip(contract[k], contract[1 - k], strict=True))
        spec = []
        for i, axes in enumerate(x.spec):
            if i in partner:
                # An axis along which both operands are sharded stays: each device computes a partial sum. An axis that also shards the result is gathered here.
                spec.append(tuple(a for a in axes if a in other.spec[partner[i]] or a not in result))
            else:
                spec.append(tuple(a for a in axes if a in result or op.name == "conv_general_dilated" and k == 0))
        if tuple(spec) != x.spec and not x.constant:
            key = (id(x), tuple(spec))
            if key not in together:
                gathered = Op("gathered", {}, [x], [Value(x.shape, x.itemsize, tuple(spec), fixed=True)], scopes=op.scopes)
                gathered.outputs[0].op = gathered
                ops.append(gathered)
                together[key] = gathered.outputs[0]
            op.inputs = [together[key] if i == k else y for i, y in enumerate(op.inputs)]
