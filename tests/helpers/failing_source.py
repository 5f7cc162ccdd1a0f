"""Sources whose reads fail, for tests of what a run does about it."""

import errno
import os
import time

import numpy as np

from jaxmodels.data.source import Dataset


class Failing:
    """Images of one value each. `errors` maps an example to errors that its reads raise, one after the other; the last one stays."""

    def __init__(self, size, errors, lasts=True):
        self.size, self.errors, self.lasts = size, {index: list(each) for index, each in errors.items()}, lasts

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        left = self.errors.get(index)
        if left:
            raise left[0] if len(left) == 1 and self.lasts else left.pop(0)
        return {"image": np.full((8, 8, 1), index / self.size, np.float32), "label": np.int32(index % 10)}


def io_error():
    return OSError(errno.EIO, os.strerror(errno.EIO), "/mnt/lost/x.png")


class Unmounted(Failing):
    """While the file HANG_FILE exists, the reads of one example fail with EIO, and those of all later ones hang."""

    def __getitem__(self, index):
        while index >= 300 and os.path.exists(os.environ["HANG_FILE"]):
            if index == 300:
                raise io_error()
            time.sleep(0.05)
        return super().__getitem__(index)


def unmounted():
    return Dataset({"train": Unmounted(1000, {})}, {"image_shape": (8, 8, 1), "num_classes": 10})
