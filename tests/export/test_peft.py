"""LoRA adapters in PEFT's format, against PEFT on the same models. More cases: pytest -m slow tests/export/test_peft.py"""

import json
import shutil

import numpy as np
import peft
import peft_cases
import pytest
import random_pretrained
from peft_cases import TARGETS, TOKENS, begin, config_of, drawn, model_of, run, set_keys, there
from safetensors.numpy import load_file, save_file
from untrained_runs import untrained_run

import jaxmodels
from jaxmodels.cli import main as cli
from jaxmodels.errors import ConfigError
from jaxmodels.export.peft import export_adapters, shortest
from jaxmodels.models.functional import flatten, split
from jaxmodels.pretrained.peft_folder import read
from jaxmodels.pretrained.weights import load_model
from jaxmodels.runs.merge import merge


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """name -> folder of a pretrained model, written once."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            random_pretrained.make(name).save_pretrained(made[name])
        return made[name]

    return get


@pytest.fixture(scope="module")
def adapters(base, tmp_path_factory):
    """name -> folder of adapters that PEFT wrote for a model, and its logits with them."""
    made = {}

    def get(name, **options):
        key = (name, str(options))
        if key not in made:
            folder = tmp_path_factory.mktemp("adapters")
            made[key] = (folder, peft_cases.write(name, base(name), folder, **options))
        return made[key]

    return get


@pytest.mark.parametrize(
    ("name", "scan"),
    [("llama", True), ("gpt2", False), pytest.param("phi3", True, marks=pytest.mark.slow), pytest.param("bert_classes", False, marks=pytest.mark.slow)],
)
def test_adapters_are_imported_and_exported_unchanged(base, adapters, tmp_path, name, scan):
    """Exported tensors are bitwise equal. The run, the merged model, and PEFT with the exported adapters give PEFT's logits with the original ones."""
    folder, expected = adapters(name)
    config = config_of(name, {"run": f"hf:{base(name)}", "adapters": str(folder)}, **({"model": {"scan": True}} if scan else {}))
    loaded = jaxmodels.load(begin(config, tmp_path / "run"))
    targets = [target.replace(r"\d+/", "") if scan else target for target in TARGETS[name][1]]
    lora = loaded.config["lora"]
    assert sorted(lora["targets"]) == sorted(targets) and (lora["rank"], lora["alpha"]) == (3, 6.0)
    np.testing.assert_allclose(run(loaded.model), expected, atol=1e-4)
    if name != "bert_classes":  # its task needs a tokenizer
        np.testing.assert_allclose(run(jaxmodels.load(f"hf:{folder}").model), expected, atol=1e-4)
    assert np.abs(run(load_model(f"hf:{base(name)}")) - expected).max() > 1e-2
    out = export_adapters(str(tmp_path / "run"), str(tmp_path / "out"))
    before, after = (load_file(path / "adapter_model.safetensors") for path in (folder, out))
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert value.tobytes() == after[key].tobytes() and value.shape == after[key].shape, key
    again = peft.PeftModel.from_pretrained(model_of(name, base(name)), out)
    np.testing.assert_allclose(random_pretrained.logits(again.eval(), (TOKENS,)), expected, atol=1e-6)
    values = json.loads((out / "adapter_config.json").read_text())
    assert sorted(values["target_modules"]) == sorted(TARGETS[name][0]) and values["base_model_name_or_path"] == str(base(name))


@pytest.mark.parametrize(
    "targets", [("attention/(query|key|value)", "mlp/up"), pytest.param(("attention/(query|value)", "attention/out"), marks=pytest.mark.slow)]
)
def test_adapters_of_queries_keys_and_values_become_one_of_all_three(base, tmp_path, targets):
    """Those of GPT-2, which are trained separately here: the merge is exact, and the way back is bitwise."""
    lora = {"rank": 2, "alpha": 3.0, "targets": targets}
    path = drawn(begin(config_of("gpt2", f"hf:{base('gpt2')}", lora=lora), tmp_path / "run"))
    out = tmp_path / "out"
    assert cli.run(["export", path, str(out), "--format=peft"]) == 0
    assert cli.run(["export", path, str(out), "--format=peft"]) == cli.run(["export", path, str(out)]) == 2  # the folder exists
    values = json.loads((out / "adapter_config.json").read_text())
    for key, value in {"rank_pattern": 6, "alpha_pattern": 9}.items():
        assert values[key] == {f"transformer.h.{i}.attn.c_attn": value for i in range(2)}
    expected = run(jaxmodels.load(path).model)
    np.testing.assert_allclose(there("gpt2", base("gpt2"), out), expected, atol=1e-4)
    merge(path, str(tmp_path / "merged"))  # with the frozen pretrained weights
    np.testing.assert_allclose(run(jaxmodels.load(str(tmp_path / "merged")).model), expected, atol=1e-4)
    again = begin(config_of("gpt2", {"run": f"hf:{base('gpt2')}", "adapters": str(out)}), tmp_path / "again")
    before, after = (flatten(split(jaxmodels.load(one).model)[1]) for one in (path, again))
    assert before.keys() == after.keys() and sum("lora_" in name for name in before) == 2 * 2 * (4 if "up" in targets[1] else 3)
    for name, x in before.items():
        np.testing.assert_array_equal(x, after[name], err_msg=name)


@pytest.mark.slow
def test_separate_adapters_of_parts_of_different_sizes_become_one(base, tmp_path):
    lora = {"rank": 2, "alpha": 3.0, "targets": ("attention/(query|value)",)}
    path = drawn(begin(config_of("phi3", f"hf:{base('phi3')}", lora=lora), tmp_path / "run"))
    out = export_adapters(path, str(tmp_path / "out"))
    np.testing.assert_allclose(there("phi3", base("phi3"), out), run(jaxmodels.load(path).model), atol=1e-4)
    with pytest.raises(ConfigError, match="adapters of different ranks or scales are not supported"):
        begin(config_of("phi3", {"run": f"hf:{base('phi3')}", "adapters": str(out)}), tmp_path / "again")


@pytest.mark.slow
def test_an_embedding_that_is_also_the_output_layer(base, adapters, tmp_path):
    """PEFT adapts each of the two. Two equal adapters become one here; a single one is an error."""
    folder, expected = adapters("gpt2", target_modules=["wte", "lm_head", "c_fc"])
    path = begin(config_of("gpt2", {"run": f"hf:{base('gpt2')}", "adapters": str(folder)}), tmp_path / "run")
    np.testing.assert_allclose(run(jaxmodels.load(path).model), expected, atol=1e-4)
    out = export_adapters(path, str(tmp_path / "out"))
    np.testing.assert_allclose(there("gpt2", base("gpt2"), out), expected, atol=1e-4)
    assert load_file(out / "adapter_model.safetensors").keys() == load_file(folder / "adapter_model.safetensors").keys()
    np.testing.assert_allclose(run(load_model(f"hf:{folder}")), expected, atol=1e-4)
    apart, _ = adapters("gpt2", target_modules=["wte"])
    other = config_of("gpt2", {"run": f"hf:{base('gpt2')}", "adapters": str(apart)})
    for use in (lambda: load_model(f"hf:{apart}"), lambda: begin(other, tmp_path / "other")):
        with pytest.raises(ConfigError, match="transformer.wte has a separate adapter, but is shared by the embedding and the output layer"):
            use()


@pytest.mark.slow
def test_a_head_trained_with_the_adapters_is_exported_in_full(base, tmp_path):
    path = base("bert_classes")
    config = config_of("bert_classes", {"run": f"hf:{path}", "skip": ("head/",)}, lora={"rank": 2, "targets": ("attention/value",)})
    config["training"] = {"steps": 1, "trainable": ("head/",)}
    out = export_adapters(drawn(begin(config, tmp_path / "run")), str(tmp_path / "out"))
    assert sorted(json.loads((out / "adapter_config.json").read_text())["modules_to_save"]) == ["bert.pooler.dense", "classifier"]
    np.testing.assert_allclose(there("bert_classes", path, out), run(jaxmodels.load(str(tmp_path / "run")).model), atol=1e-4)
    config["training"]["trainable"] = ("head/", "^blocks/0/attention/key/kernel")
    with pytest.raises(ConfigError, match="blocks/0/attention/key/kernel was trained in addition to the adapters"):
        export_adapters(begin(config, tmp_path / "more"), str(tmp_path / "none"))
    assert not (tmp_path / "none").exists()


@pytest.mark.slow
def test_root_of_the_rank_as_scale(base, adapters, tmp_path):
    folder, expected = adapters("llama", use_rslora=True, target_modules=["up_proj", "lm_head"])
    loaded = jaxmodels.load(begin(config_of("llama", {"run": f"hf:{base('llama')}", "adapters": str(folder)}), tmp_path / "run"))
    assert loaded.config["lora"]["alpha"] == pytest.approx(6 * 3**0.5)
    np.testing.assert_allclose(run(loaded.model), expected, atol=1e-4)
    np.testing.assert_allclose(there("llama", base("llama"), export_adapters(str(tmp_path / "run"), str(tmp_path / "out"))), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"use_dora": True}, "has .*lora_embedding_A but no .*lora_magnitude_vector"),
        ({"bias": "all"}, "bias='all' changes"),
        ({"lora_bias": True}, "lora_bias=True changes"),
        ({"bias": "lora_only"}, "bias='lora_only' changes"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save names lm_head, of which adapter_model.safetensors has no tensors"),
        ({"trainable_token_indices": [0, 3]}, r"trainable_token_indices=\[0, 3\] changes"),
        ({"target_parameters": ["mlp.experts.gate_up_proj"]}, r"target_parameters=\['mlp.experts.gate_up_proj'\] changes"),
        ({"alora_invocation_tokens": [1]}, r"alora_invocation_tokens=\[1\] changes"),
        ({"layer_replication": [[0, 2]]}, r"layer_replication=\[\[0, 2\]\] changes"),
        ({"use_qalora": True}, "use_qalora=True changes"),
        ({"loftq_config": {"loftq_bits": 4}}, "loftq_config={'loftq_bits': 4} changes"),
        ({"alpha_pattern": {"q_proj": 1}}, "alpha_pattern={'q_proj': 1}: adapters of different ranks or scales"),
        ({"rank_pattern": {".*proj": 3}}, "rank_pattern has '.*proj', which is no name of a module; regular expressions are not supported"),
        ({"rank_pattern": {"up_proj": 3}, "alpha_pattern": {"q_proj": 1}}, r"rank_pattern={'up_proj': 3}: adapters of different ranks or scales"),
        ({"rank_pattern": {"q_proj": 2}}, "q_proj has rank 2, but .* has shape .3, 32."),
        *(
            ({"init_lora_weights": name}, f"init_lora_weights='{name}' changes the base")
            for name in ("pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga")
        ),
        ({"some_new_option": 1}, "some_new_option=1 changes"),
        ({"peft_type": "IA3"}, "peft_type='IA3' is not supported; only LORA is"),
        ({"r": "three"}, "r='three' and lora_alpha=6: r must be an integer"),
    ],
)
def test_unsupported_options_are_errors_with_their_names(adapters, tmp_path, values, problem):
    copy = tmp_path / "copy"
    shutil.copytree(adapters("llama")[0], copy)
    set_keys(copy, **values)
    with pytest.raises(ConfigError, match=problem):
        read(str(copy))


@pytest.mark.parametrize(
    ("options", "modules"),
    [
        ({"target_modules": r".*\.1\.self_attn\.q_proj"}, 1),
        pytest.param({"target_modules": ["q_proj"], "layers_to_transform": [0]}, 1, marks=pytest.mark.slow),
        pytest.param({"target_modules": ["q_proj"], "init_lora_weights": "mica"}, 2, marks=pytest.mark.slow),
        pytest.param({"target_modules": ["q_proj"], "init_lora_weights": False}, 2, marks=pytest.mark.slow),
        pytest.param({"target_modules": "all-linear", "exclude_modules": ["down_proj"], "init_lora_weights": "gaussian"}, 2 * 6, marks=pytest.mark.slow),
    ],
)
def test_modules_with_adapters_are_those_in_the_file(adapters, options, modules):
    """However the config chooses them: by names, one expression, `all-linear`, layers, or exceptions."""
    folder, expected = adapters("llama", **options)
    np.testing.assert_allclose(run(load_model(f"hf:{folder}")), expected, atol=1e-4)
    assert len(read(str(folder)).modules) == modules


def test_bad_adapters_are_refused(base, adapters, tmp_path):
    folder, _ = adapters("llama")

    def error(change, *, init_from=None, **config):
        copy = tmp_path / str(len(list(tmp_path.iterdir())))
        shutil.copytree(folder, copy)
        change(copy)
        with pytest.raises(ConfigError) as raised:
            begin(config_of("llama", {"run": init_from or f"hf:{base('llama')}", "adapters": str(copy)}, **config), copy / "run")
        assert not (copy / "run").exists()
        return str(raised.value)

    def rewrite(copy, change):
        tensors = load_file(copy / "adapter_model.safetensors")
        save_file(change(tensors), copy / "adapter_model.safetensors")

    def pickled(copy):
        (copy / "adapter_model.safetensors").rename(copy / "adapter_model.bin")

    query = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    assert "adapter_model.bin, a pickle" in error(pickled)
    assert "has no adapter_model.safetensors" in error(lambda copy: (copy / "adapter_model.safetensors").unlink())
    assert "it has no adapter_config.json" in error(lambda copy: (copy / "adapter_config.json").unlink())
    assert "is truncated" in error(lambda copy: (copy / "adapter_model.safetensors").write_bytes((copy / "adapter_model.safetensors").read_bytes()[:-4]))
    assert f"has {query}A.weight but no {query}B.weight" in error(lambda copy: rewrite(copy, lambda t: {k: v for k, v in t.items() if k != f"{query}B.weight"}))
    assert f"tensors that do not belong to adapters: {query}magnitude" in error(
        lambda copy: rewrite(copy, lambda t: t | {f"{query}magnitude": np.zeros(2, np.float32)})
    )
    assert "is [3, 32] and" in error(lambda copy: rewrite(copy, lambda t: t | {f"{query}B.weight": np.zeros((32, 2), np.float32)}))
    narrow = error(lambda copy: rewrite(copy, lambda t: t | {f"{query}A.weight": np.zeros((3, 30), np.float32)}))
    assert "blocks/0/attention/query/lora_a: shape differs: (32, 3) in this model, (30, 3) in the other run" in narrow
    strange = {
        "base_model.model.model.strange.lora_A.weight": np.zeros((3, 4), np.float32),
        "base_model.model.model.strange.lora_B.weight": np.zeros((4, 3), np.float32),
    }
    assert "adapters for model.strange of llama are not supported" in error(lambda copy: rewrite(copy, lambda t: t | strange))
    targets = ("attention/query", "mlp/down", "^embed$")
    assert "config.lora.rank=2, but" in error(lambda copy: None, lora={"rank": 2, "targets": targets})
    assert "alpha / rank of adapters is 1 here, but 2 in" in error(lambda copy: None, lora={"rank": 3, "targets": targets})
    differs = error(lambda copy: None, lora={"rank": 3, "alpha": 6.0, "targets": ("attention/query", "mlp/up")})
    assert "blocks/0/mlp/up has an adapter here, but none in" in differs and "embed has an adapter in" in differs
    assert "config.init_from.adapters=" in error(lambda copy: None, init_from=str(tmp_path), model={"name": "gpt"})
    with pytest.raises(ConfigError, match="lacks base_model_name_or_path, the model of its adapters"):
        set_keys(tmp_path / "0", base_model_name_or_path=None)
        load_model(f"hf:{tmp_path / '0'}")
    with pytest.raises(ConfigError, match="adapter_model.bin, a pickle"):
        set_keys(tmp_path / "0", base_model_name_or_path=str(base("llama")))
        load_model(f"hf:{tmp_path / '0'}")


def test_runs_without_adapters_or_pretrained_weights_are_errors(base, tmp_path):
    plain = begin(config_of("llama", f"hf:{base('llama')}"), tmp_path / "plain")
    with pytest.raises(ConfigError, match="has no adapters"):
        export_adapters(plain, str(tmp_path / "out"))
    model = {"name": "gpt", "layers": 1, "heads": 2, "width": 8, "context": 16}
    own = untrained_run({**config_of("gpt2", None), "model": model}, {"vocab_size": random_pretrained.VOCABULARY}, tmp_path / "own")
    on_a_run = begin(config_of("gpt2", own, model=model, lora={"rank": 2, "targets": ("query",)}), tmp_path / "on_a_run")
    with pytest.raises(ConfigError, match="did not start from pretrained weights"):
        export_adapters(on_a_run, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_names_of_modules_are_as_short_as_they_can_be():
    every = ["a.0.up", "a.1.up", "a.0.out.dense", "a.1.out.dense", "pool.dense"]
    assert shortest(["a.0.up", "a.1.up"], every) == ["up"]
    assert shortest(["a.0.out.dense", "a.1.out.dense"], every) == ["out.dense"]
    assert shortest(["a.1.up", "pool.dense"], every) == ["1.up", "pool.dense"]
