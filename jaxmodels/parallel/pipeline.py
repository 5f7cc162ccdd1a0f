"""Pipeline parallelism: stages of consecutive layers on consecutive devices, working on different microbatches (GPipe, Huang et al. 2019).

In each turn every stage runs its layers on one microbatch and passes the result to the next stage. In the first turns the later stages
have no work, and in the last turns the earlier stages: this is the bubble.

All stages are one program that the compiler partitions. Arrays have a dimension for the stage, which is sharded over the mesh axis
`pipeline`. So this axis combines with all others.

Shapes: S stages, M microbatches, U = M + S - 1 turns, L layers, B rows of a batch, R = B / M rows of a microbatch.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxmodels.parallel import layout as layout_lib
from jaxmodels.parallel.layout import Layout


def turns(stages: int, microbatches: int) -> int:
    """Return the number of turns, U."""
    return microbatches + stages - 1


def bubble(stages: int, microbatches: int) -> float:
    """Return the share of a device's turns without work: (S - 1) / (M + S - 1)."""
    return (stages - 1) / turns(stages, microbatches)


def describe(stages: int, microbatches: int) -> str:
    """Return the schedule as text."""
    share = bubble(stages, microbatches)
    return f"{stages} stages, {microbatches} microbatches in {turns(stages, microbatches)} turns: each stage is idle in {share:.0%} of them"


def over_layers(function: Callable, layers: Any, keys: jax.Array | None, x: jax.Array, shared: Any) -> tuple[jax.Array, Any]:
    """Run all layers on x: as a pipeline if the layout has stages, else one layer after the other on all rows.

    Args:
      function: (x, layers, keys, shared) -> y of the shape of x, and sums: runs those layers. `sums` is a tree of arrays with a leading axis
        of layers, each a sum over rows. Those of the microbatches are added up.
      layers: a tree of arrays [L, …]; the number of stages must divide L.
      keys: [L] of `jax.random`, or None without randomness. In a pipeline every microbatch has its own.
      x: [B, …].
      shared: a tree of arrays that all layers receive: [B, …], one for each row, or [1, …] for all rows.

    Returns:
      y [B, …], and the sums of all layers [L, …].
    """
    layout = layout_lib.current()
    if layout is None or layout.size("layers") == 1:
        return function(x, layers, keys, shared)
    S = layout.size("layers")
    M = microbatches_of(x.shape[0], layout)
    number_US = np.arange(turns(S, M))[:, None] - np.arange(S)  # the microbatch that stage s works on at turn u
    real_US, number_US = (number_US >= 0) & (number_US < M), np.clip(number_US, 0, M - 1)

    def by_turn(x_B):
        """Return what every stage needs in every turn, [U, S, R, …], already on the devices of its stage.

        So no turn moves it, and its gradients are added up over stages once, after the last turn.
        """
        return _placed(layout, jnp.take(_cut(x_B, M), number_US, axis=0), None, "layers", "batch")

    leaves, structure = jax.tree.flatten(shared)
    of_rows = [leaf.shape[0] == x.shape[0] for leaf in leaves]
    if not all(own or leaf.shape[0] == 1 for leaf, own in zip(leaves, of_rows, strict=True)):
        raise ValueError(f"arrays that layers share must have {x.shape[0]} rows, or 1; got {[leaf.shape for leaf in leaves]}")
    rows = [by_turn(leaf) if own else None for leaf, own in zip(leaves, of_rows, strict=True)]
    whole = [None if own else _placed(layout, jnp.broadcast_to(leaf, (S, *leaf.shape)), "layers") for leaf, own in zip(leaves, of_rows, strict=True)]
    layers = jax.tree.map(lambda p: _placed(layout, p.reshape(S, -1, *p.shape[1:]), "layers"), layers)
    keys = None if keys is None else keys.reshape(S, -1)

    def stage(x, entering, first, number, rows, whole, layers, keys):
        keys = None if keys is None else jax.vmap(jax.random.fold_in, (0, None))(keys, number)
        both = [b if a is None else a for a, b in zip(rows, whole, strict=True)]
        return function(jnp.where(first, entering, x), layers, keys, jax.tree.unflatten(structure, both))

    stages = jax.vmap(stage, spmd_axis_name=layout.axes("layers"))

    def turn(before_SR, given):
        entering_SR, number_S, real_S, rows = given
        x_SR = _placed(layout, _handed_on(before_SR), "layers", "batch")
        y_SR, sums = stages(x_SR, entering_SR, jnp.arange(S) == 0, number_S, rows, whole, layers, keys)
        sums = jax.tree.map(lambda v: jnp.where(real_S.reshape(-1, *[1] * (v.ndim - 1)), v, 0), sums)
        return _placed(layout, y_SR, "layers", "batch"), (y_SR, sums)

    entering_USR = by_turn(x)
    # A stage without work runs on a real microbatch too, so that its values are finite.
    begin_SR = jax.lax.stop_gradient(entering_USR[0])
    _, (y_USR, sums) = jax.lax.scan(turn, begin_SR, (entering_USR, jnp.asarray(number_US), jnp.asarray(real_US), rows))
    last = (jnp.arange(S) == S - 1).reshape(-1, *[1] * x.ndim)
    y_MR = jnp.where(last, y_USR[S - 1 :], 0).sum(1)  # broadcasts the output of the last stage to all devices of the axis
    return _placed(layout, _joined(y_MR), "rows"), jax.tree.map(lambda v: v.sum(0).reshape(-1, *v.shape[3:]), sums)


def microbatches_of(rows: int, layout: Layout) -> int:
    """Return the number of microbatches for a number of rows: that of the layout, or fewer if it does not divide the rows.

    Batches of training and evaluation always divide (`mesh.check_batch`). A few rows, such as prompts, may not.
    """
    ways = math.gcd(layout.size("batch"), rows)
    return next(m for m in range(layout.microbatches, 0, -1) if rows % (m * ways) == 0)


def _cut(x_B: jax.Array, count: int) -> jax.Array:
    """Return x as [M, R, …]. Row r goes to microbatch r % M, so that each device's rows stay on that device."""
    return x_B.reshape(-1, count, *x_B.shape[1:]).swapaxes(0, 1)


def _joined(x_MR: jax.Array) -> jax.Array:
    """Return the rows of `_cut` as [B, …]."""
    return x_MR.swapaxes(0, 1).reshape(-1, *x_MR.shape[2:])


@jax.custom_vjp
def _handed_on(x_SR: jax.Array) -> jax.Array:
    """Pass the output of each stage to the next one, and of the last to the first: one permutation of the devices in either direction."""
    return jnp.roll(x_SR, 1, axis=0)


# JAX's derivative concatenates slices, which the compiler turns into several permutations.
_handed_on.defvjp(lambda x_SR: (_handed_on(x_SR), None), lambda _, g_SR: (jnp.roll(g_SR, -1, axis=0),))


def _placed(layout: Layout, x: jax.Array, *names: str | None) -> jax.Array:
    """Constrain the first dimensions of x by name, and leave the others to the compiler."""
    spec = layout.spec(*names, shape=x.shape[: len(names)])
    spec = PartitionSpec(*spec, *[PartitionSpec.UNCONSTRAINED] * (x.ndim - len(names)))
    return jax.lax.with_sharding_constraint(x, NamedSharding(layout.mesh, spec))
