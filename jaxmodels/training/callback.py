"""Callbacks: hooks around the training step.

A callback is any object with some of the methods of `Callback`. A config names callbacks with their keyword arguments:

    callbacks = ({"name": "my_project.hooks:GradientNoise", "every": 100},)

From Python: `jaxmodels.train(config, workdir, callbacks=[GradientNoise(every=100)])`.
"""

from collections.abc import Mapping
from typing import Any, Literal, Protocol

import jax


class Callback:
    """Base class with methods that do nothing. Override what is needed.

    Attributes:
      processes: where the callback runs when a run has several processes: on the `first`, or on `all`.
      on_error: what happens when a method raises: the run stops with what it has saved (`stop`), or continues without this callback (`continue`).
    """

    processes: Literal["first", "all"] = "first"
    on_error: Literal["stop", "continue"] = "stop"

    def on_start(self, run: "RunContext") -> None:
        """Called once, after the state is initialised or restored and before the first step."""

    def on_step(self, run: "RunContext", step: int, metrics: Mapping[str, Any]) -> None:
        """Called after each step is dispatched. `metrics` are device values: reading them waits for the device, so don't."""

    def on_log(self, run: "RunContext", step: int, values: dict[str, float]) -> None:
        """Called before a line of training metrics is written. Entries that are added to `values` are written too."""

    def on_evaluate(self, run: "RunContext", step: int, split: str, values: dict[str, float]) -> None:
        """Called before the metrics of a split are written. Entries that are added to `values` are written too.

        At each evaluation it is called for `validation`, with empty values where the data has no such split, and then for each further set,
        `validation/NAME`; at the end for `test` and each `test/NAME`.
        """

    def on_media(self, run: "RunContext", step: int, name: str, media: Any, kind: str, **options: Any) -> None:
        """Called for each image, text, audio clip or figure that is shown, with the arguments of `RunContext.media`."""

    def on_save(self, run: "RunContext", step: int) -> None:
        """Called when a checkpoint is requested, before its state is copied."""

    def on_end(self, run: "RunContext", result: Any) -> None:
        """Called once at the end: with the `Result` of a run that finished, or None where it stopped early or failed."""

    def state(self) -> Any:
        """Return what the callback needs to go on after a resume, as JSON values. It is stored in each checkpoint."""
        return None

    def restore(self, state: Any) -> None:
        """Take up the state of the checkpoint that the run resumes from. Called before `on_start`, and only if there is one."""


class RunContext(Protocol):
    """What a callback sees of a run, and what it can ask for.

    Attributes:
      experiment: the config's data, task, model and optimizer.
      folder: the run folder.
      mesh: the devices.
      state: the train state after the latest step; donated to the next step, so do not keep it.
      step: the latest step.
      step_started: `time.perf_counter()` when the latest step was dispatched.
      resumed: whether an earlier start of the run trained some steps.
    """

    experiment: Any
    folder: Any
    mesh: jax.sharding.Mesh
    state: Any
    step: int
    step_started: float
    resumed: bool

    def log(self, values: Mapping[str, float]) -> None:
        """Add values to the line of metrics that is written next."""

    def media(self, name: str, media: Any, kind: Literal["text", "images", "audio", "figure"], **options: Any) -> None:
        """Show a sample.

        Args:
          name: of the sample, such as `sample`.
          media: by `kind`: a string; images, uint8 or float in [0, 1] of [H, W, C] or [N, H, W, C]; audio, float in [-1, 1] of [T] or
            [N, T]; a Matplotlib figure.
          kind: what it is.
          options: `rate`, samples per second, for audio.
        """

    def warn(self, message: str) -> None:
        """Print a warning, and record it in the manifest."""

    def say(self, message: str) -> None:
        """Print a line."""

    def record(self, values: Mapping[str, Any]) -> None:
        """Record values in the manifest, in the entry of this start."""

    def save(self) -> None:
        """Ask for a checkpoint of the current step. With several processes it is written at the next log line, evaluation or checkpoint."""

    def stop(self, reason: str) -> None:
        """Ask the run to end as if it had reached its last step. With several processes it ends at the next log line, evaluation or checkpoint."""
