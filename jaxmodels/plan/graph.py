"""A traced step as one list of operations, each value with the mesh axes that its dimensions are spread over.

What the compiler does with shardings is done here by shapes alone, and without devices: they go from operands to results and from the
constraints that a model names back to what they are made of.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core as jax_core

Spec = tuple[tuple[str, ...], ...]

# Operations that take a function apart from those: they are what that function does.
_CALLS = ("jit", "pjit", "closed_call", "core_call", "remat2", "checkpoint", "custom_jvp_call", "custom_vjp_call", "custom_vmap_call", "custom_lin")


_SCATTERS = ("scatter", "scatter-add")


@dataclasses.dataclass(eq=False)
class Value:
    """An array of the program.

    Attributes:
      shape: of the whole; of one device's part inside `shard_map`.
      itemsize: bytes of an element.
      spec: for each dimension the mesh axes that it is spread over.
      op: that makes it; None for what a program is given.
      constant: known when tracing.
      fixed: spread as a constraint says.
      host: it lies in the host's memory.
    """

    shape: tuple[int, ...]
    itemsize: int
    spec: Spec
    op: "Op | None" = None
    constant: bool = False
    fixed: bool = False
    host: bool = False


@dataclasses.dataclass(eq=False)
class Op:
    """One operation.

    Attributes:
      name: of the primitive; `local` and `whole` around the operations of a `shard_map`, `gathered` where shares come together.
      params: of the primitive.
      inputs, outputs: values.
      bodies: of loops and branches.
      scopes: names of the scopes and transformations that it is in, from the outermost on.
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


@dataclasses.dataclass(eq=False)
class Graph:
    """A function: operations in order, from inputs to outputs."""

    inputs: list[Value]
    ops: list[Op]
    outputs: list[Value]


def build(jaxpr: jax_core.ClosedJaxpr, specs: Sequence[Spec], mesh: Mapping[str, int], platform: str) -> Graph:
    """The graph of a traced function, every value spread.

    Args:
      jaxpr: as `jax.make_jaxpr` gives.
      specs: of its arguments.
      mesh: sizes of the axes.
      platform: of what functions do differently on each, what they do there.
    """
    inputs = [dataclasses.replace(_value(var.aval), spec=spec, fixed=True) for var, spec in zip(jaxpr.jaxpr.invars, specs, strict=True)]
    graph = _Builder(platform, mesh).graph(jaxpr.jaxpr, inputs, "")
    _drop_unused(graph)
    for _ in range(2):
        _forward(graph, mesh)
        _backward(graph, mesh)
    _forward(graph, mesh)
    _gather(graph, mesh)
    return graph


def _value(aval, constant: bool = False) -> Value:
    shape = tuple(getattr(aval, "shape", ()))
    dtype = getattr(aval, "dtype", np.dtype(np.int32))
    itemsize = 8 if jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key) else dtype.itemsize
    host = getattr(aval, "memory_space", None) == jax.memory.Space.Host
    return Value(shape, itemsize, ((),) * len(shape), constant=constant, host=host)


class _Builder:
    """Makes one list of nested functions."""

    def __init__(self, platform: str, mesh: Mapping[str, int]):
        self.platform, self.mesh = platform, mesh

    def graph(self, jaxpr, inputs: list[Value], scopes: str) -> Graph:
        ops: list[Op] = []
        return Graph(inputs, ops, self.run(jaxpr, inputs, ops, scopes))

    def run(self, jaxpr, inputs: list[Value], ops: list[Op], scopes: str) -> list[Value]:
        """Adds the operations of a function. Returns its results."""
        values = dict(zip(jaxpr.invars, inputs, strict=True))
        values |= {var: _value(var.aval, True) for var in jaxpr.constvars}

        def read(var):
            return _value(var.aval, True) if isinstance(var, jax_core.Literal) else values[var]

        for equation in jaxpr.eqns:
            given = [read(var) for var in equation.invars]
            inside = f"{scopes}/{equation.source_info.name_stack}"
            for var, value in zip(equation.outvars, self.one(equation, given, ops, inside), strict=True):
                values[var] = value
        return [read(var) for var in jaxpr.outvars]

    def one(self, equation, given: list[Value], ops: list[Op], scopes: str) -> list[Value]:
        name, params = equation.primitive.name, equation.params
        if name in _CALLS:
            inner = params.get("jaxpr") or params.get("call_jaxpr") or params.get("call")
            return self.run(getattr(inner, "jaxpr", inner), given[len(given) - len(getattr(inner, "jaxpr", inner).invars) :], ops, scopes)
        if name == "shard_map":
            inner = params["jaxpr"]
            parts = [
                self.add(ops, "local", {"spec": _spec_of(s, len(x.shape))}, [x], [v.aval], scopes)[0]
                for x, s, v in zip(given, params["in_specs"], inner.invars, strict=True)
            ]
            results = self.run(inner, parts, ops, scopes)
            whole = zip(results, params["out_specs"], equation.outvars, strict=True)
            return [self.add(ops, "whole", {"spec": _spec_of(s, len(v.aval.shape))}, [x], [v.aval], scopes)[0] for x, s, v in whole]
        if name == "cond" and (choice := _platforms(given[0])) is not None:
            own = next(i for i, names in enumerate(choice) if names is None or self.platform in names)
            return self.run(params["branches"][own].jaxpr, given[1:], ops, scopes)
        if name == "optimization_barrier":  # what goes in comes out, each by itself
            return [self.add(ops, name, params, [x], [var.aval], scopes)[0] for x, var in zip(given, equation.outvars, strict=True)]
        if name == "psum" and ways(params["axes"], self.mesh) == 1:  # of one device
            return given
        bodies = ()
        if name == "scan":
            bodies, params = (params["jaxpr"].jaxpr,), dict(params) | _scan_counts(params)
        elif name == "while":
            bodies = (params["body_jaxpr"].jaxpr,)
        elif name == "cond":
            bodies = tuple(branch.jaxpr for branch in params["branches"])
        graphs = tuple(self.graph(body, [_value(var.aval) for var in body.invars], scopes) for body in bodies)
        return self.add(ops, name, params, given, [var.aval for var in equation.outvars], scopes, graphs)

    def add(self, ops, name, params, given, avals, scopes, bodies=()) -> list[Value]:
        op = Op(name, params, given, [_value(aval) for aval in avals], bodies, scopes)
        for value in op.outputs:
            value.op = op
        ops.append(op)
        return op.outputs


def _scan_counts(params: Mapping[str, Any]) -> dict[str, int]:
    """How many of a loop's arguments are the same in each turn, and how many are carried on. From jax 0.12 on they are in trees."""
    if "num_carry" in params:
        return {}
    consts, carried, _ = params["ft_in"].unpack()
    return {"num_consts": len(list(consts)), "num_carry": len(list(carried))}


def _platforms(index: Value) -> tuple[tuple[str, ...] | None, ...] | None:
    """The platforms of the branches that a number chooses from; None where it is no platform's."""
    while index.op is not None and index.op.name != "platform_index" and index.op.inputs:
        index = index.op.inputs[0]
    return index.op.params["platforms"] if index.op is not None and index.op.name == "platform_index" else None


def _spec_of(spec: jax.sharding.PartitionSpec, rank: int) -> Spec:
    parts = [() if part is None or part is jax.sharding.PartitionSpec.UNCONSTRAINED else (part,) if isinstance(part, str) else tuple(part) for part in spec]
    return tuple(parts) + ((),) * (rank - len(parts))


def spec_of(x: jax.ShapeDtypeStruct) -> Spec:
    """Of a shape with a `NamedSharding`."""
    return _spec_of(x.sharding.spec, len(x.shape))


def _drop_unused(graph: Graph) -> None:
    """Leaves out what no result needs; of loops, the results that nothing reads."""
    needed = set(graph.outputs)
    kept = []
    for op in reversed(graph.ops):
        if not any(value in needed for value in op.outputs):
            continue
        if op.name == "scan":
            _narrow(op, needed)
        for body in op.bodies if op.name != "scan" else ():
            _drop_unused(body)
        needed.update(op.inputs)
        kept.append(op)
    graph.ops[:] = reversed(kept)


def _narrow(op: Op, needed: set[Value]) -> None:
    """Drops what a loop stacks and nobody reads, and what goes in only for that."""
    (body,), consts, carries = op.bodies, op.params["num_consts"], op.params["num_carry"]
    keep = [i for i, value in enumerate(op.outputs) if i < carries or value in needed]
    op.outputs, body.outputs = [op.outputs[i] for i in keep], [body.outputs[i] for i in keep]
    _drop_unused(body)
    used = {value for inner in body.ops for value in inner.inputs} | set(body.outputs)
    stay = [i for i, value in enumerate(body.inputs) if consts <= i < consts + carries or value in used]
    op.inputs, body.inputs = [op.inputs[i] for i in stay], [body.inputs[i] for i in stay]
    op.params = dict(op.params) | {"num_consts": sum(i < consts for i in stay)}


# Shardings, from operands to results


def _forward(graph: Graph, mesh: Mapping[str, int]) -> None:
    for op in graph.ops:
        if op.name == "scan":
            _through_scan(op, mesh)
        elif op.name in ("while", "cond"):
            _through_body(op, mesh)
        else:
            rule = _RULES.get(op.name, _by_size)
            for value, spec in zip(op.outputs, rule(op), strict=False):
                _fill(value, spec, mesh)


def _fill(value: Value, spec: Spec | None, mesh: Mapping[str, int]) -> bool:
    """Spreads dimensions that are whole so far, where they divide. Returns whether that changed anything."""
    if value.fixed or spec is None:
        return False
    used = {axis for axes in value.spec for axis in axes}
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
    """Parts that so many axes make."""
    return math.prod(mesh.get(axis, 1) for axis in axes)


def _by_size(op: Op) -> list[Spec | None]:
    """What elementwise operations and their kind do: a dimension of the result is spread as that of an operand of equal rank and size."""
    return [_merged(value, [x for x in op.inputs if len(x.shape) == len(value.shape)]) for value in op.outputs]


def _merged(value: Value, operands: Sequence[Value]) -> Spec:
    spec: list[tuple[str, ...]] = [()] * len(value.shape)
    used: set[str] = set()
    for x in sorted(operands, key=lambda x: -math.prod(x.shape)):
        for i, axes in enumerate(x.spec):
            if not spec[i] and x.shape[i] == value.shape[i] and not used.intersection(axes):
                spec[i] = axes
                used.update(axes)
    return tuple(spec)


def _constrained(op: Op) -> list[Spec]:
    (x,), (y,) = op.inputs, op.outputs
    spec = list(_spec_of(op.params["sharding"].spec, len(x.shape)))
    open_dimensions = op.params.get("unconstrained_dims", ())
    for i in open_dimensions:
        spec[i] = tuple(axis for axis in x.spec[i] if axis not in {a for part in spec for a in part})
    y.spec, y.fixed = tuple(spec), not open_dimensions
    return []


def _told(op: Op) -> list[Spec]:
    """`whole`: as the `shard_map` says."""
    op.outputs[0].spec, op.outputs[0].fixed = op.params["spec"], True
    return []


def _local(op: Op) -> list[Spec]:
    op.outputs[0].fixed = True
    return []


def _broadcast(op: Op) -> list[Spec]:
    x, spec = op.inputs[0], [()] * len(op.outputs[0].shape)
    for i, to in enumerate(op.params["broadcast_dimensions"]):
        if x.shape[i] == op.outputs[0].shape[to]:
            spec[to] = x.spec[i]
    return [tuple(spec)]


def _transpose(op: Op) -> list[Spec]:
    return [tuple(op.inputs[0].spec[i] for i in op.params["permutation"])]


def _reshape(op: Op) -> list[Spec]:
    return [_reshaped(op.inputs[0].shape, op.inputs[0].spec, op.outputs[0].shape)]


def _reshaped(before: tuple[int, ...], spec: Spec, after: tuple[int, ...]) -> Spec:
    """A group of dimensions that becomes another group is spread along the first of them."""
    result: list[tuple[str, ...]] = [()] * len(after)
    i = j = 0
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
        if len(parts) == 1:
            # Axes of a later dimension of several stay with the one of its size.
            same = [k for k in goal if after[k] == before[parts[0]]]
            result[same[0] if same else goal[0]] = spec[parts[0]]
        elif parts:
            for k in parts:
                same = [g for g in goal if after[g] == before[k] and not result[g]]
                result[same[0] if same else goal[0]] += spec[k]
        i, j = i + 1, j + 1
    return tuple(result)


def _reduced(op: Op) -> list[Spec]:
    axes = op.params["axes"]
    spec = tuple(s for i, s in enumerate(op.inputs[0].spec) if i not in axes)
    return [spec] * len(op.outputs)


def _squeezed(op: Op) -> list[Spec]:
    gone = {d % len(op.inputs[0].shape) for d in op.params["dimensions"]}
    return [tuple(s for i, s in enumerate(op.inputs[0].spec) if i not in gone)]


def _dot(op: Op) -> list[Spec]:
    (contract, batch) = op.params["dimension_numbers"]
    left, right = op.inputs[:2]
    free = [[i for i in range(len(x.shape)) if i not in (*contract[k], *batch[k])] for k, x in enumerate((left, right))]
    parts = [left.spec[i] or right.spec[j] for i, j in zip(*batch, strict=True)]
    sides = [[left.spec[i] for i in free[0]], [right.spec[i] for i in free[1]]]
    order = (0, 1) if math.prod(left.shape) >= math.prod(right.shape) else (1, 0)
    used = {axis for axes in parts for axis in axes}
    for k in order:  # an axis goes to the larger operand, the other one is gathered
        for i, axes in enumerate(sides[k]):
            sides[k][i] = tuple(axis for axis in axes if axis not in used)
            used.update(sides[k][i])
    return [(*parts, *sides[0], *sides[1])]


def _convolution(op: Op) -> list[Spec]:
    numbers, (x, kernel) = op.params["dimension_numbers"], op.inputs
    spec = [()] * len(op.outputs[0].shape)
    spec[numbers.out_spec[0]] = x.spec[numbers.lhs_spec[0]]
    rest = {axis for axis in spec[numbers.out_spec[0]]}
    spec[numbers.out_spec[1]] = tuple(axis for axis in kernel.spec[numbers.rhs_spec[0]] if axis not in rest)
    return [tuple(spec)]


def _gathered_rows(op: Op) -> list[Spec]:
    """`gather`: rows as the indices are spread, what a row is as the operand is."""
    numbers, (x, indices) = op.params["dimension_numbers"], op.inputs[:2]
    spec: list[tuple[str, ...]] = []
    rows = iter(indices.spec[:-1])
    gone = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    kept = iter([i for i in range(len(x.shape)) if i not in gone])
    for i in range(len(op.outputs[0].shape)):
        if i in numbers.offset_dims:
            k = next(kept)
            spec.append(x.spec[k] if op.params["slice_sizes"][k] == x.shape[k] else ())
        else:
            spec.append(next(rows))
    return [tuple(spec)]


def _first(op: Op) -> list[Spec]:
    """Results that are as the first operand."""
    return [op.inputs[0].spec if len(op.inputs[0].shape) == len(value.shape) else None for value in op.outputs]


def _unknown(op: Op) -> list[None]:
    """Results of which nothing is known until something constrains them."""
    return [None for _ in op.outputs]


_RULES = {
    "sharding_constraint": _constrained,
    "whole": _told,
    "local": _local,
    "broadcast_in_dim": _broadcast,
    "transpose": _transpose,
    "reshape": _reshape,
    "squeeze": _squeezed,
    "expand_dims": _unknown,
    "dot_general": _dot,
    "conv_general_dilated": _convolution,
    "gather": _gathered_rows,
    "pallas_call": _unknown,
    **dict.fromkeys(("reduce_sum", "reduce_max", "reduce_min", "reduce_and", "reduce_or", "reduce_prod", "argmax", "argmin"), _reduced),
    **dict.fromkeys((*_SCATTERS, "dynamic_update_slice"), _first),
}


def _through_scan(op: Op, mesh: Mapping[str, int]) -> None:
    (body,), consts, carries = op.bodies, op.params["num_consts"], op.params["num_carry"]
    for outer, inner in zip(op.inputs, body.inputs, strict=True):
        _fill(inner, outer.spec[len(outer.shape) - len(inner.shape) :], mesh)
    for _ in range(3):
        _forward(body, mesh)
        pairs = list(zip(body.inputs[consts : consts + carries], body.outputs[:carries], strict=True))
        if not any([_fill(inner, out.spec, mesh) for inner, out in pairs]):
            break
    for i, (inner, outer) in enumerate(zip(body.outputs, op.outputs, strict=True)):
        _fill(outer, inner.spec if i < carries else ((), *inner.spec), mesh)


def _through_body(op: Op, mesh: Mapping[str, int]) -> None:
    for body in op.bodies:
        given = op.inputs[len(op.inputs) - len(body.inputs) :]
        for outer, inner in zip(given, body.inputs, strict=True):
            _fill(inner, outer.spec, mesh)
        _forward(body, mesh)
        for outer, inner in zip(op.outputs, body.outputs, strict=True):
            _fill(outer, inner.spec, mesh)


# … and from results to operands


def _backward(graph: Graph, mesh: Mapping[str, int]) -> None:
    for op in reversed(graph.ops):
        if op.name == "scan":
            (body,), consts, carries = op.bodies, op.params["num_consts"], op.params["num_carry"]
            for i, (inner, outer) in enumerate(zip(body.outputs, op.outputs, strict=True)):
                _fill(inner, outer.spec if i < carries else outer.spec[1:], mesh)
            _backward(body, mesh)
            for i, (outer, inner) in enumerate(zip(op.inputs, body.inputs, strict=True)):
                stacked = i >= consts + carries
                _fill(outer, ((), *inner.spec) if stacked else inner.spec, mesh)
        elif op.name == "transpose":
            inverse = np.argsort(op.params["permutation"])
            _fill(op.inputs[0], tuple(op.outputs[0].spec[i] for i in inverse), mesh)
        elif op.name in ("reshape", "squeeze"):
            _fill(op.inputs[0], _reshaped(op.outputs[0].shape, op.outputs[0].spec, op.inputs[0].shape), mesh)
        elif op.name == "broadcast_in_dim":
            x, y = op.inputs[0], op.outputs[0]
            spec = tuple(y.spec[to] if x.shape[i] == y.shape[to] else () for i, to in enumerate(op.params["broadcast_dimensions"]))
            _fill(x, spec, mesh)
        elif op.name == "local":
            _fill(op.inputs[0], op.params["spec"], mesh)
        elif op.name in ELEMENTWISE or op.name in ("sharding_constraint", "device_put", *_SCATTERS):
            for x in op.inputs[:1] if op.name in _SCATTERS else op.inputs:
                for y in op.outputs:
                    if len(x.shape) == len(y.shape):
                        _fill(x, tuple(axes if x.shape[i] == y.shape[i] else () for i, axes in enumerate(y.spec)), mesh)


ELEMENTWISE = frozenset(
    "add add_any sub mul div max min neg sign abs exp exp2 expm1 log log1p tanh logistic erf erf_inv erfc sin cos tan sqrt rsqrt cbrt pow integer_pow square "
    "convert_element_type reduce_precision copy copy_p name select_n clamp eq ne lt le gt ge lt_to le_to is_finite and or not xor shift_left "
    "shift_right_logical shift_right_arithmetic rem floor ceil round nextafter stop_gradient layout_constraint reshard bitcast_convert_type optimization_barrier".split()
)


def _gather(graph: Graph, mesh: Mapping[str, int]) -> None:
    """Puts in an operation of its own where a product's operand has to come together from its shares first."""
    together: dict[tuple, Value] = {}
    ops = []
    for op in graph.ops:
        for body in op.bodies:
            _gather(body, mesh)
        if op.name in ("dot_general", "conv_general_dilated"):
            _gather_operands(op, ops, together)
        elif op.name == "sharding_constraint" and _lost(op.inputs[0].spec, op.outputs[0].spec):
            op.name = "gathered"
        elif op.name == "local" and _lost(op.inputs[0].spec, op.params["spec"]):
            op.name = "gathered"
        ops.append(op)
    graph.ops[:] = ops


def _lost(before: Spec, after: Spec) -> bool:
    return bool({axis for axes in before for axis in axes} - {axis for axes in after for axis in axes})


def _gather_operands(op: Op, ops: list[Op], together: dict) -> None:
    left, right = op.inputs[:2]
    result = {axis for axes in op.outputs[0].spec for axis in axes}
    if op.name == "dot_general":
        contract, _ = op.params["dimension_numbers"]
    else:
        numbers = op.params["dimension_numbers"]
        contract = ((numbers.lhs_spec[1],), (numbers.rhs_spec[1],))
    for k, x in enumerate((left, right)):
        other = (right, left)[k]
        partner = dict(zip(contract[k], contract[1 - k], strict=True))
        spec = []
        for i, axes in enumerate(x.spec):
            if i in partner:
                # Both sides have a part of the sum: each device adds up its own. Else one of them comes together, where the axis has other work.
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
