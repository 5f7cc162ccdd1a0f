"""Classes equally often in training, however many examples each has."""

from typing import Any

import numpy as np

from jaxmodels.data.features.label import Label
from jaxmodels.data.indexed import EncodedRows
from jaxmodels.data.rows import DecodedRows
from jaxmodels.data.skipping import Forgiving
from jaxmodels.data.source import Arrays, DataSource, fingerprint, get_batch
from jaxmodels.data.sources.mixture import Mixture
from jaxmodels.errors import ConfigError


class Chosen:
    """Some examples of a source."""

    def __init__(self, source: DataSource, indices: np.ndarray):
        self.source, self.indices = source, indices
        self.in_memory = getattr(source, "in_memory", False)

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, index):
        return self.source[int(self.indices[index])]

    def get_batch(self, indices):
        return get_batch(self.source, self.indices[indices])

    def fingerprint(self):
        whole = self.source.fingerprint() if hasattr(self.source, "fingerprint") else 0
        return fingerprint(self.indices, np.array([whole]))


def balanced(source: DataSource, labels: np.ndarray | None) -> tuple[Mixture, np.ndarray]:
    """Return the examples of a source with each class equally often, and the number of examples that each class has.

    An epoch ends when the largest class has been seen whole; examples of the others repeat.

    Args:
      source: the examples.
      labels: of each, as `labels_of` returns them.

    Raises:
      ConfigError: the labels are no classes, or are not known before the examples are read.
    """
    if labels is None or labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise ConfigError("config.data.balance needs examples with one class each, from a source whose labels are known when it is opened.")
    numbers = np.unique(labels[labels >= 0])  # -1: a row that is skipped
    parts = [Chosen(source, np.flatnonzero(labels == number)) for number in numbers]
    return Mixture(parts, [1.0] * len(parts)), np.array([len(part) for part in parts])


def labels_of(source: Any) -> np.ndarray | None:
    """Return the label of each example; None if they are not known."""
    if isinstance(source, Forgiving):
        return labels_of(source.source)
    if isinstance(source, Arrays | DecodedRows):
        return source.arrays.get("label")
    if not isinstance(source, EncodedRows):
        return None
    label = next((feature for feature in source.features if type(feature) is Label), None)
    if label is None:
        return None
    whole = np.array([label.number(row) for row in source.rows.scan(label.columns())], np.int64)
    return whole[[source.part.row(i) for i in range(len(source))]]
