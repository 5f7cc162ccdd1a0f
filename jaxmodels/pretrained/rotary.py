"""Rotary positions in a config.json: base, scaling and the part of a head that they rotate."""

import math
from collections.abc import Collection, Mapping
from typing import Any

from jaxmodels.errors import ConfigError
from jaxmodels.pretrained.architecture import Keys

_ORIGINAL = "original_max_position_embeddings"
SCALING = {  # kind of scaling -> option here -> key of config.json
    "linear": {"factor": "factor"},
    "dynamic": {"factor": "factor"},
    "llama3": {"factor": "factor", "original_context": _ORIGINAL, "low_frequency": "low_freq_factor", "high_frequency": "high_freq_factor"},
    "yarn": {"factor": "factor", "original_context": _ORIGINAL, "fast": "beta_fast", "slow": "beta_slow"},
    "longrope": {"original_context": _ORIGINAL, "short": "short_factor", "long": "long_factor", "attention_factor": "attention_factor"},
}


def read(keys: Keys, base: float, *, kinds: Collection[str] = tuple(SCALING), original: int | None = None) -> dict[str, Any]:
    """Return the options `rotary_base` and `rotary_scaling`, from `rope_parameters` (newer files) or `rope_theta` and `rope_scaling` (older ones).

    Args:
      keys: of the config.json.
      base: the default of `rope_theta`.
      kinds: of scaling, that the architecture allows.
      original: context of pretraining, where a key of the architecture says it.
    """
    values = dict(keys.get("rope_parameters", None) or keys.get("rope_scaling", None) or {})
    keys.ignore("rope_scaling")
    return parse(keys, values, base, kinds, original)


def parse(keys: Keys, values: dict, base: float, kinds: Collection[str], original: int | None = None) -> dict[str, Any]:
    """Return the options of one set of rotary positions; arguments as in `read`, and the values of its key."""
    base = values.pop("rope_theta", None) or keys.get("rope_theta", None) or base
    kind = values.pop("rope_type", values.pop("type", "default"))
    values.pop("type", None)
    if kind == "default":
        _check(keys, values, "default", {})
        return {"rotary_base": float(base), "rotary_scaling": None}
    if kind not in kinds:
        raise ConfigError(f"{keys.where}: rope_type={kind!r} is not supported; it must be one of {', '.join(('default', *kinds))}.")
    names = SCALING[kind]
    context = keys.get("max_position_embeddings")
    if kind == "longrope":
        values[_ORIGINAL] = original or values.get(_ORIGINAL) or context
        factor = values.pop("factor", None) or context / values[_ORIGINAL]
        values["attention_factor"] = values.get("attention_factor") or _attention_factor(factor, values[_ORIGINAL])
    elif kind == "yarn":
        values.setdefault(_ORIGINAL, context)
    if lacking := [key for key in ("factor", "short_factor", "long_factor") if key in names.values() and values.get(key) is None]:
        raise ConfigError(f"{keys.where} lacks {lacking[0]!r} in the rotary positions ({kind}).")
    _check(keys, values, kind, names)
    scaling = {option: values[key] for option, key in names.items() if values.get(key) is not None}
    if kind == "dynamic":
        scaling["original_context"] = context  # `transformers` reads no other key for it
    return {"rotary_base": float(base), "rotary_scaling": {"kind": kind, **scaling}}


def _attention_factor(factor: float, original: int) -> float:
    """Return the factor of longrope that follows from the ratio of contexts (Ding et al. 2024)."""
    return 1.0 if factor <= 1 or original <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))


def _check(keys: Keys, values: Mapping, kind: str, names: Mapping) -> None:
    harmless = {"partial_rotary_factor": 1.0, "truncate": True, _ORIGINAL: values.get(_ORIGINAL)}
    for key, value in values.items():
        if key not in names.values() and value is not None and harmless.get(key) != value:
            raise ConfigError(f"{keys.where}: {key}={value!r} in the rotary positions ({kind}) changes what the model computes and is not supported.")


def write(options: Mapping) -> dict[str, Any]:
    """Return `rope_theta`, `rope_scaling` and `max_position_embeddings` of a model's options."""
    scaling, context = options["rotary_scaling"], options["context"]
    written = None
    if scaling is not None:
        written = {"rope_type": scaling["kind"]} | {key: scaling[option] for option, key in SCALING[scaling["kind"]].items() if option in scaling}
        written = {key: list(value) if isinstance(value, tuple) else value for key, value in written.items()}
        if scaling["kind"] == "dynamic":  # its frequencies change above this length
            context = scaling["original_context"]
        elif scaling["kind"] == "longrope" and scaling["attention_factor"] == _attention_factor(
            context / scaling["original_context"], scaling["original_context"]
        ):
            del written["attention_factor"]
    return {"rope_theta": options["rotary_base"], "rope_scaling": written, "max_position_embeddings": context}
