"""Attention windows in a config.json: of all layers, or of those that `layer_types` names."""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxmodels.errors import ConfigError
from jaxmodels.pretrained.architecture import Keys

TYPES = {"full_attention": "global", "sliding_attention": "local"}  # of config.json -> ours


def read(keys: Keys, kinds: Sequence[str], window: int | None, *, own_positions: bool = False) -> dict[str, Any]:
    """Return the options `window` and `layer_types`.

    Args:
      keys: of the config.json.
      kinds: type of each layer unless the key `layer_types` lists them, as in `TYPES`.
      window: of sliding layers.
      own_positions: whether sliding layers have rotary positions of their own, so that they are `local` also where all layers slide.

    Raises:
      ConfigError: `layer_types` has another type, or another number of layers; or sliding layers lack a window.
    """
    kinds = keys.get("layer_types", None) or list(kinds)
    if unknown := sorted(set(kinds) - set(TYPES)):
        raise ConfigError(f"{keys.where}: layer_types={unknown}: this type of layer is not supported; there are {', '.join(TYPES)}.")
    if len(kinds) != keys.get("num_hidden_layers"):
        raise ConfigError(f"{keys.where}: layer_types lists {len(kinds)} layers, and num_hidden_layers={keys.get('num_hidden_layers')}.")
    if window is None and "sliding_attention" in kinds:
        raise ConfigError(f"{keys.where}: layer_types has sliding_attention, but sliding_window is missing or off (use_sliding_window).")
    options = of_types([TYPES[kind] for kind in kinds], window)
    return options | {"layer_types": ("local",)} if own_positions and set(kinds) == {"sliding_attention"} else options


def of_types(types: Sequence[str], window: int | None) -> dict[str, Any]:
    """Return the options `window` and `layer_types` of layers of those types: the shortest pattern that repeats; none if all layers are alike."""
    if set(types) <= {"global"}:
        return {"window": None, "layer_types": None}
    if set(types) == {"local"}:
        return {"window": window, "layer_types": None}
    length = next(n for n in range(1, len(types) + 1) if all(kind == types[i % n] for i, kind in enumerate(types)))
    return {"window": window if "local" in types else None, "layer_types": tuple(types[:length])}


def types_of(options: Mapping) -> list[str]:
    """Return the type of every layer of a model, by its options."""
    pattern = options["layer_types"] or ["global" if options["window"] is None else "local"]
    return [pattern[i % len(pattern)] for i in range(options["layers"])]


def write(options: Mapping) -> dict[str, Any]:
    """Return `sliding_window` and `layer_types` of a model's options."""
    theirs = {ours: name for name, ours in TYPES.items()}
    return {"sliding_window": options["window"], "layer_types": [theirs.get(kind, kind) for kind in types_of(options)]}
