"""Checkpoints of a run: asynchronous and atomic; the latest and the best are preserved. On a disk they are Orbax's, in a bucket those of `bucket_store`."""

import dataclasses
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from jaxmodels.distributed import session
from jaxmodels.errors import ConfigError, RunError
from jaxmodels.runs import bucket_store, disk
from jaxmodels.runs import checksums as checksums_lib
from jaxmodels.runs.bucket_store import BucketStore
from jaxmodels.runs.checksums import Damaged
from jaxmodels.runs.folder import RunFolder
from jaxmodels.runs.orbax_store import OrbaxStore
from jaxmodels.runs.progress import Progress, from_page, to_page
from jaxmodels.step.state import TrainState
from jaxmodels.storage import paths
from jaxmodels.storage.paths import BucketPath, is_bucket


class SaveFailed(RunError):
    """A checkpoint could not be saved. Earlier ones are whole."""


class Checkpoints:
    """The checkpoints of one run, one folder for each step."""

    def __init__(
        self,
        folder: Path | BucketPath,
        *,
        keep: int = 1,
        every: int = 1,
        parents: Callable[[], set[int]] = set,
        save_frozen: bool = True,
        checksums: bool = True,
        read_only: bool = False,
        at_once: int | None = None,
        may_write: Callable[[], None] = lambda: None,
        as_saved: Callable[[int, Progress, TrainState], TrainState] = lambda step, progress, shapes: shapes,
    ):
        """
        Args:
          folder: the folder `checkpoints` of the run.
          keep: number of latest checkpoints to preserve, in addition to the best one.
          every: steps between scheduled checkpoints. Others count towards `keep` only while they are the latest.
          parents: returns the steps that other runs started from; these are never deleted, nor are folders of steps that are symbolic links.
          save_frozen: whether to save frozen parameters; False if a parent run has them.
          checksums: whether to save checksums of the arrays, and to verify those that are restored.
          read_only: never write or delete.
          at_once: maximum bytes in flight, at least the size of the largest array; a limit makes saving synchronous. None for no limit.
          may_write: raises RunError if the run belongs to another process by now; called right before a checkpoint is completed.
          as_saved: (step, progress, shapes of the state) -> the shapes as they were saved: the same arrays in the same order, maybe in another tree.
        """
        self.folder, self._as_saved = folder, as_saved
        self._policy = _Preserved(keep, every, lambda: {*parents(), *self._store.linked()})
        self._left_out = () if save_frozen else ("frozen",)
        self._checksums, self._saving, self._littered = checksums, None, False
        disk.quiet_orbax()
        options: dict[str, Any] = {"read_only": read_only, "at_once": at_once, "may_write": may_write}
        self._store: BucketStore | OrbaxStore
        if is_bucket(folder) or any(folder.glob(f"*/{bucket_store.INDEX}")):  # also of a copy of a bucket
            self._store = BucketStore(folder, self._policy, **options)
        else:
            self._store = OrbaxStore(folder, self._policy, **options)

    def saved_parts(self, state: TrainState) -> dict:
        """Return the parts of a state, or of its shapes, that a checkpoint holds."""
        return {field.name: getattr(state, field.name) for field in dataclasses.fields(state) if field.name not in self._left_out}

    def steps(self) -> list[int]:
        """Return the steps that have a complete checkpoint, in ascending order."""
        return self._store.steps()

    def save(self, state: TrainState, progress: Progress) -> None:
        """Start saving a state as the checkpoint of its step. The state may be donated as soon as this returns.

        Raises:
          SaveFailed: this save failed at once, or the one before it failed.
        """
        self.wait()
        step, parts = int(state.step), self.saved_parts(state)
        page = to_page(progress, checksums_lib.of(parts) if self._checksums else None)
        self._policy.best_step = progress.best_step
        self._saving = step
        try:
            self._store.save(step, parts, page)
        except Exception as error:  # Orbax and TensorStore raise many types
            raise self._failed(error) from error

    def saving(self) -> bool:
        """Return whether a checkpoint is being saved in the background. False does not say that it was saved: `wait` does."""
        return self._saving is not None and self._store.saving()

    def wait(self) -> None:
        """Wait until the last save is on disk.

        Raises:
          SaveFailed: it failed. Raised once.
        """
        if self._saving is None:
            return
        try:
            self._store.wait()
        except Exception as error:  # Orbax and TensorStore raise many types
            raise self._failed(error) from error
        self._saving = None
        if self._littered and session.is_first():
            self._store.clean_up()  # again: writes of the failed save may have ended after it did
        self._littered = False

    def _failed(self, error: Exception) -> SaveFailed:
        """Remove what a failed save left, and return the error to raise."""
        step, self._saving, self._littered = self._saving, None, True
        reason = disk.reason(error, self.folder)  # before its files are removed, which may leave free space
        if session.is_first():
            self._store.clean_up()
        self._store.reload()
        return SaveFailed(f"checkpoint {self.folder / str(step)} could not be saved: {reason}")

    def restore(self, step: int, shapes: TrainState) -> tuple[TrainState, Progress]:
        """Return the state at a step, each array with the sharding of its shape, and the progress.

        Parts that are not saved stay shapes.

        Raises:
          Damaged: arrays or the progress differ from what was saved.
        """
        progress, checksums = self._page(step)
        parts = self.saved_parts(self._as_saved(step, progress, shapes))
        found = self._store.read(step, parts)
        self._verify(step, found, checksums)
        trees = {part: jax.tree.structure(getattr(shapes, part)) for part in parts}
        return shapes.replace(**{part: jax.tree.unflatten(tree, jax.tree.leaves(found[part])) for part, tree in trees.items()}), progress

    def _page(self, step: int) -> tuple[Progress, dict[str, str] | None]:
        """Return the progress and the checksums that were saved at a step."""
        return from_page(self._store.page(step))

    def _verify(self, step: int, arrays: Any, checksums: Mapping[str, str] | None) -> None:
        """Raise Damaged if arrays differ from their checksums."""
        bad = checksums_lib.check(arrays, checksums) if self._checksums and checksums is not None else []
        if bad:
            shown = ", ".join(bad[:3]) + (f" and {len(bad) - 3} more arrays" if len(bad) > 3 else "")
            raise Damaged(f"{shown}: values differ from the saved checksums")

    def restore_latest(self, shapes: TrainState) -> tuple[TrainState, Progress, list[str]] | None:
        """Return the latest readable checkpoint; None if there is no checkpoint.

        Returns:
          The state, the progress, and one message for each newer checkpoint that is unreadable; those are renamed, not deleted.

        Raises:
          RunError: there are checkpoints but none can be read; or with several processes, the latest cannot be read.
        """
        problems = []
        for step in reversed(session.gather("steps", self.steps())[0]):
            restored, damage = None, None
            try:
                restored = self.restore(step, shapes)
            except Damaged as error:
                damage = str(error)
            except Exception as error:  # Orbax and TensorStore raise many types for a damaged file
                if session.current() is not None:
                    # Other processes may have read their shards and wait in Orbax, so all cannot switch to an older checkpoint.
                    raise RunError(
                        f"checkpoint {self.folder / str(step)} cannot be read: {_first_line(error)}. If its files are damaged, move this "
                        "folder out of checkpoints/; the same command then resumes from the previous checkpoint."
                    ) from error
                damage = _first_line(error)
            # All have read their shards by now; one may have found damage where the others found none.
            damage = next((found for found in session.gather("damage", damage) if found), None)
            if damage is not None:
                problems.append((step, f"checkpoint {self.folder / str(step)} cannot be read: {damage}"))
                continue
            state, progress = restored
            with session.first_goes_first("move aside"):
                for bad, _ in problems if session.is_first() else ():
                    self._store.set_aside(bad)
            self._policy.best_step = progress.best_step
            self._delete_old(progress)
            return state, progress, [message for _, message in problems]
        if problems:
            raise RunError("; ".join(message for _, message in problems) + ". No file was changed. --overwrite deletes the run and starts anew.")
        return None

    def _delete_old(self, progress: Progress) -> None:
        """Delete old checkpoints that remain because a process was killed right after saving a newer one.

        What is old follows from the config of the latest checkpoint: other values of `checkpoint` hold from the next one on.
        """
        before = (progress.config or {}).get("checkpoint", {})
        policy = dataclasses.replace(self._policy, **{key: before[key] for key in ("keep", "every") if key in before})
        with session.first_goes_first("delete old"):
            if session.is_first():
                self._store.reload()
                steps = self.steps()
                for step in set(steps) - policy.preserved(steps):
                    self._store.delete(step)
        self._store.reload()

    def progress(self, step: int) -> Progress:
        """Return the progress stored at a step; RunError if it cannot be read."""
        try:
            return self._page(step)[0]
        except Exception as error:  # Orbax raises many types for a damaged file
            raise RunError(f"checkpoint {self.folder / str(step)} cannot be read: {_first_line(error)}") from error

    def shapes(self, step: int, *parts: str) -> dict:
        """Return the shapes of parts of the state (`params`, `ema`, `frozen`, `stats`) saved at a step; RunError if they cannot be read."""
        tree = self._tree(step)
        as_shape = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)  # noqa: E731
        return {part: jax.tree.map(as_shape, {} if tree.get(part) is None else tree[part]) for part in parts}

    def restore_part(self, step: int, shapes: Mapping[str, Any]) -> dict:
        """Return some parts of the state at a step, or some arrays of a part; `shapes` have shardings.

        Raises:
          RunError: the checkpoint cannot be read.
        """
        try:
            _, checksums = self._page(step)
            found = self._store.read(step, dict(shapes), partial=True)
            self._verify(step, found, checksums)
            return found
        except Exception as error:  # Orbax and TensorStore raise many types for a damaged file
            raise RunError(f"checkpoint {self.folder / str(step)} cannot be read: {_first_line(error)}") from error

    def check(self, step: int, at_once: int) -> Iterator[tuple[str, int, str | None]]:
        """Read every array of a step, and compare it with its checksum if it has one.

        Args:
          step: of the checkpoint.
          at_once: bytes of arrays to hold in memory, or one array if that is larger.

        Yields:
          The path, the bytes and the problem of each array; None for no problem.

        Raises:
          RunError: the progress, or the list of the arrays, cannot be read.
        """
        checksums, tree = self.checksums(step), self._tree(step)
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), tree)
        sizes = {path: math.prod(x.shape) * x.dtype.itemsize for path, x in checksums_lib.flatten(shapes).items()}

        def problems(wanted: Collection[str]) -> dict[str, str | None]:
            chosen = checksums_lib.map_with_paths(lambda path, x: x if path in wanted else ocp.PLACEHOLDER, shapes)
            try:
                found = self._store.read(step, chosen)
            except Exception as error:  # Orbax and TensorStore raise many types for a damaged file
                if len(wanted) > 1:
                    return {path: problem for one in wanted for path, problem in problems([one]).items()}
                return dict.fromkeys(wanted, _first_line(error))
            bad = checksums_lib.check(found, checksums) if checksums is not None else ()
            return {path: "values differ from the saved checksum" if path in bad else None for path in wanted}

        group: list[str] = []
        for path in [*sizes, None]:
            if group and (path is None or sum(sizes[p] for p in group) + sizes[path] > at_once):
                yield from ((p, sizes[p], problem) for p, problem in problems(group).items())
                group = []
            group += [path] if path is not None else []

    def checksums(self, step: int) -> dict[str, str] | None:
        """Return the checksums saved at a step; None if none were. RunError if its progress cannot be read."""
        try:
            return self._page(step)[1]
        except Exception as error:  # Orbax raises many types for a damaged file
            raise RunError(f"checkpoint {self.folder / str(step)} cannot be read: {_first_line(error)}") from error

    def _tree(self, step: int) -> Any:
        """Return the shapes of all arrays saved at a step; RunError if they cannot be read."""
        try:
            return self._store.tree(step)
        except Exception as error:  # Orbax raises many types for a damaged file
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

    def close(self) -> None:
        """Wait for the last save, and stop Orbax's threads. Raises SaveFailed if the save failed."""
        try:
            self.wait()
        finally:
            self._store.close()


def parse_run(reference: str) -> tuple[str, str | None]:
    """Split `RUN[@best|@latest|@STEP]` into (folder, which); `which` is None if absent. A folder that has the whole name, such as `lr@10`, is the run."""
    match = re.fullmatch(r"(.+)@(best|latest|\d+)", reference)
    return (match[1], match[2]) if match and not paths.parse(reference).is_dir() else (reference, None)


def open_checkpoints(reference: str) -> tuple[RunFolder, Checkpoints, str | None]:
    """Return the folder of `RUN[@WHICH]`, its checkpoints (read-only; the caller closes them) and WHICH, None if absent.

    Raises:
      ConfigError: no such run, or no checkpoint in it.
    """
    path, which = parse_run(reference)
    folder = RunFolder(path)
    folder.config()
    # Check before opening a checkpoint manager: Orbax initialises the JAX backend.
    if not any(path.name.isdigit() for path in folder.checkpoints.glob("*")):
        raise ConfigError(f"{folder.path} has no checkpoint yet.")
    return folder, Checkpoints(folder.checkpoints, read_only=True), which


def open_run(reference: str) -> tuple[RunFolder, Checkpoints, int]:
    """Return the folder of `RUN[@WHICH]`, its checkpoints (read-only; the caller closes them) and the step.

    Raises:
      ConfigError: no such run, or no such checkpoint in it.
    """
    folder, checkpoints, which = open_checkpoints(reference)
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


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    if isinstance(error, RunError):
        return str(error)
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}"
