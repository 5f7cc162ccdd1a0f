"""Limits of the values in a published `config.json`, which is untrusted: absurd sizes are refused before anything is computed from them."""

import math
from collections.abc import Mapping
from typing import Any

from jaxmodels.errors import ConfigError

# Keys of a config.json that are sizes -> the largest one accepted: far above any published model's, and far below what would take minutes to trace.
_LARGEST = {
    **dict.fromkeys(("num_hidden_layers", "num_layers", "num_decoder_layers", "n_layer"), 1_000),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "n_head", "num_heads", "num_local_experts", "num_experts", "num_experts_per_tok"), 1 << 14),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "embedding_size", "embed_dim", "head_dim", "d_kv"), 1 << 20),
    **dict.fromkeys(("intermediate_size", "n_inner", "d_ff", "moe_intermediate_size", "type_vocab_size", "num_labels"), 1 << 22),
    **dict.fromkeys(("vocab_size", "extra_ids"), 1 << 24),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "sliding_window", "original_max_position_embeddings"), 1 << 28),
    **dict.fromkeys(("image_size", "patch_size", "window_size"), 1 << 14),
    "num_channels": 64,
    # DistilBERT, ModernBERT, DeBERTa
    **dict.fromkeys(("n_layers", "global_attn_every_n_layers"), 1_000),
    **{"n_heads": 1 << 14, "dim": 1 << 20, "hidden_dim": 1 << 22, "pooler_hidden_size": 1 << 20, "position_buckets": 1 << 20, "local_attention": 1 << 28},
    **dict.fromkeys(("max_window_layers", "no_rope_layer_interval", "sliding_window_pattern", "_sliding_window_pattern"), 1_000),
    "query_pre_attn_scalar": 1 << 20,
}
_MAY_BE_ZERO = ("sliding_window", "max_window_layers", "type_vocab_size", "num_labels", "extra_ids")
_ABOVE_ZERO = ("layer_norm_eps", "layer_norm_epsilon", "rms_norm_eps", "rope_theta", "factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow")
_ABOVE_ZERO += ("norm_eps", "global_rope_theta", "local_rope_theta", "rope_local_base_freq", "attention_factor", "partial_rotary_factor")
_ABOVE_ZERO += ("final_logit_softcapping", "attn_logit_softcapping", "embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling")
_FRACTIONS = ("attention_dropout", "attention_probs_dropout_prob", "hidden_dropout_prob", "resid_pdrop", "attn_pdrop", "embd_pdrop", "dropout_rate")
_FRACTIONS += ("dropout", "embedding_dropout", "mlp_dropout", "pooler_dropout", "drop_path_rate")
_LISTS = {"architectures": str, "layer_types": str, "no_rope_layers": int, "hidden_sizes": int, "depths": int}
_MOST_STAGES = 16  # of a model of images
_MOST_RATIO = 1 << 10  # of the widths of a feed-forward


def check_values(values: Mapping[str, Any], where: str) -> None:
    """Check the values of a published config.json before anything is computed from them: types, and limits of sizes. null is a missing key.

    Raises:
      ConfigError: names the file, the key and what is allowed.
    """

    def refuse(key: str, value: Any, allowed: str):
        raise ConfigError(f"{where}: {key}={str(value)[:80]!r} is not {allowed}. Copy or download the file again.")

    lists = _LISTS | ({"num_heads": int} if isinstance(values.get("num_heads"), list) and "depths" in values else {})  # of each stage of a Swin
    for key, value in values.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is None:
            continue
        if key in _LARGEST and key not in lists:
            least = 0 if key in _MAY_BE_ZERO else 1
            sides = value if key == "image_size" and isinstance(value, list) and len(value) == 2 else [value]  # height and width
            if not all(type(side) is int and least <= side <= _LARGEST[key] for side in sides):
                refuse(key, value, f"a whole number from {least} to {_LARGEST[key]:,}")
        elif key in _ABOVE_ZERO and not (is_number and 0 < value < math.inf):
            refuse(key, value, "a number above 0")
        elif key in _FRACTIONS and not (is_number and 0 <= value < 1):
            refuse(key, value, "a fraction from 0 to below 1")
        elif key == "mlp_ratio" and not (is_number and 0 < value <= _MOST_RATIO):
            refuse(key, value, f"a number above 0, and at most {_MOST_RATIO:,}")
        elif key in lists and not (isinstance(value, list) and all(type(item) is lists[key] for item in value)):
            refuse(key, value, f"a list of {'texts' if lists[key] is str else 'whole numbers'}")
        elif key in ("hidden_sizes", "depths", "num_heads"):
            largest = _LARGEST[{"hidden_sizes": "hidden_size", "depths": "num_layers"}.get(key, key)]
            if not 1 <= len(value) <= _MOST_STAGES or not all(1 <= item <= largest for item in value):
                refuse(key, value, f"a list of 1 to {_MOST_STAGES} whole numbers from 1 to {largest:,}")
        elif key in ("short_factor", "long_factor"):
            if not isinstance(value, list) or not all(type(x) in (int, float) and 0 < x < math.inf for x in value):
                refuse(key, value, "a list of numbers above 0")
        elif key in ("rope_parameters", "rope_scaling", "id2label", "full_attention", "sliding_attention"):
            if not isinstance(value, dict):
                refuse(key, value, "an object")
            if key != "id2label":
                check_values(value, f"{where}: {key}")
        elif key in ("rope_type", "type") and not isinstance(value, str):
            refuse(key, value, "a text")
        elif key.endswith("_token_id"):
            ids = value if isinstance(value, list) else [value]
            if not all(type(number) is int and -1 <= number < _LARGEST["vocab_size"] for number in ids):
                refuse(key, value, "a token, a whole number")
