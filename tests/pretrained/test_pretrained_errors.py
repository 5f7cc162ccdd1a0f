"""Invalid and unsupported pretrained models: one clear error each, and no incomplete output."""

import json
import shutil
import types

import numpy as np
import pytest
import tokenizer_folders
from untrained_runs import untrained_run

from jaxmodels import models
from jaxmodels.cli import main as cli
from jaxmodels.errors import ConfigError
from jaxmodels.export.transformers import export_run
from jaxmodels.pretrained import architecture as architecture_lib
from jaxmodels.pretrained import safetensors
from jaxmodels.pretrained.mapping import LazyParameter, Link
from jaxmodels.pretrained.safetensors import ToWrite
from jaxmodels.pretrained.weights import load_model, locate, model_section, resolve_options

# architecture -> one of its published sizes, and unsupported values of its config.json that would change the result.
OTHER = {
    "bert": ("bert-base", {"position_embedding_type": "relative_key", "is_decoder": True, "hidden_act": "mish"}),
    "roberta": ("roberta-base", {"hidden_act": "relu", "add_cross_attention": True}),
    "xlm-roberta": ("roberta-base", {"hidden_act": "relu"}),
    "distilbert": ("distilbert-base", {"activation": "mish", "tie_word_embeddings": False}),
    "modernbert": (
        "modernbert-base",
        {"hidden_activation": "relu", "norm_bias": True, "layer_types": ["chunked_attention"], "rope_parameters": {"full_attention": {"rope_type": "yarn"}}},
    ),
    "deberta-v2": (
        "deberta-v3-small",
        {"conv_kernel_size": 3, "pos_att_type": "c2p", "share_att_key": False, "position_biased_input": True, "norm_rel_ebd": "none"},
    ),
    "gpt2": ("gpt2", {"scale_attn_by_inverse_layer_idx": True, "scale_attn_weights": False, "activation_function": "mish"}),
    "llama": ("llama2-7b", {"hidden_act": "gelu", "mlp_bias": 1.5, "rope_scaling": {"rope_type": "proportional", "factor": 2.0}}),
    "mistral": ("mistral-7b", {"layer_types": ["full_attention", "sliding_attention"], "hidden_act": "relu"}),
    "ministral": ("mistral-7b", {"layer_types": ["full_attention", "chunked_attention"], "attention_bias": True}),
    "qwen2": ("qwen2.5-7b", {"layer_types": ["full_attention", "chunked_attention"], "hidden_act": "relu"}),
    "qwen3": ("qwen3-8b", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}),
    "mixtral": ("mixtral-8x7b", {"hidden_act": "gelu"}),
    "qwen3_moe": ("qwen3-30b-a3b", {"decoder_sparse_step": 2, "mlp_only_layers": [1]}),
    "smollm3": ("smollm3-3b", {"hidden_act": "gelu", "layer_types": ["sliding_attention", "chunked_attention"]}),
    "phi3": ("phi3-mini", {"lm_head_bias": True, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
    "gemma": ("gemma-2b", {"hidden_act": "silu", "use_bidirectional_attention": True}),
    "gemma2": ("gemma2-2b", {"hidden_activation": "gelu", "layer_types": ["full_attention", "chunked_attention"]}),
    "gemma3_text": ("gemma3-1b", {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}}),
    "olmo2": ("olmo2-7b", {"hidden_act": "relu", "mlp_bias": True}),
    "granite": ("granite-3-2b", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}),
    "t5": ("t5-v1.1-small", {"feed_forward_proj": "gelu", "num_decoder_layers": 3, "relative_attention_num_buckets": 16, "scale_decoder_outputs": 2}),
    "mt5": ("mt5-small", {"feed_forward_proj": "gelu", "scale_decoder_outputs": True}),
    "vit": ("vit_b16", {"hidden_act": "gelu_new"}),
    "deit": ("deit_b16", {"hidden_act": "relu", "num_channels": 1}),
    "dinov2": ("vit_b16", {"hidden_act": "relu", "num_channels": 1}),
    "swin": ("swin-tiny", {"hidden_act": "relu", "use_absolute_embeddings": True}),
    "resnet": ("resnet50", {"layer_type": "inverted", "downsample_in_first_stage": True, "hidden_sizes": [1, 2, 3, 4]}),
    "convnext": ("convnext_t", {"hidden_act": "relu", "num_channels": 1, "hidden_sizes": [96, 96, 96, 96], "layer_scale_init_value": 0.0}),
}
VOCABULARY = 30
LLAMA = {"name": "llama2-7b", "layers": 1, "heads": 2, "kv_heads": 2, "width": 8, "mlp_width": 12, "context": 16}
BERT = {"name": "bert-tiny", "layers": 1, "heads": 2, "width": 8, "mlp_width": 12, "context": 16}
REST = {"data": {"source": "arrays", "batch_size": 2}, "optimizer": {"name": "sgd", "learning_rate": 0.1}, "training": {"steps": 1}}


def written(path, name: str, **changes):
    """Write a folder with the config.json of a published size, without tensors."""
    size, _ = OTHER[name]
    architecture = architecture_lib.load(name)
    values = architecture.config(resolve_options(architecture.model, models.find(size)[1])) | {"model_type": name, "vocab_size": 100}
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(values | changes))
    safetensors.write(path / "model.safetensors", {}, {})
    return f"hf:{path}"


@pytest.mark.parametrize("name", architecture_lib.ARCHITECTURES)
def test_options_that_change_the_result_are_errors_with_their_names(tmp_path, name):
    architecture, (_, other) = architecture_lib.load(name), OTHER[name]
    assert model_section(written(tmp_path / "good", name))["name"] == architecture.model
    for key, value in other.items():
        shown = {
            "rope_scaling": "rope_type",
            "rope_parameters": "partial_rotary_factor" if name != "modernbert" else "rope_parameters",
        }.get(key, key)
        shown = "rope_type" if name == "gemma3_text" else shown
        with pytest.raises(ConfigError, match=rf"config\.json: .*{shown}=.*not supported|{shown}=.*supported") as error:
            model_section(written(tmp_path / "bad", name, **{key: value}))
        assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match=r"sets attention_temperature=0.5, new_option=\[1\]: this key is unknown and may change"):
        model_section(written(tmp_path / "bad", name, attention_temperature=0.5, new_option=[1], unknown_but_off=False))


def test_sizes_that_are_missing_or_no_config_at_all(tmp_path):
    reference = written(tmp_path / "folder", "llama")
    file = tmp_path / "folder" / "config.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps({key: value for key, value in values.items() if key != "hidden_size"}))
    with pytest.raises(ConfigError, match="lacks 'hidden_size', which sets a size of the model"):
        model_section(reference)
    for content, problem in (("{", "cannot be read as JSON"), ("[]", "holds no JSON object"), ("\x00\xff", "cannot be read as JSON")):
        file.write_text(content, encoding="latin-1")
        with pytest.raises(ConfigError, match=problem):
            model_section(reference)
    file.unlink()
    with pytest.raises(ConfigError, match="has no config.json, so it is not a pretrained model folder"):
        model_section(reference)


def test_the_error_of_an_unknown_architecture_lists_the_known_ones(tmp_path):
    with pytest.raises(ConfigError, match="model_type='lama' is not supported; there are bert, roberta, .*resnet.* Did you mean 'llama'") as error:
        model_section(written(tmp_path, "llama", model_type="lama"))
    assert all(name in str(error.value) for name in architecture_lib.ARCHITECTURES)
    with pytest.raises(ConfigError, match="only the text model is supported: model_type='gemma3_text'"):
        model_section(written(tmp_path, "gemma3_text", model_type="gemma3"))
    with pytest.raises(ConfigError, match="model_type=None is not supported"):
        model_section(written(tmp_path, "llama", model_type=None))


@pytest.mark.parametrize(
    "sizes", [{"hidden_size": "eight"}, {"num_attention_heads": 0}, {"hidden_size": None}, {"num_hidden_layers": -1}, {"num_attention_heads": 7}]
)
def test_inconsistent_sizes(tmp_path, sizes):
    with pytest.raises(ConfigError) as error:
        load_model(written(tmp_path, "llama", **sizes))
    assert "\n" not in str(error.value)


def test_names_without_a_model(tmp_path):
    """A hub id that is not in the cache needs a network."""
    for reference, problem in {
        "hf:": "is named hf:FOLDER, hf:FILE.gguf or hf:OWNER/NAME",
        f"hf:{tmp_path}/none": "there is no folder",
        "hf:a/b/c": "there is no folder",
        "hf:nobody/such-model-here": r"there is no such folder, and the download from the hub failed .*name a folder: hf:/path/to/folder",
    }.items():
        with pytest.raises(ConfigError, match=problem) as error:
            model_section(reference)
        assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A complete pretrained model, exported from a run."""
    place = tmp_path_factory.mktemp("llama")
    config = {"model": LLAMA, "task": {"name": "language_model", "sample_length": 0}} | REST
    return export_run(untrained_run(config, {"vocab_size": VOCABULARY}, place / "run"), str(place / "out"))


@pytest.fixture
def copy(llama, tmp_path):
    """A copy of its folder, to be damaged."""
    return shutil.copytree(llama, tmp_path / "copy")


def rewrite(folder, change):
    """Change its tensors with a function of a dictionary of arrays."""
    arrays = {name: np.array(x.view()) for name, x in safetensors.read_header(folder / "model.safetensors").items()}
    change(arrays)
    safetensors.write(folder / "model.safetensors", {name: ToWrite(x.shape, x.dtype, lambda x=x: x) for name, x in arrays.items()}, {})


QUERY, NORM = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.input_layernorm.weight"


def test_a_good_one_is_read(copy):
    assert load_model(f"hf:{copy}").embed.embedding.shape == (VOCABULARY, 8)


@pytest.mark.parametrize(
    ("change", "problems"),
    [
        (lambda t: t.update({QUERY: np.zeros((8, 6), np.float32)}), ["blocks/0/attention/query/kernel: shape differs: (8, 8)", "(6, 8)"]),
        (lambda t: t.update({QUERY: np.zeros(8, np.float32)}), [QUERY, "(8,)", "cannot be blocks/0/attention/query/kernel"]),
        (lambda t: t.pop(QUERY), [f"{QUERY}: missing"]),
        (lambda t: (t.pop(QUERY), t.pop(NORM)), [f"{QUERY}: missing", f"{NORM}: missing"]),
        (lambda t: t.update({"model.extra": np.zeros(1, np.float32)}), ["model.extra: unexpected, no parameter of the model uses it"]),
        (lambda t: t.update({"model.layers.1.input_layernorm.weight": np.zeros(8, np.float32)}), ["model.layers.1.input_layernorm.weight: unexpected"]),
        (lambda t: [t.update({f"x{i}": np.zeros(1, np.float32)}) for i in range(30)], ["x0: unexpected", "and 10 more"]),
    ],
)
def test_tensors_that_are_not_those_of_the_config(copy, change, problems):
    rewrite(copy, change)
    with pytest.raises(ConfigError) as error:
        load_model(f"hf:{copy}")
    assert all(problem in str(error.value) for problem in problems), error.value


def test_experts_that_differ_in_shape_are_refused(tmp_path):
    model = LLAMA | {"name": "mixtral-8x7b", "moe": {"experts": 2, "top_k": 1, "normalize": True}}
    config = {"model": model, "task": {"name": "language_model", "sample_length": 0}} | REST
    folder = export_run(untrained_run(config, {"vocab_size": VOCABULARY}, tmp_path / "run"), str(tmp_path / "out"))
    name = "model.layers.0.block_sparse_moe.experts.{}.w1.weight"
    rewrite(folder, lambda t: t.update({name.format(1): np.zeros((12, 7), np.float32)}))
    with pytest.raises(ConfigError) as error:
        load_model(f"hf:{folder}")
    assert f"{name.format(0)} is (12, 8), {name.format(1)} is (12, 7): their shapes must be equal" in str(error.value)


@pytest.mark.parametrize(
    ("model", "problem"),
    [
        ({"name": "swin", "stages": (1, 1), "heads": (1, 2), "width": 8}, "window=7: images of 32 × 64 have 4 positions on a side of the last stage"),
        ({"name": "vit", "layers": 1, "heads": 2, "width": 8, "pool": "both", "layer_scale": 1.0}, "images of 32 × 64: .* positions of a square grid only"),
    ],
)
def test_images_that_transformers_cannot_compute_are_not_exported(tmp_path, model, problem):
    run = untrained_run({"model": model, "task": "classify"} | REST, {"image_shape": (32, 64, 3), "num_classes": 3}, tmp_path / "run")
    with pytest.raises(ConfigError, match=problem):
        export_run(run, str(tmp_path / "out"))


def test_a_fused_matrix_that_does_not_divide_into_its_heads():
    stored = {"qkv": types.SimpleNamespace(shape=(13, 8), dtype=np.dtype(np.float32))}
    with pytest.raises(ConfigError, match=r"qkv is \(13, 8\), which cannot be query/kernel \(transposed\)"):
        LazyParameter.of([Link("query/kernel", (), "qkv", "transposed", (0, 4, 6))], stored)


def test_a_model_of_another_kind_than_the_pretrained_one(copy):
    for model in ("bert-base", "lstm", "vit_b16"):
        with pytest.raises(ConfigError, match=f"config.model.name='{model}': .* is a llama; leave the name out"):
            locate(f"hf:{copy}", {"name": model} | models.find(model)[1], [])


def test_a_folder_with_only_a_pickle(copy):
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="pytorch_model.bin, a pickle, which can execute code when loaded; only safetensors files are"):
        load_model(f"hf:{copy}")


def with_tokenizer(folder):
    """A tokenizer with more tokens than the model has rows."""
    tokenizer = tokenizer_folders.byte_level(["<|endoftext|>"])
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    return tokenizer_folders.write(folder, {"tokenizer.json": tokenizer.to_str(), "tokenizer_config.json": json.dumps(settings)})


def test_a_tokenizer_of_more_tokens_than_the_model_has_rows(copy, tmp_path):
    """An error when the model is imported, and when a run starts from it."""
    with_tokenizer(copy)
    from jaxmodels.inference.pretrained import import_run

    with pytest.raises(ConfigError, match=rf"320 tokens.* {VOCABULARY}") as error:
        import_run(f"hf:{copy}", str(tmp_path / "run"))
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda path: (path / "model.safetensors").write_bytes((path / "model.safetensors").read_bytes()[:-1]), "is truncated"),
        (lambda path: rewrite(path, lambda t: t.pop(QUERY)), f"{QUERY}: missing"),
        (lambda path: rewrite(path, lambda t: t.update({QUERY: np.zeros((8, 6), np.float32)})), "shape differs: (8, 8) in this model, (6, 8) in the other run"),
        (lambda path: (path / "config.json").write_text('{"model_type": "falcon"}'), "model_type='falcon' is not supported"),
        (lambda path: (path / "model.safetensors").rename(path / "pytorch_model.bin"), "a pickle"),
    ],
)
def test_commands_end_with_status_2_and_write_nothing(copy, tmp_path, capsys, monkeypatch, spoil, problem):
    spoil(copy)
    tokens = tmp_path / "tokens.txt"
    tokens.write_text("a few words to learn from\n" * 200)
    config = {"init_from": f"hf:{copy}", "task": {"name": "language_model", "sample_length": 0}} | REST
    config["data"] = {"source": f"text:{tokens}", "tokenizer": "character", "sequence_length": 8, "batch_size": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setenv("JAXMODELS_CACHE_DIR", str(tmp_path / "cache"))
    commands = [["import", f"hf:{copy}", str(tmp_path / "run")], ["train", f"--config={tmp_path}/config.json", f"--workdir={tmp_path}/run"]]
    commands.append(["generate", f"--workdir=hf:{copy}", "--prompt=a"])
    for command in commands:
        assert cli.run(command) == 2, command
        printed = capsys.readouterr().err
        assert problem in printed and printed.startswith("jaxmodels: ") and "Traceback" not in printed
        assert not (tmp_path / "run").exists()
