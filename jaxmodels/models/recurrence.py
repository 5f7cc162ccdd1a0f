"""Loops over time for recurrent layers, and their gradient for CPUs.

A cell is a pure function (extra, state, *terms) -> (state, output [B, H]). Its terms [B, G] hold the products of the inputs and of the hidden state with
their kernels, added up by `merge` where the cell only needs their sum.

JAX's gradient of a scan adds the recurrent kernel's gradient, [H, G], up at every time. On CPUs the loop here returns the gradients of all terms instead,
and the kernel's is one product over all times and rows afterwards, as in cuDNN (Appleyard et al. 2016, arXiv 1604.01946). Backward, the cell's pointwise
operations are computed again from the terms and the state before them, which are what the forward loop saves.

Shapes: T time, B batch, H width of the state, G width of the gates.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxmodels.models.products import product
from jaxmodels.parallel.layout import traced_for


def loop(cell: Callable, merge: bool, recurrent, extra: Any, state: Any, gates_TBG, masks: tuple, *, reverse: bool, unroll: int):
    """Run a cell over time.

    Args:
      cell: (extra, state, gates + hidden @ recurrent) -> (state, output) with `merge`; else (extra, state, gates, hidden @ recurrent).
      recurrent: the kernel of the hidden state, [H, G].
      extra: further parameters.
      state: the first state; the hidden one [B, H], or a tuple that begins with it.
      gates_TBG: contribution of the inputs.
      masks: (valid, restart), each bool [T, B] or None. Where not valid, the state stays and the output is zero; where restart, the state is set to zero first.
      reverse: loop from the last time to the first.
      unroll: steps per iteration of the compiled loop.

    Returns:
      outputs [T, B, H], each at its own time, and the last state.
    """
    options = (cell, merge, reverse, unroll)
    if traced_for("cpu"):
        return _loop(options, recurrent, extra, state, gates_TBG, masks)
    return _scan(options, recurrent, extra, state, gates_TBG, masks, save=False)[:2]


def _scan(options, recurrent, extra, state, gates_TBG, masks, save: bool):
    """Return the outputs, the last state and, with `save`, the states before each time and the terms of each time."""
    cell, merge, reverse, unroll = options

    def one(state, inputs):
        gates, (valid, restart) = inputs
        state = _restarted(state, restart)
        recurred = jax.tree.leaves(state)[0] @ recurrent
        terms = (gates + recurred,) if merge else (gates, recurred)
        after, output = _masked(cell, extra, state, terms, valid)
        return after, (output, (state, terms) if save else None)

    last, (outputs, saved) = jax.lax.scan(one, state, (gates_TBG, masks), reverse=reverse, unroll=unroll)
    return outputs, last, saved


def _restarted(state, restart):
    return state if restart is None else jax.tree.map(lambda x: jnp.where(restart[:, None], 0, x), state)


def _masked(cell, extra, state, terms, valid):
    after, output = cell(extra, state, *terms)
    if valid is not None:
        after = jax.tree.map(lambda new, old: jnp.where(valid[:, None], new, old), after, state)
        output = jnp.where(valid[:, None], output, 0)
    return after, output


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loop(options, recurrent, extra, state, gates_TBG, masks):
    return _scan(options, recurrent, extra, state, gates_TBG, masks, save=False)[:2]


def _forward(options, recurrent, extra, state, gates_TBG, masks):
    outputs, last, saved = _scan(options, recurrent, extra, state, gates_TBG, masks, save=True)
    return (outputs, last), (recurrent, extra, masks, saved)


def _backward(options, kept, of_results):
    cell, _, reverse, unroll = options
    recurrent, extra, masks, (states, terms) = kept
    of_outputs, of_last = of_results
    transposed = jax.lax.optimization_barrier(recurrent.T)  # once, and not at every time

    def one(carry, inputs):
        of_after, of_extra = carry
        of_output, state, terms, (valid, restart) = inputs
        _, pull = jax.vjp(lambda *args: _masked(cell, *args, valid), extra, state, terms)
        more, of_state, of_terms = pull((of_after, of_output))
        (of_hidden, *others), structure = jax.tree.flatten(of_state)
        of_state = jax.tree.unflatten(structure, [of_hidden + of_terms[-1] @ transposed, *others])
        return (_restarted(of_state, restart), jax.tree.map(jnp.add, of_extra, more)), of_terms

    start = (of_last, jax.tree.map(jnp.zeros_like, extra))
    inputs = (of_outputs, states, terms, masks)
    (of_state, of_extra), of_terms = jax.lax.scan(one, start, inputs, reverse=not reverse, unroll=unroll)
    hidden_TBH = jax.tree.leaves(states)[0]
    _, pull = jax.vjp(lambda kernel: product(hidden_TBH, kernel), recurrent)
    return *pull(of_terms[-1]), of_extra, of_state, of_terms[0], None


_loop.defvjp(_forward, _backward)
