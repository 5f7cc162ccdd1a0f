"""Checkpoints of a run, through Orbax: asynchronous, whole or absent, the last few and the best kept."""

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
    """What a run knows besides its arrays; stored beside them.

    Attributes:
      evaluated_at: the last step that was evaluated.
      best: value of the metric that counts, at its best so far.
      best_step: where that was.
      without_improvement: evaluations since.
      finished: nothing is left to train.
      seconds: spent training, over all starts.
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
          step: that was evaluated.
          value: of the metric that picks the best checkpoint.
          better: whether it is better than the best so far.
          patience: evaluations without improvement after which the run is finished; None for no limit.
        """
        if better:
            return dataclasses.replace(self, best=value, best_step=step, without_improvement=0)
        without = self.without_improvement + 1
        return dataclasses.replace(self, without_improvement=without, finished=self.finished or (patience is not None and without >= patience))


_CHUNK = 1 << 25  # bytes; of the chunks of arrays that are written few at a time


class Checkpoints:
    """The checkpoints of one run, one folder a step."""

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
          folder: `checkpoints` of the run.
          keep: number of the latest checkpoints to keep. The best one, by the progress saved with the latest, is kept besides.
          every: steps between scheduled checkpoints. Others count towards `keep` only while they are the latest.
          parents: steps that other runs started from; these are never deleted.
          save_frozen: whether frozen parameters are saved; they are not where they lie in a parent run.
          read_only: looks, never deletes or writes.
          at_once: bytes that are copied to be written at a time, for which saving then waits; no array is larger. All unless given.
        """
        self.folder, self._policy = folder, _Kept(keep, every, parents)
        self._left_out = () if save_frozen else ("frozen",)
        if not read_only:
            self._put_back()
        self._at_once = at_once
        gigabytes = None if at_once is None else at_once / 1e9 + 1e-3  # what is as large as the limit is refused
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

    def steps(self) -> list[int]:
        """Steps with a whole checkpoint, in order."""
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState, progress: Progress) -> None:
        """Starts to save a state under its step. The state may be donated as soon as this returns."""
        step = int(state.step)
        replaced, replaces = self.folder / f"replaced-{step}", step in self.steps()
        if replaces:
            # Kept until the new one is whole: it may be the only one.
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
                shutil.rmtree(replaced)

    def _saved(self, parts: dict) -> ocp.args.PyTreeSave:
        if self._at_once is None:
            return ocp.args.PyTreeSave(parts)
        # Of what is written, chunks are encoded and files are gathered in memory.
        chunks = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=_CHUNK), parts)
        return ocp.args.PyTreeSave(parts, chunks, ocdbt_target_data_file_size=4 * _CHUNK)

    def _put_back(self) -> None:
        """A checkpoint that was being replaced when the run was killed: back, unless the new one is whole."""
        with session.first_goes_first("put back"):
            for replaced in self.folder.glob("replaced-*") if session.is_first() else ():
                place = self.folder / replaced.name.removeprefix("replaced-")
                shutil.rmtree(replaced) if place.exists() else replaced.rename(place)

    def restore(self, step: int, shapes: TrainState) -> tuple[TrainState, Progress]:
        """The state at a step, each array under the sharding that its shape carries, and the progress.

        What is not saved stays as its shape.
        """
        items = self._manager.restore(
            step,
            args=ocp.args.Composite(state=_restore_args(self._as_dict(shapes)), progress=ocp.args.JsonRestore()),
        )
        return shapes.replace(**items.state), Progress(**items.progress)

    def restore_latest(self, shapes: TrainState) -> tuple[TrainState, Progress, list[str]] | None:
        """The latest state that can be read; None where there is no checkpoint.

        Returns:
          The state, the progress, and what was wrong with newer checkpoints: those are moved aside, not deleted.

        Raises:
          RunError: there are checkpoints and none can be read.
        """
        problems = []
        for step in reversed(session.gather("steps", self.steps())[0]):
            try:
                state, progress = self.restore(step, shapes)
            except Exception as error:  # noqa: BLE001  whatever Orbax and TensorStore raise for a damaged file
                if session.current() is not None:
                    # Others may have read their parts of it, and wait in Orbax: they cannot be told to take another.
                    raise RunError(
                        f"checkpoint {self.folder / str(step)} cannot be read: {_first_line(error)}. If its files are damaged, move that "
                        "folder out of checkpoints/: the same command then goes on from the one before."
                    ) from error
                problems.append((step, f"checkpoint {self.folder / str(step)} cannot be read: {_first_line(error)}"))
                continue
            for bad, _ in problems:
                (self.folder / str(bad)).rename(self.folder / f"unreadable-{bad}")
            self._policy.best_step = progress.best_step
            self._delete_old()
            return state, progress, [message for _, message in problems]
        if problems:
            raise RunError("; ".join(message for _, message in problems) + ". Nothing was changed; --overwrite starts anew.")
        return None

    def _delete_old(self) -> None:
        """Delete the checkpoints that a process killed after saving a newer one left behind."""
        with session.first_goes_first("delete old"):
            if session.is_first():
                self._manager.reload()
                steps = self.steps()
                for step in set(steps) - self._policy.kept(steps):
                    shutil.rmtree(self.folder / str(step))
        self._manager.reload()

    def progress(self, step: int) -> Progress:
        """Return the progress stored at a step; RunError if it cannot be read."""
        try:
            return Progress(**self._manager.restore(step, args=ocp.args.Composite(progress=ocp.args.JsonRestore())).progress)
        except Exception as error:  # noqa: BLE001  Orbax raises many types for a damaged file
            raise RunError(f"checkpoint {self.folder / str(step)} cannot be read: {_first_line(error)}") from error

    def shapes(self, step: int, *parts: str) -> dict:
        """Shapes of parts of the state (`params`, `ema`, `frozen`, `stats`) as stored at a step; RunError if they cannot be read."""
        try:
            tree = self._manager.item_metadata(step).state.tree
        except Exception as error:  # noqa: BLE001  whatever Orbax raises for a damaged file
            raise RunError(f"checkpoint {self.folder / str(step)} cannot be read: {_first_line(error)}") from error
        as_shape = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)  # noqa: E731
        return {part: jax.tree.map(as_shape, tree.get(part) or {}) for part in parts}

    def restore_part(self, step: int, shapes: Mapping[str, Any]) -> dict:
        """Some parts of the state, or of a part, at a step; `shapes` carry shardings.

        Raises:
          RunError: the checkpoint cannot be read.
        """
        args = _restore_args(dict(shapes), partial_restore=True)
        try:
            return self._manager.restore(step, args=ocp.args.Composite(state=args)).state
        except Exception as error:  # noqa: BLE001  whatever Orbax and TensorStore raise for a damaged file
            raise RunError(f"checkpoint {self.folder / str(step)} cannot be read: {_first_line(error)}") from error

    def find(self, which: str | None) -> int:
        """Return the step that `best`, `latest` or a number names; for None the best if there is one, else the latest.

        Raises:
          ConfigError: there is no such checkpoint; the message lists the steps that there are.
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
                raise ConfigError(f"{run}: the checkpoint of its best step, {best}, is gone; it has steps {steps}. Name one: {run}@latest or {run}@STEP.")
            if which is None:
                return steps[-1]
            raise ConfigError(f"{run} has no best checkpoint: checkpoint.best is not set, or nothing was evaluated yet; it has steps {steps}.")
        if which.isdigit() and int(which) in steps:
            return int(which)
        raise ConfigError(f"{run} has no checkpoint {which!r}; it has steps {steps}, or say best or latest.")

    def wait(self) -> None:
        """Waits until the last save is on disk; raises what went wrong in it."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, and ends Orbax's threads."""
        self._manager.close()


def parse_run(reference: str) -> tuple[str, str | None]:
    """`RUN[@best|@latest|@STEP]` as (folder, which)."""
    match = re.fullmatch(r"(.+)@(best|latest|\d+)", reference)
    return (match[1], match[2]) if match else (reference, None)


def open_run(reference: str) -> tuple[RunFolder, Checkpoints, int]:
    """A run's folder, its checkpoints (read-only; close them) and the step that `RUN[@WHICH]` means.

    Raises:
      ConfigError: no such run, or no such checkpoint in it.
    """
    path, which = parse_run(reference)
    folder = RunFolder(path)
    folder.config()
    # Looked for by hand first: Orbax asks JAX for its devices.
    if not any(path.name.isdigit() for path in folder.checkpoints.glob("*")):
        raise ConfigError(f"{folder.path} has no checkpoint yet.")
    checkpoints = Checkpoints(folder.checkpoints, read_only=True)
    return folder, checkpoints, checkpoints.find(which)


@dataclasses.dataclass
class _Kept(ocp.checkpoint_managers.PreservationPolicy):
    """The checkpoints to keep: the latest, the best, and those that other runs started from.

    The best step comes from our own progress, since Orbax does not read metrics back when it opens a folder. The rule depends only on the
    steps and on the progress, so that a run that was stopped keeps the same checkpoints as one that was not.
    """

    keep: int
    every: int
    parents: Callable[[], set[int]]
    best_step: int | None = None

    def kept(self, steps: Sequence[int]) -> set[int]:
        """Return the steps to keep of `steps`, which are in order."""
        counted = [step for step in steps if step % self.every == 0 or step == steps[-1]]
        return {*counted[-self.keep :], *self.parents(), self.best_step}

    def should_preserve(self, checkpoints, *, context):
        kept = self.kept([checkpoint.step for checkpoint in checkpoints])
        return [checkpoint.step in kept for checkpoint in checkpoints]


def _restore_args(shapes: Any, **options) -> ocp.args.PyTreeRestore:
    return ocp.args.PyTreeRestore(shapes, restore_args=ocp.checkpoint_utils.construct_restore_args(shapes), **options)


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}"
