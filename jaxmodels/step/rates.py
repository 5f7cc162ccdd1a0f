"""Learning rates by parameter: factors by path, and by layer."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxmodels.errors import ConfigError
from jaxmodels.step.parameters import check_matches, check_pattern, path_name, paths


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerDecay:
    """The `optimizer.layer_decay` section: lower learning rates for lower layers (Howard and Ruder 2018; Clark et al. 2020).

    With n trained layers, layer i (from 0) has the factor rate^(n - i). Parameters that match `last` have the factor 1. All other
    parameters, which come before the layers, have the factor rate^(n + 1).

    Attributes:
      rate: above 0 and at most 1.
      layers: pattern on parameter paths with one group, the layer's number. Where the group is empty, the array holds all layers,
        stacked along its first axis.
      last: patterns on the paths of what follows the layers.
    """

    rate: float
    layers: str = r"blocks/(?:(\d+)/)?"
    last: tuple[str, ...] = (r"(^|/)head/", r"(^|/)final_norm/", r"^norm/", r"(^|/)output/")


Rates = tuple[tuple[Any, ...], ...]


def scale_updates(rates: Rates, layer_decay: LayerDecay | None) -> optax.GradientTransformation:
    """Return a transformation that multiplies each parameter's update with its factor."""
    return optax.stateless(
        lambda updates, params: jax.tree.map(lambda u, f: u * f.astype(u.dtype), updates, rate_factors(params, rates, layer_decay)),
    )


def rate_factors(params: Any, rates: Rates, layer_decay: LayerDecay | None) -> Any:
    """Return the factor of each parameter's learning rate: a tree of arrays that broadcast against the parameters."""

    def factor(path, x):
        name = path_name(path)
        own = next((float(value) for pattern, value in rates if re.search(pattern, name)), 1.0)
        by_layer = 1.0 if layer_decay is None else _layer_factor(name, x, layer_decay, count)
        return jnp.asarray(own * by_layer, jnp.float32)

    leaves = jax.tree_util.tree_leaves_with_path(params)
    count = _count_layers(leaves, layer_decay) if layer_decay is not None else 0
    return jax.tree_util.tree_map_with_path(factor, params)


def _count_layers(leaves, decay: LayerDecay) -> int:
    """Return the number of layers: the highest layer number plus 1, or the length of stacked arrays."""
    found = [(re.search(decay.layers, path_name(path)), x) for path, x in leaves]
    return max((x.shape[0] if match[1] is None else int(match[1]) + 1 for match, x in found if match), default=0)


def _layer_factor(name: str, x, decay: LayerDecay, count: int):
    match = re.search(decay.layers, name)
    if match and match[1] is None:
        return (decay.rate ** (count - np.arange(count, dtype=np.float32))).reshape(-1, *[1] * (x.ndim - 1))
    if match:
        return decay.rate ** (count - int(match[1]))
    return 1.0 if any(re.search(pattern, name) for pattern in decay.last) else decay.rate ** (count + 1)


def check(rates: Rates, decay: LayerDecay | None, params: Any) -> None:
    """Check factors and patterns against the trained parameters.

    Raises:
      ConfigError: a factor is not a number of at least 0, or a pattern matches no parameter.
    """
    for pair in rates:
        if len(pair) != 2 or not isinstance(pair[0], str) or isinstance(pair[1], bool) or not isinstance(pair[1], int | float) or pair[1] < 0:
            raise ConfigError(f"config.optimizer.rates holds pairs (pattern, factor), got {pair!r}.")
        check_matches("optimizer.rates", pair[0], params)
    if decay is None:
        return
    if not 0 < decay.rate <= 1:
        raise ConfigError(f"config.optimizer.layer_decay.rate must lie above 0 and be at most 1, got {decay.rate}.")
    for key, patterns in (("layers", (decay.layers,)), ("last", decay.last)):
        for pattern in patterns:
            check_pattern(f"optimizer.layer_decay.{key}", pattern)
    if re.compile(decay.layers).groups != 1:
        raise ConfigError(f"config.optimizer.layer_decay.layers: {decay.layers!r} must have one group, the number of the layer.")
    if twice := next((path for path in paths(params) if re.search(decay.layers + r"\d+/", path)), None):
        raise ConfigError(
            f"config.optimizer.layer_decay.layers: {twice} has more numbers than {decay.layers!r} has groups: extend the pattern to the number that counts layers."
        )
    check_matches("optimizer.layer_decay.layers", decay.layers, params)
