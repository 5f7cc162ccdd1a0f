"""One start at a time writes to a run folder: the lock, its owner's death and silence, and what a second start does."""

import dataclasses
import functools
import io
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time

import pytest
import small_configs
import warm_python
from conftest import HELPERS, ROOT
from rich.console import Console
from run_processes import wait_for

import jaxmodels
from jaxmodels.errors import ConfigError, Interrupted, RunError
from jaxmodels.experiment.build import build_experiment
from jaxmodels.runs import folder as folder_lib
from jaxmodels.runs import lock as lock_lib
from jaxmodels.runs import lock_file, shared_folder
from jaxmodels.runs.folder import RunFolder
from jaxmodels.runs.lock import RunLock
from jaxmodels.runs.lock_file import this_process
from jaxmodels.training import trainer as trainer_lib

pytestmark = pytest.mark.faults

CONFIG = small_configs.config(small_configs.CNN, training__steps=20, evaluation={}, log__tensorboard=False)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "x").mkdir()
    return RunFolder(tmp_path / "x")


def take(folder, **options):
    """A lock that is held, without a heartbeat."""
    lock = RunLock(folder, **options)
    assert lock.attempt() is None
    return lock


def write_lock(folder, beat=7, **changes):
    """Write the lock of another owner, which differs from this process in `changes`."""
    owner = dataclasses.replace(this_process(folder.path), **changes)
    folder.lock_file.write_bytes(owner.encode(beat))
    return owner


@pytest.fixture(scope="module")
def dead():
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def names(folder):
    return sorted(os.listdir(folder.path))


def until_held(lock, seconds=20.0):
    """Attempt until the lock is held; return the seconds that it took, and the lines said."""
    start, lines = time.monotonic(), []
    while (line := lock.attempt()) is not None:
        lines.append(line)
        assert time.monotonic() - start < seconds, lines[-1]
        time.sleep(0.02)
    return time.monotonic() - start, lines


# The lock


def test_a_held_lock_names_its_owner_and_is_removed(folder):
    lock = take(folder)
    assert names(folder) == ["lock.json"]
    owner = json.loads(folder.lock_file.read_text())
    assert owner["pid"] == os.getpid() and owner["path"] == str(folder.path)
    other = RunLock(folder)
    with pytest.raises(RunError) as caught:
        other.attempt()
    for part in (str(folder.path), f"process {os.getpid()} on {owner['host']}", owner["since"], f"kill {os.getpid()}", "another --workdir"):
        assert part in str(caught.value)
    other.release()
    assert names(folder) == ["lock.json"]
    lock.release()
    assert names(folder) == []
    take(folder).release()


def test_the_lock_of_a_dead_process_is_taken_over_at_once(folder, dead):
    write_lock(folder, pid=dead)
    lock = take(folder)
    assert names(folder) == ["lock.json"] and json.loads(folder.lock_file.read_text())["pid"] == os.getpid()
    lock.release()


def test_a_process_with_the_number_of_the_owner_is_not_the_owner(folder):
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        started = lock_file._start_time(process.pid)
        write_lock(folder, pid=process.pid, started=started)
        with pytest.raises(RunError, match=f"in use by process {process.pid} on"):
            RunLock(folder).attempt()
        write_lock(folder, pid=process.pid, started=started - 1)
        take(folder).release()
        process.stdin.close()


def test_a_process_that_ended_and_was_not_waited_for_is_dead(folder):
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    write_lock(folder, pid=process.pid, started=lock_file._start_time(process.pid))
    process.stdin.close()
    while lock_file._start_time(process.pid):
        time.sleep(0.01)
    lock = take(folder)
    assert json.loads(folder.lock_file.read_bytes())["pid"] == os.getpid()
    lock.release()
    process.wait()


@pytest.mark.parametrize("where", [{"host": "elsewhere"}, {"boot": "another"}, {"pid_namespace": "pid:[1]"}, {"path": "/where/it/was/copied/from"}])
def test_a_silent_owner_elsewhere_is_replaced_after_the_limit(folder, where):
    """By the clock here: what the lock says of times may be of any clock. Process 1 exists here, and says nothing of one elsewhere."""
    write_lock(folder, pid=os.getppid(), started=lock_file._start_time(os.getppid()), since="2000-01-01T00:00:00+00:00", **where)
    lock = RunLock(folder, silent_seconds=0.5)
    seconds, lines = until_held(lock)
    assert 0.5 <= seconds < 5 and "waiting for a sign of life of process" in lines[0]
    assert names(folder) == ["lock.json"]
    lock.release()


def test_an_owner_elsewhere_that_beats_is_not_replaced(folder):
    owner = write_lock(folder, host="elsewhere", pid=12)
    lock = RunLock(folder, silent_seconds=0.5)
    for beat in range(10):  # a second in all
        assert "waiting for a sign of life" in lock.attempt()
        folder.lock_file.write_bytes(dataclasses.replace(owner, stopping="SIGTERM").encode(beat))
        assert "process 12 on elsewhere, which saves in" in lock.attempt()
        owner = dataclasses.replace(owner, token=f"next{beat}")
        folder.lock_file.write_bytes(owner.encode(beat))
        time.sleep(0.1)
    lock.attempt()
    folder.lock_file.write_bytes(owner.encode(100))
    with pytest.raises(RunError, match=r"in use by process 12 on elsewhere.*kill 12 on elsewhere"):
        lock.attempt()
    assert lock_file.Owner.decode(folder.lock_file.read_bytes()) == owner


@pytest.mark.parametrize("content", [b"", b"\0" * 4096, b"[]", b'{"token": "../x", "pid": 1}', b'{"token": "x", "pid": -1}', b"[" * 100_000])
def test_a_damaged_lock_is_replaced_after_the_limit(folder, content):
    folder.lock_file.write_bytes(content)
    lock = RunLock(folder, silent_seconds=0.2)
    seconds, _ = until_held(lock)
    assert seconds >= 0.2
    lock.release()
    assert names(folder) == []


def test_a_heartbeat_notes_a_signal_and_a_lost_lock_ends_the_run(folder):
    lock, received = take(folder, beat_seconds=0.05), []
    lock.start(lambda: received[-1] if received else None)
    beats = [json.loads(folder.lock_file.read_text())["beat"], time.sleep(0.3), json.loads(folder.lock_file.read_text())["beat"]]
    assert beats[2] >= beats[0] + 2
    received.append("SIGTERM")
    time.sleep(0.2)
    assert "saves in" in RunLock(folder).attempt()
    folder.lock_file.unlink()  # by hand, by a user who takes it for a stale one
    time.sleep(0.3)
    assert lock.lost is None and folder.lock_file.exists()
    lock.on_step(None, 1, None)
    theirs = write_lock(folder, host="elsewhere", pid=12, token="theirs")
    with pytest.raises(RunError, match="was taken over by process 12 on elsewhere"):
        lock.on_save(None, 1)
    time.sleep(0.2)
    with pytest.raises(RunError, match="was taken over by process 12 on elsewhere"):
        lock.on_step(None, 1, None)
    lock.release()
    assert lock_file.Owner.decode(folder.lock_file.read_bytes()) == theirs


def test_a_heartbeat_never_overwrites_the_lock_of_another(folder):
    """The owner is suspended between reading its lock and writing its heartbeat, and replaced meanwhile."""
    lock = take(folder)
    read = lock_file._read

    def read_and_sleep(path):
        content = read(path)
        os.replace(folder.path / "theirs", folder.lock_file)
        return content

    theirs = dataclasses.replace(this_process(folder.path), host="elsewhere", pid=12)
    (folder.path / "theirs").write_bytes(theirs.encode(0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lock_file, "_read", read_and_sleep)
        lock._file.beat(lock._me.encode(1))
    assert lock_file.Owner.decode(folder.lock_file.read_bytes()) == theirs
    assert not lock._file.beat(lock._me.encode(2))


@pytest.mark.parametrize("chain", [0, 1, 2])
def test_of_many_that_take_over_one_wins(folder, dead, chain):
    """Also where others were killed while they took over."""
    for _ in range(20):
        owner = write_lock(folder, pid=dead)
        for _ in range(chain):
            claim = folder.path / f"lock-{owner.token}.claim"
            owner = dataclasses.replace(this_process(folder.path), pid=dead)
            claim.write_bytes(owner.encode(0))
        locks, barrier, results = [RunLock(folder) for _ in range(8)], threading.Barrier(8), []

        def attempt(lock, barrier=barrier, results=results):
            barrier.wait()
            try:
                results.append(lock.attempt() is None)
            except RunError:
                results.append(False)

        threads = [threading.Thread(target=attempt, args=(lock,)) for lock in locks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sum(results) == 1
        for lock in locks:
            lock.release()
        assert names(folder) == []


def test_a_copy_of_a_folder_whose_owner_lives_is_taken_after_the_limit(folder, tmp_path):
    lock = take(folder)
    (tmp_path / "copy").mkdir()
    copy = RunFolder(tmp_path / "copy")
    copy.lock_file.write_bytes(folder.lock_file.read_bytes())
    other = RunLock(copy, silent_seconds=0.3)
    assert until_held(other)[0] >= 0.3
    other.release()
    lock.release()


def test_an_owner_that_claims_its_own_lock_to_remove_it_is_waited_for(folder):
    owner = write_lock(folder, host="elsewhere", pid=12)
    claim = folder.path / f"lock-{owner.token}.claim"
    claim.write_bytes(owner.encode(8))
    lock = RunLock(folder)
    assert "waiting for a sign of life" in lock.attempt()
    folder.lock_file.unlink()
    claim.unlink()
    assert lock.attempt() is None
    lock.release()


@pytest.mark.parametrize("empty", [False, True])
def test_an_owner_that_was_killed_while_it_removed_its_lock_is_replaced(folder, dead, empty):
    """Also after two kills on a file system without hard links, which left two empty files."""
    owner = write_lock(folder, pid=dead)
    claim = folder.path / f"lock-{owner.token}.claim"
    if empty:
        folder.lock_file.write_bytes(b"")
        claim = folder.path / f"lock-{lock_file.Owner.decode(b'').token}.claim"
        claim.write_bytes(b"")
    else:
        claim.write_bytes(owner.encode(8))
    lock = RunLock(folder, silent_seconds=0.1)
    until_held(lock, 5.0)
    assert names(folder) == ["lock.json"]
    lock.release()
    assert names(folder) == []


def test_file_systems_without_hard_links(folder, monkeypatch, dead):
    def link(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    lock = take(folder)
    with pytest.raises(RunError, match="is in use"):
        RunLock(folder).attempt()
    lock.release()
    assert names(folder) == []
    write_lock(folder, pid=dead)
    take(folder).release()
    assert names(folder) == []


def test_a_full_disk_leaves_no_lock_that_keeps_the_next_start_out(folder, monkeypatch):
    lock = take(folder)
    with monkeypatch.context() as patch:

        def full(*_):
            raise OSError(28, "No space left on device")

        patch.setattr(os, "pwrite", full)
        lock.release()
    assert names(folder) == []
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(RunError, match=r"lock.json cannot be read or written: No space left"):
            RunLock(folder).attempt()
    assert names(folder) == []


def test_a_folder_that_was_made_for_a_refused_start_is_deleted(tmp_path):
    lock = take(RunFolder(tmp_path / "a" / "b"))
    lock.release()
    assert not (tmp_path / "a").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is not a folder"):
        RunLock(RunFolder(tmp_path / "file" / "x")).attempt()


@pytest.mark.parametrize("kills", [0, pytest.param(20, marks=pytest.mark.slow)])
def test_processes_are_never_inside_together(tmp_path, kills):
    """Processes that take and release one lock, some of them killed at random moments."""
    program = [HELPERS / "lock_rounds.py", tmp_path / "x", "4" if kills else "2"]
    generator = random.Random(kills)
    start = lambda seed: warm_python.Popen([*program, seed], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    processes = [start(seed) for seed in range(3)]
    done = []
    time.sleep(1.0)
    for number in range(kills):
        time.sleep(generator.uniform(0.01, 0.1))
        victim = processes.pop(generator.randrange(len(processes)))
        victim.kill()
        done.append(victim)
        if number % 2:
            processes += [start(100 + number), start(200 + number)]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert all(process.returncode == 0 for process in processes), outputs
    assert not any("VIOLATION" in process.communicate()[0] for process in done)
    assert sum(int(output.splitlines()[-1]) for output in outputs) > 20
    take(RunFolder(tmp_path / "x")).release()
    assert not os.path.exists(tmp_path / "x") or os.listdir(tmp_path / "x") == []


def test_a_folder_that_another_start_deletes_is_made_again(tmp_path, monkeypatch):
    """A start that was refused deletes its empty folder, which may be between this one's look at the folder and its use of it."""
    folder, make, deleted = RunFolder(tmp_path / "x"), folder_lib.tempfile.TemporaryFile, []
    folder.path.mkdir()

    def temporary_file(dir):
        if not deleted:
            deleted.append(dir)
            dir.rmdir()
        return make(dir=dir)

    monkeypatch.setattr(folder_lib.tempfile, "TemporaryFile", temporary_file)
    take(folder).release()
    assert deleted == [folder.path]


# Runs


def train_here(config, workdir, **options):
    output = io.StringIO()
    trainer_lib.train(build_experiment(config), str(workdir), console=Console(file=output, width=300), **options)
    return output.getvalue()


def start(config, workdir, tmp_path, *extra, prelude=""):
    path = tmp_path / f"config-{len(list(tmp_path.glob('config-*')))}.json"
    path.write_text(json.dumps(config))
    arguments = ["train", f"--config={path}", f"--workdir={workdir}", *extra]
    program = f"{prelude}\nfrom jaxmodels.cli import main as cli\ncli.main({arguments!r})"
    return warm_python.Popen(["-c", program], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def contents(workdir):
    """Every file of a folder, without the lock."""
    return {str(path.relative_to(workdir)): path.read_bytes() for path in workdir.rglob("*") if path.is_file() and path.name != "lock.json"}


# The callback of the owner waits at step 15 while the file of this name exists.
HOLD = """
import os, time
from jaxmodels.runs.folder import RunFolder
add = RunFolder.add_metrics
def add_and_hold(folder, step, split, values):
    add(folder, step, split, values)
    while step == 20 and os.path.exists({hold!r}):
        time.sleep(0.02)
RunFolder.add_metrics = add_and_hold
"""


@pytest.fixture
def running(tmp_path):
    """A run in a process of its own that holds still after its checkpoint of step 10; the file that holds it; its folder."""
    hold, workdir = tmp_path / "hold", tmp_path / "x"
    hold.write_text("")
    process = start(CONFIG, workdir, tmp_path, prelude=HOLD.format(hold=str(hold)))
    metrics = workdir / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and '"step": 20' in metrics.read_text() and (workdir / "checkpoints" / "10" / "_CHECKPOINT_METADATA").exists(), process)
    yield process, hold, workdir
    process.kill()
    process.communicate()


def test_a_second_start_is_refused_and_one_after_a_kill_goes_on_at_once(running):
    process, hold, workdir = running
    before = contents(workdir)
    for config, options in ((CONFIG, {}), (CONFIG, {"overwrite": True}), (small_configs.config(CONFIG, seed=1), {})):
        with pytest.raises(RunError, match=f"is in use by process {process.pid} on .*kill {process.pid}: it saves first.*Nothing was changed") as caught:
            train_here(config, workdir, **options)
        assert caught.value.exit_status == 1
    assert contents(workdir) == before
    assert jaxmodels.evaluate(f"{workdir}@10")["step"] == 10  # a reader takes no lock
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (workdir / "lock.json").exists()
    output = train_here(CONFIG, workdir)
    assert "resumed from" in output and "waiting" not in output
    assert not (workdir / "lock.json").exists()
    assert [line["step"] for line in RunFolder(workdir).metrics("train")] == [10, 20]


def test_a_requeued_start_waits_until_the_first_has_saved(running):
    process, hold, workdir = running
    process.send_signal(signal.SIGTERM)
    wait_for(lambda: b'"SIGTERM"' in (workdir / "lock.json").read_bytes(), process)
    threading.Timer(1.5, hold.unlink).start()
    output = train_here(CONFIG, workdir)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75 and "SIGTERM: saved" in errors, errors
    assert output.count(f"waiting for process {process.pid} on") == 1 and "which saves in" in output
    assert "checkpoints/20" in output and "resumed from" in output
    assert [line["step"] for line in RunFolder(workdir).metrics("train")] == [10, 20]


def test_of_two_configs_started_at_once_one_trains_and_the_other_names_it(tmp_path):
    hold, workdir = tmp_path / "hold", tmp_path / "x"
    hold.write_text("")
    prelude = HOLD.format(hold=str(hold))
    processes = {seed: start(small_configs.config(CONFIG, seed=seed), workdir, tmp_path, prelude=prelude) for seed in (0, 1)}
    end = time.monotonic() + 120
    while all(process.poll() is None for process in processes.values()):
        assert time.monotonic() < end
        time.sleep(0.05)
    hold.unlink()
    (winner,) = [seed for seed, process in processes.items() if process.poll() is None]
    _, errors = processes[1 - winner].communicate()
    assert processes[1 - winner].returncode == 1 and f"is in use by process {processes[winner].pid} on" in errors, errors
    assert "Traceback" not in errors
    _, errors = processes[winner].communicate(timeout=120)
    assert processes[winner].returncode == 0, errors
    assert RunFolder(workdir).config()["seed"] == winner
    assert [(line["step"], line["split"]) for line in RunFolder(workdir).metrics()] == [(10, "train"), (20, "train"), (20, "validation"), (20, "test")]
    assert len(RunFolder(workdir).manifest()["starts"]) == 1
    alone = tmp_path / "alone"
    train_here(small_configs.config(CONFIG, seed=winner), alone)
    losses = [[line["loss"] for line in RunFolder(path).metrics()] for path in (workdir, alone)]
    assert losses[0] == losses[1]


def test_a_run_takes_over_from_a_silent_owner_elsewhere(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path / "x")
    train_here(small_configs.config(CONFIG, training__steps=10), folder.path)
    write_lock(folder, host="elsewhere", pid=12)
    monkeypatch.setattr(shared_folder, "RunLock", functools.partial(RunLock, silent_seconds=1.0))
    output = train_here(small_configs.config(CONFIG, training__steps=10), folder.path)
    assert "waiting for a sign of life of process 12 on elsewhere" in output and "finished" not in output
    assert not folder.lock_file.exists()


def test_a_signal_ends_the_wait(tmp_path):
    folder = RunFolder(tmp_path / "x")
    folder.path.mkdir()
    write_lock(folder, host="elsewhere", pid=12)

    def stop():
        while signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:  # before, it would end the tests
            time.sleep(0.05)
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop).start()
    with pytest.raises(Interrupted, match="SIGTERM: stopped while waiting for a sign of life of process 12 on elsewhere"):
        train_here(CONFIG, folder.path)
    assert names(folder) == ["lock.json"]


def test_a_run_that_loses_its_lock_ends_without_saving(tmp_path):
    folder = RunFolder(tmp_path / "x")

    class Lose(jaxmodels.Callback):
        def on_log(self, run, step, values):
            if step == 10:
                folder.lock_file.unlink()
                write_lock(folder, host="elsewhere", pid=12, token="theirs")

    with pytest.raises(RunError, match="was taken over by process 12 on elsewhere"):
        train_here(CONFIG, folder.path, callbacks=[Lose()])
    assert not (folder.checkpoints / "10").exists() and json.loads(folder.lock_file.read_text())["token"] == "theirs"


def test_a_start_that_is_refused_leaves_nothing(tmp_path):
    for config in (small_configs.config(CONFIG, mesh={"data": 64}), small_configs.config(CONFIG, init_from=str(tmp_path / "nothing"))):
        with pytest.raises(ConfigError):
            train_here(config, tmp_path / "a" / "x")
    assert os.listdir(tmp_path) == []


def test_two_merges_into_one_folder(tmp_path):
    from jaxmodels.runs.merge import merge

    train_here(small_configs.config(CONFIG, training__steps=1), tmp_path / "x")
    lock = take(RunFolder(tmp_path / "merged"))
    with pytest.raises(RunError, match="merged is in use by process"):
        merge(str(tmp_path / "x"), str(tmp_path / "merged"))
    lock.release()
    merge(str(tmp_path / "x"), str(tmp_path / "merged"))
    assert not (tmp_path / "merged" / "lock.json").exists()


def test_the_limits_fit_together():
    assert lock_lib.SILENT_SECONDS >= 10 * lock_lib.BEAT_SECONDS
