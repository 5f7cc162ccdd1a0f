"""Checks that data, task, model and optimizer are compatible, before a device is used."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxmodels import config as config_lib
from jaxmodels.data import evaluation_sets
from jaxmodels.data.source import Dataset, get_batch
from jaxmodels.errors import ConfigError
from jaxmodels.experiment.experiment import Experiment, as_config_error
from jaxmodels.models.lora import ADAPTERS
from jaxmodels.step.parameters import paths


def is_trained(config: Mapping, path: str) -> bool:
    """Return whether a resolved config trains the parameter at a path, by `training.trainable`, `training.freeze` and `lora`."""
    trainable = config["training"]["trainable"]
    if config["lora"] is not None:
        trainable = (*(rf"{name}$" for name in ADAPTERS), *(trainable or ()))
    chosen = trainable is None or any(re.search(pattern, path) for pattern in trainable)
    return chosen and not any(re.search(pattern, path) for pattern in config["training"]["freeze"])


def check_trained(config: Mapping, paths: list[str]) -> None:
    """Raise ConfigError unless every pattern matches a parameter and at least one parameter is trained."""
    for key in ("trainable", "freeze"):
        for pattern in config["training"][key] or ():
            if not any(re.search(pattern, path) for path in paths):
                raise ConfigError(f"config.training.{key}: {pattern!r} matches no parameter; the parameters are {', '.join(paths[:8])}, …")
    if not any(is_trained(config, path) for path in paths):
        raise ConfigError("config.training: trainable and freeze leave no parameter to train.")
    frozen = [path for path in paths if not is_trained(config, path)]
    skip = config["init_from"]["skip"] if config["init_from"] else ()
    lost = [path for path in frozen if any(re.match(pattern, path) for pattern in skip)]
    if lost:
        raise ConfigError(f"config.init_from.skip: {lost[0]} is skipped and also frozen, so it would stay at its random initial value.")


def check_train_split(dataset: Dataset, section: Mapping) -> None:
    """Raise ConfigError unless there is a train split with at least one batch."""
    if "train" not in dataset.splits:
        raise ConfigError(f"config.data: {section['source']!r} has no train split, only {', '.join(dataset.splits)}.")
    size = len(dataset.splits["train"])
    if size < section["batch_size"]:
        raise ConfigError(f"config.data.batch_size={section['batch_size']} is larger than the {size} training examples of {section['source']!r}.")


def check_skip(init_from: Mapping | None, params: Any) -> None:
    """Raise ConfigError unless every pattern of `init_from.skip` matches a parameter."""
    for pattern in init_from["skip"] if init_from else ():
        if not any(re.match(pattern, path) for path in paths(params)):
            raise ConfigError(f"config.init_from.skip: {pattern!r} matches no parameter of the model.")


def check_fit(experiment: Experiment) -> None:
    """Raise ConfigError unless the data fits task and model; trace model and loss on shapes."""
    shapes = experiment.batch_shapes(experiment.loading.batch_size)
    for split, source in experiment.dataset.splits.items():
        example = get_batch(source, np.array([0]))
        missing = [name for name in experiment.task.batch if name not in example]
        if missing:
            raise ConfigError(f"config.task: {experiment.config['task']['name']!r} needs {missing[0]!r} in every example; {split} has no such array.")
        for name, value in example.items():
            if name == "weight":
                continue  # the loader sets its shape and dtype in every batch
            if name == "index":
                raise ConfigError(f"config.data: the array 'index' of {split} needs another name: evaluation uses it for the row's index in its split.")
            if name not in shapes or value.shape[1:] != shapes[name].shape[1:] or value.dtype != shapes[name].dtype:
                raise ConfigError(f"config.data: {name!r} of {split} is {value.dtype} {value.shape[1:]}, which differs from the other splits.")
    for name, wanted in experiment.task.batch.items():
        got = shapes[name].shape[1:]
        if len(got) != len(wanted) or any(w is not None and w != g for w, g in zip(wanted, got, strict=True)):
            raise ConfigError(f"config.task: {name!r} must have the shape {wanted}, but has {got} in the data.")
    if experiment.config["partition"] == "pmap" and experiment.task.across_rows:
        raise ConfigError(
            f"config.partition=pmap: {experiment.config['task']['name']!r} combines rows across a batch (mixup, cutmix, contrastive loss), but with pmap a device has only its own rows."
        )
    with as_config_error("config.model"):
        experiment.state_shapes()
    _check_best(experiment)


def _check_best(experiment: Experiment) -> None:
    """Raise ConfigError unless `checkpoint.best` is a metric of the task, with a known direction, on a split that validates."""
    if experiment.best is None:
        return
    best, (split, metric) = experiment.checkpoint.best, experiment.best
    sets = evaluation_sets.of(experiment.dataset.splits, "validation")
    if not sets:
        raise ConfigError(f"config.checkpoint.best={best!r} needs a validation split; the data has {', '.join(experiment.dataset.splits)}.")
    state = experiment.state_shapes()
    shapes = experiment.eval_metric_shapes(state.weights, state.stats)
    given = experiment.task.summarize(dict.fromkeys((*shapes, *experiment.task.scores), 1.0))
    if metric not in given or split not in sets:
        names = [f"{name.partition('/')[2]}/{each}".lstrip("/") for name in sets for each in given]
        task = experiment.config["task"]["name"]
        lacking = f"the task {task!r} has no metric {best!r}" if split in sets else f"the data has no main validation split for {best!r}"
        raise ConfigError(f"config.checkpoint.best: {lacking}; it has {', '.join(names)}.{config_lib.suggest(best, names)}")
    experiment.task.prefers_higher(metric)
