"""Sources that record which training examples each process reads in each call; the loader requests one batch per call."""

import json
import os

import numpy as np

from jaxmodels.data.registry import open_dataset
from jaxmodels.data.source import Arrays, Dataset
from jaxmodels.errors import RunError


class Watched:
    """Wrapper of an in-memory source; `get_batch` appends its indices to `$WATCH/process-I.jsonl`."""

    in_memory = True  # so that the loader reads on demand and in order

    def __init__(self, source):
        self.source = source
        self.path = os.path.join(os.environ["WATCH"], f"process-{os.environ.get('JAXMODELS_PROCESS', 0)}.jsonl")

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        return self.source[index]

    def get_batch(self, indices):
        with open(self.path, "a") as file:
            file.write(json.dumps(np.asarray(indices).tolist()) + "\n")
        return self.source.get_batch(indices)


def _watch(dataset: Dataset) -> Dataset:
    return Dataset(dataset.splits | {"train": Watched(dataset.splits["train"])}, dataset.info)


def shakespeare(data_dir, *, sequence_length: int, stride: int | None = None) -> Dataset:
    return _watch(open_dataset("text:tinyshakespeare/input.txt", {"sequence_length": sequence_length, "stride": stride}, data_dir))


def numbers(*, size: int = 960) -> Dataset:
    """Return a data set of small images whose class is easy to learn."""
    draw = np.random.default_rng(0)
    labels = (np.arange(size) % 4).astype(np.int32)
    images = draw.normal(size=(size, 8, 8, 1)).astype(np.float32) + labels[:, None, None, None]
    part = Arrays({"image": images, "label": labels})
    return _watch(Dataset({"train": part, "validation": Arrays({"image": images[:50], "label": labels[:50]})}, {"image_shape": (8, 8, 1), "num_classes": 4}))


class Failing(Watched):
    """A source that fails in process 1, at its 30th batch."""

    reads = 0

    def get_batch(self, indices):
        self.reads += len(indices) > 1
        if self.reads == 30 and os.environ.get("JAXMODELS_PROCESS") == "1":
            raise RunError("file 7 of the data cannot be read.")
        return super().get_batch(indices)


def failing() -> Dataset:
    dataset = numbers()
    return Dataset(dataset.splits | {"train": Failing(dataset.splits["train"].source)}, dataset.info)


def batches(folder, rows: int) -> list[list[list[int]]]:
    """Return the indices by process and call, for calls with `rows` rows; other calls only inspect an example."""
    files = sorted(folder.glob("process-*.jsonl"))
    return [[call for line in open(file) if len(call := json.loads(line)) == rows] for file in files]
