"""The initial state of a run: its latest checkpoint, else the weights of another run or pretrained model, else new weights."""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxmodels.distributed import session
from jaxmodels.errors import ConfigError
from jaxmodels.experiment.experiment import Experiment
from jaxmodels.models.functional import flatten, unflatten
from jaxmodels.models.lora import ADAPTERS, MAGNITUDE, Lora, magnitudes
from jaxmodels.pretrained import preprocessing
from jaxmodels.pretrained.folder import find, is_pretrained
from jaxmodels.runs import weights as weights_lib
from jaxmodels.runs.checkpoint import Checkpoints, Progress
from jaxmodels.runs.folder import RunFolder
from jaxmodels.step.state import TrainState
from jaxmodels.storage import paths as storage
from jaxmodels.tokenizers import factory as tokenizers
from jaxmodels.tokenizers import pretrained as pretrained_tokenizer
from jaxmodels.training import classes, vocabulary
from jaxmodels.training.compile import CompileRecord, compile_ahead


def start(
    experiment: Experiment, folder: RunFolder, checkpoints: Checkpoints, shapes: TrainState, key
) -> tuple[TrainState, Progress, list[str], CompileRecord | None]:
    """Return the state to train from, and record in the manifest the parent run and unreadable checkpoints.

    Args:
      experiment: the experiment to train.
      folder: the run folder.
      checkpoints: the checkpoints of the run.
      shapes: shapes of the state, with shardings.
      key: random key of the initialisation.

    Returns:
      The state, the progress, lines to print about their origin, and the record of compiling the initialisation (None if nothing was compiled).
    """
    found = checkpoints.restore_latest(shapes)
    if found is not None:
        state, progress, problems = found
        if experiment.frozen_in_parent:
            state = state.replace(frozen=_read_frozen(folder, int(state.step), shapes))
        for problem in problems if session.is_first() else ():
            folder.add_to_manifest("fallbacks", problem)
        lines = [f"warning: {problem}; it was moved aside" for problem in problems]
        return state, progress, [*lines, f"resumed from {checkpoints.folder / str(int(state.step))}"], None
    if experiment.init_from is None:
        init, record = compile_ahead("init", experiment.init_function(), key, out_shardings=jax.tree.map(lambda x: x.sharding, shapes), once=True)
        return init(key), Progress(), [f"initialised with seed {experiment.config['seed']}"], record
    matched = _match(experiment, shapes)
    # Parameters that are read are not initialised: without them as outputs, the compiler removes their computation and its temporaries.
    # DoRA's magnitudes follow from those that are read.
    follow = {path for path in flatten(shapes.params) if path.endswith(MAGNITUDE)}
    without_read = functools.partial(_without, paths=set(matched[2]) | follow)
    init, record = compile_ahead(
        "init",
        lambda key: without_read(experiment.init_function()(key)),
        key,
        out_shardings=jax.tree.map(lambda x: x.sharding, without_read(shapes)),
        once=True,
    )
    state, lines = _fill(init(key), shapes, experiment, folder, matched)
    return state, Progress(), lines, record


def _without(state: TrainState, paths: set[str]) -> TrainState:
    """Return the state without the parameters and statistics at `paths`, and without the EMA."""
    parts = {part: flatten(getattr(state, part)) for part in ("params", "frozen", "stats")}
    return state.replace(**{part: unflatten({path: x for path, x in tree.items() if path not in paths}) for part, tree in parts.items()}, ema={})


def _read_frozen(folder: RunFolder, step: int, shapes: TrainState) -> dict:
    """Read the frozen parameters, which this run does not save, from the parent run."""
    located = weights_lib.locate(f"{folder.path}@{step}")
    weights_lib.check_complete(located, flatten(shapes.frozen))
    return unflatten(weights_lib.read(located.arrays, flatten(shapes.frozen)))


def check_parent(experiment: Experiment) -> None:
    """Raise ConfigError unless the weights of `init_from` fit this model, and their tokenizer is the data's."""
    shapes = experiment.state_shapes()
    if is_pretrained(experiment.init_from.run):
        _check_pretrained_tokenizer(experiment)
    located, report, sources = _match(experiment, shapes)
    lost = [path for path in flatten(shapes.frozen) if path not in sources]
    if lost:
        raise ConfigError(f"config.training: {lost[0]} is frozen, but {located.name} has no weights for it, so it would stay at its random initial value.")
    classes.compare(experiment, located, report, flatten(shapes.frozen))
    if located.folder is not None:
        _check_scale(experiment, located.folder, report)
        _check_tokenizer(experiment, located.folder, report)


def _match(experiment: Experiment, shapes: TrainState):
    init_from = experiment.init_from
    here = flatten(shapes.params) | flatten(shapes.frozen) | flatten(shapes.stats)
    unasked = {}
    if is_pretrained(init_from.run):
        located = weights_lib.locate_pretrained(init_from.run, experiment.config["model"], list(here), init_from.adapters)
        if located.adapters is not None:
            _check_adapters(experiment, here, located)
        unasked = {"fresh": located.pretrained.fresh, "dropped": located.pretrained.dropped}
    else:
        located = weights_lib.locate(init_from.run)
    located = vocabulary.fit(experiment, located, here)
    report, sources = weights_lib.match(here, located.arrays, skip=init_from.skip, rename=init_from.rename, **unasked)
    return located, report, sources


def _check_adapters(experiment: Experiment, here: Mapping[str, Any], located: weights_lib.Located) -> None:
    """Raise ConfigError unless pretrained adapters and the section `lora` have the same layers, rank and scale."""
    adapters, lora = located.adapters, Lora(**experiment.config["lora"])
    where = adapters.path / "adapter_config.json"
    if lora.rank != adapters.rank:
        raise ConfigError(f"config.lora.rank={lora.rank}, but {where} has r={adapters.rank}. Remove the section lora: it is then read from that file.")
    if not math.isclose(lora.scale, adapters.scale, rel_tol=1e-6):
        raise ConfigError(
            f"config.lora.alpha: the scale alpha / rank of adapters is {lora.scale:g} here, but {adapters.scale:g} in {where}. "
            f"Set alpha={adapters.scale * adapters.rank:g}, or remove the section lora."
        )
    if lora.dora != adapters.dora:
        raise ConfigError(f"config.lora.dora={lora.dora}, but {where} has use_dora={adapters.dora}. Remove the section lora: it is then read from that file.")
    here_layers, file_layers = ({path.rpartition("/")[0] for path in paths if path.endswith(ADAPTERS)} for paths in (here, located.arrays))
    if here_layers != file_layers:
        differences = [f"{layer} has an adapter here, but none in {adapters.path}" for layer in sorted(here_layers - file_layers)]
        differences += [f"{layer} has an adapter in {adapters.path}, but none here" for layer in sorted(file_layers - here_layers)]
        raise ConfigError("config.lora.targets:\n  " + "\n  ".join(differences[:20]) + "\nRemove the section lora: it is then read from the adapters.")


def _check_scale(experiment: Experiment, parent: RunFolder, report: weights_lib.TransferReport) -> None:
    """Raise ConfigError unless adapters keep the scale that they were trained with."""
    adapters = [path for path in (*report.taken, *report.renamed) if path.endswith(ADAPTERS)]
    here, there = (Lora(**config["lora"]).scale if config["lora"] else None for config in (experiment.config, parent.config()))
    if adapters and here != there:
        raise ConfigError(
            f"config.lora.alpha: {adapters[0]} was trained with the scale alpha / rank = {there:g}, but it is {here:g} here. Set alpha to get the "
            f"same scale, or merge the adapters first: jaxmodels merge --workdir={parent.path} --output=DIR."
        )


def _check_tokenizer(experiment: Experiment, parent: RunFolder, report: weights_lib.TransferReport) -> None:
    """Raise ConfigError if embeddings are read that were trained with another tokenizer."""
    tokenizer = experiment.dataset.info.get("tokenizer")
    embeddings = [path for path in (*report.taken, *report.renamed) if "embed" in path]
    if tokenizer is None or not embeddings or not parent.tokenizer_file.is_file():
        return
    if not tokenizers.extends(tokenizer, parent.tokenizer_file.read_text(encoding="utf-8")):
        raise ConfigError(
            f"config.data.tokenizer: {parent.path} was trained with another tokenizer, so its {embeddings[0]} belongs to other tokens. "
            f"Use that tokenizer, --config.data.tokenizer={parent.path}, or skip the embeddings with init_from.skip and init_from.rename."
        )


def _check_pretrained_tokenizer(experiment: Experiment) -> None:
    """Raise ConfigError if embeddings are read from a pretrained model whose tokenizer, saved with its weights, is not the data's."""
    tokenizer, reference, skip = experiment.dataset.info.get("tokenizer"), experiment.init_from.run, experiment.init_from.skip
    files = pretrained_tokenizer.files_in(find(reference))
    if tokenizer is None or not files or any(re.match(pattern, "embed/embedding") for pattern in skip):
        return
    if not isinstance(tokenizer, pretrained_tokenizer.PretrainedTokenizer) or not tokenizer.has_tokens_of(files):
        raise ConfigError(
            f"config.data.tokenizer: {reference} was trained with another tokenizer, so its embedding belongs to other tokens. Use that tokenizer, "
            f"--config.data.tokenizer={reference}, or skip the embedding with init_from.skip."
        )


def _fill(state: TrainState, shapes: TrainState, experiment: Experiment, folder: RunFolder, matched: tuple) -> tuple[TrainState, list[str]]:
    """Read another run's weights into the state, each array directly into its sharding; return the state and lines to print.

    The manifest's `parents` gets the run, the step, the report of every parameter, and the parent's own parents. The parent
    records its child, so that it does not delete this checkpoint.

    Args:
      state: the state without the arrays to read.
      shapes: shapes of the whole state, with shardings.
      experiment, folder: as in `start`.
      matched: the result of `_match`.
    """
    located, report, sources = matched
    parts = {part: flatten(getattr(shapes, part)) for part in ("params", "frozen", "stats")}
    wanted = {path: x for tree in parts.values() for path, x in tree.items() if path in sources}
    found = weights_lib.read({path: located.arrays[source] for path, source in sources.items()}, wanted)
    orders, named = classes.compare(experiment, located, report, parts["frozen"])
    found |= {path: classes.reorder(found[path], order) for path, order in orders.items()}
    found |= {path: x for part in parts for path, x in flatten(getattr(state, part)).items()}
    found |= _magnitudes(found, {path: x for path, x in parts["params"].items() if path.endswith(MAGNITUDE) and path not in sources}, experiment)
    filled = {part: unflatten({path: found[path] for path in tree}) for part, tree in parts.items()}
    # The EMA starts at the weights read, as a copy in its own sharding: the step donates both.
    ema_shardings = jax.tree.map(lambda x: x.sharding, shapes.ema)
    ema = jax.jit(lambda params: jax.tree.map(jnp.copy, params), out_shardings=ema_shardings)(filled["params"]) if shapes.ema else {}
    state = state.replace(**filled, ema=ema)
    lines = _record_child(located, folder, experiment.frozen_in_parent) if session.is_first() and located.folder is not None else []
    rows = {path: x.record() for path, x in vocabulary.resized(located, sources).items()}
    if session.is_first():
        folder.update_manifest(parents=_parents(located, report, folder, named, rows))
    named += vocabulary.lines(experiment, located, sources, parts["frozen"])
    named += [f"warning: {text}" for text in _other_images(experiment, located)]
    for line in named if session.is_first() else ():
        if line.startswith("warning: "):
            folder.add_to_manifest("fallbacks", line.removeprefix("warning: "))
    step = f" at step {located.step}" if located.folder is not None else ""
    average = " (EMA)" if located.averaged else ""
    counts = ", ".join(f"{len(paths)} {word}" for word, paths in vars(report).items() if paths)
    notes = [f"note: {note}" for note in located.pretrained.notes] if located.pretrained else []
    return state, [*lines, *notes, f"initialised from {located.name}{step}{average}: {counts}", *report.lines(), *named]


def _magnitudes(found: Mapping[str, jax.Array], shapes: Mapping[str, jax.ShapeDtypeStruct], experiment: Experiment) -> dict[str, jax.Array]:
    """Return the magnitudes with which DoRA begins at the weights in `found`, with the shardings of `shapes`."""
    if not shapes:
        return {}
    layers = {path.rpartition("/")[0] for path in shapes}
    beside = {path: x for path, x in found.items() if path.rpartition("/")[0] in layers}
    begin = functools.partial(magnitudes, paths=tuple(shapes), scale=Lora(**experiment.config["lora"]).scale)
    return jax.jit(begin, out_shardings={path: x.sharding for path, x in shapes.items()})(beside)


def _other_images(experiment: Experiment, located: weights_lib.Located) -> list[str]:
    """Return in words how images differ from those that pretrained weights were trained on."""
    shape = experiment.task.provides.get("image_shape")
    if located.pretrained is None or shape is None:
        return []
    return preprocessing.differences(located.pretrained.folder, experiment.config["task"], shape, experiment.config["data"])


def _parents(located: weights_lib.Located, report: weights_lib.TransferReport, folder: RunFolder, named: Sequence[str], rows: Mapping[str, dict]) -> list[dict]:
    """Return the manifest's entries: the source of the weights, then the parent's own parents."""
    entry = _relative(located.name, folder) | {"step": located.step} | dataclasses.asdict(report) | ({"classes": list(named)} if named else {})
    entry |= {"resized": dict(rows)} if rows else {}
    if located.pretrained is not None:
        pretrained = located.pretrained
        own = {"run": pretrained.folder.reference, "path": located.name, "id": pretrained.fingerprint, "model_type": pretrained.architecture.name}
        own |= {"adapters": str(located.adapters.path)} if located.adapters is not None else {}
        own |= {"modules_to_save": list(located.saved)} if located.saved else {}
        return [own | {"weights": "published"} | entry]
    parent = located.folder
    own = {"run": str(parent.path), "id": parent.manifest().get("id"), "weights": "ema" if located.averaged else "params"}
    ancestors = [{key: p[key] for key in ("run", "id", "step", "weights", "model_type") if key in p} for p in parent.manifest().get("parents", [])]
    return [own | entry, *ancestors]


def _relative(place: Any, folder: RunFolder) -> dict[str, str]:
    """Return the entry `relative` of another run or folder; none if one of both is in a bucket and the other is elsewhere."""
    relative = storage.relative(storage.parse(place), folder.path)
    return {} if relative is None else {"relative": relative}


def _record_child(located: weights_lib.Located, folder: RunFolder, needed: bool) -> list[str]:
    """Record this run in the parent's folder; return a warning if that cannot be written."""
    parent, step = located.folder, located.step
    try:
        parent.add_child({"run": str(folder.path)} | _relative(folder.path, parent) | {"id": folder.manifest().get("id"), "step": step, "needed": needed})
    except OSError as error:
        problem = f"{parent.path} does not record this child ({error.strerror}): it may delete its checkpoint of step {step}"
        folder.add_to_manifest("fallbacks", problem)
        return [f"warning: {problem}"]
    return []
