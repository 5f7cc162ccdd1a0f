"""Construction of the data, task, model and optimizer of a config."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from fractions import Fraction

import jax
import numpy as np
from flax import nnx

from jaxmodels import config as config_lib
from jaxmodels import models, tasks
from jaxmodels.data import balance
from jaxmodels.data import registry as data_lib
from jaxmodels.data.evaluation_sets import EvaluationSets
from jaxmodels.data.fitted import agreed_info
from jaxmodels.data.loader import Loading
from jaxmodels.data.order import check_window
from jaxmodels.data.rand_augment import RandAugment
from jaxmodels.data.random_crop import RandomResizedCrop
from jaxmodels.data.reading import errors_of
from jaxmodels.data.source import CachedSource, Dataset, DataSource
from jaxmodels.errors import ConfigError
from jaxmodels.experiment.checks import check_fit, check_skip, check_train_split, check_trained, is_trained
from jaxmodels.experiment.experiment import Experiment, as_config_error
from jaxmodels.experiment.sections import Checkpointing, Evaluation, InitFrom, Logging, Training, resolve
from jaxmodels.models import functional
from jaxmodels.models.lora import Lora, add_lora
from jaxmodels.parallel.mesh import MeshSizes
from jaxmodels.parallel.sharding import Sharding, check_patterns, check_stages
from jaxmodels.pretrained.folder import find as find_pretrained
from jaxmodels.pretrained.folder import is_pretrained
from jaxmodels.step import optimizer
from jaxmodels.step.parameters import paths
from jaxmodels.step.schedule import check as check_schedule
from jaxmodels.step.schedule import make_schedule
from jaxmodels.storage import paths as storage


def build_experiment(config: Mapping, *, data_dir: str | None = None, data: Mapping | None = None, trained_info: Mapping | None = None) -> Experiment:
    """Resolve a config, open its data, and check that data, task, model and optimizer are compatible.

    Args:
      config: a config, as returned by `load_config`.
      data_dir: the data directory; if None, `JAXMODELS_DATA_DIR`.
      data: split -> arrays, for the source `arrays`.
      trained_info: to evaluate a run, the `info` of its training data. Model and task are built from it, the data is opened with its tokenizer,
        class names and statistics and must be compatible with it, and no train split is needed.

    Raises:
      ConfigError: any error of the config or its data; no device is used.
    """
    data_dir = None if data_dir is None else str(storage.parse(data_dir, "--data_dir"))
    c = resolve(config)
    loading = _loading(c["data"])
    dataset = _open(c["data"], loading, data_dir, data, trained_info)
    if trained_info is None:
        dataset = dataclasses.replace(dataset, info=_with_pretrained_vocabulary(dataset.info, c["init_from"]))
        check_train_split(dataset, c["data"])
        for augmentation in filter(None, (loading.random_resized_crop, loading.rand_augment)):
            augmentation.check(dataset.splits["train"][0])
    else:
        dataset = dataclasses.replace(dataset, info=agreed_info(dataset.info, trained_info))
    task, build = build_model(c, dataset.info)
    training = Training(**c["training"])
    steps = count_steps(training, len(dataset.splits.get("train", [])), loading.batch_size)
    dataset = dataclasses.replace(dataset, guesses=(*dataset.guesses, *_rounded(training, dataset, loading.batch_size, steps)))
    options, own = optimizer.from_section(c["optimizer"])
    with as_config_error("config.model"):
        params = jax.eval_shape(lambda: functional.split(build(functional.new_rngs(params=0)))[1])
    shapes = {path: x.shape for path, x in functional.flatten(params).items()}
    check_stages(shapes, c["mesh"]["pipeline"], Sharding(**c["sharding"]))
    check_patterns(shapes, Sharding(**c["sharding"]))
    if trained_info is None:
        check_trained(c, paths(params))
        optimizer.check(options, own, steps, functional.partition(params, functools.partial(is_trained, c))[0])
        check_skip(c["init_from"], params)
    schedule = make_schedule(options.learning_rate, options.schedule, steps)
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
    check_fit(experiment)
    return experiment


def count_steps(training: Training, examples: int, batch_size: int, step: int = 0, position: int = 0) -> int:
    """Return the length of a run in steps.

    Args:
      training: has `steps` or `epochs`.
      examples: in an epoch.
      batch_size: of the steps after `step`.
      step: steps that are trained.
      position: examples that they have read. `epochs` counts examples, so after steps of another batch size it is another number of steps.
    """
    if training.steps:
        return training.steps
    if position == step * batch_size:
        return max(1, round(training.epochs * examples / batch_size))
    return step + max(0, math.floor((Fraction(training.epochs) * examples - position) / batch_size + Fraction(1, 2)))


def _rounded(training: Training, dataset: Dataset, batch_size: int, steps: int) -> list[str]:
    """Return a line where a number of epochs is no number of steps, and rounding changes the length by more than a hundredth."""
    if training.steps or "train" not in dataset.splits:
        return []
    exact = training.epochs * len(dataset.splits["train"]) / batch_size
    if abs(steps - exact) <= exact / 100:
        return []
    return [f"training.epochs={training.epochs:g} of {len(dataset.splits['train']):,} examples are {exact:.4g} steps of {batch_size}, rounded to {steps}"]


def with_steps(experiment: Experiment, steps: int) -> Experiment:
    """Return the experiment with another length, which its schedule follows.

    Raises:
      ConfigError: the schedule does not fit into this length.
    """
    if steps == experiment.steps:
        return experiment
    options, own = optimizer.from_section(experiment.config["optimizer"])
    check_schedule(options.schedule, options.learning_rate, steps)
    schedule = make_schedule(options.learning_rate, options.schedule, steps)
    return dataclasses.replace(experiment, steps=steps, schedule=schedule, optimizer=optimizer.make_optimizer(options, own, schedule))


def build_model(config: Mapping, info: Mapping) -> tuple[tasks.Task, Callable[[nnx.Rngs], nnx.Module]]:
    """Return the task of a resolved config, and a function that constructs its model.

    Args:
      config: the resolved config.
      info: the `info` of the dataset.
    """
    task_name, model_name = config["task"]["name"], config["model"]["name"]
    task = tasks.make(task_name, info, _without_name(config["task"]))
    constructor, _ = models.find(model_name)
    arguments = tasks.model_arguments(constructor, task.provides, model_name, task_name)
    options = _without_name(config["model"])
    lora = Lora(**config["lora"]) if config["lora"] is not None else None

    def build(rngs: nnx.Rngs) -> nnx.Module:
        rngs = functional.with_default_stream(rngs)
        model = functional.accept_rngs(constructor(*arguments, **options, rngs=rngs))
        if lora is not None:
            add_lora(model, rank=lora.rank, alpha=lora.scale * lora.rank, targets=lora.targets, dora=lora.dora, rngs=rngs)
        return model

    return task, build


def _loading(section: dict) -> Loading:
    values = {key: section[key] for key in config_lib.fields(Loading)}
    for key, kind in (("random_resized_crop", RandomResizedCrop), ("rand_augment", RandAugment)):
        if values[key] is not None:
            values[key] = kind(**values[key])
    return Loading(**values)


def _without_name(section: dict) -> dict:
    return {key: value for key, value in section.items() if key != "name"}


def _open(section: dict, loading: Loading, data_dir: str | None, data: Mapping | None, trained_info: Mapping | None) -> Dataset:
    shared = config_lib.fields(Loading) | config_lib.fields(EvaluationSets)
    options = {key: value for key, value in section.items() if key not in shared and key != "source"}
    with errors_of(f"config.data.source={section['source']!r}"):
        sets = EvaluationSets.of(section).named()
        dataset = data_lib.open_dataset(section["source"], options, data_dir, data, sets=sets, trained=trained_info)
        uncached = dataset.splits.get("train")
        if loading.balance and loading.shuffle_window is not None:
            raise ConfigError("config.data.balance: examples of a class may be in any group, so data.shuffle_window must not be set with it.")
        if loading.shuffle_window is not None and "train" in dataset.splits:
            check_window(dataset.splits["train"], loading.shuffle_window, f"config.data.source={section['source']!r}")
        dataset = dataclasses.replace(dataset, splits={name: _cached(name, part, loading) for name, part in dataset.splits.items()})
        return _balanced(dataset, uncached) if loading.balance else dataset


def _with_pretrained_vocabulary(info: Mapping, init_from: Mapping | None) -> Mapping:
    """Raise the vocabulary size to the pretrained model's if the data has no tokenizer: token arrays may lack some tokens."""
    if init_from is None or not is_pretrained(init_from["run"]) or "vocab_size" not in info or "tokenizer" in info:
        return info
    return dict(info) | {"vocab_size": max(info["vocab_size"], find_pretrained(init_from["run"]).config.get("vocab_size", 0))}


def _balanced(dataset: Dataset, uncached: DataSource | None) -> Dataset:
    """Return the data set with a training split that has each class equally often; its labels are those of the split without a cache."""
    if uncached is None:
        return dataset
    mixed, sizes = balance.balanced(dataset.splits["train"], balance.labels_of(uncached))
    shown = ", ".join(f"{size:,}" for size in sizes[:10]) + (", …" if len(sizes) > 10 else "")
    note = f"train: each of {len(sizes)} classes equally often, {len(mixed):,} examples an epoch of {sizes.sum():,} that there are ({shown})"
    return dataclasses.replace(dataset, splits={**dataset.splits, "train": mixed}, notes=(*dataset.notes, note))


def _cached(split: str, source, loading: Loading):
    """Return the source, with a cache of decoded examples in memory if it is small enough, and if they are the same each time."""
    cropped = split == "train" and loading.random_resized_crop is not None
    if getattr(source, "in_memory", False) or loading.workers or not len(source) or cropped:
        return source
    size = CachedSource.size(source)
    return source if size is None or size > loading.memory_gb * 2**30 else CachedSource(source)


Arrays = Mapping[str, Mapping[str, np.ndarray]]
