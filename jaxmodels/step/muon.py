"""Muon (Jordan et al. 2024): `optax.contrib.muon` for parameters that may be stacked by layer or expert.

Optax applies Muon to arrays of two dimensions and Adam to all others. With `model.scan=True` the blocks are stacked, so that a matrix
has three dimensions and a bias two. Here the axes `layers` and `experts` do not count: a stacked model gets the updates of its layers.
"""

import re
from collections.abc import Mapping
from typing import Any

import jax
import optax
from optax import contrib

from jaxmodels.errors import ConfigError
from jaxmodels.parallel.sharding import is_stacked
from jaxmodels.step.parameters import matches, path_name

# Keys of the section that `optax.contrib.muon` does not have: name -> (type, default).
KEYS = {"adam_parameters": (tuple[str, ...], ())}
# Arguments of `optax.contrib.muon` that are functions of the parameters, and so no keys of a config.
SET_HERE = ("muon_weight_dimension_numbers",)

_EXPERTS = re.compile(r"(^|/)experts/")


def make_muon(arguments: Mapping[str, Any], learning_rate: float, schedule: optax.Schedule, weight_decay: float, mask) -> optax.GradientTransformation:
    """Return Muon for matrices, Adam for the other parameters, and weight decay by path for both.

    Args:
      arguments: keys of the section. `adam_parameters`: patterns; matrices whose path matches one are updated by Adam, as is usual
        for embeddings and the output layer. `adam_learning_rate`: the peak for Adam, on the same schedule. `adam_weight_decay`: for
        the parameters that Adam updates. The others are arguments of `optax.contrib.muon`.
      learning_rate: peak of `schedule`.
      schedule: step -> learning rate.
      weight_decay: for the parameters that Muon updates.
      mask: params -> tree of bools, whether a parameter is decayed.
    """
    arguments = dict(arguments)
    by_adam = tuple(arguments.pop("adam_parameters", ()))
    ratio = (arguments.pop("adam_learning_rate", None) or learning_rate) / learning_rate
    adam_decay = arguments.pop("adam_weight_decay", 0.0)

    def dimensions(params):
        return jax.tree_util.tree_map_with_path(lambda path, x: _dimensions(path_name(path), x, by_adam), params)

    def decayed(muon: bool):
        # The tree of dimensions has None for Adam's parameters, so that trees cannot be mapped together.
        def chosen(path, x):
            return (_dimensions(path_name(path), x, by_adam) is not None) == muon

        return lambda params: jax.tree.map(lambda a, b: a and b, mask(params), jax.tree_util.tree_map_with_path(chosen, params))

    # Optax's muon decays Adam's parameters without a mask. So it runs at the rate -1 (its updates keep their sign), and decay follows.
    updates = contrib.muon(-1.0, adam_learning_rate=-ratio, muon_weight_dimension_numbers=dimensions, **arguments)
    return optax.chain(
        updates,
        optax.add_decayed_weights(weight_decay, decayed(True)),
        optax.add_decayed_weights(adam_decay * ratio, decayed(False)),
        optax.scale_by_learning_rate(schedule),
    )


def _dimensions(path: str, x: jax.Array, by_adam: tuple[str, ...]) -> contrib.MuonDimensionNumbers | None:
    """Return the axes of a matrix, or None for a parameter that Adam updates."""
    stacked = is_stacked(path) + bool(_EXPERTS.search(path))
    if matches(by_adam, path) or x.ndim != stacked + 2:
        return None
    return contrib.MuonDimensionNumbers(reduction_axis=x.ndim - 2, output_axis=x.ndim - 1)


def check(arguments: Mapping[str, Any], params: Any) -> None:
    """Check the section's keys against the trained parameters.

    Raises:
      ConfigError: no parameter is a matrix, so that Muon would update nothing.
    """
    by_adam = tuple(arguments.get("adam_parameters", ()))
    leaves = jax.tree_util.tree_leaves_with_path(params)
    if all(_dimensions(path_name(path), x, by_adam) is None for path, x in leaves):
        raise ConfigError("config.optimizer.name: 'muon' updates matrices, and no trained parameter is one; use 'adamw'.")
