"""Gradient functions: how the gradient of a batch is computed.

A gradient function is `(state, batch, key) -> Gradients`. The train step takes any of them: `plain` and `accumulated` are here.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxmodels.models.functional import cast
from jaxmodels.step.state import TrainState


class Gradients(NamedTuple):
    """Sums over the rows of a batch; under pmap, over the rows of one device.

    Attributes:
      total: sum of losses, a scalar.
      weight: sum of the rows' weights, a scalar. The step divides `grads` by it.
      metrics: name -> (sum, weight).
      stats: the modules' running statistics after the batch.
      grads: gradient of `total`, a tree like `state.params`.
    """

    total: jax.Array
    weight: jax.Array
    metrics: Any
    stats: Any
    grads: Any


GradientFunction = Callable[[TrainState, Any, jax.Array], Gradients]


def plain(loss: Callable) -> GradientFunction:
    """Return the gradient function that computes a batch in one pass.

    Args:
      loss: as `step.make_loss` returns.
    """
    value_and_grad = jax.value_and_grad(loss, has_aux=True)

    def gradients(state: TrainState, batch, key: jax.Array) -> Gradients:
        (total, (weight, metrics, stats)), grads = value_and_grad(state.params, state.frozen, state.stats, batch, key)
        return Gradients(total, weight, metrics, stats, grads)

    return gradients


def accumulated(loss: Callable, count: int, shardings: Any = None) -> GradientFunction:
    """Return the gradient function that computes a batch in `count` microbatches, one after the other.

    Args:
      loss: as `step.make_loss` returns.
      count: number of microbatches; must divide the batch.
      shardings: of the parameters; the sums of gradients get them. None leaves their sharding to the compiler.
    """
    value_and_grad = jax.value_and_grad(loss, has_aux=True)

    def split_rows(x):
        # Row r goes to microbatch r % count, so that each device's rows stay on that device.
        return x.reshape(x.shape[0] // count, count, *x.shape[1:]).swapaxes(0, 1)

    def gradients(state: TrainState, batch, key: jax.Array) -> Gradients:
        def add_microbatch(carry, part):
            sums, stats = carry
            number, rows = part
            (total, (weight, metrics, stats)), grads = value_and_grad(state.params, state.frozen, stats, rows, jax.random.fold_in(key, number))
            new = (total, weight, cast(metrics, jnp.float32), place(grads, shardings))
            return (jax.tree.map(jnp.add, sums, new), stats), None

        microbatches = jax.tree.map(split_rows, batch)
        first = jax.tree.map(lambda x: x[0], microbatches)
        (total, (weight, metrics, _)), grads = jax.eval_shape(value_and_grad, state.params, state.frozen, state.stats, first, key)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (total, weight, _float_shapes(metrics), grads))
        (sums, stats), _ = jax.lax.scan(add_microbatch, (zeros, state.stats), (jnp.arange(count), microbatches))
        total, weight, metrics, grads = sums
        return Gradients(total, weight, metrics, stats, grads)

    return gradients


def place(tree, shardings):
    """Constrain a tree to `shardings`, so that each device sums its own part alone. With None, return the tree unchanged."""
    return tree if shardings is None else jax.lax.with_sharding_constraint(tree, shardings)


def _float_shapes(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), tree)
