"""The base class of tasks: what is required, row keys, a user's own metric, directions and samples."""

import json

import jax
import numpy as np
import own_tasks
import pytest
import small_configs
import warm_python
from conftest import HELPERS, ROOT
from rich.console import Console

import jaxmodels
from jaxmodels import tasks
from jaxmodels.data.registry import open_dataset
from jaxmodels.errors import ConfigError
from jaxmodels.experiment.build import build_experiment
from jaxmodels.tasks.base import HIGHER_IS_BETTER
from jaxmodels.tasks.classify import Classify
from jaxmodels.training import trainer


def config(**changes):
    return small_configs.config(own_tasks.CONFIG, **changes)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("OldProtocol", "no subclass of jaxmodels.tasks.Task. Write `class OldProtocol(jaxmodels.tasks.Task)` with the methods loss(model, batch, rngs)"),
        ("OldMethods", "lacks the method evaluate(model, batch, key), which replaces metrics(model, batch)"),
        ("SamplesUnshown", "defines samples and lacks the method show(outputs)"),
        ("ScoresUnscored", "has the scores f1 and lacks the method score(outputs)"),
        ("evaluate", "is no subclass of jaxmodels.tasks.Task"),
    ],
)
def test_a_task_that_lacks_something_is_one_error(name, message):
    with pytest.raises(ConfigError) as caught:
        build_experiment(config(task__name=f"own_tasks:{name}"))
    assert message in str(caught.value) and f"'own_tasks:{name}'" in str(caught.value)


@pytest.mark.parametrize("name", tasks.TASKS)
def test_metrics_that_are_shown_have_a_direction(name):
    task = tasks.find(name)
    assert {*task.shown, *task.scores} <= {*HIGHER_IS_BETTER, *task.higher_is_better}


def test_no_number_beats_none_but_nan_beats_nothing():
    task = Classify({"image_shape": (8, 8, 1), "num_classes": 2})
    assert not task.is_better("loss", float("nan"), None) and not task.is_better("loss", float("nan"), 1.0)
    assert task.is_better("loss", 0.5, 1.0) and task.is_better("accuracy", 0.5, None) and not task.is_better("accuracy", 0.5, 0.6)


# Evaluation by row


def by_hand(size):
    """Return the draws of each row's key: from the seed, then the stream of evaluation, then the row's index."""
    base = jax.random.fold_in(jax.random.key(own_tasks.CONFIG["seed"]), 3)
    return np.array([int(jax.random.randint(jax.random.fold_in(base, i), (), 0, 1000)) for i in range(size)])


@pytest.fixture(scope="module")
def drawn():
    return by_hand(len(open_dataset("digits", {}, None).splits["validation"]))


@pytest.mark.parametrize("batch_size", [7, 32])
def test_draws_depend_on_the_row_alone(batch_size, drawn):
    values = own_tasks.evaluate(batch_size)
    assert values["draws"] == pytest.approx(drawn.mean(), rel=1e-6)
    assert values["key_sum"] == drawn @ np.arange(1, len(drawn) + 1)


def test_draws_are_the_same_over_eight_devices(drawn):
    done = warm_python.run([HELPERS / "own_tasks.py", "8", "32"], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    values = json.loads(done.stdout)
    assert values["devices"] == 8
    assert values["draws"] == pytest.approx(drawn.mean(), rel=1e-6)
    assert values["key_sum"] == drawn @ np.arange(1, len(drawn) + 1)
    alone = own_tasks.evaluate(32)
    assert values["within_two"] == alone["within_two"]


def test_the_name_of_the_index_is_reserved():
    data = {"train": {"image": np.zeros((40, 8, 8, 1), np.float32), "label": np.zeros(40, int), "index": np.arange(40)}}
    with pytest.raises(ConfigError, match="the array 'index' of train needs another name"):
        build_experiment(config(data={"source": "arrays", "batch_size": 8}, task__name="classify"), data=data)


# A user's metric


def test_a_metric_of_unknown_direction_is_refused_as_best():
    with pytest.raises(ConfigError, match=r"checkpoint.best='draws': .*set higher_is_better = {'draws': True} \(or False\) in the class ClassifyNoisy"):
        build_experiment(config(checkpoint__best="draws"))


def test_a_users_metric_picks_the_best_checkpoint_and_is_printed(tmp_path, capsys):
    c = config(training__steps=40, evaluation={"every": 5}, checkpoint={"every": 100, "keep": 1, "best": "within_two"}, optimizer__learning_rate=0.5)
    result = trainer.train(build_experiment(c), str(tmp_path / "x"), console=Console(width=200))
    lines = [json.loads(line) for line in (tmp_path / "x" / "metrics.jsonl").read_text().splitlines()]
    values = {line["step"]: line["within_two"] for line in lines if line["split"] == "validation"}
    best = next(step for step, value in values.items() if value == max(values.values()))
    assert len(set(values.values())) > 2 and result.evaluated_step == best
    assert jaxmodels.evaluate(f"{tmp_path}/x@best", split="validation")["within_two"] == pytest.approx(values[best])
    printed = [line for line in capsys.readouterr().out.splitlines() if " validation " in line]
    assert len(printed) == len(values) and all("within_two" in line and "accuracy" not in line for line in printed)
    # Samples: the text of `show` is in the run's samples, once an evaluation.
    assert (tmp_path / "x" / "samples.txt").read_text().count("0 1 2\n") == len(values)
    # Sampled predictions depend on the seed and the row's index.
    run = jaxmodels.load(str(tmp_path / "x"))
    image = np.zeros((3, 8, 8, 1), np.float32)
    expected = [int(jax.random.bits(jax.random.fold_in(jax.random.key(4), i))) for i in range(3)]
    assert run.predict({"image": image}, seed=4).tolist() == expected
