"""A run that goes on with other values, or from an older checkpoint: what changes, what stays exact, what is recorded, and what is refused."""

import dataclasses
import io
import json
import math
import shutil
import signal

import numpy as np
import pytest
import small_configs
from conftest import ROOT
from rich.console import Console
from run_state import final_state

import jaxmodels
from jaxmodels.cli import main as cli
from jaxmodels.data import loader
from jaxmodels.errors import ConfigError, Interrupted, RunError
from jaxmodels.experiment import changeable
from jaxmodels.experiment.build import build_experiment
from jaxmodels.experiment.sections import resolve
from jaxmodels.runs import checkpoint, going_back
from jaxmodels.runs.folder import RunFolder
from jaxmodels.runs.progress import Progress
from jaxmodels.training import changes
from jaxmodels.training import trainer as trainer_lib
from jaxmodels.training.callback import Callback

pytestmark = pytest.mark.faults

CONFIG = small_configs.config(
    small_configs.CNN,
    model={"name": "own_parts:Linear"},
    data={"source": "arrays", "batch_size": 30, "eval_batch_size": 32},
    optimizer={"name": "adam", "learning_rate": 3e-3},
    training={"steps": 8, "ema": 0.9},
    evaluation={"every": 4},
    checkpoint={"every": 4, "keep": 3},
    log={"every": 1, "tensorboard": False},
)


def split(size, seed):
    draw = np.random.default_rng(seed)
    return {"image": draw.normal(size=(size, 6, 6, 1)).astype(np.float32), "label": np.arange(size, dtype=np.int32) % 4}


DATA = {"train": split(90, 0), "validation": split(32, 1), "test": split(32, 2)}


class StopAfter(Callback):
    """Sends SIGTERM after a step."""

    def __init__(self, step):
        self.step = step

    def on_step(self, run, step, metrics):
        if step == self.step:
            signal.raise_signal(signal.SIGTERM)


def train(config, workdir, stop=None, **options):
    """Train, until the end or a signal after step `stop`; return what was printed."""
    output = io.StringIO()
    experiment = build_experiment(config, data=DATA)
    try:
        options["callbacks"] = [*options.get("callbacks", []), *([StopAfter(stop)] if stop else [])]
        trainer_lib.train(experiment, str(workdir), console=Console(file=output, width=1000), **options)
        assert stop is None
    except Interrupted:
        assert stop is not None
    return output.getvalue()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of CONFIG, with checkpoints of steps 4 and 8."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    train(CONFIG, workdir)
    return workdir


@pytest.fixture
def workdir(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def kept(workdir):
    return sorted(int(path.name) for path in RunFolder(workdir).checkpoints.iterdir() if path.name.isdigit())


def files(folder):
    """Return the contents of the files of a run that say what it did; without the starts in its manifest."""
    manifest = {key: value for key, value in folder.manifest().items() if key != "starts"}
    return folder.config_file.read_bytes(), manifest, folder.metrics_file.read_bytes()


def changed(workdir):
    return [(entry["step"], entry["key"], entry["old"], entry["new"]) for entry in RunFolder(workdir).manifest().get("changes", [])]


def assert_same(one, other):
    (arrays, metrics), (arrays_2, metrics_2) = final_state(one), final_state(other)
    assert metrics == metrics_2 and arrays.keys() == arrays_2.keys()
    for key, value in arrays.items():
        np.testing.assert_array_equal(value, arrays_2[key], err_msg=key)


# Longer and shorter


def cosine(step, steps):
    """The learning rate of a step, from 1, by the formula of a cosine that ends at a tenth."""
    return 3e-3 * (0.1 + 0.9 * (1 + math.cos(math.pi * (step - 1) / steps)) / 2)


def test_a_finished_run_goes_on_with_more_steps(tmp_path, capsys):
    config, workdir = small_configs.config(CONFIG, optimizer__schedule={"name": "cosine", "final": 0.1}), tmp_path / "run"
    train(config, workdir)
    folder, longer = RunFolder(workdir), small_configs.config(config, training__steps=14)
    before, (old_test,) = folder.metrics(), folder.metrics("test")
    stopped = shutil.copytree(workdir, tmp_path / "stopped")
    output = train(longer, workdir)
    assert "from step 8 on, config.training.steps is 14; it was 8" in output
    line = f"from step 8 on, the learning rate follows the schedule of 14 steps: {cosine(9, 14):.4g} in step 9, after {cosine(8, 8):.4g} in step 8"
    assert line in output
    # The past is as it was, the new steps follow the new schedule, and the test is that of the end.
    lines = folder.metrics()
    assert [each for each in lines if each["step"] <= 8] == [each for each in before if each["split"] != "test"]
    rates = {each["step"]: each["learning_rate"] for each in folder.metrics("train")}
    assert rates == pytest.approx({step: cosine(step, 8 if step <= 8 else 14) for step in range(1, 15)}, rel=1e-5)
    assert [each["step"] for each in folder.metrics("validation")] == [4, 8, 12, 14]
    assert [each["step"] for each in folder.metrics("test")] == [14]
    assert json.loads((workdir / "set_aside" / "tests.jsonl").read_text()) == old_test
    assert changed(workdir) == [(8, "training.steps", 8, 14)] and folder.manifest()["steps"] == 14 and folder.config()["training"]["steps"] == 14
    assert cli.run(["config", f"--config={workdir}"]) == 0
    assert f"from step 8  training.steps: 8 → 14; {line}" in capsys.readouterr().out
    # A stop after the change, and again, end the same.
    train(longer, stopped, stop=11)
    train(longer, stopped)
    assert_same(workdir, stopped)
    assert changed(stopped) == changed(workdir)


def test_a_run_cannot_be_shorter_than_it_is_already(workdir):
    before = files(RunFolder(workdir))
    with pytest.raises(ConfigError, match=r"training.steps=6, but the run is at step 8 already. Give at least as much, or go back with --from_step .* 4\."):
        train(small_configs.config(CONFIG, training__steps=6), workdir)
    with pytest.raises(ConfigError, match=r"training.epochs=0.9 is 3 steps, but the run is at step 8 already. Give at least as much\.$"):
        train(small_configs.config(CONFIG, training__steps=None, training__epochs=0.9), workdir)
    assert files(RunFolder(workdir)) == before


@pytest.mark.slow
def test_a_run_that_is_shortened_to_its_checkpoint_ends_there(tmp_path):
    train(CONFIG, tmp_path / "run", stop=5)
    output = train(small_configs.config(CONFIG, training__steps=5), tmp_path / "run")
    assert "the run ends at step 5" in output
    folder = RunFolder(tmp_path / "run")
    assert [line["step"] for line in folder.metrics("validation")] == [4, 5] and [line["step"] for line in folder.metrics("test")] == [5]
    whole = files(folder)
    assert "from step" not in train(small_configs.config(CONFIG, training__steps=5), tmp_path / "run") and files(folder) == whole
    assert changed(tmp_path / "run") == [(5, "training.steps", 8, 5)]


@pytest.mark.slow
def test_a_run_that_is_shortened_to_an_evaluated_checkpoint_ends_there(tmp_path):
    """The checkpoint is saved again, since it did not say that it is the end."""
    workdir = tmp_path / "run"
    train(CONFIG, workdir)
    shutil.rmtree(workdir / "checkpoints" / "8")  # what is left was evaluated at 4
    shorter = small_configs.config(CONFIG, training__steps=4)
    train(shorter, workdir)
    folder = RunFolder(workdir)
    whole = files(folder)
    assert [line["step"] for line in folder.metrics("test")] == [4] and changed(workdir) == [(4, "training.steps", 8, 4)]
    assert "from step" not in train(shorter, workdir) and files(folder) == whole


# The batch size


def test_another_batch_size_goes_on_with_the_next_example(tmp_path, monkeypatch):
    """By the examples that are read: each epoch has each of the 90 once, and `epochs` counts them."""
    read, seen = loader.read, []

    def recording(source, indices, name):
        if name.endswith("split train"):
            seen.append(np.asarray(indices))
        return read(source, indices, name)

    monkeypatch.setattr(loader, "read", recording)

    def run(workdir, steps, stop=None, **change):
        """Train `steps` steps; return the examples of their batches, without those that were read ahead."""
        seen.clear()
        output = train(small_configs.config(in_epochs, **change), workdir, stop, allow_change=["data.batch_size"])
        return np.concatenate(seen[:steps]), output

    in_epochs = small_configs.config(CONFIG, training={"epochs": 4, "ema": 0.9}, checkpoint__every=100)  # 360 examples
    first, _ = run(tmp_path / "run", 5, stop=5)
    other = shutil.copytree(tmp_path / "run", tmp_path / "other")
    second, output = run(tmp_path / "run", 11, data__batch_size=20)  # 210 examples are left: 10.5 batches of 20
    assert "the schedule of 16 steps" in output and RunFolder(tmp_path / "run").manifest()["steps"] == 16
    order = np.concatenate([first, second])
    assert len(order) == 370 and all(sorted(order[90 * i : 90 * i + 90]) == list(range(90)) for i in range(4))
    assert changed(tmp_path / "run") == [(5, "data.batch_size", 30, 20)]
    # Stopped in between, and started again: the same, bit for bit.
    parts = [run(other, 4, stop=9, data__batch_size=20)[0], run(other, 7, data__batch_size=20)[0]]
    np.testing.assert_array_equal(np.concatenate(parts), second)
    assert_same(tmp_path / "run", other)


def test_checkpoints_of_an_earlier_version_do_not_say_how_many_examples_were_read(tmp_path):
    """The manifest says what has changed since, also after a death before the next checkpoint."""
    folder, old = RunFolder(tmp_path), Progress(evaluated_at=4)
    config = small_configs.config(CONFIG, data__batch_size=20)
    experiment = build_experiment(config, data=DATA)
    folder.write_config(resolve(CONFIG))
    before = changes.take_up(experiment, folder, 4, old)
    folder.write_config(resolve(config))
    folder.update_manifest(changes=[{"step": 4, "key": "data.batch_size", "old": 30, "new": 20}])
    after = changes.take_up(experiment, folder, 4, old)
    assert before.offset == after.offset == 4 * 30 - 4 * 20
    assert [entry["key"] for entry in before.changes] == [entry["key"] for entry in after.changes] == ["data.batch_size"]


@pytest.mark.slow
def test_a_batch_size_after_a_checkpoint_of_an_earlier_version(tmp_path, monkeypatch):
    to_page, workdir = checkpoint.to_page, tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "to_page", lambda progress, checksums: to_page(dataclasses.replace(progress, position=None, config=None), checksums))
        train(CONFIG, workdir, stop=4)
    config = small_configs.config(CONFIG, data__batch_size=20)

    class Dies(Callback):
        def on_log(self, run, step, values):
            raise ValueError

    with pytest.raises(RunError, match="failed in on_log"):
        train(config, workdir, allow_change=["data.batch_size"], callbacks=[Dies()])
    assert kept(workdir) == [4] and changed(workdir) == [(4, "data.batch_size", 30, 20)] and RunFolder(workdir).config()["data"]["batch_size"] == 20
    train(config, workdir)  # the permission is recorded
    checkpoints = checkpoint.Checkpoints(workdir / "checkpoints", read_only=True)
    assert checkpoints.progress(8).position == 4 * 30 + 4 * 20
    checkpoints.close()


# The table


def test_each_key_of_a_config_has_a_rule():
    may = {key: changeable.rule_of(key).may_change for key in changes.flat(resolve(small_configs.GPT))}
    assert {key for key, value in may.items() if value == "no"} >= {
        "seed",
        "model.name",
        "model.width",
        "task.name",
        "data.source",
        "optimizer.name",
        "init_from",
    }
    assert {key for key, value in may.items() if value == "yes"} >= {"training.steps", "training.epochs", "checkpoint.best", "evaluation.patience", "log.every"}
    on_request = {key for key, value in may.items() if value == "with --allow_change"}
    assert on_request >= {"optimizer.learning_rate", "optimizer.schedule.warmup", "data.batch_size", "data.shuffle", "training.accumulate", "model.dropout"}
    assert changeable.rule_of("data.sources.docs.weight").may_change == "with --allow_change"
    assert changeable.rule_of("data.sources.docs.source").may_change == changeable.rule_of("training.freeze").may_change == "no"
    assert changeable.table() in (ROOT / "docs" / "runs.md").read_text(), "write changeable.table() into docs/runs.md"


REFUSED = {
    "on request": ({"optimizer__learning_rate": 1e-3, "data__batch_size": 60}, [], r"--allow_change=data.batch_size,optimizer.learning_rate\n"),
    "one of two": ({"optimizer__learning_rate": 1e-3, "data__batch_size": 60}, ["data"], r"learning_rate: 0.003 in the run, 0.001 now\nTo go on .* --allow_change=optimizer.learning_rate\n"),
    "never": ({"seed": 3, "task__label_smoothing": 0.1}, ["data.batch_size"], "seed, task.label_smoothing cannot change within a run. Start a new run in another --workdir, .*config.init_from="),
    "a never-key is allowed": ({"seed": 3}, ["seed"], "--allow_change=seed: it cannot change within a run"),
    "an unknown key": ({}, ["optimizer.learning_rat"], "--allow_change=optimizer.learning_rat: there is no such key in this config. Did you mean 'optimizer.learning_rate'"),
    "arrays of the optimizer": ({"optimizer__mu_dtype": "bfloat16"}, ["optimizer"], "optimizer.mu_dtype: this change adds or removes arrays of the optimizer's state"),
    "the average": ({"training__ema": None}, ["training.ema"], "training.ema: the average cannot be removed from a run"),
    "no best metric": ({"checkpoint__best": "f1"}, [], "has no metric 'f1'"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_change_that_is_refused_changes_nothing(case, workdir):
    change, allowed, message = REFUSED[case]
    before = files(RunFolder(workdir))
    with pytest.raises(ConfigError, match=message):
        train(small_configs.config(CONFIG, **change), workdir, allow_change=allowed)
    assert files(RunFolder(workdir)) == before and kept(workdir) == [4, 8]


def test_a_key_that_is_allowed_and_the_same_changes_nothing(workdir):
    before = files(RunFolder(workdir))
    train(CONFIG, workdir, allow_change=["optimizer.learning_rate", "config.data", "training.steps"])
    assert files(RunFolder(workdir)) == before


@pytest.mark.slow
def test_the_optimizer_gets_a_limit_of_the_gradient_and_keeps_its_state(workdir):
    """`clip_norm` moves the arrays of Optax's state to other places in its tree. A limit that is never reached changes no number."""
    config = small_configs.config(CONFIG, training__steps=10)
    other = shutil.copytree(workdir, workdir.parent / "other")
    train(config, other)
    train(small_configs.config(config, optimizer__clip_norm=1e6), workdir, allow_change=["optimizer.clip_norm"])
    (here, metrics), (there, metrics_2) = final_state(workdir), final_state(other)
    assert metrics == metrics_2 and here.keys() != there.keys()
    for value, expected in zip(here.values(), there.values(), strict=True):
        np.testing.assert_allclose(value, expected, rtol=1e-6)
    assert changed(workdir) == [(8, "optimizer.clip_norm", None, 1e6), (8, "training.steps", 8, 10)]


# Failures


def test_a_start_that_fails_before_it_trains_records_no_change(workdir, monkeypatch):
    folder = RunFolder(workdir)
    before, config = files(folder), small_configs.config(CONFIG, training__steps=12, optimizer__learning_rate=1e-3, checkpoint__keep=1)

    def fail(*_):
        raise RunError("out of memory")

    with monkeypatch.context() as patch, pytest.raises(RunError, match="out of memory"):
        patch.setattr(trainer_lib, "compile_train_step", fail)
        train(config, workdir, allow_change=["optimizer.learning_rate"])
    config_file, manifest, _ = files(folder)
    assert (config_file, manifest) == before[:2] and kept(workdir) == [4, 8]
    train(CONFIG, workdir)  # the run as it was; its test, which was to be done again, is
    assert files(folder)[:2] == before[:2] and [line["step"] for line in folder.metrics("test")] == [8]


def test_a_death_between_the_two_files_of_the_record(tmp_path, monkeypatch):
    folder, config = RunFolder(tmp_path), small_configs.config(CONFIG, training__steps=9, optimizer__learning_rate=1e-3)
    folder.write_config(resolve(CONFIG))
    page = Progress(evaluated_at=8, config=resolve(CONFIG), position=240)

    def record():
        up = changes.take_up(build_experiment(config, data=DATA), folder, 8, page)
        record = changes.Record(folder)
        record.expect(up)
        record.commit()

    def die(*_):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch, pytest.raises(RunError, match="cannot be written: Input/output error"):
        patch.setattr(RunFolder, "write_config", die)
        record()
    (entries, half) = changed(tmp_path), folder.manifest()
    assert entries == [(8, "optimizer.learning_rate", 3e-3, 1e-3), (8, "training.steps", 8, 9)] and folder.config()["training"]["steps"] == 8
    # What the run has now, so that the same command needs no permission again; and what it had before.
    assert changes.stored(folder)["training.steps"] == 9 and changes.stored_at(folder, 8) == changes.flat(resolve(CONFIG))
    record()
    assert folder.manifest() == half and folder.config()["training"]["steps"] == 9 == changes.stored(folder)["training.steps"]


# The best checkpoint and patience


def evaluated(folder, progress, **change):
    """Return what becomes of a checkpoint of step 8, without training."""
    return changes.take_up(build_experiment(small_configs.config(CONFIG, **change), data=DATA), folder, 8, progress)


def test_the_best_by_another_metric_is_that_of_a_checkpoint_that_exists(tmp_path):
    folder = RunFolder(tmp_path)
    config = resolve(small_configs.config(CONFIG, checkpoint__best="loss"))
    folder.write_config(config)
    for step, loss, accuracy in ((2, 0.5, 0.9), (4, 0.6, 0.5), (6, 0.7, 0.7), (8, 0.8, 0.6)):
        folder.add_metrics(step, "validation", {"loss": loss, "accuracy": accuracy})
    for step in (4, 6, 8):
        (tmp_path / "checkpoints" / str(step)).mkdir(parents=True)
    page = Progress(evaluated_at=8, best=0.5, best_step=2, without_improvement=3, config=config, position=240)
    same = evaluated(folder, page, checkpoint__best="loss")
    assert same.progress == page and not same.lines and not same.changes
    # A run that went back, and has deleted its best checkpoint since that step.
    folder.update_manifest(went_back=[{"from_step": 8}])
    back = evaluated(folder, page, checkpoint__best="loss")
    assert (back.progress.best, back.progress.best_step, back.progress.without_improvement) == (0.6, 4, 2) and "of step 4" in back.lines[0]
    up = evaluated(folder, page, checkpoint__best="accuracy")
    assert (up.progress.best, up.progress.best_step, up.progress.without_improvement) == (0.7, 6, 1)
    assert "the best of the checkpoints that exist is that of step 6, with accuracy 0.7000" in up.lines
    none = evaluated(folder, page, checkpoint__best=None)
    assert (none.progress.best, none.progress.best_step, none.progress.without_improvement) == (None, None, 0)
    for path in (tmp_path / "checkpoints").iterdir():
        path.rmdir()
    new = evaluated(folder, page, checkpoint__best="accuracy")
    assert new.progress.best_step is None and "the best begins with the next evaluation" in new.lines[-1]


def test_a_finished_run_is_tested_again_when_another_checkpoint_is_the_best(workdir):
    folder, config = RunFolder(workdir), small_configs.config(CONFIG, checkpoint__best="loss")
    losses = {line["step"]: line["loss"] for line in folder.metrics("validation")}
    best = min(losses, key=losses.get)
    output = train(config, workdir)
    assert f"the best of the checkpoints that exist is that of step {best}" in output
    (test,) = folder.metrics("test")
    assert test["step"] == best and jaxmodels.evaluate(f"{workdir}@best", data=DATA)["loss"] == pytest.approx(test["loss"], rel=1e-6)
    whole = files(folder)
    assert "from step" not in train(config, workdir) and files(folder) == whole


def test_patience_that_is_raised(tmp_path):
    folder = RunFolder(tmp_path)
    config = resolve(small_configs.config(CONFIG, checkpoint__best="loss", evaluation__patience=2, training__steps=20))
    folder.write_config(config)
    page = Progress(evaluated_at=8, best=0.5, best_step=4, without_improvement=2, finished=True, config=config, position=240)
    stays = evaluated(folder, page, checkpoint__best="loss", evaluation__patience=2, training__steps=30)
    assert stays.progress.finished and not stays.reopened and "Raise evaluation.patience" in stays.lines[-1]
    for patience in (3, None):
        goes_on = evaluated(folder, page, checkpoint__best="loss", evaluation__patience=patience, training__steps=20)
        assert not goes_on.progress.finished and goes_on.reopened and goes_on.progress.without_improvement == 2
    # Less patience stops a run at its next evaluation, not before.
    assert not evaluated(
        folder, dataclasses.replace(page, finished=False), checkpoint__best="loss", evaluation__patience=1, training__steps=20
    ).progress.finished


@pytest.mark.slow
def test_a_run_that_patience_has_stopped_goes_on_with_more_patience(tmp_path):
    """At a learning rate that changes no parameter, the second evaluation is no better than the first."""
    config = small_configs.config(CONFIG, optimizer__learning_rate=1e-30, evaluation={"every": 2, "patience": 1}, checkpoint__best="loss")
    workdir, folder = tmp_path / "run", RunFolder(tmp_path / "run")
    assert "stopping early" in train(config, workdir)
    assert kept(workdir) == [2, 4]
    assert "the run stays finished: loss has not improved in 1 evaluations. Raise evaluation.patience" in train(
        small_configs.config(config, training__steps=9), workdir
    )
    assert kept(workdir) == [2, 4] and [line["step"] for line in folder.metrics("test")] == [2]
    assert "stopping early" in train(small_configs.config(config, evaluation__patience=2, training__steps=9), workdir)
    assert [line["step"] for line in folder.metrics("validation")] == [2, 4, 6] and [line["step"] for line in folder.metrics("test")] == [2]
    assert changed(workdir) == [(4, "evaluation.patience", 1, 2), (4, "training.steps", 8, 9)]


# The mixture


def test_other_weights_of_a_mixture_begin_an_epoch(tmp_path):
    """In an epoch of the new mixture each part is seen whole."""
    sources = {"one": {"source": "own_parts:numbers", "weight": 1}, "two": {"source": "own_parts:numbers", "offset": 50, "weight": 1}}
    config = small_configs.config(CONFIG, data={"source": "mixture", "sources": sources, "batch_size": 30})
    experiment = build_experiment(small_configs.config(config, data__sources__two__weight=3.0))
    size = len(experiment.dataset.splits["train"])
    assert size > len(build_experiment(config).dataset.splits["train"])
    folder = RunFolder(tmp_path)
    page = Progress(evaluated_at=8, config=resolve(config), position=240)
    up = changes.take_up(experiment, folder, 8, page)
    start = up.offset + 8 * 30
    assert start % size == 0 and 0 <= start - 240 < size
    assert any("a new epoch begins" in line for line in up.lines) and "a new epoch begins" in up.changes[0]["note"]
    batches = loader.TrainingBatches(experiment.dataset.splits["train"], 30, 100, seed=0, shuffle=True, offset=up.offset)
    assert sorted(batches.indices(start, start + size)) == list(range(size))


# Going back


def test_going_back_sets_aside_what_came_after_and_trains_it_again(location, finished):
    """With other lines of metrics: at an interval of 3, the first is the mean since the change."""
    workdir, config = location("run"), small_configs.config(CONFIG, log__every=3)
    train(CONFIG, workdir)
    folder, aside = RunFolder(workdir), f"{workdir}/set_aside/1"
    losses = {line["step"]: line["loss"] for line in folder.metrics("train")}
    before = files(folder)
    output = train(config, workdir, from_step=4)
    assert f"going back to step 4: the checkpoint of step 8 and the lines of metrics are in {aside}" in output
    assert files(RunFolder(aside)) == before and kept(aside) == [8]
    assert jaxmodels.load(aside).step == 8
    (arrays, metrics), (expected, whole) = final_state(workdir), final_state(finished)
    for key in expected:
        if "metrics" not in key:
            np.testing.assert_array_equal(arrays[key], expected[key], err_msg=key)
    assert [line for line in metrics if line["split"] != "train"] == [line for line in whole if line["split"] != "train"]
    lines = {line["step"]: line["loss"] for line in folder.metrics("train") if line["step"] > 4}
    assert lines == pytest.approx({6: np.mean([losses[5], losses[6]]), 8: np.mean([losses[7], losses[8]])}, rel=1e-5)
    (entry,) = folder.manifest()["went_back"]
    assert (entry["from_step"], entry["moved"], entry["to"]) == (4, [8], "set_aside/1")
    assert changed(workdir) == [(4, "log.every", 1, 3)]


def test_the_same_command_does_not_go_back_again(workdir, capsys):
    """A scheduler that starts a job again gives the same command; with another learning rate it is another command."""
    config, folder = small_configs.config(CONFIG, optimizer__learning_rate=1e-3), RunFolder(workdir)
    options = {"from_step": 4, "allow_change": ["optimizer.learning_rate"]}
    train(config, workdir, stop=6, **options)
    assert "--from_step=4 was done at" in (output := train(config, workdir, **options)) and "from its latest checkpoint, of step 6" in output
    assert kept(workdir) == [4, 8] and len(folder.manifest()["went_back"]) == 1
    assert changed(workdir) == [(4, "optimizer.learning_rate", 3e-3, 1e-3)]
    # Its checkpoint may be deleted by then: it is no longer among the latest `checkpoint.keep`.
    shutil.move(workdir / "checkpoints" / "4", workdir / "4")
    assert "--from_step=4 was done at" in train(config, workdir, **options)
    shutil.move(workdir / "4", workdir / "checkpoints" / "4")
    # The values that the run had up to that step need no permission, although the run has others now.
    output = train(CONFIG, workdir, stop=5, from_step=4)
    assert "the checkpoint of step 8 and" in output and kept(workdir / "set_aside" / "2") == [8] and changed(workdir) == []
    assert cli.run(["config", f"--config={workdir}"]) == 0
    lines = capsys.readouterr().out.partition("changes of this run:")[2]
    assert "went back to step 4; later checkpoints are in set_aside/1" in lines and "set_aside/2" in lines


def test_a_death_while_going_back_loses_nothing(workdir, monkeypatch):
    shutil.copytree(workdir / "checkpoints" / "8", workdir / "checkpoints" / "7")  # its contents do not matter here
    (workdir / "elsewhere").mkdir()
    (workdir / "checkpoints" / "7").rename(workdir / "elsewhere" / "7")
    (workdir / "checkpoints" / "7").symlink_to("../elsewhere/7")
    folder, move = RunFolder(workdir), going_back._move

    def die_at_seven(path, to):
        if path.name == "7":
            raise OSError(5, "Input/output error")
        move(path, to)

    with monkeypatch.context() as patch, pytest.raises(RunError, match="cannot be written"):
        patch.setattr(going_back, "_move", die_at_seven)
        going_back.go_back(folder, 4)
    assert kept(workdir) == [4, 7] and "went_back" not in folder.manifest()
    going_back.go_back(folder, 4)
    assert kept(workdir) == [4] and kept(workdir / "set_aside" / "1") == [8] and kept(workdir / "set_aside" / "2") == [7]
    link = workdir / "set_aside" / "2" / "checkpoints" / "7"
    assert link.is_symlink() and (link / "state").is_dir()
    assert [entry["moved"] for entry in folder.manifest()["went_back"]] == [[7]]
    assert "there are no later checkpoints" in going_back.go_back(folder, 4) and len(folder.manifest()["went_back"]) == 1


def test_a_step_that_cannot_be_gone_back_to(workdir, tmp_path):
    before = files(RunFolder(workdir))
    cases = {
        "no checkpoint of that step; it has steps 4, 8": (workdir, {"from_step": 5}),
        "has no run": (tmp_path / "new", {"from_step": 4}),
        "leave it out, or --overwrite, which deletes that run": (workdir, {"from_step": 4, "overwrite": True}),
    }
    for message, (place, options) in cases.items():
        with pytest.raises(ConfigError, match=f"--from_step=.*{message}"):
            train(CONFIG, place, **options)
    child = RunFolder(tmp_path / "child")
    child.write_config(CONFIG)
    child.update_manifest(id="c")
    RunFolder(workdir).add_child({"run": str(child.path), "id": "c", "step": 8, "needed": True})
    with pytest.raises(ConfigError, match="--from_step=4: the frozen weights of .*child are in the checkpoint of step 8"):
        train(CONFIG, workdir, from_step=4)
    assert files(RunFolder(workdir)) == before and kept(workdir) == [4, 8] and not (tmp_path / "new").exists()


# From the command line, with several processes and devices


def test_the_arguments_of_the_command_line():
    options = cli.parser().parse_args(["train", "--config=x", "--allow_change=a.b,c", "--allow_change=d", "--from_step=4"])
    assert options.allow_change == ["a.b", "c", "d"] and options.from_step == 4
    assert cli.parser().parse_args(["train", "--config=x"]).allow_change == []


def test_from_python(workdir):
    config = small_configs.config(CONFIG, data__shuffle=False)
    result = jaxmodels.train(config, str(workdir), data=DATA, quiet=True, from_step=4, allow_change=["data.shuffle"])
    assert result.step == 8 and changed(workdir) == [(4, "data.shuffle", True, False)]
