"""Copies on the disk of remote files that are read whole at the start, or by libraries that read from disks only.

A copy is `copies/KEY/NAME` in the cache; its key is of the address, the size and the store's mark, so a file that has changed is copied again. Each
copy appears under its name once it is complete. Several are made at once. What was copied is printed, with its size.
"""

import contextlib
import os
import secrets
import shutil
import threading
from collections.abc import Sequence
from pathlib import Path

from jaxmodels.data import access, cache, folders
from jaxmodels.data.access import FileId, is_remote
from jaxmodels.data.index import Progress
from jaxmodels.data.reading import say
from jaxmodels.errors import ConfigError
from jaxmodels.storage.paths import cache_folder


def keep(paths: Sequence[str]) -> list[str]:
    """Copy those of some files that are remote, unless there are copies. From then on, `access.on_disk` returns their paths.

    Returns:
      The paths on the disk: of the copies, and of the other files.

    Raises:
      ConfigError: the disk has no room for them, or the cache cannot be written.
      OSError: a file cannot be read.
    """
    remote = [path for path in paths if is_remote(path)]
    files = access.identify_all(remote)
    made = {file: _place(file) / os.path.basename(file.path) for file in files}
    _copy(made)
    access.copied |= {file.path: str(copy) for file, copy in made.items()}
    return list(map(access.on_disk, paths))


def keep_folder(folder: str) -> str:
    """Copy all files of a remote folder and its folders, unless there are copies; return the copy of the folder, or a folder on a disk as it is.

    Raises:
      ConfigError, OSError: as of `keep`.
    """
    if not is_remote(folder):
        return folder
    files = folders.files_below(folder)
    place, start = cache_folder() / "copies" / cache.cache_key(folder, files) / os.path.basename(folder), len(folder) + 1
    _copy({file: place / file.path[start:] for file in files})
    return str(place)


def _place(file: FileId) -> Path:
    return cache_folder() / "copies" / cache.cache_key(file)


def _copy(targets: dict[FileId, Path]) -> None:
    """Copy remote files to their places on the disk, where they are not there."""
    # A server may say neither the size nor the version of a file.
    lacking = {file: target for file, target in targets.items() if not (file.stamp and target.is_file() and target.stat().st_size == file.size)}
    if not lacking:
        return
    size, folder = sum(file.size for file in lacking), os.path.commonprefix([file.path for file in lacking]).rpartition("/")[0]
    what = f"{len(lacking):,} file{'s' * (len(lacking) > 1)}, {size / 2**20:,.1f} MiB, of {folder}"
    _check_room(size, what)
    progress, lock = Progress(f"copying {what}", size), threading.Lock()

    def copy(item: tuple[FileId, Path]) -> None:
        file, target = item
        partial = target.with_name(f"{target.name}.{os.getpid()}-{secrets.token_hex(4)}.part")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as written:
                for block in access.blocks(file.path):
                    written.write(block)
                    with lock:
                        progress.add(len(block))
            if file.size and partial.stat().st_size != file.size:
                raise access.Changed(file.path)
            os.replace(partial, target)
        except OSError as error:
            if error.filename == file.path:  # of the store, not of the disk
                raise
            raise ConfigError(f"{target.parent} cannot be written ({error.strerror}). Set JAXMODELS_CACHE_DIR to a folder with room for {what}.") from error
        finally:
            with contextlib.suppress(OSError):
                partial.unlink()

    access.in_threads(copy, lacking.items())
    say(f"copied {what}, to {cache_folder() / 'copies'}")


def _check_room(size: int, what: str) -> None:
    """Raise ConfigError if the disk of the cache has no room for this many bytes."""
    place = cache_folder()
    while not place.is_dir() and place != place.parent:
        place = place.parent
    free = shutil.disk_usage(place).free
    if size > free:
        raise ConfigError(
            f"{what}: they are read from a disk, and {place} has {free / 2**20:,.1f} MiB free. Set JAXMODELS_CACHE_DIR to a folder with room, or mount the "
            "bucket and give its folder."
        )
