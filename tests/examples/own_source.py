"""A source of your own: a function that returns a `Dataset`. Its keyword-only parameters are keys of the section `data`."""

import numpy as np

from jaxmodels.data.source import Arrays, Dataset


def moons(*, examples: int = 600, noise: float = 0.1):
    """Two interleaved half circles, drawn as 8×8 images with one bright pixel.

    Args:
      examples: number of examples of the training split; the others have a quarter of it.
      noise: standard deviation of the position, where a half circle has the radius 1.
    """
    splits = {
        name: _draw(count, noise, seed) for seed, (name, count) in enumerate((("train", examples), ("validation", examples // 4), ("test", examples // 4)))
    }
    return Dataset(splits, info={"image_shape": (8, 8, 1), "num_classes": 2, "labels": ["upper", "lower"]})


def _draw(count: int, noise: float, seed: int) -> Arrays:
    rng = np.random.default_rng(seed)
    label, angle = rng.integers(0, 2, count), rng.uniform(0, np.pi, count)
    x = np.where(label == 0, np.cos(angle), 1 - np.cos(angle)) + rng.normal(0, noise, count)
    y = np.where(label == 0, np.sin(angle), 0.5 - np.sin(angle)) + rng.normal(0, noise, count)
    image = np.zeros((count, 8, 8, 1), np.float32)
    column, row = (np.clip((value + 1.5) / 4 * 8, 0, 7).astype(int) for value in (x, y + 0.5))
    image[np.arange(count), row, column] = 1.0
    return Arrays({"image": image, "label": label.astype(np.int32)})
