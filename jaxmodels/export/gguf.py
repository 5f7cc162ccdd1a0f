"""Export a decoder as a GGUF file, for llama.cpp and the programs built on it."""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxmodels.errors import ConfigError, optional_import
from jaxmodels.export.transformers import export_run
from jaxmodels.pretrained import gguf as gguf_lib
from jaxmodels.pretrained import safetensors
from jaxmodels.pretrained.folder import whole_folder
from jaxmodels.storage import paths
from jaxmodels.storage.paths import BucketPath

FILE = "model.gguf"
TYPES = {"float16": "F16", "q8_0": "Q8_0"}
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4  # types of tokens


def export_gguf(run: str, output: str, *, dtype: str | None = None) -> Path | BucketPath:
    """Write a run's weights (the EMA if the run keeps one), with adapters merged, sizes and tokenizer as `output/model.gguf`.

    Args:
      run: as for `export_run`.
      output: a folder that does not exist or is empty.
      dtype: of the matrices: `float16`, the default, or `q8_0`, eight bits in blocks of 32. Norms and biases are float32.

    Returns:
      The folder.

    Raises:
      ConfigError: as `export_run`; the model or its tokenizer has no equivalent in GGUF; the package `gguf` is missing.
    """
    if dtype not in (None, *TYPES):
        raise ConfigError(f"--dtype={dtype}: with --format=gguf it must be one of {', '.join(TYPES)}.")
    gguf = optional_import("gguf", "gguf")
    with tempfile.TemporaryDirectory() as temporary:
        exported = Path(str(export_run(run, f"{temporary}/model", dtype="float32", shard_gb=1e6)))
        config = json.loads((exported / "config.json").read_text(encoding="utf-8"))
        kind = config["model_type"]
        if kind not in gguf_lib.ARCHITECTURES or config.get("rope_scaling") or config.get("sliding_window"):
            raise ConfigError(
                f"{run}: a model of the type {kind!r} with these options cannot be written as GGUF; there are {', '.join(gguf_lib.ARCHITECTURES)}."
            )
        with whole_folder(output) as target:
            writer = gguf.GGUFWriter(target / FILE, kind, use_temp_file=True)
            _add_config(writer, config)
            _add_tokenizer(writer, exported, run)
            for name, tensor in safetensors.read_header(exported / "model.safetensors").items():
                _add_tensor(gguf, writer, name, tensor.view(), config, TYPES[dtype or "float16"])
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
    return paths.parse(output).expanduser().absolute()


def _add_config(writer: Any, config: Mapping[str, Any]) -> None:
    width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    for option, key in gguf_lib.SIZES.items():
        add = writer.add_float32 if isinstance(config[option], float) else writer.add_uint32
        add(f"{config['model_type']}.{key}", config[option])
    for key in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
        writer.add_uint32(f"{config['model_type']}.{key}", width)
    writer.add_uint32(f"{config['model_type']}.vocab_size", config["vocab_size"])


def _add_tensor(gguf: Any, writer: Any, name: str, values: np.ndarray, config: Mapping[str, Any], type_name: str) -> None:
    kind, new = gguf.GGMLQuantizationType, gguf_lib.their_name(name)
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}.get(new.split(".")[2] if new.startswith("blk.") else "")
    values = np.asarray(values, np.float32)
    if heads and config["model_type"] == "llama":
        values = gguf_lib.pairs(values, heads)
    if values.ndim == 1:
        writer.add_tensor(new, values)
    elif type_name == "Q8_0" and values.shape[-1] % 32 == 0:
        writer.add_tensor(new, gguf.quants.quantize(values, kind.Q8_0), raw_dtype=kind.Q8_0)
    else:
        writer.add_tensor(new, values.astype(np.float16))


def _add_tokenizer(writer: Any, folder: Path, run: str) -> None:
    """Add the tokenizer of an exported folder, if it has one."""
    if not (folder / "tokenizer.json").is_file():
        return
    values = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    words = gguf_lib.words_of(values.get("pre_tokenizer"))
    if values["model"]["type"] != "BPE" or words is None or values.get("normalizer"):
        raise ConfigError(f"{run}: its tokenizer has no equivalent in GGUF: byte-level BPE with the words of {', '.join(gguf_lib.WORDS)}.")
    names = {number: token for token, number in values["model"]["vocab"].items()}
    types = dict.fromkeys(names, _NORMAL)
    for added in values.get("added_tokens", []):
        names[added["id"]] = added["content"]
        types[added["id"]] = _CONTROL if added["special"] else _USER_DEFINED
    if sorted(names) != list(range(len(names))):
        raise ConfigError(f"{run}: the ids of its tokens have gaps, which GGUF cannot hold.")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(words)
    writer.add_token_list([names[i] for i in range(len(names))])
    writer.add_token_types([types[i] for i in range(len(names))])
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in values["model"]["merges"]])
    of = {token: number for number, token in names.items()}
    for key, add in (("bos", writer.add_bos_token_id), ("eos", writer.add_eos_token_id), ("unk", writer.add_unk_token_id), ("pad", writer.add_pad_token_id)):
        token = settings.get(f"{key}_token")
        token = token.get("content") if isinstance(token, dict) else token
        if token in of:
            add(of[token])
    writer.add_add_bos_token(bool(settings.get("add_bos_token", False)))
    template = folder / "chat_template.jinja"
    if settings.get("chat_template") or template.is_file():
        writer.add_chat_template(template.read_text(encoding="utf-8") if template.is_file() else settings["chat_template"])
