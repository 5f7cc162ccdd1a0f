"""A traced step as one list of operations: calls are inlined, unused operations are removed, and each value has a sharding."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core as jax_core

from jaxmodels.plan.shardings import Graph, Op, Spec, Value, propagate, spec_along, ways

# Primitives that only call a function, whose operations are inlined.
_CALLS = ("jit", "pjit", "closed_call", "core_call", "remat2", "checkpoint", "custom_jvp_call", "custom_vjp_call", "custom_vmap_call", "custom_lin")


def build(jaxpr: jax_core.ClosedJaxpr, specs: Sequence[Spec], mesh: Mapping[str, int], platform: str) -> Graph:
    """Return the graph of a traced function, with all values sharded.

    Args:
      jaxpr: as `jax.make_jaxpr` returns.
      specs: shardings of its arguments.
      mesh: sizes of the axes.
      platform: selects the branch of functions that differ by platform.
    """
    inputs = [dataclasses.replace(_value(var.aval), spec=spec, fixed=True) for var, spec in zip(jaxpr.jaxpr.invars, specs, strict=True)]
    graph = _Builder(platform, mesh).graph(jaxpr.jaxpr, inputs, "")
    _drop_unused(graph)
    propagate(graph, mesh)
    return graph


def _value(aval, constant: bool = False) -> Value:
    shape = tuple(getattr(aval, "shape", ()))
    dtype = getattr(aval, "dtype", np.dtype(np.int32))
    itemsize = 8 if jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key) else dtype.itemsize
    host = getattr(aval, "memory_space", None) == jax.memory.Space.Host
    return Value(shape, itemsize, ((),) * len(shape), constant=constant, host=host)


class _Builder:
    """Inlines nested functions into one list of operations."""

    def __init__(self, platform: str, mesh: Mapping[str, int]):
        self.platform, self.mesh = platform, mesh

    def graph(self, jaxpr, inputs: list[Value], scopes: str) -> Graph:
        ops: list[Op] = []
        return Graph(inputs, ops, self.run(jaxpr, inputs, ops, scopes))

    def run(self, jaxpr, inputs: list[Value], ops: list[Op], scopes: str) -> list[Value]:
        """Append the operations of a function to `ops`, and return its results."""
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
                self.add(ops, "local", {"spec": spec_along(s, len(x.shape))}, [x], [v.aval], scopes)[0]
                for x, s, v in zip(given, params["in_specs"], inner.invars, strict=True)
            ]
            results = self.run(inner, parts, ops, scopes)
            whole = zip(results, params["out_specs"], equation.outvars, strict=True)
            return [self.add(ops, "whole", {"spec": spec_along(s, len(v.aval.shape))}, [x], [v.aval], scopes)[0] for x, s, v in whole]
        if name == "cond" and (choice := _platforms(given[0])) is not None:
            own = next(i for i, names in enumerate(choice) if names is None or self.platform in names)
            return self.run(params["branches"][own].jaxpr, given[1:], ops, scopes)
        if name == "optimization_barrier":  # one operation for each array
            return [self.add(ops, name, params, [x], [var.aval], scopes)[0] for x, var in zip(given, equation.outvars, strict=True)]
        if name == "psum" and ways(params["axes"], self.mesh) == 1:  # a group of one device
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
    """Return the numbers of constant and of carried arguments of a loop. From jax 0.12 on they are in trees."""
    if "num_carry" in params:
        return {}
    consts, carried, _ = params["ft_in"].unpack()
    return {"num_consts": len(list(consts)), "num_carry": len(list(carried))}


def _platforms(index: Value) -> tuple[tuple[str, ...] | None, ...] | None:
    """Return the platforms of the branches that an index selects; None if it is not the index of a platform."""
    while index.op is not None and index.op.name != "platform_index" and index.op.inputs:
        index = index.op.inputs[0]
    return index.op.params["platforms"] if index.op is not None and index.op.name == "platform_index" else None


def _drop_unused(graph: Graph) -> None:
    """Remove operations that no result depends on, and results of loops that are not read."""
    needed = set(graph.outputs)
    used = []
    for op in reversed(graph.ops):
        if not any(value in needed for value in op.outputs):
            continue
        if op.name == "scan":
            _narrow(op, needed)
        for body in op.bodies if op.name != "scan" else ():
            _drop_unused(body)
        needed.update(op.inputs)
        used.append(op)
    graph.ops[:] = reversed(used)


def _narrow(op: Op, needed: set[Value]) -> None:
    """Remove stacked results of a loop that are not read, and the arguments that only they depend on."""
    (body,), consts, carries = op.bodies, op.params["num_consts"], op.params["num_carry"]
    keep = [i for i, value in enumerate(op.outputs) if i < carries or value in needed]
    op.outputs, body.outputs = [op.outputs[i] for i in keep], [body.outputs[i] for i in keep]
    _drop_unused(body)
    used = {value for inner in body.ops for value in inner.inputs} | set(body.outputs)
    stay = [i for i, value in enumerate(body.inputs) if consts <= i < consts + carries or value in used]
    op.inputs, body.inputs = [op.inputs[i] for i in stay], [body.inputs[i] for i in stay]
    op.params = dict(op.params) | {"num_consts": sum(i < consts for i in stay)}
