"""Classes and tags by name: those of the data, and those of the output layer that a run starts with.

An output layer is one number for each class, in an order. Where both sides name their classes, the layer is put in the order of the data.
"""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.errors import ConfigError
from jaxmodels.experiment.experiment import Experiment
from jaxmodels.runs.weights import Located, TransferReport

_OUTPUT = r"(^|/)output(_distilled)?/(kernel|bias)$"
_NUMBER = r"(LABEL_)?\d+"  # a name that says nothing


def compare(experiment: Experiment, located: Located, report: TransferReport, frozen: Mapping[str, Any]) -> tuple[dict[str, np.ndarray], list[str]]:
    """Compare the classes of the data with those of the weights.

    Args:
      experiment: has the data.
      located: the weights.
      report: which of them are taken.
      frozen: parameters that this run does not train, by path.

    Returns:
      Path of a parameter -> which of its last axis to take, in the order of the data's classes, if that is another order; and lines that say so.

    Raises:
      ConfigError: the classes differ; or a layer that is read from the parent at each start would have to be reordered.
    """
    key, ours = next(((key, experiment.dataset.info[key]) for key in ("labels", "tags") if experiment.dataset.info.get(key)), (None, None))
    taken = [path for path in (*report.taken, *report.renamed) if re.search(_OUTPUT, path)]
    if key is None or not taken:
        return {}, []
    theirs, what = _names(located, key), {"labels": "classes", "tags": "tags"}[key]
    if not theirs or list(theirs) == list(ours):
        return {}, [f"{what}: {_shown(ours)}, as in {located.name}"] if theirs else []
    if all(re.fullmatch(_NUMBER, name) for name in theirs) or all(re.fullmatch(_NUMBER, name) for name in ours):
        return {}, [f"warning: {what} are taken by number, because one side has no names: {_shown(ours)} here, {_shown(theirs)} in {located.name}"]
    places = _places(list(ours), list(theirs))
    if places is None:
        raise ConfigError(
            f"config.init_from: {located.name} has the {what} {_shown(theirs)}, the data {_shown(ours)}. Rename those of the data, or train a new "
            f"output layer: init_from.skip={list(dict.fromkeys(_pattern(path) for path in taken))}."
        )
    if wrong := [path for path in taken if path in frozen and experiment.frozen_in_parent]:
        raise ConfigError(
            f"config.data: the {what} of {located.name} are in the order {_shown(theirs)}, and {wrong[0]} stays in its checkpoint. Give the data the "
            f"same order, data.labels={list(theirs)}."
        )
    order = np.array(places)
    return dict.fromkeys(taken, order), [f"{what}: the output layer of {located.name} is reordered by name, from {_shown(theirs)} to {_shown(ours)}"]


def reorder(x: jax.Array, places: np.ndarray) -> jax.Array:
    """Return an array with the entries of its last axis in another order, in the same sharding."""
    return jax.jit(lambda x: jnp.take(x, places, axis=-1), out_shardings=x.sharding)(x)


def _places(ours: list[str], theirs: list[str]) -> list[int] | None:
    """Return the place in `theirs` of each of `ours`; None if they are not the same names, capitals aside."""
    for fold in (str, str.casefold):
        here, there = [fold(name) for name in ours], [fold(name) for name in theirs]
        if sorted(here) == sorted(there) and len(set(here)) == len(here):
            return [there.index(name) for name in here]
    return None


def _names(located: Located, key: str) -> list[str] | None:
    """Return the classes or tags of weights, in order; None if they are not known."""
    if located.folder is not None:
        return located.folder.manifest().get("info", {}).get(key)
    assert located.pretrained is not None
    names = located.pretrained.folder.config.get("id2label")
    return [str(names[number]) for number in sorted(names, key=int)] if isinstance(names, Mapping) and names else None


def _pattern(path: str) -> str:
    return path.rpartition("/")[0] + "/"


def _shown(names: Any) -> str:
    return ", ".join(list(names)[:12]) + (", …" if len(names) > 12 else "")
