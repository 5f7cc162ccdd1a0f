"""The functions that are compiled: initialisation, train step, evaluation step.

A module is split once into its graph and string-keyed dicts of arrays. Everything here is a pure function of those arrays.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from jaxmodels.models.functional import DTYPES, cast, combine, evaluation_model, flatten, new_rngs, partition, split, training_model
from jaxmodels.parallel import layout as layout_lib
from jaxmodels.step import metrics as metrics_lib
from jaxmodels.step.gradients import GradientFunction, place
from jaxmodels.step.state import TrainState
from jaxmodels.tasks.base import Task


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepOptions:
    """Options of the train step.

    Attributes:
      ema: decay of the moving average of parameters, or None for none. The decay at step t is at most (1 + t) / (10 + t).
      log_every: number of steps that a training metric is averaged over.
      layout: sharding of activations; None for one device.
      shardings: of the parameters and their gradients; None leaves them to the compiler.
      gather_updates: whether the optimizer state is sharded more finely than the parameters, so that its updates are gathered.
    """

    ema: float | None
    log_every: int
    layout: layout_lib.Layout | None = None
    shardings: Any = None
    gather_updates: bool = False


def make_init(
    build: Callable[[nnx.Rngs], nnx.Module],
    trained: Callable[[str], bool],
    optimizer: optax.GradientTransformation,
    loss_metrics: Callable,
    ema: bool,
) -> Callable[[jax.Array], TrainState]:
    """Return the pure function key -> TrainState.

    Args:
      build: builds the module.
      trained: whether the parameter of a path is trained.
      optimizer: of Optax.
      loss_metrics: (params, frozen, stats) -> shapes of the training metrics.
      ema: whether the state holds a moving average of the trained parameters.
    """

    def init(key: jax.Array) -> TrainState:
        _, params, stats = split(build(new_rngs(params=key)))
        params, frozen = partition(params, trained)
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            frozen=frozen,
            stats=stats,
            opt_state=optimizer.init(params),
            ema=jax.tree.map(jnp.copy, params) if ema else {},
            metrics=metrics_lib.zeros(loss_metrics(params, frozen, stats)),
            diverged_at=jnp.zeros((), jnp.int32),
        )

    return init


def _inputs(task: Task, batch, dtype):
    """Return a batch cast to the compute dtype, without the weights and the task's exact inputs, such as targets."""
    exact = ("weight", *task.exact_inputs)
    return batch | {name: cast(x, dtype) for name, x in batch.items() if name not in exact}


def make_loss(task: Task, graph, precision: str) -> Callable:
    """Return the function (params, frozen, stats, batch, key) -> loss sum, (weight, metrics, new stats).

    Args:
      task: its loss.
      graph: of the module.
      precision: compute dtype of the module, a key of `functional.DTYPES`.
    """
    dtype = DTYPES[precision]

    def loss(params, frozen, stats, batch, key):
        model = training_model(graph, cast(combine(params, frozen), dtype), stats, key)
        _hold_frozen_norms(model, params, frozen)
        _normalise_over_devices(model)
        inputs = _inputs(task, batch, dtype)
        total, weight, metrics = task.loss(model, inputs, new_rngs(dropout=key))
        return total, (weight, metrics, split(model)[2])

    return loss


def _hold_frozen_norms(model: nnx.Module, params: dict, frozen: dict) -> None:
    """Make batch normalisations with frozen parameters use their running statistics and not update them."""
    if not frozen:
        return
    trained, held = flatten(params), flatten(frozen)
    for path, module in nnx.iter_modules(model):
        name = "/".join(map(str, path)) + "/"
        if isinstance(module, nnx.BatchNorm) and any(p.startswith(name) for p in held) and not any(p.startswith(name) for p in trained):
            module.eval()


def _normalise_over_devices(model: nnx.Module) -> None:
    """Make batch normalisations use all rows of a batch, also under pmap, where each device runs the model on its own rows."""
    if (axis := layout_lib.mapped_axis()) is not None:
        for _, module in nnx.iter_modules(model):
            if isinstance(module, nnx.BatchNorm):
                module.axis_name = axis


def make_train_step(gradients: GradientFunction, optimizer: optax.GradientTransformation, schedule: optax.Schedule, options: StepOptions) -> Callable:
    """Return the pure function (state, batch, key) -> (state, metrics): one update from one global batch.

    The gradient is that of the sum of losses over the batch divided by the sum of weights, for any number of devices and microbatches.
    The metrics are means since the last log line, as (sum, weight), with `grad_norm`; `learning_rate` and `diverged_at` are of this step.

    Args:
      gradients: the gradient function, such as `gradients.plain(loss)`.
      optimizer: of Optax.
      schedule: of the learning rate, for the metrics.
      options: see StepOptions.
    """

    def update(state: TrainState, batch, key: jax.Array):
        key = layout_lib.own_key(jax.random.fold_in(key, state.step))
        total, weight, metrics, stats, grads = gradients(state, batch, key)
        metrics = cast(dict(metrics), jnp.float32) | skipped_metric(batch)
        total, weight, metrics, grads = layout_lib.sum_over_devices((total, weight, metrics, grads))
        grads = place(grads, options.shardings)
        grads = jax.tree.map(lambda g: g / jnp.where(weight == 0, 1, weight), grads)  # not 0 / 0 where no row counts
        # Some optimizers (momo) use the loss too.
        value = total / jnp.where(weight == 0, 1, weight)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params, value=value)
        if options.gather_updates:
            # Gather the updates, not the new parameters: for those XLA copies all the old ones first (libtpu 0.0.52).
            updates = place(updates, options.shardings)
        params = optax.apply_updates(state.params, updates)
        step = state.step + 1

        # Without the barrier XLA shares the squares with Adam's second moment, and keeps them in memory for both. The check reads the new
        # parameters, which are kept anyway, because keeping the updates for it costs more than AdamW itself.
        grad_norm = optax.tree.norm(jax.lax.optimization_barrier(grads))
        finite = jnp.isfinite(total) & jnp.isfinite(grad_norm) & jnp.isfinite(optax.tree.norm(params))
        one = jnp.ones((), jnp.float32)
        metrics = metrics | {"grad_norm": (grad_norm, one)}
        fresh = state.step % options.log_every == 0
        metrics = jax.tree.map(lambda old, new: jnp.where(fresh, 0, old) + new, state.metrics, metrics)
        state = TrainState(
            step=step,
            params=params,
            frozen=state.frozen,
            stats=stats,
            opt_state=opt_state,
            ema=_average(state.ema, params, state.step, options.ema) if options.ema is not None else state.ema,
            metrics=metrics,
            diverged_at=jnp.where((state.diverged_at == 0) & ~finite, step, state.diverged_at),
        )
        now = {"learning_rate": (jnp.asarray(schedule(step - 1), jnp.float32), one), "diverged_at": (state.diverged_at, one)}
        return state, metrics | now

    def train_step(state: TrainState, batch, key: jax.Array):
        with layout_lib.use(options.layout):  # around the gradient too: custom gradient rules are traced after the loss
            return update(state, batch, key)

    return train_step


def training_metrics(loss: Callable, params, frozen, stats, batch) -> dict:
    """Return the shapes of the metrics that a train step sums."""
    _, (_, metrics, _) = jax.eval_shape(loss, params, frozen, stats, batch, jax.random.key(0))
    scalar = jax.ShapeDtypeStruct((), jnp.float32)
    return dict(metrics) | {"grad_norm": (scalar, scalar)} | jax.eval_shape(skipped_metric, batch)


def skipped_metric(batch) -> dict:
    """Return the number of skipped rows as a count, if the data marks them (see `data.skipping`)."""
    return {"skipped_examples": (jnp.sum(batch["skipped"]), jnp.zeros((), jnp.float32))} if "skipped" in batch else {}


def _average(ema, params, step, decay):
    decay = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, ema, params)


def keys_by_index(key: jax.Array, index: jax.Array) -> jax.Array:
    """Return one key for each row, a function of `key` and the row's index.

    Args:
      key: a single key.
      index: int [B].
    """
    return jax.vmap(lambda row: jax.random.fold_in(key, row))(index)


def make_eval_step(task: Task, graph, precision: str, layout: layout_lib.Layout | None = None) -> Callable:
    """Return the function (params, stats, batch, sums, key) -> (sums, outputs), which adds a batch's metrics to `sums`.

    The batch holds `index`, int [B], the rows' indices in their split. The task gets keys made from `key` and `index` in its place.
    `outputs` are those of the task, with the rows' `weight`, if it has scores; else they are empty.

    Args:
      task: its evaluation.
      graph: of the module.
      precision: compute dtype of the module, a key of `functional.DTYPES`.
      layout: sharding of activations; None for one device.
    """
    dtype = DTYPES[precision]

    def eval_step(params, stats, batch, sums, key):
        model = evaluation_model(graph, params, stats, dtype)
        keys = keys_by_index(key, batch["index"])
        inputs = _inputs(task, {name: x for name, x in batch.items() if name != "index"}, dtype)
        with layout_lib.use(layout):
            sums = metrics_lib.add(sums, cast(dict(task.evaluate(model, inputs, keys)) | skipped_metric(batch), jnp.float32))
            outputs = dict(task.outputs(model, inputs, keys)) | {"weight": batch["weight"]} if task.scores else {}
        return sums, outputs

    return eval_step
