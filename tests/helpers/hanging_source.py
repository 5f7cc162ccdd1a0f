"""A source whose reads can block, for tests of stopping while the loader waits for data."""

import os
import time

import numpy as np

from jaxmodels.data.source import Dataset


class Hanging:
    """Images of one value each. After `limit` reads, reads block while the file named by HANG_FILE exists."""

    def __init__(self, size, limit):
        self.size, self.limit, self.reads = size, limit, 0

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        self.reads += 1
        while self.reads > self.limit and os.path.exists(os.environ["HANG_FILE"]):
            time.sleep(0.05)
        return {"image": np.full((8, 8, 1), index / self.size, np.float32), "label": np.int32(index % 10)}


def training_hangs():
    return Dataset({"train": Hanging(4000, 400)}, {"image_shape": (8, 8, 1), "num_classes": 10})


def evaluation_hangs():
    parts = {"train": Hanging(4000, 10**9), "validation": Hanging(400, 100)}
    return Dataset(parts, {"image_shape": (8, 8, 1), "num_classes": 10})
