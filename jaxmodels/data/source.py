"""The protocol of sources of examples, and sources in memory."""

import dataclasses
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np

from jaxmodels.data.narrow import narrowed
from jaxmodels.errors import ConfigError
from jaxmodels.tokenizers.base import Tokenizer

Example = Mapping[str, np.ndarray]
_TOKENS = ("tokens", "source", "target")


@runtime_checkable
class DataSource(Protocol):
    """Examples by global index.

    Optional: `get_batch(indices)`, several examples in one call, if that is faster; `in_memory = True`, if reading ahead
    costs more time than it hides; `fingerprint()`, a checksum by which a resumed run recognises its data.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


@dataclasses.dataclass(frozen=True)
class Dataset:
    """An opened data set.

    Attributes:
      splits: `train`, and optionally `validation` and `test`.
      info: properties of the data that a model depends on: `image_shape`, `num_classes`, `vocab_size`, `tokenizer`, …
      notes: messages that a run prints when it starts.
      fallbacks: deviations from the config, printed as warnings and recorded in the run's manifest.
      guesses: what was concluded from names and contents, printed and recorded in the run's manifest (see `data.guesses`).
      skipped: split -> number of bad examples left out of it, if any (see `data.skipping`).
    """

    splits: Mapping[str, DataSource]
    info: Mapping[str, Any]
    notes: tuple[str, ...] = ()
    fallbacks: tuple[str, ...] = ()
    guesses: tuple[str, ...] = ()
    skipped: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def skipped_metric(self, split: str) -> dict[str, float]:
        """Return the metric `skipped_examples` of a split, or {} if none was left out."""
        return {"skipped_examples": float(self.skipped[split])} if self.skipped.get(split) else {}


@dataclasses.dataclass(frozen=True)
class Untokenized:
    """A data set of text without a tokenizer yet. Sources of text return it, so that the parts of a mixture can share one.

    Attributes:
      tokenizer: the specification or tokenizer that the source was opened with.
      training_texts: returns the texts that a tokenizer is trained on.
      tokenize: specification or tokenizer -> the data set. A specification is trained on `training_texts`.
    """

    tokenizer: str | Tokenizer
    training_texts: Callable[[], Iterable[str]]
    tokenize: Callable[[str | Tokenizer], Dataset]


def get_batch(source: DataSource, indices: np.ndarray) -> dict[str, np.ndarray]:
    """Return the examples at `indices`, stacked along a new first axis."""
    if hasattr(source, "get_batch"):
        return source.get_batch(indices)
    examples = [source[int(i)] for i in indices]
    return {key: np.stack([np.asarray(example[key]) for example in examples]) for key in examples[0]}


def fingerprint(*arrays: np.ndarray) -> int:
    """Return a checksum (CRC-32) of the types, shapes and values of arrays."""
    result = 0
    for array in arrays:
        result = zlib.crc32(f"{array.dtype}{array.shape}".encode(), result)
        result = zlib.crc32(np.ascontiguousarray(array).view(np.uint8), result) if array.size else result
    return result


class Arrays:
    """Examples that are rows of arrays in memory."""

    in_memory = True

    def __init__(self, arrays: Mapping[str, np.ndarray]):
        self.arrays = {key: np.asarray(value) for key, value in arrays.items()}
        for key, value in self.arrays.items():
            if value.ndim == 0 or value.dtype.kind not in "biuf":
                raise ConfigError(f"{key!r} must be an array of numbers with one row per example, got {value.dtype} of shape {value.shape}.")
        lengths = {key: len(value) for key, value in self.arrays.items()}
        if len(set(lengths.values())) != 1 or not next(iter(lengths.values())):
            raise ConfigError(f"the arrays of one split must have one length above 0, got {lengths}.")

    def __len__(self):
        return len(next(iter(self.arrays.values())))

    def fingerprint(self):
        return fingerprint(*self.arrays.values())

    def __getitem__(self, index):
        return {key: value[index] for key, value in self.arrays.items()}

    def get_batch(self, indices):
        return {key: value[indices] for key, value in self.arrays.items()}


class CachedSource:
    """Cache of another source in memory: each example is read and decoded on its first use.

    All examples must have the shape and type of the first. Thread-safe: two threads that read
    the same example at once both decode it, with the same result.
    """

    def __init__(self, source: DataSource):
        self.source = source
        if hasattr(source, "fingerprint"):
            self.fingerprint = source.fingerprint
        first = source[0]
        self.arrays = {k: np.empty((len(source), *np.shape(v)), np.asarray(v).dtype) for k, v in first.items()}
        self.ready = np.zeros(len(source), bool)

    @staticmethod
    def size(source: DataSource) -> int | None:
        """Return the bytes of all examples, estimated from the first few; None if these differ in shape."""
        few = [source[i] for i in range(min(3, len(source)))]
        shapes = {tuple((k, np.shape(v)) for k, v in example.items()) for example in few}
        if len(shapes) != 1:
            return None
        return len(source) * sum(np.asarray(v).nbytes for v in few[0].values())

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        return {key: value[0] for key, value in self.get_batch(np.array([index])).items()}

    def get_batch(self, indices):
        for i in indices[~self.ready[indices]]:
            for key, value in self.source[int(i)].items():
                if np.shape(value) != self.arrays[key].shape[1:]:
                    raise ValueError(
                        f"example {i} has {key} of shape {np.shape(value)}, others {self.arrays[key].shape[1:]}; set data.memory_gb=0 to read without a cache"
                    )
                self.arrays[key][i] = value
            self.ready[i] = True
        return {key: value[indices] for key, value in self.arrays.items()}


def arrays(given: Mapping[str, Mapping[str, np.ndarray]] | None) -> Dataset:
    """Use the arrays of `jaxmodels.train(..., data=...)`: split -> name -> array with one row per example.

    `image_shape` is the shape of an `image`, `num_classes` one more than the largest `label` of train (where labels are whole
    numbers), `num_tags` likewise of `tags`, and `vocab_size` one more than the largest of `tokens`, `source` and `target`.

    Raises:
      ConfigError: arrays of another kind; numbers that are not finite, or do not fit in 32 bits; a label or tag above the largest of train; tags
        that are not one for each token.
    """
    if given is None:
        raise ConfigError(
            "config.data.source='arrays' needs the arrays: jaxmodels.train(config, workdir, data={'train': {'image': ..., 'label': ...}, 'test': ...})."
        )
    if not isinstance(given, Mapping) or not all(isinstance(part, Mapping) for part in given.values()):
        raise ConfigError("data= must be arrays by split: {'train': {'image': ..., 'label': ...}, 'test': ...}.")
    splits = {name: Arrays({key: _checked(key, name, value) for key, value in part.items()}) for name, part in given.items()}
    columns = {key: {name: part.arrays[key] for name, part in splits.items() if key in part.arrays} for key in ("image", "label", "tags", *_TOKENS)}
    info = {}
    if columns["image"]:
        info["image_shape"] = next(iter(columns["image"].values())).shape[1:]
    if columns["label"] and any(c.dtype.kind != "f" for c in columns["label"].values()):  # floats are values to predict
        info["num_classes"] = _range("label", columns["label"], 0)
    if columns["tags"]:
        info["num_tags"] = _range("tags", columns["tags"], -1)
        info["tags"] = [str(i) for i in range(info["num_tags"])]
    sizes = [max(_range(key, {name: c}, -1) for name, c in columns[key].items()) for key in _TOKENS if columns[key]]
    if sizes:
        info["vocab_size"] = max(sizes)
    for name, tags in columns["tags"].items():
        tokens = columns["tokens"].get(name)
        if tokens is None or tags.shape != tokens.shape:
            raise ConfigError(f"data=: the tags of {name} must be one for each of its tokens; they are {tags.shape}, the tokens {np.shape(tokens)}.")
    return Dataset(splits, info)


def _checked(key: str, split: str, values: Any) -> np.ndarray:
    """Return an array in 32 bits."""
    try:
        return narrowed(np.asarray(values))
    except ValueError as error:
        raise ConfigError(f"data=: {key!r} of {split}: {error}.") from error


def _range(key: str, columns: Mapping[str, np.ndarray], least: int) -> int:
    """Return one more than the largest number of train, or of the first split; ConfigError if another split exceeds it."""
    order = sorted(columns, key=lambda name: name != "train")
    for name in order:
        column = columns[name]
        if column.dtype.kind not in "iu" or column.min() < least:
            raise ConfigError(f"data=: {key!r} of {name} must be whole numbers from {least} on.")
        if column.max() > columns[order[0]].max():
            where = np.argwhere(column == column.max())[0]
            raise ConfigError(f"data=: {key!r} of {name}, row {where[0]}: {column.max()} is more than any of {order[0]}, {columns[order[0]].max()}.")
    return int(columns[order[0]].max()) + 1
