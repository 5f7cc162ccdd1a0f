"""Floating-point operations of a function, counted from its jaxpr."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.extend import core as jax_core


def count_flops(function: Callable, *args, attended: bool = False) -> int:
    """Operations in the matrix products and convolutions of one call: two for each multiply and add.

    Loops count as often as they turn, where that is known (`scan`), both branches of a condition as the
    larger one. What is added one by one (norms, activations, the optimizer) is left out: it is small beside
    the products, and bound by memory.

    Args:
      function: traceable.
      args: arrays or ShapeDtypeStructs.
      attended: of the products of queries and keys, count the share that causal masks and windows leave, not all.
    """
    return jaxpr_flops(jax.make_jaxpr(function)(*args).jaxpr, attended)


def jaxpr_flops(jaxpr, attended: bool = False) -> int:
    def shapes(variables):
        return [getattr(x.aval, "shape", ()) for x in variables]  # a token has none

    total = 0
    for each in jaxpr.eqns:
        # `models.attention` states the share in the name of a scope.
        stated = re.findall(r"attended=(\d+)of(\d+)", str(each.source_info.name_stack)) if attended else None
        flops = operation_flops(each.primitive.name, each.params, shapes(each.invars), shapes(each.outvars), attended and not stated)
        total += flops * int(stated[0][0]) // int(stated[0][1]) if stated else flops
    return total


def operation_flops(name: str, params: Mapping[str, Any], inputs: Sequence[tuple[int, ...]], outputs: Sequence[tuple[int, ...]], attended: bool = False) -> int:
    """As `count_flops`, of one operation with all that it calls.

    Args:
      name, params: of the primitive.
      inputs, outputs: shapes.
      attended: as of `count_flops`.
    """
    if name == "dot_general":
        (contract, _), _ = params["dimension_numbers"]
        return 2 * math.prod(outputs[0]) * math.prod(inputs[0][i] for i in contract)
    if name == "ragged_dot_general":
        # Groups of rows, a matrix each: as many operations as all rows with one; or, in a gradient, the groups' own sums.
        numbers = params["ragged_dot_dimension_numbers"]
        (contract, _), _ = numbers.dot_dimension_numbers
        groups = 1 if numbers.rhs_group_dimensions else outputs[0][0]
        return 2 * math.prod(outputs[0]) // groups * math.prod(inputs[0][i] for i in contract)
    if name == "conv_general_dilated":
        # Every output value takes one product for each value of the kernel that leads to it.
        per_output = math.prod(inputs[1]) // inputs[1][params["dimension_numbers"].rhs_spec[0]]
        return 2 * math.prod(outputs[0]) * per_output
    if name == "scan":
        return params["length"] * jaxpr_flops(params["jaxpr"].jaxpr, attended)
    if name == "shard_map":
        return params["mesh"].size * jaxpr_flops(params["jaxpr"], attended)  # every device runs it, on its own part
    if name == "pallas_call":
        # What a kernel leaves out, such as blocks that a mask covers whole, is counted too, as it is elsewhere.
        grid, estimate = params["grid_mapping"].grid, params["cost_estimate"]
        if all(isinstance(size, int) for size in grid):
            return math.prod(grid) * jaxpr_flops(params["jaxpr"])
        if estimate is None:
            raise ValueError(f"{params['name']}: a kernel whose grid depends on values, and that says no cost")
        return estimate.flops  # how often it runs is known when it runs alone; its author says for how much
    if name == "cond":
        return max(jaxpr_flops(branch.jaxpr, attended) for branch in params["branches"])
    return sum(jaxpr_flops(inner, attended) for inner in jax_core.jaxprs_in_params(params))
