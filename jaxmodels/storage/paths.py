"""Files on a disk and objects in a bucket, by one set of paths and functions.

`parse` turns an address into a path: `pathlib.Path` for a folder or `file://`, `BucketPath` for `gs://` and `s3://`. A `BucketPath` has the methods of
`pathlib.Path` that the package needs. TensorStore, which writes the arrays of checkpoints, also reads and writes all other objects: one client with
one set of credentials, which repeats requests that fail, and whose writes may be conditional. There are no folders in a bucket: `mkdir` does nothing,
and a folder exists while it contains an object.
"""

import contextlib
import fnmatch
import hashlib
import json
import os
import posixpath
import re
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from jaxmodels.errors import ConfigError
from jaxmodels.storage import client
from jaxmodels.storage.client import StorageError

ABSENT = b"\x02"  # TensorStore's generation of an object that does not exist
_SCHEMES = {"gs": "gs", "gcs": "gs", "gcp": "gs", "google": "gs", "s3": "s3", "s3a": "s3", "s3n": "s3", "aws": "s3", "file": "file"}  # -> the right one
_BUCKET = {"gs": r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]", "s3": r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]"}


def parse(address: "str | os.PathLike | BucketPath", what: str = "") -> "Path | BucketPath":
    """Return the path of an address: a folder or file, or one of `file://`, `gs://BUCKET/KEY` and `s3://BUCKET/KEY`.

    Args:
      address: the address; not made absolute.
      what: the argument or key that holds it, for errors, such as `--workdir`.

    Raises:
      ConfigError: the scheme is unknown or misspelt, or the bucket is missing or has an invalid name.
    """
    if isinstance(address, BucketPath):
        return address
    text = os.fspath(address)
    found = re.match(r"([A-Za-z][A-Za-z0-9+.-]*):(/*)", text) if isinstance(text, str) else None
    if found is None or not (found[2] or found[1].lower() in _SCHEMES):
        return Path(text)
    shown, rest = (f"{what}={text}" if what else text), text[found.end() :]
    right = _SCHEMES.get(found[1].lower())
    if right is None:
        if len(found[2]) < 2:
            return Path(text)  # a file whose name has a colon
        raise ConfigError(f"{shown}: {found[1]}:// is not supported. Use gs://BUCKET/…, s3://BUCKET/…, file:///… or a folder.")
    if right == "file":
        host, _, rest = rest.partition("/") if found[2] == "//" else ("", "", rest)
        if host not in ("", "localhost") or not found[2]:
            raise ConfigError(f"{shown}: a file:// address has three slashes and no host: file:///{unquote(posixpath.join(host, rest))}")
        return Path("/" + unquote(rest.lstrip("/")))
    if found[1] != right or found[2] != "//":
        raise ConfigError(f"{shown}: did you mean {right}://{rest}?")
    bucket, _, key = rest.partition("/")
    if not re.fullmatch(_BUCKET[right], bucket):
        wrong = f"{bucket!r} is not the name of a bucket" if bucket else "the bucket is missing"
        raise ConfigError(f"{shown}: {wrong}. The address is {right}://BUCKET/FOLDER; names of buckets are lower-case letters, digits, '-' and '.'.")
    return BucketPath(right, bucket, key)


def has_scheme(address: str) -> bool:
    """Return whether an address has one of the schemes that `parse` reads, or one that is corrected to it."""
    scheme, colon, _ = address.partition(":")
    return bool(colon) and scheme.lower() in _SCHEMES


def is_bucket(place: Any) -> bool:
    """Return whether a path or an address is one of `gs://` or `s3://`."""
    return isinstance(place, BucketPath) or (isinstance(place, str) and place.startswith(("gs://", "s3://")))


def join(place: "str | Path | BucketPath", *parts: str) -> str:
    """Join addresses: as `os.path.join`, also for buckets; a part that is an absolute path or an address replaces what precedes it."""
    joined = str(place)
    for part in map(str, parts):
        joined = part if is_bucket(part) or part.startswith("file://") else os.path.join(joined, part)
    return joined


class BucketPath:
    """A path in a bucket, with the methods of `pathlib.Path` that are needed here. It is no `os.PathLike`: `open` refuses it."""

    def __init__(self, scheme: str, bucket: str, key: str):
        self.scheme, self.bucket = scheme, bucket
        parts: list[str] = []
        for part in key.split("/"):
            if part == "..":
                del parts[-1:]
            elif part not in ("", "."):
                parts.append(part)
        self.key = "/".join(parts)

    # Names

    def __str__(self) -> str:
        return f"{self.scheme}://{self.bucket}/{self.key}".rstrip("/")

    __repr__ = __str__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BucketPath) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    def __lt__(self, other: "BucketPath") -> bool:
        return str(self) < str(other)

    def __truediv__(self, part: str) -> "BucketPath":
        return BucketPath(self.scheme, self.bucket, f"{self.key}/{part}")

    name = property(lambda self: self.key.rpartition("/")[2])
    stem = property(lambda self: posixpath.splitext(self.name)[0])
    suffix = property(lambda self: posixpath.splitext(self.name)[1])
    parent = property(lambda self: BucketPath(self.scheme, self.bucket, self.key.rpartition("/")[0]))

    def with_name(self, name: str) -> "BucketPath":
        return self.parent / name

    def absolute(self) -> "BucketPath":
        return self

    resolve = expanduser = absolute

    # What is there

    def is_symlink(self) -> bool:
        return False

    def is_file(self) -> bool:
        return bool(self.key) and self._read(slice(0, 0)).state == "value"

    def is_dir(self) -> bool:
        return not self.key or bool(self._below())

    def exists(self) -> bool:
        return self.is_file() or self.is_dir()

    def _below(self) -> list[str]:
        """Return the keys of all objects in this folder, relative to it."""
        import tensorstore as ts

        prefix = f"{self.key}/" if self.key else ""
        keys = ts.KvStore.KeyRange(prefix, f"{self.key}0" if self.key else "")  # "0" follows "/"
        return [key.decode(errors="surrogateescape") for key in client.result(client.store(self.scheme, self.bucket).list(keys, len(prefix)), str(self))]

    def files(self) -> "list[BucketPath]":
        """Return all objects in this folder and its folders, sorted."""
        return [self / key for key in sorted(self._below()) if not key.endswith("/")]

    def iterdir(self) -> "Iterator[BucketPath]":
        return (self / name for name in sorted({key.split("/")[0] for key in self._below()} - {""}))

    def glob(self, pattern: str) -> "Iterator[BucketPath]":
        """Yield what is directly in this folder and matches a pattern without slashes."""
        return (place for place in self.iterdir() if fnmatch.fnmatchcase(place.name, pattern))

    # Contents

    def _read(self, part: slice | None = None) -> Any:
        return client.result(client.store(self.scheme, self.bucket).read(self.key, byte_range=part), str(self))

    def read_bytes(self) -> bytes:
        found = self._read()
        if found.state != "value":
            raise FileNotFoundError(2, os.strerror(2), str(self))
        return found.value

    def read_text(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        return self.read_bytes().decode(encoding, errors)

    def read_with_generation(self) -> tuple[bytes | None, Any]:
        """Return the contents, None if there is no object, and the generation to give to `write_if`."""
        found = self._read()
        return (found.value, found.stamp.generation) if found.state == "value" else (None, ABSENT)

    def write_bytes(self, content: bytes) -> None:
        """Write or replace the object, in one step."""
        client.result(client.store(self.scheme, self.bucket).write(self.key, content), str(self))

    def write_text(self, text: str, encoding: str = "utf-8", errors: str = "strict") -> None:
        self.write_bytes(text.encode(encoding, errors))

    def write_if(self, content: bytes | None, generation: Any) -> Any:
        """Write the object, or delete it for None, if its generation is still this one, or `ABSENT`.

        Returns:
          The new generation; None if the object has another generation, so that nothing was written.
        """
        stamp = client.result(client.store(self.scheme, self.bucket).write(self.key, content, if_equal=generation), str(self))
        return stamp.generation or None

    def unlink(self, missing_ok: bool = False) -> None:
        if not missing_ok and not self.is_file():
            raise FileNotFoundError(2, os.strerror(2), str(self))
        client.result(client.store(self.scheme, self.bucket).write(self.key, None), str(self))

    def mkdir(self, *, parents: bool = False, exist_ok: bool = False) -> None:
        """Do nothing: a bucket has no folders."""

    rmdir = mkdir


def open_file(place: "str | Path | BucketPath") -> Any:
    """Open a file or an object to read bytes at any position; its parts are read when they are asked for.

    Raises:
      ConfigError: the package that opens objects of this kind of bucket is missing.
    """
    place = parse(place)
    return client.file_system(place.scheme).open(str(place), "rb", cache_type="readahead") if isinstance(place, BucketPath) else open(place, "rb")


def size(place: "str | Path | BucketPath") -> int:
    """Return the bytes of a file or an object; errors as of `open_file`."""
    place = parse(place)
    return client.file_system(place.scheme).size(str(place)) if isinstance(place, BucketPath) else os.path.getsize(place)


def delete_tree(place: "Path | BucketPath", *, missing_ok: bool = False) -> None:
    """Delete a folder with all that is in it, or a symbolic link to one."""
    if isinstance(place, BucketPath):
        import tensorstore as ts

        assert place.key, "a whole bucket is never deleted"
        client.result(client.store(place.scheme, place.bucket).delete_range(ts.KvStore.KeyRange(f"{place.key}/", f"{place.key}0")), str(place))
    elif place.is_symlink():
        place.unlink()
    else:
        shutil.rmtree(place, ignore_errors=missing_ok)


def keys_below(place: "Path | BucketPath") -> list[str]:
    """Return the paths of all files in a folder and its folders, relative to it and with slashes."""
    if isinstance(place, BucketPath):
        return place._below()
    return [file.relative_to(place).as_posix() for file in place.rglob("*") if file.is_file()]


def array_spec(place: "Path | BucketPath") -> dict[str, Any]:
    """Return TensorStore's description of a folder, to open an array in."""
    return client.spec(place.scheme, place.bucket, f"{place.key}/") if isinstance(place, BucketPath) else {"driver": "file", "path": f"{place}/"}


def relative(place: "Path | BucketPath", start: "Path | BucketPath") -> str | None:
    """Return the relative path from a folder to another one; None if they are not both on disks or in one bucket."""
    if isinstance(place, BucketPath) and isinstance(start, BucketPath):
        same = (place.scheme, place.bucket) == (start.scheme, start.bucket)
        return posixpath.relpath(f"/{place.key}", f"/{start.key}") if same else None
    return None if isinstance(place, BucketPath) or isinstance(start, BucketPath) else os.path.relpath(place, start)


def upload(folder: Path, target: BucketPath) -> None:
    """Copy the files of a folder into a folder of a bucket; config.json, which shows what it is, last."""
    for file in sorted(folder.rglob("*"), key=lambda file: (file.name == "config.json", file)):
        if file.is_file():
            (target / file.relative_to(folder).as_posix()).write_bytes(file.read_bytes())


def download(place: BucketPath, target: Path) -> None:
    """Copy an object to a file, or a folder of a bucket with all that is in it to a folder."""
    if place.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(place.read_bytes())
        return
    for file in place.files():
        download(file, target / file.key.removeprefix(f"{place.key}/"))


def cache_folder() -> Path:
    """Return the folder of what is read or computed once: `JAXMODELS_CACHE_DIR`, or `~/.cache/jaxmodels`."""
    own = os.environ.get("JAXMODELS_CACHE_DIR")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxmodels"


def local_copy(place: "BucketPath", wanted: Callable[[str], bool] = lambda name: True, *, deep: bool = False) -> Path:
    """Return a copy on the disk of the objects in a folder of a bucket, in the cache; it is made anew if an object has changed.

    Args:
      place: the folder.
      wanted: of the name of an object, whether to copy it.
      deep: copy also the objects of its folders, not only those directly in it.
    """
    objects = [file for file in place.files() if (deep or file.parent == place) and wanted(file.name)]
    state = [[str(file), repr(file._read(slice(0, 0)).stamp.generation)] for file in objects]
    key = hashlib.sha256(json.dumps([str(place), state]).encode()).hexdigest()[:32]
    folder = cache_folder() / "buckets" / key / place.name
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent))
        try:
            for file in objects:
                download(file, temporary / file.key.removeprefix(f"{place.key}/"))
            with contextlib.suppress(OSError):  # another process was faster
                temporary.rename(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder


def check_writable(place: BucketPath, what: str) -> None:
    """Raise ConfigError if nothing can be written to a folder of a bucket; `what` is the argument that names it."""
    probe = place / f".writable-{uuid.uuid4().hex[:8]}"
    try:
        probe.write_bytes(b"")
        probe.unlink(missing_ok=True)
    except StorageError as error:
        raise ConfigError(f"{what}={place}: {error.strerror}.") from error
