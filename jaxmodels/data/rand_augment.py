"""RandAugment (Cubuk et al. 2020) on the host, by the operations of Pillow.

The paper's own code calls the operations of Pillow, which also decodes the images here. Of the libraries with RandAugment,
torchvision, timm and kornia need PyTorch, and Keras computes on the devices that train; Albumentations lacks it, and its
maintained successor is under the AGPL.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from jaxmodels.errors import ConfigError

GREY = 128  # fill value of a shifted or rotated image
STRONGEST = 30.0  # the scale of magnitudes


def _enhance(kind):
    """0.1 to 1.9 times the contrast, brightness, colour or sharpness."""
    return lambda image, strength, sign: kind(image).enhance(1 + 0.9 * sign * strength)


def _affine(image, a, b, c, d, e, f):
    fill = (GREY,) * len(image.getbands()) if len(image.getbands()) > 1 else GREY
    return image.transform(image.size, Image.Transform.AFFINE, (a, b, c, d, e, f), fillcolor=fill)


def _rotate(image, strength, sign):
    fill = (GREY,) * len(image.getbands()) if len(image.getbands()) > 1 else GREY
    return image.rotate(30 * sign * strength, fillcolor=fill)


# The fourteen operations of the paper: (image, strength in [0, 1], sign) -> image. At strength 1 a shear is by 0.3, a shift by 0.45
# of the side, a rotation by 30°; solarizing inverts every pixel, posterizing keeps 4 bits.
OPERATIONS = {
    "identity": lambda image, strength, sign: image,
    "auto_contrast": lambda image, strength, sign: ImageOps.autocontrast(image),
    "equalize": lambda image, strength, sign: ImageOps.equalize(image),
    "rotate": _rotate,
    "solarize": lambda image, strength, sign: ImageOps.solarize(image, round(256 * (1 - strength))),
    "color": _enhance(ImageEnhance.Color),
    "posterize": lambda image, strength, sign: ImageOps.posterize(image, 8 - round(4 * strength)),
    "contrast": _enhance(ImageEnhance.Contrast),
    "brightness": _enhance(ImageEnhance.Brightness),
    "sharpness": _enhance(ImageEnhance.Sharpness),
    "shear_x": lambda image, strength, sign: _affine(image, 1, 0.3 * sign * strength, 0, 0, 1, 0),
    "shear_y": lambda image, strength, sign: _affine(image, 1, 0, 0, 0.3 * sign * strength, 1, 0),
    "translate_x": lambda image, strength, sign: _affine(image, 1, 0, round(0.45 * sign * strength * image.width), 0, 1, 0),
    "translate_y": lambda image, strength, sign: _affine(image, 1, 0, 0, 0, 1, round(0.45 * sign * strength * image.height)),
}
_IN_ORDER = tuple(OPERATIONS.values())


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandAugment:
    """Random operations on each training image, applied in sequence.

    Attributes:
      operations: number of operations.
      magnitude: strength from 0 to 30; 30 rotates by 30°.
    """

    operations: int = 2
    magnitude: float = 9.0

    def __post_init__(self):
        if self.operations < 1:
            raise ConfigError(f"config.data.rand_augment.operations must be at least 1, got {self.operations}.")
        if not 0 <= self.magnitude <= STRONGEST:
            raise ConfigError(f"config.data.rand_augment.magnitude must lie in [0, 30], got {self.magnitude}.")

    def check(self, example: Mapping[str, np.ndarray]) -> None:
        """Raise ConfigError for examples without an `image` that Pillow can transform."""
        image = np.asarray(example["image"]) if "image" in example else None
        if image is None or image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] not in (1, 3):
            shown = "have none" if image is None else f"are {image.dtype} {image.shape}"
            raise ConfigError(f"config.data.rand_augment needs images of bytes with 1 or 3 channels; those of this source {shown}.")

    def batch(self, batch: Mapping[str, np.ndarray], positions: np.ndarray, *, seed: int) -> dict[str, np.ndarray]:
        """Return a batch with its images transformed: a pure function of (seed, positions, images).

        Args:
          batch: has `image` uint8 [B, H, W, C].
          positions: int [B], each row's position in the sequence of all epochs.
          seed: the run's seed.
        """
        images = [self.image(image, seed, int(position)) for image, position in zip(batch["image"], positions, strict=True)]
        return dict(batch) | {"image": np.stack(images)}

    def image(self, image: np.ndarray, seed: int, position: int) -> np.ndarray:
        """Return one image transformed, uint8 [H, W, C]."""
        result = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
        for operation, sign in self.draw(seed, position):
            result = _IN_ORDER[operation](result, self.magnitude / STRONGEST, sign)
        return np.asarray(result).reshape(image.shape)

    def draw(self, seed: int, position: int) -> list[tuple[int, int]]:
        """Return the operations at a position, by number, with the sign of each, 1 or -1."""
        # Raw bits of a bit generator are the same in every version of numpy; this one takes its key as it is.
        raw = np.random.Philox(key=np.array([seed, position], np.uint64)).random_raw(2 * self.operations)
        return [(int(number % len(_IN_ORDER)), 1 - 2 * int(sign % 2)) for number, sign in raw.reshape(-1, 2)]
