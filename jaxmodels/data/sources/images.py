"""Folders of images, one folder a class, decoded when they are read."""

import os
import zlib
from typing import Literal

import numpy as np
from PIL import Image, ImageOps

from jaxmodels.data.features import hold_out
from jaxmodels.data.files import NAMES, find_folder
from jaxmodels.data.skipping import BadExample, Forgiving, Policy
from jaxmodels.data.source import Dataset
from jaxmodels.errors import ConfigError

MODES = {1: "L", 3: "RGB", 4: "RGBA"}


class ImageFiles:
    """Image files with their class: `image` uint8 [H, W, C], `label` int32.

    A file that cannot be decoded raises BadExample when it is read.
    """

    def __init__(self, files: list[tuple[str, int]], size: tuple[int, int], channels: int, fit: str):
        """
        Args:
          files: (path, class).
          size: height and width.
          channels: 1, 3 or 4.
          fit: `crop` or `stretch`, see `images`.
        """
        self.files, self.size, self.channels, self.fit = files, size, channels, fit

    def __len__(self):
        return len(self.files)

    def fingerprint(self) -> int:
        """A checksum of names, sizes in bytes and classes; the contents are not read."""
        return zlib.crc32("\n".join(f"{os.path.basename(path)} {os.path.getsize(path)} {label}" for path, label in self.files).encode())

    def __getitem__(self, index):
        path, label = self.files[index]
        try:
            with Image.open(path) as image:
                pixels = to_array(image, self.size, self.channels, self.fit)
        except MemoryError:
            raise
        except Exception as error:  # noqa: BLE001  what a decoder raises depends on where the file is broken
            raise BadExample(path, f"cannot be decoded as an image: {error}.") from error
        return {"image": pixels, "label": np.int32(label)}


def to_array(image: Image.Image, size: tuple[int, int], channels: int, fit: str) -> np.ndarray:
    """uint8 [H, W, C], upright; `size` is (H, W)."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):  # which Pillow would cut off at 255
        raise ValueError(f"its values have more than 8 bits (mode {image.mode}); scale it to 8 bits first")
    image = image.convert(MODES[channels])
    height, width = size
    if image.size != (width, height):
        resample = Image.Resampling.BICUBIC
        image = ImageOps.fit(image, (width, height), resample) if fit == "crop" else image.resize((width, height), resample)
    return np.asarray(image, np.uint8).reshape(height, width, channels)


def images(
    path: str,
    data_dir: str | None,
    *,
    size: int | tuple[int, ...],
    channels: Literal[1, 3, 4] = 3,
    fit: Literal["crop", "stretch"] = "crop",
    holdout: float = 0.1,
    on_bad_example: Policy = "error",
) -> Dataset:
    """Images in folders: `PATH/train/CLASS/*`, with `validation` (or `valid`, `val`, `dev`) and `test` beside, or `PATH/CLASS/*`.

    Every file in a class's folder, and in the folders below, is an image of it, but those whose name begins with a dot.
    Classes are the folders' names, sorted. Images are decoded by Pillow when they are read.

    Args:
      path: relative to the working directory or else to the data directory.
      data_dir: the data directory.
      size: height and width, or both in one number.
      channels: 1 grey, 3 colour, 4 colour and opacity.
      fit: `crop` scales an image until it covers the size and cuts its middle out; `stretch` changes its proportions.
      holdout: share of the training images that validates where no folder does, drawn by a fixed draw; 0 for none.
      on_bad_example: of a file that cannot be decoded: `error`, which ends the run when it is read, or `skip`: its row has weight
        0 and is counted in the metric `skipped_examples`.

    Raises:
      ConfigError: no such folder, no images, or classes that differ between splits.
    """
    size = check_size(size)
    if not 0 <= holdout < 1:
        raise ConfigError(f"config.data.holdout must be at least 0 and below 1, got {holdout}.")
    folder = find_folder(path, data_dir)
    classes, files = {}, {}
    for split, place in _split_folders(folder).items():
        classes[split] = sorted(name for name in os.listdir(place) if os.path.isdir(os.path.join(place, name)) and not name.startswith("."))
        files[split] = [(file, i) for i, name in enumerate(classes[split]) for file in _files(os.path.join(place, name))]
    for split, names in classes.items():
        odd = sorted(set(names) ^ set(classes["train"]))
        if odd:
            has, lacks = (split, "train") if odd[0] in names else ("train", split)
            raise ConfigError(f"config.data.source: {folder}: the class {odd[0]!r} is in {has}, but not in {lacks}.")
    if "validation" not in files and holdout:
        files["train"], files["validation"] = hold_out(files["train"], holdout)
    splits = {split: ImageFiles(part, size, channels, fit) for split, part in files.items()}
    if on_bad_example == "skip":
        splits = {split: Forgiving(source, blank_image(size, channels)) for split, source in splits.items()}
    names = classes["train"]
    return Dataset(splits, {"image_shape": (*size, channels), "num_classes": len(names), "labels": names})


def check_size(size: int | tuple[int, ...] | None) -> tuple[int, int]:
    """(height, width), or ConfigError."""
    both = (size, size) if isinstance(size, int) else size or ()
    if len(both) != 2 or min(both) < 1:
        raise ConfigError(f"config.data.size must be a number above 0, or height and width, got {size}.")
    return tuple(both)


def blank_image(size: tuple[int, int], channels: int) -> dict[str, np.ndarray]:
    """An example of zeros."""
    return {"image": np.zeros((*size, channels), np.uint8), "label": np.int32(0)}


def _split_folders(folder: str) -> dict[str, str]:
    """Split -> its folder; the folder itself trains where no split has one."""
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
