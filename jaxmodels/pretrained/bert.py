"""BERT (Devlin et al. 2019), RoBERTa (Liu et al. 2019) and XLM-R in the format of `transformers`."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from jaxmodels.errors import ConfigError
from jaxmodels.pretrained.architecture import Architecture, Keys, activation, linear, norm, their_activation
from jaxmodels.pretrained.mapping import Entry

_SIZES = {"layers": "num_hidden_layers", "heads": "num_attention_heads", "width": "hidden_size", "mlp_width": "intermediate_size"}


def _options(keys: Keys, names: Callable[[], Sequence[str]], offset: int) -> dict:
    keys.must("is_decoder", False, False)
    keys.must("add_cross_attention", False, False)
    keys.must("position_embedding_type", "absolute", "absolute")
    keys.must("tie_word_embeddings", True, True)
    keys.not_applied("attention_probs_dropout_prob", "attention weights have no dropout")
    keys.ignore("directionality", "pooler_fc_size", "pooler_num_attention_heads", "pooler_num_fc_layers", "pooler_size_per_head", "pooler_type")
    return {option: keys.get(key) for option, key in _SIZES.items()} | {
        "context": keys.get("max_position_embeddings") - offset,
        "position_offset": offset,
        "types": keys.get("type_vocab_size", 2),
        "positions": "learned",
        "norm": "layer",
        "epsilon": keys.get("layer_norm_eps", 1e-12),
        "post_norm": True,
        "activation": activation(keys, "hidden_act", "gelu"),
        "bias": True,
        "pool": "first",
        "dropout": keys.get("hidden_dropout_prob", 0.1),
    }


def _config(options: Mapping) -> dict:
    return {key: options[option] for option, key in _SIZES.items()} | {
        "intermediate_size": options["mlp_width"] or 4 * options["width"],
        "max_position_embeddings": options["context"] + options["position_offset"],
        "type_vocab_size": max(1, options["types"]),
        "layer_norm_eps": options["epsilon"],
        "hidden_act": their_activation(options["activation"]),
        "hidden_dropout_prob": options["dropout"],
        "attention_probs_dropout_prob": 0.0,
        "tie_word_embeddings": True,
    }


def _constants(prefix: str, options: Mapping) -> dict[str, np.ndarray]:
    """Return a zero token-type embedding for models without token types."""
    name = f"{prefix}.embeddings.token_type_embeddings.weight"
    return {} if options["types"] else {name: np.zeros((1, options["width"]), np.float32)}


def _table(prefix: str, options: Mapping) -> list[Entry]:
    block, layer = "blocks/{layer}", f"{prefix}.encoder.layer.{{layer}}"
    embeddings = f"{prefix}.embeddings"
    entries = [
        Entry("embed/embedding", f"{embeddings}.word_embeddings.weight"),
        Entry("positions/embedding", f"{embeddings}.position_embeddings.weight"),
        *([Entry("types/embedding", f"{embeddings}.token_type_embeddings.weight")] if options["types"] else []),
        *norm("embedding_norm", f"{embeddings}.LayerNorm"),
    ]
    for name in ("query", "key", "value"):
        entries += linear(f"{block}/attention/{name}", f"{layer}.attention.self.{name}")
    entries += linear(f"{block}/attention/out", f"{layer}.attention.output.dense")
    entries += norm(f"{block}/attention_norm", f"{layer}.attention.output.LayerNorm")
    entries += linear(f"{block}/mlp/up", f"{layer}.intermediate.dense")
    entries += linear(f"{block}/mlp/down", f"{layer}.output.dense")
    return entries + norm(f"{block}/mlp_norm", f"{layer}.output.LayerNorm")


def _bert_options(keys: Keys, names: Callable[[], Sequence[str]]) -> dict:
    return _options(keys, names, 0)


def _roberta_options(keys: Keys, names: Callable[[], Sequence[str]]) -> dict:
    keys.must("hidden_act", "gelu", "gelu")  # RoBERTa's masked-LM head uses GELU regardless of hidden_act
    padding = keys.get("pad_token_id", 1)
    if not isinstance(padding, int) or padding < 0:
        raise ConfigError(f"{keys.where}: pad_token_id={padding!r}: RoBERTa's positions begin after this token; it must be a whole number.")
    return _options(keys, names, padding + 1)


def _layers(options: Mapping) -> dict[str, int]:
    return {"layer": options["layers"]}


BERT = Architecture(
    name="bert",
    model="encoder",
    options=_bert_options,
    config=lambda options: _config(options) | {"pad_token_id": 0},
    table=functools.partial(_table, "bert"),
    constants=functools.partial(_constants, "bert"),
    heads={
        "tokens": [
            *linear("head/dense", "cls.predictions.transform.dense"),
            *norm("head/norm", "cls.predictions.transform.LayerNorm"),
            Entry("head/bias", "cls.predictions.bias"),
        ],
        "class": [*linear("head/dense", "bert.pooler.dense"), *linear("head/output", "classifier")],
        "tags": linear("head/output", "classifier"),
    },
    classes={
        "BertForMaskedLM": "tokens",
        "BertForPreTraining": "tokens",
        "BertForSequenceClassification": "class",
        "BertForTokenClassification": "tags",
        "BertModel": None,
    },
    sizes=_layers,
    prefix="bert.",
    renames=((r"\.gamma$", ".weight"), (r"\.beta$", ".bias")),
    ignored=(r"position_ids$", r"^cls\.predictions\.decoder\."),
    copies={"cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.bias": "cls.predictions.bias"},
    others=r"^(cls|classifier|bert\.pooler)\.",
)

ROBERTA = Architecture(
    name="roberta",
    model="encoder",
    options=_roberta_options,
    config=lambda options: _config(options) | {"pad_token_id": options["position_offset"] - 1},
    table=functools.partial(_table, "roberta"),
    constants=functools.partial(_constants, "roberta"),
    heads={
        "tokens": [*linear("head/dense", "lm_head.dense"), *norm("head/norm", "lm_head.layer_norm"), Entry("head/bias", "lm_head.bias")],
        "class": [*linear("head/dense", "classifier.dense"), *linear("head/output", "classifier.out_proj")],
        "tags": linear("head/output", "classifier"),
    },
    classes={
        "RobertaForMaskedLM": "tokens",
        "RobertaForSequenceClassification": "class",
        "RobertaForTokenClassification": "tags",
        "RobertaModel": None,
    },
    sizes=_layers,
    prefix="roberta.",
    renames=((r"\.gamma$", ".weight"), (r"\.beta$", ".bias")),
    ignored=(r"position_ids$", r"^lm_head\.decoder\."),
    copies={"lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight", "lm_head.decoder.bias": "lm_head.bias"},
    others=r"^(lm_head|classifier|roberta\.pooler)\.",
)

# XLM-R (Conneau et al. 2020) is RoBERTa with another vocabulary.
XLM_ROBERTA = dataclasses.replace(ROBERTA, name="xlm-roberta", classes={f"XLM{name}": head for name, head in ROBERTA.classes.items()})
