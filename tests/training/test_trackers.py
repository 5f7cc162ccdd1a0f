"""Trackers: their output, failures of disk and network, and resuming."""

import csv
import io
import json
import os
import socket
import struct
import subprocess
import sys
import threading
import time
import types
import wave

import numpy as np
import pytest
import small_configs
from PIL import Image

import jaxmodels
from jaxmodels.errors import ConfigError
from jaxmodels.experiment.build import build_experiment
from jaxmodels.runs.folder import RunFolder
from jaxmodels.training import trackers
from jaxmodels.training.callback import Callback
from jaxmodels.training.trackers import background as background_lib
from jaxmodels.training.trackers import media as media_lib
from jaxmodels.training.trackers.background import Background, Group
from jaxmodels.training.trackers.wandb import Wandb

CONFIG = {"model": {"name": "cnn", "features": (4, 8)}, "init_from": None, "seed": 3}
PARENTS = [{"run": "runs/parent", "id": "abc", "step": 7, "taken": ["a", "b"]}]


class FakeRun:
    """A run that records the requests of callbacks."""

    def __init__(self, path, step=0):
        self.folder = RunFolder(path)
        self.folder.write_config(CONFIG)
        self.folder.identify()
        self.experiment = types.SimpleNamespace(config=CONFIG, steps=100)
        self.step, self.resumed = step, step > 0
        self.warnings, self.lines, self.records, self.threads = [], [], {}, set()

    def warn(self, message):
        self.threads.add(threading.current_thread())
        self.warnings.append(message)

    def say(self, message):
        self.threads.add(threading.current_thread())
        self.lines.append(message)

    def record(self, values):
        self.threads.add(threading.current_thread())
        self.records |= values


class Recorder(Callback):
    """A tracker that records its calls."""

    def __init__(self):
        self.calls = []
        self.ended = threading.Event()

    def on_start(self, run):
        self.calls.append("start")

    def on_log(self, run, step, values):
        self.calls.append((step, values))

    def on_media(self, run, step, name, media, kind, **options):
        self.calls.append((step, name, media, kind, options))

    def on_end(self, run, result):
        self.calls.append("end")
        self.ended.set()


class Slow(Recorder):
    """A tracker whose first call waits until it is released."""

    def __init__(self):
        super().__init__()
        self.entered, self.released = threading.Event(), threading.Event()

    def on_start(self, run):
        self.entered.set()
        self.released.wait()
        super().on_start(run)


class Keyed:
    """A user's tracker."""

    def __init__(self, *, channel: str, every: int = 1):
        self.channel, self.every = channel, every


def start(folder, entries, step=0):
    """A fake run and its trackers, started."""
    run, started = FakeRun(folder, step), trackers.make_trackers(entries)
    for tracker in started:
        tracker.on_start(run)
    return run, started


def each(started, method, run, *arguments, **options):
    for tracker in started:
        getattr(tracker, method)(run, *arguments, **options)


def wait_for(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


# The config


def test_entries_are_names_or_dicts():
    made = trackers.make_trackers(["jsonl", "tensorboard", {"name": "test_trackers:Keyed", "channel": "x"}, {"name": "test_trackers:Keyed", "channel": "y"}])
    assert [tracker.name for tracker in made] == ["jsonl", "media", "tensorboard", "test_trackers:Keyed", "test_trackers:Keyed"]
    assert [tracker._tracker.channel for tracker in made[3:]] == ["x", "y"] and made[3]._tracker.every == 1
    assert all(tracker.on_error == "continue" for tracker in made)


@pytest.mark.parametrize(
    "entries, message",
    [
        (["jsonl", "tensorbord"], r"config.log.trackers\[1\]: there is no tracker 'tensorbord'. Did you mean 'tensorboard'\?"),
        (["jsonl", {"name": "csv", "path": "x"}], r"config.log.trackers\[1\].path: tracker 'csv' has no such key"),
        (["jsonl", {"name": "test_trackers:Keyed"}], r"config.log.trackers\[1\].channel is required"),
        (["jsonl", {"name": "test_trackers:Keyed", "channel": 3}], r"config.log.trackers\[1\].channel must be a string, got 3"),
        (["jsonl", {"project": "x"}], r"config.log.trackers\[1\] must be a name"),
        (["jsonl", 3], r"config.log.trackers\[1\] must be a name"),
        (["jsonl", "jsonl"], r"config.log.trackers\[1\]: 'jsonl' is listed twice"),
        (["jsonl", "no_such_package:Tracker"], r"config.log.trackers\[1\]: cannot import 'no_such_package:Tracker'"),
        (["jsonl", "test_trackers:start"], r"config.log.trackers\[1\]: 'test_trackers:start' is not a class"),
        (["tensorboard"], r"config.log.trackers must include 'jsonl'"),
    ],
)
def test_wrong_entries(entries, message):
    with pytest.raises(ConfigError, match=message):
        trackers.make_trackers(entries)


@pytest.mark.parametrize("name, module", [("wandb", "wandb"), ("mlflow", "mlflow.tracking"), ("mlflow", "sqlalchemy")])
def test_a_missing_package_is_named_before_training(monkeypatch, name, module):
    if module == "sqlalchemy":
        pytest.importorskip("mlflow.tracking", reason="mlflow-skinny is not installed: pip install 'jaxmodels[mlflow]'")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=rf"pip install 'jaxmodels\[{name}\]'"):
        trackers.make_trackers(["jsonl", name])


# Files


def png(path):
    return np.asarray(Image.open(path))


def test_files_of_metrics_and_media(tmp_path):
    run, started = start(tmp_path, ["jsonl", "csv"])
    images = np.random.default_rng(0).integers(0, 256, (3, 4, 5, 3), np.uint8)
    each(started, "on_log", run, 10, {"loss": 0.5, "a,b": float("nan")})
    each(started, "on_evaluate", run, 10, "validation", {"loss": 0.25})
    each(started, "on_media", run, 10, "sample", "two\nlines", "text")
    each(started, "on_media", run, 10, "drawn/x", images, "images")
    each(started, "on_media", run, 10, "one", images[0].astype(np.float32) / 255, "images")
    each(started, "on_media", run, 10, "said", np.array([[0.0, 1.0, -1.0], [0.5, 2.0, float("nan")]], np.float32), "audio", rate=8000)
    each(started, "on_end", run, None)
    assert run.folder.metrics("validation") == [{"step": 10, "split": "validation", "loss": 0.25}]
    with open(tmp_path / "metrics.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert rows == [["step", "split", "name", "value"], ["10", "train", "loss", "0.5"], ["10", "train", "a,b", "nan"], ["10", "validation", "loss", "0.25"]]
    assert (tmp_path / "samples.txt").read_text() == "--- step 10 ---\ntwo\nlines\n\n"
    np.testing.assert_array_equal(png(tmp_path / "media" / "one_10.png"), images[0])
    grid = png(tmp_path / "media" / "drawn_x_10.png")  # 2 x 2 tiles with a gap of 2 pixels; the last is black
    assert grid.shape == (4 + 2 + 4, 5 + 2 + 5, 3)
    np.testing.assert_array_equal([grid[:4, :5], grid[:4, 7:], grid[6:, :5]], images)
    assert not grid[6:, 7:].any() and not grid[4:6].any()
    for index, expected in enumerate([[0, 32767, -32767], [16384, 32767, 0]]):
        with wave.open(str(tmp_path / "media" / f"said-{index}_10.wav")) as file:
            assert (file.getframerate(), file.getnchannels(), file.getsampwidth()) == (8000, 1, 2)
            np.testing.assert_array_equal(np.frombuffer(file.readframes(9), "<i2"), expected)


def test_a_figure_is_drawn_when_it_is_shown(tmp_path):
    """The thread of a tracker may handle the figure after the caller has closed it."""
    drawn = []

    class Figure:
        def savefig(self, file, format):
            drawn.append(threading.current_thread())
            Image.new("RGBA", (6, 4), (255, 0, 0, 255)).save(file, format)

    run, started = start(tmp_path, ["jsonl", "tensorboard"])
    each(started, "on_media", run, 3, "curve", Figure(), "figure")
    each(started, "on_end", run, None)
    assert set(drawn) == {threading.main_thread()} and not run.warnings
    np.testing.assert_array_equal(png(tmp_path / "media" / "curve_3.png"), np.broadcast_to([255, 0, 0], (4, 6, 3)))


def test_a_matplotlib_figure():
    figure_lib = pytest.importorskip("matplotlib.figure", reason="Matplotlib is not installed")
    figure = figure_lib.Figure(figsize=(2, 1), dpi=50)
    figure.subplots().plot([1, 2])
    media, kind = media_lib.normalize(figure, "figure")
    assert kind == "images" and media.shape == (1, 50, 100, 3) and media.min() < 255


@pytest.mark.parametrize(
    "media, kind, options, message",
    [
        (np.zeros((4, 5), np.uint8), "images", {}, r"\[H, W, C\].*got shape \(4, 5\)"),
        (np.zeros((4, 5, 2), np.uint8), "images", {}, "1, 3 or 4 channels"),
        (np.zeros((4, 5, 3), np.int32), "images", {}, "uint8, or float.*got int32"),
        (np.zeros(5, np.int16), "audio", {"rate": 8000}, "float of .*got int16"),
        (np.zeros(5, np.float32), "audio", {}, "rate=SAMPLES_PER_SECOND"),
        (3, "text", {}, "must be a string, got int"),
        ("x", "video", {}, "got 'video'"),
    ],
)
def test_wrong_media(media, kind, options, message):
    with pytest.raises(ValueError, match=message):
        media_lib.normalize(media, kind, **options)


def test_images_in_bfloat16():
    import jax.numpy as jnp

    media, _ = media_lib.normalize(jnp.array([[[0.0], [0.5], [7.0]]], jnp.bfloat16), "images")
    np.testing.assert_array_equal(media, np.array([0, 128, 255], np.uint8).reshape(1, 1, 3, 1))


def test_files_rewind_on_resume(tmp_path):
    """A run that is killed after step 30, with its latest checkpoint at step 20, and resumed, ends with the files of an uninterrupted run."""
    entries, image = ["jsonl", "csv"], np.zeros((2, 2, 1), np.uint8)

    def train(run, started, steps):
        for step in steps:
            each(started, "on_log", run, step, {"loss": 1 / step})
            each(started, "on_evaluate", run, step, "validation", {"loss": 2 / step})
            each(started, "on_media", run, step, "x", image + step, "images")
            each(started, "on_media", run, step, "x", f"at {step}", "text")

    run, started = start(tmp_path / "whole", entries)
    train(run, started, (10, 20, 30, 40))
    run, started = start(tmp_path / "resumed", entries)
    train(run, started, (10, 20, 30))
    (tmp_path / "resumed" / "media" / "mine.png").write_bytes(b"not ours")
    run.folder.rewind(20, 20, False)  # as the trainer does before callbacks start
    run, started = start(tmp_path / "resumed", entries, step=20)
    assert sorted(os.listdir(tmp_path / "resumed" / "media")) == ["mine.png", "x_10.png", "x_20.png"]
    train(run, started, (30, 40))
    (tmp_path / "resumed" / "media" / "mine.png").unlink()
    for name in ("metrics.jsonl", "metrics.csv", "samples.txt", *(f"media/x_{step}.png" for step in (10, 20, 30, 40))):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "resumed" / name).read_bytes(), name


def test_overwrite_deletes_what_trackers_wrote(tmp_path):
    run, started = start(tmp_path, ["jsonl", "csv", "tensorboard"])
    each(started, "on_log", run, 1, {"loss": 1.0})
    each(started, "on_media", run, 1, "x", np.zeros((2, 2, 1), np.uint8), "images")
    each(started, "on_end", run, None)
    assert {"metrics.csv", "media", "tensorboard"} <= set(os.listdir(tmp_path))
    run.folder.clear()
    assert os.listdir(tmp_path) == []


# TensorBoard


def events(folder):
    """Return the events of all files in a folder, in order. The framing is TFRecord's: length, its checksum, the record, its checksum."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        while content:
            (length,) = struct.unpack("<Q", content[:8])
            found.append(Event.FromString(content[12 : 12 + length]))
            content = content[12 + length + 4 :]
    return found


def test_tensorboard_events(tmp_path):
    run, started = start(tmp_path, ["jsonl", "tensorboard"])
    image, clip = np.arange(12, dtype=np.uint8).reshape(2, 2, 3), np.linspace(-1, 1, 50, dtype=np.float32)
    each(started, "on_log", run, 5, {"loss": 0.5})
    each(started, "on_media", run, 5, "image", image, "images")
    each(started, "on_media", run, 5, "clip", clip, "audio", rate=8000)
    each(started, "on_media", run, 5, "text", "hello", "text")
    each(started, "on_end", run, object())
    run, started = start(tmp_path, ["jsonl", "tensorboard"], step=5)
    each(started, "on_evaluate", run, 7, "validation", {"loss": 0.25})
    each(started, "on_evaluate", run, 7, "validation/far", {"loss": 0.75})
    each(started, "on_end", run, object())
    found = events(tmp_path / "tensorboard")
    assert not run.warnings and [event.file_version for event in found if event.file_version] == ["brain.Event:2"]
    assert [event.step for event in found if event.HasField("session_log")] == [1, 6]  # from this step on TensorBoard hides older events
    values = {(value.tag, event.step): value for event in found for value in event.summary.value}
    assert values["train/loss", 5].simple_value == 0.5 and values["validation/loss", 7].simple_value == 0.25
    assert values["validation/far/loss", 7].simple_value == 0.75
    shown = values["image", 5].image
    np.testing.assert_array_equal(png(io.BytesIO(shown.encoded_image_string)), image)
    assert (shown.height, shown.width, shown.colorspace) == (2, 2, 3)
    audio = values["clip", 5].audio
    assert (audio.sample_rate, audio.num_channels, audio.length_frames) == (8000, 1, 50) and audio.encoded_audio_string[:4] == b"RIFF"
    assert values["text/text_summary", 5].tensor.string_val == [b"hello"]


# Threads


def test_calls_arrive_in_order_and_unchanged(tmp_path):
    run, tracker = FakeRun(tmp_path), Slow()
    wrapped = Background("mine", tracker)
    wrapped.on_start(run)
    values, image = {"loss": 1.0}, np.zeros((2, 2, 3), np.uint8)
    wrapped.on_log(run, 1, values)
    wrapped.on_media(run, 1, "x", image, "images")
    values["loss"], image[:] = 9.0, 255  # the caller continues before the thread handles it
    wrapped.on_log(run, 2, values)
    tracker.released.set()
    wrapped.on_end(run, None)
    assert tracker.calls[:2] == ["start", (1, {"loss": 1.0})] and tracker.calls[3:] == [(2, {"loss": 9.0}), "end"]
    assert not tracker.calls[2][2].any() and not run.warnings


def test_a_blocked_tracker_delays_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(background_lib, "QUEUE_CALLS", 20)
    monkeypatch.setattr(background_lib, "STOP_SECONDS", 0.5)
    run, group = FakeRun(tmp_path), Group()
    blocked, other, healthy = Slow(), Slow(), Recorder()
    wrapped = [Background(name, tracker, group) for name, tracker in (("a", blocked), ("b", other), ("c", healthy))]
    began = time.monotonic()
    each(wrapped, "on_start", run)
    assert blocked.entered.wait(10)
    for step in range(100):
        each(wrapped, "on_log", run, step, {"loss": 1.0})
        wait_for(lambda step=step: (step, {"loss": 1.0}) in healthy.calls)
    before = list(run.warnings)
    each(wrapped, "on_end", run, None)
    assert time.monotonic() - began < 30  # three trackers, one time limit; a blocked call would never return
    assert healthy.calls[-1] == "end" and len(healthy.calls) == 102
    assert [w for w in before if "'a'" in w] == ["tracker 'a' does not keep up: its queue is full, and calls are dropped from step 0 on"]
    at_end = [w for w in run.warnings[len(before) :] if "'a'" in w]
    assert at_end == ["tracker 'a' did not finish in time; 22 calls were not written", "tracker 'a': 80 calls were dropped in all"]
    blocked.released.set(), other.released.set()
    assert blocked.ended.wait(10) and len(blocked.calls) == 22  # queued calls arrive later, in order
    assert [step for step, _ in blocked.calls[1:-1]] == list(range(20))


def test_media_in_the_queue_are_bounded_by_their_size(tmp_path, monkeypatch):
    monkeypatch.setattr(background_lib, "QUEUE_BYTES", 250)
    run, tracker = FakeRun(tmp_path), Slow()
    wrapped = Background("mine", tracker)
    wrapped.on_start(run)
    assert tracker.entered.wait(10)
    for step in range(4):
        wrapped.on_media(run, step, "x", np.zeros((10, 10, 1), np.uint8), "images")
    wrapped.on_log(run, 9, {"loss": 1.0})
    tracker.released.set()
    wrapped.on_end(run, object())
    assert [call[0] for call in tracker.calls[1:-1]] == [0, 1, 9]
    assert run.warnings[-1] == "tracker 'mine': 2 calls were dropped in all"


def test_a_slow_call_is_reported_once(tmp_path, monkeypatch):
    monkeypatch.setattr(background_lib, "BLOCKED_SECONDS", 0.05)
    run, tracker = FakeRun(tmp_path), Slow()
    wrapped = Background("mine", tracker)
    wrapped.on_start(run)
    assert tracker.entered.wait(10)
    time.sleep(0.1)
    for step in range(3):
        wrapped.on_log(run, step, {})
    assert len(run.warnings) == 1 and "'mine' has been blocked for" in run.warnings[0]
    tracker.released.set()
    wrapped.on_end(run, object())
    assert len(run.warnings) == 1 and len(tracker.calls) == 5


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SystemExit(1)])
def test_a_tracker_that_raises_is_reported_once_and_dropped(tmp_path, error):
    class Failing(Recorder):
        def on_log(self, run, step, values):
            super().on_log(run, step, values)
            raise error

    run, tracker = FakeRun(tmp_path), Failing()
    wrapped = Background("mine", tracker)
    wrapped.on_start(run)
    wrapped.on_log(run, 1, {})
    wait_for(lambda: wrapped._finished.is_set())
    for step in (2, 3):
        wrapped.on_log(run, step, {})
    wrapped.on_end(run, object())
    assert tracker.calls == ["start", (1, {})]
    assert run.warnings == [f"tracker 'mine' failed in on_log ({type(error).__name__}: {error}); training continues without it"]


def test_messages_of_trackers_are_passed_on_in_the_loops_thread(tmp_path):
    """The manifest has one writer."""

    class Speaking(Callback):
        def on_log(self, run, step, values):
            run.warn(f"warned at {run.step}"), run.say("said"), run.record({"id": 3})

    run = FakeRun(tmp_path)
    wrapped = Background("mine", Speaking())
    wrapped.on_start(run)
    run.step = 4
    wrapped.on_log(run, 4, {})
    run.step = 5
    wrapped.on_end(run, object())
    assert (run.warnings, run.lines, run.records) == (["warned at 4"], ["said"], {"id": 3})
    assert run.threads == {threading.main_thread()}


def test_a_process_exits_while_a_tracker_hangs(tmp_path):
    program = (
        "import sys; sys.path[:0] = sys.argv[2:]; import threading, test_trackers as t\n"
        "t.background_lib.STOP_SECONDS = 0.2\n"
        "run, tracker = t.FakeRun(sys.argv[1]), t.Slow(); wrapped = t.Background('mine', tracker)\n"
        "wrapped.on_start(run); wrapped.on_log(run, 1, {}); wrapped.on_end(run, None); print(run.warnings)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path, os.path.dirname(__file__), os.path.dirname(small_configs.__file__)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0 and "did not finish in time; 3 calls were not written" in done.stdout, done.stderr


@pytest.mark.faults
def test_a_full_disk_drops_tensorboard(tmp_path, small_disk):
    run, started = start(tmp_path / "run", ["jsonl", "tensorboard"])
    for step in range(500):  # 50 kB of events
        each(started, "on_log", run, step, {f"metric{i}": 1.0 for i in range(5)})
    each(started, "on_end", run, object())
    assert len(run.warnings) == 1
    assert run.warnings[0].startswith("tracker 'tensorboard' failed in on_log (OSError: [Errno 28] No space left on device")
    assert len(run.folder.metrics("train")) == 500


@pytest.mark.faults
def test_a_full_disk_of_tensorboard_does_not_stop_training(tmp_path, small_disk):
    """`log.every=1` on a file system of 12 kB: tensorboardX's own writer blocked the loop for ever."""
    config = small_configs.config(small_configs.CNN, training__steps=500, evaluation__every=None, checkpoint__every=1000, log__every=1)
    config["data"]["batch_size"] = 8
    RunFolder(tmp_path / "run").write_config(build_experiment(config).config)  # a folder with a part of a run and no config is refused
    done = []
    training = threading.Thread(target=lambda: done.append(jaxmodels.train(config, str(tmp_path / "run"), quiet=True)), daemon=True)
    training.start()
    training.join(120)
    assert done and done[0].step == 500
    folder = RunFolder(tmp_path / "run")
    assert len(folder.metrics("train")) == 500
    (warning,) = folder.manifest()["fallbacks"]
    assert "'tensorboard' failed in on_log" in warning and "No space left on device" in warning


# The real packages


@pytest.fixture
def patient(monkeypatch):
    """Raise the time limits for a busy machine: the first start of MLflow creates a database."""
    monkeypatch.setattr(background_lib, "STOP_SECONDS", 120.0)
    monkeypatch.setattr(background_lib, "END_SECONDS", 120.0)


def train_in_two_starts(folder, entry):
    """Three lines, a stop and a resume from step 2, with all media; returns the run of each start."""
    runs, image = [], np.arange(27, dtype=np.uint8).reshape(3, 3, 3)
    for step, result in ((0, None), (2, object())):
        run = FakeRun(folder, step)
        run.folder.update_manifest(parents=PARENTS)
        if step:
            run.experiment.config = CONFIG | {"seed": 4}  # as a key that may change on a resume
        started = [tracker for tracker in trackers.make_trackers(["jsonl", entry]) if tracker.name == entry["name"]]
        each(started, "on_start", run)
        for at in range(step + 1, step + 4):
            each(started, "on_log", run, at, {"loss": 1.0 / at, "f1@2": 0.5})
        each(started, "on_media", run, step + 1, "drawn", image + step, "images")
        each(started, "on_media", run, step + 1, "said", np.zeros((2, 80), np.float32), "audio", rate=8000)
        each(started, "on_media", run, step + 1, "wrote", f"a <text> at {step}", "text")
        each(started, "on_evaluate", run, 1, "test", {"loss": 0.25})  # of an earlier step: the best
        each(started, "on_end", run, result)
        assert run.warnings == []
        runs.append(run)
    return runs


def silent_server():
    """A socket that accepts connections and never answers: the worst case of an outage."""
    server = socket.socket()
    server.bind(("127.0.0.1", 0))
    server.listen(50)
    return server


def wandb_records(path):
    """Return the records of a .wandb file: after 7 bytes, LevelDB's log format with fragments in blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, at, parts, records = path.read_bytes(), 7, b"", []
    while at + 7 <= len(content):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        length, kind = struct.unpack("<HB", content[at + 4 : at + 7])
        parts += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or its last fragment
            records.append(Record.FromString(parts))
            parts = b""
    return records


def test_wandb_offline(tmp_path, monkeypatch, patient):
    pytest.importorskip("wandb", reason="wandb is not installed: pip install 'jaxmodels[wandb]'")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    runs = train_in_two_starts(tmp_path / "x", {"name": "wandb", "mode": "offline", "project": "digits", "tags": ["a"]})
    id = runs[0].folder.manifest()["id"]
    assert [run.records["wandb"] for run in runs] == [{"id": id, "project": "digits", "url": None}] * 2
    assert "wandb sync" in runs[0].lines[0]
    folders = sorted((tmp_path / "x" / "wandb").glob("offline-run-*"), key=lambda path: path.stat().st_ctime)
    assert len(folders) == 2 and all(id in folder.name for folder in folders)  # of two in one second, the other ends with -1
    for start_number, folder in enumerate(folders):
        records = wandb_records(folder / f"run-{id}.wandb")
        (header,) = [record.run for record in records if record.HasField("run")][:1]
        assert (header.run_id, header.project, header.display_name, list(header.tags)) == (id, "digits", "x", ["a"])
        updates = [update for record in records for update in [*record.config.update, *record.run.config.update]]
        config = {update.key or update.nested_key[0]: json.loads(update.value_json) for update in updates}
        assert config["model"] == {"name": "cnn", "features": [4, 8]} and config["seed"] == 3 + start_number
        assert config["parents"] == [{"run": "runs/parent", "id": "abc", "step": 7}]
        history = [
            {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            for record in records
            if record.HasField("history")
        ]
        first = 2 * start_number + 1
        logged = [(line["step"], line["train/loss"]) for line in history if "train/loss" in line]
        assert logged == [(step, 1.0 / step) for step in range(first, first + 3)]
        assert [(line["step"], line["test/loss"]) for line in history if "test/loss" in line] == [(1, 0.25)]  # not dropped for its step
        names = {key.partition("/")[0] for line in history for key in line}  # media have nested keys
        assert {"drawn", "said-0", "said-1", "wrote"} <= names
        (drawn,) = (folder / "files" / "media" / "images").glob("drawn*.png")
        np.testing.assert_array_equal(png(drawn), np.arange(27).reshape(3, 3, 3) + 2 * start_number)
        assert len(list((folder / "files" / "media" / "audio").glob("said*.wav"))) == 2
        (exit,) = [record.exit.exit_code for record in records if record.HasField("exit")]
        assert exit == (1, 0)[start_number]


@pytest.mark.parametrize("end", [ConnectionResetError(), SystemExit(-9), None])
def test_wandbs_service_that_was_killed_does_not_end_the_program(end):
    """`wandb.teardown` exits with the service's status, unless it cannot reach the service any more."""
    called = []

    def teardown():
        called.append("teardown")
        if end is not None:
            raise end

    process = types.SimpleNamespace(kill=lambda: called.append("kill"))
    service = types.SimpleNamespace(_proc=types.SimpleNamespace(_process=process))
    tracker = Wandb.__new__(Wandb)
    tracker._wandb = types.SimpleNamespace(setup=lambda: types.SimpleNamespace(assert_service=lambda: service), teardown=teardown)
    tracker.abandon()
    assert called == ["kill", "teardown"]


def test_wandb_without_a_key(monkeypatch, tmp_path):
    pytest.importorskip("wandb", reason="wandb is not installed: pip install 'jaxmodels[wandb]'").teardown()
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.raises(ConfigError, match="wandb login"):
        trackers.make_trackers(["jsonl", "wandb"])


@pytest.mark.faults
@pytest.mark.slow
@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_server_that_never_answers_delays_neither_loop_nor_exit(tmp_path, name):
    pytest.importorskip(name, reason=f"{name} is not installed: pip install 'jaxmodels[{name}]'")
    server = silent_server()
    url = f"http://127.0.0.1:{server.getsockname()[1]}"
    entry = {"wandb": {"name": "wandb", "mode": "online"}, "mlflow": {"name": "mlflow", "tracking_uri": url}}[name]
    program = (
        "import sys, time; sys.path[:0] = sys.argv[2:]; import test_trackers as t\n"
        "t.background_lib.STOP_SECONDS = 1.0\n"
        f"run, started = t.start(sys.argv[1], ['jsonl', {entry}]); begin = time.monotonic()\n"
        "for step in range(100): t.each(started, 'on_log', run, step, {'loss': 1.0})\n"
        "assert time.monotonic() - begin < 10\n"
        "time.sleep(2); t.each(started, 'on_end', run, None); print(run.warnings)"
    )
    variables = os.environ | {"WANDB_BASE_URL": url, "WANDB_API_KEY": "a" * 40, "MLFLOW_DISABLE_TELEMETRY": "true", "NO_PROXY": "127.0.0.1"}
    command = [sys.executable, "-c", program, tmp_path, os.path.dirname(__file__), os.path.dirname(small_configs.__file__)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=variables)  # W&B's own time limit is 90 s, MLflow's 120 s
    server.close()
    assert done.returncode == 0 and "did not finish in time; 102 calls were not written" in done.stdout, done.stderr
    assert "Traceback" not in done.stderr


def test_mlflow_in_a_local_store(tmp_path, monkeypatch, patient):
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    tracking = pytest.importorskip("mlflow.tracking", reason="mlflow-skinny is not installed: pip install 'jaxmodels[mlflow]'")
    pytest.importorskip("sqlalchemy", reason="SQLAlchemy is not installed: pip install 'jaxmodels[mlflow]'")
    runs = train_in_two_starts(tmp_path / "x", {"name": "mlflow", "experiment": "digits"})
    client = tracking.MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'x' / 'mlruns' / 'mlflow.db'}")
    (stored,) = client.search_runs([client.get_experiment_by_name("digits").experiment_id])
    id = stored.info.run_id
    assert [run.records["mlflow"]["id"] for run in runs] == [id, id]
    assert stored.info.run_name == "x" and stored.info.status == "FINISHED"
    assert stored.data.params == {"model.name": "cnn", "model.features": "(4, 8)", "init_from": "None", "seed": "3"}
    assert stored.data.tags["resumed.seed"] == "4" and json.loads(stored.data.tags["parents"]) == [{"run": "runs/parent", "id": "abc", "step": 7}]
    losses = {metric.step: metric.value for metric in client.get_metric_history(id, "train/loss")}
    assert losses == {step: 1.0 / step for step in range(1, 6)}
    assert stored.data.metrics["train/f1_2"] == 0.5  # MLflow allows no @
    assert {metric.step for metric in client.get_metric_history(id, "test/loss")} == {1}
    media = tmp_path / "x" / "mlruns" / "artifacts" / id / "artifacts" / "media"
    names = ["drawn_{}.png", "said-0_{}.wav", "said-1_{}.wav", "wrote_{}.txt"]
    assert sorted(os.listdir(media)) == sorted(name.format(step) for name in names for step in (1, 3))
    np.testing.assert_array_equal(png(media / "drawn_3.png"), np.arange(27).reshape(3, 3, 3) + 2)
    assert (media / "wrote_1.txt").read_text() == "a <text> at 0"
