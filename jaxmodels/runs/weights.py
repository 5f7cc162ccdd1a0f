"""The weights of a run: where each lies, which of them fit another model, and reading them.

A run that trains only a part of its parameters beside a parent's saves only that part; the others lie in the
parent's checkpoints, or in those of its parent.
"""

import dataclasses
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from jaxmodels.errors import ConfigError
from jaxmodels.models.functional import flatten, unflatten
from jaxmodels.models.lora import ADAPTERS
from jaxmodels.pretrained import peft
from jaxmodels.pretrained import weights as published_lib
from jaxmodels.pretrained.folder import is_published
from jaxmodels.pretrained.mapping import Assembled
from jaxmodels.pretrained.weights import Published
from jaxmodels.runs.checkpoint import Checkpoints, open_run
from jaxmodels.runs.folder import RunFolder


@dataclasses.dataclass(frozen=True)
class Stored:
    """One array on disk.

    Attributes:
      checkpoints: the folder `checkpoints` that it lies in.
      step: of the checkpoint.
      part: of the state: `params`, `ema`, `frozen` or `stats`.
      path: in that part.
      shape, dtype: of the array.
    """

    checkpoints: Path
    step: int
    part: str
    path: str
    shape: tuple[int, ...]
    dtype: Any


@dataclasses.dataclass(frozen=True)
class Located:
    """Where the weights of a run, or published ones, are.

    Attributes:
      name: the folder, to print.
      folder: of the run; None of published weights.
      step: of its checkpoint.
      averaged: the trained ones are moving averages.
      arrays: path -> what is read, of parameters and statistics.
      published: all else that is known of published weights.
      adapters: of published weights, where they came with some that are not merged.
    """

    name: str
    folder: RunFolder | None
    step: int
    averaged: bool
    arrays: Mapping[str, "Stored | Assembled"]
    published: Published | None = None
    adapters: peft.Adapters | None = None


def locate(reference: str) -> Located:
    """Where the parameters that a run is judged by (their average, where it kept one) and its statistics lie.

    Args:
      reference: `RUN`, `RUN@best`, `RUN@latest` or `RUN@STEP`.

    Raises:
      ConfigError: no such run or checkpoint, or a parent that holds some of the weights is gone.
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
    if elsewhere and is_published(parents[0]["run"]):
        adapters = parents[0].get("adapters") if any(path.endswith(ADAPTERS) for path in elsewhere.values()) else None
        parent = _find_published(folder, parents[0], [*arrays, *sources], adapters)
    elif elsewhere:
        parent = locate(find_parent(folder, parents[0]))
    arrays |= {here: parent.arrays[there] for here, there in elsewhere.items()}
    return Located(str(folder.path), folder, step, bool(stored["ema"]), arrays)


def locate_published(reference: str, model: Mapping[str, Any], paths: Sequence[str], adapters: str | None = None) -> Located:
    """Where published weights lie, and adapters beside them; arguments and errors as of `interop.published.locate` and `interop.peft.read`."""
    found = published_lib.locate(reference, model, paths)
    if adapters is None:
        return Located(str(found.path), None, 0, False, found.arrays, found)
    beside = peft.read(adapters)
    arrays = {**found.arrays, **peft.under_our_names(beside, found.architecture, found.links).arrays}
    return Located(str(found.path), None, 0, False, arrays, found, beside)


def locate_whole(reference: str, model: Mapping[str, Any], shapes: Mapping[str, jax.ShapeDtypeStruct]) -> Located:
    """Published weights for every parameter and statistic of a model.

    Raises:
      ConfigError: as `interop.published.locate`; or some are not there, or of another shape.
    """
    located = locate_published(reference, model, list(shapes))
    if located.published.fresh:
        raise ConfigError(f"{reference} has no weights for {located.published.fresh[0]}: it was published without that head.")
    match(shapes, located.arrays, skip=(), rename=())
    return located


def _find_published(folder: RunFolder, entry: Mapping[str, Any], paths: Sequence[str], adapters: str | None) -> Located:
    """The published weights that a run borrows from, as its manifest names them."""
    places = [entry["path"], os.path.normpath(folder.path / entry["relative"])]
    found = [place for place in places if any(os.path.isfile(os.path.join(place, name)) for name in ("config.json", "adapter_config.json"))]
    reference = f"hf:{found[0]}" if found else entry["run"]
    try:
        parent = locate_published(reference, folder.config()["model"], paths, adapters)
    except ConfigError as error:
        raise ConfigError(f"{folder.path} saved only what it trained; its other weights are those of {entry['run']}: {error}") from error
    if parent.published.fingerprint != entry["id"]:
        raise ConfigError(f"{folder.path} began with other weights than those that lie in {parent.name} now. Put those back.")
    return parent


def find_parent(folder: RunFolder, entry: Mapping[str, Any]) -> str:
    """`RUN@STEP` of a parent as the manifest of a run names it: where it was, or in the same place seen from the run.

    Raises:
      ConfigError: it is not there, or another run lies there now.
    """
    places = [Path(entry["run"])] + ([folder.path / entry["relative"]] if "relative" in entry else [])
    found = [place for place in places if (place / "config.json").is_file()]
    if not found:
        raise ConfigError(
            f"{folder.path} saved only what it trained; its other weights lie in {entry['run']} at step {entry['step']}, which is not "
            "there. Put that run back, here or in the same place relative to this one."
        )
    same = [place for place in found if entry.get("id") in (None, RunFolder(place).manifest().get("id"))]
    if not same:
        raise ConfigError(f"{folder.path} began with another run than the one that lies in {found[0]} now: that one's id is not {entry['id']}.")
    return f"{os.path.normpath(same[0])}@{entry['step']}"


def read(arrays: Mapping[str, Stored | Assembled], shapes: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """The arrays of the paths in `shapes`, each read straight into the sharding that its shape carries."""
    requests: dict[tuple[Path, int], dict[str, dict]] = {}
    published = {path: shape for path, shape in shapes.items() if isinstance(arrays[path], Assembled)}
    for path, shape in shapes.items():
        if path in published:
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
    # The largest first: what reading it took of memory is then enough for all others.
    in_order = sorted(published, key=lambda path: -math.prod(published[path].shape))
    result = {path: arrays[path].read(published[path].dtype, published[path].sharding) for path in in_order}
    result |= {path: found[arrays[path].checkpoints, arrays[path].step, arrays[path].part, arrays[path].path] for path in shapes if path not in result}
    return {path: result[path] for path in shapes}


def read_model(located: Located, params: Any, stats: Any) -> tuple[dict, dict]:
    """All parameters and statistics of a run.

    Args:
      located: where they are.
      params, stats: shapes, with shardings.
    """
    found = read(located.arrays, flatten(params) | flatten(stats))
    return tuple(unflatten({path: found[path] for path in flatten(tree)}) for tree in (params, stats))


@dataclasses.dataclass(frozen=True)
class Account:
    """What became of every parameter when weights were taken from another run: paths of this model's parameters.

    Attributes:
      taken: from the other run, under the same path.
      renamed: path here -> path there.
      skipped: by `skip`: initialised here, whatever the other run has.
      initialised: adapters, which the other run does not have, and a head that published weights do not have.
      dropped: paths of the other run that nothing here asked for, renamed to the empty string; and heads of published weights.
    """

    taken: tuple[str, ...]
    renamed: Mapping[str, str]
    skipped: tuple[str, ...]
    initialised: tuple[str, ...]
    dropped: tuple[str, ...]

    def lines(self) -> list[str]:
        """Every parameter and what became of it; parameters that differ only in numbers, such as a layer's, share a line."""
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
) -> tuple[Account, dict[str, str]]:
    """Which of another run's parameters fill which of this model's.

    Args:
      here, there: path -> what has a shape.
      skip: patterns on paths here, from their start, that are initialised anew.
      rename: (pattern, replacement), applied in order to paths there; an empty result drops the parameter.
      fresh, dropped: paths here that are initialised, and names there that are left out, because published weights are so.

    Returns:
      The account, and path here -> path there of all that is taken.

    Raises:
      ConfigError: a parameter that is missing, left over or of another shape, or a pattern that matches nothing.
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
        f"{path}: shape differs: {tuple(here[path].shape)} here, {tuple(there[source].shape)} there"
        for path, source in sources.items()
        if tuple(here[path].shape) != tuple(there[source].shape)
    ]
    left = [path for path, name in new_names.items() if name and name not in here]
    problems += [f"{path} {tuple(there[path].shape)}: in the other run, not here" for path in left]
    if problems:
        merge = " The other run's adapters (lora_a, lora_b) become weights with jaxmodels merge." if any(p.endswith(ADAPTERS) for p in left) else ""
        raise ConfigError(
            "config.init_from: the weights do not match this model:\n  " + "\n  ".join(problems) + "\n"
            "Initialise parameters anew with init_from.skip, or map names with init_from.rename (to '' to drop one)." + merge
        )
    account = Account(
        taken=tuple(path for path, source in sources.items() if path == source),
        renamed={path: source for path, source in sources.items() if path != source},
        skipped=skipped,
        initialised=initialised,
        dropped=(*(path for path, name in new_names.items() if not name), *dropped),
    )
    return account, sources
