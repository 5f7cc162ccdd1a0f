"""Sources that record which training examples each process reads in each call; the loader requests one batch per call."""

import json
import os
import time

import numpy as np

from jaxmodels.data.registry import open_dataset
from jaxmodels.data.source import Arrays, Dataset


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
    """A source with an example that cannot be read, or hangs, while there is a file `failing-SPLIT`, or `hanging-SPLIT`, beside the folder WATCH."""

    def __init__(self, source, split):
        super().__init__(source)
        self.example = {"train": 709, "validation": 30}[split]
        self.failing, self.hanging = (os.path.join(os.path.dirname(os.environ["WATCH"]), f"{what}-{split}") for what in ("failing", "hanging"))

    def get_batch(self, indices):
        if self.example in indices and os.path.exists(self.failing):
            raise ValueError("odd")
        while self.example in indices and os.path.exists(self.hanging):
            time.sleep(0.1)
        return super().get_batch(indices)


def failing() -> Dataset:
    dataset = numbers()
    parts = {split: part.source if isinstance(part, Watched) else part for split, part in dataset.splits.items()}
    return Dataset({split: Failing(part, split) for split, part in parts.items()}, dataset.info)


def batches(folder, rows: int) -> list[list[list[int]]]:
    """Return the indices by process and call, for calls with `rows` rows; other calls only inspect an example."""
    files = sorted(folder.glob("process-*.jsonl"))
    return [[call for line in open(file) if len(call := json.loads(line)) == rows] for file in files]
