"""Folders of images, one folder a class."""

import os
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxmodels.data.access import FileId
from jaxmodels.data.features.base import Row
from jaxmodels.data.features.image import Image
from jaxmodels.data.features.label import Label
from jaxmodels.data.files import NAMES, find_folder
from jaxmodels.data.holdout import Part, Whole
from jaxmodels.data.index import Opened, Writer, open_index
from jaxmodels.data.indexed import IndexedBase, open_indexed
from jaxmodels.data.keys import takes
from jaxmodels.data.rows import Holdout
from jaxmodels.data.source import Dataset, Untokenized
from jaxmodels.errors import ConfigError

_ROWS = 4096  # files indexed or read at once


class ClassFolders(IndexedBase):
    """Rows of files in a folder for each class, with the columns `image`, a path, and `label`, the class."""

    def __init__(self, opened: Opened, folder: str):
        """
        Args:
          opened: index of `_open`.
          folder: of the split.
        """
        super().__init__(opened, folder)
        self.folder, self.classes = folder, opened.index.header["classes"]
        self.ends = np.array(opened.index.header["ends"], np.int64)

    def __len__(self):
        return int(self.ends[-1])

    def _file(self, index: int) -> tuple[str, int]:
        """Return the path of a file relative to the folder of the split, and the number of its class."""
        ends = self.opened.index["name_end"]
        name = self.opened.index["names"][int(ends[index - 1]) if index else 0 : int(ends[index])].tobytes()
        number = int(np.searchsorted(self.ends, index, side="right"))
        return os.path.join(self.classes[number], name.decode(errors="surrogateescape")), number

    def __getitem__(self, index: int) -> Row:
        name, number = self._file(index)
        path = os.path.join(self.folder, name)
        return Row(path, {"image": path, "label": self.classes[number]})

    def scan(self, columns):
        return (self[index] for index in range(len(self)))

    def fingerprint(self, part: Part | Whole) -> int:
        """Return a checksum of names, sizes in bytes and classes; the contents are not read."""

        def compute() -> int:
            result, separator, sizes = 0, b"", self.opened.index["size"]
            for start in range(0, len(self), _ROWS):
                for index in (start + np.flatnonzero(part.mask(start, min(len(self), start + _ROWS)))).tolist():
                    name, number = self._file(index)
                    line = f"{os.path.basename(name)} {sizes[index]} {number}".encode(errors="surrogateescape")
                    result = zlib.crc32(separator + line, result)
                    separator = b"\n"
            return result

        share = None if isinstance(part, Whole) else [part.held, len(part)]
        return self.opened.index.derived(["crc32", share], compute)


def _open(folder: str) -> Opened:
    """Return the index of the images of a split.

    Its arrays: `names`, the bytes of all names relative to the folder of the class, with `name_end` of each image, and its `size` in bytes. Its header
    has the `classes`, and `ends`, the images up to the end of each. It identifies a folder by its time of change: that is when a file was added, removed
    or renamed.
    """
    folders, classes = [], []
    for place, below, _ in os.walk(folder):
        below[:] = sorted(name for name in below if place != folder or not name.startswith("."))
        classes = below[:] if place == folder else classes
        folders.append(FileId(os.path.abspath(place), 0, str(os.stat(place).st_mtime_ns)))

    def build(_: Sequence[FileId], writer: Writer) -> dict[str, Any]:
        ends, count, name_end = [], 0, 0
        for name in classes:
            start, files = os.path.join(folder, name), _files(os.path.join(folder, name))
            for at in range(0, len(files), _ROWS):
                names = [os.path.relpath(file, start).encode(errors="surrogateescape") for file in files[at : at + _ROWS]]
                writer.append("names", np.frombuffer(b"".join(names), np.uint8), np.uint8)
                name_ends = name_end + np.cumsum([len(each) for each in names])
                name_end = int(name_ends[-1])
                writer.append("name_end", name_ends)
                writer.append("size", [os.path.getsize(file) for file in files[at : at + _ROWS]])
            count += len(files)
            ends.append(count)
            writer.progress.add(1)
        return {"classes": classes, "ends": ends}

    return open_index("images", folders, build, what=folder, total=len(classes), unit="classes")


@takes(Image, Holdout, without=("image_column",), required=("size",))
def images(path: str, data_dir: str | None, **keys: Any) -> Dataset | Untokenized:
    """Read images in folders: `PATH/train/CLASS/*`, with the folders `validation` (or `valid`, `val`, `dev`) and `test` next to it, or `PATH/CLASS/*`.

    Every file in the folder of a class and in the folders below is an image of it, except files whose name begins with a dot.
    Classes are the names of the folders, sorted.

    Args:
      path: relative to the working directory or else to the data directory.
      data_dir: the data directory.

    Raises:
      ConfigError: no such folder, no images, or classes that differ between splits.
    """
    image, options = Image.of(keys | {"image_column": "image"}), Holdout.of(keys)
    folder = find_folder(path, data_dir)
    rows = {split: ClassFolders(_open(place), place) for split, place in _split_folders(folder).items()}
    classes = {split: part.classes for split, part in rows.items()}
    for split, names in classes.items():
        odd = sorted(set(names) ^ set(classes["train"]))
        if odd:
            has, lacks = (split, "train") if odd[0] in names else ("train", split)
            raise ConfigError(f"config.data.source: {folder}: the class {odd[0]!r} is in {has}, but not in {lacks}.")
    return open_indexed(rows, [image, Label(label_column="label", labels=tuple(classes["train"]))], options, data_dir)


def _split_folders(folder: str) -> dict[str, str]:
    """Return split -> its folder; the folder itself trains if it has none of a split."""
    found = {}
    for split, names in NAMES.items():
        there = [os.path.join(folder, name) for name in names if os.path.isdir(os.path.join(folder, name))]
        if len(there) > 1:
            raise ConfigError(f"config.data.source: {' and '.join(there)} are both {split}; keep one.")
        if there:
            found[split] = there[0]
    if found and "train" not in found:
        raise ConfigError(f"config.data.source: {folder} has {', '.join(found)}, but no folder 'train'.")
    return found or {"train": folder}


def _files(folder: str) -> list[str]:
    found = [os.path.join(place, name) for place, _, names in os.walk(folder) for name in names if not name.startswith(".")]
    if not found:
        raise ConfigError(f"config.data.source: {folder} holds no image.")
    return sorted(found)
