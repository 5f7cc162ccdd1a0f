"""SIGTERM and SIGINT save the run and end with status 75 in every phase."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import small_configs
from conftest import HELPERS, ROOT

from jaxmodels.errors import Interrupted
from jaxmodels.runs.folder import RunFolder
from jaxmodels.training.signals import StopSignals


def start(config, workdir, tmp_path, prelude=""):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    program = f"{prelude}\nfrom jaxmodels.cli import main as cli\ncli.main(['train', '--config={path}', '--workdir={workdir}'])"
    environment = os.environ | {"HANG_FILE": str(tmp_path / "hang"), "PYTHONPATH": str(HELPERS), "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(condition, process, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


def stop(process, number=signal.SIGTERM):
    sent = time.monotonic()
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert time.monotonic() - sent < 30, "a stop must not wait for what it interrupts"
    return errors


def hanging(source, **changes):
    base = small_configs.config(small_configs.CNN, data={"source": f"hanging_source:{source}", "batch_size": 20, "threads": 2, "memory_gb": 0.0}, **changes)
    return small_configs.config(base, training__steps=100, evaluation__every=5, checkpoint__every=1000)


def test_while_waiting_for_data(tmp_path):
    (tmp_path / "hang").write_text("")
    process = start(hanging("training_hangs", evaluation__every=None), tmp_path / "x", tmp_path)
    metrics = tmp_path / "x" / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and '"step": 10' in metrics.read_text(), process)
    time.sleep(1)  # it waits by now
    errors = stop(process)
    assert "SIGTERM: saved" in errors
    (saved,) = [int(p.name) for p in (tmp_path / "x" / "checkpoints").iterdir()]
    assert 10 <= saved <= 20
    os.remove(tmp_path / "hang")
    again = start(hanging("training_hangs", evaluation__every=None), tmp_path / "x", tmp_path)
    output, errors = again.communicate(timeout=120)
    assert again.returncode == 0 and f"checkpoints/{saved}" in output, errors


def test_while_evaluating_and_the_resumed_run_evaluates(tmp_path):
    (tmp_path / "hang").write_text("")
    config = hanging("evaluation_hangs")
    process = start(config, tmp_path / "x", tmp_path)
    wait_for(lambda: "compiled" in "".join(map(str, RunFolder(tmp_path / "x").manifest().get("starts", []))) and _reached(tmp_path / "x"), process)
    time.sleep(1)
    assert "x/checkpoints/5." in stop(process, signal.SIGINT)
    assert not RunFolder(tmp_path / "x").metrics("validation")
    os.remove(tmp_path / "hang")
    again = start(config, tmp_path / "x", tmp_path)
    output, errors = again.communicate(timeout=120)
    assert again.returncode == 0, errors
    assert [line["step"] for line in RunFolder(tmp_path / "x").metrics("validation")] == list(range(5, 101, 5))


def _reached(workdir):
    return "train_step" in RunFolder(workdir).manifest()["starts"][0]["compiled"]


@pytest.mark.parametrize("name", ["init", "train_step", pytest.param("eval_step", marks=pytest.mark.slow), "sample"])
def test_while_compiling(name, tmp_path):
    # Compiled code cannot be interrupted: the replacement blocks its thread, as a long compilation does.
    prelude = f"""
import time, pathlib
from jaxmodels.training import compile, evaluation, initialize, samples, trainer
def hold(name):
    if name == {name!r}:
        pathlib.Path({str(tmp_path / "compiling")!r}).write_text("")
        time.sleep(300)
ahead, step = compile.compile_ahead, compile.compile_train_step
def slow(name, *args, **options):
    hold(name)
    return ahead(name, *args, **options)
def slow_step(*args, **options):
    hold("train_step")
    return step(*args, **options)
for module in (compile, evaluation, initialize, samples, trainer):
    module.compile_ahead = slow
trainer.compile_train_step = slow_step
"""
    config = small_configs.config(small_configs.GPT, task__sample_length=5, training__steps=20, evaluation__every=7, checkpoint__every=1000)
    process = start(config, tmp_path / "x", tmp_path, prelude)
    wait_for((tmp_path / "compiling").exists, process)
    errors = stop(process)
    steps = {"init": [], "train_step": ["0"], "eval_step": ["7"], "sample": ["7"]}[name]
    assert [p.name for p in (tmp_path / "x" / "checkpoints").iterdir()] == steps
    assert ("stopped before the first training step" if name == "init" else f"saved {tmp_path}/x/checkpoints/{steps[0]}") in errors
    again = start(config, tmp_path / "x", tmp_path)
    output, errors = again.communicate(timeout=120)
    assert again.returncode == 0, errors
    # The interrupted work is done again, once.
    assert [line["step"] for line in RunFolder(tmp_path / "x").metrics("validation")] == [7, 14, 20]
    assert (tmp_path / "x" / "samples.txt").read_text().count("--- step") == 3


def test_while_importing(tmp_path):
    # From the first line of the command on; the start of the interpreter is before that.
    prelude = f"""
import builtins, pathlib
original = builtins.__import__
def slow(name, *args, **options):
    if name == "jax" and not pathlib.Path({str(tmp_path / "importing")!r}).exists():
        pathlib.Path({str(tmp_path / "importing")!r}).write_text("")
        import time
        time.sleep(20)
    return original(name, *args, **options)
builtins.__import__ = slow
"""
    process = start(small_configs.CNN, tmp_path / "x", tmp_path, prelude)
    wait_for((tmp_path / "importing").exists, process)
    assert "stopped before training" in stop(process)


def test_previous_handlers_come_back(tmp_path):
    import jaxmodels

    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    jaxmodels.train(small_configs.config(small_configs.CNN, training__steps=3), str(tmp_path / "x"), quiet=True)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_a_stop_that_python_dropped_is_raised_again():
    """Python reports and drops an exception that a handler raises inside a callback of the garbage collector."""
    with StopSignals() as stop:
        with pytest.raises(Interrupted, match="SIGTERM"), stop.may_raise():
            dropped(stop)
    with StopSignals() as stop:
        sent, far = time.monotonic(), threading.Event()
        threading.Timer(0.3, lambda: setattr(stop, "received", "SIGTERM")).start()  # as if the exception had been dropped
        with pytest.raises(Interrupted, match="SIGTERM"):
            stop.run(far.wait, 60)
        assert time.monotonic() - sent < 20
        far.set()


def dropped(stop):
    with contextlib.suppress(Interrupted):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.05)
    assert stop.received == "SIGTERM"
