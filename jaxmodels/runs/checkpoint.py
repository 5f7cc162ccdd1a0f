"""Checkpoints of a run, saved with Orbax: asynchronous and atomic; the latest and the best are preserved."""

import dataclasses
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from jaxmodels.distributed import session
from jaxmodels.errors import ConfigError, RunError
from jaxmodels.runs.folder import RunFolder
from jaxmodels.step.state import TrainState


@dataclasses.dataclass(frozen=True)
class Progress:
    """The progress of a run, saved in each checkpoint next to the arrays.

    Attributes:
      evaluated_at: the last evaluated step.
      best: best value so far of the metric `checkpoint.best`.
      best_step: the step of `best`.
      without_improvement: number of evaluations since `best_step`.
      finished: whether training is complete.
      seconds: training time, over all starts.
      callbacks: state of each callback, by its name.
    """

    evaluated_at: int = 0
    best: float | None = None
    best_step: int | None = None
    without_improvement: int = 0
    finished: bool = False
    seconds: float = 0.0
    callbacks: Mapping[str, Any] = dataclasses.field(default_factory=dict)

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


_CHUNK = 1 << 25  # bytes; chunk size of arrays when `at_once` limits the bytes in flight


class Checkpoints:
    """The checkpoints of one run, one folder for each step."""

    def __init__(
        self,
        folder: Path,
        *,
        keep: int = 1,
        every: int = 1,
        parents: Callable[[], set[int]] = set,
        save_frozen: bool = True,
        read_only: bool = False,
        at_once: int | None = None,
    ):
        """
        Args:
          folder: the folder `checkpoints` of the run.
          keep: number of latest checkpoints to preserve, in addition to the best one.
          every: steps between scheduled checkpoints. Others count towards `keep` only while they are the latest.
          parents: returns the steps that other runs started from; these are never deleted, nor are folders of steps that are symbolic links.
          save_frozen: whether to save frozen parameters; False if a parent run has them.
          read_only: never write or delete.
          at_once: maximum bytes in flight, at least the size of the largest array; a limit makes saving synchronous. None for no limit.
        """
        self.folder = folder
        self._policy = _Preserved(keep, every, lambda: {*parents(), *self._linked()})
        self._left_out = () if save_frozen else ("frozen",)
        if not read_only:
            self._restore_replaced()
        self._at_once = at_once
        gigabytes = None if at_once is None else at_once / 1e9 + 1e-3  # Orbax rejects an array of exactly the limit
        self._manager = ocp.CheckpointManager(
            folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=self._policy,
                read_only=read_only,
                create=not read_only,
            ),
            item_handlers={"state": ocp.PyTreeCheckpointHandler(save_device_host_concurrent_gb=gigabytes), "progress": ocp.JsonCheckpointHandler()},
        )

    def _as_dict(self, state: TrainState) -> dict:
        return {field.name: getattr(state, field.name) for field in dataclasses.fields(state) if field.name not in self._left_out}

    def _linked(self) -> set[int]:
        """Return the steps whose folders are symbolic links: somebody put them elsewhere, and Orbax cannot delete a link."""
        return {int(path.name) for path in self.folder.glob("[0-9]*") if path.name.isdigit() and path.is_symlink()}

    def steps(self) -> list[int]:
        """Return the steps that have a complete checkpoint, in ascending order."""
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState, progress: Progress) -> None:
        """Start saving a state as the checkpoint of its step. The state may be donated as soon as this returns."""
        step = int(state.step)
        replaced, replaces = self.folder / f"replaced-{step}", step in self.steps()
        if replaces:
            # Move the old checkpoint aside until the new one is complete: it may be the only one.
            self._manager.wait_until_finished()
            with session.first_goes_first("replace"):
                if session.is_first():
                    (self.folder / str(step)).rename(replaced)
            self._manager.reload()
        self._policy.best_step = progress.best_step
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=self._saved(self._as_dict(state)),
                progress=ocp.args.JsonSave(dataclasses.asdict(progress)),
            ),
            force=True,
        )
        if replaces:
            self._manager.wait_until_finished()
            if session.is_first():
                _delete(replaced)

    def _saved(self, parts: dict) -> ocp.args.PyTreeSave:
        if self._at_once is None:
            return ocp.args.PyTreeSave(parts)
        # TensorStore encodes chunks and assembles files in memory: limit the size of both.
        chunks = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=_CHUNK), parts)
        return ocp.args.PyTreeSave(parts, chunks, ocdbt_target_data_file_size=4 * _CHUNK)

    def _restore_replaced(self) -> None:
        """Restore checkpoints whose replacement was interrupted by the end of the process; delete those that were replaced."""
        with session.first_goes_first("restore replaced"):
            for replaced in self.folder.glob("replaced-*") if session.is_first() else ():
                place = self.folder / replaced.name.removeprefix("replaced-")
                _delete(replaced) if place.exists() else replaced.rename(place)

    def restore(self, step: int, shapes: TrainState) -> tuple[TrainState, Progress]:
        """Return the state at a step, each array with the sharding of its shape, and the progress.

        Parts that are not saved stay shapes.
        """
        items = self._manager.restore(
            step,
            args=ocp.args.Composite(state=_restore_args(self._as_dict(shapes)), progress=ocp.args.JsonRestore()),
        )
        return shapes.replace(**items.state), Progress(**items.progress)

    def restore_latest(self, shapes: TrainState) -> tuple[TrainState, Progress, list[str]] | None:
        """Return the latest readable checkpoint; None if there is no checkpoint.

        Returns:
          The state, the progress, and one message for each newer checkpoint that is unreadable; those are renamed, not deleted.

        Raises:
          RunError: there are checkpoints but none can be read; or with several processes, the latest cannot be read.
        """
        problems = []
        for step in reversed(session.gather("steps", self.steps())[0]):
            try:
                state, progress = self.restore(step, shapes)
            except Exception as error:  # Orbax and TensorStore raise many types for a damaged file
                if session.current() is not None:
                    # Other processes may have read their shards and wait in Orbax, so all cannot switch to an older checkpoint.
                    raise RunError(
                        f"checkpoint {self.folder / str(step)} cannot be read: {_first_line(error)}. If its files are damaged, move this "
                        "folder out of checkpoints/; the same command then resumes from the previous checkpoint."
                    ) from error
                problems.append((step, f"checkpoint {self.folder / str(step)} cannot be read: {_first_line(error)}"))
                continue
            for bad, _ in problems:
                (self.folder / str(bad)).rename(self.folder / f"unreadable-{bad}")
            self._policy.best_step = progress.best_step
            self._delete_old()
            return state, progress, [message for _, message in problems]
        if problems:
            raise RunError("; ".join(message for _, message in problems) + ". No file was changed. --overwrite deletes the run and starts anew.")
        return None

    def _delete_old(self) -> None:
        """Delete old checkpoints that remain because a process was killed right after saving a newer one."""
        with session.first_goes_first("delete old"):
            if session.is_first():
                self._manager.reload()
                steps = self.steps()
                for step in set(steps) - self._policy.preserved(steps):
                    shutil.rmtree(self.folder / str(step))
        self._manager.reload()

    def progress(self, step: int) -> Progress:
        """Return the progress stored at a step; RunError if it cannot be read."""
        try:
            return Progress(**self._manager.restore(step, args=ocp.args.Composite(progress=ocp.args.JsonRestore())).progress)
        except Exception as error:  # Orbax raises many types for a damaged file
            raise RunError(f"checkpoint {self.folder / str(step)} cannot be read: {_first_line(error)}") from error

    def shapes(self, step: int, *parts: str) -> dict:
        """Return the shapes of parts of the state (`params`, `ema`, `frozen`, `stats`) saved at a step; RunError if they cannot be read."""
        try:
            tree = self._manager.item_metadata(step).state.tree
        except Exception as error:  # Orbax raises many types for a damaged file
            raise RunError(f"checkpoint {self.folder / str(step)} cannot be read: {_first_line(error)}") from error
        as_shape = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)  # noqa: E731
        return {part: jax.tree.map(as_shape, tree.get(part) or {}) for part in parts}

    def restore_part(self, step: int, shapes: Mapping[str, Any]) -> dict:
        """Return some parts of the state at a step, or some arrays of a part; `shapes` have shardings.

        Raises:
          RunError: the checkpoint cannot be read.
        """
        args = _restore_args(dict(shapes), partial_restore=True)
        try:
            return self._manager.restore(step, args=ocp.args.Composite(state=args)).state
        except Exception as error:  # Orbax and TensorStore raise many types for a damaged file
            raise RunError(f"checkpoint {self.folder / str(step)} cannot be read: {_first_line(error)}") from error

    def find(self, which: str | None) -> int:
        """Return the step of `best`, `latest` or a number; for None, the best if there is one, else the latest.

        Raises:
          ConfigError: there is no such checkpoint; the message lists the existing steps.
          RunError: the progress of the latest checkpoint, which names the best, cannot be read.
        """
        run, steps = self.folder.parent, self.steps()
        if not steps:
            raise ConfigError(f"{run} has no checkpoint yet.")
        if which == "latest":
            return steps[-1]
        if which in (None, "best"):
            best = self.progress(steps[-1]).best_step
            if best in steps:
                return best
            if best is not None:
                raise ConfigError(
                    f"{run}: the checkpoint of the best step {best} does not exist; it has steps {steps}. Choose one: {run}@latest or {run}@STEP."
                )
            if which is None:
                return steps[-1]
            raise ConfigError(f"{run} has no best checkpoint: checkpoint.best is not set, or nothing has been evaluated; it has steps {steps}.")
        if which.isdigit() and int(which) in steps:
            return int(which)
        raise ConfigError(f"{run} has no checkpoint {which!r}; it has steps {steps}; best and latest are also allowed.")

    def wait(self) -> None:
        """Wait until the last save is on disk; raise its error if it failed."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait for the last save, and stop Orbax's threads."""
        self._manager.close()


def parse_run(reference: str) -> tuple[str, str | None]:
    """Split `RUN[@best|@latest|@STEP]` into (folder, which); `which` is None if absent."""
    match = re.fullmatch(r"(.+)@(best|latest|\d+)", reference)
    return (match[1], match[2]) if match else (reference, None)


def open_run(reference: str) -> tuple[RunFolder, Checkpoints, int]:
    """Return the folder of `RUN[@WHICH]`, its checkpoints (read-only; the caller closes them) and the step.

    Raises:
      ConfigError: no such run, or no such checkpoint in it.
    """
    path, which = parse_run(reference)
    folder = RunFolder(path)
    folder.config()
    # Check before opening a checkpoint manager: Orbax initialises the JAX backend.
    if not any(path.name.isdigit() for path in folder.checkpoints.glob("*")):
        raise ConfigError(f"{folder.path} has no checkpoint yet.")
    checkpoints = Checkpoints(folder.checkpoints, read_only=True)
    return folder, checkpoints, checkpoints.find(which)


@dataclasses.dataclass
class _Preserved(ocp.checkpoint_managers.PreservationPolicy):
    """Preserves the latest checkpoints, the best one, and those that other runs started from.

    The best step comes from `Progress`, because Orbax does not read metrics back when it opens a folder. The rule depends only on the
    steps and the progress, so an interrupted run preserves the same checkpoints as an uninterrupted one.
    """

    keep: int
    every: int
    parents: Callable[[], set[int]]
    best_step: int | None = None

    def preserved(self, steps: Sequence[int]) -> set[int]:
        """Return the steps to preserve of `steps`, which are in ascending order."""
        counted = [step for step in steps if step % self.every == 0 or step == steps[-1]]
        return {*counted[-self.keep :], *self.parents(), self.best_step}

    def should_preserve(self, checkpoints, *, context):
        preserved = self.preserved([checkpoint.step for checkpoint in checkpoints])
        return [checkpoint.step in preserved for checkpoint in checkpoints]


def _restore_args(shapes: Any, **options) -> ocp.args.PyTreeRestore:
    return ocp.args.PyTreeRestore(shapes, restore_args=ocp.checkpoint_utils.construct_restore_args(shapes), **options)


def _delete(folder: Path) -> None:
    """Delete a folder, or the symbolic link in its place."""
    folder.unlink() if folder.is_symlink() else shutil.rmtree(folder)


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}"
