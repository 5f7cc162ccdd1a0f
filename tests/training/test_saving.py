"""Saving that fails: a run says so, goes on, tries again, and loses nothing that it has."""

import errno
import io
import os
import re
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import small_configs
from rich.console import Console
from run_state import final_state

from jaxmodels.errors import Interrupted, RunError
from jaxmodels.experiment.build import build_experiment
from jaxmodels.runs import disk
from jaxmodels.runs.checkpoint import Checkpoints, SaveFailed
from jaxmodels.runs.folder import RunFolder
from jaxmodels.training import saving
from jaxmodels.training import trainer as trainer_lib
from jaxmodels.training.callback import Callback
from jaxmodels.training.watchdog import Watchdog

pytestmark = pytest.mark.faults

CONFIG = small_configs.config(small_configs.CNN, training__steps=40, evaluation__every=None, checkpoint={"every": 5, "keep": 2}, log={"every": 1})


class At(Callback):
    """Calls functions after given steps."""

    def __init__(self, **functions):
        self.functions = {int(name.removeprefix("step")): function for name, function in functions.items()}

    def on_step(self, run, step, metrics):
        if step in self.functions:
            self.functions[step]()


def train(config, workdir, *callbacks):
    """Train in this process; return what was printed."""
    output = io.StringIO()
    try:
        trainer_lib.train(build_experiment(config), str(workdir), callbacks=callbacks, console=Console(file=output, width=1000))
    finally:
        train.printed = output.getvalue()
    return train.printed


def kept(workdir):
    return sorted(int(path.name) for path in (Path(workdir) / "checkpoints").iterdir() if path.name.isdigit())


def assert_same(one, other):
    (arrays, metrics), (arrays_2, metrics_2) = final_state(one), final_state(other)
    assert metrics == metrics_2 and arrays.keys() == arrays_2.keys()
    for path in arrays:
        np.testing.assert_array_equal(arrays[path], arrays_2[path], err_msg=path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "x"
    train(CONFIG, folder)
    return folder


@pytest.fixture
def quick(monkeypatch):
    """Pauses between attempts as on a machine that is a hundred times as fast."""
    monkeypatch.setattr(saving, "_FIRST_PAUSE", 0.05)
    monkeypatch.setattr(saving, "_LAST_PAUSE", 0.01)


@pytest.fixture(params=[pytest.param("mounted", marks=pytest.mark.slow), "injected"])
def small_disk(request, tmp_path, monkeypatch):
    """A run folder whose checkpoints lie on a file system of 2 MB, and functions that fill it, once a step is saved, and make room."""
    workdir = tmp_path / "run"
    folder = workdir / "checkpoints"
    RunFolder(workdir).write_config(build_experiment(CONFIG).config)  # a run that has begun may have checkpoints/

    def wait_for(step):
        end = time.monotonic() + 30
        while not (folder / str(step)).exists() or len(kept(workdir)) > 2:  # until the one before is deleted, which makes room
            assert time.monotonic() < end
            time.sleep(0.01)

    if request.param == "injected":
        full = []

        def fails(function):
            def call(source, *args, **options):
                if full and str(folder) in str(source):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(source))
                return function(source, *args, **options)

            return call

        for owner, name in ((os, "replace"), (os, "rename"), (Path, "rename")):
            monkeypatch.setattr(owner, name, fails(getattr(owner, name)))
        yield workdir, lambda step: wait_for(step) or full.append(True), full.clear
        return
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a file system cannot be mounted here: {mounted.stderr.strip()}")

    def fill(step):
        wait_for(step)
        with open(folder / "filler", "wb", buffering=0) as file:
            try:
                while file.write(b"x" * 4096):
                    pass
            except OSError as error:
                assert error.errno == errno.ENOSPC

    yield workdir, fill, lambda: (folder / "filler").unlink()
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_is_said_and_saved_again_when_there_is_room(small_disk, whole, quick, capfd):
    workdir, fill, make_room = small_disk
    held = []
    printed = train(CONFIG, workdir, At(step13=lambda: fill(10), step24=lambda: held.extend(kept(workdir)), step28=make_room))
    warnings = re.findall(r"warning: checkpoint \S+/checkpoints/(\d+) could not be saved: (.*)", printed)
    assert warnings and warnings[0][0] == "15", printed
    assert re.match(r"No space left on device \([\d.]+ kB free\)\. The latest checkpoint is that of step 10; the next attempt is in \d+ s", warnings[0][1]) or (
        "No space left on device" in warnings[0][1]
    )
    assert held == [5, 10], "what was there stays until a newer one is whole"
    assert re.search(r"checkpoint (2[5-9]|3\d) is saved, after \d+ failed attempts?", printed)
    assert "Traceback" not in printed and "Traceback" not in "".join(capfd.readouterr())
    assert kept(workdir) == kept(whole) == [35, 40]
    assert_same(whole, workdir)
    assert not [path for path in (workdir / "checkpoints").iterdir() if not path.name.isdigit()]


def test_a_signal_while_the_disk_is_full_and_after(small_disk, whole, quick, capfd):
    workdir, fill, make_room = small_disk
    stop = lambda: os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(SaveFailed, match=r"step 17 could not be saved\. The latest checkpoint is that of step 10\. Make room") as error:
        train(CONFIG, workdir, At(step13=lambda: fill(10), step17=stop))
    assert error.value.exit_status == 1 and "\n" not in str(error.value)
    assert kept(workdir) == [5, 10]
    make_room()

    def room_and_stop():
        make_room()
        stop()

    with pytest.raises(Interrupted, match="SIGTERM: saved .*/checkpoints/27"):
        train(CONFIG, workdir, At(step18=lambda: fill(10), step27=room_and_stop))
    assert "resumed from" in train.printed and "could not be saved" in train.printed
    assert 27 in kept(workdir)
    train(CONFIG, workdir)
    assert_same(whole, workdir)
    assert "Traceback" not in "".join(capfd.readouterr())


def test_the_last_state_that_cannot_be_saved_ends_the_run_with_an_error(small_disk, whole, quick):
    workdir, fill, make_room = small_disk
    with pytest.raises(SaveFailed, match=r"the state of step 40 could not be saved\. The latest checkpoint is that of step 35\."):
        train(CONFIG, workdir, At(step38=lambda: fill(35)))
    make_room()
    train(CONFIG, workdir)
    assert_same(whole, workdir)


def test_pauses_double_up_to_ten_minutes(monkeypatch, tmp_path):
    class Failing:
        folder = tmp_path

        def save(self, state, progress):
            raise SaveFailed("checkpoint x could not be saved: y")

        saving, wait, steps = lambda self: False, lambda self: None, lambda self: [3]

    now, lines = [0.0], []
    monkeypatch.setattr(saving.time, "monotonic", lambda: now[0])
    saver = saving.Saver(Failing(), lambda line, style=None: lines.append(line), Watchdog())
    attempts = []
    for second in range(4000):
        now[0] = float(second)
        if second == 0 or saver.is_due():
            attempts.append(second)
            saver.save(type("State", (), {"step": second})(), None)
    assert attempts == [0, 11, 32, 73, 154, 315, 636, 1237, 1838, 2439, 3040, 3641]  # a failure is seen, and its pause begins, a second later
    assert len(lines) == len(attempts) and lines[0] == (
        "warning: checkpoint x could not be saved: y. The latest checkpoint is that of step 3; the next attempt is in 10 s"
    )


@pytest.mark.parametrize("fails", [False, True])
def test_closing_waits_for_no_other_process(fails, monkeypatch):
    """After an error of one process the others are elsewhere: to ask them how the save ended was a deadlock."""
    lines = []

    class Last:
        save, steps = lambda self, state, progress: None, lambda self: [3]

        def close(self):
            if fails:
                raise SaveFailed("checkpoint x could not be saved: y")

    saver = saving.Saver(Last(), lambda line, style=None: lines.append(line), Watchdog())
    saver.save(type("State", (), {"step": 4})(), None)
    monkeypatch.setattr(saving.session, "gather", lambda *_: pytest.fail("it asked the other processes"))
    saver.close()
    assert lines == ["warning: checkpoint x could not be saved: y. The latest checkpoint is that of step 3"] * fails


def test_files_of_saves_that_a_kill_interrupted_are_deleted(whole, tmp_path):
    shutil.copytree(whole / "checkpoints", tmp_path / "checkpoints")
    shutil.copytree(whole / "checkpoints" / "40", tmp_path / "checkpoints" / "45.orbax-checkpoint-tmp")
    Checkpoints(tmp_path / "checkpoints", read_only=True).close()
    assert (tmp_path / "checkpoints" / "45.orbax-checkpoint-tmp").exists()
    Checkpoints(tmp_path / "checkpoints").close()
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["35", "40"]


def test_a_checkpoint_that_could_not_be_replaced_stays(tmp_path, monkeypatch, whole):
    shutil.copytree(whole / "checkpoints", tmp_path / "checkpoints")
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    arrays = {"x": np.arange(5)}
    monkeypatch.setattr(checkpoints, "saved_parts", lambda state: arrays)
    monkeypatch.setattr(checkpoints._store._manager, "save", lambda *_, **__: (_ for _ in ()).throw(OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))))
    with pytest.raises(SaveFailed, match=r"checkpoints/40 could not be saved: Disk quota exceeded \("):
        checkpoints.save(type("State", (), {"step": 40})(), trainer_lib.Progress())
    assert checkpoints.steps() == [35, 40] and checkpoints.progress(40).finished
    checkpoints.close()


# Room, and the other files


def test_room_is_said_before_the_first_step(tmp_path, monkeypatch):
    printed = train(small_configs.config(CONFIG, training__steps=2), tmp_path / "x")
    line = next(line for line in printed.splitlines() if "has room for" in line)
    assert re.fullmatch(r"\S+/x/checkpoints has room for \d+ checkpoints of [\d.]+ kB; this run needs 4", line)
    size = 3 * 4 * 1034 + 6 * 4  # parameters and two moments, about
    monkeypatch.setattr(disk, "free", lambda _: 2 * size)
    printed = train(small_configs.config(CONFIG, training__steps=2, checkpoint__keep=3), tmp_path / "y")
    assert re.search(r"warning: \S+/y/checkpoints has room for 1 checkpoints of 12\.\d kB, and this run needs 5 \(checkpoint\.keep \+ 2\)\. Make room", printed)
    # A run that goes on counts the checkpoints that it has.
    monkeypatch.setattr(disk, "free", lambda _: 0)
    folder = tmp_path / "z"
    folder.mkdir()
    (folder / "file").write_bytes(bytes(5000))
    assert disk.room(folder, {"a": np.zeros(250, np.float32)}, keep=2) == (f"{folder} has room for 5 checkpoints of 1.0 kB; this run needs 4", True)


def test_metrics_that_cannot_be_written_wait_and_stop_nothing(tmp_path, whole):
    workdir = tmp_path / "x"
    metrics, aside = workdir / "metrics.jsonl", tmp_path / "metrics.jsonl"

    def fill():
        metrics.rename(aside)
        metrics.symlink_to("/dev/full")

    def make_room():
        metrics.unlink()
        aside.rename(metrics)

    printed = train(CONFIG, workdir, At(step10=fill, step20=make_room))
    (warning,) = re.findall(r"warning: (.*metrics\.jsonl cannot be written.*)", printed)
    assert "(No space left on device): training goes on" in warning
    assert RunFolder(workdir).manifest()["fallbacks"] == [warning]
    assert printed.count("metrics.jsonl is written again, with all lines") == 1
    assert_same(whole, workdir)
    printed = train(
        CONFIG, tmp_path / "y", At(step30=lambda: (tmp_path / "y" / "metrics.jsonl").unlink() or (tmp_path / "y" / "metrics.jsonl").symlink_to("/dev/full"))
    )
    assert re.search(r"metrics\.jsonl lacks the last \d+ lines, from step (29|30|31) on", printed)


def test_a_line_of_metrics_is_written_whole_or_not_at_all(tmp_path):
    folder = RunFolder(tmp_path)
    folder.add_metrics(1, "train", {"loss": 1.0})
    before = folder.metrics_file.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 20, limits[1]))  # room for a part of the next line
    try:
        with pytest.raises(OSError):
            folder.add_metrics(2, "train", {"loss": 2.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert folder.metrics_file.read_bytes() == before


def test_a_manifest_that_cannot_be_written_stops_nothing(tmp_path, whole, monkeypatch):
    original = RunFolder.update_manifest

    def update(self, **values):
        if "fallbacks" in values and "starts" not in values:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(self, **values)

    class Warns(Callback):
        def on_step(self, run, step, metrics):
            if step in (3, 5):
                run.warn(f"something at step {step}")

    monkeypatch.setattr(RunFolder, "update_manifest", update)
    printed = train(CONFIG, tmp_path / "x", Warns())
    assert "something at step 5" in printed and printed.count("manifest.json cannot be written (No space left on device)") == 1
    assert_same(whole, tmp_path / "x")


def test_a_start_on_a_full_disk_is_an_error_of_one_line(tmp_path, whole, monkeypatch):
    shutil.copytree(whole, tmp_path / "x")

    def replace(source, target):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(source))

    before = final_state(whole)[1]
    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(RunError, match=r"/x cannot be written: No space left on device \([\d.]+ \w+ free\)\. No checkpoint was changed") as error:
        train(CONFIG, tmp_path / "x")
    assert error.value.exit_status == 1 and final_state(tmp_path / "x")[1] == before
    assert not list((tmp_path / "x").glob("*.tmp"))
