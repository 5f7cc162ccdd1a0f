"""Random resized crops (Szegedy et al. 2015, "Going deeper with convolutions") on the host, where an image is decoded: of all its pixels."""

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping

import numpy as np
from PIL import Image

from jaxmodels.errors import ConfigError

_ATTEMPTS = 10  # draws of a window, until one fits into the image
_STREAM = np.array([0, 0, 0, 1], np.uint64)  # numbers other than those of RandAugment at the same position

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomResizedCrop:
    """A random window of each training image, scaled to the size of the example. Flips are drawn by the task (`task.flip`).

    Attributes:
      scale: least and largest area of the window, as fractions of that of the image.
      ratio: least and largest width of the window divided by its height; the logarithm is uniform.
    """

    scale: tuple[float, ...] = (0.08, 1.0)
    ratio: tuple[float, ...] = (3 / 4, 4 / 3)

    def __post_init__(self):
        if len(self.scale) != 2 or not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ConfigError(f"config.data.random_resized_crop.scale must be two numbers in (0, 1], the smaller one first, got {self.scale}.")
        if len(self.ratio) != 2 or not 0 < self.ratio[0] <= self.ratio[1]:
            raise ConfigError(f"config.data.random_resized_crop.ratio must be two numbers above 0, the smaller one first, got {self.ratio}.")

    def check(self, example: Mapping[str, np.ndarray]) -> None:
        """Raise ConfigError for examples without an `image` of bytes, or with boxes, whose places would be others."""
        image = np.asarray(example["image"]) if "image" in example else None
        if image is None or image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] not in (1, 3, 4):
            shown = "have none" if image is None else f"are {image.dtype} {image.shape}"
            raise ConfigError(f"config.data.random_resized_crop needs images of bytes with 1, 3 or 4 channels; those of this source {shown}.")
        if "boxes" in example:
            raise ConfigError("config.data.random_resized_crop: boxes would not stay where their objects are; leave out one of the two.")

    def read(self, read: Callable[[np.ndarray], Batch], indices: np.ndarray, positions: np.ndarray, *, seed: int) -> Batch:
        """Return a batch of cropped images: a pure function of (seed, positions, examples).

        Args:
          read: returns the examples at some indices, int [rows].
          indices: int [B].
          positions: int [B], each row's position in the sequence of all epochs.
          seed: the run's seed.
        """
        rows = []
        for index, position in zip(indices, positions, strict=True):
            with _drawn(self, seed, int(position)) as draw:
                row = read(np.array([index]))
            if not draw.used:  # of a source whose images are arrays
                row = dict(row) | {"image": _of_array(row["image"][0], draw)[None]}
            rows.append(row)
        return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}

    def window(self, width: int, height: int, seed: int, position: int) -> tuple[int, int, int, int]:
        """Return the window at a position in an image: left, top, right, bottom."""
        raw = np.random.Philox(key=np.array([seed, position], np.uint64), counter=_STREAM).random_raw(4 * _ATTEMPTS)
        for area, ratio, left, top in ((raw >> np.uint64(11)) * 2.0**-53).reshape(-1, 4).tolist():
            area = width * height * (self.scale[0] + area * (self.scale[1] - self.scale[0]))
            ratio = math.exp(math.log(self.ratio[0]) + ratio * math.log(self.ratio[1] / self.ratio[0]))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                left, top = int(left * (width - w + 1)), int(top * (height - h + 1))
                return left, top, left + w, top + h
        w = min(width, max(1, round(height * self.ratio[1])))  # the largest window in the middle whose ratio is allowed
        h = min(height, max(1, round(width / self.ratio[0])))
        left, top = (width - w) // 2, (height - h) // 2
        return left, top, left + w, top + h


@dataclasses.dataclass
class Draw:
    """The crop of the example that is read.

    Attributes:
      used: whether the image was cropped when it was decoded.
    """

    crop: RandomResizedCrop
    seed: int
    position: int
    used: bool = False

    def of(self, image: Image.Image) -> Image.Image:
        """Return the window of an image."""
        self.used = True
        return image.crop(self.crop.window(*image.size, self.seed, self.position))


_here: contextvars.ContextVar[Draw | None] = contextvars.ContextVar("draw", default=None)


def here() -> Draw | None:
    """Return the crop of the example that this thread reads; None outside of training, and where images are not cropped."""
    return _here.get()


@contextlib.contextmanager
def _drawn(crop: RandomResizedCrop, seed: int, position: int) -> Iterator[Draw]:
    draw = Draw(crop, seed, position)
    token = _here.set(draw)
    try:
        yield draw
    finally:
        _here.reset(token)


def _of_array(image_HWC: np.ndarray, draw: Draw) -> np.ndarray:
    """Return a crop of an array, scaled to the size of the array."""
    image = Image.fromarray(image_HWC[..., 0] if image_HWC.shape[-1] == 1 else image_HWC)
    return np.asarray(draw.of(image).resize(image.size, Image.Resampling.BICUBIC)).reshape(image_HWC.shape)
