"""The state a run starts from: its own latest checkpoint, else another run's weights, else new ones."""

import dataclasses
import functools
import math
import os
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxmodels.distributed import session
from jaxmodels.errors import ConfigError
from jaxmodels.experiment.experiment import Experiment
from jaxmodels.models.functional import flatten, unflatten
from jaxmodels.models.lora import ADAPTERS, Lora
from jaxmodels.pretrained.folder import find, is_pretrained
from jaxmodels.runs import weights as weights_lib
from jaxmodels.runs.checkpoint import Checkpoints, Progress
from jaxmodels.runs.folder import RunFolder
from jaxmodels.step.state import TrainState
from jaxmodels.tokenizers import pretrained as pretrained_tokenizer
from jaxmodels.training.compile import CompileRecord, compile_ahead


def start(
    experiment: Experiment, folder: RunFolder, checkpoints: Checkpoints, shapes: TrainState, key
) -> tuple[TrainState, Progress, list[str], CompileRecord | None]:
    """The first state of this start of a run.

    Args:
      experiment: what is trained.
      folder: of the run; the manifest learns of a parent, and of checkpoints that could not be read.
      checkpoints: of the run.
      shapes: of the state, with shardings.
      key: of the initialisation.

    Returns:
      The state, the progress, lines that say where they come from, and what compiling the initialisation took.
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
        init, record = compile_ahead("init", experiment.init_function(), key, out_shardings=jax.tree.map(lambda x: x.sharding, shapes))
        return init(key), Progress(), [f"initialised with seed {experiment.config['seed']}"], record
    matched = _match(experiment, shapes)
    # What is read is not drawn: the compiler leaves out what nobody asks for, and all of its temporaries.
    drawn = functools.partial(_without, paths=set(matched[2]))
    init, record = compile_ahead(
        "init", lambda key: drawn(experiment.init_function()(key)), key, out_shardings=jax.tree.map(lambda x: x.sharding, drawn(shapes))
    )
    state, lines = _fill(init(key), shapes, experiment, folder, matched)
    return state, Progress(), lines, record


def _without(state: TrainState, paths: set[str]) -> TrainState:
    """A state that lacks some of its parameters and statistics, and their average."""
    parts = {part: flatten(getattr(state, part)) for part in ("params", "frozen", "stats")}
    return state.replace(**{part: unflatten({path: x for path, x in tree.items() if path not in paths}) for part, tree in parts.items()}, ema={})


def _read_frozen(folder: RunFolder, step: int, shapes: TrainState) -> dict:
    """The frozen parameters of a run that did not save them."""
    located = weights_lib.locate(f"{folder.path}@{step}")
    return unflatten(weights_lib.read(located.arrays, flatten(shapes.frozen)))


def check_parent(experiment: Experiment) -> None:
    """Raises ConfigError unless another run's weights fit this model, and its tokenizer this data."""
    shapes = experiment.state_shapes()
    if is_pretrained(experiment.init_from.run):
        _check_pretrained_tokenizer(experiment)
    located, report, sources = _match(experiment, shapes)
    lost = [path for path in flatten(shapes.frozen) if path not in sources]
    if lost:
        raise ConfigError(f"config.training: {lost[0]} is frozen, but {located.name} has no such weights: nothing would ever train it.")
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
    report, sources = weights_lib.match(here, located.arrays, skip=init_from.skip, rename=init_from.rename, **unasked)
    return located, report, sources


def _check_adapters(experiment: Experiment, here: Mapping[str, Any], located: weights_lib.Located) -> None:
    """Pretrained adapters and the section `lora` mean the same layers, at the same rank and scale."""
    adapters, lora = located.adapters, Lora(**experiment.config["lora"])
    where = adapters.path / "adapter_config.json"
    if lora.rank != adapters.rank:
        raise ConfigError(f"config.lora.rank={lora.rank}, but {where} has r={adapters.rank}. Leave the section out, and it is made from there.")
    if not math.isclose(lora.scale, adapters.scale, rel_tol=1e-6):
        raise ConfigError(
            f"config.lora.alpha: adapters are scaled by alpha / rank = {lora.scale:g} here, by {adapters.scale:g} in {where}. "
            f"Give alpha={adapters.scale * adapters.rank:g}, or leave the section out."
        )
    own, theirs = ({path.rpartition("/")[0] for path in paths if path.endswith(ADAPTERS)} for paths in (here, located.arrays))
    if own != theirs:
        more = [f"{layer} has an adapter here, none in {adapters.path}" for layer in sorted(own - theirs)]
        more += [f"{layer} has an adapter in {adapters.path}, none here" for layer in sorted(theirs - own)]
        raise ConfigError("config.lora.targets:\n  " + "\n  ".join(more[:20]) + "\nLeave the section out, and it is made from there.")


def _check_scale(experiment: Experiment, parent: RunFolder, report: weights_lib.TransferReport) -> None:
    """Adapters mean what they do at the scale that they were trained at."""
    adapters = [path for path in (*report.taken, *report.renamed) if path.endswith(ADAPTERS)]
    here, there = (Lora(**config["lora"]).scale if config["lora"] else None for config in (experiment.config, parent.config()))
    if adapters and here != there:
        raise ConfigError(
            f"config.lora.alpha: {adapters[0]} was trained at the scale alpha / rank = {there:g}, which is {here:g} here. Give alpha so that "
            f"they agree, or make weights of them first: jaxmodels merge --workdir={parent.path} --output=DIR."
        )


def _check_tokenizer(experiment: Experiment, parent: RunFolder, report: weights_lib.TransferReport) -> None:
    """Embeddings mean the tokens that they were trained on."""
    tokenizer = experiment.dataset.info.get("tokenizer")
    embeddings = [path for path in (*report.taken, *report.renamed) if "embed" in path]
    if tokenizer is None or not embeddings or not parent.tokenizer_file.is_file():
        return
    if parent.tokenizer_file.read_text(encoding="utf-8") != tokenizer.to_json():
        raise ConfigError(
            f"config.data.tokenizer: {parent.path} was trained with another tokenizer, so its {embeddings[0]} means other tokens. "
            f"Use its own, --config.data.tokenizer={parent.path}, or leave out the embeddings with init_from.skip and init_from.rename."
        )


def _check_pretrained_tokenizer(experiment: Experiment) -> None:
    """The same of a pretrained model, whose tokenizer lies beside its weights."""
    tokenizer, reference, skip = experiment.dataset.info.get("tokenizer"), experiment.init_from.run, experiment.init_from.skip
    files = pretrained_tokenizer.files_in(find(reference))
    if tokenizer is None or not files or any(re.match(pattern, "embed/embedding") for pattern in skip):
        return
    if not isinstance(tokenizer, pretrained_tokenizer.PretrainedTokenizer) or not tokenizer.has_tokens_of(files):
        raise ConfigError(
            f"config.data.tokenizer: {reference} was trained with another tokenizer, so its embedding means other tokens. Use its own, "
            f"--config.data.tokenizer={reference}, or leave out the embedding with init_from.skip."
        )


def _fill(state: TrainState, shapes: TrainState, experiment: Experiment, folder: RunFolder, matched: tuple) -> tuple[TrainState, list[str]]:
    """A new state with another run's weights in it, each read straight into its sharding; and lines that say so.

    The manifest's `parents` learn the run, the step, the report of every parameter, and the parent's own parents. The
    parent learns of its child, so that it keeps this checkpoint.

    Args:
      state: with all that is not read.
      shapes: of the whole state, with shardings.
      experiment, folder: as of `start`.
      matched: of `_match`.
    """
    located, report, sources = matched
    parts = {part: flatten(getattr(shapes, part)) for part in ("params", "frozen", "stats")}
    wanted = {path: x for tree in parts.values() for path, x in tree.items() if path in sources}
    found = weights_lib.read({path: located.arrays[source] for path, source in sources.items()}, wanted)
    found |= {path: x for part in parts for path, x in flatten(getattr(state, part)).items()}
    filled = {part: unflatten({path: found[path] for path in tree}) for part, tree in parts.items()}
    # The average starts at the weights taken, in arrays of its own, since the step donates both, and where it belongs.
    places = jax.tree.map(lambda x: x.sharding, shapes.ema)
    ema = jax.jit(lambda params: jax.tree.map(jnp.copy, params), out_shardings=places)(filled["params"]) if shapes.ema else {}
    state = state.replace(**filled, ema=ema)
    lines = _tell_parent(located, folder, experiment.frozen_in_parent) if session.is_first() and located.folder is not None else []
    if session.is_first():
        folder.update_manifest(parents=_parents(located, report, folder))
    step = f" at step {located.step}" if located.folder is not None else ""
    average = " (their moving average)" if located.averaged else ""
    counts = ", ".join(f"{len(paths)} {word}" for word, paths in vars(report).items() if paths)
    notes = [f"note: {note}" for note in located.pretrained.notes] if located.pretrained else []
    return state, [*lines, *notes, f"initialised from {located.name}{step}{average}: {counts}", *report.lines()]


def _parents(located: weights_lib.Located, report: weights_lib.TransferReport, folder: RunFolder) -> list[dict]:
    """The manifest's entry of where the weights came from, and those of the parent's own parents."""
    entry = {"relative": os.path.relpath(located.name, folder.path), "step": located.step} | dataclasses.asdict(report)
    if located.pretrained is not None:
        pretrained = located.pretrained
        own = {"run": pretrained.folder.reference, "path": located.name, "id": pretrained.fingerprint, "model_type": pretrained.architecture.name}
        own |= {"adapters": str(located.adapters.path)} if located.adapters is not None else {}
        return [own | {"weights": "published"} | entry]
    parent = located.folder
    own = {"run": str(parent.path), "id": parent.manifest().get("id"), "weights": "ema" if located.averaged else "params"}
    ancestors = [{key: p[key] for key in ("run", "id", "step", "weights", "model_type") if key in p} for p in parent.manifest().get("parents", [])]
    return [own | entry, *ancestors]


def _tell_parent(located: weights_lib.Located, folder: RunFolder, needed: bool) -> list[str]:
    """Notes in the parent's folder that this run began there; a line if that cannot be written."""
    parent, step = located.folder, located.step
    relative = os.path.relpath(folder.path, parent.path)
    try:
        parent.add_child({"run": str(folder.path), "relative": relative, "id": folder.manifest().get("id"), "step": step, "needed": needed})
    except OSError as error:
        problem = f"{parent.path} does not record this child ({error.strerror}): it may delete its checkpoint of step {step}"
        folder.add_to_manifest("fallbacks", problem)
        return [f"warning: {problem}"]
    return []
