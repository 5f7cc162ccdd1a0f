"""Callbacks: their arguments, their requests, their state over a resume, and their errors."""

import io
import json
import os

import pytest
import small_configs
from rich.console import Console

import jaxmodels
from jaxmodels.config import load_config
from jaxmodels.errors import ConfigError, Interrupted, RunError
from jaxmodels.experiment.build import build_experiment
from jaxmodels.experiment.sections import resolve
from jaxmodels.runs.folder import RunFolder
from jaxmodels.training import trainer

CNN = small_configs.config(small_configs.CNN, training__steps=40)


class Recorder(jaxmodels.Callback):
    """A callback that records each event and counts steps over resumes."""

    def __init__(self, limit: int = 1000):
        self.limit, self.events, self.steps = limit, [], 0

    def on_start(self, run):
        self.events.append(("start", run.step, run.resumed))

    def on_step(self, run, step, metrics):
        self.steps += 1
        assert step == run.step <= self.limit

    def on_log(self, run, step, values):
        self.events.append(("log", step))
        values["steps_seen"] = self.steps

    def on_evaluate(self, run, step, split, values):
        self.events.append(("evaluate", step, split))
        run.log({"noticed": 1.0})

    def on_save(self, run, step):
        self.events.append(("save", step))

    def on_end(self, run, result):
        self.events.append(("end", result and result.step))

    def state(self):
        return {"steps": self.steps}

    def restore(self, state):
        self.steps = state["steps"]


def run(config, workdir, **options):
    return jaxmodels.train(config, str(workdir), quiet=True, **options)


def test_events_come_in_order_and_added_values_are_written(tmp_path):
    recorder = Recorder()
    run(CNN, tmp_path / "x", callbacks=[recorder])
    expected = [("start", 0, False)]
    for step in (10, 20, 30, 40):
        expected += [("log", step)] + ([("evaluate", step, "validation")] if step % 20 == 0 else []) + [("save", step)]
    assert recorder.events == [*expected, ("evaluate", 40, "test"), ("end", 40)]
    folder = RunFolder(tmp_path / "x")
    assert [line["steps_seen"] for line in folder.metrics("train")] == [10, 20, 30, 40]
    assert all(line["noticed"] == 1.0 for line in folder.metrics("validation"))


def test_callbacks_change_no_result(tmp_path):
    one, other = run(CNN, tmp_path / "x"), run(CNN, tmp_path / "y", callbacks=[Recorder()])
    assert one.metrics["test"]["loss"] == other.metrics["test"]["loss"]


class StopAt(jaxmodels.Callback):
    """A callback that raises after a step, as a signal does."""

    def __init__(self, step):
        self.at = step

    def on_step(self, run, step, metrics):
        if step == self.at:
            raise Interrupted("SIGTERM")


def test_state_is_saved_in_the_checkpoint(tmp_path):
    whole, cut = Recorder(), Recorder()
    run(CNN, tmp_path / "whole", callbacks=[whole])
    with pytest.raises(Interrupted):
        run(CNN, tmp_path / "cut", callbacks=[Recorder(), StopAt(23)])
    run(CNN, tmp_path / "cut", callbacks=[cut])
    assert cut.events[0] == ("start", 23, True) and cut.steps == whole.steps == 40
    without = ("steps_per_second", "examples_per_second", "data_wait", "seconds")
    one, other = ([{k: v for k, v in line.items() if k not in without} for line in RunFolder(tmp_path / name).metrics()] for name in ("whole", "cut"))
    assert one == other


class Asks(jaxmodels.Callback):
    """A callback that requests a checkpoint at one step and the end at another."""

    def __init__(self, save_at: int = 0, stop_at: int = 0):
        self.save_at, self.stop_at = save_at, stop_at

    def on_step(self, run, step, metrics):
        if step == self.save_at:
            run.save()
        if step == self.save_at + 1:
            self.saved = os.listdir(run.folder.checkpoints)
        if step == self.stop_at:
            run.stop("enough")


def test_a_callback_can_save_and_stop(tmp_path):
    config = small_configs.config(CNN, checkpoint__every=100, checkpoint__keep=5, evaluation__every=None)
    asks = Asks(save_at=7, stop_at=23)
    result = run(config, tmp_path / "x", callbacks=[asks])
    assert result.step == 23 and "test" in result.metrics
    assert any(name.startswith("7") for name in asks.saved)  # complete, or being written
    # A requested checkpoint between two scheduled ones is not deleted until the next one is written.
    assert os.listdir(tmp_path / "x" / "checkpoints") == ["23"]
    assert [line["step"] for line in RunFolder(tmp_path / "x").metrics("validation")] == [23]
    assert run(config, tmp_path / "x", callbacks=[Asks()]).step == 23  # it is finished


class Broken(jaxmodels.Callback):
    """A callback that raises in one event."""

    def __init__(self, event: str = "on_log"):
        def fail(*_):
            raise ValueError("no such luck")

        setattr(self, event, fail)


@pytest.mark.parametrize("event", ["on_start", "on_step", "on_log", "on_evaluate", "on_save", "on_end", "state"])
def test_a_callback_that_raises_is_named_and_ends_the_run(tmp_path, event):
    with pytest.raises(RunError, match=f"test_callbacks:Broken failed in {event} at step .*no such luck"):
        run(CNN, tmp_path / "x", callbacks=[Broken(event)])
    result = run(CNN, tmp_path / "x")  # resumes
    assert result.step == 40


def test_on_error_continue_drops_the_callback(tmp_path):
    output = io.StringIO()
    experiment = build_experiment(small_configs.config(CNN, callbacks=({"name": "test_callbacks:Broken", "event": "on_step", "on_error": "continue"},)))
    result = trainer.train(experiment, str(tmp_path / "x"), console=Console(file=output, width=300))
    assert result.step == 40
    assert output.getvalue().count("test_callbacks:Broken failed in on_step at step 1: ValueError: no such luck; training continues without it") == 1
    assert "test_callbacks:Broken" in RunFolder(tmp_path / "x").manifest()["fallbacks"][0]


def test_a_config_names_callbacks_with_their_keys(tmp_path):
    config = small_configs.config(CNN, callbacks=({"name": "test_callbacks:Asks", "stop_at": 20},))
    assert run(config, tmp_path / "x").step == 20
    written = json.loads((tmp_path / "x" / "config.json").read_text())["callbacks"]
    assert written == [{"name": "test_callbacks:Asks", "save_at": 0, "stop_at": 20, "on_error": None, "processes": None}]
    assert resolve(load_config(str(tmp_path / "x"))) == resolve(config)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"name": "test_callbacks:Asks", "stop": 3}, "config.callbacks.0.stop: the callback 'test_callbacks:Asks' has no such key. Did you mean 'stop_at'?"),
        ({"name": "test_callbacks:Asks", "stop_at": "x"}, "config.callbacks.0.stop_at must be a whole number"),
        ({"name": "test_callbacks:None_"}, "cannot import 'test_callbacks:None_'"),
        ({"stop_at": 3}, "config.callbacks.0 must be"),
        ({"name": "test_callbacks:Asks", "on_error": "ignore"}, "config.callbacks.0.on_error must be one of 'stop', 'continue'"),
    ],
)
def test_wrong_entries_are_errors_before_the_start(entry, message):
    with pytest.raises(ConfigError, match=message.replace(".", r"\.").replace("?", r"\?")):
        resolve(small_configs.config(CNN, callbacks=(entry,)))


@pytest.mark.parametrize("wrong", [object(), Recorder])
def test_an_object_that_is_not_a_callback_is_an_error(tmp_path, wrong):
    with pytest.raises(ConfigError, match="is not a callback|pass an instance"):
        run(CNN, tmp_path / "x", callbacks=[wrong])
    assert not (tmp_path / "x").exists()
