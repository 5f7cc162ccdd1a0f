"""Trackers: where metrics and samples are written."""

import contextlib
import sys
from collections.abc import Mapping

from jaxmodels.training.callback import Callback


def make_trackers(section) -> list[Callback]:
    """Build the trackers of the section `log`."""
    return [JsonLines(), *([TensorBoard()] if section.tensorboard else [])]


class JsonLines(Callback):
    """Appends metrics to `metrics.jsonl` and texts to `samples.txt`."""

    on_error = "continue"

    def on_log(self, run, step, values):
        run.folder.add_metrics(step, "train", values)

    def on_evaluate(self, run, step, split, values):
        if values:
            run.folder.add_metrics(step, split, values)

    def on_media(self, run, step, name, media, kind, **_):
        if kind == "text":
            with open(run.folder.samples_file, "a", encoding="utf-8") as file:
                file.write(f"--- step {step} ---\n{media}\n\n")


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


class TensorBoard(Callback):
    """Event files that TensorBoard reads, written without TensorFlow."""

    on_error = "continue"

    def on_start(self, run):
        with _without("torch"):  # which it would import where that happens to be installed, for two seconds, and not use
            from tensorboardX import SummaryWriter

        # What an earlier start wrote after this step is hidden: it is written again.
        self._writer = SummaryWriter(str(run.folder.tensorboard), purge_step=run.step + 1)

    def on_log(self, run, step, values):
        self._write(step, "train", values)

    def on_evaluate(self, run, step, split, values):
        self._write(step, split, values)

    def _write(self, step: int, split: str, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(f"{split}/{name}", value, step)

    def on_media(self, run, step, name, media, kind, **_):
        if kind == "text":
            self._writer.add_text(name, media, step)

    def on_end(self, run, result):
        self._writer.close()
