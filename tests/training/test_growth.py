"""A run that is stopped and resumed many times: its folder and the process stay bounded, and its metrics are those of an uninterrupted run."""

import ctypes
import gc
import json
import os
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path

import jax
import numpy as np
import pytest
import small_configs
from conftest import HELPERS, ROOT

import jaxmodels
from jaxmodels.errors import Interrupted
from jaxmodels.runs.folder import MOST_ENTRIES, RunFolder, shortened
from jaxmodels.training.trackers.event_file import EventFile

pytestmark = pytest.mark.faults

rng = np.random.default_rng(0)
ARRAYS = {split: {"image": rng.uniform(size=(n, 2, 2, 1)).astype(np.float32), "label": rng.integers(0, 2, n).astype(np.int32)} for split, n in (("train", 64), ("test", 8))}  # fmt: skip


def config(steps):
    changes = {"data": {"source": "arrays", "batch_size": 8}, "evaluation": {}, "checkpoint": {"every": 10**6}, "log": {"every": 1, "tensorboard": True}}
    return small_configs.config(small_configs.CNN, model={"name": "cnn", "features": (2,), "hidden": 2}, training__steps=steps, **changes)


class StopAfter(jaxmodels.Callback):
    """Stops a run by a signal after `steps` steps of a start."""

    def __init__(self, steps):
        self._left = steps

    def on_step(self, run, step, metrics):
        self._left -= 1
        if not self._left:
            signal.raise_signal(signal.SIGTERM)


def cycle(settings, workdir):
    """Start, train one step, and stop."""
    with pytest.raises(Interrupted, match="SIGTERM: saved"):
        jaxmodels.train(settings, workdir, data=ARRAYS, quiet=True, callbacks=[StopAfter(1)])


def sizes(workdir):
    """What may grow: files and bytes of the run folder without metrics and event files, and threads and open files of this process."""
    files = [path.relative_to(workdir) for path in Path(workdir).rglob("*") if path.is_file()]
    size = lambda path: (Path(workdir) / path).stat().st_size
    gc.collect()
    return {
        "files": sum(path.parts[0] not in ("checkpoints", "tensorboard") for path in files),
        "checkpoints": sum(size(path) for path in files if path.parts[0] == "checkpoints"),
        "manifest": size("manifest.json"),
        "rest": sum(size(path) for path in files if path.parts[0] not in ("checkpoints", "manifest.json", "metrics.jsonl", "tensorboard")),
        "threads": threading.active_count(),
        "descriptors": len(os.listdir("/proc/self/fd")),
    }


def check_metrics(workdir, steps):
    """One line for each step in metrics.jsonl, and the same in the event files, which are few."""
    from tensorboardX.proto.event_pb2 import Event

    lines = RunFolder(workdir).metrics("train")
    assert [line["step"] for line in lines] == list(range(1, steps + 1))
    files, found, starts = sorted((Path(workdir) / "tensorboard").iterdir()), {}, []
    assert len(files) == 1 + sum(path.stat().st_size for path in files) // (1 << 18)
    for content in (path.read_bytes() for path in files):
        while content:
            event = Event.FromString(content[12 : 12 + int.from_bytes(content[:8], "little")])
            starts += [event.step] if event.HasField("session_log") else []
            found |= dict((event.step, value.simple_value) for value in event.summary.value if value.tag == "train/loss")  # noqa: C402
            content = content[12 + int.from_bytes(content[:8], "little") + 4 :]
    assert starts == list(range(1, steps + 1)) and found.keys() == set(starts)
    np.testing.assert_allclose([found[line["step"]] for line in lines], [line["loss"] for line in lines], rtol=1e-6)
    return lines


def test_a_few_cycles_leave_one_event_file_and_nothing_else(tmp_path):
    settings, workdir = config(1000), str(tmp_path / "x")
    cycle(settings, workdir)
    cycle(settings, workdir)
    before = sizes(workdir)
    cycle(settings, workdir)
    after = sizes(workdir)
    check_metrics(workdir, 3)
    assert after.pop("manifest") - before.pop("manifest") < 1500 and after.pop("checkpoints") < 1.1 * before.pop("checkpoints")
    assert after == before


@pytest.mark.slow
def test_many_cycles(tmp_path, monkeypatch):
    """1,000 of them, or JAXMODELS_CYCLES; the last tenth, of at most 20, are starts of a process of their own."""
    monkeypatch.setattr(gc, "get_freeze_count", lambda: 0)  # a process that freezes objects itself, as the tests do, keeps those of each run
    cycles = int(os.environ.get("JAXMODELS_CYCLES", "1000"))
    alone = min(20, cycles // 10)
    settings, workdir = config(cycles + 1), str(tmp_path / "x")
    measured = {}
    for number in range(1, cycles - alone + 1):
        cycle(settings, workdir)
        if number in (MOST_ENTRIES + 10, 200, 500, cycles - alone):
            measured[number] = sizes(workdir) | {"resident_kib": resource_kib()}
            print(number, measured[number], flush=True)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(settings))
    np.savez(tmp_path / "data.npz", **{f"{split}/{name}": values for split, part in ARRAYS.items() for name, values in part.items()})
    for _ in range(alone):
        program = [sys.executable, "-c", ALONE, str(path), str(tmp_path / "data.npz"), workdir]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests", HELPERS)))}
        process = subprocess.run(program, env=environment, capture_output=True, text=True)
        assert process.returncode == 75, process.stderr
    first, last = measured[min(measured)], measured[max(measured)]
    for name in ("checkpoints", "manifest"):
        assert last[name] <= 1.05 * first[name], (name, measured)
    for name in ("files", "rest", "threads", "descriptors"):
        assert last[name] <= first[name], (name, measured)
    assert last["resident_kib"] < first["resident_kib"] + 100_000, measured
    starts = RunFolder(workdir).manifest()
    assert len(starts["starts"]) == MOST_ENTRIES and starts["starts_left_out"] == cycles - MOST_ENTRIES
    lines = check_metrics(workdir, cycles)
    whole = jaxmodels.train(config(cycles + 1), str(tmp_path / "whole"), data=ARRAYS, quiet=True)
    jaxmodels.train(settings, workdir, data=ARRAYS, quiet=True)
    assert [line["loss"] for line in RunFolder(whole.workdir).metrics("train")][:cycles] == [line["loss"] for line in lines]
    assert RunFolder(workdir).metrics("test")[0]["loss"] == RunFolder(whole.workdir).metrics("test")[0]["loss"]


ALONE = """
import json, sys
import numpy as np
from training.test_growth import StopAfter
import jaxmodels
flat = np.load(sys.argv[2])
data = {split: {name: flat[f"{split}/{name}"] for name in ("image", "label")} for split in ("train", "test")}
try:
    jaxmodels.train(json.load(open(sys.argv[1])), sys.argv[3], data=data, quiet=True, callbacks=[StopAfter(1)])
except jaxmodels.Interrupted:
    sys.exit(75)
"""


def resource_kib():
    """The memory of this process in KiB: resident now, without JAX's caches of traces, and what the allocator keeps for later."""
    jax.clear_caches()
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() // 1024


def test_lists_of_the_manifest_keep_the_first_and_the_latest_entries():
    manifest, key = {}, "starts"
    for number in range(3 * MOST_ENTRIES):
        manifest |= shortened(manifest, key, [*manifest.get(key, []), {"number": number}])
        left_out = max(0, number + 1 - MOST_ENTRIES)
        assert manifest.get("starts_left_out", 0) == left_out and len(manifest[key]) == number + 1 - left_out
        assert manifest[key][0]["number"] == 0 and manifest[key][-1]["number"] == number
    assert [entry["number"] for entry in manifest[key][1:]] == list(range(2 * MOST_ENTRIES + 1, 3 * MOST_ENTRIES))


def test_fallbacks_are_recorded_once_and_are_bounded(tmp_path):
    folder = RunFolder(tmp_path)
    for number in range(2 * MOST_ENTRIES):
        for text in ("the cache cannot be written", f"checkpoint {number} cannot be read"):
            folder.add_to_manifest("fallbacks", text)
    manifest = folder.manifest()
    assert len(manifest["fallbacks"]) == MOST_ENTRIES and manifest["fallbacks"].count("the cache cannot be written") == 1
    assert manifest["fallbacks_left_out"] == MOST_ENTRIES + 1


@pytest.mark.parametrize("cut", [0, 1, 5, 13, 30])
def test_an_event_that_was_not_finished_is_cut_off(tmp_path, cut):
    file = EventFile(tmp_path)
    assert file.is_new
    for number in range(3):
        file.write(bytes([number]) * 20)
    file.close()
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[: 3 * 36 - cut])
    again = EventFile(tmp_path)
    again.write(b"x" * 20)
    again.flush()
    again.close()
    whole = 3 if not cut else 2
    content = path.read_bytes()
    assert not again.is_new and [content[36 * i + 12] for i in range(len(content) // 36)] == [*range(whole), ord("x")] and len(content) == 36 * (whole + 1)


@pytest.mark.parametrize("spoil", [lambda content: b"\0" * len(content), lambda content: content[:5], lambda content: content * 8000])
def test_a_damaged_or_large_event_file_is_left_as_it_is(tmp_path, spoil):
    file = EventFile(tmp_path)
    file.write(b"a" * 20)
    file.close()
    (path,) = tmp_path.iterdir()
    path = path.rename(tmp_path / "events.out.tfevents.1000000000.000.here.1")
    path.write_bytes(before := spoil(path.read_bytes()))
    EventFile(tmp_path).close()
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 2
