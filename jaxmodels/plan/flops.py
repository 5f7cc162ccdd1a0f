"""Floating-point operations of a function, counted from its jaxpr."""

import math
from collections.abc import Callable

import jax
from jax.extend import core as jax_core


def count_flops(function: Callable, *args) -> int:
    """Operations in the matrix products and convolutions of one call: two for each multiply and add.

    Loops count as often as they turn, where that is known (`scan`), both branches of a condition as the
    larger one. What is added one by one (norms, activations, the optimizer) is left out: it is small beside
    the products, and bound by memory.

    Args:
      function: traceable.
      args: arrays or ShapeDtypeStructs.
    """
    return _jaxpr_flops(jax.make_jaxpr(function)(*args).jaxpr)


def _jaxpr_flops(jaxpr) -> int:
    total = 0
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name == "dot_general":
            (contract, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[i] for i in contract)
        elif name == "ragged_dot_general":
            # Groups of rows, a matrix each: as many operations as all rows with one; or, in a gradient, the groups' own sums.
            numbers, out = equation.params["ragged_dot_dimension_numbers"], equation.outvars[0].aval
            (contract, _), _ = numbers.dot_dimension_numbers
            groups = 1 if numbers.rhs_group_dimensions else out.shape[0]
            total += 2 * out.size // groups * math.prod(equation.invars[0].aval.shape[i] for i in contract)
        elif name == "conv_general_dilated":
            numbers = equation.params["dimension_numbers"]
            kernel = equation.invars[1].aval.shape
            # Every output value takes one product for each value of the kernel that leads to it.
            per_output = math.prod(kernel) // kernel[numbers.rhs_spec[0]]
            total += 2 * math.prod(equation.outvars[0].aval.shape) * per_output
        elif name == "scan":
            total += equation.params["length"] * _jaxpr_flops(equation.params["jaxpr"].jaxpr)
        elif name == "shard_map":
            # Every device runs it, on its own part.
            total += equation.params["mesh"].size * _jaxpr_flops(equation.params["jaxpr"])
        elif name == "pallas_call":
            # What a kernel leaves out, such as blocks that a mask covers whole, is counted too, as it is elsewhere.
            grid, estimate = equation.params["grid_mapping"].grid, equation.params["cost_estimate"]
            if all(isinstance(size, int) for size in grid):
                total += math.prod(grid) * _jaxpr_flops(equation.params["jaxpr"])
            elif estimate is not None:
                total += estimate.flops  # how often it runs is known when it runs alone; its author says for how much
            else:
                raise ValueError(f"{equation.params['name_and_src_info']}: a kernel whose grid depends on values, and that says no cost")
        elif name == "cond":
            total += max(_jaxpr_flops(branch.jaxpr) for branch in equation.params["branches"])
        else:
            total += sum(_jaxpr_flops(inner) for inner in jax_core.jaxprs_in_params(equation.params))
    return total

