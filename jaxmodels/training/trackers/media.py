"""Media on the host: checked, and encoded as PNG and WAV files."""

import dataclasses
import io
import math
import re
import wave
from typing import Any

import jax
import numpy as np
from PIL import Image

_GAP = 2  # pixels between the images of a grid


@dataclasses.dataclass(frozen=True)
class MediaFile:
    """An encoded image or audio clip.

    Attributes:
      name: of the sample; clips of a batch are numbered, `NAME-0`, `NAME-1`.
      suffix: `.png` or `.wav`.
      content: of the file.
      shape: [H, W, C] of an image, [T] of a clip.
      rate: samples per second of a clip, else None.
    """

    name: str
    suffix: str
    content: bytes
    shape: tuple[int, ...]
    rate: int | None = None

    def filename(self, step: int) -> str:
        """Return `NAME_STEP.SUFFIX`, with characters that are no letters, digits, dots or hyphens replaced."""
        name = re.sub(r"[^\w.-]+", "_", self.name)
        return f"{name}_{step}{self.suffix}"


def normalize(media: Any, kind: str, *, rate: int | None = None) -> tuple[str | np.ndarray, str]:
    """Check media and copy them to the host.

    Args:
      media: by `kind`: a string; images, uint8 or float in [0, 1], of [H, W, C] or [N, H, W, C] with 1, 3 or 4 channels; audio, float in
        [-1, 1], of [T] or [N, T]; a Matplotlib figure. Values out of range are clipped.
      kind: `text`, `images`, `audio` or `figure`.
      rate: samples per second, for audio.

    Returns:
      (media, kind): a string and `text`; uint8 [N, H, W, C] and `images`, also for a figure; float32 [N, T] and `audio`.

    Raises:
      ValueError: an unknown kind, a wrong type or shape, or audio without a rate. TypeError: an unknown option.
    """
    if kind == "text":
        if not isinstance(media, str):
            raise ValueError(f"media of kind 'text' must be a string, got {type(media).__name__}")
        return media, kind
    if kind == "figure":
        buffer = io.BytesIO()
        media.savefig(buffer, format="png")
        return np.array(Image.open(buffer).convert("RGB"))[None], "images"
    if kind not in ("images", "audio"):
        raise ValueError(f"the kind of media must be 'text', 'images', 'audio' or 'figure', got {kind!r}")
    array = np.array(media)  # a copy
    floating = jax.dtypes.issubdtype(array.dtype, np.floating)
    return (_images(array, floating) if kind == "images" else _audio(array, floating, rate)), kind


def _images(array: np.ndarray, floating: bool) -> np.ndarray:
    if array.ndim not in (3, 4) or array.shape[-1] not in (1, 3, 4) or 0 in array.shape:
        raise ValueError(f"images must be of [H, W, C] or [N, H, W, C] with 1, 3 or 4 channels, got shape {array.shape}")
    if floating:
        array = np.rint(np.clip(np.nan_to_num(array.astype(np.float32)), 0, 1) * 255).astype(np.uint8)
    elif array.dtype != np.uint8:
        raise ValueError(f"images must be uint8, or float in [0, 1], got {array.dtype}")
    return array.reshape(-1, *array.shape[-3:])


def _audio(array: np.ndarray, floating: bool, rate: int | None) -> np.ndarray:
    if array.ndim not in (1, 2) or not floating:
        raise ValueError(f"audio must be float of [T] or [N, T], got {array.dtype} of shape {array.shape}")
    if rate is None or int(rate) <= 0:
        raise ValueError(f"audio needs rate=SAMPLES_PER_SECOND, a positive whole number, got {rate!r}")
    return np.atleast_2d(np.clip(np.nan_to_num(array.astype(np.float32)), -1, 1))


def encode(name: str, media: Any, kind: str, *, rate: int | None = None) -> list[MediaFile]:
    """Encode images as one PNG, several as a grid; audio as 16-bit mono WAV, one file a clip.

    Args and errors: as of `normalize`; text is an error.
    """
    media, kind = normalize(media, kind, rate=rate)
    if kind == "images":
        grid = _grid(media)
        buffer = io.BytesIO()
        Image.fromarray(grid[..., 0] if grid.shape[-1] == 1 else grid).save(buffer, format="PNG")
        return [MediaFile(name, ".png", buffer.getvalue(), grid.shape)]
    if kind == "audio":
        names = [name] if len(media) == 1 else [f"{name}-{i}" for i in range(len(media))]
        return [MediaFile(clip_name, ".wav", _wav(clip, int(rate)), clip.shape, int(rate)) for clip_name, clip in zip(names, media, strict=True)]
    raise ValueError(f"media of kind {kind!r} have no file format")


def _grid(images: np.ndarray) -> np.ndarray:
    """Tile [N, H, W, C] row by row into one image, as square as whole images allow, with black gaps."""
    number, height, width, channels = images.shape
    columns = math.ceil(math.sqrt(number))
    rows = math.ceil(number / columns)
    grid = np.zeros((rows * (height + _GAP) - _GAP, columns * (width + _GAP) - _GAP, channels), np.uint8)
    for i, image in enumerate(images):
        top, left = i // columns * (height + _GAP), i % columns * (width + _GAP)
        grid[top : top + height, left : left + width] = image
    return grid


def _wav(clip: np.ndarray, rate: int) -> bytes:
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(np.rint(clip * 32767).astype("<i2").tobytes())
    return buffer.getvalue()
