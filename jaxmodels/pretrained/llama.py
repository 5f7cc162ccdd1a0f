"""Llama 2 and 3, Mistral, Ministral, Qwen 2.5 and 3, Mixtral and Qwen3-MoE in the format of `transformers`."""

import functools
import types
from collections.abc import Callable, Mapping, Sequence

from jaxmodels.errors import ConfigError
from jaxmodels.pretrained import rotary, windows
from jaxmodels.pretrained.architecture import Architecture, Keys, linear, norm
from jaxmodels.pretrained.mapping import Entry

# Architectures whose config.json may give layers of both types; `transformers` ignores `layer_types` in the others.
_BOTH_TYPES = ("qwen2", "qwen3", "ministral", "smollm3")
_ATTENTION_BIAS = ("llama", "qwen3", "qwen3_moe", "smollm3", "gemma", "gemma2", "gemma3_text", "olmo2", "granite")
_MLP_BIAS = ("llama", "smollm3", "granite")


def _windows(keys: Keys, name: str, default: int | None) -> dict:
    """Return the options `window` and `layer_types`."""
    layers, window = keys.get("num_hidden_layers"), keys.get("sliding_window", default)
    if not keys.get("use_sliding_window", name in ("mistral", "ministral", "mixtral")):
        window = None
    first = keys.get("max_window_layers", None)
    first = (28 if name in ("qwen2", "qwen3") else 0) if first is None else first
    if name not in _BOTH_TYPES:
        kinds = set(keys.get("layer_types", None) or ())
        if len(kinds) > 1 or kinds - set(windows.TYPES):
            raise ConfigError(
                f"{keys.where}: layer_types={sorted(kinds)}: layers with different attention are not supported in {name}; they are in {', '.join(_BOTH_TYPES)}."
            )
        return {"window": None if kinds == {"full_attention"} else window, "layer_types": None}
    return windows.read(keys, ["sliding_attention" if window is not None and i >= first else "full_attention" for i in range(layers)], window)


def options(
    keys: Keys,
    names: Callable[[], Sequence[str]],
    *,
    name: str,
    base: float = 10000.0,
    epsilon: float = 1e-6,
    window: int | None = None,
    qkv_bias: bool = False,
    query_key_norm: bool = False,
    experts: str | None = None,
    tied: bool = False,
    given: Mapping = types.MappingProxyType({}),
) -> dict:
    """Return the options of our model; also for the architectures that differ in a few of them.

    Args:
      keys, names: as in `Architecture.options`.
      name: of the architecture.
      base, epsilon, window, tied: defaults of keys.
      qkv_bias: whether queries, keys and values have a bias in any case.
      query_key_norm: as in `transformer.Decoder`.
      experts: whose keys of mixtures of experts to read.
      given: options that the architecture reads itself.
    """
    if "activation" not in given:
        keys.must("hidden_act", "silu", "silu")
    keys.not_applied("attention_dropout", "attention weights have no dropout")
    keys.ignore("pretraining_tp")
    bias = keys.must("attention_bias", False, False, *([True] if name in _ATTENTION_BIAS else []))
    mlp_bias = keys.must("mlp_bias", False, False, *([True] if name in _MLP_BIAS else []))
    width, heads = keys.get("hidden_size"), keys.get("num_attention_heads")
    result = {
        "context": keys.get("max_position_embeddings"),
        "layers": keys.get("num_hidden_layers"),
        "heads": heads,
        "width": width,
        "kv_heads": keys.get("num_key_value_heads", None) or heads,
        "head_width": keys.get("head_dim", None) or width // heads,
        "mlp_width": keys.get("intermediate_size"),
        "positions": "rotary",
        **({} if "rotary_base" in given else rotary.read(keys, base)),
        **({} if "window" in given else _windows(keys, name, window)),
        "norm": "rms",
        "epsilon": keys.get("rms_norm_eps", epsilon),
        "input_norm": True,
        "output_norm": False,
        "activation": "swiglu",
        "bias": bias,
        "qkv_bias": qkv_bias or bias,
        "mlp_bias": mlp_bias,
        "query_key_norm": query_key_norm,
        "tie_embeddings": keys.get("tie_word_embeddings", tied),
        "dropout": 0.0,
        "moe": None,
        **given,
    }
    if experts == "mixtral":
        keys.ignore("router_jitter_noise")
        result["moe"] = {"experts": keys.get("num_local_experts", 8), "top_k": keys.get("num_experts_per_tok", 2), "normalize": True}
    elif experts == "qwen3_moe":
        keys.must("decoder_sparse_step", 1, 1)
        keys.must("mlp_only_layers", [], [], None)
        count = keys.get("num_experts", None) or keys.get("num_local_experts", 128)
        keys.ignore("num_local_experts")
        result["moe"] = {"experts": count, "top_k": keys.get("num_experts_per_tok", 8), "normalize": keys.get("norm_topk_prob", False)}
        result["mlp_width"] = keys.get("moe_intermediate_size", 768)
    return result


def _mlp_bias(options: Mapping) -> bool:
    return options["bias"] if options["mlp_bias"] is None else options["mlp_bias"]


def config(options: Mapping, name: str) -> dict:
    """Return the config.json of our model's options."""
    heads, width = options["heads"], options["width"]
    config = {
        "num_hidden_layers": options["layers"],
        "num_attention_heads": heads,
        "hidden_size": width,
        "num_key_value_heads": options["kv_heads"] or heads,
        "head_dim": options["head_width"] or width // heads,
        "intermediate_size": options["mlp_width"] or 4 * width,
        **rotary.write(options),
        "rms_norm_eps": options["epsilon"],
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "tie_word_embeddings": options["tie_embeddings"],
    }
    if name in ("mistral", "mixtral"):
        config["sliding_window"] = options["window"]
    elif name in _BOTH_TYPES and options["window"] is not None:
        config |= windows.write(options) | ({} if name == "ministral" else {"use_sliding_window": True})
    elif name in _BOTH_TYPES:
        config["sliding_window"] = None
    if name == "qwen3_moe" and options["window"] is not None:
        config |= {"sliding_window": options["window"], "use_sliding_window": True}
    if name in _ATTENTION_BIAS:
        config["attention_bias"] = options["bias"]
    if name in _MLP_BIAS:
        config["mlp_bias"] = _mlp_bias(options)
    if name == "mixtral" and options["moe"]:
        config |= {"num_local_experts": options["moe"]["experts"], "num_experts_per_tok": options["moe"]["top_k"]}
    if name == "qwen3_moe" and options["moe"]:
        config |= {"num_experts": options["moe"]["experts"], "num_experts_per_tok": options["moe"]["top_k"]}
        config |= {"norm_topk_prob": options["moe"]["normalize"], "moe_intermediate_size": config["intermediate_size"]}
    return config


def _norms(options: Mapping) -> dict[str, str]:
    """Return our name of a block's norm -> theirs."""
    before = {"attention_norm": "input_layernorm", "mlp_norm": "pre_feedforward_layernorm" if options["output_norm"] else "post_attention_layernorm"}
    after = {"attention_output_norm": "post_attention_layernorm", "mlp_output_norm": "post_feedforward_layernorm"}
    return (before if options["input_norm"] else {}) | (after if options["output_norm"] else {})


def table(options: Mapping, name: str) -> list[Entry]:
    """Return the table of tensors."""
    block, layer = "blocks/{layer}", "model.layers.{layer}"
    entries = [
        Entry("embed/embedding", "model.embed_tokens.weight"),
        *(entry for ours, theirs in _norms(options).items() for entry in norm(f"{block}/{ours}", f"{layer}.{theirs}", bias=False)),
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
            entries += linear(f"{block}/mlp/{side}", f"{layer}.mlp.{side}_proj", bias=_mlp_bias(options))
        return entries
    if name == "mixtral":
        home, sides = f"{layer}.block_sparse_moe", {"gate": "w1", "down": "w2", "up": "w3"}
    else:
        home, sides = f"{layer}.mlp", {side: f"{side}_proj" for side in ("gate", "up", "down")}
    entries += linear(f"{block}/mlp/router", f"{home}.gate", bias=False)
    return entries + [Entry(f"{block}/mlp/experts/{side}/kernel", f"{home}.experts.{{expert}}.{matrix}.weight", "transposed") for side, matrix in sides.items()]


def _sizes(options: Mapping) -> dict[str, int]:
    return {"layer": options["layers"], "expert": options["moe"]["experts"] if options["moe"] else 0}


def architecture(name: str, prefix: str, *, read: Callable = options, write: Callable = config, tensors: Callable = table, **defaults) -> Architecture:
    """Return an architecture; `prefix` of its classes, `defaults` of its keys. Those that differ in more have their own `options`, `config` or `table`."""
    return Architecture(
        name=name,
        model="gpt",
        options=functools.partial(read, name=name, **defaults),
        config=functools.partial(write, name=name),
        table=functools.partial(tensors, name=name),
        heads={"": []},
        classes={f"{prefix}ForCausalLM": "", f"{prefix}Model": ""},
        sizes=_sizes,
        prefix="model.",
        ignored=(r"rotary_emb\.inv_freq$", r"^lm_head\.weight$"),
        copies={"lm_head.weight": "model.embed_tokens.weight"},
        others=r"^(lm_head|score)\.",
        head_paths=("output/",),
    )


LLAMA = architecture("llama", "Llama")
MISTRAL = architecture("mistral", "Mistral", window=4096)
MINISTRAL = architecture("ministral", "Ministral", window=4096)
QWEN2 = architecture("qwen2", "Qwen2", qkv_bias=True)
QWEN3 = architecture("qwen3", "Qwen3", query_key_norm=True)
MIXTRAL = architecture("mixtral", "Mixtral", base=1e6, epsilon=1e-5, experts="mixtral")
QWEN3_MOE = architecture("qwen3_moe", "Qwen3Moe", query_key_norm=True, experts="qwen3_moe")
