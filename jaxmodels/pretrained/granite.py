"""Granite 3 in the format of `transformers` (Granite Team 2024): Llama with factors on embeddings, attention, residuals and logits."""

import math
from collections.abc import Mapping

from jaxmodels.pretrained import llama
from jaxmodels.pretrained.architecture import Keys

_KEYS = {"embedding": "embedding_multiplier", "attention": "attention_multiplier", "residual": "residual_multiplier", "logits": "logits_scaling"}


def _options(keys: Keys, names, name: str) -> dict:
    options = llama.options(keys, names, name=name)
    scales = {part: float(keys.get(key, None) or 1.0) for part, key in _KEYS.items()}
    if scales["attention"] == 1 / math.sqrt(options["head_width"]):
        scales["attention"] = None
    return options | {"scales": scales}


def _config(options: Mapping, name: str) -> dict:
    config = llama.config(options, name)
    usual = {"embedding": 1.0, "attention": None, "residual": 1.0, "logits": 1.0}
    scales = usual | dict(options["scales"] or {})
    scales["attention"] = scales["attention"] or 1 / math.sqrt(config["head_dim"])
    return config | {key: scales[part] for part, key in _KEYS.items()}


GRANITE = llama.architecture("granite", "Granite", read=_options, write=_config)
