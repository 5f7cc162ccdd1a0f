"""The state a run starts from: its own latest checkpoint, else another run's weights, else new ones."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import traverse_util

from jaxmodels.experiment import Experiment
from jaxmodels.sections import InitFrom
from jaxmodels.training import checkpoint as checkpoint_lib
from jaxmodels.training.checkpoint import Checkpoints, Progress
from jaxmodels.training.compile import CompileRecord, compile_ahead
from jaxmodels.training.run_folder import RunFolder
from jaxmodels.training.step import TrainState


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
        for problem in problems:
            folder.add_to_manifest("fallbacks", problem)
        lines = [f"warning: {problem}; it was moved aside" for problem in problems]
        return state, progress, [*lines, f"resumed from {checkpoints.folder / str(int(state.step))}"], None
    init, record = compile_ahead("init", experiment.init_function(), key, out_shardings=jax.tree.map(lambda x: x.sharding, shapes))
    state = init(key)
    if experiment.init_from is None:
        return state, Progress(), [f"initialised with seed {experiment.config['seed']}"], record
    state, line = fill(state, shapes, experiment.init_from, folder)
    return state, Progress(), [line], record


def check_parent(init_from: InitFrom, shapes: TrainState) -> None:
    """Raises ConfigError unless another run's weights fit this model; see `checkpoint.match_weights`."""
    _, checkpoints, step = checkpoint_lib.open_run(init_from.run)
    try:
        _match(checkpoints, step, init_from, shapes)
    finally:
        checkpoints.close()


def _match(checkpoints: Checkpoints, step: int, init_from: InitFrom, shapes: TrainState):
    stored = checkpoints.shapes(step, "params", "ema", "stats")
    here, there = _flat(shapes.params) | _flat(shapes.stats), _flat(stored["ema"] or stored["params"]) | _flat(stored["stats"])
    return checkpoint_lib.match_weights(here, there, skip=init_from.skip, rename=init_from.rename), stored


def fill(state: TrainState, shapes: TrainState, init_from: InitFrom, folder: RunFolder) -> tuple[TrainState, str]:
    """A new state with another run's weights in it, each read straight into its sharding; and a line that says so.

    The manifest's `parents` learn the run, the step and the account of every parameter.
    """
    parent, checkpoints, step = checkpoint_lib.open_run(init_from.run)
    try:
        (account, sources), stored = _match(checkpoints, step, init_from, shapes)
        weights = "ema" if stored["ema"] else "params"
        flat_shapes, statistics = _flat(shapes.params) | _flat(shapes.stats), _flat(stored["stats"])
        wanted = {weights: {}, "stats": {}}
        for path, source in sources.items():
            wanted["stats" if source in statistics else weights][source] = flat_shapes[path]
        request = {part: traverse_util.unflatten_dict(flat, sep="/") for part, flat in wanted.items() if flat}
        restored = checkpoints.restore_part(step, request) if request else {}
    finally:
        checkpoints.close()
    read = _flat(restored.get(weights)) | _flat(restored.get("stats"))

    def filled(tree):
        return traverse_util.unflatten_dict({path: read[sources[path]] if path in sources else x for path, x in _flat(tree).items()}, sep="/")

    params = filled(state.params)
    # The average starts at the weights taken, in arrays of its own: the step donates both.
    ema = jax.tree.map(jnp.copy, params) if state.ema else state.ema
    state = state.replace(params=params, stats=filled(state.stats), ema=ema)
    folder.update_manifest(parents=[{"run": str(parent.path), "step": step, "weights": weights} | dataclasses.asdict(account)])
    counts = {"taken": account.taken, "renamed": account.renamed, "initialised": account.skipped, "dropped": account.unused}
    parts = ", ".join(f"{len(paths)} {what}" for what, paths in counts.items() if paths)
    names = f" (initialised: {', '.join(account.skipped)})" if account.skipped else ""
    average = " (their moving average)" if weights == "ema" else ""
    return state, f"initialised from {parent.path} at step {step}{average}: {parts}{names}"


def _flat(tree) -> dict:
    return traverse_util.flatten_dict(tree or {}, sep="/")
