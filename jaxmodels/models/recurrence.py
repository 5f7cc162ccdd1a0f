"""Loops over time for recurrent layers, and their gradient for CPUs.

A cell computes a state from the one before it and from terms [B, G], which hold the products of the inputs and of the hidden state with their kernels,
added up where the cell only needs their sum.

JAX's gradient of a scan adds the recurrent kernel's gradient, [H, G], up at every time. On CPUs the loop here returns the gradients of all terms instead,
and the kernel's is one product over all times and rows afterwards, as in cuDNN (Appleyard et al. 2016, arXiv 1604.01946). The forward loop saves the terms
and the state before them. From these, what a cell's gradient is multiplied with is computed for all times at once, by all threads; operations of a
single time are too small for more than one. What is left in the backward loop are a few products of numbers, and the product with the kernel.

Shapes: T time, B batch, H width of the state, G width of the gates.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxmodels.models.products import product
from jaxmodels.parallel.layout import traced_for


class Cell(NamedTuple):
    """The functions of a cell. States are the hidden one [B, H], or a tuple that begins with it.

    Attributes:
      merged: whether the cell has one term, the sum gates + recurred, and not two.
      step: (state, *terms) -> (state, output [B, H]).
      factors: (state, *terms) -> arrays that the gradient of `step` is linear in; all may have an axis of time in front.
      pull: (factors, gradient of the state, gradient of the output) -> (gradient of the state before, of the terms). Where the state before is only used
        through its product, its gradient is the number 0.
    """

    merged: bool
    step: Callable
    factors: Callable
    pull: Callable


def loop(cell: Cell, recurrent, bias, state: Any, gates_TBG, masks: tuple, *, reverse: bool, unroll: int):
    """Run a cell over time.

    Args:
      cell: its terms are gates, and recurred = hidden @ recurrent + bias.
      recurrent: the kernel of the hidden state, [H, G].
      bias: [G], or None.
      state: the first state.
      gates_TBG: contribution of the inputs.
      masks: (valid, restart), each bool [T, B] or None. Where not valid, the state stays and the output is zero; where restart, the state is set to zero first.
      reverse: loop from the last time to the first.
      unroll: steps per iteration of the compiled loop.

    Returns:
      outputs [T, B, H], each at its own time, and the last state.
    """
    options = (cell, reverse, unroll)
    if traced_for("cpu"):
        return _loop(options, recurrent, bias, state, gates_TBG, masks)
    return _scan(options, recurrent, bias, state, gates_TBG, masks, save=False)[:2]


def _scan(options, recurrent, bias, state, gates_TBG, masks, save: bool):
    """Return the outputs, the last state and, with `save`, the states before each time and the terms of each time."""
    cell, reverse, unroll = options

    def one(state, inputs):
        gates, (valid, restart) = inputs
        state = _restarted(state, restart)
        recurred = jax.tree.leaves(state)[0] @ recurrent
        recurred = recurred if bias is None else recurred + bias
        terms = (gates + recurred,) if cell.merged else (gates, recurred)
        after, output = cell.step(state, *terms)
        after, output = _where(valid, after, state), _where(valid, output, jnp.zeros_like(output))
        return after, (output, (state, terms) if save else None)

    last, (outputs, saved) = jax.lax.scan(one, state, (gates_TBG, masks), reverse=reverse, unroll=unroll)
    return outputs, last, saved


def _restarted(state, restart):
    return state if restart is None else jax.tree.map(lambda x: jnp.where(restart[:, None], 0, x), state)


def _where(valid, one, other):
    return one if valid is None else jax.tree.map(lambda x, y: jnp.where(valid[:, None], x, y), one, other)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loop(options, recurrent, bias, state, gates_TBG, masks):
    return _scan(options, recurrent, bias, state, gates_TBG, masks, save=False)[:2]


def _forward(options, recurrent, bias, state, gates_TBG, masks):
    outputs, last, saved = _scan(options, recurrent, bias, state, gates_TBG, masks, save=True)
    return (outputs, last), (recurrent, bias, masks, saved)


def _backward(options, kept, of_results):
    cell, reverse, unroll = options
    recurrent, bias, masks, (states, terms) = kept
    of_outputs, of_last = of_results
    transposed = jax.lax.optimization_barrier(recurrent.T)  # once, and not at every time

    def one(of_after, inputs):
        of_output, factors, (valid, restart) = inputs
        zeros = jax.tree.map(jnp.zeros_like, of_after)
        of_state, of_terms = cell.pull(factors, _where(valid, of_after, zeros), _where(valid, of_output, jnp.zeros_like(of_output)))
        (of_hidden, *others), structure = jax.tree.flatten(of_state)
        of_state = jax.tree.unflatten(structure, [of_hidden + of_terms[-1] @ transposed, *others])
        if valid is not None:  # where the terms' gradients are zero
            of_state = jax.tree.map(jnp.add, of_state, _where(valid, zeros, of_after))
        return _restarted(of_state, restart), of_terms

    inputs = (of_outputs, cell.factors(states, *terms), masks)
    of_state, of_terms = jax.lax.scan(one, of_last, inputs, reverse=not reverse, unroll=unroll)
    hidden_TBH = jax.tree.leaves(states)[0]
    _, pull = jax.vjp(lambda kernel: product(hidden_TBH, kernel), recurrent)
    of_bias = None if bias is None else of_terms[-1].sum(axis=(0, 1)).astype(bias.dtype)
    return *pull(of_terms[-1]), of_bias, of_state, of_terms[0], None


_loop.defvjp(_forward, _backward)
