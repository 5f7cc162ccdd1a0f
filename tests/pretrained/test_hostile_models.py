"""Files of a pretrained model from an attacker: absurd sizes, deep nesting and traps are errors that name the file, before anything is built."""

import json
import resource

import numpy as np
import pytest
import tokenizer_folders
from pretrained import test_pretrained_errors

from jaxmodels.errors import ConfigError
from jaxmodels.pretrained import architecture as architecture_lib
from jaxmodels.pretrained import folder as folder_lib
from jaxmodels.pretrained import peft_folder, safetensors
from jaxmodels.pretrained.safetensors import ToWrite
from jaxmodels.pretrained.weights import load_model, model_section
from jaxmodels.tokenizers.bpe import TokenizersTokenizer
from jaxmodels.tokenizers.factory import make_tokenizer

pytestmark = pytest.mark.faults

SIZES = {
    *("num_hidden_layers", "num_layers", "n_layer", "num_attention_heads", "num_key_value_heads", "n_head", "num_heads", "hidden_size", "n_embd"),
    *("d_model", "d_kv", "d_ff", "head_dim", "intermediate_size", "n_inner", "vocab_size", "max_position_embeddings", "n_positions", "patch_size"),
    *("embedding_size", "num_local_experts", "num_experts", "num_experts_per_tok", "moe_intermediate_size"),
}
ABSURD = (10**12, 10**30, 0, -1, "8", True, 1.5, float("nan"), float("inf"), [1], {})


def written(path, name, **changes):
    """Write the folder of a model with a head, without tensors."""
    classes = architecture_lib.load(name).classes
    head = next(class_name for class_name, kind in classes.items() if kind is not None)
    return test_pretrained_errors.written(path, name, **{"architectures": [head]} | changes)


@pytest.mark.parametrize("name", architecture_lib.ARCHITECTURES)
def test_absurd_sizes_are_refused_with_file_and_key(tmp_path, name):
    reference, file = written(tmp_path, name), tmp_path / "config.json"
    good = json.loads(file.read_text())
    keys = {key for key in SIZES & good.keys() if not isinstance(good[key], list)}
    assert len(keys) >= 2
    for key in keys:
        for value in ABSURD:
            file.write_text(json.dumps(good | {key: value}))
            with pytest.raises(ConfigError, match=rf"config\.json: {key}=.* is not a whole number from 1 to") as error:
                model_section(reference)
            assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "changes", "problem"),
    [
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": float("nan")}}, "rope_scaling: factor='nan' is not a number above 0"),
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": {"factor": {}}}}, "rope_scaling: factor"),
        ("llama", {"rope_scaling": [1]}, "rope_scaling='\\[1\\]' is not an object"),
        ("llama", {"rope_parameters": {"rope_type": ["default"]}}, "rope_parameters: rope_type"),
        ("llama", {"rope_parameters": {"rope_theta": "1e4"}}, "rope_parameters: rope_theta='1e4' is not a number above 0"),
        ("llama", {"rms_norm_eps": float("inf")}, "rms_norm_eps='inf' is not a number above 0"),
        ("mistral", {"layer_types": [["full_attention"]]}, "layer_types=.* is not a list of texts"),
        ("bert", {"hidden_dropout_prob": 2}, "hidden_dropout_prob='2' is not a fraction"),
        ("roberta", {"pad_token_id": 10**12}, "pad_token_id='1000000000000' is not a token"),
        ("roberta", {"pad_token_id": None}, "pad_token_id=None: RoBERTa's positions begin after"),
        ("resnet", {"depths": [10**9] * 4}, "depths=.* whole numbers from 1 to 1,000"),
        ("resnet", {"depths": [1] * 5}, "must have one value for each stage"),
        ("resnet", {"depths": 10**9}, "depths='1000000000' is not a list"),
        ("swin", {"num_heads": [3, 6]}, "must have one value for each stage"),
        ("swin", {"num_heads": [3, 6, 12, 0]}, "num_heads=.* whole numbers from 1 to"),
        ("swin", {"mlp_ratio": 10**9}, "mlp_ratio='1000000000' is not a number above 0"),
        ("convnext", {"num_stages": 3}, "must have one value for each stage"),
        ("dinov2", {"image_size": 8}, "image_size=8 is smaller than patch_size=16"),
        ("dinov2", {"image_size": [224, 448]}, "the grid of the positions must be square"),
        ("vit", {"image_size": [224, 0]}, "image_size=.* is not a whole number from 1 to"),
        ("vit", {"id2label": 5}, "id2label='5' is not an object"),
        ("vit", {"architectures": [{}]}, "architectures=.* is not a list of texts"),
        ("gpt2", {"model_type": ["gpt2"]}, r"model_type=\['gpt2'\] is not supported"),
        ("gpt2", {"n_head": 7}, "heads must divide width"),
        ("gpt2", {"n_embd": None}, "lacks 'n_embd'"),
        ("gpt2", {"vocab_size": None}, "lacks 'vocab_size'"),
    ],
)
def test_other_values(tmp_path, name, changes, problem):
    with pytest.raises(ConfigError, match=problem) as error:
        load_model(written(tmp_path, name, **changes))
    assert "\n" not in str(error.value)


def test_a_large_model_by_its_config_alone_allocates_nothing(tmp_path):
    """Sizes within the limits: 2.7e12 parameters, of which the files have none."""
    sizes = {"hidden_size": 1 << 19, "num_attention_heads": 4096, "num_key_value_heads": 4096, "intermediate_size": 1 << 20, "num_hidden_layers": 1}
    reference = written(tmp_path, "llama", **sizes)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ConfigError, match="tensors do not match its config.json"):
        load_model(reference)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "tokenizer_config.json"])
def test_deep_nesting(tmp_path, name):
    reference = written(tmp_path, "llama")
    (tmp_path / name).write_text('{"a":' + "[" * 200_000)
    with pytest.raises(ConfigError, match=name):
        make_tokenizer(reference, (), None) if name.startswith("tokenizer") else folder_lib.find(reference).tensors()


@pytest.mark.parametrize("outside", ["../secret.safetensors", "/etc/passwd", "..", "a/../../secret", "model\0.safetensors"])
def test_an_index_cannot_name_files_elsewhere(tmp_path, outside):
    reference = written(tmp_path / "model", "llama")
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": outside}}))
    with pytest.raises(ConfigError, match="outside the folder|no weight_map"):
        folder_lib.find(reference).tensors()


def header(path, text: str, size: int = 8):
    content = text.encode()
    path.write_bytes(len(content).to_bytes(8, "little") + content + bytes(size))
    return path


ENTRY = '{"dtype": "F32", "shape": [%s], "data_offsets": [0, 8]}'


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"a": ' + ENTRY % "2" + ', "a": ' + ENTRY % "2" + "}", "'a' occurs twice"),
        ('{"a": ' + ENTRY % ", ".join(["1"] * 40 + ["2"]) + "}", "a has an invalid shape"),
        ('{"a": ' + ENTRY % ", ".join(["9" * 4000] * 30) + "}", "invalid safetensors header"),
        ('{"a": ' + ENTRY % ("9" * 5000) + "}", "invalid safetensors header"),
        ('{"a":' * 100_000, "invalid safetensors header"),
    ],
)
def test_safetensors_headers(tmp_path, text, problem):
    with pytest.raises(ConfigError, match=problem) as error:
        safetensors.read_header(header(tmp_path / "x.safetensors", text))
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"r": 10**9}, "has rank 1000000000, but .* has shape"),
        ({"r": True}, "r must be an integer"),
        ({"r": 0}, "r must be an integer"),
        ({"lora_alpha": float("nan")}, "lora_alpha a number"),
        ({"rank_pattern": {"(a+)+$": 4}}, r"rank_pattern has '\(a\+\)\+\$'.*regular expressions are not supported"),
        ({"rank_pattern": {"(": 4}}, "regular expressions are not supported"),
        ({"rank_pattern": [4]}, "rank_pattern must give a number"),
        ({"alpha_pattern": {"layer": "x"}}, "alpha_pattern must give a number"),
        ({"target_modules": [[]], "ensure_weight_tying": True, "r": 3}, "has rank 3"),
    ],
)
def test_adapters(tmp_path, changes, problem):
    module = f"base_model.model.{'a' * 40}!"
    tensors = {f"{module}.lora_A.weight": np.zeros((2, 8), np.float32), f"{module}.lora_B.weight": np.zeros((8, 2), np.float32)}
    safetensors.write(tmp_path / peft_folder.WEIGHTS, {name: ToWrite(x.shape, x.dtype, lambda x=x: x) for name, x in tensors.items()}, {})
    (tmp_path / peft_folder.CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2} | changes))
    with pytest.raises(ConfigError, match=problem):
        peft_folder.read(str(tmp_path))


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"added_tokens_decoder": {str(10**12): {"content": "<x>"}}}, "a token with the id 1000000000000"),
        ({"added_tokens_decoder": {"-5": {"content": "<x>"}}}, "a token with the id -5"),
        ({"added_tokens_decoder": {"nine": {"content": "<x>"}}}, "cannot be read"),
        ({"eos_token": ["<x>"]}, r"eos_token=\['<x>'\], which is no text"),
        ({"eos_token": {"content": 5}}, "eos_token=5, which is no text"),
    ],
)
def test_tokenizer_settings(tmp_path, settings, problem):
    reference = written(tmp_path, "llama", vocab_size=400)
    tokenizer_folders.write(tmp_path, {"tokenizer.json": tokenizer_folders.byte_level([]).to_str(), "tokenizer_config.json": json.dumps(settings)})
    with pytest.raises(ConfigError, match=problem):
        make_tokenizer(reference, (), None)


def test_a_vocabulary_with_an_absurd_id(tmp_path):
    values = {"model": {"type": "WordLevel", "vocab": {"a": 2**31, "b": 0}, "unk_token": "b"}, "added_tokens": []}
    (tmp_path / "x.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match="its largest id is 2,147,483,648"):
        make_tokenizer(str(tmp_path / "x.json"), (), None)


def test_a_regular_expression_that_takes_for_ever():
    """The library stops it after a number of steps, and panics."""
    split = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    values = {"model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1}, "unk_token": "b"}, "pre_tokenizer": split, "added_tokens": []}
    tokenizer = TokenizersTokenizer(json.dumps(values))
    with pytest.raises(ConfigError, match="cannot encode a text: Onig: Regex search error: retry-limit"):
        tokenizer.encode("a" * 100 + "!")
