"""DistilBERT (Sanh et al. 2019) in the format of `transformers`: BERT without token types, with a ReLU in its head for classes."""

from collections.abc import Callable, Mapping, Sequence

from jaxmodels.pretrained.architecture import Architecture, Keys, activation, linear, norm, their_activation
from jaxmodels.pretrained.mapping import Entry

_SIZES = {"layers": "n_layers", "heads": "n_heads", "width": "dim", "mlp_width": "hidden_dim", "context": "max_position_embeddings"}


def _options(keys: Keys, names: Callable[[], Sequence[str]]) -> dict:
    keys.must("tie_word_embeddings", True, True)
    keys.not_applied("attention_dropout", "attention weights have no dropout")
    # The table of positions is stored, sinusoidal or not; the heads have the dropout of the blocks.
    keys.ignore("sinusoidal_pos_embds", "tie_weights_", "seq_classif_dropout", "qa_dropout")
    return {option: keys.get(key) for option, key in _SIZES.items()} | {
        "types": 0,
        "positions": "learned",
        "norm": "layer",
        "epsilon": 1e-12,
        "post_norm": True,
        "activation": activation(keys, "activation", "gelu"),
        "head_activation": "relu",
        "bias": True,
        "pool": "first",
        "dropout": keys.get("dropout", 0.1),
    }


def _config(options: Mapping) -> dict:
    return {key: options[option] for option, key in _SIZES.items()} | {
        "hidden_dim": options["mlp_width"] or 4 * options["width"],
        "activation": their_activation(options["activation"]),
        "dropout": options["dropout"],
        "attention_dropout": 0.0,
        "tie_word_embeddings": True,
    }


def _table(options: Mapping) -> list[Entry]:
    block, layer, embeddings = "blocks/{layer}", "distilbert.transformer.layer.{layer}", "distilbert.embeddings"
    entries = [
        Entry("embed/embedding", f"{embeddings}.word_embeddings.weight"),
        Entry("positions/embedding", f"{embeddings}.position_embeddings.weight"),
        *norm("embedding_norm", f"{embeddings}.LayerNorm"),
    ]
    for name, theirs in (("query", "q_lin"), ("key", "k_lin"), ("value", "v_lin"), ("out", "out_lin")):
        entries += linear(f"{block}/attention/{name}", f"{layer}.attention.{theirs}")
    entries += norm(f"{block}/attention_norm", f"{layer}.sa_layer_norm")
    entries += linear(f"{block}/mlp/up", f"{layer}.ffn.lin1") + linear(f"{block}/mlp/down", f"{layer}.ffn.lin2")
    return entries + norm(f"{block}/mlp_norm", f"{layer}.output_layer_norm")


DISTILBERT = Architecture(
    name="distilbert",
    model="encoder",
    options=_options,
    config=_config,
    table=_table,
    heads={
        "tokens": [*linear("head/dense", "vocab_transform"), *norm("head/norm", "vocab_layer_norm"), Entry("head/bias", "vocab_projector.bias")],
        "class": [*linear("head/dense", "pre_classifier"), *linear("head/output", "classifier")],
        "tags": linear("head/output", "classifier"),
    },
    classes={
        "DistilBertForMaskedLM": "tokens",
        "DistilBertForSequenceClassification": "class",
        "DistilBertForTokenClassification": "tags",
        "DistilBertModel": None,
    },
    sizes=lambda options: {"layer": options["layers"]},
    prefix="distilbert.",
    ignored=(r"position_ids$", r"^vocab_projector\.weight$"),
    copies={"vocab_projector.weight": "distilbert.embeddings.word_embeddings.weight"},
    others=r"^(vocab_|pre_classifier|classifier|qa_outputs)",
)
