"""Locate and read the weights of a run, and match them with another model.

A run that freezes parameters of its parent saves only what it trains. The other parameters are read from the checkpoints of its parent, or of
that run's parent.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from jaxmodels.errors import ConfigError
from jaxmodels.models.functional import flatten, unflatten
from jaxmodels.models.lora import ADAPTERS
from jaxmodels.pretrained import peft, peft_folder
from jaxmodels.pretrained import weights as pretrained_lib
from jaxmodels.pretrained.folder import is_pretrained, split_accepted
from jaxmodels.pretrained.mapping import LazyParameter
from jaxmodels.pretrained.weights import PretrainedWeights
from jaxmodels.runs.checkpoint import Checkpoints, open_run
from jaxmodels.runs.folder import RunFolder
from jaxmodels.runs.resized import Resized
from jaxmodels.storage.paths import BucketPath


@dataclasses.dataclass(frozen=True)
class Stored:
    """One array in a checkpoint.

    Attributes:
      checkpoints: the folder `checkpoints` of a run.
      step: of the checkpoint.
      part: part of the train state: `params`, `ema`, `frozen` or `stats`.
      path: of the array in that part.
      shape, dtype: of the array.
    """

    checkpoints: Path | BucketPath
    step: int
    part: str
    path: str
    shape: tuple[int, ...]
    dtype: Any


@dataclasses.dataclass(frozen=True)
class Located:
    """The location of a run's weights, or of pretrained weights.

    Attributes:
      name: the folder, for messages.
      folder: the run; None of pretrained weights.
      step: of the checkpoint.
      averaged: whether the trained parameters are moving averages (EMA).
      arrays: path -> array to read, of all parameters and statistics.
      pretrained: the pretrained weights; None of a run.
      adapters: unmerged adapters of the pretrained weights; None if there are none.
      saved: parameters that come from the folder of adapters, where their modules were trained in full.
    """

    name: str
    folder: RunFolder | None
    step: int
    averaged: bool
    arrays: Mapping[str, "Stored | LazyParameter | Resized"]
    pretrained: PretrainedWeights | None = None
    adapters: peft_folder.Adapters | None = None
    saved: tuple[str, ...] = ()


def locate(reference: str) -> Located:
    """Locate the parameters used for evaluation (the EMA if the run keeps one) and the statistics of a run.

    Args:
      reference: `RUN`, `RUN@best`, `RUN@latest` or `RUN@STEP`.

    Raises:
      ConfigError: no such run or checkpoint, or a parent that holds some of the weights is missing.
    """
    folder, checkpoints, step = open_run(reference)
    try:
        stored = checkpoints.shapes(step, "params", "ema", "frozen", "stats")
    finally:
        checkpoints.close()
    parts = ("ema" if stored["ema"] else "params", "frozen", "stats")
    arrays = {path: Stored(folder.checkpoints, step, part, path, x.shape, x.dtype) for part in parts for path, x in flatten(stored[part]).items()}
    parents = folder.manifest().get("parents", [])
    sources = {path: path for path in parents[0].get("taken", ())} | parents[0].get("renamed", {}) if parents else {}
    elsewhere = {here: there for here, there in sources.items() if here not in arrays}
    saved = tuple(here for here, there in elsewhere.items() if there in parents[0].get("modules_to_save", ()))
    if elsewhere and is_pretrained(parents[0]["run"]):
        adapters = parents[0].get("adapters") if saved or any(path.endswith(ADAPTERS) for path in elsewhere.values()) else None
        parent = _find_pretrained(folder, parents[0], [*arrays, *sources], adapters)
    elif elsewhere:
        parent = locate(find_parent(folder, parents[0]))
    rows = parents[0].get("resized", {}) if parents else {}
    arrays |= {here: Resized(parent.arrays[there], **rows[here]) if here in rows else parent.arrays[there] for here, there in elsewhere.items()}
    return Located(str(folder.path), folder, step, bool(stored["ema"]), arrays, saved=saved)


def locate_pretrained(reference: str, model: Mapping[str, Any], paths: Sequence[str], adapters: str | None = None) -> Located:
    """Locate pretrained weights, and optionally adapters; arguments and errors as of `pretrained.weights.locate`, and `peft_folder.read`."""
    found = pretrained_lib.locate(reference, model, paths)
    if adapters is None:
        return Located(str(found.path), None, 0, False, found.arrays, found)
    beside = peft_folder.read(adapters)
    saved = peft.saved(beside, found.architecture, found.links)
    arrays = {**found.arrays, **peft.under_our_names(beside, found.architecture, found.links).arrays, **saved}
    found = dataclasses.replace(found, fresh=tuple(path for path in found.fresh if path not in saved))
    return Located(str(found.path), None, 0, False, arrays, found, beside, tuple(saved))


def locate_whole(reference: str, model: Mapping[str, Any], shapes: Mapping[str, jax.ShapeDtypeStruct]) -> Located:
    """Locate pretrained weights for every parameter and statistic of a model.

    Raises:
      ConfigError: as `pretrained.weights.locate`; or a parameter is missing or has another shape.
    """
    located = locate_pretrained(reference, model, list(shapes))
    if located.pretrained.fresh:
        raise ConfigError(f"{reference} has no weights for {located.pretrained.fresh[0]}: the pretrained model has no such head.")
    match(shapes, located.arrays, skip=(), rename=())
    return located


def _find_pretrained(folder: RunFolder, entry: Mapping[str, Any], paths: Sequence[str], adapters: str | None) -> Located:
    """Locate the pretrained weights that a run's manifest names as its parent."""
    places = folder.places({"run": entry["path"], "relative": entry.get("relative")})
    found = [place for place in places if any((place / name).is_file() for name in ("config.json", "adapter_config.json"))]
    accepted = split_accepted(entry["run"])[1]
    reference = f"hf:{found[0]}{'?accept=' + ','.join(accepted) if accepted else ''}" if found else entry["run"]
    try:
        parent = locate_pretrained(reference, folder.config()["model"], paths, adapters)
    except ConfigError as error:
        raise ConfigError(f"{folder.path} holds only the trained parameters; the others are those of {entry['run']}: {error}") from error
    if parent.pretrained.fingerprint != entry["id"]:
        raise ConfigError(f"{folder.path} was initialised from other weights than those in {parent.name} now. Restore the original weights.")
    return parent


def find_parent(folder: RunFolder, entry: Mapping[str, Any]) -> str:
    """Return `RUN@STEP` of a run's parent, found at its absolute path or at its path relative to the run.

    Raises:
      ConfigError: the parent is missing, or another run is in its folder.
    """
    found = [place for place in folder.places(entry) if (place / "config.json").is_file()]
    if not found:
        raise ConfigError(
            f"{folder.path} holds only the trained parameters; the others are in {entry['run']} at step {entry['step']}, which is missing. "
            "Restore that run at this path, or at the same path relative to this run."
        )
    same = [place for place in found if entry.get("id") in (None, RunFolder(place).manifest().get("id"))]
    if not same:
        raise ConfigError(f"{folder.path} was initialised from another run than the one in {found[0]} now, whose id is not {entry['id']}.")
    return f"{same[0]}@{entry['step']}"


def read(arrays: Mapping[str, Stored | LazyParameter | Resized], shapes: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """Read the arrays of the paths in `shapes`, each with the sharding of its shape."""
    if resized := {path: x for path in shapes if isinstance(x := arrays[path], Resized)}:
        sources = {path: x.source for path, x in resized.items()}
        found = read({**arrays, **sources}, {path: resized[path].source_shape(shape) if path in resized else shape for path, shape in shapes.items()})
        return {path: resized[path].apply(found.pop(path), shape.sharding) if path in resized else found.pop(path) for path, shape in shapes.items()}
    requests: dict[tuple[Path | BucketPath, int], dict[str, dict]] = {}
    lazy = {path: shape for path, shape in shapes.items() if isinstance(arrays[path], LazyParameter)}
    for path, shape in shapes.items():
        if path in lazy:
            continue
        stored = arrays[path]
        requests.setdefault((stored.checkpoints, stored.step), {}).setdefault(stored.part, {})[stored.path] = shape
    found = {}
    for (folder, step), parts in requests.items():
        checkpoints = Checkpoints(folder, read_only=True)
        try:
            restored = checkpoints.restore_part(step, {part: unflatten(flat) for part, flat in parts.items()})
        finally:
            checkpoints.close()
        found |= {(folder, step, part, path): x for part, tree in restored.items() for path, x in flatten(tree).items()}
    # The largest first, so that the host memory of later reads fits in what the first one allocated.
    in_order = sorted(lazy, key=lambda path: -math.prod(lazy[path].shape))
    result = {path: arrays[path].read(lazy[path].dtype, lazy[path].sharding) for path in in_order}
    result |= {path: found[arrays[path].checkpoints, arrays[path].step, arrays[path].part, arrays[path].path] for path in shapes if path not in result}
    return {path: result[path] for path in shapes}


def check_complete(located: Located, paths: Iterable[str]) -> None:
    """Raise ConfigError if arrays are neither in a run nor in the parents that its manifest names."""
    if missing := [path for path in paths if path not in located.arrays]:
        raise ConfigError(
            f"{located.name} does not hold {missing[0]}, and its manifest.json names no run that does. Restore manifest.json; "
            "one that was damaged is in the run's folder damaged/."
        )


def read_model(located: Located, params: Any, stats: Any) -> tuple[dict, dict]:
    """Read all parameters and statistics of a model.

    Args:
      located: of `locate`.
      params, stats: shapes with shardings.

    Returns:
      The parameters and the statistics, nested.

    Raises:
      ConfigError: the run lacks an array of the model.
    """
    check_complete(located, flatten(params) | flatten(stats))
    found = read(located.arrays, flatten(params) | flatten(stats))
    return tuple(unflatten({path: found[path] for path in flatten(tree)}) for tree in (params, stats))


@dataclasses.dataclass(frozen=True)
class TransferReport:
    """What was transferred from another run's weights: parameter paths of this model.

    The field names are keys of the manifest's `parents`.

    Attributes:
      taken: transferred, under the same path.
      renamed: transferred: path in this model -> path in the other.
      skipped: initialised randomly, because `skip` matches.
      initialised: initialised randomly, because the other run has no such parameter: adapters, and a head that pretrained weights lack.
      dropped: parameters of the other run without a counterpart: renamed to the empty string, or a head of pretrained weights.
    """

    taken: tuple[str, ...]
    renamed: Mapping[str, str]
    skipped: tuple[str, ...]
    initialised: tuple[str, ...]
    dropped: tuple[str, ...]

    def lines(self) -> list[str]:
        """Return one line for each parameter; parameters whose paths differ only in layer numbers share a line."""
        rows = {}
        for word in ("taken", "renamed", "skipped", "initialised", "dropped"):
            paths = getattr(self, word)
            for path in paths:
                source = f" from {paths[path]}" if word == "renamed" else ""
                name = re.sub(r"(?<=/)\d+(?=/)", "*", path + source)
                rows[word, name] = rows.get((word, name), 0) + 1
        return [f"  {word:<11} {name}" + (f"  ({count} of them)" if count > 1 else "") for (word, name), count in rows.items()]


def match(
    here: Mapping[str, Any],
    there: Mapping[str, Any],
    *,
    skip: tuple[str, ...],
    rename: Sequence[tuple[str, str]],
    fresh: Sequence[str] = (),
    dropped: Sequence[str] = (),
) -> tuple[TransferReport, dict[str, str]]:
    """Match this model's parameters with those of another run.

    Args:
      here, there: path -> array or shape, of this model and of the other.
      skip: regular expressions, matched from the start of paths of this model; matching parameters are initialised randomly.
      rename: (pattern, replacement), applied in order to paths of the other model; an empty result drops the parameter.
      fresh: paths of this model that pretrained weights lack.
      dropped: names of pretrained tensors that this model lacks.

    Returns:
      The report, and path in this model -> path in the other, of all transferred parameters.

    Raises:
      ConfigError: a missing, unused or misshapen parameter (lists all), or a pattern that matches nothing.
    """
    new_names = {path: path for path in there}
    for pattern, replacement in rename:
        if not any(re.search(pattern, name) for name in new_names.values()):
            raise ConfigError(f"config.init_from.rename: {pattern!r} matches no parameter of the other run.")
        new_names = {path: re.sub(pattern, replacement, name) for path, name in new_names.items()}
    names = [name for name in new_names.values() if name]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ConfigError(f"config.init_from.rename: two parameters of the other run become {twice!r}.")
    skipped = tuple(path for path in here if any(re.match(pattern, path) for pattern in skip))
    sources = {name: path for path, name in new_names.items() if name in here and name not in skipped}
    initialised = tuple(path for path in here if (path.endswith(ADAPTERS) or path in fresh) and path not in sources and path not in skipped)
    problems = [f"{path} {tuple(here[path].shape)}: not in the other run" for path in here if path not in {*sources, *skipped, *initialised}]
    problems += [
        f"{path}: shape differs: {tuple(here[path].shape)} in this model, {tuple(there[source].shape)} in the other run"
        for path, source in sources.items()
        if tuple(here[path].shape) != tuple(there[source].shape)
    ]
    left = [path for path, name in new_names.items() if name and name not in here]
    problems += [f"{path} {tuple(there[path].shape)}: in the other run, not here" for path in left]
    if problems:
        merge = " The other run's adapters (lora_a, lora_b) become weights with jaxmodels merge." if any(p.endswith(ADAPTERS) for p in left) else ""
        raise ConfigError(
            "config.init_from: the weights do not match this model:\n  " + "\n  ".join(problems) + "\n"
            "Initialise parameters randomly with init_from.skip, or map names with init_from.rename (to '' to drop one)." + merge
        )
    report = TransferReport(
        taken=tuple(path for path, source in sources.items() if path == source),
        renamed={path: source for path, source in sources.items() if path != source},
        skipped=skipped,
        initialised=initialised,
        dropped=(*(path for path, name in new_names.items() if not name), *dropped),
    )
    return report, sources
