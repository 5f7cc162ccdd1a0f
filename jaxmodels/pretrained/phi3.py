"""Phi-3, Phi-3.5 and Phi-4-mini in the format of `transformers` (Abdin et al. 2024): Llama with fused matrices."""

from collections.abc import Mapping

from jaxmodels.pretrained import llama, rotary
from jaxmodels.pretrained.architecture import Keys
from jaxmodels.pretrained.mapping import Entry

_CONTEXT = "original_max_position_embeddings"


def _options(keys: Keys, names, name: str) -> dict:
    for key in ("resid_pdrop", "embd_pdrop"):
        keys.not_applied(key, "config.model.dropout sets it")
    keys.must("lm_head_bias", False, False)
    keys.ignore("auto_map", "full_attn_mod", "interpolate_factor", "partial_rotary_factor")  # of its first code; `transformers` reads only the last
    values = dict(keys.get("rope_parameters", None) or keys.get("rope_scaling", None) or {})
    fraction = values.pop("partial_rotary_factor", None) or keys.get("partial_rotary_factor", None) or 1.0
    for key in ("type", "rope_type"):  # earlier names
        if values.get(key) in ("su", "yarn"):
            values[key] = "longrope"
    scaling = rotary.parse(keys, values, 1e4, ("longrope",), keys.get(_CONTEXT, 4096))
    given = scaling | {"rotary_fraction": fraction, "window": keys.get("sliding_window", None), "layer_types": None}
    return llama.options(keys, names, name=name, epsilon=1e-5, given=given)


def _config(options: Mapping, name: str) -> dict:
    config = llama.config(options, name)
    scaling = options["rotary_scaling"]
    original = config["max_position_embeddings"] if scaling is None else scaling["original_context"]
    return config | {_CONTEXT: original, "partial_rotary_factor": options["rotary_fraction"], "sliding_window": options["window"]}


def _table(options: Mapping, name: str) -> list[Entry]:
    block, layer = "blocks/{layer}", "model.layers.{layer}"
    heads = options["heads"]
    groups = options["kv_heads"] or heads
    fused = {"attention/query": (0, heads), "attention/key": (heads, heads + groups), "attention/value": (heads + groups, heads + 2 * groups)}
    parts = {f"{block}/{path}/kernel": (f"{layer}.self_attn.qkv_proj.weight", (*share, heads + 2 * groups)) for path, share in fused.items()}
    parts |= {f"{block}/mlp/{side}/kernel": (f"{layer}.mlp.gate_up_proj.weight", (i, i + 1, 2)) for i, side in enumerate(("gate", "up"))}
    entries = [entry for entry in llama.table(options, name) if entry.path not in parts]
    return entries + [Entry(path, tensor, "transposed", part) for path, (tensor, part) in parts.items()]


PHI3 = llama.architecture("phi3", "Phi3", read=_options, write=_config, tensors=_table)
