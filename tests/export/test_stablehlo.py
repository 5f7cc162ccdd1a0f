"""Exported forward passes: their results in a process without this package's models, and errors."""

import json
import os
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import small_configs
from untrained_runs import untrained_run

import jaxmodels
from jaxmodels.errors import ConfigError
from jaxmodels.export import stablehlo
from jaxmodels.export.stablehlo import export_stablehlo, load_stablehlo
from jaxmodels.tokenizers import factory as tokenizers

BATCHES = (1, 3, 8)
# Also scanned layers and rotary positions, which are traced differently from a list of blocks.
GPT = small_configs.config(small_configs.GPT, model__scan=True, model__positions="rotary", model__kv_heads=1)
INFO = {"cnn": {"image_shape": (8, 8, 1), "num_classes": 10}, "lstm": {"vocab_size": 50}, "gpt": {"vocab_size": 50}}
CONFIGS = {"cnn": small_configs.CNN, "lstm": small_configs.LSTM, "gpt": GPT}
ELSEWHERE = """
import json, sys
import jax, numpy as np
from jax import export
from jaxmodels.pretrained import safetensors
from jaxmodels.export.stablehlo import load_stablehlo
for folder in sys.argv[1:]:
    forward, inputs = load_stablehlo(folder), np.load(folder + "/inputs.npz")
    np.savez(folder + "/outputs.npz", **{name: np.asarray(forward(**{name.split("-")[0]: inputs[name]})) for name in inputs})
    if "image" not in forward.description["inputs"]:
        continue
    # And as forward.json describes it, by jax alone.
    description = json.load(open(folder + "/forward.json"))
    parameters = {name: np.array(t.view()) for name, t in safetensors.read_header(__import__("pathlib").Path(folder, description["parameters"])).items()}
    name = next(iter(inputs))
    by_hand = export.deserialize(bytearray(open(folder + "/forward.stablehlo", "rb").read())).call(parameters, {name.split("-")[0]: inputs[name]})
    assert np.array_equal(by_hand, np.load(folder + "/outputs.npz")[name])
assert not any(name.startswith(("jaxmodels.models", "jaxmodels.training", "jaxmodels.tasks", "flax")) for name in sys.modules), sorted(sys.modules)
"""


def inputs_of(name: str, batch: int) -> np.ndarray:
    random = np.random.default_rng(batch)
    if name == "cnn":
        return random.random((batch, 8, 8, 1), np.float32)
    tokens = random.integers(0, 50, (batch, 4 + batch), dtype=np.int32)
    tokens[0, -2:] = -1
    return tokens


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Return runs and exports by name, with the outputs of the exports, computed in a separate process."""
    place = tmp_path_factory.mktemp("stablehlo")
    runs = {name: untrained_run(config, INFO[name], place / name) for name, config in CONFIGS.items()}
    folders = {name: export_stablehlo(run, str(place / f"{name}_exported")) for name, run in runs.items()}
    for name, folder in folders.items():
        key = "image" if name == "cnn" else "tokens"
        np.savez(folder / "inputs.npz", **{f"{key}-{batch}": inputs_of(name, batch) for batch in BATCHES})
    done = subprocess.run([sys.executable, "-c", ELSEWHERE, *map(str, folders.values())], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return runs, folders


@pytest.mark.parametrize("name", CONFIGS)
def test_an_export_computes_what_the_runs_model_does_in_a_process_without_models(exported, name):
    runs, folders = exported
    run = jaxmodels.load(runs[name])
    model, outputs = jax.jit(lambda x: run.model(x)), np.load(folders[name] / "outputs.npz")
    for key, batch in zip(sorted(outputs), BATCHES, strict=True):
        expected = np.asarray(model(inputs_of(name, batch)))
        assert expected.std() > 0.1 and outputs[key].shape == expected.shape
        np.testing.assert_allclose(outputs[key], expected, atol=1e-5, rtol=0)


def test_forward_json_describes_the_inputs_of_the_program(exported):
    _, folders = exported
    cnn, gpt = (json.loads((folders[name] / "forward.json").read_text()) for name in ("cnn", "gpt"))
    assert cnn["inputs"]["image"] == {"shape": ["batch", 8, 8, 1], "dtype": "float32", "means": "values from 0 to 1"}
    assert cnn["output"] == {"shape": ["batch", 10], "dtype": "float32"} and (cnn["limits"], cnn["notes"]) == ({}, [])
    assert gpt["inputs"]["tokens"]["shape"] == ["batch", "length"] and gpt["limits"] == {"length": 16}
    assert gpt["output"]["shape"][:2] == ["batch", "length"] and gpt["platforms"] == ["cpu", "cuda", "rocm", "tpu"]
    assert [entry for entry in cnn["arguments"] if "input" in entry] == [{"input": "image"}]
    assert {entry["parameter"] for entry in cnn["arguments"] if "parameter" in entry} >= {"hidden/kernel", "output/bias"}


def test_inputs_that_do_not_fit_are_refused(exported):
    forward = load_stablehlo(exported[1]["gpt"])
    with pytest.raises(ValueError, match="the inputs are tokens, not image"):
        forward(image=np.zeros((1, 2)))
    with pytest.raises(ValueError, match=r"tokens is float32 \[1, 2\], not int32 \[batch, length\]"):
        forward(tokens=np.zeros((1, 2), np.float32))
    with pytest.raises(ValueError, match="length is 17, more than the model's context of 16"):
        forward(tokens=np.zeros((1, 17), np.int32))


@pytest.mark.slow
def test_models_that_need_a_fixed_length_have_one_and_a_note(tmp_path):
    """The capacity of experts depends on the length of a sequence; dropless experts work with any length.

    Slow: pytest -m slow tests/export/test_stablehlo.py
    """
    one_layer = small_configs.config(small_configs.GPT, model__layers=1)
    for mixture, fixed in (({"experts": 2, "dispatch": "capacity"}, True), ({"experts": 2}, False)):
        run = untrained_run(small_configs.config(one_layer, model__moe=mixture), INFO["gpt"], tmp_path / str(fixed))
        forward = load_stablehlo(export_stablehlo(run, str(tmp_path / f"{fixed}_exported")))
        assert forward.description["inputs"]["tokens"]["shape"] == ["batch", 16 if fixed else "length"]
        assert ["the sequence length is fixed" in note for note in forward.description["notes"]] == [True] * fixed
        tokens = np.random.default_rng(0).integers(0, 50, (3, 16), dtype=np.int32)
        model = jaxmodels.load(run).model
        np.testing.assert_allclose(forward(tokens=tokens), jax.jit(lambda x, model=model: model(x))(tokens), atol=1e-5)


SMALL = {"layers": 1, "heads": 2, "width": 8, "context": 12}
TEXT, IMAGE = {"vocab_size": 50}, {"image_shape": (16, 16, 3), "num_classes": 5}
MORE = {
    "pairs of texts": ({"name": "bert-tiny", **SMALL, "types": 2}, "classify_text", TEXT | {"num_classes": 3}, ["tokens", "types"]),
    "windows": ({"name": "mistral-7b", **SMALL, "kv_heads": 1, "mlp_width": 12, "window": 3}, "language_model", TEXT, ["tokens"]),
    "relative positions": ({"name": "t5-v1.1-small", **SMALL, "head_width": 4, "mlp_width": 12}, "seq2seq", TEXT, ["source", "target"]),
    "recurrent seq2seq": ({"name": "gru_seq2seq", "layers": 1, "width": 8}, "seq2seq", TEXT, ["source", "target"]),
    "recurrent classes": ({"name": "lstm_encoder", "layers": 1, "width": 8}, "classify_text", TEXT | {"num_classes": 3}, ["tokens"]),
    "patches": ({"name": "vit", "layers": 1, "heads": 2, "width": 8, "patch": 4}, "classify", IMAGE, ["image"]),
    "running statistics": ({"name": "resnet18", "stem": "cifar", "width": 4}, "classify", IMAGE, ["image"]),
    "frames": ({"name": "lstm_frames", "layers": 1, "width": 8}, "transcribe", {"frame_width": 4, "num_labels": 6}, ["frames", "valid"]),
    "tables": ({"name": "forecast_linear"}, "forecast", {"lookback": 24, "horizon": 4, "variables": 2}, ["past"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", MORE)
def test_more_kinds_of_models(tmp_path, kind):
    """pytest -m slow tests/export/test_stablehlo.py"""
    model, task, info, names = MORE[kind]
    if task == "seq2seq":
        info = info | {"tokenizer": tokenizers.make_tokenizer("byte+special", ["some text"], None), "target_length": 8}
        info["vocab_size"] = info["tokenizer"].vocab_size
    config = {"model": model, "task": task, "data": {"source": "arrays", "batch_size": 1}, "optimizer": {"name": "sgd", "learning_rate": 0.1}}
    run = untrained_run(config | {"training": {"steps": 1}}, info, tmp_path / "run")
    forward = load_stablehlo(export_stablehlo(run, str(tmp_path / "exported")))
    assert list(forward.description["inputs"]) == names
    fixed = kind == "windows"  # of JAX's attention
    assert ["the sequence length is fixed" in note for note in forward.description["notes"]] == [True] * fixed
    loaded = jaxmodels.load(run)
    for batch in (1, 3):
        random, inputs = np.random.default_rng(batch), {}
        for name, wanted in forward.description["inputs"].items():
            sizes = {"batch": batch, "length": 4 + batch, "source_length": 5, "target_length": 3 + batch}
            shape = [sizes.get(size, size) for size in wanted["shape"]]
            high = 2 if name in ("types", "valid") else 50
            inputs[name] = random.integers(0, high, shape).astype(wanted["dtype"]) if wanted["dtype"] != "float32" else random.random(shape, np.float32)
        positional = [inputs[name] for name in names if name not in ("types", "valid")]
        expected = loaded.model(*positional, **{name: inputs[name] for name in names if name in ("types", "valid")})
        np.testing.assert_allclose(forward(**inputs), expected, atol=1e-4)


def test_bad_folders_are_refused_and_nothing_is_half_written(exported, tmp_path, monkeypatch):
    run, folder = exported[0]["cnn"], exported[1]["cnn"]
    for output in (folder, run):
        with pytest.raises(ConfigError, match="is not an empty folder"):
            export_stablehlo(run, str(output))
    with pytest.raises(ConfigError, match="is not the folder of a run"):
        export_stablehlo(str(tmp_path / "none"), str(tmp_path / "out"))
    with pytest.raises(ConfigError, match="no checkpoint"):
        export_stablehlo(f"{run}@7", str(tmp_path / "out"))
    monkeypatch.setattr(stablehlo.safetensors, "write", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export_stablehlo(run, str(tmp_path / "out"))
    assert os.listdir(tmp_path) == []


def test_a_damaged_export_is_refused(exported, tmp_path):
    def damaged(name, content):
        copy = tmp_path / f"{name}{len(content)}"
        shutil.copytree(exported[1]["cnn"], copy)
        (copy / name).write_bytes(content)
        with pytest.raises(ConfigError) as error:
            load_stablehlo(str(copy))
        return str(error.value)

    assert "cannot be read by jax" in damaged("forward.stablehlo", b"not a program")
    assert "not a complete safetensors file" in damaged("parameters.safetensors", b"short")
    assert "does not match forward.stablehlo" in damaged("parameters.safetensors", (exported[1]["gpt"] / "parameters.safetensors").read_bytes())
    assert "cannot be read as JSON" in damaged("forward.json", b"{")
    with pytest.raises(ConfigError, match="lacks forward.stablehlo"):
        load_stablehlo(str(tmp_path))
