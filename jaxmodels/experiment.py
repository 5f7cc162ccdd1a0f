"""The data, task, model and optimizer that a config makes, checked against each other.

Everything here happens on the host, before any device is touched.
"""

import contextlib
import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxmodels import config as config_lib
from jaxmodels import data as data_lib
from jaxmodels import models, tasks
from jaxmodels.data.augment import RandAugment
from jaxmodels.data.source import Dataset, Remembered, take
from jaxmodels.errors import ConfigError
from jaxmodels.interop.folder import find as find_published
from jaxmodels.interop.folder import is_published
from jaxmodels.models import attention, rnn
from jaxmodels.models.lora import ADAPTERS, add_lora
from jaxmodels.parallel import layout as layout_lib
from jaxmodels.parallel.layout import Layout
from jaxmodels.parallel.mesh import MeshSizes
from jaxmodels.parallel.sharding import Sharding, check_patterns, check_stages
from jaxmodels.sections import (
    Checkpointing,
    Evaluation,
    InitFrom,
    Loading,
    Logging,
    Lora,
    Training,
    resolve,
)
from jaxmodels.training import optimizer, step


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A checked config with its data opened: all that a run needs, and no device yet.

    Attributes:
      config: the resolved config.
      dataset: opened.
      task: constructed with the data set's info.
      build: makes the module from `nnx.Rngs`.
      trained: whether the parameter of a path is trained; the others are frozen.
      loading, training, evaluation, checkpoint, log, mesh, sharding, init_from: the sections.
      steps: length of the run.
      optimizer: as Optax has it.
      schedule: the learning rate over steps.
      platform: where it runs; None while that is not known.
      layout: how it is spread over devices; None for one.
    """

    config: dict
    dataset: Dataset
    task: Any
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
        """The experiment as it runs on a platform, spread over devices by a layout.

        Raises:
          ConfigError: the attention, or the recurrent kernel, that is asked for cannot run there.
        """
        placed = dataclasses.replace(self, platform=platform, layout=layout)
        _ = placed.graph
        return placed

    @property
    def eval_batch_size(self) -> int:
        return self.loading.eval_batch_size or self.loading.batch_size

    @functools.cached_property
    def frozen_in_parent(self) -> bool:
        """Whether frozen parameters lie in a parent run, so that checkpoints need not hold them."""
        return self.init_from is not None and bool(self.state_shapes().frozen)

    @property
    def graph(self):
        """The module's graph, as `training.step.split` gives."""
        return self._graph_and_kernels[0]

    @property
    def kernels(self) -> dict[str, dict[str, str]]:
        """Of `attention` and `recurrent` layers, where the model has such: which implementation runs, and why."""
        return self._graph_and_kernels[1]

    @functools.cached_property
    def _graph_and_kernels(self):
        model = nnx.eval_shape(lambda: self.build(nnx.Rngs(params=0)))
        dtype, kernels = step.DTYPES[self.training.precision], {}
        with _as_config_error("config.model.attention"):
            kernels["attention"] = attention.settle(model, self.platform, dtype, self.layout)
        with _as_config_error("config.model.kernel"):
            kernels["recurrent"] = rnn.settle(model, self.platform, dtype)
        return step.split(model)[0], {part: used for part, used in kernels.items() if used}

    def batch_shapes(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of a batch."""
        example = take(next(iter(self.dataset.splits.values())), np.array([0]))
        shapes = {k: jax.ShapeDtypeStruct((batch_size, *v.shape[1:]), v.dtype) for k, v in example.items()}
        return shapes | {"weight": jax.ShapeDtypeStruct((batch_size,), jnp.float32)}

    def reading(self, source) -> dict[str, int]:
        """How a source is read ahead, as arguments of `data.loader.read_ahead`."""
        threads = self.loading.threads
        if threads is None:
            threads = 0 if getattr(source, "in_memory", False) and self.loading.rand_augment is None else 16
        return {"threads": threads, "workers": self.loading.workers, "buffer": self.loading.buffer}

    @property
    def transform(self) -> Callable | None:
        """What changes the rows of training batches on the host, as an argument of `data.loader.TrainingBatches`."""
        augment = self.loading.rand_augment
        return None if augment is None else functools.partial(augment.batch, seed=self.config["seed"])

    def init_function(self) -> Callable[[jax.Array], step.TrainState]:
        """key -> TrainState; see training.step."""
        return step.make_init(self.build, self.trained, self.optimizer, self._metric_shapes, self.training.ema is not None)

    def step_function(self, shardings: Any = None) -> Callable:
        """(state, batch, key) -> (state, metrics); see training.step. `shardings`: of parameters, and so of their gradients."""
        options = step.StepOptions(
            accumulate=self.training.accumulate,
            ema=self.training.ema,
            precision=self.training.precision,
            log_every=self.log.every,
            layout=self.layout,
            shardings=shardings,
            gather_updates=self.sharding.optimizer == "data",
        )
        return step.make_train_step(self._loss, self.optimizer, self.schedule, options)

    def eval_function(self) -> Callable:
        """(params, stats, batch, sums) -> sums, outputs; see training.step."""
        return step.make_eval_step(self.task, self.graph, self.training.precision, self.evaluation_layout)

    def eval_metric_shapes(self, params, stats, batch) -> dict:
        """Shapes of the metrics that the evaluation step sums up."""

        def metrics(params, stats, batch):
            with layout_lib.use(self.evaluation_layout):
                return dict(self.task.metrics(step.evaluation_model(self.graph, params, stats), batch)) | step.skipped_metric(batch)

        return jax.eval_shape(metrics, params, stats, batch)

    def state_shapes(self) -> step.TrainState:
        """Shapes of the train state."""
        return jax.eval_shape(lambda: self.init_function()(jax.random.key(0)))

    @property
    def evaluation_layout(self) -> Layout | None:
        """Evaluation is one program over all devices, also where training is not."""
        return None if self.layout is None else dataclasses.replace(self.layout, axis=None)

    @property
    def _loss(self):
        return step.make_loss(self.task, self.graph, self.training.precision)

    def _metric_shapes(self, params, frozen, stats):
        rows = self.loading.batch_size // self.training.accumulate
        return step.training_metrics(self._loss, params, frozen, stats, self.batch_shapes(rows))


def build_experiment(
    config: Mapping, *, data_dir: str | None = None, data: Mapping | None = None, trained_info: Mapping | None = None
) -> Experiment:
    """Resolves a config, opens its data, and checks that data, task, model and optimizer fit each other.

    Args:
      config: as `load_config` gives.
      data_dir: the data directory; `JAXMODELS_DATA_DIR` if None.
      data: arrays by split, for the source `arrays`.
      trained_info: what the data said of itself when a run was trained, to evaluate that run: model and task are
        made from it, the data must agree with it, and no train split is needed.

    Raises:
      ConfigError: anything that is wrong, before a device starts.
    """
    c = resolve(config)
    loading = _loading(c["data"])
    dataset = _open(c["data"], loading, data_dir, data)
    if trained_info is None:
        dataset = dataclasses.replace(dataset, info=_with_published_vocabulary(dataset.info, c["init_from"]))
        _check_train_split(dataset, c["data"])
        if loading.rand_augment is not None:
            loading.rand_augment.check(dataset.splits["train"][0])
    else:
        dataset = dataclasses.replace(dataset, info=_agreed_info(dataset.info, trained_info))
    task, build = build_model(c, dataset.info)
    training = Training(**c["training"])
    steps = training.steps or max(1, round(training.epochs * len(dataset.splits.get("train", [])) / loading.batch_size))
    options, own = _split_optimizer(c["optimizer"])
    with _as_config_error("config.model"):
        params = jax.eval_shape(lambda: step.split(build(nnx.Rngs(params=0)))[1])
    shapes = {path: x.shape for path, x in step.flatten(params).items()}
    check_stages(shapes, c["mesh"]["pipeline"], Sharding(**c["sharding"]))
    check_patterns(shapes, Sharding(**c["sharding"]))
    if trained_info is None:
        _check_trained(c, optimizer.paths(params))
        optimizer.check(options, own, steps, step.divide(params, functools.partial(is_trained, c))[0])
        _check_skip(c["init_from"], params)
    schedule = optimizer.make_schedule(options.learning_rate, options.schedule, max(steps, options.schedule.warmup + max(1, options.schedule.decay or 0)))
    experiment = Experiment(
        config=c,
        dataset=dataset,
        task=task,
        build=build,
        trained=functools.partial(is_trained, c),
        loading=loading,
        training=training,
        evaluation=Evaluation(**c["evaluation"]),
        checkpoint=Checkpointing(**c["checkpoint"]),
        log=Logging(**c["log"]),
        mesh=MeshSizes(**c["mesh"]),
        sharding=Sharding(**c["sharding"]),
        init_from=InitFrom(**c["init_from"]) if c["init_from"] else None,
        steps=steps,
        optimizer=optimizer.make_optimizer(options, own, schedule),
        schedule=schedule,
    )
    _check_fit(experiment)
    return experiment


def build_model(config: Mapping, info: Mapping) -> tuple[Any, Callable[[nnx.Rngs], nnx.Module]]:
    """The task of a resolved config, and a function that makes its model.

    Args:
      config: resolved.
      info: what the data set says of itself.
    """
    task_name, model_name = config["task"]["name"], config["model"]["name"]
    task = tasks.find(task_name)(info, **_without_name(config["task"]))
    constructor, _ = models.find(model_name)
    arguments = tasks.model_arguments(constructor, task.provides, model_name, task_name)
    options = _without_name(config["model"])
    lora = Lora(**config["lora"]) if config["lora"] is not None else None

    def build(rngs: nnx.Rngs) -> nnx.Module:
        model = constructor(*arguments, **options, rngs=rngs)
        if lora is not None:
            add_lora(model, rank=lora.rank, alpha=lora.scale * lora.rank, targets=lora.targets, rngs=rngs)
        return model

    return task, build


def _loading(section: dict) -> Loading:
    values = {key: section[key] for key in config_lib.fields(Loading)}
    if values["rand_augment"] is not None:
        values["rand_augment"] = RandAugment(**values["rand_augment"])
    return Loading(**values)


def is_trained(config: Mapping, path: str) -> bool:
    """Whether a resolved config trains the parameter of a path: by `training.trainable`, `training.freeze` and `lora`."""
    trainable = config["training"]["trainable"]
    if config["lora"] is not None:
        trainable = (*(rf"{name}$" for name in ADAPTERS), *(trainable or ()))
    chosen = trainable is None or any(re.search(pattern, path) for pattern in trainable)
    return chosen and not any(re.search(pattern, path) for pattern in config["training"]["freeze"])


def _check_trained(config: Mapping, paths: list[str]) -> None:
    """Every pattern means a parameter, and something is left to train."""
    for key in ("trainable", "freeze"):
        for pattern in config["training"][key] or ():
            if not any(re.search(pattern, path) for path in paths):
                raise ConfigError(f"config.training.{key}: {pattern!r} matches no parameter; there are {', '.join(paths[:8])}, …")
    if not any(is_trained(config, path) for path in paths):
        raise ConfigError("config.training: trainable and freeze leave no parameter to train.")
    frozen = [path for path in paths if not is_trained(config, path)]
    skip = config["init_from"]["skip"] if config["init_from"] else ()
    lost = [path for path in frozen if any(re.match(pattern, path) for pattern in skip)]
    if lost:
        raise ConfigError(f"config.init_from.skip: {lost[0]} is initialised anew and frozen too: nothing would ever train it.")


def _without_name(section: dict) -> dict:
    return {key: value for key, value in section.items() if key != "name"}


def _split_optimizer(section: dict) -> tuple[optimizer.Optimizer, dict]:
    ours = config_lib.fields(optimizer.Optimizer)
    values = {key: section[key] for key in ours}
    values["schedule"] = optimizer.Schedule(**values["schedule"])
    if values["layer_decay"] is not None:
        values["layer_decay"] = optimizer.LayerDecay(**values["layer_decay"])
    return optimizer.Optimizer(**values), {key: value for key, value in section.items() if key not in ours}


def _open(section: dict, loading: Loading, data_dir: str | None, data: Mapping | None) -> Dataset:
    shared = config_lib.fields(Loading)
    options = {key: value for key, value in section.items() if key not in shared and key != "source"}
    dataset = data_lib.open_dataset(section["source"], options, data_dir, data)
    return dataclasses.replace(dataset, splits={name: _remember(part, loading) for name, part in dataset.splits.items()})


def _check_train_split(dataset: Dataset, section: Mapping) -> None:
    if "train" not in dataset.splits:
        raise ConfigError(f"config.data: {section['source']!r} gives no train split, only {', '.join(dataset.splits)}.")
    size = len(dataset.splits["train"])
    if size < section["batch_size"]:
        raise ConfigError(f"config.data.batch_size={section['batch_size']} is more than the {size} training examples of {section['source']!r}.")


def _with_published_vocabulary(info: Mapping, init_from: Mapping | None) -> Mapping:
    """Arrays of tokens tell of no tokenizer, and hold maybe not all tokens there are: then a published model's own number is what counts."""
    if init_from is None or not is_published(init_from["run"]) or "vocab_size" not in info or "tokenizer" in info:
        return info
    return dict(info) | {"vocab_size": max(info["vocab_size"], find_published(init_from["run"]).config.get("vocab_size", 0))}


def _agreed_info(info: Mapping, trained: Mapping) -> Mapping:
    """What a run was trained on, if the data to evaluate it on is of the same kind; it may have fewer classes."""
    for key, value in trained.items():
        now = info.get(key)
        if key == "tokenizer":
            agree = now is not None and now.to_json() == value.to_json()
        elif key in ("num_classes", "num_tags", "vocab_size"):
            agree = now is None or now <= value
        elif key in ("labels", "tags"):
            agree = now is None or list(now) == list(value)[: len(now)]
        else:
            agree = now is None or np.array_equal(np.asarray(now), np.asarray(value))
        if not agree:
            shown = "another one now" if key == "tokenizer" else f"{value} when the run was trained, {now} now"
            raise ConfigError(f"config.data: the data has changed: {key}: {shown}.")
    return trained


def _check_skip(init_from: Mapping | None, params: Any) -> None:
    for pattern in init_from["skip"] if init_from else ():
        if not any(re.match(pattern, path) for path in optimizer.paths(params)):
            raise ConfigError(f"config.init_from.skip: {pattern!r} matches no parameter of the model.")


def _remember(source, loading: Loading):
    """The source, kept in memory once decoded where it is small enough."""
    if getattr(source, "in_memory", False) or loading.workers or not len(source):
        return source
    size = Remembered.size(source)
    return source if size is None or size > loading.memory_gb * 2**30 else Remembered(source)


def _check_fit(experiment: Experiment) -> None:
    """Runs model and loss on shapes alone, so that what does not fit is said now."""
    shapes = experiment.batch_shapes(experiment.loading.batch_size)
    for split, source in experiment.dataset.splits.items():
        example = take(source, np.array([0]))
        missing = [name for name in experiment.task.batch if name not in example]
        if missing:
            raise ConfigError(f"config.task: {experiment.config['task']['name']!r} needs {missing[0]!r} in every example; {split} has none.")
        for name, value in example.items():
            if name == "weight":
                continue  # the loader makes it what it is in every batch
            if name not in shapes or value.shape[1:] != shapes[name].shape[1:] or value.dtype != shapes[name].dtype:
                raise ConfigError(f"config.data: {name!r} of {split} is {value.dtype} {value.shape[1:]}: not as in the other splits.")
    for name, wanted in experiment.task.batch.items():
        got = shapes[name].shape[1:]
        if len(got) != len(wanted) or any(w is not None and w != g for w, g in zip(wanted, got, strict=True)):
            raise ConfigError(f"config.task: {name!r} should have the shape {wanted}, but has {got} in the data.")
    if experiment.config["partition"] == "pmap" and getattr(experiment.task, "across_rows", False):
        raise ConfigError(f"config.partition=pmap: {experiment.config['task']['name']!r} goes by all rows of a batch (mixup, cutmix, contrast); pmap shows a device its own.")
    with _as_config_error("config.model"):
        experiment.state_shapes()
    _check_best(experiment)


def _check_best(experiment: Experiment) -> None:
    """The metric that picks checkpoints is one that the task gives on a split that there is."""
    best = experiment.checkpoint.best
    if best is None:
        return
    if "validation" not in experiment.dataset.splits:
        raise ConfigError(f"config.checkpoint.best={best!r} needs a validation split; the data has {', '.join(experiment.dataset.splits)}.")
    state = experiment.state_shapes()
    shapes = experiment.eval_metric_shapes(state.weights, state.stats, experiment.batch_shapes(experiment.eval_batch_size))
    given = experiment.task.summarize({name: 1.0 for name in (*shapes, *tasks.scores(experiment.task))})
    if best not in given:
        raise ConfigError(f"config.checkpoint.best: the task {experiment.config['task']['name']!r} gives no {best!r}; it gives {', '.join(given)}.")


@contextlib.contextmanager
def _as_config_error(where: str):
    """What a model says of its own arguments, as an error of the config."""
    try:
        yield
    except (ValueError, TypeError, KeyError, ZeroDivisionError) as error:
        raise ConfigError(f"{where}: {str(error).splitlines()[0]}") from error
