"""The checkpoints of a run in a folder on a disk, as Orbax writes them."""

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from jaxmodels.distributed import session
from jaxmodels.errors import RunError
from jaxmodels.storage import paths

MARK = "_CHECKPOINT_METADATA"  # Orbax's file of a step that is complete
_UNFINISHED = ".orbax-checkpoint-tmp"  # in the names of Orbax's folders until a checkpoint is whole
_CHUNK = 1 << 25  # bytes; chunk size of arrays when `at_once` limits the bytes in flight


class OrbaxStore:
    """Checkpoints of a state and a page of JSON, one folder for each step. `BucketStore` has the same methods."""

    def __init__(self, folder: Path, policy: Any, *, read_only: bool, at_once: int | None):
        """
        Args:
          folder: of the checkpoints.
          policy: an Orbax preservation policy.
          read_only: never write or delete.
          at_once: maximum bytes in flight; see `Checkpoints`.
        """
        self.folder, self._at_once, self._replaced = folder, at_once, None
        if not read_only:
            with session.first_goes_first("clean up"):
                self.clean_up()
        gigabytes = None if at_once is None else at_once / 1e9 + 1e-3  # Orbax rejects an array of exactly the limit
        try:
            self._manager = ocp.CheckpointManager(
                folder,
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=policy,
                    read_only=read_only,
                    create=not read_only,
                ),
                item_handlers={"state": ocp.PyTreeCheckpointHandler(save_device_host_concurrent_gb=gigabytes), "progress": ocp.JsonCheckpointHandler()},
            )
        except RecursionError as error:  # Orbax reads this file of every step, and passes over one that is no JSON
            raise RunError(f"{folder}: the file _CHECKPOINT_METADATA of a step is nested too deeply. Move that step's folder away.") from error

    def linked(self) -> set[int]:
        """Return the steps whose folders are symbolic links: somebody put them elsewhere, and Orbax cannot delete a link."""
        return {int(path.name) for path in self.folder.glob("[0-9]*") if path.name.isdigit() and path.is_symlink()}

    def steps(self) -> list[int]:
        """Return the steps that have a complete checkpoint, in ascending order."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, parts: dict, page: dict) -> None:
        """Start saving. The arrays may be donated as soon as this returns. A checkpoint of this step is preserved until the new one is whole."""
        self._replaced = self.folder / f"replaced-{step}" if step in self.steps() else None
        if self._replaced is not None:
            # Move the old checkpoint aside until the new one is complete: it may be the only one.
            with session.first_goes_first("replace"):
                if session.is_first():
                    (self.folder / str(step)).rename(self._replaced)
            self._manager.reload()
        self._manager.save(step, args=ocp.args.Composite(state=self._saved(parts), progress=ocp.args.JsonSave(page)), force=True)
        if self._replaced is not None:
            self.wait()

    def _saved(self, parts: dict) -> ocp.args.PyTreeSave:
        if self._at_once is None:
            return ocp.args.PyTreeSave(parts)
        # TensorStore encodes chunks and assembles files in memory: limit the size of both.
        chunks = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=_CHUNK), parts)
        return ocp.args.PyTreeSave(parts, chunks, ocdbt_target_data_file_size=4 * _CHUNK)

    def saving(self) -> bool:
        """Return whether a checkpoint is being saved in the background."""
        return self._manager.is_saving_in_progress()

    def wait(self) -> None:
        """Wait until the last save is on disk; raise the error with which it ended."""
        self._manager.wait_until_finished()
        if self._replaced is not None:
            if session.is_first() and self._replaced.exists():
                paths.delete_tree(self._replaced)
            self._replaced = None

    def reload(self) -> None:
        """Look again which checkpoints there are."""
        # Orbax counts a failed step as saved, and steps that it would have deleted as deleted.
        self._manager.reload()

    def clean_up(self) -> None:
        """Restore checkpoints whose replacement was interrupted; delete those that were replaced, and the files of unfinished saves."""
        for replaced in self.folder.glob("replaced-*"):
            place = self.folder / replaced.name.removeprefix("replaced-")
            paths.delete_tree(replaced) if place.exists() else replaced.rename(place)
        for unfinished in self.folder.glob(f"*{_UNFINISHED}*"):
            paths.delete_tree(unfinished, missing_ok=True)

    def page(self, step: int) -> dict:
        """Return the page of a step."""
        return self._manager.restore(step, args=ocp.args.Composite(progress=ocp.args.JsonRestore())).progress

    def tree(self, step: int) -> Any:
        """Return the shapes of all arrays of a step, nested as they were saved."""
        return self._manager.item_metadata(step).state.tree

    def read(self, step: int, shapes: Any, *, partial: bool = False) -> Any:
        """Return the arrays of a step, each with the sharding of its shape; with `partial`, `shapes` has some of them, and `...` for others."""
        args = ocp.args.PyTreeRestore(
            shapes, restore_args=ocp.checkpoint_utils.construct_restore_args(shapes), **({"partial_restore": True} if partial else {})
        )
        return self._manager.restore(step, args=ocp.args.Composite(state=args)).state

    def set_aside(self, step: int) -> None:
        """Rename a checkpoint that cannot be read."""
        (self.folder / str(step)).rename(self.folder / f"unreadable-{step}")

    def delete(self, step: int) -> None:
        """Delete a checkpoint."""
        paths.delete_tree(self.folder / str(step))

    def close(self) -> None:
        """Stop Orbax's threads."""
        self._manager.close()
