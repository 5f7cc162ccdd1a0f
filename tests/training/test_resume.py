"""Exact resume: after a kill at any moment, the same command ends bitwise equal to an uninterrupted run."""

import io
import json
import random
import re
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest
import small_configs
import warm_python
from conftest import ROOT
from rich.console import Console
from run_state import final_state

import jaxmodels
from jaxmodels.errors import ConfigError, Interrupted
from jaxmodels.experiment.build import build_experiment
from jaxmodels.runs.checkpoint import Checkpoints
from jaxmodels.runs.folder import RunFolder
from jaxmodels.training import trainer as trainer_lib
from jaxmodels.training.summary import print_summary
from jaxmodels.training.trackers.jsonl import JsonLines

pytestmark = pytest.mark.faults

RATES = {"cnn": 6.0, "lstm": 30.0, "gpt": 6.0}  # learning rates of best_in_the_middle


def write_config(tmp_path, config):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    return path


def train(path, workdir, *extra):
    command = ["-m", "jaxmodels", "train", f"--config={path}", f"--workdir={workdir}", *extra]
    return warm_python.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process, status=0):
    output, _ = process.communicate(timeout=300)
    assert process.returncode == status, output
    return output


def best_in_the_middle(name, **changes):
    """Write a config whose learning rate rises until training diverges: the validation loss is best in the middle of 60 steps, which `whole` checks."""
    return small_configs.config(
        small_configs.ALL[name],
        training={"steps": 60, "accumulate": 2, "ema": 0.9},
        optimizer={"name": "sgd", "learning_rate": RATES[name], "schedule": {"warmup": 59}, "clip_norm": 1.0},
        evaluation__every=10,
        checkpoint={"every": 10, "keep": 2, "best": "loss"},
        log__every=1,
        **changes,
    )


def kept(workdir):
    """Return the steps of a run's checkpoints."""
    return sorted(int(path.name) for path in RunFolder(workdir).checkpoints.iterdir() if path.name.isdigit())


def summary(output, workdir):
    """Return the final output of a finished run, without times and its folder."""
    output = re.sub(r"^(finished: step \d+ in ).*", r"\1TIME", output[output.index("finished: step") :])
    return output.replace(str(workdir), "RUN")


def assert_same(one, other):
    arrays, metrics = final_state(one)
    arrays_2, metrics_2 = final_state(other)
    assert arrays.keys() == arrays_2.keys()
    assert any("opt_state" in k for k in arrays) and any("ema" in k for k in arrays)
    for key in arrays:
        assert arrays[key].dtype == arrays_2[key].dtype
        np.testing.assert_array_equal(arrays[key], arrays_2[key], err_msg=key)
    assert metrics == metrics_2
    assert kept(one) == kept(other)


@pytest.mark.parametrize("name", ["cnn", *(pytest.param(name, marks=pytest.mark.slow) for name in ("lstm", "gpt"))])
def test_sigkill_at_random_moments_then_again_is_bitwise_equal(name, tmp_path, location):
    # 1259 training digits in batches of 32 are 39.3 steps per epoch, so that a resume is in the middle of one;
    # checkpoints are frequent enough that some kills are during a save.
    config = small_configs.config(best_in_the_middle(name), checkpoint__every=3)
    path = write_config(tmp_path, config)
    whole = finish(train(path, tmp_path / "whole"))
    generator = random.Random(name)
    kills = 0
    for _ in range(3):
        process = train(path, location("killed"))
        checkpoints = RunFolder(location("killed")).checkpoints
        before = _latest(checkpoints)
        while process.poll() is None and _latest(checkpoints) <= before:
            time.sleep(0.01)
        time.sleep(generator.uniform(0, 0.3))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.communicate()
        if _latest(checkpoints) >= config["training"]["steps"]:
            break
    assert kills
    output = finish(train(path, location("killed")))
    assert "resumed from" in output
    assert summary(output, location("killed")) == summary(whole, tmp_path / "whole")
    assert_same(tmp_path / "whole", location("killed"))


def _latest(checkpoints):
    return max([int(p.name) for p in checkpoints.glob("*") if p.name.isdigit()], default=0)


def test_kill_in_the_middle_of_a_save_leaves_the_last_good_checkpoint(tmp_path):
    # The process kills itself during the save, when the folder is incomplete.
    config = small_configs.config(small_configs.CNN, training__accumulate=2, training__ema=0.9)
    path = write_config(tmp_path, config)
    finish(train(path, tmp_path / "whole"))
    program = f"""
import os, signal
from orbax.checkpoint import PyTreeCheckpointHandler
from jaxmodels.cli import main as cli
original = PyTreeCheckpointHandler.async_save
async def save(self, directory, *args, **kwargs):
    futures = await original(self, directory, *args, **kwargs)
    if "30" in str(directory).split("checkpoints")[-1]:
        os.kill(os.getpid(), signal.SIGKILL)
    return futures
PyTreeCheckpointHandler.async_save = save
cli.main(["train", "--config={path}", "--workdir={tmp_path / "killed"}"])
"""
    process = warm_python.run(["-c", program], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert _latest(tmp_path / "killed" / "checkpoints") == 20
    assert "checkpoints/20" in finish(train(path, tmp_path / "killed"))
    assert_same(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.slow
def test_sigterm_then_again_is_bitwise_equal(tmp_path):
    config = small_configs.config(small_configs.GPT, training__ema=0.9, training__steps=200, checkpoint__every=1000, log__every=1)
    path = write_config(tmp_path, config)
    finish(train(path, tmp_path / "whole"))
    process = train(path, tmp_path / "stopped")
    metrics = tmp_path / "stopped" / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.read_text()):
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    assert "SIGTERM: saved" in finish(process, 75)
    assert "resumed from" in finish(train(path, tmp_path / "stopped"))
    assert_same(tmp_path / "whole", tmp_path / "stopped")


def test_a_damaged_checkpoint_is_moved_aside_with_a_warning(tmp_path):
    config = small_configs.config(small_configs.CNN, training__ema=0.9)
    path = write_config(tmp_path, config)
    finish(train(path, tmp_path / "run"))
    before = final_state(tmp_path / "run")
    damaged = tmp_path / "run" / "checkpoints" / "60"
    for file in damaged.rglob("*"):
        if file.is_file() and "/d/" in str(file):
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    output = finish(train(path, tmp_path / "run"))
    assert "checkpoints/60 cannot be read" in output and "resumed from" in output and "checkpoints/50" in output
    assert (tmp_path / "run" / "checkpoints" / "unreadable-60").is_dir()
    assert any("cannot be read" in f for f in RunFolder(tmp_path / "run").manifest()["fallbacks"])
    after = final_state(tmp_path / "run")
    assert before[1] == after[1]
    for key in before[0]:
        np.testing.assert_array_equal(before[0][key], after[0][key])


# The best checkpoint of a run that is stopped


def train_here(monkeypatch, config, workdir, stop=None):
    """Train in this process, and send it a signal when the line of metrics `stop`, (step, split), is written.

    Returns:
      The final output of a finished run; None if it was stopped.
    """
    output = io.StringIO()
    experiment, console = build_experiment(config), Console(file=output, width=200)
    add = JsonLines._add

    def add_and_stop(tracker, run, step, split, values):
        add(tracker, run, step, split, values)
        if (step, split) == stop:
            signal.raise_signal(signal.SIGINT if step % 20 else signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(JsonLines, "_add", add_and_stop)
        try:
            print_summary(trainer_lib.train(experiment, str(workdir), console=console), experiment, console)
        except Interrupted:
            assert stop is not None
            return None
    assert stop is None
    return summary(output.getvalue(), workdir)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Name of a model family -> its uninterrupted run with the best checkpoint in the middle, its final output, and its best step."""
    runs = {}

    def run(name):
        if name not in runs:
            workdir = tmp_path_factory.mktemp(name) / "whole"
            printed = train_here(pytest.MonkeyPatch(), best_in_the_middle(name), workdir)
            losses = {line["step"]: line["loss"] for line in RunFolder(workdir).metrics("validation")}
            best = min(losses, key=losses.get)
            assert 10 < best < 50 and kept(workdir) == [best, 50, 60]
            assert [line["step"] for line in RunFolder(workdir).metrics("test")] == ([best] if name == "cnn" else [])  # text has no test split
            runs[name] = workdir, printed, best
        return runs[name]

    return run


# The lines of metrics at which a run gets a signal: steps relative to the best one, or the last.
STOPS = {
    "before the best": [(-7, "train")],
    "at the best, before its evaluation": [(0, "train")],
    "at the best, after its evaluation": [(0, "validation")],
    "after the best": [(13, "train")],
    "several": [(-12, "train"), (0, "train"), (0, "validation"), (13, "train"), (18, "train"), ("last", "train")],
    "before the test": [("last", "validation")],
}
ALL_STOPS = [(name, stops) for name in small_configs.ALL for stops in STOPS if name == "cnn" or stops != "before the test"]
QUICK = [("cnn", "several"), ("cnn", "before the test")]  # `several` has the stops of the others


@pytest.mark.parametrize("name, stops", [case if case in QUICK else pytest.param(*case, marks=pytest.mark.slow) for case in ALL_STOPS])
def test_a_stopped_run_saves_tests_and_prints_the_same(name, stops, whole, location, monkeypatch):
    whole, printed, best = whole(name)
    config, workdir = best_in_the_middle(name), location("stopped")
    for step, split in STOPS[stops]:
        assert train_here(monkeypatch, config, workdir, (60 if step == "last" else best + step, split)) is None
    assert train_here(monkeypatch, config, workdir) == printed
    assert_same(whole, workdir)
    assert jaxmodels.evaluate(f"{workdir}@best", split="validation")["step"] == best


@pytest.mark.slow
def test_a_best_checkpoint_between_two_scheduled_ones_is_kept(tmp_path, location, monkeypatch):
    """Stopped while the best is the latest, and again later; checkpoints of stops do not replace scheduled ones."""
    config = small_configs.config(best_in_the_middle("cnn"), checkpoint__every=15, checkpoint__keep=3)
    printed = train_here(monkeypatch, config, tmp_path / "whole")
    assert kept(tmp_path / "whole") == [20, 30, 45, 60]
    for stop in [(23, "train"), (27, "train"), (30, "train"), (51, "train"), (58, "train")]:
        train_here(monkeypatch, config, location("stopped"), stop)
        assert 20 in kept(location("stopped"))
    assert train_here(monkeypatch, config, location("stopped")) == printed
    assert_same(tmp_path / "whole", location("stopped"))


def test_killed_after_a_save_and_before_old_checkpoints_were_deleted(whole, tmp_path, monkeypatch):
    whole, printed, best = whole("cnn")
    assert best == 20
    config, workdir = best_in_the_middle("cnn"), tmp_path / "killed"
    train_here(monkeypatch, config, workdir, (33, "train"))
    assert kept(workdir) == [20, 30, 34]
    shutil.copytree(workdir / "checkpoints", tmp_path / "before")
    assert train_here(monkeypatch, config, workdir) == printed
    for step in ("30", "34"):
        shutil.copytree(tmp_path / "before" / step, workdir / "checkpoints" / step)
    shutil.rmtree(workdir / "checkpoints" / "30" / "progress")  # as after a kill during deletion
    assert train_here(monkeypatch, config, workdir) == printed
    assert_same(whole, workdir)


def test_resumed_from_before_a_damaged_checkpoint_a_finished_run_is_tested_again(whole, tmp_path, monkeypatch):
    whole, printed, best = whole("cnn")
    assert best == 20
    workdir = tmp_path / "damaged"
    shutil.copytree(whole, workdir)
    for file in (workdir / "checkpoints" / "60" / "state" / "d").iterdir():
        file.write_bytes(b"")
    assert train_here(monkeypatch, best_in_the_middle("cnn"), workdir) == printed
    assert_same(whole, workdir)


def test_a_run_without_its_best_checkpoint_warns_and_ends(whole, tmp_path, monkeypatch):
    whole, printed, best = whole("cnn")
    assert best == 20
    config, workdir = best_in_the_middle("cnn"), tmp_path / "run"
    train_here(monkeypatch, config, workdir, (33, "train"))
    shutil.rmtree(workdir / "checkpoints" / "20")
    output = train_here(monkeypatch, config, workdir)
    assert "tested: step" not in output and "test accuracy" in output and output != printed
    assert [line["step"] for line in RunFolder(workdir).metrics("test")] == [60]
    (warning,) = RunFolder(workdir).manifest()["fallbacks"]
    assert re.search("the checkpoint of the best step 20 is missing in .*; testing the latest one, of step 60, instead", warning)
    for reference in (workdir, f"{workdir}@best"):
        with pytest.raises(ConfigError, match=r"the checkpoint of the best step 20 does not exist; it has steps \[50, 60\]"):
            jaxmodels.evaluate(str(reference))
    values = jaxmodels.evaluate(f"{workdir}@latest")
    assert values["step"] == 60 and values["loss"] == RunFolder(workdir).metrics("test")[0]["loss"]
    assert train_here(monkeypatch, config, workdir) == output
    # A run that was tested before its best checkpoint was deleted is not tested again.
    shutil.copytree(whole, tmp_path / "tested")
    shutil.rmtree(tmp_path / "tested" / "checkpoints" / "20")
    assert train_here(monkeypatch, config, tmp_path / "tested") == printed


def test_best_before_the_first_evaluation(tmp_path, monkeypatch):
    train_here(monkeypatch, best_in_the_middle("cnn"), tmp_path / "run", (4, "train"))
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints", read_only=True)
    assert checkpoints.find(None) == 5
    with pytest.raises(ConfigError, match=r"has no best checkpoint: .*nothing has been evaluated; it has steps \[5\]"):
        checkpoints.find("best")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "5" / "progress")
    with pytest.raises(jaxmodels.errors.RunError, match="checkpoints/5 cannot be read"):
        checkpoints.find(None)
    checkpoints.close()
