"""Saving that may fail: a run whose disk is full says so in one line, goes on, and tries again."""

import time
from collections.abc import Callable

from jaxmodels.distributed import session
from jaxmodels.experiment.experiment import Experiment
from jaxmodels.runs import disk
from jaxmodels.runs.checkpoint import Checkpoints, Progress, SaveFailed
from jaxmodels.runs.folder import RunFolder
from jaxmodels.step.state import TrainState
from jaxmodels.training import changes
from jaxmodels.training.watchdog import Watchdog

_FIRST_PAUSE, _LONGEST_PAUSE = 10.0, 600.0  # seconds between attempts while the run goes on; doubled after each
_LAST_PAUSE = 1.0  # seconds before the second attempt to save the last state; doubled after each


def open_checkpoints(
    experiment: Experiment, folder: RunFolder, shapes: TrainState, say: Callable[..., None], watchdog: Watchdog, may_write: Callable[[], None]
) -> tuple[Checkpoints, "Saver"]:
    """Open the checkpoints of a run for training; say for how many the disk has room.

    Args:
      experiment, folder: of the run.
      shapes: of the state.
      say: function that prints a line, with a style.
      watchdog: of the run.
      may_write: as of `Checkpoints`.
    """
    options = experiment.checkpoint
    checkpoints = Checkpoints(
        folder.checkpoints,
        keep=options.keep,
        every=options.every,
        parents=lambda: {child["step"] for child in folder.children()},
        save_frozen=not experiment.frozen_in_parent,
        checksums=options.checksums,
        may_write=may_write,
        as_saved=changes.as_saved(experiment, folder),
    )
    line, enough = disk.room(folder.checkpoints, checkpoints.saved_parts(shapes), options.keep)
    say(line, style="dim" if enough else "yellow")
    return checkpoints, Saver(checkpoints, say, watchdog)


def step_to_test(progress: Progress, checkpoints: Checkpoints, latest: int, warn: Callable[[str], None]) -> int:
    """Return the best step; the latest if none is tracked, or, with a warning, if the checkpoint of the best step is missing."""
    best = progress.best_step
    if best is None or best in checkpoints.steps():
        return latest if best is None else best
    warn(f"the checkpoint of the best step {best} is missing in {checkpoints.folder}; testing the latest one, of step {latest}, instead")
    return latest


class Saver:
    """Saves checkpoints in the background and looks after them. All processes of a run call each method together."""

    def __init__(self, checkpoints: Checkpoints, say: Callable[..., None], watchdog: Watchdog):
        """
        Args:
          checkpoints: of the run; nobody else saves there.
          say: function that prints a line, with a style.
          watchdog: of the run; has a time limit for what waits for the disk.
        """
        self._checkpoints, self._say, self._watchdog = checkpoints, say, watchdog
        self._step: int | None = None  # saved last, until it is known how that ended
        self._problem: str | None = None  # of that save, in this process
        self._failed, self._next = 0, 0.0  # attempts that have failed since the last checkpoint that is whole; when to try again

    def save(self, state: TrainState, progress: Progress) -> None:
        """Start saving a state. Waits for the save before this one. A failure is said later, not raised; see `is_due` and `finish`."""
        self.settle()
        self._step = int(state.step)
        try:
            with self._watchdog.phase("save"):
                self._checkpoints.save(state, progress)
        except SaveFailed as error:
            self._problem = str(error)

    def is_due(self) -> bool:
        """Return whether the last save failed and it is time to save again. Call this at each log line; it waits for no disk."""
        if self._step is not None:
            self._look()
        if self._step is not None or not self._failed:
            return False
        return session.gather("save again", time.monotonic() >= self._next)[0]

    def settle(self) -> None:
        """Wait for the save that is going on; say whether it failed."""
        if self._step is not None:
            with self._watchdog.phase("save"):
                self._look(wait=True)

    def _look(self, *, wait: bool = False) -> None:
        """Say how the last save ended, if it has ended in all processes; with `wait`, when it has."""
        saving = self._checkpoints.saving() and not wait
        if not saving:
            try:
                self._checkpoints.wait()
            except SaveFailed as error:
                self._problem = str(error)
        ends = session.gather("saved", [saving, self._problem])
        if any(saving for saving, _ in ends):
            return
        step, self._step, self._problem = self._step, None, None
        problem = next((problem for _, problem in ends if problem), None)
        if problem is None:
            if self._failed:
                self._say(f"checkpoint {step} is saved, after {self._failed} failed attempt{'s' if self._failed > 1 else ''}")
            self._failed = 0
            return
        pause = min(_FIRST_PAUSE * 2**self._failed, _LONGEST_PAUSE)
        self._failed, self._next = self._failed + 1, time.monotonic() + pause
        self._say(f"warning: {problem}. {self._latest()}; the next attempt is in {pause:.0f} s", style="yellow")

    def finish(self, step: int, save: Callable[[], None], attempts: int) -> None:
        """Return when the checkpoint of a step is whole: wait for it, and save it if it is not there.

        Args:
          step: of the state.
          save: calls `save` of this object with the state.
          attempts: how often to save before giving up.

        Raises:
          SaveFailed: it could not be saved.
        """
        for attempt in range(attempts + 1):
            self.settle()
            if session.gather("whole", step in self._checkpoints.steps())[0]:
                return
            if attempt < attempts:
                if attempt:
                    time.sleep(_LAST_PAUSE * 2 ** (attempt - 1))
                save()
        raise SaveFailed(f"the state of step {step} could not be saved. {self._latest()}. Make room, and the same command goes on from there.")

    def _latest(self) -> str:
        steps = self._checkpoints.steps()
        return f"The latest checkpoint is that of step {steps[-1]}" if steps else "There is no checkpoint"

    def close(self) -> None:
        """Wait for this process's part of the last save, say whether it failed, and stop Orbax's threads.

        Asks nothing of the other processes: after an error they are elsewhere, and end when this one has ended.
        """
        with self._watchdog.phase("save"):
            try:
                self._checkpoints.close()
            except SaveFailed as error:
                self._say(f"warning: {error}. {self._latest()}", style="yellow")
