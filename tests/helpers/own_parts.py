"""A source for parts of a mixture, and a model, for tests of runs."""

import math

import numpy as np
from flax import nnx

from jaxmodels.data.source import Arrays, Dataset


def numbers(*, size: int = 40, offset: int = 0) -> Dataset:
    values = offset + np.arange(size, dtype=np.float32)
    part = Arrays({"image": np.broadcast_to(values[:, None, None, None], (size, 6, 6, 1)), "label": np.arange(size, dtype=np.int32) % 4})
    return Dataset({"train": part, "validation": part}, {"image_shape": (6, 6, 1), "num_classes": 4})


class Linear(nnx.Module):
    """Logits of one linear layer, with dropout; it compiles quickly."""

    def __init__(self, num_classes: int, image_shape: tuple[int, ...], *, dropout: float = 0.2, rngs: nnx.Rngs):
        self.output = nnx.Linear(math.prod(image_shape), num_classes, rngs=rngs)
        self.dropout = nnx.Dropout(dropout)

    def __call__(self, image, rngs=None):
        x = image.reshape(image.shape[0], -1)
        return self.output(self.dropout(x, rngs=rngs) if rngs is not None else x)
