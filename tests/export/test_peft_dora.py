"""DoRA and fully trained modules in PEFT's format, against PEFT on the same models. More cases: pytest -m slow tests/export/test_peft_dora.py"""

import json
import shutil

import jax
import numpy as np
import peft
import pytest
import random_pretrained
import torch
from peft_cases import TOKENS, begin, config_of, drawn, model_of, run, set_keys, there, write
from safetensors.numpy import load_file, save_file

import jaxmodels
from jaxmodels.errors import ConfigError
from jaxmodels.export.peft import export_adapters
from jaxmodels.models.functional import flatten, split
from jaxmodels.pretrained.peft_folder import read
from jaxmodels.pretrained.weights import load_model
from jaxmodels.runs.merge import merge


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """name -> folder of a pretrained model, written once."""
    made = {}

    def get(name, **changes):
        key = f"{name}{changes}"
        if key not in made:
            made[key] = tmp_path_factory.mktemp(name)
            random_pretrained.make(name).save_pretrained(made[key])
        return made[key]

    return get


def files_are_equal(one, other):
    """Check that two folders of adapters have the same tensors, bit for bit."""
    before, after = (load_file(path / "adapter_model.safetensors") for path in (one, other))
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert value.tobytes() == after[key].tobytes() and value.shape == after[key].shape, key


@pytest.mark.parametrize(
    ("name", "scan", "targets"),
    [
        ("llama", True, ["q_proj", "down_proj", "embed_tokens"]),
        ("gpt2", False, ["c_attn", "c_fc"]),
        pytest.param("bert_classes", False, ["query", "intermediate.dense"], marks=pytest.mark.slow),
    ],
)
def test_dora_is_imported_merged_and_exported_unchanged(base, tmp_path, name, scan, targets):
    folder = tmp_path / "adapters"
    expected = write(name, base(name), folder, use_dora=True, target_modules=targets)
    config = config_of(name, {"run": f"hf:{base(name)}", "adapters": str(folder)}, **({"model": {"scan": True}} if scan else {}))
    loaded = jaxmodels.load(begin(config, tmp_path / "run"))
    assert loaded.config["lora"]["dora"] is True
    np.testing.assert_allclose(run(loaded.model), expected, atol=1e-5)
    out = export_adapters(str(tmp_path / "run"), str(tmp_path / "out"))
    files_are_equal(folder, out)
    assert json.loads((out / "adapter_config.json").read_text())["use_dora"] is True
    np.testing.assert_allclose(there(name, base(name), out), expected, atol=1e-6)
    merge(str(tmp_path / "run"), str(tmp_path / "merged"))
    np.testing.assert_allclose(run(jaxmodels.load(str(tmp_path / "merged")).model), expected, atol=1e-5)
    if name != "bert_classes":  # its task needs a tokenizer
        np.testing.assert_allclose(run(load_model(f"hf:{folder}")), expected, atol=1e-5)


def test_dora_begins_at_the_lengths_of_the_columns_of_the_base(base, tmp_path):
    lora = {"rank": 2, "targets": ("attention/query", "mlp/up"), "dora": True}
    opened = jaxmodels.load(begin(config_of("gpt2", f"hf:{base('gpt2')}", lora=lora), tmp_path / "run"))
    params = flatten(split(opened.model)[1])
    magnitudes = [path for path in params if path.endswith("lora_m")]
    assert len(magnitudes) == 4
    for path in magnitudes:
        np.testing.assert_allclose(params[path], np.linalg.norm(params[path.replace("lora_m", "kernel")], axis=0), rtol=1e-6)
    np.testing.assert_allclose(run(opened.model), run(load_model(f"hf:{base('gpt2')}")), atol=1e-5)
    with pytest.raises(ConfigError, match="has DoRA for some of its parts only, none for blocks/0/attention/key"):
        export_adapters(str(tmp_path / "run"), str(tmp_path / "none"))


@pytest.mark.slow
def test_separate_adapters_of_queries_keys_and_values_with_dora(base, tmp_path):
    lora = {"rank": 2, "alpha": 3.0, "targets": ("attention/(query|key|value)", "mlp/up"), "dora": True}
    path = drawn(begin(config_of("gpt2", f"hf:{base('gpt2')}", lora=lora), tmp_path / "run"))
    expected = run(jaxmodels.load(path).model)
    out = export_adapters(path, str(tmp_path / "out"))
    np.testing.assert_allclose(there("gpt2", base("gpt2"), out), expected, atol=1e-5)
    again = begin(config_of("gpt2", {"run": f"hf:{base('gpt2')}", "adapters": str(out)}), tmp_path / "again")
    before, after = (flatten(split(jaxmodels.load(one).model)[1]) for one in (path, again))
    assert before.keys() == after.keys()
    for name, x in before.items():
        np.testing.assert_array_equal(x, after[name], err_msg=name)


def test_gradients_of_dora_are_those_of_peft(base, tmp_path):
    """The lengths of the columns are constants there; also that of an embedding."""
    folder = tmp_path / "adapters"
    write("llama", base("llama"), folder, use_dora=True, target_modules=["q_proj", "embed_tokens"])
    model = peft.PeftModel.from_pretrained(model_of("llama", base("llama")), folder, is_trainable=True)
    weights = np.random.default_rng(3).standard_normal((*TOKENS.shape, random_pretrained.VOCABULARY)).astype(np.float32)
    (model(input_ids=torch.tensor(TOKENS, dtype=torch.long)).logits * torch.tensor(weights)).mean().backward()
    theirs = {key.replace(".default", ""): x.grad.numpy() for key, x in model.named_parameters() if x.grad is not None}
    config = config_of("llama", {"run": f"hf:{base('llama')}", "adapters": str(folder)})
    graph, params, stats = split(jaxmodels.load(begin(config, tmp_path / "run")).model)
    from jaxmodels.models.functional import merge as whole

    ours = flatten(jax.jit(jax.grad(lambda p: (whole(graph, p, stats)(TOKENS) * weights).mean()))(params))
    module = "base_model.model.model.layers.1.self_attn.q_proj"
    names = {"a": "lora_A.weight", "b": "lora_B.weight", "m": "lora_magnitude_vector.weight"}
    for letter, name in names.items():
        np.testing.assert_allclose(ours[f"blocks/1/attention/query/lora_{letter}"].T, theirs[f"{module}.{name}"], atol=1e-5, rtol=1e-4)
    table = "base_model.model.model.embed_tokens"
    for letter, name in {"a": "lora_embedding_A", "b": "lora_embedding_B", "m": "lora_magnitude_vector.weight"}.items():
        np.testing.assert_allclose(ours[f"embed/lora_{letter}"].T, theirs[f"{table}.{name}"], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {"modules_to_save": ["lm_head", "embed_tokens"], "target_modules": ["q_proj"], "use_dora": True}),
        pytest.param("llama", {"modules_to_save": ["model.norm"], "target_modules": ["q_proj"]}, marks=pytest.mark.slow),
        pytest.param("bert_classes", {"task_type": "SEQ_CLS", "target_modules": ["query"]}, marks=pytest.mark.slow),
    ],
)
def test_modules_that_were_trained_in_full_are_imported_and_exported(base, tmp_path, name, options):
    """They replace those of the base model. Frozen, they are read from the folder of adapters again."""
    folder = tmp_path / "adapters"
    expected = write(name, base(name), folder, **options)
    config = config_of(name, {"run": f"hf:{base(name)}", "adapters": str(folder)})
    np.testing.assert_allclose(run(jaxmodels.load(begin(config, tmp_path / "run")).model), expected, atol=1e-5, rtol=1e-5)
    out = export_adapters(str(tmp_path / "run"), str(tmp_path / "out"))
    files_are_equal(folder, out)
    np.testing.assert_allclose(there(name, base(name), out), expected, atol=1e-5, rtol=1e-5)
    if name != "bert_classes":
        np.testing.assert_allclose(run(load_model(f"hf:{folder}")), expected, atol=1e-5, rtol=1e-5)


def test_an_embedding_that_is_also_the_output_is_exported_for_both(base, tmp_path):
    config = config_of("gpt2", f"hf:{base('gpt2')}", lora={"rank": 2, "targets": ("mlp/up",)}, training={"steps": 1, "trainable": ("^embed/",)})
    path = drawn(begin(config, tmp_path / "run"), also=("embed/",))
    expected = run(jaxmodels.load(path).model)
    out = export_adapters(path, str(tmp_path / "out"))
    assert sorted(json.loads((out / "adapter_config.json").read_text())["modules_to_save"]) == ["lm_head", "transformer.wte"]
    np.testing.assert_allclose(there("gpt2", base("gpt2"), out), expected, atol=1e-4)
    np.testing.assert_allclose(run(load_model(f"hf:{out}")), expected, atol=1e-5)
    tensors = load_file(out / "adapter_model.safetensors")
    save_file(tensors | {"base_model.model.lm_head.weight": tensors["base_model.model.lm_head.weight"] + 1}, out / "adapter_model.safetensors")
    with pytest.raises(ConfigError, match=r"transformer.wte.weight and lm_head.weight are one parameter of the model, but were trained apart"):
        load_model(f"hf:{out}")


@pytest.mark.slow
def test_dora_of_an_embedding_that_is_also_the_output_is_an_error_in_peft(base, tmp_path):
    config = config_of("gpt2", f"hf:{base('gpt2')}", lora={"rank": 2, "targets": ("^embed$",), "dora": True})
    path = begin(config, tmp_path / "run")
    with pytest.raises(ConfigError, match="embed has DoRA and is also the output layer, where PEFT has other magnitudes"):
        export_adapters(path, str(tmp_path / "out"))
    write("gpt2", base("gpt2"), tmp_path / "adapters", use_dora=True, target_modules=["wte"])
    with pytest.raises(ConfigError, match="transformer.wte has DoRA, but is both the embedding and the output layer"):
        load_model(f"hf:{tmp_path / 'adapters'}")


def test_folders_that_contradict_themselves_are_errors(base, tmp_path):
    folder = tmp_path / "adapters"
    write("llama", base("llama"), folder, use_dora=True, target_modules=["q_proj"], modules_to_save=["lm_head"])
    tensors, first = load_file(folder / "adapter_model.safetensors"), "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector"

    def error(change, reading=read, **keys):
        copy = tmp_path / str(len(list(tmp_path.iterdir())))
        shutil.copytree(folder, copy)
        save_file(change(dict(tensors)), copy / "adapter_model.safetensors")
        set_keys(copy, **keys)
        with pytest.raises(ConfigError) as raised:
            reading(str(copy))
        return str(raised.value)

    def same(tensors):
        return tensors

    lacking = error(lambda t: {name: x for name, x in t.items() if name != first})
    assert f"but no {first}" in lacking
    assert "needs one magnitude for each of 32 columns" in error(lambda t: t | {first: np.ones(31, np.float32)})
    assert "tensors that do not belong to adapters" in error(same, use_dora=False)
    assert "tensors that do not belong to adapters: base_model.model.lm_head.weight" in error(same, modules_to_save=None)
    assert "modules_to_save names norm, of which adapter_model.safetensors has no tensors" in error(same, modules_to_save=["lm_head", "norm"])
    assert "must be a list of names of modules" in error(same, modules_to_save=["lm_(head|x)"])
    extra = {"base_model.model.score.weight": np.ones((2, 32), np.float32)}
    unknown = error(lambda t: t | extra, reading=lambda path: load_model(f"hf:{path}"), modules_to_save=["lm_head", "score"])
    assert "modules_to_save: llama has no score.weight here" in unknown
    both = {"base_model.model.model.layers.0.self_attn.q_proj.weight": np.ones((32, 32), np.float32)}
    assert "has an adapter and is in modules_to_save" in error(lambda t: t | both, modules_to_save=["lm_head", "layers.0.self_attn.q_proj"])
    config = config_of("llama", {"run": f"hf:{base('llama')}", "adapters": str(folder)}, lora={"rank": 3, "alpha": 6.0, "targets": ("query",)})
    with pytest.raises(ConfigError, match="config.lora.dora=False, but .* has use_dora=True"):
        begin(config, tmp_path / "none")
