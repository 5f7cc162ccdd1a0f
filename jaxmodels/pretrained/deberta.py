"""DeBERTa-v3 (He et al. 2023), whose model_type is that of DeBERTa-v2 (He et al. 2021), in the format of `transformers`."""

from collections.abc import Callable, Mapping, Sequence

from jaxmodels.errors import ConfigError
from jaxmodels.pretrained.architecture import Architecture, Keys, activation, linear, norm, their_activation
from jaxmodels.pretrained.mapping import Entry

_SIZES = {"layers": "num_hidden_layers", "heads": "num_attention_heads", "width": "hidden_size", "mlp_width": "intermediate_size"}
_POOLED = {"gelu": "gelu_exact", "gelu_new": "gelu", "relu": "relu", "tanh": "tanh"}
_BOTH = ("p2c|c2p", "c2p|p2c", ["p2c", "c2p"], ["c2p", "p2c"])


def _options(keys: Keys, names: Callable[[], Sequence[str]]) -> dict:
    keys.must("relative_attention", False, True)
    keys.must("position_biased_input", True, False)
    keys.must("pos_att_type", None, *_BOTH)
    keys.must("share_att_key", False, True)
    keys.must("norm_rel_ebd", "none", "layer_norm")
    keys.must("conv_kernel_size", 0, 0)
    keys.must("tie_word_embeddings", True, True)
    sizes = {option: keys.get(key) for option, key in _SIZES.items()}
    for key in ("embedding_size", "pooler_hidden_size"):
        keys.must(key, sizes["width"], sizes["width"], None)
    keys.must("attention_head_size", None, None, sizes["width"] // sizes["heads"])
    keys.not_applied("attention_probs_dropout_prob", "attention weights have no dropout")
    keys.not_applied("pooler_dropout", "the input of the head has no dropout")
    if keys.get("hidden_dropout_prob", 0.1):
        keys.notes.append("hidden_dropout_prob is not applied to the embeddings of distances in training")
    # Both forms of the head for tokens compute the same: see `renames`.
    keys.ignore("legacy", "cls_dropout")
    context, longest = keys.get("max_position_embeddings"), keys.get("max_relative_positions", -1)
    if not isinstance(longest, int):
        raise ConfigError(f"{keys.where}: max_relative_positions={longest!r} is not supported; a whole number of tokens is.")
    return sizes | {
        "context": context,
        "types": keys.get("type_vocab_size", 0),
        "positions": "disentangled",
        "relative_buckets": keys.get("position_buckets"),
        "relative_distance": longest if longest > 0 else context,
        "norm": "layer",
        "epsilon": keys.get("layer_norm_eps", 1e-7),
        "post_norm": True,
        "activation": activation(keys, "hidden_act", "gelu"),
        "bias": True,
        "pool": "first",
        "head_activation": _POOLED[keys.must("pooler_hidden_act", "gelu", *_POOLED)],
        "dropout": keys.get("hidden_dropout_prob", 0.1),
    }


def _config(options: Mapping) -> dict:
    return {key: options[option] for option, key in _SIZES.items()} | {
        "intermediate_size": options["mlp_width"] or 4 * options["width"],
        "max_position_embeddings": options["context"],
        "max_relative_positions": options["relative_distance"],
        "position_buckets": options["relative_buckets"],
        "relative_attention": True,
        "position_biased_input": False,
        "pos_att_type": ["p2c", "c2p"],
        "share_att_key": True,
        "norm_rel_ebd": "layer_norm",
        "type_vocab_size": options["types"],
        "layer_norm_eps": options["epsilon"],
        "hidden_act": their_activation(options["activation"]),
        "pooler_hidden_act": next(name for name, ours in _POOLED.items() if ours == options["head_activation"]),
        "pooler_hidden_size": options["width"],
        "pooler_dropout": 0.0,
        "hidden_dropout_prob": options["dropout"],
        "attention_probs_dropout_prob": 0.0,
        "tie_word_embeddings": True,
        "pad_token_id": 0,
    }


def _table(options: Mapping) -> list[Entry]:
    block, layer, embeddings = "blocks/{layer}", "deberta.encoder.layer.{layer}", "deberta.embeddings"
    entries = [
        Entry("embed/embedding", f"{embeddings}.word_embeddings.weight"),
        *([Entry("types/embedding", f"{embeddings}.token_type_embeddings.weight")] if options["types"] else []),
        *norm("embedding_norm", f"{embeddings}.LayerNorm"),
        Entry("distances/embedding", "deberta.encoder.rel_embeddings.weight"),
        *norm("distances/norm", "deberta.encoder.LayerNorm"),
    ]
    for name in ("query", "key", "value"):
        entries += linear(f"{block}/attention/{name}", f"{layer}.attention.self.{name}_proj")
    entries += linear(f"{block}/attention/out", f"{layer}.attention.output.dense")
    entries += norm(f"{block}/attention_norm", f"{layer}.attention.output.LayerNorm")
    entries += linear(f"{block}/mlp/up", f"{layer}.intermediate.dense") + linear(f"{block}/mlp/down", f"{layer}.output.dense")
    return entries + norm(f"{block}/mlp_norm", f"{layer}.output.LayerNorm")


DEBERTA = Architecture(
    name="deberta-v2",
    model="encoder",
    options=_options,
    config=_config,
    table=_table,
    heads={
        "tokens": [
            *linear("head/dense", "cls.predictions.transform.dense"),
            *norm("head/norm", "cls.predictions.transform.LayerNorm"),
            Entry("head/bias", "cls.predictions.bias"),
        ],
        "class": [*linear("head/dense", "pooler.dense"), *linear("head/output", "classifier")],
        "tags": linear("head/output", "classifier"),
    },
    classes={
        "DebertaV2ForMaskedLM": "tokens",
        "DebertaV2ForSequenceClassification": "class",
        "DebertaV2ForTokenClassification": "tags",
        "DebertaV2Model": None,
    },
    sizes=lambda options: {"layer": options["layers"]},
    prefix="deberta.",
    # The authors' files name the head for tokens as `transformers` does with legacy=False. Exports have the names of its default, legacy=True.
    renames=((r"^lm_predictions\.lm_head\.bias$", "cls.predictions.bias"), (r"^lm_predictions\.lm_head\.", "cls.predictions.transform.")),
    ignored=(r"position_ids$", r"^cls\.predictions\.decoder\."),
    copies={"cls.predictions.decoder.weight": "deberta.embeddings.word_embeddings.weight", "cls.predictions.decoder.bias": "cls.predictions.bias"},
    others=r"^(cls|lm_predictions|mask_predictions|pooler|classifier|qa_outputs)\.",
)
