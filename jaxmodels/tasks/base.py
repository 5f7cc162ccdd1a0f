"""The base class of tasks.

Losses and metrics are pairs (sum, weight), which makes padding, accumulation and several devices exact: a value is the total of all sums
divided by the total of all weights. A metric whose weights are all 0 is a count: its value is the sum.
"""

import abc
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
from flax import nnx

from jaxmodels.errors import ConfigError

Metrics = dict[str, tuple[jax.Array, jax.Array]]
Batch = Mapping[str, jax.Array]

# Whether higher values are better, for the metrics of the tasks here. A task's own metrics go into its `higher_is_better`.
HIGHER_IS_BETTER = {
    "loss": False,
    "perplexity": False,
    "mse": False,
    "mae": False,
    "huber": False,
    "accuracy": True,
    "f1": True,
    "macro_f1": True,
    "precision": True,
    "recall": True,
    "pearson": True,
    "spearman": True,
    "exact_match": True,
    "label_error_rate": False,
    "bleu": True,
    "rouge1": True,
    "rouge2": True,
    "rougeL": True,
}


class Sample(NamedTuple):
    """Something that a model generated, to be shown.

    Attributes:
      name: under which it is shown.
      kind: of `media`.
      media: a string; images, uint8 or float in [0, 1], [H, W, C] or [N, H, W, C]; audio, float in [-1, 1], [T] or [N, T]; a Matplotlib figure.
      options: `rate`, samples per second, for audio.
    """

    name: str
    kind: Literal["text", "images", "audio", "figure"]
    media: Any
    options: Mapping[str, Any] = {}


class Task(abc.ABC):
    """What a model learns: its inputs, its loss, its metrics and its predictions.

    A subclass defines `loss` and `evaluate`, and sets `provides` and `batch`. Everything else has a default. The constructor takes the data
    set's `info` and keyword-only arguments, which are the keys of the config's `task` section.

    `loss`, `evaluate`, `outputs`, `samples` and `predict` are traced and compiled. `score`, `summarize` and `show` run on the host.

    Attributes:
      provides: values for a model's positional parameters, by name: `{"vocab_size": 65}`.
      batch: shapes of the arrays that an example must have, by name; None for an axis of any size.
      across_rows: whether a row's loss depends on the other rows of its batch (mixup, contrast). Such a task does not run under pmap, which
        shows each device its own rows alone.
      exact_inputs: names of batch arrays that are not cast to the compute dtype, such as targets to predict. `weight` never is.
      scores: names of the metrics that `score` computes.
      higher_is_better: name -> whether higher values are better, for metrics that are not in `HIGHER_IS_BETTER`. A metric needs a direction
        to be `checkpoint.best`.
      shown: names of the metrics that are printed, in this order. All metrics are written to the log files. `checkpoint.best` is printed
        too.
    """

    provides: Mapping[str, Any] = {}
    batch: Mapping[str, tuple[int | None, ...]] = {}
    across_rows: bool = False
    exact_inputs: tuple[str, ...] = ("label",)
    scores: tuple[str, ...] = ()
    higher_is_better: Mapping[str, bool] = {}
    shown: tuple[str, ...] = ("loss", "accuracy")

    @abc.abstractmethod
    def loss(self, model: nnx.Module, batch: Batch, rngs: nnx.Rngs) -> tuple[jax.Array, jax.Array, Metrics]:
        """Return the training loss as (sum, weight), and training metrics.

        Args:
          model: in training mode; call it with `rngs=rngs`.
          batch: arrays with B rows, and `weight`, float [B]: 0 for rows that must not count.
          rngs: a function of the config's seed and the step.
        """

    @abc.abstractmethod
    def evaluate(self, model: nnx.Module, batch: Batch, key: jax.Array) -> Metrics:
        """Return the metrics of a batch.

        Args:
          model: in evaluation mode.
          batch: arrays with B rows, and `weight`, float [B]: 0 for rows that must not count.
          key: B keys, one for each row. A row's key is a function of the config's seed and the row's index in its split, so that a metric
            that draws from it does not depend on batch size, devices or processes.
        """

    def predict(self, model: nnx.Module, batch: Batch, key: jax.Array | None = None) -> Any:
        """Return predictions in the form that users work with.

        Args:
          model: in evaluation mode.
          batch: arrays with B rows; no `weight`, and no targets.
          key: B keys, one for each row, for predictions that are drawn; None for a fixed one.
        """
        raise NotImplementedError(f"the task {type(self).__name__} defines no predict(model, batch, key=None)")

    def outputs(self, model: nnx.Module, batch: Batch, key: jax.Array) -> dict[str, jax.Array]:
        """Return what `score` needs of a batch, arrays [B, ...]. They are copied to the host, so keep them small: token ids, not logits.

        Args:
          model, batch, key: as for `evaluate`.
        """
        raise NotImplementedError(f"the task {type(self).__name__} has scores and defines no outputs(model, batch, key)")

    def score(self, outputs: Mapping[str, Any]) -> dict[str, float]:
        """Return a value for each of `scores`: metrics that are no mean over rows, such as BLEU.

        Args:
          outputs: NumPy arrays [N, ...], one for each array of `outputs`, with all N rows of a split in order, without padding rows.
        """
        raise NotImplementedError(f"the task {type(self).__name__} has scores and defines no score(outputs)")

    def summarize(self, values: Mapping[str, float]) -> dict[str, float]:
        """Return the metrics with those added that are functions of others, such as `perplexity` of `loss`."""
        return dict(values)

    def samples(self, model: nnx.Module, key: jax.Array) -> dict[str, jax.Array]:
        """Return arrays that the model generates, such as token ids or images, to be shown at each evaluation. Empty for no samples.

        Args:
          model: in evaluation mode.
          key: one key, a function of the config's seed and the step.
        """
        return {}

    def show(self, outputs: Mapping[str, Any]) -> Sequence[Sample]:
        """Return what to show of the NumPy arrays that `samples` returned."""
        raise NotImplementedError(f"the task {type(self).__name__} has samples and defines no show(outputs)")

    def prefers_higher(self, name: str) -> bool:
        """Return whether higher values of a metric are better.

        Raises:
          ConfigError: neither `higher_is_better` nor the table of common metrics has the name.
        """
        directions = HIGHER_IS_BETTER | dict(self.higher_is_better)
        if name not in directions:
            raise ConfigError(
                f"config.checkpoint.best={name!r}: it is not known whether higher values are better; "
                f"set higher_is_better = {{{name!r}: True}} (or False) in the class {type(self).__name__}."
            )
        return bool(directions[name])

    def is_better(self, name: str, value: float, than: float | None) -> bool:
        """Return whether a value of a metric beats another. Any number beats None, and NaN beats nothing."""
        return not math.isnan(value) and (than is None or (value > than if self.prefers_higher(name) else value < than))


def one_class(info: Mapping, other: str) -> None:
    """Raise ConfigError if the rows of a data set have several classes, which the task `other` learns."""
    if info.get("several_classes"):
        raise ConfigError(f"config.task: with data.label='classes' a row has several classes; use the task {other!r}.")


def read_tokens(model: nnx.Module, batch: Batch, rngs: nnx.Rngs | None) -> jax.Array:
    """Return a model's output for `tokens`, with the `types` of two texts if the batch has them and the model tells them apart."""
    types = {"types": batch["types"]} if "types" in batch and getattr(model, "types", None) is not None else {}
    return model(batch["tokens"], **types, rngs=rngs)


def require(info: Mapping, task_name: str, wants: str, *keys: str) -> None:
    """Raise ConfigError if the data set's `info` lacks one of the keys.

    Args:
      info: of the data set.
      task_name: named in the error.
      wants: the kind of data that the task needs, for the error.
      keys: needed.
    """
    for key in keys:
        if key not in info:
            raise ConfigError(f"config.task: {task_name!r} needs {wants}; this data source gives no {key}.")
