"""Loading, overriding, checking and comparing configs."""

import json
from typing import Literal

import pytest
import small_configs

from jaxmodels import config as config_lib
from jaxmodels.errors import ConfigError
from jaxmodels.experiment.build import build_experiment
from jaxmodels.experiment.sections import resolve
from jaxmodels.models import remat

FILE = """
from ml_collections import ConfigDict

def get_config(size=None):
    c = ConfigDict()
    c.model = {"name": "cnn", "hidden": 128 if size == "large" else 32}
    c.task = "classify"
    c.data = {"source": "digits", "batch_size": 16}
    c.optimizer = {"name": "adam", "learning_rate": 1e-3}
    c.training = {"steps": 5}
    return c
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "x.py"
    path.write_text(FILE)
    return str(path)


def test_argument_and_overrides_change_values_and_their_origins_are_listed(file):
    overrides = {"optimizer.learning_rate": 3e-4, "optimizer.schedule": "cosine", "optimizer.schedule.warmup": 2}
    config = config_lib.load_config(file + ":large", overrides)
    resolved = resolve(config)
    assert resolved["model"]["hidden"] == 128
    assert resolved["optimizer"]["learning_rate"] == 3e-4
    assert resolved["optimizer"]["schedule"] == {"name": "cosine", "warmup": 2, "decay": None, "final": 0.0}
    origins = config_lib.origins(file + ":large", overrides, resolved)
    assert origins["model.hidden"] == "argument"
    assert origins["model.name"] == "file"
    assert origins["model.dropout"] == "default"
    assert origins["optimizer.learning_rate"] == origins["optimizer.schedule.warmup"] == "override"


def test_a_resolved_config_survives_json(file):
    resolved = resolve(config_lib.load_config(file))
    assert resolve(json.loads(json.dumps(resolved))) == resolved


def test_the_loaded_config_is_locked_and_plain_dicts_are_accepted(file):
    config = config_lib.load_config(file)
    config.training.steps = 7
    with pytest.raises((KeyError, AttributeError)):
        config.trainnig = {}
    assert resolve(config)["training"]["steps"] == 7
    assert resolve(small_configs.CNN)["training"]["steps"] == 60


@pytest.mark.parametrize(
    ("text", "value"),
    [("3e-4", 3e-4), ("true", True), ("None", None), ("(1, 2)", (1, 2)), ("runs/x@best", "runs/x@best"), ("tfds:mnist", "tfds:mnist"), ("0x10", 16)],
)
def test_values_on_the_command_line(text, value):
    assert config_lib.parse_override(text) == value


def test_none_on_the_command_line_is_also_a_name():
    assert config_lib.check_value("model.remat", config_lib.parse_override("none"), remat.Remat | tuple[str, ...]) == "none"
    assert config_lib.check_value("model.x", None, remat.Remat | None) is None
    assert config_lib.check_value("model.x", "none", remat.Remat | None) == "none"
    with pytest.raises(ConfigError, match="must be one of 'a', 'b', got None"):
        config_lib.check_value("model.x", None, Literal["a", "b"])


BAD = {
    "a section's name": ({"trainnig.steps": 3}, "Did you mean 'training'"),
    "a key": ({"model.hiden": 3}, "Did you mean 'hidden'"),
    "a type": ({"data.batch_size": "many"}, "data.batch_size must be a whole number, got 'many'"),
    "a float for an int": ({"training.steps": 2.5}, "training.steps must be a whole number"),
    "a bool for an int": ({"training.steps": True}, "training.steps must be"),
    "an item": ({"model.features": (1, "a")}, "model.features must be a list of whole numbers"),
    "a model": ({"model.name": "cnm"}, "Did you mean 'cnn'?"),
    "a task": ({"task.name": "classfy"}, "Did you mean 'classify'?"),
    "a data source": ({"data.source": "digit"}, "There are: array_record, arrays, "),
    "an optimizer": ({"optimizer.name": "adamx"}, "There are: acprop, adabelief"),
    "an optimizer's argument": ({"optimizer.epsilon": 0.1}, "Did you mean 'eps'?"),
    "an optimizer's argument's type": ({"optimizer.b1": "x"}, "optimizer.b1 must be a number"),
    "a schedule": ({"optimizer.schedule.name": "cosin"}, "Did you mean 'cosine'?"),
    "a precision": ({"training.precision": "float16"}, "one of 'float32', 'bfloat16'"),
    "a section where a value is": ({"seed.x": 3}, "seed"),
    "both lengths": ({"training.epochs": 3}, "either steps or epochs"),
    "a metric": ({"checkpoint.best": "los"}, "has no metric 'los'; it has accuracy, loss"),
    "patience without a metric": ({"evaluation.patience": 3}, "needs checkpoint.best"),
    "zero": ({"data.batch_size": 0}, "must be above 0"),
    "accumulation that does not divide": ({"training.accumulate": 5}, "does not divide by training.accumulate=5"),
    "more than there is": ({"data.batch_size": 4000}, "larger than the 1259 training examples"),
    "a model for another task": ({"model": {"name": "lstm"}}, "Models that fit it: cnn"),
    "too many poolings": ({"model.features": (1, 2, 3, 4)}, "poolings reduce an image"),
    "warm-up longer than the run": ({"optimizer.schedule.warmup": 60}, "must be at least 0 and below the run's 60 steps, got 60"),
    "a pattern that matches nothing": ({"optimizer.no_decay": ("embed",)}, "'embed' matches no trained parameter"),
    "ema": ({"training.ema": 1.5}, "between 0 and 1"),
    "partition": ({"partition": "pmapp"}, "partition must be one of"),
    "a seed": ({"seed": 2**40}, "seed must be at least 0"),
    "an endless run": ({"training.steps": 10**19}, "less than 2**31"),
    "threads": ({"data.threads": -1}, "data.threads must not be negative"),
    "a section that is a value": ({"log": False}, "config.log must be a section"),
    "dropout": ({"model.dropout": 1.0}, "dropout must be at least 0 and below 1"),
    "a size of nothing": ({"model.hidden": 0}, "hidden must be at least 1"),
    "a weight decay": ({"optimizer.weight_decay": -0.1}, "weight_decay must not be negative"),
    "a schedule's end that it does not use": ({"optimizer.schedule.final": 0.1}, "has no meaning for 'constant'"),
    "an argument that Optax refuses": ({"optimizer.mu_dtype": 5}, "optimizer"),
    "no pattern": ({"optimizer.no_decay": ("(",)}, "not a regular expression"),
    "no pattern in skip": ({"init_from": {"run": "x", "skip": ("(",)}}, "not a regular expression"),
    "no pair": ({"init_from": {"run": "x", "rename": (("a",),)}}, "holds pairs"),
    "a module": ({"data.source": "os:path"}, "neither a function nor a class"),
    "a split seed": ({"data.split_seed": -1}, "split_seed must not be negative"),
    "a negative learning rate": ({"optimizer.learning_rate": -1}, "must be above 0"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_wrong_config_is_one_clear_error(what):
    changes, message = BAD[what]
    config = small_configs.config(small_configs.CNN)
    with pytest.raises(ConfigError) as caught:
        for key, value in changes.items():
            config_lib.set_at(config, key, value)
        build_experiment(config)
    assert message in str(caught.value)
    assert next(iter(changes)).split(".")[0] in str(caught.value)


def test_errors_of_text_sources(tmp_path):
    def error(**changes):
        with pytest.raises(ConfigError) as caught:
            build_experiment(small_configs.config(small_configs.GPT, **changes), data_dir=str(tmp_path))
        return str(caught.value)

    assert f"there is no file no.txt nor {tmp_path}/no.txt" in error(data__source="text:no.txt")
    assert "text:PATH" in error(data__source="text")
    (tmp_path / "empty.txt").write_text("")
    assert "is empty" in error(data__source="text:empty.txt")
    (tmp_path / "short.txt").write_text("abc")
    assert "less than one window" in error(data__source="text:short.txt")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 " * 100)
    assert "byte 3" in error(data__source="text:latin.txt")
    assert "context of 8" in error(model__context=8)
    message = error(data={"source": "tfds:mnist", "batch_size": 8}, task="classify", model={"name": "cnn"})
    assert "tfds build mnist --file_format=array_record" in message and str(tmp_path) in message


ARRAYS = {"image": [[[[0.0]]]] * 8, "label": [0, 1] * 4}
BAD_ARRAYS = {
    "not by split": (ARRAYS, "by split"),
    "no examples": ({"train": {"image": [], "label": []}}, "above 0"),
    "words": ({"train": ARRAYS | {"label": ["a"] * 8}}, "'label' must be an array of numbers"),
    "labels below 0": ({"train": ARRAYS | {"label": [-1, 1] * 4}}, "whole numbers from 0 on"),
    "fractions as labels": ({"train": ARRAYS | {"label": [0.5, 1] * 4}}, "labels that are whole numbers"),
    "another split": ({"train": ARRAYS, "val": ARRAYS}, "has 'val'"),
    "no labels in one": ({"train": ARRAYS, "test": {"image": ARRAYS["image"]}}, "needs 'label' in every example; test has no such array"),
    "another shape in one": ({"train": ARRAYS, "test": ARRAYS | {"image": [[[[0.0, 1.0]]]] * 8}}, "'image' of test"),
    "grey images": ({"train": ARRAYS | {"image": [[[0.0]]] * 8}}, "height, width, channels"),
    "one number": ({"train": ARRAYS | {"label": 3}}, "'label' must be an array"),
}


@pytest.mark.parametrize("what", BAD_ARRAYS)
def test_wrong_arrays_are_one_clear_error(what):
    data, message = BAD_ARRAYS[what]
    config = small_configs.config(small_configs.CNN, data={"source": "arrays", "batch_size": 4}, model={"name": "cnn", "features": []})
    with pytest.raises(ConfigError) as caught:
        build_experiment(config, data=data)
    assert message in str(caught.value)


BAD_FILES = {
    "a syntax error": ("def get_config(:", "line 1: SyntaxError"),
    "an error inside": ("def get_config():\n    return 1 / 0", "line 2: ZeroDivisionError"),
    "a missing import": ("import no_such_module", "line 1: ModuleNotFoundError"),
    "no function": ("get_config = 3", "defines no function get_config()"),
    "nothing returned": ("def get_config():\n    pass", "must return a ConfigDict"),
    "an argument needed": ("def get_config(x):\n    return {}", "needs an argument"),
}


@pytest.mark.parametrize("what", BAD_FILES)
def test_a_wrong_config_file_is_one_clear_error(what, tmp_path):
    text, message = BAD_FILES[what]
    (tmp_path / "x.py").write_text(text)
    with pytest.raises(ConfigError) as caught:
        config_lib.load_config(str(tmp_path / "x.py"))
    assert message in str(caught.value) and "x.py" in str(caught.value)
    for content in ("[]", "{"):
        (tmp_path / "x.json").write_text(content)
        with pytest.raises(ConfigError, match="x.json"):
            config_lib.load_config(str(tmp_path / "x.json"))


def test_a_section_given_by_its_name_alone_has_defaults(file):
    overrides = {"optimizer.schedule": "linear"}
    origins = config_lib.origins(file, overrides, resolve(config_lib.load_config(file, overrides)))
    assert origins["task.name"] == "file" and origins["task.label_smoothing"] == "default"
    assert origins["optimizer.schedule.name"] == "override" and origins["optimizer.schedule.warmup"] == "default"


def test_a_config_of_another_type_is_an_error():
    for wrong in ("configs/cnn_digits.py", None, 3):
        with pytest.raises(ConfigError, match="load_config"):
            resolve(wrong)


def test_differences_name_keys_of_either_side():
    one, other = {"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}, "d": 4}
    assert config_lib.differences(one, other) == {"a.c": (2, 3), "d": ("(absent)", 4)}


def test_own_models_and_sources_are_named_by_module():
    resolved = resolve(small_configs.config(small_configs.CNN, model={"name": "jaxmodels.models.cnn:CNN", "hidden": 8}))
    assert resolved["model"]["hidden"] == 8
    with pytest.raises(ConfigError, match="cannot import"):
        resolve(small_configs.config(small_configs.CNN, model={"name": "no_such_package.module:Model"}))
