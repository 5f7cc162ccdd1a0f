"""A reader that fails during a run: the state is saved, and the same command goes on once the reader works."""

import os

import pytest
import small_configs
from failing_source import Failing, io_error
from run_processes import start

import jaxmodels
from jaxmodels.data import reading
from jaxmodels.data.reading import ReadError
from jaxmodels.data.skipping import BadExample
from jaxmodels.data.source import Dataset
from jaxmodels.runs.folder import RunFolder

pytestmark = pytest.mark.faults

SPLITS: dict = {}  # what `opened` returns


def opened():
    return Dataset(dict(SPLITS), {"image_shape": (8, 8, 1), "num_classes": 10})


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Trains on the given splits in the folder `x` of `tmp_path`; steps of 10 rows, checkpoints at the end only."""
    monkeypatch.setattr(reading, "RETRY_SECONDS", (0.01, 0.01))
    data = {"source": "test_reader_errors:opened", "batch_size": 10, "memory_gb": 0.0, "shuffle": False, "threads": 0}
    config = small_configs.config(small_configs.CNN, data=data, training__steps=30, evaluation__every=10, checkpoint__every=1000, log__every=1)

    def train(folder="x", **splits):
        SPLITS.clear()
        SPLITS.update(splits)
        return jaxmodels.train(config, str(tmp_path / folder), quiet=True)

    return train


def saved(folder):
    return [int(path.name) for path in (folder / "checkpoints").iterdir()]


def lines(folder):
    """The metrics of a run, without times."""
    timed = ("seconds", "steps_per_second", "examples_per_second", "data_wait")
    return [{key: value for key, value in line.items() if key not in timed} for line in RunFolder(folder).metrics()]


def test_the_steps_before_are_not_lost(run, tmp_path):
    good = {"train": Failing(1000, {}), "validation": Failing(50, {})}
    run("whole", **good)
    with pytest.raises(ReadError, match=r"config.data.source='test_reader_errors:opened', split train: example 174 cannot be read: OSError.*Tried 3 times"):
        run(train=Failing(1000, {174: [io_error()]}), validation=good["validation"])
    (step,) = saved(tmp_path / "x")
    assert 14 <= step <= 17  # batches are placed ahead
    with pytest.raises(ReadError, match="split validation: example 33 cannot be read: ValueError: odd"):
        run(train=good["train"], validation=Failing(50, {33: [ValueError("odd")]}))
    assert 20 in saved(tmp_path / "x")
    with pytest.raises(BadExample, match="a.txt, line 3: odd"):
        run(train=Failing(1000, {250: [BadExample("a.txt, line 3", "odd")]}), validation=good["validation"])
    assert max(saved(tmp_path / "x")) > 20
    run(**good)
    assert lines(tmp_path / "x") == lines(tmp_path / "whole")


def test_an_error_that_passes_is_not_seen(run, tmp_path):
    run("whole", train=Failing(1000, {}))
    run(train=Failing(1000, {174: [io_error()] * 2}, lasts=False))
    assert lines(tmp_path / "x") == lines(tmp_path / "whole")


@pytest.mark.slow
def test_a_lost_mount_ends_the_process_though_other_reads_hang(tmp_path):
    """Python waits at its end for threads, and these never end."""
    (tmp_path / "hang").write_text("")
    config = {"source": "failing_source:unmounted", "batch_size": 10, "memory_gb": 0.0, "shuffle": False, "threads": 4}
    config = small_configs.config(small_configs.CNN, data=config, training__steps=60, evaluation__every=None, checkpoint__every=1000, log__every=1)
    prelude = "from jaxmodels.data import reading\nreading.RETRY_SECONDS = (0.1, 0.1)\nfrom jaxmodels.cli import main\nmain._EXIT_SECONDS = 2.0"
    process = start(config, tmp_path / "x", tmp_path, prelude)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 1 and "Traceback" not in errors
    assert "split train: example 300 cannot be read: OSError: [Errno 5] Input/output error" in errors
    (step,) = saved(tmp_path / "x")
    assert f"saved {tmp_path}/x/checkpoints/{step}." in output
    os.remove(tmp_path / "hang")
    again = start(config, tmp_path / "x", tmp_path)
    output, errors = again.communicate(timeout=120)
    assert again.returncode == 0 and f"checkpoints/{step}" in output, errors
