"""What is learned. A task is one file: it builds the model a data set needs, and gives losses and metrics.

Losses and metrics are pairs (sum, weight), so that padding, accumulation and many devices are exact:
the value is the sum of all sums over the sum of all weights.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import jax
from flax import nnx

from jaxmodels import config as config_lib
from jaxmodels.errors import ConfigError

Metrics = dict[str, tuple[jax.Array, jax.Array]]

TASKS = {
    "classify": "jaxmodels.tasks.classify:Classify",
    "classify_text": "jaxmodels.tasks.classify_text:ClassifyText",
    "contrast": "jaxmodels.tasks.contrast:Contrast",
    "forecast": "jaxmodels.tasks.forecast:Forecast",
    "language_model": "jaxmodels.tasks.language_model:LanguageModel",
    "masked_lm": "jaxmodels.tasks.masked_lm:MaskedLM",
    "regress_text": "jaxmodels.tasks.regress_text:RegressText",
    "seq2seq": "jaxmodels.tasks.seq2seq:Seq2Seq",
    "tag": "jaxmodels.tasks.tag:Tag",
    "transcribe": "jaxmodels.tasks.transcribe:Transcribe",
}


class Task(Protocol):
    """What the train step and the trainer ask of a task.

    A task is constructed with the data set's `info` and then its keyword-only arguments, the `task` section.

    Attributes:
      provides: what it gives a model's positional parameters: `{"vocab_size": 65}`.
      batch: the arrays it needs of an example: name -> shape, None where any size will do.

    A score that is no mean over examples (entity F1, BLEU) is made on the host, from all rows of a split. A task that has
    such ones names them in an attribute `scores`, a tuple, and has two methods more:

      outputs(model, batch) -> dict of arrays [B, ...]: what the score is made from, small: token numbers, not logits.
        A part of the compiled evaluation step.
      score(outputs) -> dict of floats, a value for each of `scores`: outputs are NumPy arrays of all real rows, in order.
    """

    provides: Mapping[str, Any]
    batch: Mapping[str, tuple[int | None, ...]]

    def predict(self, model: nnx.Module, batch: Mapping[str, jax.Array]) -> Any:
        """What the model says of a batch, in a form people use."""

    def loss(self, model: nnx.Module, batch: Mapping[str, jax.Array], rngs: nnx.Rngs) -> tuple[jax.Array, jax.Array, Metrics]:
        """The training loss as (sum, weight), and metrics."""

    def metrics(self, model: nnx.Module, batch: Mapping[str, jax.Array]) -> Metrics:
        """The metrics of evaluation."""

    def summarize(self, values: Mapping[str, float]) -> dict[str, float]:
        """Metrics that are functions of others (`perplexity` of `loss`), added to them."""


def find(name: str):
    """The class of a named task; ConfigError lists them."""
    return config_lib.find("task.name", TASKS, name)


def require(info: Mapping, task_name: str, wants: str, *keys: str) -> None:
    """Raises ConfigError unless the data set says of itself what a task is made from."""
    for key in keys:
        if key not in info:
            raise ConfigError(f"config.task: {task_name!r} needs {wants}; this data source gives no {key}.")


def scores(task: Task) -> tuple[str, ...]:
    """Names of the metrics that a task scores on the host; none for most."""
    return tuple(getattr(task, "scores", ()))


def model_arguments(constructor, provides: Mapping[str, Any], model_name: str, task_name: str) -> tuple:
    """The positional arguments of a model, from what a task provides.

    Raises:
      ConfigError: the model wants something that the task does not have; says which models fit.
    """

    def fits(wanted: list[str]) -> bool:
        # A model without a head cannot do what a task wants of one, whatever else it is made from.
        return set(wanted) <= set(provides) and ("head" in wanted) == ("head" in provides)

    wanted = config_lib.positional(constructor)
    if fits(wanted):
        return tuple(provides[name] for name in wanted)
    from jaxmodels import models

    fitting = [n for n in models.MODELS if fits(config_lib.positional(models.find(n)[0]))]
    raise ConfigError(
        f"config.model.name: {model_name!r} is made from ({', '.join(wanted)}), but the task {task_name!r} "
        f"gives ({', '.join(provides)}). Models that fit it: {', '.join(fitting)}."
    )
