"""The checkpoints of a run in a folder on a disk, as Orbax writes them."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
import tensorstore as ts

from jaxmodels.distributed import session
from jaxmodels.errors import RunError
from jaxmodels.runs import arrays, checksums
from jaxmodels.storage import paths

MARK = "_CHECKPOINT_METADATA"  # Orbax's file of a step that is complete
_UNFINISHED = ".orbax-checkpoint-tmp"  # in the names of Orbax's folders until a checkpoint is whole
_CHUNK = 1 << 25  # bytes; maximum size of the chunks of arrays


class OrbaxStore:
    """Checkpoints of a state and a page of JSON, one folder for each step. `BucketStore` has the same methods."""

    def __init__(self, folder: Path, policy: Any, *, read_only: bool, at_once: int | None, may_write: Callable[[], None] = lambda: None):
        """
        Args:
          folder: of the checkpoints.
          policy: an Orbax preservation policy.
          read_only: never write or delete.
          at_once: maximum bytes in flight; see `Checkpoints`.
          may_write: raises RunError if the run belongs to another process by now; called milliseconds before Orbax renames the folder of a checkpoint
            that is complete.
        """
        self.folder, self._at_once, self._may_write, self._replaced = folder, at_once, may_write, None
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
                    async_options=ocp.AsyncOptions(post_finalization_callback=may_write),  # of the first process, before the rename
                ),
                item_handlers={
                    # Zstandard makes float32 states 8% smaller, and saving and restoring three and two times as slow.
                    "state": ocp.PyTreeCheckpointHandler(save_device_host_concurrent_gb=gigabytes, use_compression=False),
                    "progress": ocp.JsonCheckpointHandler(),
                },
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
        # A chunk is read by one thread, through memory of its size.
        chunks = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=_CHUNK), parts)
        # TensorStore assembles files in memory: limit their size as well.
        return ocp.args.PyTreeSave(parts, chunks, **({} if self._at_once is None else {"ocdbt_target_data_file_size": 4 * _CHUNK}))

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
        """Restore checkpoints whose replacement was interrupted; delete those that were replaced, and the files of unfinished saves.

        Not if the run belongs to another process, whose replacements and saves may be among them.
        """
        try:
            self._may_write()
        except RunError:
            return
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
        wanted = {path: x for path, x in checksums.flatten(shapes).items() if x is not ...}
        found = arrays.read(self._open(step, list(checksums.flatten(shapes)), list(wanted), partial), wanted)
        return checksums.map_with_paths(lambda path, x: found.get(path, x), shapes)

    def _open(self, step: int, known: Sequence[str], wanted: Sequence[str], partial: bool) -> dict[str, Any]:
        """Open the arrays at the paths `wanted`, for reading. Without `partial`, the step must have no others than those of `known`."""
        place = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{self.folder / str(step) / 'state'}/"}}
        keys = ts.KvStore.open(place).result().list().result()
        saved = {key.decode().removesuffix("/.zarray") for key in keys if key.endswith(b"/.zarray")}
        names = {path: path.replace("/", ".") for path in known}  # as Orbax names them
        if missing := [path for path in wanted if names[path] not in saved]:
            raise RunError(f"it has no array {missing[0]}")
        if not partial and (others := saved - set(names.values())):
            raise RunError(f"it has an array {min(others)}, which this state has not")
        spec = {"driver": "zarr", "fill_missing_data_reads": False}  # a chunk that is missing is damage, not zeros
        opened = {path: ts.open(spec | {"kvstore": place | {"path": f"{names[path]}/"}}, open=True, read=True) for path in wanted}
        return {path: future.result() for path, future in opened.items()}

    def set_aside(self, step: int) -> None:
        """Rename a checkpoint that cannot be read."""
        (self.folder / str(step)).rename(self.folder / f"unreadable-{step}")

    def delete(self, step: int) -> None:
        """Delete a checkpoint."""
        paths.delete_tree(self.folder / str(step))

    def close(self) -> None:
        """Stop Orbax's threads."""
        self._manager.close()
