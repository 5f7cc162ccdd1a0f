"""The experiment of a config: compatible data, task, model and optimizer.

Everything here runs on the host, before a device is used.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxmodels.data.loader import Loading
from jaxmodels.data.source import Dataset, get_batch
from jaxmodels.errors import ConfigError
from jaxmodels.experiment.sections import Checkpointing, Evaluation, InitFrom, Logging, Training
from jaxmodels.models import attention, functional, rnn, vocabulary
from jaxmodels.parallel import layout as layout_lib
from jaxmodels.parallel.layout import Layout
from jaxmodels.parallel.mesh import MeshSizes
from jaxmodels.parallel.sharding import Sharding
from jaxmodels.step import gradients, state, step
from jaxmodels.tasks.base import Task


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A checked config with its opened data: everything that a run needs except devices.

    Attributes:
      config: the resolved config.
      dataset: the opened dataset.
      task: the task, constructed with the dataset's info.
      build: constructs the model from `nnx.Rngs`.
      trained: path -> whether that parameter is trained; the others are frozen.
      loading, training, evaluation, checkpoint, log, mesh, sharding, init_from: the config sections.
      steps: number of steps of the run.
      optimizer: an Optax gradient transformation.
      schedule: step -> learning rate.
      platform: platform of the devices, such as `tpu`; None before `on`.
      layout: sharding over the devices; None for a single device.
    """

    config: dict
    dataset: Dataset
    task: Task
    build: Callable[[nnx.Rngs], nnx.Module]
    trained: Callable[[str], bool]
    loading: Loading
    training: Training
    evaluation: Evaluation
    checkpoint: Checkpointing
    log: Logging
    mesh: MeshSizes
    sharding: Sharding
    init_from: InitFrom | None
    steps: int
    optimizer: Any
    schedule: Any
    platform: str | None = None
    layout: Layout | None = None

    def on(self, platform: str, layout: Layout | None = None) -> "Experiment":
        """Return the experiment for a platform and a layout.

        Raises:
          ConfigError: the requested attention or recurrent kernel is not available on the platform.
        """
        placed = dataclasses.replace(self, platform=platform, layout=layout)
        _ = placed.graph
        if "_state_shapes" in self.__dict__:
            placed.__dict__["_state_shapes"] = self._state_shapes  # the same on every device, and slow to trace
        return placed

    @property
    def eval_batch_size(self) -> int:
        """Rows of an evaluation batch."""
        return self.loading.eval_batch_size or self.loading.batch_size

    @functools.cached_property
    def frozen_in_parent(self) -> bool:
        """Whether a parent run has the frozen parameters, so that checkpoints omit them."""
        return self.init_from is not None and bool(self.state_shapes().frozen)

    @property
    def graph(self):
        """The graph definition of the model, as returned by `functional.split`."""
        return self._graph_and_kernels[0]

    @property
    def kernels(self) -> dict[str, dict[str, str]]:
        """The implementation of `attention` and `recurrent` layers, and the reason for it; only kinds of layers that the model has."""
        return self._graph_and_kernels[1]

    def padding(self, params: Any) -> int:
        """Return how many values of parameters (nested arrays or shapes) are padding, by `model.vocab_multiple`."""
        return vocabulary.padding(functional.flatten(params), self.config["model"], self.task.provides.get("vocab_size"))

    def count_parameters(self, params: Any) -> int:
        """Return the number of parameters, without padding."""
        return sum(x.size for x in jax.tree.leaves(params)) - self.padding(params)

    @functools.cached_property
    def _graph_and_kernels(self):
        model = nnx.eval_shape(lambda: self.build(functional.new_rngs(params=0)))
        dtype, kernels = functional.DTYPES[self.training.precision], {}
        with as_config_error("config.model.attention"):
            kernels["attention"] = attention.resolve_implementation(model, self.platform, dtype, self.layout)
        with as_config_error("config.model.kernel"):
            kernels["recurrent"] = rnn.resolve_implementation(model, self.platform, dtype)
        return functional.split(model)[0], {part: used for part, used in kernels.items() if used}

    def batch_shapes(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Return the shapes of a batch."""
        example = get_batch(next(iter(self.dataset.splits.values())), np.array([0]))
        shapes = {k: jax.ShapeDtypeStruct((batch_size, *v.shape[1:]), v.dtype) for k, v in example.items()}
        return shapes | {"weight": jax.ShapeDtypeStruct((batch_size,), jnp.float32)}

    def eval_batch_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Return the shapes of an evaluation batch, which also has the `index` of each row."""
        return self.batch_shapes(self.eval_batch_size) | {"index": jax.ShapeDtypeStruct((self.eval_batch_size,), jnp.int32)}

    @property
    def evaluation_key(self) -> jax.Array:
        """The random key of evaluation, a function of the config's seed. The key of a row is derived from it and the row's index."""
        return jax.random.fold_in(jax.random.key(self.config["seed"]), 3)  # the trainer uses 0 to 2

    @property
    def best(self) -> tuple[str, str] | None:
        """The split and the metric of `checkpoint.best`: (`validation`, `accuracy`) of `accuracy`, (`validation/NAME`, `accuracy`) of `NAME/accuracy`."""
        best = self.checkpoint.best
        if best is None:
            return None
        name, _, metric = best.partition("/")
        return (f"validation/{name}", metric) if f"validation/{name}" in self.dataset.splits else ("validation", best)

    @property
    def shown(self) -> tuple[str, ...]:
        """Names of the metrics to print: those of the task, and that of `checkpoint.best`."""
        best = [] if self.best is None else [self.best[1]]
        return (*self.task.shown, *(name for name in best if name not in self.task.shown))

    def reading(self, source) -> dict[str, int]:
        """Return the arguments of `data.loader.read_ahead` for a source."""
        threads = self.loading.threads
        if threads is None:
            changed = self.loading.rand_augment is not None or self.loading.random_resized_crop is not None
            threads = 0 if getattr(source, "in_memory", False) and not changed else 16
        return {"threads": threads, "workers": self.loading.workers, "buffer": self.loading.buffer}

    @property
    def transform(self) -> Callable | None:
        """The augmentation of training rows on the host, an argument of `data.loader.TrainingBatches`; None for none."""
        augment = self.loading.rand_augment
        return None if augment is None else functools.partial(augment.batch, seed=self.config["seed"])

    @property
    def crop(self) -> Callable | None:
        """The random crop of training images on the host, an argument of `data.loader.TrainingBatches`; None for none."""
        crop = self.loading.random_resized_crop
        return None if crop is None else functools.partial(crop.read, seed=self.config["seed"])

    def init_function(self) -> Callable[[jax.Array], state.TrainState]:
        """Return the function key -> TrainState; see `step.make_init`."""
        return step.make_init(self.build, self.trained, self.optimizer, self._metric_shapes, self.training.ema is not None)

    def step_function(self, shardings: Any = None) -> Callable:
        """Return the function (state, batch, key) -> (state, metrics); see `step.make_train_step`.

        Args:
          shardings: shardings of the parameters and their gradients.
        """
        options = step.StepOptions(
            ema=self.training.ema,
            log_every=self.log.every,
            layout=self.layout,
            shardings=shardings,
            gather_updates=self.sharding.optimizer == "data",
        )
        count = self.training.accumulate
        gradient_function = gradients.plain(self._loss) if count == 1 else gradients.accumulated(self._loss, count, shardings)
        return step.make_train_step(gradient_function, self.optimizer, self.schedule, options)

    def eval_function(self) -> Callable:
        """Return the function (params, stats, batch, sums, key) -> (sums, outputs); see `step.make_eval_step`."""
        return step.make_eval_step(self.task, self.graph, self.training.precision, self.evaluation_layout)

    def eval_metric_shapes(self, params, stats) -> dict:
        """Return the shapes of the metrics that the evaluation step sums."""

        def metrics(params, stats, batch, key):
            keys = step.keys_by_index(key, batch.pop("index"))
            with layout_lib.use(self.evaluation_layout):
                return dict(self.task.evaluate(functional.evaluation_model(self.graph, params, stats), batch, keys)) | step.skipped_metric(batch)

        return jax.eval_shape(metrics, params, stats, self.eval_batch_shapes(), jax.eval_shape(lambda: jax.random.key(0)))

    def sample_function(self) -> Callable:
        """Return the function (params, stats, key) -> arrays that the task's `show` turns into samples; empty if there are none."""
        layout = None if self.layout is None else dataclasses.replace(self.evaluation_layout, left_whole={})

        def sample(params, stats, key):
            with layout_lib.use(layout):
                return self.task.samples(functional.evaluation_model(self.graph, params, stats), key)

        return sample

    def state_shapes(self) -> state.TrainState:
        """Return the shapes of the train state."""
        return self._state_shapes

    @functools.cached_property
    def _state_shapes(self) -> state.TrainState:
        return jax.eval_shape(lambda: self.init_function()(jax.random.key(0)))

    @property
    def evaluation_layout(self) -> Layout | None:
        """The layout of evaluation, which always runs under jit, even if training uses pmap."""
        return None if self.layout is None else dataclasses.replace(self.layout, axis=None)

    @property
    def _loss(self):
        return step.make_loss(self.task, self.graph, self.training.precision)

    def _metric_shapes(self, params, frozen, stats):
        rows = self.loading.batch_size // self.training.accumulate
        return step.training_metrics(self._loss, params, frozen, stats, self.batch_shapes(rows))


@contextlib.contextmanager
def as_config_error(where: str):
    """Convert an error of the block, such as a model's error about its arguments, to a ConfigError that names `where`."""
    try:
        yield
    except (ValueError, TypeError, KeyError, ZeroDivisionError) as error:
        raise ConfigError(f"{where}: {str(error).splitlines()[0]}") from error
