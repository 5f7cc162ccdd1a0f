"""The page of progress in each checkpoint, beside the arrays, with their checksums."""

import dataclasses
import json
import zlib
from collections.abc import Mapping
from typing import Any

from jaxmodels.runs.checksums import Damaged


@dataclasses.dataclass(frozen=True)
class Progress:
    """The progress of a run, saved in each checkpoint beside the arrays.

    Attributes:
      evaluated_at: the last evaluated step.
      best: best value so far of the metric `checkpoint.best`.
      best_step: the step of `best`.
      without_improvement: number of evaluations since `best_step`.
      finished: whether training is complete.
      seconds: training time, over all starts.
      callbacks: state of each callback, by its name.
      position: place of the next example in the sequence of all epochs; None in checkpoints of earlier versions.
      config: the resolved config that the last step was trained with, as JSON values; None likewise.
    """

    evaluated_at: int = 0
    best: float | None = None
    best_step: int | None = None
    without_improvement: int = 0
    finished: bool = False
    seconds: float = 0.0
    callbacks: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    position: int | None = None
    config: Mapping[str, Any] | None = None

    def after(self, step: int, value: float, better: bool, patience: int | None) -> "Progress":
        """Return the progress after an evaluation.

        Args:
          step: the evaluated step.
          value: value of the metric that selects the best checkpoint.
          better: whether it is better than the best so far.
          patience: evaluations without improvement after which the run is finished; None for no limit.
        """
        if better:
            return dataclasses.replace(self, best=value, best_step=step, without_improvement=0)
        without = self.without_improvement + 1
        return dataclasses.replace(self, without_improvement=without, finished=self.finished or (patience is not None and without >= patience))


def to_page(progress: Progress, checksums: Mapping[str, str] | None) -> dict[str, Any]:
    """Return the progress as JSON values, with the checksums of the arrays (`checksums.of`) if there are any, and one of the page itself."""
    page = dataclasses.asdict(progress) | ({} if checksums is None else {"checksums": dict(checksums)})
    return page | {"crc32": _crc32(page)}


def from_page(page: Mapping[str, Any]) -> tuple[Progress, dict[str, str] | None]:
    """Return the progress and the checksums of a page; None for those of a version that wrote none.

    Raises:
      Damaged: the page differs from what was written.
    """
    values = dict(page)
    crc32, checksums = values.pop("crc32", None), None
    if crc32 is not None and crc32 != _crc32(values):
        raise Damaged("its page of progress differs from its checksum")
    checksums = values.pop("checksums", None)
    return Progress(**values), checksums


def _crc32(page: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(page, sort_keys=True).encode())
