"""A run that hangs prints where, and ends with status 1."""

import os
import subprocess
import threading
import time
import types

import hanging_source
import numpy as np
import pytest
import small_configs
from processes import children, is_alive, is_worker
from run_processes import start, wait_for

from jaxmodels.data import loader
from jaxmodels.errors import Interrupted
from jaxmodels.runs.folder import RunFolder
from jaxmodels.training import watchdog as watchdog_lib
from jaxmodels.training.signals import StopSignals
from jaxmodels.training.watchdog import Limits, Watchdog, waits_for

pytestmark = pytest.mark.faults


def watched(waits="something", **limits):
    """A watchdog with limits in seconds that are never reached unless given, and the list of its reasons to end the process."""
    reasons = []
    watchdog = Watchdog(Limits(**{"step": 60.0, "setup": 60.0, "save": 60.0} | limits), reasons.append)
    watchdog.report = lambda: (waits, f"it waits for {waits}")
    return watchdog, reasons


def sleep_until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)


def test_steps_that_do_not_come():
    watchdog, reasons = watched(step=1.0)
    with StopSignals(watchdog=watchdog) as stop:
        for _ in range(10):
            time.sleep(0.2)
            stop.check()
        assert not reasons
        sleep_until(lambda: reasons)
    assert len(reasons) == 1 and reasons[0].startswith("for 1 s the run has not completed a step (--stall_limit): it waits for something.")
    assert reasons[0].endswith("This process ends; the same command resumes from the last checkpoint.")


def test_a_run_that_waits_for_data_is_asked_to_save_first(monkeypatch):
    watchdog, reasons = watched(waits="data", step=0.5)
    with StopSignals(watchdog=watchdog) as stop, pytest.raises(Interrupted), stop.may_raise():
        time.sleep(20)
    assert watchdog.reason.startswith("for 0.5 s the run has not completed a step") and not reasons
    monkeypatch.setattr(watchdog_lib, "_ANSWER_SECONDS", 0.5)
    watchdog, reasons = watched(waits="data", step=0.5)
    with StopSignals(watchdog=watchdog):  # the main thread is in something else, and does not answer
        sleep_until(lambda: reasons)
    assert len(reasons) == 1 and watchdog.reason in reasons[0]


@pytest.mark.parametrize("phase, option", [("setup", "--setup_limit"), ("save", "--save_limit")])
def test_each_phase_has_a_limit_of_its_own(phase, option):
    watchdog, reasons = watched(step=1.0)
    with StopSignals(watchdog=watchdog) as stop:
        if phase == "setup":
            stop.run(time.sleep, 2.0)
        else:
            with watchdog.phase(phase):
                time.sleep(2.0)
        assert not reasons  # a step has less time, and it begins anew after the phase
        stop.check()
    watchdog, reasons = watched(**{phase: 1.0})
    with StopSignals(watchdog=watchdog) as stop:
        with watchdog.phase(phase):
            sleep_until(lambda: reasons)
    assert option in reasons[0]


def test_no_limits_in_a_program_of_others(monkeypatch):
    monkeypatch.setattr(watchdog_lib, "end_process", lambda reason: pytest.fail(reason))
    before = threading.active_count()
    with StopSignals() as stop, stop.watchdog.phase("save"):
        assert threading.active_count() == before


def test_a_process_that_was_suspended_is_not_ended(monkeypatch):
    """Its own thread did not run either."""
    watchdog, reasons = watched(step=30.0)
    now = [0.0]
    monkeypatch.setattr(watchdog_lib, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    watchdog.beat()
    turns = iter([1.0, 1000.0, 1.0, 1.0])

    def wait(_):
        now[0] += next(turns, 0.0)
        return now[0] == 1003.0

    watchdog._over = types.SimpleNamespace(wait=wait)
    watchdog._watch()
    assert not reasons


def blocked(function):
    """What the watchdog says of a thread that runs a function, which waits."""
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    time.sleep(0.5)
    return waits_for(thread.ident)


def test_what_is_waited_for(tmp_path, monkeypatch):
    released = threading.Event()

    class Source(hanging_source.Hanging):
        def __getitem__(self, index):
            released.wait()
            return super().__getitem__(index)

    batches = loader.TrainingBatches(Source(10, 10**9), 2, 4, seed=0, shuffle=False)
    for threads in (0, 2):
        what, where = blocked(lambda threads=threads: next(loader.DeviceFeed(loader.read_ahead(batches, threads=threads, workers=0, buffer=2), np.asarray)))
        assert what == "data" and "jaxmodels/data/" in where
    monkeypatch.setattr(os, "replace", lambda *_: released.wait())
    what, where = blocked(lambda: RunFolder(tmp_path).update_manifest(x=1))
    assert what == "the disk" and "jaxmodels/runs/json_files.py" in where
    from jaxmodels.parallel import mesh
    from jaxmodels.step import metrics

    monkeypatch.setattr(mesh.jax, "device_put", lambda *_: released.wait())
    monkeypatch.setattr(metrics.jax, "device_get", lambda *_: (released.wait(), {})[1])
    what, where = blocked(lambda: metrics.values({"loss": (np.float32(1), np.float32(1))}))
    assert what == "the device" and "jaxmodels/step/metrics.py" in where
    released.set()


def test_a_pipe_that_nobody_reads_does_not_keep_the_process(tmp_path):
    """The stacks and the reason go to standard error."""
    program = (
        "import os\nwhile True:\n    try:\n        os.set_blocking(2, False); os.write(2, b'x' * 4096)\n    except BlockingIOError:\n        break\n"
        "os.set_blocking(2, True)\n"
        "from jaxmodels.training import watchdog\nwatchdog._PRINT_SECONDS = 0.2\n"
        "with watchdog.Watchdog(watchdog.Limits(step=0.5)):\n    import time; time.sleep(60)\n"
    )
    with subprocess.Popen([os.sys.executable, "-c", program], stderr=subprocess.PIPE) as process:
        assert process.wait(30) == 1


def test_a_reader_that_hangs_ends_the_process_with_the_stacks(tmp_path):
    (tmp_path / "hang").write_text("")
    config = {"source": "hanging_source:training_hangs", "batch_size": 20, "workers": 1, "buffer": 2, "memory_gb": 0.0}
    config = small_configs.config(small_configs.CNN, data=config, training__steps=60, evaluation__every=None, checkpoint__every=1000)
    process = start(config, tmp_path / "x", tmp_path, "", "--stall_limit=6")
    wait_for(lambda: any(map(is_worker, children(process.pid))), process)
    workers = [pid for pid in children(process.pid) if is_worker(pid)]
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 1, errors
    assert "for 6 s the run has not completed a step (--stall_limit): it waits for data in " in errors
    (saved,) = [int(path.name) for path in (tmp_path / "x" / "checkpoints").iterdir()]
    assert saved >= 15 and f"saved {tmp_path}/x/checkpoints/{saved}. The same command resumes the run.\n" in errors
    assert "Thread MainThread, most recent call first:" in errors and "Thread watchdog," in errors and "in __next__" in errors
    assert not any(map(is_alive, workers))
    os.remove(tmp_path / "hang")
    again = start(config, tmp_path / "x", tmp_path)
    output, errors = again.communicate(timeout=120)
    assert again.returncode == 0 and f"checkpoints/{saved}" in output, errors
