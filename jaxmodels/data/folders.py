"""Folders on local disks and in remote stores: what is in them, and what identifies it."""

import fnmatch
import glob as local_glob
import hashlib
import os
import posixpath
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from jaxmodels.data import access
from jaxmodels.data.access import FileId, is_remote

LeaveOut = Callable[[str], bool]  # of the name of a file or folder, whether it is left out


class Entries(NamedTuple):
    """The names in a folder, sorted."""

    folders: list[str]
    files: list[str]


def entries(folder: str) -> Entries:
    """Return the names in a folder; none in one that does not exist in a remote store."""
    if is_remote(folder):
        found = [(posixpath.basename(entry["name"]), entry["type"] == "directory") for entry in access.listed(folder)]
    else:
        with os.scandir(folder) as there:
            found = [(entry.name, entry.is_dir()) for entry in there if entry.is_dir() or entry.is_file()]  # not links to nothing
    return Entries(*(sorted(name for name, is_folder in found if is_folder == wanted) for wanted in (True, False)))


def glob(pattern: str) -> list[str]:
    """Return the files that a shell pattern matches, sorted; `**` stands for any folders. Wildcards match no hidden names."""
    if access.is_file(pattern):  # a name may hold characters that a pattern reads otherwise
        return [pattern]
    if not is_remote(pattern):
        return sorted(file for file in local_glob.glob(pattern, recursive=True) if os.path.isfile(file))
    protocol, _, path = pattern.partition("://")
    parts = path.split("/")
    fixed = next((i for i, part in enumerate(parts) if local_glob.has_magic(part)), None)
    return [] if fixed is None else sorted(_matches(f"{protocol}://{'/'.join(parts[:fixed])}", parts[fixed:]))


def _matches(folder: str, parts: Sequence[str]) -> list[str]:
    """Return the files of a remote folder whose paths in it match the parts of a pattern."""
    part, rest = parts[0], parts[1:]
    if part == "**":
        start = len(folder.rstrip("/")) + 1
        return [entry["name"] for entry in access.listed(folder, deep=True) if _fits(entry["name"][start:].split("/"), parts)]
    if rest and not local_glob.has_magic(part):
        return _matches(f"{folder}/{part}", rest)
    there = entries(folder)
    names = [name for name in (there.folders if rest else there.files) if _fits([name], [part])]
    return [file for name in names for file in (_matches(f"{folder}/{name}", rest) if rest else [f"{folder}/{name}"])]


def _fits(names: Sequence[str], parts: Sequence[str]) -> bool:
    """Whether the names of a path match the parts of a pattern, as Python's glob has it."""
    if not parts or not names:
        return not names and all(part == "**" for part in parts)
    hidden = names[0].startswith(".")
    if parts[0] == "**":
        return _fits(names, parts[1:]) or (not hidden and _fits(names[1:], parts))
    return fnmatch.fnmatchcase(names[0], parts[0]) and (not hidden or parts[0].startswith(".")) and _fits(names[1:], parts[1:])


def walk(folder: str, leave_out: LeaveOut) -> Iterator[tuple[str, list[str], list[str]]]:
    """Yield each folder on a disk from a folder on: its path, and the names of the folders and files in it, sorted. Links are followed, each folder once."""
    seen = set()
    for place, below, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        below[:] = [] if real in seen else sorted(name for name in below if not leave_out(name))
        if real not in seen:
            seen.add(real)
            yield place, list(below), sorted(name for name in files if not leave_out(name))


def files_below(folder: str, leave_out: LeaveOut = lambda name: False) -> list[FileId]:
    """Return all files in a folder and its folders, sorted by path; on a disk, without their times of change."""
    if is_remote(folder):
        start = len(folder.rstrip("/")) + 1
        found = [access.id_of(entry["name"], entry) for entry in access.listed(folder, deep=True)]
        return sorted(file for file in found if not any(map(leave_out, file.path[start:].split("/"))))
    return [FileId(os.path.join(folder, name), size, "") for name, size in sizes_below(folder, leave_out).items()]


def sizes_below(folder: str, leave_out: LeaveOut) -> dict[str, int]:
    """Return the files in a folder and its folders, sorted: path relative to the folder -> bytes."""
    if is_remote(folder):
        start = len(folder.rstrip("/")) + 1
        return {file.path[start:]: file.size for file in files_below(folder, leave_out)}
    start, found = len(os.path.join(folder, "")), {}
    for place, _, names in walk(folder, leave_out):
        below = os.path.join(place, "")[start:]
        found |= zip((below + name for name in names) if below else names, _sizes(place, names), strict=True)
    return {name: found[name] for name in sorted(found)}


def _sizes(place: str, names: Sequence[str]) -> list[int]:
    """Return the bytes of some files of a folder on a disk. Their paths are resolved from the folder on, which takes half the time for a million files."""
    if not names:
        return []
    handle = os.open(place, os.O_RDONLY)
    try:
        return [os.stat(name, dir_fd=handle).st_size for name in names]
    except OSError:
        return [os.path.getsize(os.path.join(place, name)) for name in names]  # an error with the whole path
    finally:
        os.close(handle)


def _folders_below(folder: str, leave_out: LeaveOut) -> Iterator[str]:
    """Yield the folders that `walk` yields, without their files, of which there may be millions."""
    seen, rest = set(), [folder]
    while rest:
        place = rest.pop()
        real = os.path.realpath(place)
        if real in seen:
            continue
        seen.add(real)
        yield place
        try:
            with os.scandir(place) as there:
                below = sorted(entry.name for entry in there if entry.is_dir() and not leave_out(entry.name))
        except OSError:  # as in os.walk, a folder that cannot be read is empty
            continue
        rest += [os.path.join(place, name) for name in reversed(below)]


def identify(folders: Sequence[str], leave_out: LeaveOut) -> list[FileId]:
    """Return what identifies the files in some folders and in those below them.

    On a disk, that is each folder's time of change, when a file was added, removed or renamed. In a remote store, which has no folders, it is a checksum
    of names, sizes and the store's marks of all files, so that a file that is replaced is noticed, too.
    """
    if not any(map(is_remote, folders)):
        places = [place for folder in folders for place in _folders_below(folder, leave_out)]
        return [FileId(os.path.abspath(place), 0, str(os.stat(place).st_mtime_ns)) for place in places]

    def identify_one(folder: str) -> FileId:
        files = files_below(folder, leave_out)
        return FileId(folder, sum(file.size for file in files), hashlib.sha256(repr(files).encode(errors="surrogateescape")).hexdigest()[:32])

    return access.in_threads(identify_one, folders)
