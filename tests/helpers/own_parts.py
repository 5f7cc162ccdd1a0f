"""A source for parts of a mixture: small images whose values are their numbers."""

import numpy as np

from jaxmodels.data.source import Arrays, Dataset


def numbers(*, size: int = 40, offset: int = 0) -> Dataset:
    values = offset + np.arange(size, dtype=np.float32)
    part = Arrays({"image": np.broadcast_to(values[:, None, None, None], (size, 6, 6, 1)), "label": np.arange(size, dtype=np.int32) % 4})
    return Dataset({"train": part, "validation": part}, {"image_shape": (6, 6, 1), "num_classes": 4})
