"""Gemma 1, 2 and 3 (text) in the format of `transformers` (Gemma Team 2024, 2024, 2025)."""

import dataclasses
from collections.abc import Mapping

from jaxmodels.pretrained import llama, rotary, windows
from jaxmodels.pretrained.architecture import Keys
from jaxmodels.pretrained.rotary import SCALING

_GELU = "gelu_pytorch_tanh"


def _options(keys: Keys, names, name: str) -> dict:
    keys.must("use_bidirectional_attention", None, None, False)
    # Gemma 1 was published with the name of the exact function, and computes the approximate one.
    keys.must("hidden_act", _GELU, _GELU, "gelu")
    keys.must("hidden_activation", _GELU, _GELU, *([None] if name == "gemma" else []))
    keys.ignore("cache_implementation")
    scales = {"embedding": "sqrt_width"}
    given = {"activation": "geglu", "norm": "rms_plus_one", "output_norm": name != "gemma", "query_key_norm": name == "gemma3_text", "scales": scales}
    given["head_width"] = keys.get("head_dim", None) or 256
    if name != "gemma":
        given |= _windows(keys, name)
        scales["logits_cap"] = keys.get("final_logit_softcapping", 30.0 if name == "gemma2" else None)
    if name == "gemma2":
        scales["attention_cap"] = keys.get("attn_logit_softcapping", 50.0)
    if name == "gemma3_text":
        given |= _rotary(keys)
        keys.ignore("attn_logit_softcapping")  # without effect in `transformers`
    options = llama.options(keys, names, name=name, tied=True, given=given)
    if name != "gemma" and (scalar := keys.get("query_pre_attn_scalar", None) or 256) != options["head_width"]:
        scales["attention"] = scalar**-0.5
    return options


def _windows(keys: Keys, name: str) -> dict:
    """Return the options `window` and `layer_types`: every second layer of Gemma 2 sees all positions, and every sixth of Gemma 3."""
    every = 2 if name == "gemma2" else keys.get("sliding_window_pattern", None) or keys.get("_sliding_window_pattern", None) or 6
    keys.ignore("sliding_window_pattern", "_sliding_window_pattern")
    kinds = ["sliding_attention" if (i + 1) % every else "full_attention" for i in range(keys.get("num_hidden_layers"))]
    return windows.read(keys, kinds, keys.get("sliding_window", 4096), own_positions=name == "gemma3_text")


def _rotary(keys: Keys) -> dict:
    """Return the options of rotary positions, which differ between layers of Gemma 3."""
    values, older = dict(keys.get("rope_parameters", None) or {}), dict(keys.get("rope_scaling", None) or {})
    globally, locally = ({**(values.pop(kind, None) or {})} for kind in ("full_attention", "sliding_attention"))
    local = rotary.parse(keys, {"rope_theta": keys.get("rope_local_base_freq", 1e4)} | locally, 1e4, ())
    return rotary.parse(keys, globally | older | values, 1e6, tuple(SCALING)) | {"local_rotary_base": local["rotary_base"]}


def _config(options: Mapping, name: str) -> dict:
    config = llama.config(options, name)
    if name == "gemma":
        return config | {"hidden_act": _GELU}
    del config["hidden_act"]
    scales = dict(options["scales"] or {})
    scale = scales.get("attention")
    config |= {"hidden_activation": _GELU, "query_pre_attn_scalar": config["head_dim"] if scale is None else round(scale**-2)}
    config["final_logit_softcapping"] = scales.get("logits_cap")
    if name == "gemma2":
        config["attn_logit_softcapping"] = scales.get("attention_cap")
    else:
        own = options["layer_types"] is not None and options["local_rotary_base"]
        config["rope_local_base_freq"] = own or options["rotary_base"]
    return config | windows.write(options)


GEMMA = llama.architecture("gemma", "Gemma", read=_options, write=_config)
GEMMA2 = llama.architecture("gemma2", "Gemma2", read=_options, write=_config)
GEMMA3 = dataclasses.replace(
    llama.architecture("gemma3_text", "Gemma3", read=_options, write=_config), classes={"Gemma3ForCausalLM": "", "Gemma3TextModel": ""}
)
