"""The result of a run."""

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Result:
    """How a run ended.

    Attributes:
      workdir: the run's folder.
      step: the last step trained.
      evaluated_step: the step whose weights were tested: the best if one is tracked, else the last.
      metrics: the final ones by split: `result.metrics["test"]["accuracy"]`.
      seconds: spent training, over all starts.
    """

    workdir: str
    step: int
    evaluated_step: int
    metrics: Mapping[str, Mapping[str, float]]
    seconds: float
