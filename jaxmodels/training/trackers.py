"""Trackers: where metrics and samples are written."""

import contextlib
import sys
from collections.abc import Mapping

from jaxmodels.runs.folder import RunFolder


class JsonLines:
    """Appends metrics to `metrics.jsonl`, one object a line."""

    def __init__(self, folder: RunFolder):
        self._folder = folder

    def write(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """One line, with the kernel at once."""
        self._folder.add_metrics(step, split, values)

    def text(self, step: int, name: str, content: str) -> None:
        """Texts are not metrics; they have a file of their own."""

    def close(self) -> None:
        """Nothing stays open."""


class Samples:
    """Appends made-up texts to `samples.txt`."""

    def __init__(self, folder: RunFolder):
        self._path = folder.samples_file

    def write(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Metrics are not texts."""

    def text(self, step: int, name: str, content: str) -> None:
        """One text under a heading."""
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(f"--- step {step} ---\n{content}\n\n")

    def close(self) -> None:
        """Nothing stays open."""


@contextlib.contextmanager
def _without(module: str):
    """As if a module were not installed, for what can do without; nothing where it is imported already."""
    hide = module not in sys.modules
    if hide:
        sys.modules[module] = None
    try:
        yield
    finally:
        if hide:
            del sys.modules[module]


class TensorBoard:
    """Event files that TensorBoard reads, written without TensorFlow."""

    def __init__(self, folder: RunFolder, step: int):
        with _without("torch"):  # which it would import where that happens to be installed, for two seconds, and not use
            from tensorboardX import SummaryWriter

        # What an earlier start wrote after this step is hidden: it is written again.
        self._writer = SummaryWriter(str(folder.tensorboard), purge_step=step + 1)

    def write(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """One scalar for each value, `split/name`."""
        for name, value in values.items():
            self._writer.add_scalar(f"{split}/{name}", value, step)

    def text(self, step: int, name: str, content: str) -> None:
        """A text panel."""
        self._writer.add_text(name, content, step)

    def close(self) -> None:
        """Flushes and closes."""
        self._writer.close()
