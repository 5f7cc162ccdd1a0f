"""Readers that fail: tried again, named, and never mistaken for a bad example."""

import errno
import os
import pickle
import time

import failing_source
import numpy as np
import pytest
from failing_source import Failing, io_error
from PIL import Image

from jaxmodels.data import loader, reading
from jaxmodels.data.features import image as image_lib
from jaxmodels.data.reading import ReadError, is_unavailable, read
from jaxmodels.data.skipping import BadExample
from jaxmodels.data.source import CachedSource
from jaxmodels.data.sources.mixture import Concatenation

pytestmark = pytest.mark.faults


@pytest.fixture
def waits(monkeypatch):
    """The waits between attempts, which take no time here."""
    waited = []
    monkeypatch.setattr(reading.time, "sleep", waited.append)
    return waited


def test_an_io_error_is_tried_again(waits, capfd):
    batch = read(Failing(10, {3: [io_error()] * 4}, lasts=False), np.array([2, 3]), "mine, split train")
    assert batch["label"].tolist() == [2, 3] and waits == list(reading.RETRY_SECONDS[:4])
    warnings = capfd.readouterr().err.splitlines()  # one, not one for each attempt
    assert warnings == ["jaxmodels: warning: mine, split train: OSError: [Errno 5] Input/output error: '/mnt/lost/x.png'; trying again"]


def test_an_io_error_that_stays_names_the_example(waits):
    with pytest.raises(ReadError) as caught:
        read(Failing(10, {3: [io_error()]}), np.array([2, 3, 4]), "mine, split train")
    expected = "mine, split train: example 3 cannot be read: OSError: [Errno 5] Input/output error: '/mnt/lost/x.png'. Tried 6 times in 15.5 s."
    assert str(caught.value) == expected and caught.value.exit_status == 1
    assert waits == list(reading.RETRY_SECONDS)
    assert str(pickle.loads(pickle.dumps(caught.value))) == expected  # as worker processes raise it


def test_an_error_in_a_reader_names_example_and_line_and_is_not_tried_again(waits):
    with pytest.raises(ReadError, match=r"x: example 7 cannot be read: ValueError: odd \(in .*failing_source.py, line \d+\)\.$"):
        read(Failing(10, {7: [ValueError("odd")]}), np.array([6, 7]), "x")
    assert not waits


def test_a_batch_that_fails_as_a_whole(waits):
    class Ragged(Failing):
        def __getitem__(self, index):
            return {"image": np.zeros(index)}

    with pytest.raises(ReadError, match="examples 2 to 5 cannot be read: ValueError"):
        read(Ragged(10, {}), np.array([5, 2]), "x")


def test_bad_examples_keep_their_own_error(waits):
    with pytest.raises(BadExample, match="a.txt, line 3: odd"):
        read(Failing(10, {0: [BadExample("a.txt, line 3", "odd")]}), np.array([0]), "x")


def test_the_part_of_a_mixture_is_named(waits):
    parts = [CachedSource(Failing(4, {})), CachedSource(Failing(6, {2: [io_error()]}))]
    with pytest.raises(ReadError, match=r"example 6 \(example 2 of 'letters'\) cannot be read"):
        read(Concatenation(parts, names=("digits", "letters")), np.array([1, 6]), "x")


def test_batches_of_training_and_evaluation_are_read_so(waits):
    source = Failing(10, {3: [io_error()]})
    with pytest.raises(ReadError, match="t: example 3"):
        _ = loader.TrainingBatches(source, 4, 2, seed=0, shuffle=False, name="t")[0]
    with pytest.raises(ReadError, match="e: example 3"):
        _ = loader.EvaluationBatches(source, 4, name="e")[0]


def test_a_worker_process_that_dies_is_an_error_of_the_reader():
    def killed():
        raise RuntimeError("Worker process was terminated unexpectedly with exit code -9.")
        yield

    stream = loader.Stream(killed(), 0)
    with pytest.raises(ReadError, match="RuntimeError: Worker process was .* exit code -9"):
        next(stream)


@pytest.mark.parametrize(
    "error, expected",
    [
        (OSError(errno.EIO, "x", "/a/b"), True),
        (OSError(errno.ESTALE, "x"), True),
        (ConnectionResetError(errno.ECONNRESET, "x"), True),
        (FileNotFoundError(errno.ENOENT, "x", "/no/such/folder/a.png"), True),  # the mount is lost
        (FileNotFoundError(errno.ENOENT, "x", os.path.join(os.path.dirname(__file__), "missing.png")), False),
        (PermissionError(errno.EACCES, "x", "/a"), False),
        (OSError("image file is truncated"), False),  # of Pillow, about the content
        (ValueError("x"), False),
    ],
)
def test_what_says_that_storage_is_away(error, expected):
    assert is_unavailable(error) == expected


def test_a_lost_disk_is_not_a_bad_example(tmp_path, monkeypatch):
    """With `skip`, all examples of a lost mount would be left out without an error."""
    from jaxmodels.data.registry import open_dataset

    for name in ("a", "b"):
        (tmp_path / "train" / name).mkdir(parents=True)
        for number in range(3):
            Image.new("RGB", (4, 4)).save(tmp_path / "train" / name / f"{number}.png")
    source = open_dataset(f"images:{tmp_path}", {"size": 4, "on_bad_example": "skip"}, None).splits["train"]
    assert source[0]["skipped"] == 0

    def lost(value, row):
        raise failing_source.io_error()

    monkeypatch.setattr(image_lib, "opened", lost)
    with pytest.raises(OSError, match="Input/output error"):
        _ = source[0]


def test_closing_does_not_wait_for_a_thread_that_hangs():
    class Hangs(Failing):
        def __getitem__(self, index):
            if index > 2:
                time.sleep(2)
            return super().__getitem__(index)

    began = time.monotonic()
    with loader.read_ahead(loader.TrainingBatches(Hangs(10, {}), 1, 9, seed=0, shuffle=False), threads=2, workers=0, buffer=4) as stream:
        next(stream)
    assert time.monotonic() - began < 1.5
