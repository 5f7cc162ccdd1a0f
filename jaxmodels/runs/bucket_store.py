"""The checkpoints of a run in a bucket, where nothing can be renamed, and Orbax writes to no S3.

    checkpoints/100/checkpoint.json       the page of progress, and the arrays: shape, type, chunks, and the attempt that has them
    checkpoints/100/3f2a90c1/params/…     the chunks of the arrays, as TensorStore writes them (Zarr 3), one object each

Each attempt to save a step writes to a folder of its own. `checkpoint.json` is written last, in one step: with it the checkpoint exists, and with a
new one it is replaced. Right before that, the process looks whether the run's lock is still its own, and the write has the condition that nobody else has
written this `checkpoint.json` since the save began: a process that was suspended and replaced completes no checkpoint, and deletes none. What no `checkpoint.json` names is deleted by the next start. Checkpoints that Orbax wrote on a disk and that were copied to a
bucket are read, from a copy in the cache; new ones are written as above.
"""

import contextlib
import json
import math
import re
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.distributed import session
from jaxmodels.errors import RunError
from jaxmodels.runs import arrays
from jaxmodels.runs import checksums as checksums_lib
from jaxmodels.runs.json_files import replace
from jaxmodels.runs.orbax_store import MARK, OrbaxStore
from jaxmodels.storage import client, paths
from jaxmodels.storage.paths import BucketPath

INDEX, _UNREADABLE = "checkpoint.json", "unreadable.json"
_CHUNK = 1 << 27  # bytes; chunks of an array are not larger, since an object is written and repeated as a whole
_IN_FLIGHT = 1 << 30  # bytes that are written or read at a time


def saved_steps(folder: Path | BucketPath) -> list[int]:
    """Return the steps that have a complete checkpoint in a folder of checkpoints, in ascending order."""
    found = (re.fullmatch(rf"(\d+)/({INDEX}|{MARK})", key) for key in paths.keys_below(folder))
    return sorted({int(match[1]) for match in found if match})


def move(place: BucketPath, to: BucketPath) -> None:
    """Move a checkpoint. The index is written last and deleted first, so that both places have whole checkpoints or none."""
    for key in sorted(paths.keys_below(place), key=lambda key: key in (INDEX, MARK)):
        (to / key).write_bytes((place / key).read_bytes())
    _delete(place)


def _delete(place: Path | BucketPath) -> None:
    """Delete a checkpoint: its index first, so that no part of it is taken for a checkpoint."""
    for name in (INDEX, MARK):
        (place / name).unlink(missing_ok=True)
    paths.delete_tree(place, missing_ok=True)


class BucketStore:
    """Checkpoints of a state and a page of JSON in a bucket, or in a copy of one on a disk. `OrbaxStore` has the same methods."""

    def __init__(self, folder: Path | BucketPath, policy: Any, *, read_only: bool, at_once: int | None, may_write: Callable[[], None] = lambda: None):
        """
        Args:
          folder: of the checkpoints.
          policy: has a method `preserved`, which returns the steps to preserve.
          read_only: never write or delete.
          at_once: maximum bytes in flight, in which case saving is synchronous.
          may_write: raises RunError if the run belongs to another process by now; called right before a checkpoint is completed.
        """
        self.folder, self._policy, self._at_once, self._may_write = folder, policy, at_once, may_write
        self._copied: dict[int, OrbaxStore] = {}
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        if not read_only:
            with session.first_goes_first("clean up"):
                if session.is_first():
                    self.clean_up()

    def linked(self) -> set[int]:
        """Return the steps whose folders are symbolic links: none."""
        return set()

    def steps(self) -> list[int]:
        """Return the steps that have a complete checkpoint, in ascending order."""
        return saved_steps(self.folder)

    # Saving

    def save(self, step: int, parts: dict, page: dict) -> None:
        """Start saving. The arrays may be donated as soon as this returns. A checkpoint of this step is replaced when the new one is whole."""
        attempt = session.gather("attempt", uuid.uuid4().hex[:8])[0]
        index, problem, writes, before = {"attempt": attempt, "page": page, "arrays": {}}, None, iter(()), None
        try:
            before = self._written(step) if session.is_first() else None
            arrays = checksums_lib.flatten(parts)
            index["arrays"] = {path: _describe(x) for path, x in arrays.items()}
            writes = self._writes(self.folder / str(step) / attempt, arrays, index["arrays"])
            if self._at_once is None:
                writes = iter(list(writes))  # copies on the host: the next step may overwrite the arrays
        except Exception as error:  # noqa: BLE001  the thread tells the other processes, which wait for this one
            problem = str(error)
        self._error, self._thread = None, threading.Thread(target=self._write, args=(step, index, before, writes, problem), name="checkpoint", daemon=True)
        self._thread.start()
        if self._at_once is not None:
            self.wait()

    def _writes(self, place: Path | BucketPath, arrays: Mapping[str, Any], described: Mapping[str, dict]) -> Iterator[tuple[str, dict, Any, np.ndarray]]:
        """Yield what this process writes of each array: each part of it by the one process that has its first replica."""
        shards = [(path, shard) for path, x in arrays.items() for shard in _shards(x)]
        for _, (_, data) in shards if self._at_once is None else ():
            if isinstance(data, jax.Array):
                data.copy_to_host_async()
        for path, (where, data) in shards:
            yield str(place / path), described[path], where, np.array(data)

    def _written(self, step: int) -> Any:
        """Return the generation of the index of a step, on which the next write of it depends; None on a disk, which has no conditions."""
        place = self.folder / str(step) / INDEX
        return place.read_with_generation()[1] if isinstance(place, BucketPath) else None

    def _write(self, step: int, index: dict, before: Any, writes: Iterator[tuple[str, dict, Any, np.ndarray]], problem: str | None) -> None:
        """Write the parts of this process; when all processes have done so, complete the checkpoint. Runs in a thread."""
        try:
            try:
                pending, size = [], 0
                for address, array, where, data in writes:
                    pending.append((_open(paths.parse(address), array)[where].write(_as_stored(data)), address))
                    size += data.nbytes
                    if size >= (self._at_once or _IN_FLIGHT):
                        _wait(pending)
                        pending, size = [], 0
                _wait(pending)
            except Exception as error:  # noqa: BLE001  in all processes together
                problem = str(error)
            problem = next((found for found in session.exchange(f"saved {index['attempt']}", problem) if found), None)
            if problem is not None:
                raise RunError(problem)
            if session.is_first():
                self._complete(step, index, before)
        except BaseException as error:  # noqa: BLE001  raised by `wait`
            self._error = error

    def _complete(self, step: int, index: dict, before: Any) -> None:
        """Write the index of a step, and delete what it replaces and what the policy does not preserve.

        Raises:
          RunError: the run belongs to another process by now, or another process has written the index since its generation was `before`.
        """
        place, text = self.folder / str(step), json.dumps(index)
        self._may_write()
        if before is None:
            replace(place / INDEX, text)
        elif (place / INDEX).write_if(text.encode(errors="backslashreplace"), before) is None and _read_json(place / INDEX).get("attempt") != index["attempt"]:
            # Its own attempt is there if the answer to the write was lost, and the write repeated.
            raise RunError(f"{place / INDEX} was written by another process meanwhile, so this one is not the only one that saves there")
        with contextlib.suppress(OSError):  # the next checkpoint, or the next start, deletes it
            for name in {key.partition("/")[0] for key in paths.keys_below(place)} - {INDEX, _UNREADABLE, index["attempt"]}:
                (place / name).unlink() if (place / name).is_file() else paths.delete_tree(place / name, missing_ok=True)
            steps = self.steps()
            for old in set(steps) - self._policy.preserved(steps):
                self.delete(old)

    def saving(self) -> bool:
        """Return whether a checkpoint is being saved in the background."""
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> None:
        """Wait until the last save has ended; raise the error with which it ended, once."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def reload(self) -> None:
        """Do nothing: what is there is asked each time."""

    def clean_up(self) -> None:
        """Delete the objects of attempts that no index names, unless the run belongs to another process, whose save may be one of them."""
        try:
            self._may_write()
        except RunError:
            return
        keys = paths.keys_below(self.folder)
        attempts = {(found[1], found[2]) for key in keys if (found := re.match(r"(\d+)/([0-9a-f]{8})/", key))}
        named = {(place.parent.name, _read_json(place).get("attempt")) for key in keys if (place := self.folder / key).name in (INDEX, _UNREADABLE)}
        for step, attempt in attempts - named:
            paths.delete_tree(self.folder / step / attempt, missing_ok=True)

    # Reading

    def _index(self, step: int) -> dict:
        return json.loads((self.folder / str(step) / INDEX).read_bytes())

    def _orbax(self, step: int) -> OrbaxStore | None:
        """Return the store of a step that Orbax wrote, read-only; None for a step of this class. It is copied to the cache once."""
        place = self.folder / str(step)
        if (place / INDEX).is_file() or not (place / MARK).is_file():
            return None
        if step not in self._copied:
            copy = paths.local_copy(place, deep=True) if isinstance(place, BucketPath) else place
            self._copied[step] = OrbaxStore(copy.parent, self._policy, read_only=True, at_once=self._at_once)
        return self._copied[step]

    def page(self, step: int) -> dict:
        """Return the page of a step."""
        if (copied := self._orbax(step)) is not None:
            return copied.page(step)
        return self._index(step)["page"]

    def tree(self, step: int) -> Any:
        """Return the shapes of all arrays of a step, in nested dictionaries."""
        if (copied := self._orbax(step)) is not None:
            return copied.tree(step)
        tree: dict[str, Any] = {}
        for path, array in self._index(step)["arrays"].items():
            *folders, name = path.split("/")
            node = tree
            for folder in folders:
                node = node.setdefault(folder, {})
            node[name] = jax.ShapeDtypeStruct(tuple(array["shape"]), jnp.dtype(array["dtype"]))
        return tree

    def read(self, step: int, shapes: Any, *, partial: bool = False) -> Any:
        """Return the arrays of a step, each with the sharding of its shape; `shapes` may have some of them, and `...` for others."""
        if (copied := self._orbax(step)) is not None:
            return copied.read(step, shapes, partial=partial)
        index = self._index(step)
        place, wanted = self.folder / str(step) / index["attempt"], {path: x for path, x in checksums_lib.flatten(shapes).items() if x is not ...}
        for path, shape in wanted.items():
            if path not in index["arrays"]:
                raise RunError(f"it has no array {path}")
            if tuple(index["arrays"][path]["shape"]) != tuple(shape.shape):
                raise RunError(f"{path} has the shape {tuple(index['arrays'][path]['shape'])}, and {tuple(shape.shape)} is needed")
        found = arrays.read(
            {path: _open(place / path, index["arrays"][path]) for path in wanted},
            wanted,
            types={path: jnp.dtype(index["arrays"][path]["dtype"]) for path in wanted},
            at_once=_IN_FLIGHT,
            result=lambda future, path: client.result(future, str(place / path)),
        )
        return checksums_lib.map_with_paths(lambda path, x: found.get(path, x), shapes)

    # Changing

    def set_aside(self, step: int) -> None:
        """Rename the index of a checkpoint that cannot be read."""
        place = self.folder / str(step)
        for name in (INDEX, MARK):
            if (place / name).is_file():
                replace(place / _UNREADABLE, (place / name).read_bytes().decode(errors="replace"))
                (place / name).unlink()

    def delete(self, step: int) -> None:
        """Delete a checkpoint."""
        _delete(self.folder / str(step))

    def close(self) -> None:
        """Stop Orbax's threads, if it read anything."""
        for store in self._copied.values():
            store.close()


def _shards(x: Any) -> list[tuple[Any, Any]]:
    """Return (index, data) of the parts of an array that this process writes."""
    if isinstance(x, jax.Array):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            raise RunError("random keys in a state cannot be saved in a bucket: keep their key_data")
        if x.is_fully_addressable and not session.is_first():
            return []  # the same in all processes
        return [(shard.index, shard.data) for shard in x.addressable_shards if shard.replica_id == 0]
    return [(..., x)] if session.is_first() else []


def _describe(x: Any) -> dict[str, Any]:
    """Return the description of an array in the index. Its chunks are parts of its shards, so that no two processes write to one object."""
    shape, dtype = tuple(np.shape(x)), np.dtype(x.dtype) if hasattr(x, "dtype") else np.asarray(x).dtype
    chunks = list(x.sharding.shard_shape(shape) if isinstance(x, jax.Array) else shape)
    while math.prod(chunks) * dtype.itemsize > _CHUNK and max(chunks) > 1:
        axis = chunks.index(max(chunks))
        chunks[axis] //= next(factor for factor in range(2, chunks[axis] + 1) if chunks[axis] % factor == 0)
    return {"shape": list(shape), "dtype": dtype.name, "chunks": [max(size, 1) for size in chunks]}


def _stored_dtype(dtype: np.dtype) -> np.dtype:
    """Return the type in which an array is stored: itself, or its bits for types that Zarr does not know."""
    return dtype if dtype.kind in "biufc" or dtype.name == "bfloat16" else np.dtype(f"uint{8 * dtype.itemsize}")


def _as_stored(x: np.ndarray) -> np.ndarray:
    stored = _stored_dtype(x.dtype)
    return x if stored == x.dtype else x.view(stored)


def _open(place: Path | BucketPath, array: Mapping[str, Any]) -> Any:
    """Open an array without asking for its metadata, which the index holds."""
    import tensorstore as ts

    spec = {
        "driver": "zarr3",
        "kvstore": paths.array_spec(place),
        "store_data_equal_to_fill_value": True,  # an object that is missing is damage, not zeros
        "fill_missing_data_reads": False,
        "metadata": {
            "shape": array["shape"],
            "data_type": _stored_dtype(jnp.dtype(array["dtype"])).name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": array["chunks"]}},
            "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "zstd", "configuration": {"level": 1}}],
        },
    }
    return client.result(ts.open(spec, open=True, assume_metadata=True, context=client.context()), str(place))


def _wait(pending: list[tuple[Any, str]]) -> None:
    for future, address in pending:
        client.result(future, address)


def _read_json(place: Path | BucketPath) -> dict:
    """Return the object in a file; empty if it is damaged."""
    try:
        values = json.loads(place.read_bytes())
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}
