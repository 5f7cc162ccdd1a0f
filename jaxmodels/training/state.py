"""The state a run starts from: its own latest checkpoint, else another run's weights, else new ones."""

import jax
from flax import traverse_util

from jaxmodels.errors import ConfigError
from jaxmodels.experiment import Experiment, InitFrom
from jaxmodels.training import checkpoint as checkpoint_lib
from jaxmodels.training.checkpoint import Account, Checkpoints, Progress
from jaxmodels.training.compile import compile_ahead
from jaxmodels.training.run_folder import RunFolder
from jaxmodels.training.step import TrainState


def start(experiment: Experiment, folder: RunFolder, checkpoints: Checkpoints, shapes: TrainState, key) -> tuple[TrainState, Progress, list[str]]:
    """The first state of this start of a run.

    Args:
      experiment: what is trained.
      folder: of the run; the manifest learns of a parent, and of checkpoints that could not be read.
      checkpoints: of the run.
      shapes: of the state, with shardings.
      key: of the initialisation.

    Returns:
      The state, the progress, and lines that say where they come from.
    """
    found = checkpoints.restore_latest(shapes)
    if found is not None:
        state, progress, problems = found
        for problem in problems:
            folder.add_to_manifest("fallbacks", problem)
        lines = [f"warning: {problem}; it was moved aside" for problem in problems]
        return state, progress, [*lines, f"resumed from {checkpoints.folder / str(int(state.step))}"]
    init, _ = compile_ahead("init", experiment.init_function(), key, out_shardings=jax.tree.map(lambda x: x.sharding, shapes))
    state = init(key)
    if experiment.init_from is None:
        return state, Progress(), [f"initialised with seed {experiment.config['seed']}"]
    state, line = fill(state, shapes, experiment.init_from, folder)
    return state, Progress(), [line]


def check_parent(init_from: InitFrom, shapes: TrainState) -> tuple[Account, dict]:
    """Whether another run's weights fit this model, from shapes alone; see `checkpoint.match_weights`."""
    _, checkpoints, step = checkpoint_lib.open_run(init_from.run)
    try:
        there = _weights(checkpoints.shapes(step, "params", "ema", "stats"))
        here = _weights({"params": shapes.params, "stats": shapes.stats})
        return checkpoint_lib.match_weights(here, there, skip=init_from.skip, rename=init_from.rename or {})
    finally:
        checkpoints.close()


def fill(state: TrainState, shapes: TrainState, init_from: InitFrom, folder: RunFolder) -> tuple[TrainState, str]:
    """A new state with another run's weights in it, each read straight into its sharding; and a line that says so.

    The manifest's `parents` learn the run, the step and the account of every parameter.
    """
    account, sources = check_parent(init_from, shapes)
    parent, checkpoints, step = checkpoint_lib.open_run(init_from.run)
    try:
        stored = checkpoints.shapes(step, "params", "ema", "stats")
        weights = "ema" if stored["ema"] else "params"
        flat_shapes = _weights({"params": shapes.params, "stats": shapes.stats})
        wanted = {weights: {}, "stats": {}}
        for path, source in sources.items():
            part = "stats" if source in _flat(stored["stats"]) else weights
            wanted[part][source] = flat_shapes[path]
        request = {part: traverse_util.unflatten_dict(flat, sep="/") for part, flat in wanted.items() if flat}
        restored = checkpoints.restore_part(step, request) if request else {}
    finally:
        checkpoints.close()
    read = _weights({"params": restored.get(weights, {}), "stats": restored.get("stats", {})})

    def filled(tree):
        flat = _flat(tree)
        return traverse_util.unflatten_dict({path: read[sources[path]] if path in sources else x for path, x in flat.items()}, sep="/")

    params = filled(state.params)
    # The average starts at the weights taken, in arrays of its own: the step donates both.
    ema = jax.tree.map(jax.numpy.copy, params) if state.ema else state.ema
    state = state.replace(params=params, stats=filled(state.stats), ema=ema)
    folder.update_manifest(
        parents=[
            {
                "run": str(parent.path),
                "step": step,
                "weights": weights,
                "taken": list(account.taken),
                "renamed": dict(account.renamed),
                "skipped": list(account.skipped),
                "unused": list(account.unused),
            }
        ]
    )
    count = {"taken": len(account.taken), "renamed": len(account.renamed), "initialised": len(account.skipped), "dropped": len(account.unused)}
    parts = ", ".join(f"{n} {what}" for what, n in count.items() if n)
    names = f" (initialised: {', '.join(account.skipped)})" if account.skipped else ""
    average = " (their moving average)" if weights == "ema" else ""
    return state, f"initialised from {parent.path} at step {step}{average}: {parts}{names}"


def _flat(tree) -> dict:
    return traverse_util.flatten_dict(tree or {}, sep="/")


def _weights(parts) -> dict:
    """Parameters (the average, where there is one) and statistics by path."""
    return _flat(parts.get("ema") or parts["params"]) | _flat(parts["stats"])
