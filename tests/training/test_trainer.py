"""The training loop: its output, its checkpoints, failures, and errors."""

import io
import json
import os

import jax
import numpy as np
import pytest
import small_configs
import warm_python
from conftest import HELPERS
from jax._src import array as jax_array
from rich.console import Console

import jaxmodels
import jaxmodels.errors
from jaxmodels.errors import ConfigError, Diverged
from jaxmodels.experiment.build import build_experiment
from jaxmodels.runs.checkpoint import Checkpoints, parse_run
from jaxmodels.runs.folder import RunFolder
from jaxmodels.runs.weights import match
from jaxmodels.training import trainer as trainer_lib
from jaxmodels.training.trackers.jsonl import JsonLines
from jaxmodels.training.trackers.tensorboard import TensorBoard


def run(config, workdir, **options):
    return jaxmodels.train(config, str(workdir), quiet=True, **options)


def lines(workdir, split=None):
    return RunFolder(workdir).metrics(split)


def test_a_run_learns_and_leaves_its_folder(tmp_path):
    config = small_configs.config(small_configs.CNN, training__steps=150, evaluation__every=50, checkpoint__every=50, checkpoint__keep=2)
    config = small_configs.config(config, optimizer__learning_rate=1e-2)
    result = run(config, tmp_path / "x")
    assert result.step == 150 and result.metrics["test"]["accuracy"] > 0.85
    assert sorted(os.listdir(tmp_path / "x")) == ["checkpoints", "config.json", "manifest.json", "metrics.jsonl", "tensorboard"]
    assert sorted(os.listdir(tmp_path / "x" / "checkpoints")) == ["100", "150"]
    train = lines(tmp_path / "x", "train")
    assert [line["step"] for line in train] == list(range(10, 151, 10))
    assert {"loss", "accuracy", "grad_norm", "learning_rate", "steps_per_second", "examples_per_second", "data_wait", "seconds"} <= train[0].keys()
    assert [line["step"] for line in lines(tmp_path / "x", "validation")] == [50, 100, 150]
    assert [line["step"] for line in lines(tmp_path / "x", "test")] == [150]
    manifest = RunFolder(tmp_path / "x").manifest()
    assert manifest["parameters"] == 40 + 296 + 528 + 170 and manifest["fallbacks"] == [] and manifest["parents"] == []
    assert manifest["starts"][0]["compiled"].keys() == {"init", "train_step", "eval_step"}
    assert manifest["starts"][0]["packages"]["jax"] == jax.__version__


def test_text_runs_learn_and_show_samples(tmp_path):
    config = small_configs.config(small_configs.GPT, training__steps=60, task__sample_length=40, evaluation__every=30, checkpoint__every=30)
    result = run(config, tmp_path / "x")
    tokens = build_experiment(config).dataset.splits["train"].tokens
    share = np.bincount(tokens) / len(tokens)
    unigram = -(share[share > 0] * np.log(share[share > 0])).sum()
    assert result.metrics["validation"]["loss"] < unigram
    np.testing.assert_allclose(result.metrics["validation"]["perplexity"], np.exp(result.metrics["validation"]["loss"]))
    text = (tmp_path / "x" / "samples.txt").read_text()
    assert text.count("--- step") == 2 and len(text) > 80
    used = {"asked": "auto", "used": "xla", "why": "there is no fused kernel for cpu"}
    assert RunFolder(tmp_path / "x").manifest()["starts"][0]["attention"] == used
    assert jaxmodels.load(str(tmp_path / "x")).tokenizer.vocab_size == result_vocabulary(config)


def result_vocabulary(config):
    return build_experiment(config).dataset.info["vocab_size"]


def test_runs_are_deterministic_and_differ_by_seed(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(small_configs.config(small_configs.CNN, seed=seed, training__steps=20), tmp_path / name)
    losses = [[line["loss"] for line in lines(tmp_path / name)] for name in "abc"]
    assert losses[0] == losses[1] != losses[2]


def test_a_finished_run_trains_no_more(tmp_path):
    config = small_configs.config(small_configs.CNN, training__steps=20)
    first = run(config, tmp_path / "x")
    content = (tmp_path / "x" / "metrics.jsonl").read_bytes()
    again = run(config, tmp_path / "x")
    assert again.metrics == first.metrics and (tmp_path / "x" / "metrics.jsonl").read_bytes() == content
    assert RunFolder(tmp_path / "x").manifest()["starts"][1]["compiled"] == {}


def test_the_best_checkpoint_is_kept_and_tested_and_patience_ends_the_run(tmp_path):
    # The learning rate becomes far too large after the warm-up: the loss is best early.
    config = small_configs.config(
        small_configs.CNN,
        training__steps=400,
        optimizer={"name": "sgd", "learning_rate": 4.0, "schedule": {"warmup": 200}, "clip_norm": 1.0},
        evaluation={"every": 10, "patience": 3},
        checkpoint={"every": 10, "keep": 1, "best": "loss"},
    )
    result = run(config, tmp_path / "x")
    losses = {line["step"]: line["loss"] for line in lines(tmp_path / "x", "validation")}
    best = min(losses, key=losses.get)
    assert result.step == best + 30 < 400 and result.evaluated_step == best
    assert sorted(map(int, os.listdir(tmp_path / "x" / "checkpoints"))) == [best, best + 30]
    values = jaxmodels.evaluate(str(tmp_path / "x"), split="validation")
    assert values["step"] == best
    np.testing.assert_allclose(values["loss"], losses[best], rtol=1e-6)
    assert jaxmodels.evaluate(f"{tmp_path}/x@latest", split="validation")["step"] == best + 30
    again = run(config, tmp_path / "x")
    assert again.step == best + 30


def test_higher_is_better_for_accuracy(tmp_path):
    config = small_configs.config(small_configs.CNN, training__steps=100, evaluation__every=10, checkpoint={"every": 100, "keep": 1, "best": "accuracy"})
    result = run(config, tmp_path / "x")
    values = {line["step"]: line["accuracy"] for line in lines(tmp_path / "x", "validation")}
    best = max(values.values())
    assert result.evaluated_step == next(step for step, value in values.items() if value == best)


def test_a_metric_that_the_task_lacks_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="has no metric 'f1'"):
        run(small_configs.config(small_configs.CNN, training__steps=10, checkpoint__best="f1"), tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_divergence_names_the_step_and_keeps_the_last_good_checkpoint(tmp_path):
    config = small_configs.config(small_configs.CNN)
    images = np.zeros((64, 8, 8, 1), np.float32)
    images[40:] = 3e38  # unshuffled batches of 8: step 6 is the first whose loss is not finite
    data = {"train": {"image": images, "label": np.arange(64) % 10}}
    config |= {"data": {"source": "arrays", "batch_size": 8, "shuffle": False}, "checkpoint": {"every": 2}, "evaluation": {}}
    with pytest.raises(Diverged, match="diverged at step 6.*latest good checkpoint is step 4") as caught:
        run(config, tmp_path / "x", data=data)
    assert caught.value.step == 6 and caught.value.exit_status == 3
    assert max(map(int, os.listdir(tmp_path / "x" / "checkpoints"))) == 4
    # Again from step 4: the same end, and the checkpoint is not deleted.
    with pytest.raises(Diverged, match="step 6"):
        run(config, tmp_path / "x", data=data)
    assert max(map(int, os.listdir(tmp_path / "x" / "checkpoints"))) == 4


def test_a_failing_logger_is_reported_once_and_does_not_stop_the_run(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk is full")

    monkeypatch.setattr(TensorBoard, "on_log", fail)
    output = io.StringIO()
    experiment = build_experiment(small_configs.config(small_configs.CNN, training__steps=30))
    result = trainer_lib.train(experiment, str(tmp_path / "x"), console=Console(file=output, width=200))
    assert result.step == 30
    assert output.getvalue().count("tracker 'tensorboard' failed in on_log (OSError: disk is full)") == 1
    assert any("'tensorboard'" in f for f in RunFolder(tmp_path / "x").manifest()["fallbacks"])
    assert lines(tmp_path / "x", "test")


def test_the_result_does_not_depend_on_the_log(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk is full")

    expected = run(small_configs.config(small_configs.CNN, training__steps=30), tmp_path / "x")
    monkeypatch.setattr(JsonLines, "on_log", fail)
    result = run(small_configs.config(small_configs.CNN, training__steps=30), tmp_path / "y")
    assert result.metrics["test"]["accuracy"] == expected.metrics["test"]["accuracy"] and not lines(tmp_path / "y")


@pytest.mark.parametrize("error", [BrokenPipeError(), OSError("full"), UnicodeEncodeError("ascii", "x", 0, 1, "no"), SystemExit(1)])
def test_a_failing_terminal_does_not_stop_the_run(tmp_path, error):
    class Broken(io.StringIO):
        def write(self, *_):
            raise error

    experiment = build_experiment(small_configs.config(small_configs.CNN, training__steps=20))
    result = trainer_lib.train(experiment, str(tmp_path / "x"), console=Console(file=Broken()))
    assert result.step == 20 and lines(tmp_path / "x", "test")
    assert sum("terminal cannot be written" in f for f in RunFolder(tmp_path / "x").manifest()["fallbacks"]) == 1


def test_tensorboard_files_hold_the_metrics(tmp_path):
    from tensorboardX.proto.event_pb2 import Event

    run(small_configs.config(small_configs.CNN, training__steps=20), tmp_path / "x")
    (file,) = (tmp_path / "x" / "tensorboard").iterdir()
    content, found = file.read_bytes(), {}
    while content:  # TFRecord framing: length, its checksum, the record, its checksum
        length = int.from_bytes(content[:8], "little")
        event = Event.FromString(content[12 : 12 + length])
        found |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
        content = content[12 + length + 4 :]
    for line in lines(tmp_path / "x"):
        np.testing.assert_allclose(found[f"{line['split']}/loss", line["step"]], line["loss"], rtol=1e-6)


def test_steps_that_log_nothing_read_nothing_back(tmp_path, monkeypatch):
    reads = []
    original = jax_array.ArrayImpl._value

    def counted(self):
        reads.append(self.shape)
        return original.fget(self)

    config = small_configs.config(small_configs.CNN, training__steps=200, log__every=50, evaluation={}, checkpoint__every=1000)
    run(config, tmp_path / "warm")
    monkeypatch.setattr(jax_array.ArrayImpl, "_value", property(counted))
    counts = []
    for every in (100, 50):
        reads.clear()
        run(small_configs.config(config, log__every=every), tmp_path / str(every))
        counts.append(len(reads))
    # Two more lines: for each, five metrics of two numbers are read, and nothing for the other 198 steps.
    assert 0 < counts[1] - counts[0] <= 2 * 12
    assert counts[0] < 100


def test_one_compilation_per_function_and_none_on_the_second_start(tmp_path, monkeypatch):
    compiled = []
    original = jax.stages.Lowered.compile

    def counted(self, *args, **options):
        compiled.append(self)
        return original(self, *args, **options)

    monkeypatch.setattr(jax.stages.Lowered, "compile", counted)
    config = small_configs.config(small_configs.LSTM, training__steps=40, model__width=12, task__sample_length=5)
    run(config, tmp_path / "x")
    first = RunFolder(tmp_path / "x").manifest()["starts"][0]["compiled"]
    assert sorted(first) == ["eval_step", "init", "sample", "train_step"] and len(compiled) == 4
    assert not first["train_step"]["cached"]
    jax.clear_caches()
    run(config, tmp_path / "y")
    second = RunFolder(tmp_path / "y").manifest()["starts"][0]["compiled"]
    assert all(second[name]["cached"] for name in ("train_step", "eval_step", "sample"))
    assert lines(tmp_path / "x", "train")[-1]["loss"] == lines(tmp_path / "y", "train")[-1]["loss"]


def test_a_cache_that_cannot_be_written_is_reported_and_recorded(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "file" / "cache"))
    run(small_configs.config(small_configs.CNN, training__steps=5), tmp_path / "x")
    assert "no compilation cache" in RunFolder(tmp_path / "x").manifest()["fallbacks"][0]


# The folder


def test_another_config_is_an_error_without_overwrite(tmp_path):
    config = small_configs.config(small_configs.CNN, training__steps=10)
    run(config, tmp_path / "x")
    (tmp_path / "x" / "notes.txt").write_text("mine")
    before = (tmp_path / "x" / "metrics.jsonl").read_bytes()
    other = small_configs.config(config, optimizer__learning_rate=0.5, model__hidden=8)
    with pytest.raises(ConfigError) as caught:
        run(other, tmp_path / "x")
    assert "model.hidden: 16 in the run, 8 now" in str(caught.value) and "optimizer.learning_rate: 0.003 in the run, 0.5 now" in str(caught.value)
    assert (tmp_path / "x" / "metrics.jsonl").read_bytes() == before
    run(small_configs.config(config, data__threads=2), tmp_path / "x")  # how it executes may change
    run(other, tmp_path / "x", overwrite=True)
    assert lines(tmp_path / "x")[0]["loss"] != json.loads(before.splitlines()[0])["loss"]
    assert (tmp_path / "x" / "notes.txt").read_text() == "mine"


def test_changed_data_is_an_error(tmp_path):
    def data(n):
        return {"train": {"image": np.zeros((n, 8, 8, 1), np.float32), "label": np.arange(n) % 10}}

    config = small_configs.config(small_configs.CNN, training__steps=4, data={"source": "arrays", "batch_size": 8}, evaluation={})
    run(config, tmp_path / "x", data=data(40))
    changed = data(40)
    changed["train"]["image"][3, 0, 0] = 1
    for other in (data(41), changed):
        with pytest.raises(ConfigError, match="data of this run has changed"):
            run(config, tmp_path / "x", data=other)


def test_overwrite_deletes_nothing_if_the_new_run_is_an_error(tmp_path):
    config = small_configs.config(small_configs.CNN, training__steps=10)
    run(config, tmp_path / "x")
    with pytest.raises(ConfigError):
        run(small_configs.config(config, init_from=str(tmp_path / "nothing")), tmp_path / "x", overwrite=True)
    with pytest.raises(ConfigError, match="own folder"):
        run(small_configs.config(config, init_from=str(tmp_path / "x")), tmp_path / "x", overwrite=True)
    assert lines(tmp_path / "x")


# Weights from another run


def test_init_from_reads_weights_with_a_message_and_records_the_parent(tmp_path):
    parent = small_configs.config(small_configs.CNN, training__steps=20, training__ema=0.5, checkpoint={"every": 10, "best": "loss"})
    run(parent, tmp_path / "parent")
    output = io.StringIO()
    child = small_configs.config(small_configs.CNN, training__steps=1, optimizer={"name": "sgd", "learning_rate": 1e-30}, evaluation={})
    child["init_from"] = {"run": f"{tmp_path}/parent@20", "skip": ["output/"]}
    trainer_lib.train(build_experiment(child), str(tmp_path / "child"), console=Console(file=output, width=300))
    assert "6 taken, 2 skipped" in output.getvalue() and "skipped     output/kernel" in output.getvalue()
    assert "(EMA)" in output.getvalue()
    (entry,) = RunFolder(tmp_path / "child").manifest()["parents"]
    assert entry["run"] == str(tmp_path / "parent") and entry["step"] == 20 and entry["weights"] == "ema"
    assert entry["skipped"] == ["output/bias", "output/kernel"] and len(entry["taken"]) == 6
    models = [jaxmodels.load(f"{tmp_path}/{name}").model for name in ("parent@20", "child")]
    np.testing.assert_array_equal(models[0].hidden.kernel[...], models[1].hidden.kernel[...])
    assert (models[0].output.kernel[...] != models[1].output.kernel[...]).any()


def test_init_from_with_other_shapes_is_an_error(tmp_path):
    run(small_configs.config(small_configs.CNN, training__steps=10), tmp_path / "parent")

    def error(**changes):
        with pytest.raises(ConfigError) as caught:
            run(small_configs.config(small_configs.CNN, **changes), tmp_path / "child")
        assert not (tmp_path / "child").exists()
        return str(caught.value)

    parent = str(tmp_path / "parent")
    message = error(init_from=parent, model__hidden=8)
    assert "hidden/kernel: shape differs: (32, 8) in this model, (32, 16) in the other run" in message and "init_from.skip" in message
    message = error(init_from=parent, model__features=(4, 8, 8))
    assert "convolutions/2/kernel (3, 3, 8, 8): not in the other run" in message
    assert "has no checkpoint '7'; it has steps" in error(init_from=parent + "@7")
    assert "has no best checkpoint" in error(init_from=parent + "@best")
    assert "'nothing' matches no parameter" in error(init_from={"run": parent, "skip": ["nothing"]})
    assert "is not the folder of a run" in error(init_from=str(tmp_path / "no"))


class Shape:
    def __init__(self, *shape):
        self.shape = shape


def test_every_parameter_is_accounted_for():
    here = {"a": Shape(2), "b": Shape(3), "head": Shape(4)}
    there = {"a": Shape(2), "old/b": Shape(3), "head": Shape(9), "extra": Shape(1)}
    rename = [("^o", "very_o"), ("^very_old/", ""), ("^extra$", "")]
    account, sources = match(here, there, skip=("head",), rename=rename)
    assert account.taken == ("a",) and account.renamed == {"b": "old/b"} and account.skipped == ("head",) and account.dropped == ("extra",)
    assert sources == {"a": "a", "b": "old/b"}
    with pytest.raises(ConfigError, match="extra .*in the other run, not here"):
        match(here, there, skip=("head",), rename=[("^old/", "")])
    with pytest.raises(ConfigError, match="'zzz' matches no parameter"):
        match(here, there, skip=(), rename=[("zzz", "")])
    with pytest.raises(ConfigError, match="two parameters"):
        match({"a": Shape(2)}, {"a": Shape(2), "b": Shape(2)}, skip=(), rename=[("^b$", "a")])


def test_references_to_runs():
    assert parse_run("runs/x") == ("runs/x", None)
    assert parse_run("runs/x@best") == ("runs/x", "best")
    assert parse_run("runs/x@120") == ("runs/x", "120")
    assert parse_run("runs/a@b") == ("runs/a@b", None)


def test_a_checkpoint_being_replaced_when_the_run_was_killed_is_restored(tmp_path):
    run(small_configs.config(small_configs.CNN, training__steps=20), tmp_path / "x")
    folder = tmp_path / "x" / "checkpoints"
    (folder / "20").rename(folder / "replaced-20")
    (folder / "replaced-10").mkdir()
    checkpoints = Checkpoints(folder)
    assert checkpoints.steps() == [10, 20] and not list(folder.glob("replaced-*"))
    checkpoints.close()


# Loading a run back


def test_evaluation_uses_the_runs_config_and_rejects_other_data(tmp_path):
    def config(text):
        (tmp_path / "x.txt").write_text(text * 300)
        return small_configs.config(small_configs.GPT, data__source=f"text:{tmp_path}/x.txt", data__eval_batch_size=16, training__steps=3)

    run(config("abcdefgh\n"), tmp_path / "x")
    config("ijklmnop\n")
    with pytest.raises(ConfigError, match="config.data.tokenizer: .*x.txt: character 'i' .* is not one of the tokenizer's 9"):  # that of the run
        jaxmodels.evaluate(str(tmp_path / "x"), split="validation")
    images, labels = np.zeros((40, 8, 8, 1), np.float32), np.arange(40) % 4
    arrays = small_configs.config(small_configs.CNN, training__steps=3, data={"source": "arrays", "batch_size": 8}, evaluation={})
    run(arrays, tmp_path / "y", data={"train": {"image": images, "label": labels}})
    # Fewer classes, and no train split: the model is still that of the run.
    values = jaxmodels.evaluate(str(tmp_path / "y"), data={"test": {"image": images[:5], "label": labels[:5] % 2}})
    assert 0 <= values["accuracy"] <= 1
    with pytest.raises(ConfigError, match="image_shape"):
        jaxmodels.evaluate(str(tmp_path / "y"), data={"test": {"image": images[:, :4], "label": labels}})
    with pytest.raises(ConfigError, match="num_classes: 4 when the run was trained, 10 now"):
        jaxmodels.evaluate(str(tmp_path / "y"), data={"test": {"image": images, "label": np.arange(40) % 10}})


def test_evaluating_a_damaged_checkpoint_is_an_error(tmp_path):
    run(small_configs.config(small_configs.CNN, training__steps=5), tmp_path / "x")
    (tmp_path / "x" / "checkpoints" / "5" / "state" / "_METADATA").unlink()
    with pytest.raises(jaxmodels.errors.RunError, match="checkpoints/5 cannot be read"):
        jaxmodels.evaluate(str(tmp_path / "x"))
    (tmp_path / "x" / "manifest.json").unlink()
    with pytest.raises(ConfigError, match="manifest.json is missing"):
        jaxmodels.load(str(tmp_path / "x"))


def test_a_loaded_run_predicts_as_it_was_evaluated(tmp_path):
    config = small_configs.config(small_configs.CNN, training__steps=40, training__ema=0.9)
    run(config, tmp_path / "x")
    loaded = jaxmodels.load(str(tmp_path / "x"))
    split = build_experiment(config).dataset.splits["test"].arrays
    probabilities = loaded.predict({"image": split["image"]})
    np.testing.assert_allclose(probabilities.sum(-1), 1, rtol=1e-5)
    values = jaxmodels.evaluate(str(tmp_path / "x"))
    np.testing.assert_allclose((probabilities.argmax(-1) == split["label"]).mean(), values["accuracy"], rtol=1e-6)
    np.testing.assert_allclose(-np.log(probabilities[np.arange(len(split["label"])), split["label"]]).mean(), values["loss"], rtol=1e-4)
    logits = loaded.model(split["image"][:3])
    np.testing.assert_allclose(jax.nn.softmax(logits), probabilities[:3], atol=1e-5)
    assert loaded.step == 40 and loaded.config["model"]["name"] == "cnn"


def test_loading_arrays_trained_from_python_needs_no_data(tmp_path):
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 3, 120)
    images = generator.normal(size=(120, 6, 6, 2)).astype(np.float32) + labels[:, None, None, None]
    part = {"image": images, "label": labels.astype(np.int32)}
    config = small_configs.config(small_configs.CNN, training__steps=100, optimizer__learning_rate=1e-2, data={"source": "arrays", "batch_size": 24})
    result = run(config, tmp_path / "x", data={"train": part, "test": part})
    assert result.metrics["test"]["accuracy"] > 0.9
    assert jaxmodels.load(str(tmp_path / "x")).predict({"image": images[:5]}).shape == (5, 3)
    values = jaxmodels.evaluate(str(tmp_path / "x"), data={"train": part, "test": part})
    np.testing.assert_allclose(values["accuracy"], result.metrics["test"]["accuracy"])


def test_checkpoints_of_a_run_open_read_only(tmp_path):
    run(small_configs.config(small_configs.CNN, training__steps=20), tmp_path / "x")
    before = sorted(p for p in (tmp_path / "x").rglob("*"))
    checkpoints = Checkpoints(tmp_path / "x" / "checkpoints", read_only=True)
    assert checkpoints.find(None) == 20
    checkpoints.close()
    assert sorted(p for p in (tmp_path / "x").rglob("*")) == before


def test_a_run_imports_no_other_framework(tmp_path):
    """Importing PyTorch or scikit-learn would take a second or two at each start."""
    code = (
        "import sys, jaxmodels, small_configs; "
        f"jaxmodels.train(small_configs.config(small_configs.CNN, training__steps=2, log__tensorboard=True), {str(tmp_path / 'x')!r}, quiet=True); "
        "print([name for name in ('torch', 'tensorflow', 'transformers', 'sklearn') if name in sys.modules])"
    )
    done = warm_python.run(["-c", code], capture_output=True, text=True, cwd=HELPERS, timeout=300)
    assert done.stdout.strip() == "[]", done.stderr
    assert list((tmp_path / "x" / "tensorboard").iterdir())
