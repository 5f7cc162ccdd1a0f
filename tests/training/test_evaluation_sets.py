"""Runs that validate and test on several sets: their metrics, the best checkpoint, resuming, changes, and evaluation on other data."""

import io
import json

import numpy as np
import pytest
import small_configs
from PIL import Image
from rich.console import Console

import jaxmodels
from jaxmodels.cli import main as cli
from jaxmodels.data.source import Arrays, Dataset
from jaxmodels.errors import ConfigError, Interrupted
from jaxmodels.experiment.build import build_experiment
from jaxmodels.inference.evaluate import evaluate_splits
from jaxmodels.runs.folder import RunFolder
from jaxmodels.training import summary, trainer

IMAGES = small_configs.config(small_configs.CNN, training__steps=8, evaluation__every=4, checkpoint__every=4, log__every=4, log__trackers=("jsonl",))
TEXTS = small_configs.config(
    IMAGES,
    model={"name": "lstm_encoder", "layers": 1, "width": 8},
    task={"name": "classify_text"},
    data={"source": "tsv:train.tsv", "batch_size": 4, "sequence_length": 6, "tokenizer": "word:50", "holdout": 0.25},
)
NO_TIME = ("seconds", "steps_per_second", "examples_per_second", "data_wait")


def digits(split_seed: int = 0):
    """Return the digits as arrays by split."""
    from jaxmodels.data.sources.digits import digits

    return {name: dict(part.arrays) for name, part in digits(split_seed=split_seed).splits.items()}


def noisy(part, size):
    """Return some of a split's images with noise."""
    noise = np.random.default_rng(0).normal(size=(size, 8, 8, 1)).astype(np.float32)
    return {"image": part["image"][:size] + noise, "label": part["label"][:size]}


def lines(folder, *splits):
    found = [line for line in RunFolder(folder).metrics() if not splits or line["split"] in splits]
    return [{key: value for key, value in line.items() if key not in NO_TIME} for line in found]


def run(config, folder, **options):
    return jaxmodels.train(config, str(folder), quiet=True, **options)


def texts(folder):
    """Write a table to train on and two to validate on; return the config."""
    draw = np.random.default_rng(0)

    def rows(count, words):
        chosen = [draw.choice(words, 3) for _ in range(count)]
        return "".join(f"{' '.join(row)}\t{int('good' in row)}\n" for row in chosen)

    (folder / "train.tsv").write_text(rows(40, ["good", "bad", "film", "so"]))
    (folder / "near.tsv").write_text(rows(11, ["good", "film", "so"]))
    (folder / "far.tsv").write_text(rows(7, ["good", "bad", "play", "plot"]))
    sets = {"validation_sets": {"near": "near.tsv", "far": "far.tsv"}, "test_sets": {"far": "far.tsv", "near": "near.tsv"}}
    return small_configs.config(TEXTS, data={**TEXTS["data"], "source": f"tsv:{folder}/train.tsv", **sets})


def test_each_set_has_lines_of_its_own_which_a_run_with_that_set_alone_has_too(tmp_path):
    config = texts(tmp_path)
    out = io.StringIO()
    experiment = build_experiment(config, data_dir=str(tmp_path))
    console = Console(file=out, width=200)
    result = trainer.train(experiment, str(tmp_path / "x"), console=console)
    summary.print_summary(result, experiment, console)
    assert [(line["step"], line["split"]) for line in lines(tmp_path / "x") if line["split"] != "train"] == [
        *((step, split) for step in (4, 8) for split in ("validation", "validation/near", "validation/far")),
        (8, "test/far"),
        (8, "test/near"),
    ]
    assert set(result.metrics) == {"train", "validation", "validation/near", "validation/far", "test/far", "test/near"}
    assert result.metrics["test/near"]["loss"] == result.metrics["validation/near"]["loss"] != result.metrics["validation/far"]["loss"]
    for shown in ("step 4/8  validation/near", "step 8/8  test/far", "--split=test/far"):
        assert shown in out.getvalue()
    # The same weights, and the set is the main one.
    for name in ("near", "far"):
        alone = small_configs.config(config, data={**TEXTS["data"], "source": config["data"]["source"], "validation": f"{tmp_path}/{name}.tsv", "holdout": 0.0})
        several = small_configs.config(config, data__holdout=0.0)
        run(alone, tmp_path / name)
        if name == "near":
            run(several, tmp_path / "several", data_dir=str(tmp_path))
        found = [{**line, "split": "validation"} for line in lines(tmp_path / "several", f"validation/{name}")]
        assert found == lines(tmp_path / name, "validation") and len(found) == 2
    assert "validation" not in RunFolder(tmp_path / "several").manifest()["data"]


@pytest.mark.parametrize("kind", ["text", "images"])
def test_a_set_of_texts_or_images_is_evaluated_as_the_only_one_of_a_run(tmp_path, kind):
    if kind == "text":
        for name, text in {"train": "some words and more words\n" * 40, "far": "other words\n" * 9}.items():
            (tmp_path / f"{name}.txt").write_text(text)
        source, far = f"text:{tmp_path}/train.txt", f"{tmp_path}/far.txt"
        base = small_configs.config(small_configs.LSTM, data={"source": source, "sequence_length": 16, "batch_size": 4, "tokenizer": "byte", "holdout": 0.0})
    else:
        draw = np.random.default_rng(0)
        for place in ("train/a", "train/b", "far/a", "far/b"):
            (tmp_path / place).mkdir(parents=True)
            for i in range(5):
                Image.fromarray(draw.integers(0, 256, (8, 8, 3), np.uint8)).save(tmp_path / place / f"{i}.png")
        base = small_configs.config(IMAGES, data={"source": f"images:{tmp_path}", "size": (8, 8), "batch_size": 4, "holdout": 0.0})
        far = "far"
    base = small_configs.config(base, training={"steps": 2}, evaluation={"every": 1}, log={"every": 2, "trackers": ("jsonl",)})
    run(small_configs.config(base, data__validation=far), tmp_path / "alone")
    run(small_configs.config(base, data__validation_sets={"far": far}), tmp_path / "named")
    found = [{**line, "split": "validation"} for line in lines(tmp_path / "named", "validation/far")]
    assert found == lines(tmp_path / "alone", "validation") and [line["step"] for line in found] == [1, 2]


def test_a_run_that_is_stopped_between_two_sets_goes_on_as_one_that_was_not(tmp_path):
    parts = digits()
    data = parts | {"validation/far": noisy(parts["validation"], 50), "test/far": noisy(parts["test"], 40), "test/near": noisy(parts["test"], 9)}
    config = small_configs.config(IMAGES, data={"source": "arrays", "batch_size": 32}, checkpoint__best="far/loss", checkpoint__every=100)
    whole = run(config, tmp_path / "whole", data=data)
    assert [line["step"] for line in lines(tmp_path / "whole", "validation/far")] == [4, 8]

    class Stop(jaxmodels.Callback):
        def __init__(self, split, step):
            self.at = split, step

        def on_evaluate(self, run, step, split, values):
            if (split, step) == self.at:
                raise Interrupted("SIGTERM")

    for number, at in enumerate([("validation/far", 4), ("test/near", 8), ("test/far", 8)]):
        folder = tmp_path / f"stopped{number}"
        stop = Stop(*at)
        with pytest.raises(Interrupted):
            run(config, folder, data=data, callbacks=[stop])
        result = run(config, folder, data=data)
        assert lines(folder) == lines(tmp_path / "whole")
        assert {split: values["loss"] for split, values in result.metrics.items()} == {split: values["loss"] for split, values in whole.metrics.items()}


def test_the_best_checkpoint_and_patience_follow_the_set_that_is_named(tmp_path):
    parts = digits()
    values = {"validation": [0.5, 0.6, 0.7, 0.8, 0.9, 0.8], "validation/far": [0.5, 0.9, 0.4, 0.3, 0.9, 0.9]}

    class Pretend(jaxmodels.Callback):
        def on_evaluate(self, run, step, split, metrics):
            if split in values:
                metrics["accuracy"] = values[split][step // 2 - 1]

    data = {"train": parts["train"], "validation": parts["validation"], "validation/far": parts["test"]}
    config = small_configs.config(
        IMAGES, data={"source": "arrays", "batch_size": 32}, evaluation={"every": 2, "patience": 2}, checkpoint__every=2, training__steps=12
    )
    for best, end, best_step in (("far/accuracy", 8, 4), ("accuracy", 12, 10)):
        config["checkpoint"]["best"] = best
        folder = tmp_path / best.replace("/", "_")
        result = run(config, folder, data=data, callbacks=[Pretend()])
        assert (result.step, result.evaluated_step) == (end, best_step)


def test_a_wrong_name_of_the_best_metric_is_an_error_before_any_device(tmp_path):
    config = texts(tmp_path)
    for best, message in {
        "fra/accuracy": "has no metric 'fra/accuracy'; it has accuracy, loss, macro_f1, near/accuracy, .*, far/macro_f1. Did you mean 'far/accuracy'",
        "far/f1": "has no metric 'far/f1'",
        "validation/loss": "has no metric 'validation/loss'",
    }.items():
        with pytest.raises(ConfigError, match=message):
            build_experiment(small_configs.config(config, checkpoint__best=best), data_dir=str(tmp_path))
    config["data"]["holdout"] = 0.0
    with pytest.raises(ConfigError, match="no main validation split for 'accuracy'; it has near/accuracy, .*, far/macro_f1"):
        build_experiment(small_configs.config(config, checkpoint__best="accuracy"), data_dir=str(tmp_path))


def test_sets_come_and_go_in_a_run_that_goes_on(tmp_path):
    config = texts(tmp_path)
    options = {"data_dir": str(tmp_path)}
    config["data"] |= {"validation_sets": None, "test_sets": None}
    run(small_configs.config(config, training__steps=4), tmp_path / "x", **options)
    config["data"]["validation_sets"] = {"near": "near.tsv"}
    run(config, tmp_path / "x", **options)
    assert [line["step"] for line in lines(tmp_path / "x", "validation")] == [4, 8]
    assert [line["step"] for line in lines(tmp_path / "x", "validation/near")] == [8]
    assert "validation/near" in RunFolder(tmp_path / "x").manifest()["data"]
    # A finished run is tested on a set that is added, and on no other again.
    config["data"]["test_sets"] = {"far": "far.tsv"}
    assert set(run(config, tmp_path / "x", **options).metrics) >= {"test/far", "validation/near"}
    config["data"]["test_sets"] |= {"near": "near.tsv"}
    run(config, tmp_path / "x", **options)
    assert [line["split"] for line in lines(tmp_path / "x")][-2:] == ["test/far", "test/near"]
    config["data"]["validation_sets"] = None
    run(small_configs.config(config, training__steps=12), tmp_path / "x", **options)
    assert [line["step"] for line in lines(tmp_path / "x", "validation/near")] == [8]
    assert [line["step"] for line in lines(tmp_path / "x", "test/far", "test/near")] == [12, 12]
    # Trained as if there had never been any other set.
    config["data"] |= {"test_sets": None}
    run(small_configs.config(config, training__steps=12, optimizer=config["optimizer"]), tmp_path / "y", **options)
    assert lines(tmp_path / "y", "train", "validation") == lines(tmp_path / "x", "train", "validation")
    # One name stands for the same examples, also after it was gone.
    (tmp_path / "near.tsv").write_text("good film\t1\n")
    config["data"]["validation_sets"] = {"near": "near.tsv"}
    with pytest.raises(ConfigError, match="the data of this run has changed"):
        run(small_configs.config(config, training__steps=16), tmp_path / "x", **options)


def test_the_command_evaluates_one_set_or_all_that_test(tmp_path, capsys):
    config = texts(tmp_path)
    result = run(config, tmp_path / "x", data_dir=str(tmp_path))
    arguments = ["evaluate", f"--workdir={tmp_path / 'x'}", f"--data_dir={tmp_path}", "--json"]
    assert cli.run(arguments) == 0
    found = json.loads(capsys.readouterr().out)
    assert {split: values["loss"] for split, values in found.items()} == {split: result.metrics[split]["loss"] for split in ("test/far", "test/near")}
    assert cli.run([*arguments, "--split=validation/near"]) == 0
    assert json.loads(capsys.readouterr().out)["loss"] == result.metrics["validation/near"]["loss"]
    assert cli.run([*arguments, "--split=near"]) == 2
    assert "--split=near: the data of" in capsys.readouterr().err
    # Other data, with the vocabulary and the classes of the run; the training data is not needed.
    (tmp_path / "train.tsv").unlink()
    (tmp_path / "one.tsv").write_text("good film\t1\nfilm good so\t1\n")
    assert cli.run([*arguments, f"--config.data.source=tsv:{tmp_path}/near.tsv", "--split=train"]) == 0
    np.testing.assert_allclose(json.loads(capsys.readouterr().out)["loss"], result.metrics["test/near"]["loss"], rtol=1e-6)
    assert cli.run([*arguments, "--config.data.source=tsv:one.tsv", "--split=train"]) == 0  # one class only
    for key, message in {"data.tokenizer=byte": "its own tokenizer", "seed=3": "only keys of config.data", "data.tekst_column=1": "text_column"}.items():
        assert cli.run([*arguments, f"--config.{key}"]) == 2
        assert message in capsys.readouterr().err


def other_images(*, bright: float = 0.0):
    """Return the digits, brighter."""
    parts = {name: Arrays({"image": part["image"] + np.float32(bright), "label": part["label"]}) for name, part in digits().items()}
    return Dataset(parts, {"image_shape": (8, 8, 1), "num_classes": 10})


def test_an_own_source_is_evaluated_with_other_keys(tmp_path):
    section = {"source": f"{__name__}:other_images", "batch_size": 32, "validation_sets": {"bright": {"bright": 0.5}}}
    result = run(small_configs.config(IMAGES, data=section), tmp_path / "x")
    found = evaluate_splits(str(tmp_path / "x"), ["validation", "bright"])
    assert {split: values["loss"] for split, values in found.items()} == {
        split: pytest.approx(result.metrics[split]["loss"], rel=1e-6) for split in ("validation", "validation/bright")
    }
    again = jaxmodels.evaluate(str(tmp_path / "x"), split="validation", other_data={"bright": 0.5})
    assert again["loss"] == pytest.approx(result.metrics["validation/bright"]["loss"], rel=1e-6) != result.metrics["validation"]["loss"]
