"""Check that data, task, model and optimizer fit each other, before a device starts."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxmodels.data.source import Dataset, get_batch
from jaxmodels.errors import ConfigError
from jaxmodels.experiment.experiment import Experiment, as_config_error
from jaxmodels.models.lora import ADAPTERS
from jaxmodels.step.parameters import paths


def is_trained(config: Mapping, path: str) -> bool:
    """Whether a resolved config trains the parameter of a path: by `training.trainable`, `training.freeze` and `lora`."""
    trainable = config["training"]["trainable"]
    if config["lora"] is not None:
        trainable = (*(rf"{name}$" for name in ADAPTERS), *(trainable or ()))
    chosen = trainable is None or any(re.search(pattern, path) for pattern in trainable)
    return chosen and not any(re.search(pattern, path) for pattern in config["training"]["freeze"])


def check_trained(config: Mapping, paths: list[str]) -> None:
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


def check_train_split(dataset: Dataset, section: Mapping) -> None:
    if "train" not in dataset.splits:
        raise ConfigError(f"config.data: {section['source']!r} gives no train split, only {', '.join(dataset.splits)}.")
    size = len(dataset.splits["train"])
    if size < section["batch_size"]:
        raise ConfigError(f"config.data.batch_size={section['batch_size']} is more than the {size} training examples of {section['source']!r}.")


def agreed_info(info: Mapping, trained: Mapping) -> Mapping:
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


def check_skip(init_from: Mapping | None, params: Any) -> None:
    for pattern in init_from["skip"] if init_from else ():
        if not any(re.match(pattern, path) for path in paths(params)):
            raise ConfigError(f"config.init_from.skip: {pattern!r} matches no parameter of the model.")


def check_fit(experiment: Experiment) -> None:
    """Runs model and loss on shapes alone, so that what does not fit is said now."""
    shapes = experiment.batch_shapes(experiment.loading.batch_size)
    for split, source in experiment.dataset.splits.items():
        example = get_batch(source, np.array([0]))
        missing = [name for name in experiment.task.batch if name not in example]
        if missing:
            raise ConfigError(f"config.task: {experiment.config['task']['name']!r} needs {missing[0]!r} in every example; {split} has none.")
        for name, value in example.items():
            if name == "weight":
                continue  # the loader makes it what it is in every batch
            if name == "index":
                raise ConfigError(f"config.data: the array 'index' of {split} needs another name: in evaluation it is the rows' index in their split.")
            if name not in shapes or value.shape[1:] != shapes[name].shape[1:] or value.dtype != shapes[name].dtype:
                raise ConfigError(f"config.data: {name!r} of {split} is {value.dtype} {value.shape[1:]}: not as in the other splits.")
    for name, wanted in experiment.task.batch.items():
        got = shapes[name].shape[1:]
        if len(got) != len(wanted) or any(w is not None and w != g for w, g in zip(wanted, got, strict=True)):
            raise ConfigError(f"config.task: {name!r} should have the shape {wanted}, but has {got} in the data.")
    if experiment.config["partition"] == "pmap" and experiment.task.across_rows:
        raise ConfigError(
            f"config.partition=pmap: {experiment.config['task']['name']!r} goes by all rows of a batch (mixup, cutmix, contrast); pmap shows a device its own."
        )
    with as_config_error("config.model"):
        experiment.state_shapes()
    _check_best(experiment)


def _check_best(experiment: Experiment) -> None:
    """Raise ConfigError unless `checkpoint.best` is a metric of the task, of known direction, and there is a validation split."""
    best = experiment.checkpoint.best
    if best is None:
        return
    if "validation" not in experiment.dataset.splits:
        raise ConfigError(f"config.checkpoint.best={best!r} needs a validation split; the data has {', '.join(experiment.dataset.splits)}.")
    state = experiment.state_shapes()
    shapes = experiment.eval_metric_shapes(state.weights, state.stats)
    given = experiment.task.summarize(dict.fromkeys((*shapes, *experiment.task.scores), 1.0))
    if best not in given:
        raise ConfigError(f"config.checkpoint.best: the task {experiment.config['task']['name']!r} gives no {best!r}; it gives {', '.join(given)}.")
    experiment.task.prefers_higher(best)
