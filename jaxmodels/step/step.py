"""The functions that are compiled: initialise, train step, evaluation step.

A module is split once into a graph and plain string-keyed dicts of arrays; from there on everything is a pure
function of arrays.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from jaxmodels import tasks
from jaxmodels.models.functional import DTYPES, cast, combine, evaluation_model, flatten, partition, split, training_model
from jaxmodels.parallel import layout as layout_lib
from jaxmodels.step import metrics as metrics_lib
from jaxmodels.step.gradients import GradientFunction, place
from jaxmodels.step.state import TrainState


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepOptions:
    """What shapes the train step.

    Attributes:
      ema: decay of the moving average of parameters, or None. It starts faster: decay at step t is at most (1 + t) / (10 + t).
      log_every: steps that a training metric is averaged over.
      layout: how the step is spread over devices; None for one.
      shardings: of the parameters, and so of their gradients; None leaves these to the compiler.
      gather_updates: the optimizer's state is in more shares than the parameters are, so that its updates come together.
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
    """A pure function key -> TrainState.

    Args:
      build: makes the module.
      trained: whether the parameter of a path is trained.
      optimizer: of Optax.
      loss_metrics: names the training metrics: (params, frozen, stats) -> shapes.
      ema: whether an average of the trained parameters is kept.
    """

    def init(key: jax.Array) -> TrainState:
        _, params, stats = split(build(nnx.Rngs(params=key)))
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


def _inputs(batch, dtype):
    """A batch as the model computes it; weights, and labels, which may be numbers to predict, stay exact."""
    return batch | {name: cast(x, dtype) for name, x in batch.items() if name not in ("weight", "label")}


def make_loss(task, graph, precision: str) -> Callable:
    """(params, frozen, stats, batch, key) -> loss sum, (weight, metrics, new stats).

    The module runs in `precision`.
    """
    dtype = DTYPES[precision]

    def loss(params, frozen, stats, batch, key):
        model = training_model(graph, cast(combine(params, frozen), dtype), stats, key)
        _hold_frozen_norms(model, params, frozen)
        _normalise_over_devices(model)
        inputs = _inputs(batch, dtype)
        total, weight, metrics = task.loss(model, inputs, nnx.Rngs(dropout=key))
        return total, (weight, metrics, split(model)[2])

    return loss


def _hold_frozen_norms(model: nnx.Module, params: dict, frozen: dict) -> None:
    """Batch normalisations whose parameters are frozen go by their running statistics, and keep them."""
    if not frozen:
        return
    trained, held = flatten(params), flatten(frozen)
    for path, module in nnx.iter_modules(model):
        name = "/".join(map(str, path)) + "/"
        if isinstance(module, nnx.BatchNorm) and any(p.startswith(name) for p in held) and not any(p.startswith(name) for p in trained):
            module.eval()


def _normalise_over_devices(model: nnx.Module) -> None:
    """Batch normalisations go by all rows of a batch, also where each device runs the model on its own."""
    if (axis := layout_lib.mapped_axis()) is not None:
        for _, module in nnx.iter_modules(model):
            if isinstance(module, nnx.BatchNorm):
                module.axis_name = axis


def make_train_step(gradients: GradientFunction, optimizer: optax.GradientTransformation, schedule: optax.Schedule, options: StepOptions) -> Callable:
    """(state, batch, key) -> (state, metrics): one update from one global batch.

    The gradient is that of the sum of losses over the batch divided by the sum of weights, however many devices
    and microbatches it is computed in.

    Args:
      gradients: the gradient function, such as `gradients.plain(loss)`.
      optimizer: of Optax.
      schedule: its learning rate, for the log.
      options: see StepOptions.

    Returns:
      A pure function. `metrics` are means since the last log line, as (sum, weight), with `grad_norm`; and of this
      step the `learning_rate` and `diverged_at`.
    """

    def update(state: TrainState, batch, key: jax.Array):
        key = layout_lib.own_key(jax.random.fold_in(key, state.step))
        total, weight, metrics, stats, grads = gradients(state, batch, key)
        metrics = cast(dict(metrics), jnp.float32) | skipped_metric(batch)
        total, weight, metrics, grads = layout_lib.sum_over_devices((total, weight, metrics, grads))
        grads = place(grads, options.shardings)
        grads = jax.tree.map(lambda g: g / jnp.where(weight == 0, 1, weight), grads)  # no 0 / 0 where no row counts
        # Some optimizers (momo) use the loss too.
        value = total / jnp.where(weight == 0, 1, weight)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params, value=value)
        if options.gather_updates:
            # These, not the new parameters: to gather those XLA copies all the old ones first (libtpu 0.0.52).
            updates = place(updates, options.shardings)
        params = optax.apply_updates(state.params, updates)
        step = state.step + 1

        # Behind a barrier the squares are not those that Adam averages, which XLA would keep in memory for both. And the new parameters,
        # which are kept anyway, are asked in place of the updates, which would be kept for this alone: more work than AdamW itself.
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
        with layout_lib.use(options.layout):  # around the gradient too, whose own rules are traced after the loss
            return update(state, batch, key)

    return train_step


def training_metrics(loss: Callable, params, frozen, stats, batch) -> dict:
    """Shapes of the metrics that a train step sums up."""
    _, (_, metrics, _) = jax.eval_shape(loss, params, frozen, stats, batch, jax.random.key(0))
    scalar = jax.ShapeDtypeStruct((), jnp.float32)
    return dict(metrics) | {"grad_norm": (scalar, scalar)} | jax.eval_shape(skipped_metric, batch)


def skipped_metric(batch) -> dict:
    """How many rows were left out, a count, where the data tells (see `data.skipping`)."""
    return {"skipped_examples": (jnp.sum(batch["skipped"]), jnp.zeros((), jnp.float32))} if "skipped" in batch else {}


def _average(ema, params, step, decay):
    decay = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, ema, params)


def make_eval_step(task, graph, precision: str, layout: layout_lib.Layout | None = None) -> Callable:
    """(params, stats, batch, sums) -> sums, outputs: adds a batch's metrics to `sums`.

    `outputs` are the task's own of each row, with the rows' `weight`, where it has a score that is made from them; else nothing.
    """
    dtype = DTYPES[precision]

    def eval_step(params, stats, batch, sums):
        model = evaluation_model(graph, params, stats, dtype)
        inputs = _inputs(batch, dtype)
        with layout_lib.use(layout):
            sums = metrics_lib.add(sums, cast(dict(task.metrics(model, inputs)) | skipped_metric(batch), jnp.float32))
            outputs = dict(task.outputs(model, inputs)) | {"weight": batch["weight"]} if tasks.scores(task) else {}
        return sums, outputs

    return eval_step
