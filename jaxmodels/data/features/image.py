"""Images, and boxes in them."""

import dataclasses
import io
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import numpy as np
from PIL import Image as PillowImage
from PIL import ImageOps

from jaxmodels import config as config_lib
from jaxmodels.data import access, random_crop
from jaxmodels.data.features.base import Column, Feature, Names, Problem, Row, counts
from jaxmodels.data.reading import is_unavailable
from jaxmodels.errors import ConfigError

MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_CHUNK = 256  # images converted to float64 at once


@dataclasses.dataclass(kw_only=True)
class Image(Feature):
    """An image: `image` uint8 [H, W, C], decoded by Pillow on reading. A value is a path, the bytes of a file, or an image of Pillow.

    Attributes:
      image_column: the image, or the path of its file relative to the folder of the file of rows.
      size: height and width, or both in one number.
      channels: 1 grey, 3 colour, 4 colour and opacity.
      fit: `crop` scales an image until it covers the size and takes its centre; `stretch` changes its proportions.
      scale_to: scale an image to this first, and then take the centre of the size: with `crop` the shorter side, with `stretch` height and width, or
        both in one number. Models that were evaluated on 224 of 256 pixels were trained to see images so. The default cuts off nothing else.
      resample: how pixels are interpolated when an image is scaled, as Pillow names it.
      max_pixels: pixels of an image file, width times height; a larger one is a bad example. The default takes 0.2 GB as RGB.
    """

    arrays: ClassVar = ("image",)
    on_read: ClassVar = True
    image_column: Column | None = None
    size: int | tuple[int, ...] | None = None
    channels: Literal[1, 3, 4] = 3
    fit: Literal["crop", "stretch"] = "crop"
    scale_to: int | tuple[int, ...] | None = None
    resample: Literal["bicubic", "bilinear", "lanczos", "nearest", "box", "hamming"] = "bicubic"
    max_pixels: int = 67_108_864

    def __post_init__(self):
        if self.max_pixels < 1:
            raise ConfigError(f"config.data.max_pixels must be at least 1, got {self.max_pixels}.")
        both = (self.size, self.size) if isinstance(self.size, int) else self.size or ()
        if len(both) != 2 or min(both) < 1:
            raise ConfigError(f"config.data.size must be a number above 0, or height and width, got {self.size}.")
        self._size = tuple(both)
        self._scaled = (self.scale_to, self.scale_to) if isinstance(self.scale_to, int) else self.scale_to
        if self._scaled is not None and (len(self._scaled) != 2 or any(there < here for there, here in zip(self._scaled, both, strict=True))):
            raise ConfigError(f"config.data.scale_to must be a number, or height and width, not below size={both}, got {self.scale_to}.")
        if self.fit == "crop" and not isinstance(self.scale_to, int | None):
            raise ConfigError(f"config.data.scale_to={self.scale_to}: with fit='crop' it is one number, the shorter side.")

    def columns(self):
        return {"image_column": self.image_column}

    def encode(self, row):
        try:
            with opened(row.values[self.image_column], row) as file:
                image = file if isinstance(file, PillowImage.Image) else PillowImage.open(file)
                self._check(image)
                return {"image": to_array(image, self._size, self.channels, self.fit, self._scaled, self.resample, random_crop.here())}
        except MemoryError:
            raise
        except Exception as error:  # noqa: BLE001  what a decoder raises depends on where the file is broken
            if is_unavailable(error):
                raise
            raise Problem(f"cannot be decoded as an image: {error}.") from error

    def _check(self, image: PillowImage.Image) -> None:
        """Raise ValueError for an image that is refused before it is decoded: its file has only been opened."""
        width, height = image.size
        if width * height > self.max_pixels:
            raise ValueError(f"it has {width} × {height} pixels, and data.max_pixels={self.max_pixels:,}")
        if image.format == "EPS":  # Pillow would run Ghostscript, an interpreter, on the file
            raise ValueError("it is a PostScript program, not an image; convert it to PNG")

    def blank(self):
        return {"image": np.zeros((*self._size, self.channels), np.uint8)}

    def info(self):
        return {"image_shape": (*self._size, self.channels)}

    @staticmethod
    def describe(columns: Mapping[str, np.ndarray], info: Mapping) -> dict[str, Any]:
        """Return mean and deviation of each channel; bytes are scaled to [0, 1]."""
        column = columns["image"]
        scale = 255 if column.dtype == np.uint8 else 1
        axes = tuple(range(column.ndim - 1))
        mean = column.mean(axes, dtype=np.float64)
        square = np.zeros_like(mean)
        for part in np.array_split(column, max(1, len(column) // _CHUNK)):  # all images at once as float64 may exceed memory
            square += np.square(part - mean).sum(axes)
        deviation = np.sqrt(square / (column.size / column.shape[-1]))
        return {"image": {"mean": (mean / scale).round(4).tolist(), "deviation": (deviation / scale).round(4).tolist()}}


def opened(value: Any, row: Row):
    """Return a context manager of a file: of a path, of bytes, of `{"bytes": …, "path": …}`, or the value itself."""
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str):
        return access.open_whole(access.join(row.folder, value))
    return io.BytesIO(value) if isinstance(value, bytes) else value


def to_array(
    image: PillowImage.Image,
    size: tuple[int, int],
    channels: int,
    fit: str,
    scale_to: tuple[int, int] | None = None,
    resample: str = "bicubic",
    crop: random_crop.Draw | None = None,
) -> np.ndarray:
    """Return an image as uint8 [H, W, C], upright.

    Args:
      image: of Pillow.
      size: (H, W).
      channels, fit, scale_to, resample: those of `Image`, with two numbers in `scale_to`.
      crop: a random window, which is scaled to the size whatever `fit` and `scale_to` are.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):  # Pillow would clip these at 255
        raise ValueError(f"its values have more than 8 bits (mode {image.mode}); scale it to 8 bits first")
    image = (image if crop is None else crop.of(image)).convert(MODES[channels])
    (height, width), method = size, PillowImage.Resampling[resample.upper()]
    if crop is not None:
        image = image.resize((width, height), method)
    elif scale_to is not None:
        image = _centre(image.resize(_scaled(image.size, scale_to, fit), method), width, height)
    elif image.size != (width, height):
        image = ImageOps.fit(image, (width, height), method) if fit == "crop" else image.resize((width, height), method)
    return np.asarray(image, np.uint8).reshape(height, width, channels)


def _scaled(now: tuple[int, int], scale_to: tuple[int, int], fit: str) -> tuple[int, int]:
    """Return the (width, height) of an image that is scaled to (height, width), or until its shorter side is the first of them."""
    if fit == "stretch":
        return scale_to[1], scale_to[0]
    short, long = scale_to[0], int(scale_to[0] * max(now) / min(now))
    return (short, long) if now[0] <= now[1] else (long, short)


def _centre(image: PillowImage.Image, width: int, height: int) -> PillowImage.Image:
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


@dataclasses.dataclass(kw_only=True)
class Boxes(Names, Feature):
    """Boxes with a class each: `boxes` float32 [N, 4] and `box_labels` int32 [N], padded with -1.

    A box is (left, top, right, bottom) in fractions of the width and height, so that it fits an image that is stretched.

    Attributes:
      boxes_column: list of boxes; set with box_labels_column.
      box_labels_column: list of class names, as many as boxes.
      max_boxes: boxes of an example, N; a row with more is a bad example.
    """

    arrays: ClassVar = ("boxes", "box_labels")
    listed: ClassVar = "box_labels"
    boxes_column: Column | None = None
    box_labels_column: Column | None = None
    max_boxes: int = 32

    def __post_init__(self):
        if self.boxes_column is None or self.box_labels_column is None:
            raise ConfigError("config.data: boxes_column and box_labels_column go together: boxes with a class each.")
        if self.max_boxes < 1:
            raise ConfigError(f"config.data.max_boxes must be at least 1, got {self.max_boxes}.")
        self._numbers: dict[str, int] = {}

    def columns(self):
        return {"boxes_column": self.boxes_column, "box_labels_column": self.box_labels_column}

    def _values(self, row: Row) -> tuple[np.ndarray, list[str]]:
        """Return float64 [boxes, 4] and their labels; Problem where they are malformed."""
        labels = row.values[self.box_labels_column]
        try:
            boxes = np.array(row.values[self.boxes_column], np.float64).reshape(-1, 4)
        except (TypeError, ValueError) as error:
            raise Problem(f"{self.boxes_column!r} is not a list of boxes [left, top, right, bottom].") from error
        if not isinstance(labels, list) or not all(isinstance(label, (str, int)) for label in labels) or len(labels) != len(boxes):
            raise Problem(f"{self.box_labels_column!r} is {labels!r}, not a list of {len(boxes)} class names, one for each box.")
        return boxes, [str(label).strip() for label in labels]

    def check(self, row):
        boxes, _ = self._values(row)
        if len(boxes) > self.max_boxes:
            raise Problem(f"{len(boxes)} boxes, where {self.max_boxes} fit; raise data.max_boxes.")
        ordered = (boxes[:, :2] < boxes[:, 2:]).all(1) & (boxes >= 0).all(1) & (boxes <= 1).all(1)
        if not ordered.all():
            wrong = boxes[~ordered][0].tolist()
            raise Problem(f"the box {wrong} is not [left, top, right, bottom] in fractions of the image, with left < right and top < bottom.")

    def fit(self, rows):
        self._numbers = {name: i for i, name in enumerate(sorted({label for row in rows for label in self._values(row)[1]}))}

    def encode(self, row):
        boxes, labels = self._values(row)
        unknown = next((label for label in labels if label not in self._numbers), None)
        if unknown is not None:
            raise Problem(f"the box label {unknown!r} is none of {', '.join(self._numbers)}.{config_lib.suggest(unknown, self._numbers)}")
        result = self.blank()
        result["boxes"][: len(boxes)] = boxes
        result["box_labels"][: len(boxes)] = [self._numbers[label] for label in labels]
        return result

    def blank(self):
        return {"boxes": np.full((self.max_boxes, 4), -1, np.float32), "box_labels": np.full(self.max_boxes, -1, np.int32)}

    def info(self):
        return {"num_box_classes": len(self._numbers), "box_labels": list(self._numbers), "max_boxes": self.max_boxes}

    @staticmethod
    def show(name, example, info):
        if name == "box_labels":
            return None
        pairs = zip(np.asarray(example["boxes"]), np.asarray(example["box_labels"]), strict=True)
        names = info.get("box_labels")
        return "; ".join(f"{names[label] if names else label} {', '.join(f'{edge:.3g}' for edge in box)}" for box, label in pairs if label >= 0)

    @staticmethod
    def describe(columns, info):
        labels = columns["box_labels"]
        return {"box_labels": counts(labels[labels >= 0], info.get("box_labels")), "boxes": {"mean": float((labels >= 0).sum(1).mean())}}
