"""Published sizes of decoders, as options of `transformer.Decoder`. `tests/models/test_transformer.py` holds their parameter counts."""

_GPT2 = {"context": 1024}
_LLAMA = {"positions": "rotary", "norm": "rms", "epsilon": 1e-5, "activation": "swiglu", "bias": False, "tie_embeddings": False}
_LLAMA3 = _LLAMA | {"kv_heads": 8, "rotary_base": 500000.0}
_LLAMA31 = _LLAMA3 | {"context": 131072, "rotary_scaling": {"kind": "llama3", "factor": 8.0, "original_context": 8192}}
_LLAMA32 = _LLAMA31 | {"rotary_scaling": {"kind": "llama3", "factor": 32.0, "original_context": 8192}, "tie_embeddings": True, "head_width": 64}
_QWEN25 = _LLAMA | {"context": 32768, "qkv_bias": True, "epsilon": 1e-6, "rotary_base": 1e6}
_QWEN3 = _LLAMA | {"context": 40960, "query_key_norm": True, "epsilon": 1e-6, "rotary_base": 1e6, "kv_heads": 8, "head_width": 128}
_TIED = {"tie_embeddings": True}
_SMOLLM3 = _LLAMA | _TIED | {"rotary_base": 5e6, "epsilon": 1e-6, "layer_types": ("global", "global", "global", "unrotated")}
_GEMMA = _LLAMA | _TIED | {"norm": "rms_plus_one", "activation": "geglu", "epsilon": 1e-6, "head_width": 256, "scales": {"embedding": "sqrt_width"}}
_GEMMA2 = _GEMMA | {"output_norm": True, "layer_types": ("local", "global"), "window": 4096, "context": 8192}
_GEMMA2 |= {"scales": {"embedding": "sqrt_width", "attention_cap": 50.0, "logits_cap": 30.0}}
_GEMMA3 = _GEMMA | {"output_norm": True, "query_key_norm": True, "layer_types": ("local",) * 5 + ("global",), "window": 512, "context": 32768}
_GEMMA3 |= {"rotary_base": 1e6, "local_rotary_base": 1e4}
_OLMO2 = _LLAMA | {"input_norm": False, "output_norm": True, "query_key_norm": "projection", "epsilon": 1e-6, "rotary_base": 5e5, "context": 4096}
_GRANITE3 = _LLAMA | _TIED | {"context": 4096}


def _size(layers: int, heads: int, width: int, mlp_width: int | None = None, kv_heads: int | None = None) -> dict:
    size = {"layers": layers, "heads": heads, "width": width, "mlp_width": mlp_width, "kv_heads": kv_heads}
    return {key: value for key, value in size.items() if value is not None}


DECODERS = {
    # Radford et al. 2019
    "gpt2": _GPT2 | _size(12, 12, 768),
    "gpt2-medium": _GPT2 | _size(24, 16, 1024),
    "gpt2-large": _GPT2 | _size(36, 20, 1280),
    "gpt2-xl": _GPT2 | _size(48, 25, 1600),
    # Brown et al. 2020
    "gpt3-175b": _size(96, 96, 12288) | {"context": 2048},
    # Touvron et al. 2023
    "llama2-7b": _LLAMA | _size(32, 32, 4096, 11008) | {"context": 4096},
    "llama2-13b": _LLAMA | _size(40, 40, 5120, 13824) | {"context": 4096},
    "llama2-70b": _LLAMA | _size(80, 64, 8192, 28672, 8) | {"context": 4096},
    # Grattafiori et al. 2024
    "llama3-8b": _LLAMA3 | _size(32, 32, 4096, 14336) | {"context": 8192},
    "llama3-70b": _LLAMA3 | _size(80, 64, 8192, 28672) | {"context": 8192},
    "llama3.1-8b": _LLAMA31 | _size(32, 32, 4096, 14336),
    "llama3.1-70b": _LLAMA31 | _size(80, 64, 8192, 28672),
    "llama3.1-405b": _LLAMA31 | _size(126, 128, 16384, 53248),
    "llama3.2-1b": _LLAMA32 | _size(16, 32, 2048, 8192),
    "llama3.2-3b": _LLAMA32 | _size(28, 24, 3072, 8192) | {"head_width": 128},
    # Jiang et al. 2023
    "mistral-7b": _LLAMA | _size(32, 32, 4096, 14336, 8) | {"context": 32768, "window": 4096},
    # Qwen Team 2024, 2025
    "qwen2.5-0.5b": _QWEN25 | _size(24, 14, 896, 4864, 2) | _TIED,
    "qwen2.5-1.5b": _QWEN25 | _size(28, 12, 1536, 8960, 2) | _TIED,
    "qwen2.5-3b": _QWEN25 | _size(36, 16, 2048, 11008, 2) | _TIED,
    "qwen2.5-7b": _QWEN25 | _size(28, 28, 3584, 18944, 4) | {"context": 131072},
    "qwen2.5-14b": _QWEN25 | _size(48, 40, 5120, 13824, 8) | {"context": 131072},
    "qwen2.5-32b": _QWEN25 | _size(64, 40, 5120, 27648, 8) | {"context": 131072},
    "qwen2.5-72b": _QWEN25 | _size(80, 64, 8192, 29568, 8) | {"context": 131072},
    "qwen3-0.6b": _QWEN3 | _size(28, 16, 1024, 3072) | _TIED,
    "qwen3-1.7b": _QWEN3 | _size(28, 16, 2048, 6144) | _TIED,
    "qwen3-4b": _QWEN3 | _size(36, 32, 2560, 9728) | _TIED,
    "qwen3-8b": _QWEN3 | _size(36, 32, 4096, 12288),
    "qwen3-14b": _QWEN3 | _size(40, 40, 5120, 17408),
    "qwen3-32b": _QWEN3 | _size(64, 64, 5120, 25600),
    # Hugging Face 2025
    "smollm3-3b": _SMOLLM3 | _size(36, 16, 2048, 11008, 4) | {"context": 65536},
    # Abdin et al. 2024
    "phi3-mini": _LLAMA | _size(32, 32, 3072, 8192) | {"context": 4096, "window": 2047},
    # Gemma Team 2024, 2024, 2025
    "gemma-2b": _GEMMA | _size(18, 8, 2048, 16384, 1) | {"context": 8192},
    "gemma-7b": _GEMMA | _size(28, 16, 3072, 24576) | {"context": 8192},
    "gemma2-2b": _GEMMA2 | _size(26, 8, 2304, 9216, 4),
    "gemma2-9b": _GEMMA2 | _size(42, 16, 3584, 14336, 8),
    "gemma2-27b": _GEMMA2 | _size(46, 32, 4608, 36864, 16) | {"head_width": 128, "scales": _GEMMA2["scales"] | {"attention": 144**-0.5}},
    "gemma3-270m": _GEMMA3 | _size(18, 4, 640, 2048, 1),
    "gemma3-1b": _GEMMA3 | _size(26, 4, 1152, 6912, 1),
    # OLMo Team 2025
    "olmo2-1b": _OLMO2 | _size(16, 16, 2048, 8192),
    "olmo2-7b": _OLMO2 | _size(32, 32, 4096, 11008),
    "olmo2-13b": _OLMO2 | _size(40, 40, 5120, 13824),
    # Granite Team 2024
    "granite-3-2b": _GRANITE3 | _size(40, 32, 2048, 8192, 8) | {"scales": {"embedding": 12.0, "attention": 0.015625, "residual": 0.22, "logits": 8.0}},
    "granite-3-8b": _GRANITE3 | _size(40, 32, 4096, 12800, 8) | {"scales": {"embedding": 12.0, "attention": 0.0078125, "residual": 0.22, "logits": 16.0}},
    # Jiang et al. 2024
    "mixtral-8x7b": _LLAMA | _size(32, 32, 4096, 14336, 8) | {"context": 32768, "rotary_base": 1e6, "moe": {"experts": 8, "top_k": 2}},
    "qwen3-30b-a3b": _QWEN3 | _size(48, 32, 2048, 768, 4) | {"moe": {"experts": 128, "top_k": 8}},
}
