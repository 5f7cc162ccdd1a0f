"""Pretrained architectures, and a strict reader of `config.json`."""

import dataclasses
import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxmodels import config as config_lib
from jaxmodels.errors import ConfigError
from jaxmodels.pretrained.mapping import Entry

# `model_type` of a config.json -> its architecture.
ARCHITECTURES = {
    "bert": "jaxmodels.pretrained.bert:BERT",
    "roberta": "jaxmodels.pretrained.bert:ROBERTA",
    "xlm-roberta": "jaxmodels.pretrained.bert:XLM_ROBERTA",
    "distilbert": "jaxmodels.pretrained.distilbert:DISTILBERT",
    "modernbert": "jaxmodels.pretrained.modernbert:MODERNBERT",
    "deberta-v2": "jaxmodels.pretrained.deberta:DEBERTA",
    "gpt2": "jaxmodels.pretrained.gpt2:GPT2",
    "llama": "jaxmodels.pretrained.llama:LLAMA",
    "mistral": "jaxmodels.pretrained.llama:MISTRAL",
    "ministral": "jaxmodels.pretrained.llama:MINISTRAL",
    "qwen2": "jaxmodels.pretrained.llama:QWEN2",
    "qwen3": "jaxmodels.pretrained.llama:QWEN3",
    "mixtral": "jaxmodels.pretrained.llama:MIXTRAL",
    "qwen3_moe": "jaxmodels.pretrained.llama:QWEN3_MOE",
    "smollm3": "jaxmodels.pretrained.smollm3:SMOLLM3",
    "phi3": "jaxmodels.pretrained.phi3:PHI3",
    "gemma": "jaxmodels.pretrained.gemma:GEMMA",
    "gemma2": "jaxmodels.pretrained.gemma:GEMMA2",
    "gemma3_text": "jaxmodels.pretrained.gemma:GEMMA3",
    "olmo2": "jaxmodels.pretrained.olmo2:OLMO2",
    "granite": "jaxmodels.pretrained.granite:GRANITE",
    "t5": "jaxmodels.pretrained.t5:T5",
    "mt5": "jaxmodels.pretrained.t5:MT5",
    "vit": "jaxmodels.pretrained.vit:VIT",
    "deit": "jaxmodels.pretrained.vit:DEIT",
    "dinov2": "jaxmodels.pretrained.dinov2:DINOV2",
    "swin": "jaxmodels.pretrained.swin:SWIN",
    "resnet": "jaxmodels.pretrained.resnet:RESNET",
    "convnext": "jaxmodels.pretrained.convnext:CONVNEXT",
}

# Keys of a config.json that do not change what a model computes: names, token ids, settings of training and generation.
HARMLESS = {
    *("architectures", "model_type", "transformers_version", "torch_dtype", "dtype", "_name_or_path", "_model_name_or_path", "_commit_hash", "tokenizer_class"),
    *("use_cache", "initializer_range", "initializer_factor", "gradient_checkpointing", "torchscript", "return_dict", "output_past"),
    *("output_attentions", "output_hidden_states", "output_router_logits", "router_aux_loss_coef", "use_return_dict", "is_encoder_decoder"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "cls_token_id", "mask_token_id", "decoder_start_token_id"),
    *("id2label", "label2id", "num_labels", "problem_type", "finetuning_task", "task_specific_params", "classifier_dropout"),
    *("unsloth_version", "unsloth_fixed", "is_llama_config", "transformers.js_config", "tokenizer_padding_side", "padding_side", "model_max_length"),
    *("_flash_attn_2_enabled", "_attn_implementation", "_attn_implementation_internal", "unk_token_id", "license", "tags", "output_scores"),
    *("vocab_size", "chunk_size_feed_forward", "language", "prefix", "name_or_path", "_attn_implementation_autoset", "attn_implementation"),
    *("max_length", "min_length", "do_sample", "num_beams", "temperature", "top_k", "top_p", "typical_p", "repetition_penalty"),
    *("length_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences", "early_stopping"),
    *("num_beam_groups", "diversity_penalty", "forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values", "suppress_tokens"),
    *("begin_suppress_tokens", "exponential_decay_length_penalty", "return_dict_in_generate", "tf_legacy_loss", "use_bfloat16"),
}


class Keys:
    """A reader of config.json that raises an error for keys that were neither read nor ignored.

    Attributes:
      notes: differences from the file that do not change the result of evaluation.
    """

    def __init__(self, values: Mapping[str, Any], where: str):
        """`where` names the file, for errors."""
        self.values, self.where = values, where
        self.notes: list[str] = []
        self._read: set[str] = set()

    def get(self, key: str, *default: Any) -> Any:
        """Return the value of a key; without a default the key is required."""
        self._read.add(key)
        if self.values.get(key) is None and not default:
            raise ConfigError(f"{self.where} lacks {key!r}, which sets a size of the model.")
        return self.values.get(key, *default)

    def must(self, key: str, default: Any, *allowed: Any) -> Any:
        """Return the value of a key; ConfigError unless it is one of `allowed`."""
        value = self.get(key, default)
        if value not in allowed:
            shown = " or ".join(repr(a) for a in allowed)
            raise ConfigError(f"{self.where}: {key}={value!r} changes what the model computes, and is not supported; only {shown} is.")
        return value

    def ignore(self, *keys: str) -> None:
        """Mark keys as read, without effect."""
        self._read.update(keys)

    def not_applied(self, key: str, what: str) -> None:
        """Note a dropout rate that our models lack; it matters in training only."""
        if self.get(key, 0.0):
            self.notes.append(f"{key}={self.values[key]} is not applied in training: {what}")

    def finish(self) -> None:
        """Raise ConfigError for keys that were not read."""
        unknown = [key for key, value in self.values.items() if key not in self._read | HARMLESS and value not in (None, False, {}, [], "")]
        if unknown:
            shown = ", ".join(f"{key}={self.values[key]!r}"[:80] for key in unknown)
            raise ConfigError(
                f"{self.where} sets {shown}: this key is unknown and may change what the model computes. If it does not, accept it by name: "
                f"hf:MODEL?accept={','.join(unknown)}."
            )

    def accept(self, *keys: str) -> None:
        """Mark keys as read, without effect, because the user says so; ConfigError for one that the file does not set."""
        for key in keys:
            if key not in self.values:
                raise ConfigError(f"?accept={key}: {self.where} has no such key.{config_lib.suggest(key, self.values)}")
            self.notes.append(f"{key}={self.values[key]!r} is not read, as asked")
        self.ignore(*keys)


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A pretrained architecture.

    Attributes:
      name: its `model_type`.
      model: name of our model.
      options: (keys of the config.json, function that returns the names of the tensors) -> options of our model.
      config: options of our model -> keys of the config.json.
      table: options of our model -> table without the head.
      heads: kind of head -> its table: `tokens`, `class`, `tags`; "" for models with one head, and those of which another head is an extension.
      classes: class name in `architectures` -> kind of its head; None without a head.
      sizes: options of our model -> numbers of values of `{layer}` and `{expert}`.
      prefix: of the base model's tensors; absent if the base model was saved alone.
      renames: (pattern, replacement), from tensor names of older files to current ones.
      ignored: patterns on names of redundant tensors: copies and constants.
      copies: tensor that older files repeat -> the one it is a copy of. Where they differ, the model has both: see `weights.locate`.
      others: pattern on names of head tensors, which are dropped if our model has another head.
      head_paths: prefixes of the paths of our head's parameters.
      constants: options of our model -> tensors that `transformers` expects and our model lacks.
      images: whether the model reads images.
    """

    name: str
    model: str
    options: Callable[[Keys, Callable[[], Sequence[str]]], dict]
    config: Callable[[Mapping], dict]
    table: Callable[[Mapping], list[Entry]]
    heads: Mapping[str, list[Entry]]
    classes: Mapping[str, str | None]
    sizes: Callable[[Mapping], dict[str, int]]
    prefix: str = ""
    renames: tuple[tuple[str, str], ...] = ()
    ignored: tuple[str, ...] = ()
    copies: Mapping[str, str] = dataclasses.field(default_factory=dict)
    others: str = r"^$"
    head_paths: tuple[str, ...] = ("head/",)
    constants: Callable[[Mapping], dict[str, np.ndarray]] = lambda options: {}
    images: bool = False

    def entries(self, options: Mapping, head: str) -> list[Entry]:
        """Return the table of a model with this kind of head."""
        return self.table(options) + list(self.heads[head])

    def class_of(self, head: str) -> str:
        """Return the class name in `architectures` with this kind of head."""
        return next(name for name, kind in self.classes.items() if kind == head)

    def head_in(self, paths: Iterable[str], likely: str | None = None) -> str:
        """Return the kind of head of a model with these parameters; `likely` decides between kinds that have the same."""
        if "" in self.heads:
            paths = set(paths)
            fitting = [kind for kind, entries in self.heads.items() if paths.issuperset(entry.path for entry in entries)]
            return max(fitting, key=lambda kind: len(self.heads[kind]), default="")
        names = {path.split("/")[1] for path in paths if path.startswith("head/")}
        kinds = [kind for kind, entries in self.heads.items() if {entry.path.split("/")[1] for entry in entries} == names]
        if kinds:
            return likely if likely in kinds else kinds[0]
        return "tokens" if "norm" in names else "class" if "dense" in names else "tags"


def find(config: Mapping, where: str) -> Architecture:
    """Return the architecture of a config.json.

    Raises:
      ConfigError: it is not supported; lists those that are.
    """
    name = config.get("model_type")
    if name == "gemma3":
        raise ConfigError(
            f"{where}: model_type='gemma3' holds a text and an image model; only the text model is supported: model_type='gemma3_text', "
            "which Gemma3ForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER) of `transformers` writes."
        )
    if not isinstance(name, str) or name not in ARCHITECTURES:
        hint = config_lib.suggest(str(name), ARCHITECTURES)
        raise ConfigError(f"{where}: model_type={name!r} is not supported; there are {', '.join(ARCHITECTURES)}.{hint}")
    return load(name)


def load(name: str) -> Architecture:
    """Import a supported architecture."""
    module, _, attribute = ARCHITECTURES[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


ACTIVATIONS = {"gelu": "gelu_exact", "gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "relu": "relu"}


def activation(keys: Keys, key: str, default: str) -> str:
    """Return our name of an activation without a gate."""
    return ACTIVATIONS[keys.must(key, default, *ACTIVATIONS)]


def their_activation(name: str) -> str:
    """Return the name of an activation in a config.json."""
    return next(key for key, activation in ACTIVATIONS.items() if activation == name)


def linear(path: str, tensor: str, *, bias: bool = True, form: str = "transposed") -> list[Entry]:
    """Return the entries of a linear layer."""
    entries = [Entry(f"{path}/kernel", f"{tensor}.weight", form)]
    return entries + ([Entry(f"{path}/bias", f"{tensor}.bias")] if bias else [])


def norm(path: str, tensor: str, *, bias: bool = True) -> list[Entry]:
    """Return the entries of a normalisation."""
    return [Entry(f"{path}/scale", f"{tensor}.weight")] + ([Entry(f"{path}/bias", f"{tensor}.bias")] if bias else [])
