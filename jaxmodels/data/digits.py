"""1,797 handwritten digits, 8×8, that come with scikit-learn (Alpaydin and Kaynak 1998): real images, offline."""

import numpy as np

from jaxmodels.data.source import Arrays, Dataset
from jaxmodels.errors import ConfigError


def digits(*, split_seed: int = 0) -> Dataset:
    """The digits, split once by `split_seed`: 70% train, 10% validation, 20% test.

    Examples: `image` float32 [8, 8, 1] in [0, 1], `label` int32.
    """
    if split_seed < 0:
        raise ConfigError(f"config.data.split_seed must not be negative, got {split_seed}.")
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    images = (images.reshape(-1, 8, 8, 1) / 16).astype(np.float32)
    labels = labels.astype(np.int32)
    # Raw bits of a bit generator are the same in every numpy version; its permutations need not be.
    order = np.argsort(np.random.PCG64(split_seed).random_raw(len(labels)), kind="stable")
    test, validation = len(order) // 5, len(order) // 10
    parts = {
        "train": order[test + validation :],
        "validation": order[test : test + validation],
        "test": order[:test],
    }
    splits = {name: Arrays({"image": images[part], "label": labels[part]}) for name, part in parts.items()}
    return Dataset(splits, {"image_shape": (8, 8, 1), "num_classes": 10})
