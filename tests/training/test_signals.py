"""Signals save the run and end it with status 75 in every phase."""

import contextlib
import importlib
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import small_configs
from conftest import ROOT
from processes import children, is_alive, is_worker
from run_processes import start, stop, wait_for

from jaxmodels.errors import Interrupted
from jaxmodels.runs.folder import RunFolder
from jaxmodels.training.signals import StopSignals

pytestmark = pytest.mark.faults


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


def test_while_worker_processes_hang_and_are_stopped(tmp_path):
    """One worker hangs in a read and the other is stopped, so neither ends by itself or by a signal that it could handle."""
    (tmp_path / "hang").write_text("")
    config = hanging("training_hangs", evaluation__every=None, data__workers=2, data__buffer=2, checkpoint__every=1000)
    process = start(config, tmp_path / "x", tmp_path)
    metrics = tmp_path / "x" / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and '"step": 30' in metrics.read_text(), process)
    workers = [pid for pid in children(process.pid) if is_worker(pid)]
    assert len(workers) == 2
    time.sleep(1)  # it hangs by now
    os.kill(workers[0], signal.SIGSTOP)
    errors = stop(process, within=10)
    (saved,) = [int(p.name) for p in (tmp_path / "x" / "checkpoints").iterdir()]
    assert 30 <= saved <= 40 and f"SIGTERM: saved {tmp_path}/x/checkpoints/{saved}" in errors
    assert not any(map(is_alive, workers))


def test_worker_processes_end_with_a_process_that_is_killed(tmp_path):
    program = """
import hanging_source, time
from jaxmodels.data import loader
if __name__ == "__main__":
    batches = loader.TrainingBatches(hanging_source.Hanging(100, 10**9), 2, 40, seed=0, shuffle=False)
    stream = loader.read_ahead(batches, threads=0, workers=1, buffer=1)
    print(next(stream)["label"].tolist(), flush=True)
    time.sleep(300)
"""
    (tmp_path / "program.py").write_text(program)
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'helpers'}"}
    process = subprocess.Popen([sys.executable, tmp_path / "program.py"], env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "[0, 1]\n"
    workers = [pid for pid in children(process.pid) if is_worker(pid)]
    assert workers
    process.kill()
    process.communicate()
    end = time.monotonic() + 20
    while any(map(is_alive, workers)):
        assert time.monotonic() < end, "a worker is left behind"
        time.sleep(0.05)


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


@pytest.mark.parametrize("name", ["train_step", *(pytest.param(name, marks=pytest.mark.slow) for name in ("init", "eval_step", "sample"))])
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
    errors = stop(process, {"train_step": signal.SIGHUP, "sample": signal.SIGUSR1}.get(name, signal.SIGTERM))
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
        time.sleep(3)
    return original(name, *args, **options)
builtins.__import__ = slow
"""
    process = start(small_configs.CNN, tmp_path / "x", tmp_path, prelude)
    wait_for((tmp_path / "importing").exists, process)
    assert "stopped before training" in stop(process)


def test_an_import_is_not_interrupted(tmp_path, monkeypatch):
    """The import of a C extension turns an exception into an ImportError: the stop comes after it, and does not wait for what follows."""
    (tmp_path / "like_an_extension.py").write_text(
        "import os, signal, time\n"
        "try:\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    time.sleep(0.5)\n"
        "except BaseException as error:\n"
        "    raise ImportError('initialization failed') from error\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    began = time.monotonic()
    with StopSignals() as stop, pytest.raises(Interrupted, match="SIGTERM"), stop.may_raise():
        importlib.import_module("like_an_extension")
        time.sleep(60)
    assert "like_an_extension" in sys.modules and time.monotonic() - began < 30
    time.sleep(0.3)  # a signal that were sent again now would end this process


def test_a_signal_at_the_end_of_an_import_does_not_come_twice(tmp_path, monkeypatch):
    (tmp_path / "signalled.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGTERM)\nfor _ in range(10): pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    with StopSignals() as stop, pytest.raises(Interrupted, match="SIGTERM"), stop.may_raise():
        importlib.import_module("signalled")
    time.sleep(0.3)


@pytest.mark.parametrize("name", ["SIGHUP", "SIGUSR1"])
def test_other_signals_stop_a_run_by_option(name):
    number = getattr(signal, name)
    signal.signal(number, signal.SIG_DFL)  # it is ignored where the tests run under nohup
    with StopSignals([name]) as stop, pytest.raises(Interrupted, match=name), stop.may_raise():
        os.kill(os.getpid(), number)
        time.sleep(5)
    assert signal.getsignal(number) is signal.SIG_DFL
    mine = lambda *_: None
    for present in (signal.SIG_IGN, mine):  # as under nohup; of a callback
        signal.signal(number, present)
        try:
            with StopSignals([name]):
                assert signal.getsignal(number) is present
        finally:
            signal.signal(number, signal.SIG_DFL)
    with StopSignals():
        assert signal.getsignal(number) is signal.SIG_DFL


def test_the_option_names_signals(capsys):
    from jaxmodels.cli import main as cli

    parse = lambda text: cli.parser().parse_args(["train", "--config=x.py", *text]).stop_signals
    assert parse([]) == ("SIGHUP", "SIGUSR1") and parse(["--stop_signals="]) == () and parse(["--stop_signals=usr2,SIGHUP"]) == ("SIGUSR2", "SIGHUP")
    with pytest.raises(SystemExit):
        parse(["--stop_signals=KILL"])
    assert "SIGKILL is none of SIGHUP" in capsys.readouterr().err


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
