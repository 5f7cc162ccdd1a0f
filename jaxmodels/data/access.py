"""Files on local disks and in remote stores (`gs://`, `s3://`, `https://`, …), read through fsspec."""

import errno
import functools
import glob as local_glob
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from jaxmodels.data.reading import ReadError
from jaxmodels.errors import ConfigError, RunError, optional_import
from jaxmodels.storage import client

_BLOCK = 1 << 22  # bytes read at once from the start to the end of a file
_OPEN_FILES = 16  # files that a thread holds open


class FileId(NamedTuple):
    """What identifies the contents of a file without reading them.

    Attributes:
      path: absolute path, or address.
      size: in bytes.
      stamp: time of the last change in nanoseconds, or a store's own mark of a version.
    """

    path: str
    size: int
    stamp: str


def is_remote(path: str) -> bool:
    """Whether a path is the address of a remote file."""
    return "://" in path


@functools.lru_cache(maxsize=64)
def _file_system(protocol: str) -> Any:
    if protocol in ("gs", "s3"):
        return client.file_system(protocol)
    fsspec = optional_import("fsspec", "remote")
    try:
        return fsspec.filesystem(protocol)
    except (ImportError, ValueError) as error:
        raise ConfigError(f"{protocol}://: {error}") from error


def file_system(path: str) -> Any:
    """Return the fsspec file system of an address; ConfigError if a package for it is missing."""
    return _file_system(path.partition("://")[0])


def _remote(path: str, method: str, *arguments, **options) -> Any:
    """Call a method of a remote file system with the path. Errors of a network become OSErrors, which reading retries."""
    try:
        return getattr(file_system(path), method)(path, *arguments, **options)
    except (OSError, RunError):
        raise
    except Exception as error:
        raise OSError(errno.EIO, f"{type(error).__name__}: {error}", path) from error


def is_file(path: str) -> bool:
    """Whether there is a file, or an object."""
    return _remote(path, "isfile") if is_remote(path) else os.path.isfile(path)


def is_folder(path: str) -> bool:
    """Whether there is a folder, or an address with objects below it."""
    return _remote(path, "isdir") if is_remote(path) else os.path.isdir(path)


def names(folder: str) -> list[str]:
    """Return the names in a folder, sorted."""
    if is_remote(folder):
        return sorted(os.path.basename(path.rstrip("/")) for path in _remote(folder, "ls", detail=False))
    return sorted(os.listdir(folder))


def glob(pattern: str) -> list[str]:
    """Return the files that a shell pattern matches, sorted; `**` stands for any folders."""
    if is_remote(pattern):
        return sorted(file_system(pattern).unstrip_protocol(path) for path in _remote(pattern, "glob"))
    return sorted(file for file in local_glob.glob(pattern, recursive=True) if os.path.isfile(file))


def walk(folder: str, leave_out: Callable[[str], bool]) -> Iterator[tuple[str, list[str], list[str]]]:
    """Yield each folder on a disk from a folder on: its path, and the names of the folders and files in it, sorted. Links are followed, each folder once.

    Args:
      folder: where to begin.
      leave_out: of the name of a file or folder, whether it is left out.
    """
    seen = set()
    for place, below, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        below[:] = [] if real in seen else sorted(name for name in below if not leave_out(name))
        if real not in seen:
            seen.add(real)
            yield place, list(below), sorted(name for name in files if not leave_out(name))


def identify(path: str) -> FileId:
    """Return what identifies a file's contents."""
    if not is_remote(path):
        stat = os.stat(path)
        return FileId(os.path.abspath(path), stat.st_size, str(stat.st_mtime_ns))
    info = _remote(path, "info")
    stamp = next((str(info[key]) for key in ("ETag", "etag", "md5Hash", "LastModified", "mtime", "updated", "created") if info.get(key)), "")
    return FileId(path, int(info["size"] or 0), stamp)


def open_file(path: str) -> Any:
    """Return a binary file with `read` and `seek`."""
    return _remote(path, "open", "rb", block_size=_BLOCK) if is_remote(path) else open(path, "rb")


def blocks(path: str) -> Iterator[bytes]:
    """Yield a file in parts, from its start to its end."""
    with open_file(path) as file:
        while block := file.read(_BLOCK):
            yield block


class Changed(ReadError):
    """A file is not the one that an index was built from."""

    def __init__(self, path: str):
        super().__init__(f"{path} has changed since its index was built. Start again: the index is built again. To continue a run, restore the old file.")
        self._path = path

    def __reduce__(self):
        return Changed, (self._path,)


class Files:
    """Random access to the bytes of many files, from several threads. Files open lazily, and again in each worker process.

    Attributes:
      identities: of the files.
      folders: of the files.
    """

    def __init__(self, identities: Sequence[FileId]):
        self.identities = [FileId(*identity) for identity in identities]
        self.folders = [os.path.dirname(identity.path) for identity in self.identities]
        self._local = threading.local()
        self._checked: set[int] = set()

    def __getstate__(self):
        return self.identities

    def __setstate__(self, identities):
        self.__init__(identities)

    def path(self, number: int) -> str:
        return self.identities[number].path

    def check(self, number: int) -> None:
        """Raise Changed if a file is not the one that was indexed; of a remote file, once in a process."""
        if number not in self._checked or not is_remote(self.path(number)):
            if identify(self.path(number)) != self.identities[number]:
                raise Changed(self.path(number))
            self._checked.add(number)

    def read(self, number: int, start: int, stop: int) -> bytes:
        """Return the bytes [start, stop) of a file.

        Raises:
          Changed: the file is not the one that was indexed.
          OSError: it cannot be read.
        """
        path = self.path(number)
        if is_remote(path):
            self.check(number)
            content = _remote(path, "cat_file", start=start, end=stop)
        else:
            content = os.pread(self._descriptor(number), stop - start, start)
        if len(content) != stop - start:
            raise Changed(path)
        return content

    def _descriptor(self, number: int) -> int:
        """Return an open file's descriptor. Each thread has its own, so that none is closed while another reads."""
        if not hasattr(self._local, "opened"):
            self._local.opened = OrderedDict()
        opened: OrderedDict[int, _Descriptor] = self._local.opened
        if number not in opened:
            opened[number] = _Descriptor(self.identities[number])
            if len(opened) > _OPEN_FILES:
                opened.popitem(last=False)
        opened.move_to_end(number)
        opened[number].check()
        return opened[number].number


class _Descriptor:
    """An open local file, closed when it is not used any more."""

    def __init__(self, identity: FileId):
        self.identity, self.number = identity, os.open(identity.path, os.O_RDONLY)

    def check(self) -> None:
        """Raise Changed if the file is not the one that was indexed."""
        stat = os.fstat(self.number)
        if (stat.st_size, str(stat.st_mtime_ns)) != self.identity[1:]:
            raise Changed(self.identity.path)

    def __del__(self):
        if hasattr(self, "number"):
            os.close(self.number)
