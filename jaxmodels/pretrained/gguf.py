"""GGUF, the format of llama.cpp: one file with weights, mostly quantised, the sizes of the model, and its tokenizer.

A file is converted once, into the cache, to a folder as `transformers` writes it; everything else reads that folder. Quantised weights become
float32, so that no bit is lost: the folder of a file of four bits a weight is eight times as large.

Source of the names, and of how rotary dimensions are laid out: the specification of GGUF, and its `gguf` package, which reads the blocks.
"""

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from jaxmodels.errors import ConfigError, optional_import
from jaxmodels.pretrained import safetensors
from jaxmodels.pretrained.limits import check_values
from jaxmodels.pretrained.safetensors import ToWrite
from jaxmodels.storage.paths import cache_folder

SUFFIX = ".gguf"
_VERSION = 1  # of what is written into the cache
ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
# Option of a config.json -> key of the metadata, after the name of the architecture.
SIZES = {
    "max_position_embeddings": "context_length",
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
}
_UNSUPPORTED = ("expert_count", "attention.sliding_window", "attention.scale", "logit_scale", "attn_logit_softcapping")
# Name of a tensor -> that in a folder of `transformers`.
_BLOCK = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_CONTROL, _USER_DEFINED = 3, 4  # types of tokens
_GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)  # fmt: skip
# Name of a pre-tokenizer -> whether digits are single, and the words that merges stay in.
WORDS = {
    "gpt-2": (False, _GPT2_WORDS),
    "smollm": (True, _GPT2_WORDS),
    "llama-bpe": (False, _LLAMA3_WORDS),
    "qwen2": (False, _LLAMA3_WORDS.replace(r"\p{N}{1,3}", r"\p{N}")),
}


def folder_of(file: Path) -> Path:
    """Return the folder that a file was converted to; convert it if there is none.

    Raises:
      ConfigError: the file is damaged, or its architecture, its positions or its tokenizer are not supported; the package `gguf` is missing.
    """
    stat = file.stat()
    key = hashlib.sha256(json.dumps([_VERSION, str(file.absolute()), stat.st_size, stat.st_mtime_ns]).encode()).hexdigest()[:32]
    place = cache_folder() / "gguf" / key / file.stem
    if place.is_dir():
        return place
    metadata, tensors = _read(file)
    config = _config(metadata, tensors, file)
    check_values(config, str(file))
    place.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=place.parent))
    try:
        (temporary / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
        for name, content in _tokenizer(metadata, file).items():
            (temporary / name).write_text(content, encoding="utf-8")
        safetensors.write(temporary / "model.safetensors", _weights(tensors, config, file), {"format": "pt"})
        try:
            os.rename(temporary, place)
        except OSError:
            if not place.is_dir():  # else another process was faster
                raise
    except OSError as error:
        raise ConfigError(f"{file} cannot be converted into {place.parent}: {error.strerror}. Set JAXMODELS_CACHE_DIR to a folder with room.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return place


def _read(file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the metadata, and the tensors by name, which are mapped and not read."""
    gguf = optional_import("gguf", "gguf")
    try:
        reader = gguf.GGUFReader(file)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
    except Exception as error:  # noqa: BLE001  what the package raises depends on where the file is broken
        raise ConfigError(f"{file} cannot be read as GGUF: {type(error).__name__}: {str(error)[:200]}. Copy or download it again.") from error
    return metadata, {tensor.name: tensor for tensor in reader.tensors}


def _config(metadata: Mapping[str, Any], tensors: Mapping[str, Any], file: Path) -> dict[str, Any]:
    kind = metadata.get("general.architecture")
    if kind not in ARCHITECTURES:
        raise ConfigError(f"{file}: general.architecture={kind!r} is not supported in GGUF; there are {', '.join(ARCHITECTURES)}.")
    for key in _UNSUPPORTED:
        if metadata.get(f"{kind}.{key}"):
            raise ConfigError(f"{file}: {kind}.{key}={metadata[f'{kind}.{key}']!r} changes what the model computes, and is not supported in GGUF.")
    scaling = metadata.get(f"{kind}.rope.scaling.type")
    if scaling not in (None, "none") or "rope_freqs.weight" in tensors:
        raise ConfigError(f"{file}: scaled rotary positions ({scaling or 'rope_freqs.weight'}) are not supported in GGUF; use the model's safetensors.")
    missing = [key for key in SIZES.values() if metadata.get(f"{kind}.{key}") is None and key != "attention.head_count_kv"]
    if missing or "token_embd.weight" not in tensors:
        raise ConfigError(f"{file} lacks {missing[0] if missing else 'token_embd.weight'}. Copy or download it again.")
    found = {option: metadata.get(f"{kind}.{key}") for option, key in SIZES.items()}
    found["num_key_value_heads"] = found["num_key_value_heads"] or found["num_attention_heads"]
    width = metadata.get(f"{kind}.attention.key_length") or found["hidden_size"] // found["num_attention_heads"]
    if metadata.get(f"{kind}.rope.dimension_count", width) != width:
        raise ConfigError(f"{file}: {kind}.rope.dimension_count differs from the width of a head, {width}: partial rotary positions are not supported.")
    tokens = {f"{name}_token_id": metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))}
    biases = {"attention_bias": "blk.0.attn_q.bias" in tensors, "mlp_bias": False} if kind == "llama" else {}
    return {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        **found,
        "head_dim": width,
        "hidden_act": "silu",
        "vocab_size": int(tensors["token_embd.weight"].shape[1]),
        "tie_word_embeddings": "output.weight" not in tensors,
        **biases,
        **{key: value for key, value in tokens.items() if value is not None},
    }


def _weights(tensors: Mapping[str, Any], config: Mapping[str, Any], file: Path) -> dict[str, ToWrite]:
    """Return the tensors to write by their names in `transformers`; each is decoded when it is written."""
    import gguf

    found = {}
    for name, tensor in tensors.items():
        inside = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
        outside = re.fullmatch(r"(\w+)\.(weight|bias)", name)
        if inside and inside[2] in _BLOCK:
            new = f"model.layers.{inside[1]}.{_BLOCK[inside[2]]}.{inside[3]}"
        elif outside and outside[1] in _OUTSIDE:
            new = f"{_OUTSIDE[outside[1]]}.{outside[2]}"
        else:
            raise ConfigError(f"{file} has the tensor {name}, which no parameter of {config['model_type']!r} uses. It is not supported in GGUF.")
        shape = tuple(int(size) for size in reversed(tensor.shape))
        heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}.get(inside[2]) if inside else None
        turned = heads if config["model_type"] == "llama" else None
        dtype = np.dtype(np.float16 if tensor.tensor_type == gguf.GGMLQuantizationType.F16 else np.float32)
        try:
            gguf.quants.dequantize(np.asarray(tensor.data[:1]), tensor.tensor_type)
        except NotImplementedError as error:
            raise ConfigError(f"{file}: {name} is {tensor.tensor_type.name}, which the package gguf cannot decode.") from error

        def values(tensor=tensor, shape=shape, turned=turned, dtype=dtype) -> np.ndarray:
            plain = gguf.quants.dequantize(np.asarray(tensor.data), tensor.tensor_type).reshape(shape).astype(dtype)
            return plain if turned is None else halves(plain, turned)

        found[new] = ToWrite(shape, dtype, values)
    return found


def their_name(name: str) -> str:
    """Return the name in GGUF of a tensor in a folder of `transformers`."""
    inside = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
    if inside:
        return f"blk.{inside[1]}.{next(theirs for theirs, ours in _BLOCK.items() if ours == inside[2])}.{inside[3]}"
    module, _, part = name.rpartition(".")
    return f"{next(theirs for theirs, ours in _OUTSIDE.items() if ours == module)}.{part}"


def halves(values: np.ndarray, heads: int) -> np.ndarray:
    """Return the rows of a query or key projection with the two halves of each head's rotary dimensions after one another, as `transformers` has them.

    llama.cpp has them in pairs.
    """
    return values.reshape(heads, -1, 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


def pairs(values: np.ndarray, heads: int) -> np.ndarray:
    """Return the inverse of `halves`."""
    return values.reshape(heads, 2, -1, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


def _words(name: str) -> Any:
    """Return a pre-tokenizer by its name."""
    single, pattern = WORDS[name]
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if single else []
    return pre_tokenizers.Sequence(
        [*steps, pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )


def words_of(serialized: Mapping[str, Any] | None) -> str | None:
    """Return the name of a pre-tokenizer as the library `tokenizers` serialises it; None if it has none."""

    def of(steps: list[Any]) -> tuple:
        """What distinguishes pre-tokenizers: patterns, single digits, and whether bytes are split into GPT-2's words."""
        found: list[Any] = []
        for step in steps:
            if step["type"] == "ByteLevel" and step.get("use_regex", True):
                found.append(_GPT2_WORDS)
            elif step["type"] == "Split":
                found.append(step["pattern"].get("Regex"))
            elif step["type"] == "Digits":
                found.append(step["individual_digits"])
            elif step["type"] != "ByteLevel":
                found.append(step["type"])
            if step.get("add_prefix_space"):
                found.append("prefix")
        return tuple(found)

    if serialized is None:
        return None
    steps = serialized["pretokenizers"] if serialized["type"] == "Sequence" else [serialized]
    return next((name for name, (single, pattern) in WORDS.items() if of(steps) == ((True,) if single else ()) + (pattern,)), None)


def _tokenizer(metadata: Mapping[str, Any], file: Path) -> dict[str, str]:
    """Return the files of the tokenizer; none if the file has no tokenizer."""
    get = lambda key: metadata.get(f"tokenizer.ggml.{key}")  # noqa: E731
    kind, words = get("model"), get("pre")
    if kind is None:
        return {}
    if kind != "gpt2" or words not in WORDS:
        raise ConfigError(
            f"{file}: its tokenizer ({kind}, {words}) is not supported in GGUF; there are gpt2 with {', '.join(WORDS)}. Use the model's folder of safetensors."
        )
    tokens, types = get("tokens"), get("token_type") or []
    coder = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, [tuple(merge.split(" ")) for merge in get("merges") or []]))
    coder.pre_tokenizer = _words(words)  # type: ignore[assignment]
    coder.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    special = [token for token, number in zip(tokens, types, strict=False) if number == _CONTROL]
    coder.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    coder.add_tokens([AddedToken(token, normalized=False) for token, number in zip(tokens, types, strict=False) if number == _USER_DEFINED])
    names = {"bos_token": get("bos_token_id"), "eos_token": get("eos_token_id"), "unk_token": get("unknown_token_id"), "pad_token": get("padding_token_id")}
    settings: dict[str, Any] = {name: tokens[number] for name, number in names.items() if number is not None}
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": bool(get("add_bos_token"))}
    if metadata.get("tokenizer.chat_template"):
        settings["chat_template"] = metadata["tokenizer.chat_template"]
    return {"tokenizer.json": coder.to_str(), "tokenizer_config.json": json.dumps(settings)}
