"""Folders of images, one folder a class."""

import os
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxmodels.data.features.base import Row
from jaxmodels.data.features.image import Image
from jaxmodels.data.features.label import Label
from jaxmodels.data.files import NAMES, find_folder
from jaxmodels.data.keys import takes
from jaxmodels.data.rows import Holdout, open_on_read
from jaxmodels.data.source import Dataset
from jaxmodels.errors import ConfigError


class ClassFolders:
    """Rows of files in a folder for each class, with the columns `image`, a path, and `label`, the class."""

    def __init__(self, files: Sequence[tuple[str, str]]):
        """files: path and class of each."""
        self.files = files

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index: int) -> Row:
        path, name = self.files[index]
        return Row(path, {"image": path, "label": name})

    def fingerprint(self, indices: np.ndarray, arrays: Mapping[str, np.ndarray]) -> int:
        """Return a checksum of names, sizes in bytes and classes; the contents are not read."""
        paths = (self.files[i][0] for i in indices)
        return zlib.crc32(
            "\n".join(f"{os.path.basename(p)} {os.path.getsize(p)} {c}" for p, c in zip(paths, arrays["label"], strict=True)).encode(errors="surrogateescape")
        )


@takes(Image, Holdout, without=("image_column",), required=("size",))
def images(path: str, data_dir: str | None, **keys: Any) -> Dataset:
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
    classes, rows = {}, {}
    for split, place in _split_folders(folder).items():
        classes[split] = sorted(name for name in os.listdir(place) if os.path.isdir(os.path.join(place, name)) and not name.startswith("."))
        rows[split] = ClassFolders([(file, name) for name in classes[split] for file in _files(os.path.join(place, name))])
    for split, names in classes.items():
        odd = sorted(set(names) ^ set(classes["train"]))
        if odd:
            has, lacks = (split, "train") if odd[0] in names else ("train", split)
            raise ConfigError(f"config.data.source: {folder}: the class {odd[0]!r} is in {has}, but not in {lacks}.")
    return open_on_read(rows, [image, Label(label_column="label", labels=tuple(classes["train"]))], options)


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
