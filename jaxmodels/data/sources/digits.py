"""1,797 handwritten digits, 8×8, that come with scikit-learn (Alpaydin and Kaynak 1998): real images, offline."""

import importlib.util
from pathlib import Path

import numpy as np

from jaxmodels.data.source import Arrays, Dataset
from jaxmodels.errors import ConfigError

GAP = 3  # columns between digits of a line, at most


def digits(*, split_seed: int = 0) -> Dataset:
    """Read the digits, split once by `split_seed`: 70% train, 10% validation, 20% test.

    Examples: `image` float32 [8, 8, 1] in [0, 1], `label` int32.

    Args:
      split_seed: seed of the split.
    """
    if split_seed < 0:
        raise ConfigError(f"config.data.split_seed must not be negative, got {split_seed}.")
    table = _table()
    images = (table[:, :-1].reshape(-1, 8, 8, 1) / 16).astype(np.float32)
    labels = table[:, -1].astype(np.int32)
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


def _table() -> np.ndarray:
    """Return one row for each digit, float64 [1797, 65]: 64 pixels from 0 to 16, and the label."""
    package = importlib.util.find_spec("sklearn")
    for folder in package.submodule_search_locations if package else ():
        file = Path(folder, "datasets", "data", "digits.csv.gz")
        if file.exists():  # read without scikit-learn, whose import takes over a second
            return np.loadtxt(file, delimiter=",")
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return np.column_stack([images, labels])


def digit_lines(*, longest: int = 6, examples: int = 8000, held_out: int = 500, split_seed: int = 0) -> Dataset:
    """Generate lines of handwritten digits, read column by column, without alignment; deterministic.

    A line's digits are drawn from those of its split, with 0 to 3 empty columns between them.

    Examples: `frames` float32 [T, 8], a column of the line each; `length` int32, the columns that are not padding; `target`
    int32 [longest], the digits, then -1.

    Args:
      longest: maximum number of digits in a line; the minimum is 1.
      examples: lines of the train split.
      held_out: lines of the validation split, and of the test split.
      split_seed: as of `digits`.
    """
    if longest < 1 or examples < 1 or held_out < 1:
        raise ConfigError(f"config.data: longest, examples and held_out must be at least 1, got {longest}, {examples}, {held_out}.")
    splits = {}
    for number, (name, split) in enumerate(digits(split_seed=split_seed).splits.items()):
        image, label = split.arrays["image"], split.arrays["label"]
        bits, rows = np.random.PCG64([split_seed, number]), examples if name == "train" else held_out

        def draw(*shape, below, bits=bits):
            return (bits.random_raw(shape) % np.uint64(below)).astype(np.int32)

        frames = np.zeros((rows, longest * (8 + GAP), 8), np.float32)
        which, gaps, count = draw(rows, longest, below=len(label)), draw(rows, longest, below=GAP + 1), 1 + draw(rows, below=longest)
        there = np.arange(longest) < count[:, None]
        starts = np.cumsum(gaps + 8, axis=1) - 8
        for row, place in zip(*np.nonzero(there), strict=True):
            start = starts[row, place]
            frames[row, start : start + 8] = image[which[row, place], :, :, 0].T
        length = (starts[np.arange(rows), count - 1] + 8).astype(np.int32)
        splits[name] = Arrays({"frames": frames, "length": length, "target": np.where(there, label[which], -1).astype(np.int32)})
    return Dataset(splits, {"frame_width": 8, "num_labels": 10})
