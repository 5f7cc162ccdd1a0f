"""Examples that cannot be used: either an error that names file and line, or left out and counted."""

from collections.abc import Mapping
from typing import Literal

import numpy as np

from jaxmodels.errors import ConfigError

Policy = Literal["error", "skip"]


class BadExample(ConfigError):
    """An example cannot be used."""

    def __init__(self, where: str, problem: str):
        """
        Args:
          where: file and line.
          problem: what is wrong, and what to do.
        """
        super().__init__(f"{where}: {problem} (data.on_bad_example=skip leaves such examples out.)")
        self._parts = where, problem

    def __reduce__(self):  # worker processes pickle what they raise
        return BadExample, self._parts


class Skipping:
    """Policy for bad examples while a data set is opened.

    Attributes:
      counts: split -> number left out.
    """

    def __init__(self, policy: Policy):
        self.policy, self.counts, self._first = policy, {}, {}

    def bad(self, split: str, where: str, problem: str) -> None:
        """Count an example that cannot be used.

        Args:
          split: the example's split.
          where: file and line.
          problem: what is wrong, and what to do.

        Raises:
          BadExample: with the policy `error`.
        """
        if self.policy == "error":
            raise BadExample(where, problem)
        self.counts[split] = self.counts.get(split, 0) + 1
        self._first.setdefault(split, f"{where}: {problem}")

    def check_rest(self, split: str, rest: int) -> None:
        """Raise ConfigError if no example of a split is left."""
        if not rest and split not in self.counts:
            raise ConfigError(f"config.data: the files of {split} hold no example.")
        if not rest:
            raise ConfigError(f"config.data: all {self.counts[split]} examples of {split} are bad; the first: {self._first[split]}")

    def notes(self) -> tuple[str, ...]:
        """Return warnings for the start of a run."""
        return tuple(
            f"warning: {count:,} bad example{'s' if count > 1 else ''} of {split} left out; the first: {self._first[split]}"
            for split, count in self.counts.items()
        )


class Forgiving:
    """Another source, with examples that raise BadExample on reading replaced by `blank`.

    They cannot be removed without reading all examples. Each example has an additional array `skipped`, 1.0 or 0.0: the loader
    sets the row's weight to 0 by it, and the step counts it.
    """

    def __init__(self, source, blank: Mapping[str, np.ndarray]):
        self.source, self.blank = source, dict(blank)
        if hasattr(source, "fingerprint"):
            self.fingerprint = source.fingerprint

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        try:
            return dict(self.source[index]) | {"skipped": np.float32(0)}
        except BadExample:
            return self.blank | {"skipped": np.float32(1)}
