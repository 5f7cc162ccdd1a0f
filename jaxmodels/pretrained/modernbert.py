"""ModernBERT (Warner et al. 2024) in the format of `transformers`."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from jaxmodels.errors import ConfigError
from jaxmodels.pretrained import windows
from jaxmodels.pretrained.architecture import Architecture, Keys, linear, norm
from jaxmodels.pretrained.mapping import Entry

_SIZES = {"layers": "num_hidden_layers", "heads": "num_attention_heads", "width": "hidden_size", "mlp_width": "intermediate_size"}
_BASES = {"full_attention": ("global_rope_theta", 160000.0), "sliding_attention": ("local_rope_theta", 10000.0)}
_BIASES = ("norm_bias", "attention_bias", "mlp_bias", "classifier_bias")
_IGNORED = ("position_embedding_type", "layer_norm_eps", "deterministic_flash_attn", "reference_compile", "repad_logits_with_grad")
_IGNORED += ("sparse_prediction", "sparse_pred_ignore_index", "initializer_cutoff_factor")


def _options(keys: Keys, names: Callable[[], Sequence[str]]) -> dict:
    keys.must("tie_word_embeddings", True, True)
    keys.must("hidden_activation", "gelu", "gelu")
    keys.must("classifier_activation", "gelu", "gelu")
    keys.must("decoder_bias", True, True)
    for key in _BIASES:
        keys.must(key, False, False)
    keys.not_applied("attention_dropout", "attention has no dropout")
    keys.not_applied("mlp_dropout", "the hidden layer of feed-forwards has no dropout")
    keys.ignore(*_IGNORED)
    sizes = {option: keys.get(key) for option, key in _SIZES.items()}
    around = keys.get("local_attention", 128)
    base, local_base = _rotary_bases(keys).values()
    if not isinstance(around, int):
        raise ConfigError(f"{keys.where}: local_attention={around!r} is not supported; a whole number of tokens is.")
    seen = _windows(keys, around // 2 + 1)  # a window of 128 is 64 tokens on each side, and ours counts the token itself
    return sizes | {
        "context": keys.get("max_position_embeddings"),
        "types": 0,
        "positions": "rotary",
        "rotary_base": base,
        "local_rotary_base": local_base if seen["window"] is not None and local_base != base else None,
        **seen,
        "norm": "layer",
        "epsilon": keys.get("norm_eps", 1e-5),
        "post_norm": False,
        "embedding_norm": True,
        "activation": "geglu_exact",
        "bias": False,
        "pool": {"cls": "first", "mean": "mean"}[keys.must("classifier_pooling", "cls", "cls", "mean")],
        "head_activation": "gelu_exact",
        "head_norm": True,
        "dropout": keys.get("embedding_dropout", 0.0),
    }


def _windows(keys: Keys, window: int) -> dict:
    """Return the options `window` and `layer_types`: every third layer sees all positions."""
    every = keys.get("global_attn_every_n_layers", 3)
    if not isinstance(every, int):
        raise ConfigError(f"{keys.where}: global_attn_every_n_layers={every!r} is not supported; a whole number of layers is.")
    kinds = ["sliding_attention" if i % every else "full_attention" for i in range(keys.get("num_hidden_layers"))]
    return windows.read(keys, kinds, window, own_positions=True)


def _rotary_bases(keys: Keys) -> dict[str, float]:
    """Return the base of rotary positions of each type of layers, from rope_parameters or the keys of older files."""
    keys.must("rope_scaling", None, None)
    given = keys.get("rope_parameters", None) or {}
    if set(given) - set(_BASES):
        raise ConfigError(f"{keys.where}: rope_parameters={str(given)[:80]} is not supported; bases for {' and '.join(_BASES)} are.")
    bases = {}
    for kind, (old, default) in _BASES.items():
        own = given.get(kind) or {}
        if own.get("rope_type", "default") != "default" or own.keys() - {"rope_type", "rope_theta"}:
            raise ConfigError(f"{keys.where}: rope_parameters={str(given)[:80]} is not supported; only rope_type='default' with a rope_theta is.")
        bases[kind] = own.get("rope_theta") or keys.get(old, default) or default
    return bases


def _config(options: Mapping) -> dict:
    own = options["layer_types"] is not None and options["local_rotary_base"]
    bases = {"full_attention": options["rotary_base"], "sliding_attention": own or options["rotary_base"]}
    return {key: options[option] for option, key in _SIZES.items()} | {
        "intermediate_size": options["mlp_width"] or 4 * options["width"],
        "max_position_embeddings": options["context"],
        "layer_types": windows.write(options)["layer_types"],
        "local_attention": 2 * ((options["window"] or 65) - 1) or 1,
        "rope_parameters": {kind: {"rope_type": "default", "rope_theta": base} for kind, base in bases.items()},
        "norm_eps": options["epsilon"],
        **dict.fromkeys(_BIASES, False),
        "hidden_activation": "gelu",
        "classifier_activation": "gelu",
        "classifier_pooling": {"first": "cls", "mean": "mean"}[options["pool"]],
        "decoder_bias": True,
        "embedding_dropout": options["dropout"],
        "tie_word_embeddings": True,
        "pad_token_id": 0,
    }


def _table(options: Mapping) -> list[Entry]:
    block, layer = "blocks/{layer}", "model.layers.{layer}"
    entries = [
        Entry("embed/embedding", "model.embeddings.tok_embeddings.weight"),
        *norm("embedding_norm", "model.embeddings.norm", bias=False),
        # The first attention has none: its input is the normalized embedding.
        *(dataclasses.replace(entry, first=1) for entry in norm(f"{block}/attention_norm", f"{layer}.attn_norm", bias=False)),
        *norm(f"{block}/mlp_norm", f"{layer}.mlp_norm", bias=False),
        *linear(f"{block}/attention/out", f"{layer}.attn.Wo", bias=False),
        *linear(f"{block}/mlp/down", f"{layer}.mlp.Wo", bias=False),
        *norm("final_norm", "model.final_norm", bias=False),
    ]
    fused = {"attn.Wqkv": ("attention/query", "attention/key", "attention/value"), "mlp.Wi": ("mlp/gate", "mlp/up")}
    for tensor, paths in fused.items():
        for i, path in enumerate(paths):
            entries.append(Entry(f"{block}/{path}/kernel", f"{layer}.{tensor}.weight", "transposed", (i, i + 1, len(paths))))
    return entries


_HIDDEN = linear("head/dense", "head.dense", bias=False) + norm("head/norm", "head.norm", bias=False)

MODERNBERT = Architecture(
    name="modernbert",
    model="encoder",
    options=_options,
    config=_config,
    table=_table,
    heads={
        "tokens": [*_HIDDEN, Entry("head/bias", "decoder.bias")],
        "class": [*_HIDDEN, *linear("head/output", "classifier")],
        "tags": [*_HIDDEN, *linear("head/output", "classifier")],
    },
    classes={
        "ModernBertForMaskedLM": "tokens",
        "ModernBertForSequenceClassification": "class",
        "ModernBertForTokenClassification": "tags",
        "ModernBertModel": None,
    },
    sizes=lambda options: {"layer": options["layers"]},
    prefix="model.",
    ignored=(r"^decoder\.weight$",),
    copies={"decoder.weight": "model.embeddings.tok_embeddings.weight"},
    others=r"^(head|decoder|classifier)\.",
)
