"""What a config means: its sections, checked and filled in, and the data, task and model they make.

Everything here happens on the host, before any device is touched.
"""

import contextlib
import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxmodels import config as config_lib
from jaxmodels import data as data_lib
from jaxmodels import models, tasks
from jaxmodels.data.source import Dataset, Remembered, take
from jaxmodels.errors import ConfigError
from jaxmodels.parallel.mesh import MeshSizes
from jaxmodels.training import metrics, optimizer, step

# The sections. Each class is the keys that its section may hold.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loading:
    """The part of the `data` section that every source shares.

    Attributes:
      batch_size: examples in one step, over all devices and accumulation steps.
      eval_batch_size: in one step of evaluation; `batch_size` unless given.
      shuffle: a new order every epoch; otherwise the source's own.
      threads: that read ahead; unless given, none for sources that lie in memory, else 16.
      workers: processes that read ahead instead of threads.
      buffer: batches read ahead.
      memory_gb: a split that takes no more is decoded once and kept; not with `workers`.
    """

    batch_size: int
    eval_batch_size: int | None = None
    shuffle: bool = True
    threads: int | None = None
    workers: int = 0
    buffer: int = 4
    memory_gb: float = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """The `training` section.

    Attributes:
      steps: length of the run; or
      epochs: the same, in passes over the training split.
      accumulate: microbatches that a batch is computed in.
      ema: decay of a moving average of the parameters, which is then what is evaluated.
      precision: of the computation; parameters and optimizer stay float32.
    """

    steps: int | None = None
    epochs: float | None = None
    accumulate: int = 1
    ema: float | None = None
    precision: Literal["float32", "bfloat16"] = "float32"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The `evaluation` section.

    Attributes:
      every: steps between evaluations on the validation split; only at the end unless given.
      patience: stop after so many evaluations in a row that did not improve `checkpoint.best`.
    """

    every: int | None = None
    patience: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpointing:
    """The `checkpoint` section.

    Attributes:
      every: steps between checkpoints.
      keep: the last so many are kept.
      best: a metric; the checkpoint that is best by it on the validation split is kept too, and tested at the end.
    """

    every: int = 1000
    keep: int = 2
    best: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class InitFrom:
    """The `init_from` section, or its first key alone: where the first weights come from.

    Attributes:
      run: `RUN`, `RUN@best`, `RUN@latest` or `RUN@STEP`; RUN alone is its best checkpoint where it kept one, else its latest.
      skip: patterns; parameters of this model whose path matches one (from its start) are initialised anew.
      rename: pairs (pattern, replacement), applied in order to the paths of the other run's parameters; an empty result
        drops the parameter.
    """

    run: str
    skip: tuple[str, ...] = ()
    rename: tuple[tuple[str, ...], ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Logging:
    """The `log` section.

    Attributes:
      every: steps that a line of training metrics is the mean of.
      tensorboard: write event files too.
    """

    every: int = 100
    tensorboard: bool = True


# How a run is computed, not what it computes: a run may be taken up again with other values of these.
MACHINE_KEYS = ("mesh", "partition", "data.threads", "data.workers", "data.buffer", "data.memory_gb")

_PLAIN = {
    "training": Training,
    "evaluation": Evaluation,
    "checkpoint": Checkpointing,
    "mesh": MeshSizes,
    "log": Logging,
}


def resolve(config: Mapping) -> dict:
    """The whole config: every section, every key with its value, types checked.

    Args:
      config: as a config file gives it (a ConfigDict or nested dictionaries).

    Raises:
      ConfigError: an unknown section or key, a wrong type, an unknown name, a missing required key.
    """
    config = config.to_dict() if hasattr(config, "to_dict") else config
    if not isinstance(config, Mapping):
        raise ConfigError(f"a config is a dictionary of sections, as jaxmodels.load_config(FILE) gives; got {config!r}.")
    top = ("seed", "model", "task", "data", "optimizer", *_PLAIN, "partition", "init_from")
    for key in config:
        if key not in top:
            hint = config_lib.suggest(key, top) or f" There are: {', '.join(top)}."
            raise ConfigError(f"config.{key}: there is no such section.{hint}")
    resolved = {"seed": config_lib.check_value("seed", config.get("seed", 0), int)}
    named = {"model": _resolve_model, "task": _resolve_task, "data": _resolve_data, "optimizer": _resolve_optimizer}
    for name, resolve_section in named.items():
        section = config.get(name)
        if isinstance(section, str):
            section = {"source" if name == "data" else "name": section}
        first = "source" if name == "data" else "name"
        if not isinstance(section, Mapping) or first not in section:
            raise ConfigError(f"config.{name}.{first} is required, e.g. --config.{name}.{first}=VALUE.")
        resolved[name] = resolve_section(dict(section))
    for name, section in _PLAIN.items():
        resolved[name] = config_lib.check_section(name, {} if config.get(name) is None else config[name], config_lib.fields(section), f"the section {name!r}")
    resolved["partition"] = config_lib.check_value("partition", config.get("partition", "jit"), Literal["jit"])
    resolved["init_from"] = config_lib.check_value("init_from", config.get("init_from"), InitFrom | None)
    _check_values(resolved)
    return resolved


def _resolve_model(section: dict) -> dict:
    name = config_lib.check_value("model.name", section.pop("name"), str)
    constructor, size = models.find(name)
    return {"name": name} | config_lib.check_section("model", size | section, config_lib.fields(constructor), f"the model {name!r}")


def _resolve_task(section: dict) -> dict:
    name = config_lib.check_value("task.name", section.pop("name"), str)
    return {"name": name} | config_lib.check_section("task", section, config_lib.fields(tasks.find(name)), f"the task {name!r}")


def _resolve_data(section: dict) -> dict:
    source = config_lib.check_value("data.source", section.pop("source"), str)
    function, _ = data_lib.find(source)
    allowed = config_lib.fields(function) | config_lib.fields(Loading)
    return {"source": source} | config_lib.check_section("data", section, allowed, f"the data source {source!r}")


def _resolve_optimizer(section: dict) -> dict:
    own = optimizer.own_arguments(config_lib.check_value("optimizer.name", section["name"], str))
    ours = config_lib.fields(optimizer.Optimizer)
    # Optax's own defaults are left to Optax: only what is given of them is a part of the config.
    for key, (_, default) in own.items():
        if default is config_lib.REQUIRED and key not in section:
            raise ConfigError(f"config.optimizer.{key} is required by optax.{section['name']}.")
    allowed = ours | {key: own[key] for key in own if key in section}
    unknown = [key for key in section if key not in allowed]
    if unknown:
        allowed = ours | own  # for the suggestion
    return config_lib.check_section("optimizer", section, allowed, f"the optimizer {section['name']!r}")


def _check_values(c: dict) -> None:
    """Values that are of the right type and still make no sense."""
    positive = ["data.batch_size", "data.eval_batch_size", "data.buffer", "training.steps", "training.epochs", "training.accumulate"]
    positive += ["evaluation.every", "evaluation.patience", "checkpoint.every", "checkpoint.keep", "log.every"]
    for key in positive:
        section, name = key.split(".")
        value = c[section][name]
        if value is not None and value <= 0:
            raise ConfigError(f"config.{key} must be above 0, got {value}.")
    for key in ("data.threads", "data.workers", "data.memory_gb"):
        section, name = key.split(".")
        if c[section][name] is not None and c[section][name] < 0:
            raise ConfigError(f"config.{key} must not be negative, got {c[section][name]}.")
    if not 0 <= c["seed"] < 2**32:
        raise ConfigError(f"config.seed must be at least 0 and below 2**32, got {c['seed']}.")
    if not max(c["training"]["steps"] or 0, c["training"]["epochs"] or 0) < 2**31:
        raise ConfigError("config.training: a run has less than 2**31 steps or epochs.")
    if (c["training"]["steps"] is None) == (c["training"]["epochs"] is None):
        raise ConfigError("config.training: give the length of the run as either steps or epochs.")
    ema = c["training"]["ema"]
    if ema is not None and not 0 < ema < 1:
        raise ConfigError(f"config.training.ema must lie between 0 and 1, got {ema}.")
    if c["data"]["batch_size"] % c["training"]["accumulate"]:
        raise ConfigError(f"config.data.batch_size={c['data']['batch_size']} does not divide by training.accumulate={c['training']['accumulate']}.")
    if c["checkpoint"]["best"] is not None:
        metrics.check_name("checkpoint.best", c["checkpoint"]["best"])
    elif c["evaluation"]["patience"] is not None:
        raise ConfigError("config.evaluation.patience needs checkpoint.best: the metric that has to improve.")
    if c["init_from"] is not None:
        for pair in c["init_from"]["rename"]:
            if len(pair) != 2:
                raise ConfigError(f"config.init_from.rename holds pairs (pattern, replacement), got {pair!r}.")
        for key, patterns in (("skip", c["init_from"]["skip"]), ("rename", [pair[0] for pair in c["init_from"]["rename"]])):
            for pattern in patterns:
                optimizer.check_pattern(f"init_from.{key}", pattern)


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A checked config with its data opened: all that a run needs, and no device yet.

    Attributes:
      config: the resolved config.
      dataset: opened.
      task: constructed with the data set's info.
      build: makes the module from `nnx.Rngs`.
      loading, training, evaluation, checkpoint, log, mesh, init_from: the sections.
      steps: length of the run.
      optimizer: as Optax has it.
      schedule: the learning rate over steps.
    """

    config: dict
    dataset: Dataset
    task: Any
    build: Callable[[nnx.Rngs], nnx.Module]
    loading: Loading
    training: Training
    evaluation: Evaluation
    checkpoint: Checkpointing
    log: Logging
    mesh: MeshSizes
    init_from: InitFrom | None
    steps: int
    optimizer: Any
    schedule: Any

    @property
    def eval_batch_size(self) -> int:
        return self.loading.eval_batch_size or self.loading.batch_size

    @functools.cached_property
    def graph(self):
        """The module's graph, as `training.step.split` gives."""
        return step.split(nnx.eval_shape(lambda: self.build(nnx.Rngs(params=0))))[0]

    def batch_shapes(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of a batch."""
        example = take(next(iter(self.dataset.splits.values())), np.array([0]))
        shapes = {k: jax.ShapeDtypeStruct((batch_size, *v.shape[1:]), v.dtype) for k, v in example.items()}
        return shapes | {"weight": jax.ShapeDtypeStruct((batch_size,), jnp.float32)}

    def reading(self, source) -> dict[str, int]:
        """How a source is read ahead, as arguments of `data.loader.read_ahead`."""
        threads = self.loading.threads
        if threads is None:
            threads = 0 if getattr(source, "in_memory", False) else 16
        return {"threads": threads, "workers": self.loading.workers, "buffer": self.loading.buffer}

    def init_function(self) -> Callable[[jax.Array], step.TrainState]:
        """key -> TrainState; see training.step."""
        return step.make_init(self.build, self.optimizer, self._metric_shapes, self.training.ema is not None)

    def step_function(self) -> Callable:
        """(state, batch, key) -> (state, metrics); see training.step."""
        options = step.StepOptions(
            accumulate=self.training.accumulate,
            ema=self.training.ema,
            precision=self.training.precision,
            log_every=self.log.every,
        )
        return step.make_train_step(self._loss, self.optimizer, self.schedule, options)

    def eval_function(self) -> Callable:
        """(params, stats, batch, sums) -> sums; see training.step."""
        return step.make_eval_step(self.task, self.graph, self.training.precision)

    def eval_metric_shapes(self, params, stats, batch) -> dict:
        """Shapes of the metrics that the evaluation step sums up."""
        return jax.eval_shape(lambda p, s, b: dict(self.task.metrics(step.evaluation_model(self.graph, p, s), b)), params, stats, batch)

    def state_shapes(self) -> step.TrainState:
        """Shapes of the train state."""
        return jax.eval_shape(lambda: self.init_function()(jax.random.key(0)))

    @property
    def _loss(self):
        return step.make_loss(self.task, self.graph, self.training.precision)

    def _metric_shapes(self, params, stats):
        rows = self.loading.batch_size // self.training.accumulate
        return step.training_metrics(self._loss, params, stats, self.batch_shapes(rows))


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
    loading = Loading(**{key: c["data"][key] for key in config_lib.fields(Loading)})
    dataset = _open(c["data"], loading, data_dir, data)
    if trained_info is None:
        _check_train_split(dataset, c["data"])
    else:
        dataset = dataclasses.replace(dataset, info=_agreed_info(dataset.info, trained_info))
    task, build = build_model(c, dataset.info)
    training = Training(**c["training"])
    steps = training.steps or max(1, round(training.epochs * len(dataset.splits.get("train", [])) / loading.batch_size))
    options, own = _split_optimizer(c["optimizer"])
    with _as_config_error("config.model"):
        params = jax.eval_shape(lambda: step.split(build(nnx.Rngs(params=0)))[1])
    if trained_info is None:
        optimizer.check(options, own, steps, params)
        _check_skip(c["init_from"], params)
    schedule = optimizer.make_schedule(options.learning_rate, options.schedule, max(steps, options.schedule.warmup + 1))
    experiment = Experiment(
        config=c,
        dataset=dataset,
        task=task,
        build=build,
        loading=loading,
        training=training,
        evaluation=Evaluation(**c["evaluation"]),
        checkpoint=Checkpointing(**c["checkpoint"]),
        log=Logging(**c["log"]),
        mesh=MeshSizes(**c["mesh"]),
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

    def build(rngs: nnx.Rngs) -> nnx.Module:
        return constructor(*arguments, **options, rngs=rngs)

    return task, build


def _without_name(section: dict) -> dict:
    return {key: value for key, value in section.items() if key != "name"}


def _split_optimizer(section: dict) -> tuple[optimizer.Optimizer, dict]:
    ours = config_lib.fields(optimizer.Optimizer)
    values = {key: section[key] for key in ours}
    values["schedule"] = optimizer.Schedule(**values["schedule"])
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


def _agreed_info(info: Mapping, trained: Mapping) -> Mapping:
    """What a run was trained on, if the data to evaluate it on is of the same kind; it may have fewer classes."""
    for key, value in trained.items():
        now = info.get(key)
        if key == "tokenizer":
            agree = now is not None and now.to_json() == value.to_json()
        elif key in ("num_classes", "vocab_size"):
            agree = now is None or now <= value
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
            if name not in shapes or value.shape[1:] != shapes[name].shape[1:] or value.dtype != shapes[name].dtype:
                raise ConfigError(f"config.data: {name!r} of {split} is {value.dtype} {value.shape[1:]}: not as in the other splits.")
    for name, wanted in experiment.task.batch.items():
        got = shapes[name].shape[1:]
        if len(got) != len(wanted) or any(w is not None and w != g for w, g in zip(wanted, got, strict=True)):
            raise ConfigError(f"config.task: {name!r} should have the shape {wanted}, but has {got} in the data.")
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
    shapes = experiment.eval_metric_shapes(state.params, state.stats, experiment.batch_shapes(experiment.eval_batch_size))
    given = experiment.task.summarize({name: 1.0 for name in shapes})
    if best not in given:
        raise ConfigError(f"config.checkpoint.best: the task {experiment.config['task']['name']!r} gives no {best!r}; it gives {', '.join(given)}.")


@contextlib.contextmanager
def _as_config_error(where: str):
    """What a model says of its own arguments, as an error of the config."""
    try:
        yield
    except (ValueError, TypeError, KeyError, ZeroDivisionError) as error:
        raise ConfigError(f"{where}: {str(error).splitlines()[0]}") from error
