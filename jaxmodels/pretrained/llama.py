"""Llama 2 and 3, Mistral, Qwen 2.5 and 3, Mixtral and Qwen3-MoE in the format of `transformers`."""

import functools
from collections.abc import Callable, Mapping, Sequence

from jaxmodels.errors import ConfigError
from jaxmodels.pretrained.architecture import Architecture, Keys, linear, norm
from jaxmodels.pretrained.mapping import Entry

_SCALING = {  # option here -> key of config.json
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "original_context": "original_max_position_embeddings",
        "low_frequency": "low_freq_factor",
        "high_frequency": "high_freq_factor",
    },
    "yarn": {"factor": "factor", "original_context": "original_max_position_embeddings", "fast": "beta_fast", "slow": "beta_slow"},
}


def _rotary(keys: Keys, base: float) -> dict:
    """Return base and scaling of rotary positions, from `rope_parameters` (newer files) or `rope_theta` and `rope_scaling` (older ones)."""
    values = dict(keys.get("rope_parameters", None) or keys.get("rope_scaling", None) or {})
    keys.ignore("rope_scaling")
    base = values.pop("rope_theta", None) or keys.get("rope_theta", None) or base
    kind = values.pop("rope_type", values.pop("type", "default"))
    values.pop("type", None)
    if kind == "default":
        _check_rotary(keys, values, "default", {})
        return {"rotary_base": float(base), "rotary_scaling": None}
    if kind not in _SCALING:
        raise ConfigError(f"{keys.where}: rope_type={kind!r} is not supported; it must be one of default, {', '.join(_SCALING)}.")
    names = _SCALING[kind]
    if kind == "yarn":
        values.setdefault("original_max_position_embeddings", keys.get("max_position_embeddings"))
    _check_rotary(keys, values, kind, names)
    scaling = {option: values[key] for option, key in names.items() if values.get(key) is not None}
    return {"rotary_base": float(base), "rotary_scaling": {"kind": kind, **scaling}}


def _check_rotary(keys: Keys, values: Mapping, kind: str, names: Mapping) -> None:
    unused = "original_max_position_embeddings"
    harmless = {"partial_rotary_factor": 1.0, "truncate": True, unused: values.get(unused)}
    for key, value in values.items():
        if key not in names.values() and value is not None and harmless.get(key) != value:
            raise ConfigError(f"{keys.where}: {key}={value!r} in the rotary positions ({kind}) changes what the model computes and is not supported.")


def _window(keys: Keys, default: int | None) -> int | None:
    """Return the attention window of all layers, or None."""
    window = keys.get("sliding_window", default)
    if not keys.get("use_sliding_window", keys.values.get("model_type") in ("mistral", "mixtral")):
        window = None
    keys.ignore("max_window_layers")
    kinds = set(keys.get("layer_types", None) or ())
    if len(kinds) > 1 or kinds - {"full_attention", "sliding_attention"}:
        raise ConfigError(f"{keys.where}: layer_types={sorted(kinds)}: layers with different attention are not supported.")
    if window is not None and not kinds and keys.values.get("max_window_layers"):
        raise ConfigError(f"{keys.where}: max_window_layers: layers with different attention are not supported.")
    return None if kinds == {"full_attention"} else window


def _options(
    keys: Keys,
    names: Callable[[], Sequence[str]],
    *,
    base: float = 10000.0,
    epsilon: float = 1e-6,
    window: int | None = None,
    qkv_bias: bool = False,
    query_key_norm: bool = False,
    experts: str | None = None,
) -> dict:
    keys.must("hidden_act", "silu", "silu")
    keys.not_applied("attention_dropout", "attention weights have no dropout")
    keys.ignore("pretraining_tp")
    bias = keys.must("attention_bias", False, False, True)
    if bias != keys.must("mlp_bias", False, False, True):
        raise ConfigError(f"{keys.where}: attention_bias={bias} and mlp_bias={not bias}: different values are not supported.")
    width, heads = keys.get("hidden_size"), keys.get("num_attention_heads")
    options = {
        "context": keys.get("max_position_embeddings"),
        "layers": keys.get("num_hidden_layers"),
        "heads": heads,
        "width": width,
        "kv_heads": keys.get("num_key_value_heads", None) or heads,
        "head_width": keys.get("head_dim", None) or width // heads,
        "mlp_width": keys.get("intermediate_size"),
        "positions": "rotary",
        **_rotary(keys, base),
        "window": _window(keys, window),
        "norm": "rms",
        "epsilon": keys.get("rms_norm_eps", epsilon),
        "activation": "swiglu",
        "bias": bias,
        "qkv_bias": qkv_bias or bias,
        "query_key_norm": query_key_norm,
        "tie_embeddings": keys.get("tie_word_embeddings", False),
        "dropout": 0.0,
        "moe": None,
    }
    if experts == "mixtral":
        keys.ignore("router_jitter_noise")
        options["moe"] = {"experts": keys.get("num_local_experts", 8), "top_k": keys.get("num_experts_per_tok", 2), "normalize": True}
    elif experts == "qwen3_moe":
        keys.must("decoder_sparse_step", 1, 1)
        keys.must("mlp_only_layers", [], [], None)
        count = keys.get("num_experts", None) or keys.get("num_local_experts", 128)
        keys.ignore("num_local_experts")
        options["moe"] = {"experts": count, "top_k": keys.get("num_experts_per_tok", 8), "normalize": keys.get("norm_topk_prob", False)}
        options["mlp_width"] = keys.get("moe_intermediate_size", 768)
    return options


def _config(options: Mapping, name: str) -> dict:
    scaling = options["rotary_scaling"]
    if scaling is not None:
        scaling = {"rope_type": scaling["kind"]} | {key: scaling[option] for option, key in _SCALING[scaling["kind"]].items() if option in scaling}
    heads, width = options["heads"], options["width"]
    config = {
        "max_position_embeddings": options["context"],
        "num_hidden_layers": options["layers"],
        "num_attention_heads": heads,
        "hidden_size": width,
        "num_key_value_heads": options["kv_heads"] or heads,
        "head_dim": options["head_width"] or width // heads,
        "intermediate_size": options["mlp_width"] or 4 * width,
        "rope_theta": options["rotary_base"],
        "rope_scaling": scaling,
        "rms_norm_eps": options["epsilon"],
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "tie_word_embeddings": options["tie_embeddings"],
    }
    window = options["window"]
    if name in ("mistral", "mixtral"):
        config["sliding_window"] = window
    elif name.startswith("qwen") and window is not None:
        config |= {"sliding_window": window, "use_sliding_window": True, "layer_types": ["sliding_attention"] * options["layers"]}
    if name == "llama":
        config |= {"attention_bias": options["bias"], "mlp_bias": options["bias"]}
    if name == "mixtral" and options["moe"]:
        config |= {"num_local_experts": options["moe"]["experts"], "num_experts_per_tok": options["moe"]["top_k"]}
    if name == "qwen3_moe" and options["moe"]:
        config |= {"num_experts": options["moe"]["experts"], "num_experts_per_tok": options["moe"]["top_k"]}
        config |= {"norm_topk_prob": options["moe"]["normalize"], "moe_intermediate_size": config["intermediate_size"]}
    return config


def _table(options: Mapping, name: str) -> list[Entry]:
    block, layer = "blocks/{layer}", "model.layers.{layer}"
    entries = [
        Entry("embed/embedding", "model.embed_tokens.weight"),
        *norm(f"{block}/attention_norm", f"{layer}.input_layernorm", bias=False),
        *norm(f"{block}/mlp_norm", f"{layer}.post_attention_layernorm", bias=False),
        *norm("final_norm", "model.norm", bias=False),
        *linear(f"{block}/attention/out", f"{layer}.self_attn.o_proj", bias=options["bias"]),
    ]
    for matrix, letter in (("query", "q"), ("key", "k"), ("value", "v")):
        bias = options["bias"] if options["qkv_bias"] is None else options["qkv_bias"]
        entries += linear(f"{block}/attention/{matrix}", f"{layer}.self_attn.{letter}_proj", bias=bias)
        if options["query_key_norm"] and matrix != "value":
            entries += norm(f"{block}/attention/{matrix}_norm", f"{layer}.self_attn.{letter}_norm", bias=False)
    if not options["tie_embeddings"]:
        entries.append(Entry("output/kernel", "lm_head.weight", "transposed"))
    if options["moe"] is None:
        for side in ("gate", "up", "down"):
            entries += linear(f"{block}/mlp/{side}", f"{layer}.mlp.{side}_proj", bias=options["bias"])
        return entries
    if name == "mixtral":
        home, sides = f"{layer}.block_sparse_moe", {"gate": "w1", "down": "w2", "up": "w3"}
    else:
        home, sides = f"{layer}.mlp", {side: f"{side}_proj" for side in ("gate", "up", "down")}
    entries += linear(f"{block}/mlp/router", f"{home}.gate", bias=False)
    return entries + [Entry(f"{block}/mlp/experts/{side}/kernel", f"{home}.experts.{{expert}}.{matrix}.weight", "transposed") for side, matrix in sides.items()]


def _sizes(options: Mapping) -> dict[str, int]:
    return {"layer": options["layers"], "expert": options["moe"]["experts"] if options["moe"] else 0}


def _architecture(name: str, prefix: str, **defaults) -> Architecture:
    return Architecture(
        name=name,
        model="gpt",
        options=functools.partial(_options, **defaults),
        config=functools.partial(_config, name=name),
        table=functools.partial(_table, name=name),
        heads={"": []},
        classes={f"{prefix}ForCausalLM": "", f"{prefix}Model": ""},
        sizes=_sizes,
        prefix="model.",
        ignored=(r"rotary_emb\.inv_freq$", r"^lm_head\.weight$"),
        copies={"lm_head.weight": "model.embed_tokens.weight"},
        others=r"^(lm_head|score)\.",
        head_paths=("output/",),
    )


LLAMA = _architecture("llama", "Llama")
MISTRAL = _architecture("mistral", "Mistral", window=4096)
QWEN2 = _architecture("qwen2", "Qwen2", qkv_bias=True)
QWEN3 = _architecture("qwen3", "Qwen3", query_key_norm=True)
MIXTRAL = _architecture("mixtral", "Mixtral", base=1e6, epsilon=1e-5, experts="mixtral")
QWEN3_MOE = _architecture("qwen3_moe", "Qwen3Moe", query_key_norm=True, experts="qwen3_moe")
