"""Examples that cannot be used: an error that names the place, or left out and counted."""

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
          problem: what is wrong with it, and the next thing to try.
        """
        super().__init__(f"{where}: {problem} (data.on_bad_example=skip leaves such examples out.)")
        self._parts = where, problem

    def __reduce__(self):  # the processes that read ahead send what they raise
        return BadExample, self._parts


class Skipping:
    """What becomes of bad examples while a data set is opened.

    Attributes:
      counts: split -> how many were left out.
    """

    def __init__(self, policy: Policy):
        self.policy, self.counts, self._first = policy, {}, {}

    def bad(self, split: str, where: str, problem: str) -> None:
        """An example that cannot be used.

        Args:
          split: it would be in.
          where: file and line.
          problem: what is wrong with it, and the next thing to try.

        Raises:
          BadExample: unless such examples are to be left out.
        """
        if self.policy == "error":
            raise BadExample(where, problem)
        self.counts[split] = self.counts.get(split, 0) + 1
        self._first.setdefault(split, f"{where}: {problem}")

    def check_rest(self, split: str, rest: int) -> None:
        """Raises ConfigError if nothing of a split is left."""
        if not rest and split not in self.counts:
            raise ConfigError(f"config.data: the files of {split} hold no example.")
        if not rest:
            raise ConfigError(f"config.data: all {self.counts[split]} examples of {split} are bad; the first: {self._first[split]}")

    def notes(self) -> tuple[str, ...]:
        """Lines to say once, at the start of a run."""
        return tuple(
            f"warning: {count:,} bad example{'s' if count > 1 else ''} of {split} left out; the first: {self._first[split]}"
            for split, count in self.counts.items()
        )


class Forgiving:
    """Another source, of which examples that raise BadExample when they are read count for nothing.

    Their place cannot be given to others without reading all, so each is `blank`. Examples have an array `skipped` more, 1.0 or 0.0,
    which the loader turns into the row's weight and the step counts.
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
