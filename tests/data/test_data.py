"""Sources, order, batches: deterministic, random access, every example once."""

import importlib.util

import numpy as np
import pytest

from jaxmodels.data import loader
from jaxmodels.data import order as order_lib
from jaxmodels.data.packing import Windows
from jaxmodels.data.registry import open_dataset
from jaxmodels.data.source import Arrays, CachedSource, get_batch
from jaxmodels.errors import ConfigError


@pytest.mark.parametrize("size", [1, 2, 3, 10, 97, 1259, 50_000])
def test_every_epoch_is_another_permutation(size):
    orders = [order_lib.shuffled(np.arange(size), size, seed, epoch) for seed, epoch in [(0, 0), (0, 1), (1, 0)]]
    for order in orders:
        np.testing.assert_array_equal(np.sort(order), np.arange(size))
    if size > 20:
        for i in range(3):
            same = np.mean(orders[i] == orders[i - 1])
            assert same < 0.1, "two orders must not agree more than by chance"


def test_orders_look_random():
    # Over many seeds, the image of position 0 is uniform over 16 cells: chi-squared with 15 degrees of freedom.
    places = np.array([order_lib.shuffled(np.array([0]), 1000, seed, 0)[0] for seed in range(3200)])
    counts = np.bincount(places * 16 // 1000, minlength=16)
    assert ((counts - 200) ** 2 / 200).sum() < 45  # above 45 with a probability of 1e-4
    order = order_lib.shuffled(np.arange(10_000), 10_000, 0, 0)
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.05


def test_a_position_of_a_huge_epoch_costs_no_memory():
    size = 10**15 + 3
    places = order_lib.shuffled(np.array([0, 1, size - 1]), size, 0, 3)
    assert len(set(places)) == 3 and places.min() >= 0 and places.max() < size


def rows(n):
    return Arrays({"x": np.arange(n)})


def test_batches_cover_each_epoch_once_and_continue_into_the_next():
    batches = loader.TrainingBatches(rows(10), 4, 10, seed=3, shuffle=True)
    seen = np.concatenate([batches[s]["x"] for s in range(10)])
    for epoch in range(4):
        assert sorted(seen[epoch * 10 : (epoch + 1) * 10]) == list(range(10))


def test_a_batch_depends_on_seed_and_step_alone():
    def make(seed=3):
        return loader.TrainingBatches(rows(10_000), 64, 300, seed=seed, shuffle=True)

    late_first = make()
    np.testing.assert_array_equal(late_first[250]["x"], [make()[s] for s in range(251)][-1]["x"])
    assert (make(4)[0]["x"] != make(3)[0]["x"]).any()
    unshuffled = loader.TrainingBatches(rows(10), 4, 3, seed=0, shuffle=False)
    np.testing.assert_array_equal(unshuffled[2]["x"], [8, 9, 0, 1])


def rows_of(batch_size, process, count):
    return np.arange(batch_size).reshape(count, -1)[process]


@pytest.mark.parametrize("count", [2, 4])
def test_processes_read_parts_of_the_same_batches(count):
    whole = loader.TrainingBatches(rows(100), 8, 20, seed=0, shuffle=True)
    parts = [loader.TrainingBatches(rows(100), 8, 20, seed=0, shuffle=True, rows=rows_of(8, i, count)) for i in range(count)]
    for step in (0, 13, 19):
        np.testing.assert_array_equal(np.concatenate([p[step]["x"] for p in parts]), whole[step]["x"])
    whole, parts = loader.EvaluationBatches(rows(21), 8), [loader.EvaluationBatches(rows(21), 8, rows=rows_of(8, i, count)) for i in range(count)]
    for number in range(3):
        for key in ("x", "weight"):
            np.testing.assert_array_equal(np.concatenate([p[number][key] for p in parts]), whole[number][key])


@pytest.mark.parametrize("size", [1, 7, 8, 9, 16])
def test_evaluation_sees_each_example_once(size):
    batches = loader.EvaluationBatches(rows(size), 8)
    got = [batches[i] for i in range(len(batches))]
    assert all(len(b["x"]) == 8 for b in got)
    seen = np.concatenate([b["x"][b["weight"] == 1] for b in got])
    np.testing.assert_array_equal(seen, np.arange(size))


@pytest.mark.parametrize(("threads", "workers"), [(0, 0), (4, 0), (0, 2)])
def test_reading_ahead_changes_nothing_and_seeks(threads, workers):
    batches = loader.TrainingBatches(rows(1000), 16, 60, seed=0, shuffle=True)
    stream = loader.read_ahead(batches, start=41, threads=threads, workers=workers, buffer=4)
    got = list(stream)
    stream.close()
    assert len(got) == 60 - 41
    for step, batch in enumerate(got, 41):
        np.testing.assert_array_equal(batch["x"], batches[step]["x"])


def test_a_seek_reads_only_what_it_needs():
    class Counting(Arrays):
        read = 0

        def get_batch(self, indices):
            Counting.read += len(indices)
            return super().get_batch(indices)

    batches = loader.TrainingBatches(Counting({"x": np.arange(1000)}), 10, 10**6, seed=0, shuffle=True)
    next(loader.read_ahead(batches, start=10**6 - 1, threads=0, workers=0, buffer=4))
    assert Counting.read == 10


def test_device_feed_keeps_order_and_ends():
    placed = []
    feed = loader.DeviceFeed(iter([{"x": i} for i in range(5)]), lambda b: placed.append(b["x"]) or b, ahead=2)
    assert next(feed) == {"x": 0} and placed == [0, 1, 2]
    assert [b["x"] for b in feed] == [1, 2, 3, 4]


def test_windows_cover_every_target_once():
    tokens = np.arange(50)
    for length in (1, 7, 48, 49, 60):
        windows = Windows(tokens, length, 1, cover=True)
        got = get_batch(windows, np.arange(len(windows)))["tokens"]
        targets = got[:, 1:]
        np.testing.assert_array_equal(targets[targets >= 0], np.arange(1, 50))
        both = (got[:, :-1] >= 0) & (targets >= 0)
        assert (targets[both] == got[:, :-1][both] + 1).all()


@pytest.mark.parametrize("stride", [1, 3, 8])
def test_training_windows_are_whole(stride):
    windows = Windows(np.arange(50), 8, stride)
    got = get_batch(windows, np.arange(len(windows)))["tokens"]
    np.testing.assert_array_equal(got, [np.arange(s, s + 9) for s in range(0, 42, stride)])


def test_examples_are_decoded_once():
    class Slow:
        reads = 0

        def __len__(self):
            return 10

        def __getitem__(self, i):
            Slow.reads += 1
            return {"x": np.full(3, i), "label": i}

    source = CachedSource(Slow())
    Slow.reads = 0
    for _ in range(3):
        batch = get_batch(source, np.array([3, 1, 3]))
    np.testing.assert_array_equal(batch["x"], [[3] * 3, [1] * 3, [3] * 3])
    assert Slow.reads <= 3 and CachedSource.size(Slow()) == 10 * (3 * 8 + 8)
    np.testing.assert_array_equal(get_batch(Slow(), np.array([2, 4]))["label"], [2, 4])


@pytest.mark.parametrize("find", [importlib.util.find_spec, lambda name: None])  # by its file, and by importing scikit-learn
def test_digits_are_real_split_once_and_disjoint(find, monkeypatch):
    from sklearn.datasets import load_digits

    monkeypatch.setattr(importlib.util, "find_spec", find)
    dataset = open_dataset("digits", {}, None)
    parts = {name: get_batch(split, np.arange(len(split))) for name, split in dataset.splits.items()}
    assert {name: len(p["label"]) for name, p in parts.items()} == {"train": 1259, "validation": 179, "test": 359}
    images = np.concatenate([p["image"].reshape(-1, 64) for p in parts.values()]) * 16
    labels = np.concatenate([p["label"] for p in parts.values()])
    one, other = np.column_stack([images, labels]), np.column_stack(load_digits(return_X_y=True))
    np.testing.assert_array_equal(one[np.lexsort(one.T)], other[np.lexsort(other.T)])
    np.testing.assert_array_equal(parts["test"]["image"], get_batch(open_dataset("digits", {}, None).splits["test"], np.arange(359))["image"])


def test_python_docs_are_english_split_at_the_end():
    dataset = open_dataset("python_docs", {"sequence_length": 64}, None)
    coder = dataset.info["tokenizer"]
    train = coder.decode(dataset.splits["train"][0]["tokens"])
    assert len(train) == 65 and "assert" in train.lower()
    total = len(dataset.splits["train"]) * 64 + len(dataset.splits["validation"]) * 64
    assert total > 300_000


def test_arrays_must_have_one_length():
    with pytest.raises(ConfigError, match="one length"):
        open_dataset("arrays", {}, None, {"train": {"image": np.zeros((3, 2, 2, 1)), "label": np.zeros(4, int)}})
    with pytest.raises(ConfigError, match="needs the arrays"):
        open_dataset("arrays", {}, None)


def test_tfds_without_tensorflow(data_dir):
    import sys

    dataset = open_dataset("tfds:mnist", {"splits": {"train": "train[:100]", "test": "test"}}, data_dir)
    batch = get_batch(dataset.splits["train"], np.arange(3))
    assert batch["image"].shape == (3, 28, 28, 1) and batch["image"].dtype == np.uint8 and batch["image"].max() == 255
    assert batch["label"].dtype == np.int32 and len(dataset.splits["train"]) == 100 and len(dataset.splits["test"]) == 10_000
    assert dataset.info == {"image_shape": (28, 28, 1), "num_classes": 10}
    assert "tensorflow" not in sys.modules
    defaults = open_dataset("tfds:mnist:3.0.1", {"holdout": 5}, data_dir)
    assert {k: len(v) for k, v in defaults.splits.items()} == {"train": 57_000, "validation": 3_000, "test": 10_000}
    with pytest.raises(ConfigError, match="valid"):
        open_dataset("tfds:mnist", {"splits": {"train": "valid"}}, data_dir)
    with pytest.raises(ConfigError, match="VERSION|9.9.9"):
        open_dataset("tfds:mnist:9.9.9", {}, data_dir)
