"""Tasks by name. A task is one file: it provides the sizes that a model is built with, and computes losses, metrics and predictions."""

import inspect
from collections.abc import Mapping
from typing import Any

from jaxmodels import config as config_lib
from jaxmodels import models
from jaxmodels.errors import ConfigError
from jaxmodels.tasks.base import Metrics, Sample, Task

__all__ = ["TASKS", "Metrics", "Sample", "Task", "find", "make", "model_arguments"]

TASKS = {
    "classify": "jaxmodels.tasks.classify:Classify",
    "classify_text": "jaxmodels.tasks.classify_text:ClassifyText",
    "contrast": "jaxmodels.tasks.contrast:Contrast",
    "forecast": "jaxmodels.tasks.forecast:Forecast",
    "language_model": "jaxmodels.tasks.language_model:LanguageModel",
    "masked_lm": "jaxmodels.tasks.masked_lm:MaskedLM",
    "regress_text": "jaxmodels.tasks.regress_text:RegressText",
    "several_classes": "jaxmodels.tasks.several_classes:SeveralClassesOfImages",
    "several_classes_of_text": "jaxmodels.tasks.several_classes:SeveralClassesOfText",
    "seq2seq": "jaxmodels.tasks.seq2seq:Seq2Seq",
    "tag": "jaxmodels.tasks.tag:Tag",
    "transcribe": "jaxmodels.tasks.transcribe:Transcribe",
}

# Methods that must come together: with the first, a task needs the second.
_PAIRS = (("samples", "show(outputs)"), ("score", "outputs(model, batch, key)"), ("outputs", "score(outputs)"))
_SIGNATURES = {"loss": "loss(model, batch, rngs)", "evaluate": "evaluate(model, batch, key)"}


def find(name: str) -> type[Task]:
    """Return the class of a task: one of TASKS, or `package.module:Class`.

    Raises:
      ConfigError: there is no such task, it is no subclass of Task, or it lacks a method.
    """
    found = config_lib.find("task.name", TASKS, name)
    if not (inspect.isclass(found) and issubclass(found, Task)):
        raise ConfigError(
            f"config.task.name: {name!r} is no subclass of jaxmodels.tasks.Task. "
            f"Write `class {found.__name__}(jaxmodels.tasks.Task)` with the methods {' and '.join(_SIGNATURES.values())}."
        )
    for method in sorted(found.__abstractmethods__):
        hint = ", which replaces metrics(model, batch)" if method == "evaluate" and hasattr(found, "metrics") else ""
        raise ConfigError(f"config.task.name: the task {name!r} lacks the method {_SIGNATURES[method]}{hint}.")
    for method, needed in _PAIRS:
        if _defines(found, method) and not _defines(found, needed.partition("(")[0]):
            raise ConfigError(f"config.task.name: the task {name!r} defines {method} and lacks the method {needed}.")
    return found


def make(name: str, info: Mapping[str, Any], arguments: Mapping[str, Any]) -> Task:
    """Return a task.

    Args:
      name: as for `find`.
      info: of the data set.
      arguments: of the config's `task` section, without the name.

    Raises:
      ConfigError: as `find`; an argument makes no sense; the task has scores and no method that computes them.
    """
    task = find(name)(info, **arguments)
    if task.scores and not _defines(type(task), "score"):
        raise ConfigError(f"config.task.name: the task {name!r} has the scores {', '.join(task.scores)} and lacks the method score(outputs).")
    return task


def _defines(task: type[Task], method: str) -> bool:
    return getattr(task, method) is not getattr(Task, method)


def model_arguments(constructor, provides: Mapping[str, Any], model_name: str, task_name: str) -> tuple:
    """Return the positional arguments of a model, from what a task provides.

    Raises:
      ConfigError: the model has a positional parameter that the task does not provide. Names the models that fit.
    """

    def fits(wanted: list[str]) -> bool:
        # A task that provides a head needs a model that takes one, even where all other parameters match.
        return set(wanted) <= set(provides) and ("head" in wanted) == ("head" in provides)

    wanted = config_lib.positional(constructor)
    if fits(wanted):
        return tuple(provides[name] for name in wanted)
    fitting = [n for n in models.MODELS if fits(config_lib.positional(models.find(n)[0]))]
    raise ConfigError(
        f"config.model.name: {model_name!r} needs ({', '.join(wanted)}), but the task {task_name!r} "
        f"provides ({', '.join(provides)}). Models that fit it: {', '.join(fitting)}."
    )
