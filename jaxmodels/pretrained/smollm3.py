"""SmolLM3 in the format of `transformers`: Llama, in which every fourth layer has no rotary positions (Yang et al. 2025, arXiv 2501.18795)."""

from collections.abc import Mapping

from jaxmodels.errors import ConfigError
from jaxmodels.pretrained import llama, windows
from jaxmodels.pretrained.architecture import Keys


def _options(keys: Keys, names, name: str) -> dict:
    options = llama.options(keys, names, name=name, base=2e6, tied=True)
    layers, interval = options["layers"], keys.get("no_rope_layer_interval", None) or 4
    rotates = keys.get("no_rope_layers", None) or [int((i + 1) % interval != 0) for i in range(layers)]
    if len(rotates) < layers:
        raise ConfigError(f"{keys.where}: no_rope_layers lists {len(rotates)} layers, and num_hidden_layers={layers}.")
    layer_types = list(zip(windows.types_of(options), rotates[:layers], strict=True))
    if options["window"] is not None and (keys.get("layer_types", None) is None or any(kind == "local" and not r for kind, r in layer_types)):
        raise ConfigError(f"{keys.where}: use_sliding_window=True: layers with a window and without rotary positions are not supported.")
    return options | windows.of_types([kind if r else "unrotated" for kind, r in layer_types], options["window"])


def _config(options: Mapping, name: str) -> dict:
    types = windows.types_of(options)
    rotated = {"layer_types": tuple("global" if kind == "unrotated" else kind for kind in types)}
    return llama.config({**options, **rotated}, name) | {"no_rope_layers": [int(kind != "unrotated") for kind in types]}


SMOLLM3 = llama.architecture("smollm3", "SmolLM3", read=_options, write=_config)
