"""Files on local disks and in remote stores (`gs://`, `s3://`, `https://`, …), read through fsspec.

Whatever fails in a remote store is an OSError with the address: FileNotFoundError, PermissionError, or one that reading retries. fsspec's own
clients repeat requests before that.
"""

import concurrent.futures
import contextlib
import errno
import functools
import io
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

from jaxmodels.data.reading import ReadError
from jaxmodels.errors import ConfigError, RunError, optional_import
from jaxmodels.storage import client, paths

T, R = TypeVar("T"), TypeVar("R")

_BLOCK = 1 << 22  # bytes read at once from the start to the end of a file
_OPEN_FILES = 16  # files that a thread holds open
_REQUESTS = 16  # to a remote store at once

_MARKS = ("ETag", "etag", "md5Hash", "LastModified", "Last-Modified", "mtime", "updated", "created")  # of a version, as fsspec's clients name them

copied: dict[str, str] = {}  # address -> path of its copy on the disk (see `data.copies`)


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


def address(path: str, key: str = "") -> str:
    """Return a path as the functions here take it: `file://` becomes a path on the disk. Other addresses that fsspec opens, such as `https://`, stay.

    Args:
      path: a path, a pattern or an address.
      key: the config key or argument that holds it, for errors.

    Raises:
      ConfigError: a misspelt address of `gs://`, `s3://` or `file://`.
    """
    return str(paths.parse(path, key)) if paths.has_scheme(path) else path


def join(folder: str, name: str) -> str:
    """Return the path of a file in a folder; a name that is an address or an absolute path stays."""
    return address(name) if "://" in name else address(os.path.join(folder, name))


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


@contextlib.contextmanager
def _errors(path: str) -> Iterator[None]:
    """Raise what a remote store raises as OSErrors with the address."""
    try:
        yield
    except (RunError, MemoryError):
        raise
    except FileNotFoundError as error:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path) from error
    except Exception as error:
        words = " ".join(str(error).split())[:200]
        if isinstance(error, PermissionError) or words.startswith("Forbidden") or str(getattr(error, "code", "")) in ("401", "403") or _no_login(error):
            words = f"access is denied ({words}). Log in, or set the credentials of the account that may read there"
            raise PermissionError(errno.EACCES, words, path) from error
        if isinstance(error, OSError) and isinstance(error.errno, int) and error.strerror:
            raise OSError(error.errno, " ".join(error.strerror.split())[:200], path) from error
        raise OSError(errno.EIO, f"{type(error).__name__}: {words}", path) from error


def _no_login(error: Exception) -> bool:
    return type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError")


def _remote(path: str, method: str, *arguments, **options) -> Any:
    """Call a method of a remote file system with the path."""
    with _errors(path):
        return getattr(file_system(path), method)(path, *arguments, **options)


def _kind(path: str) -> str | None:
    """Return `file` or `directory`, None if there is nothing. (fsspec's `isfile` takes a network that fails for a file that is missing.)"""
    try:
        return _remote(path, "info")["type"]
    except FileNotFoundError:
        return None


def is_file(path: str) -> bool:
    """Whether there is a file, or an object."""
    return _kind(path) == "file" if is_remote(path) else os.path.isfile(path)


def is_folder(path: str) -> bool:
    """Whether there is a folder, or an address with objects below it."""
    return _kind(path) == "directory" if is_remote(path) else os.path.isdir(path)


def listed(path: str, *, deep: bool = False) -> list[dict[str, Any]]:
    """Return what a remote folder contains, as fsspec describes it, with the address as `name`; with `deep`, the files in all of its folders."""
    try:
        found = list(_remote(path, "find", detail=True).values()) if deep else _remote(path, "ls", detail=True)
    except FileNotFoundError:
        return []
    start = f"{file_system(path)._strip_protocol(path).rstrip('/')}/"
    below = [(entry["name"].removeprefix(start), entry) for entry in found if entry["name"].startswith(start) and (entry["type"] == "file" or not deep)]
    below = [(name.rstrip("/") if entry["type"] == "directory" else name, entry) for name, entry in below]
    return [entry | {"name": f"{path.rstrip('/')}/{name}"} for name, entry in below if name and not name.endswith("/")]  # objects `FOLDER/` stand for folders


def in_threads(function: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """Return a function's results for some items, in order; several are computed at once, where each waits for a remote store."""
    with concurrent.futures.ThreadPoolExecutor(_REQUESTS) as pool:
        return list(pool.map(function, items))


def identify(path: str) -> FileId:
    """Return what identifies a file's contents."""
    if not is_remote(path):
        stat = os.stat(path)
        return FileId(os.path.abspath(path), stat.st_size, str(stat.st_mtime_ns))
    return id_of(path, _remote(path, "info"))


def identify_all(files: Sequence[str]) -> list[FileId]:
    """Return what identifies the contents of each file."""
    return in_threads(identify, files) if any(map(is_remote, files)) else list(map(identify, files))


def id_of(path: str, info: dict[str, Any]) -> FileId:
    """Return what identifies a remote file's contents, from fsspec's description."""
    stamp = next((str(info[key]) for key in _MARKS if info.get(key)), "")
    return FileId(path, int(info["size"] or 0), stamp)


def open_file(path: str) -> Any:
    """Return a binary file with `read` and `seek`. Of a remote file, parts are transferred when they are read."""
    return _RemoteFile(path) if is_remote(path) else open(path, "rb")


def open_whole(path: str) -> Any:
    """Return a binary file with `read` and `seek`; a remote file is transferred in one request."""
    return io.BytesIO(_remote(path, "cat_file")) if is_remote(path) else open(path, "rb")


def on_disk(path: str) -> str:
    """Return the path of a remote file's copy, where `data.copies` has made one in this process, or the path or address as it is."""
    return copied.get(path, path)


class _RemoteFile(io.RawIOBase):
    """A file of fsspec whose errors are OSErrors with the address."""

    def __init__(self, path: str):
        self._path, self._file = path, _remote(path, "open", "rb", block_size=_BLOCK)

    def readable(self):
        return True

    def seekable(self):
        return self._file.seekable()

    def readinto(self, buffer):
        with _errors(self._path):
            content = self._file.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)

    def seek(self, offset, whence=0):
        return self._file.seek(offset, whence)

    def tell(self):
        return self._file.tell()

    def close(self):
        if not self.closed:
            self._file.close()
        super().close()


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
            if len(content) > stop - start:
                raise ReadError(f"{path}: its server sends files whole only (no HTTP ranges). Copy the file to a disk or a bucket.")
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
