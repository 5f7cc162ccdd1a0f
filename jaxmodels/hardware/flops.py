"""FLOPs of a function, counted in its jaxpr."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.extend import core as jax_core


def count_flops(function: Callable, *args, attended: bool = False) -> int:
    """Return the FLOPs of the matrix products and convolutions of one call; a multiply-add counts as two.

    The body of a `scan` counts once for each iteration; a `cond` counts as its larger branch. Elementwise operations (norms, activations,
    the optimizer) are not counted: they are few compared with the products, and bound by memory bandwidth.

    Args:
      function: a traceable function.
      args: arrays or ShapeDtypeStructs.
      attended: count only the query–key pairs that causal masks and windows allow, instead of all pairs.
    """
    return jaxpr_flops(jax.make_jaxpr(function)(*args).jaxpr, attended)


def jaxpr_flops(jaxpr, attended: bool = False) -> int:
    """Return the FLOPs of a jaxpr; see `count_flops`."""

    def shapes(variables):
        return [getattr(x.aval, "shape", ()) for x in variables]  # tokens have no shape

    total = 0
    for each in jaxpr.eqns:
        # `models.attention` encodes the allowed fraction of pairs in a name scope.
        stated = re.findall(r"attended=(\d+)of(\d+)", str(each.source_info.name_stack)) if attended else None
        flops = operation_flops(each.primitive.name, each.params, shapes(each.invars), shapes(each.outvars), attended and not stated)
        total += flops * int(stated[0][0]) // int(stated[0][1]) if stated else flops
    return total


def operation_flops(name: str, params: Mapping[str, Any], inputs: Sequence[tuple[int, ...]], outputs: Sequence[tuple[int, ...]], attended: bool = False) -> int:
    """Return the FLOPs of one operation, including the jaxprs that it calls.

    Args:
      name, params: name and parameters of the primitive.
      inputs, outputs: shapes of its arguments and results.
      attended: see `count_flops`.

    Raises:
      ValueError: a Pallas kernel with a dynamic grid and without a cost estimate.
    """
    if name == "dot_general":
        (contract, _), _ = params["dimension_numbers"]
        return 2 * math.prod(outputs[0]) * math.prod(inputs[0][i] for i in contract)
    if name == "ragged_dot_general":
        # Forward, each row is multiplied by the matrix of its group: as many FLOPs as with one matrix. In a gradient, the output has a group axis.
        numbers = params["ragged_dot_dimension_numbers"]
        (contract, _), _ = numbers.dot_dimension_numbers
        groups = 1 if numbers.rhs_group_dimensions else outputs[0][0]
        return 2 * math.prod(outputs[0]) // groups * math.prod(inputs[0][i] for i in contract)
    if name == "conv_general_dilated":
        # Each output value is a sum over the kernel values of its output channel.
        per_output = math.prod(inputs[1]) // inputs[1][params["dimension_numbers"].rhs_spec[0]]
        return 2 * math.prod(outputs[0]) * per_output
    if name == "scan":
        return params["length"] * jaxpr_flops(params["jaxpr"].jaxpr, attended)
    if name == "shard_map":
        return params["mesh"].size * jaxpr_flops(params["jaxpr"], attended)  # every device executes the jaxpr on its shard
    if name == "pallas_call":
        # Blocks that a kernel skips, such as fully masked ones, are counted, as in the other implementations.
        grid, estimate = params["grid_mapping"].grid, params["cost_estimate"]
        if all(isinstance(size, int) for size in grid):
            return math.prod(grid) * jaxpr_flops(params["jaxpr"])
        if estimate is None:
            raise ValueError(f"{params['name']}: a Pallas kernel with a dynamic grid needs a cost_estimate")
        return estimate.flops  # the grid is known only at run time: use the estimate of the kernel's author
    if name == "cond":
        return max(jaxpr_flops(branch.jaxpr, attended) for branch in params["branches"])
    return sum(jaxpr_flops(inner, attended) for inner in jax_core.jaxprs_in_params(params))
