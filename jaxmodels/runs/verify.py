"""Verification of a run's checkpoints: each array is read and compared with its checksum."""

import dataclasses
from collections.abc import Iterator

from jaxmodels.errors import RunError
from jaxmodels.runs.checkpoint import Checkpoints, open_checkpoints

_AT_ONCE = 1 << 28  # bytes


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What is known of one checkpoint.

    Attributes:
      step: of the checkpoint.
      arrays: number of arrays.
      bytes: size of the arrays in memory.
      has_checksums: False for checkpoints of earlier versions, and with checkpoint.checksums=False.
      problems: one line for each array that cannot be read or differs from its checksum, or for the whole checkpoint.
    """

    step: int
    arrays: int
    bytes: int
    has_checksums: bool
    problems: tuple[str, ...]


def verify(run: str) -> Iterator[Verdict]:
    """Verify the checkpoints of `RUN`, oldest first, or that of `RUN@WHICH`. Writes nothing.

    Raises:
      ConfigError: no such run, or no such checkpoint in it.
    """
    folder, checkpoints, which = open_checkpoints(run)
    try:
        for step in checkpoints.steps() if which is None else [checkpoints.find(which)]:
            verdict = _verify_step(checkpoints, step)
            if not verdict.problems or (folder.checkpoints / str(step)).exists():  # else a run that goes on has deleted it meanwhile
                yield verdict
    finally:
        checkpoints.close()


def _verify_step(checkpoints: Checkpoints, step: int) -> Verdict:
    try:
        has_checksums = checkpoints.checksums(step) is not None
        arrays = list(checkpoints.check(step, _AT_ONCE))
    except RunError as error:
        return Verdict(step, 0, 0, False, (str(error),))
    problems = tuple(f"{path}: {problem}" for path, _, problem in arrays if problem is not None)
    return Verdict(step, len(arrays), sum(size for _, size, _ in arrays), has_checksums, problems)
