"""What the tests of rows that stay in their files share: rows, and comparisons."""

import numpy as np

from jaxmodels.data.source import get_batch

TEXT = {"sequence_length": 6, "tokenizer": "word:50"}


def records(count, start=0):
    return [{"text": f"w{i % 7} number {i % 13} é", "label": "odd" if i % 2 else "even", "id": i} for i in range(start, start + count)]


def examples(dataset, split):
    """Return the arrays of all examples of a split."""
    source = getattr(dataset, "splits", dataset)[split]
    return get_batch(source, np.arange(len(source)))


def assert_same(one, other):
    assert one.keys() == other.keys()
    for split in one:
        a, b = (get_batch(part[split], np.arange(len(part[split]))) for part in (one, other))
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])
