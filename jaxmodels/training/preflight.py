"""Checks of a run folder before a run starts or goes on in it. No device is used."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax

from jaxmodels import config as config_lib
from jaxmodels.data.evaluation_sets import is_named
from jaxmodels.errors import ConfigError
from jaxmodels.experiment.changeable import ON_REQUEST, check_allowed, check_changes, covers, new_run, rule_of
from jaxmodels.experiment.experiment import Experiment
from jaxmodels.pretrained.folder import is_pretrained
from jaxmodels.runs import going_back
from jaxmodels.runs.checkpoint import parse_run
from jaxmodels.runs.folder import RunFolder
from jaxmodels.training import changes, initialize
from jaxmodels.training.manifest import describe_data


def check_run_folder(
    experiment: Experiment, folder: RunFolder, overwrite: bool, allow_change: Sequence[str] = (), from_step: int | None = None
) -> tuple[int | None, list[str]]:
    """Check that the run may start or go on in the folder.

    Args:
      experiment: to train.
      folder: the run folder.
      overwrite: delete the run that is there.
      allow_change: keys of `--allow_change`.
      from_step: of `--from_step`.

    Returns:
      The step to go back to, None for none; and lines to print.

    Raises:
      ConfigError: see `trainer.train`.
    """
    folder.check_writable()
    here = changes.flat(experiment.config)
    there = None if overwrite else changes.stored(folder)
    allow_change = [key.removeprefix("config.") for key in allow_change]
    check_allowed(allow_change, {**here, **(there or {})})
    lines: list[str] = []
    if from_step is not None and there is None:
        raise ConfigError(f"--from_step={from_step}: {'leave it out, or --overwrite, which deletes that run' if overwrite else f'{folder.path} has no run'}.")
    if overwrite:
        if dependents := folder.dependents():
            names = ", ".join(map(str, dependents))
            raise ConfigError(
                f"--overwrite: {folder.path} contains frozen weights of {names}, which saved only its trained ones. Delete or merge that run first."
            )
    elif there is not None:
        if any(parent.get("merged") for parent in folder.manifest().get("parents", [])[:1]):
            raise ConfigError(f"{folder.path} contains merged weights, not a run to resume: start from it with config.init_from in another --workdir.")
        changed = config_lib.differences(there, here)
        asked = changed
        if from_step is not None:
            last = going_back.last_going_back(folder.manifest())
            if last is not None and last["from_step"] == from_step and all(rule_of(key).may_change != ON_REQUEST for key in changed):
                lines, from_step = [_went_back(last, going_back.saved_steps(folder))], None
            else:
                going_back.check(folder, from_step)
                # What the run had up to that step needs no permission.
                earlier = config_lib.differences(changes.stored_at(folder, from_step), here)
                asked = {key: pair for key, pair in changed.items() if key in earlier}
        check_changes(str(folder.path), asked, allow_change)
        _check_same_data(experiment, folder, changed)
        _check_same_state(experiment, there, changed)
        if experiment.training.steps:
            saved = [step for step in going_back.saved_steps(folder) if from_step is None or step <= from_step]
            changes.check_length(experiment, experiment.steps, max(saved, default=0), saved)
    if experiment.init_from and (overwrite or not folder.config_file.exists()):
        parent = experiment.init_from.run
        if not is_pretrained(parent) and RunFolder(parse_run(parent)[0]).path.resolve() == folder.path.resolve():
            raise ConfigError("config.init_from names the run's own folder. Choose another --workdir.")
        initialize.check_parent(experiment)
    return from_step, lines


def _went_back(last: Mapping[str, Any], saved: Sequence[int]) -> str:
    latest = f", of step {saved[-1]}" if saved else ""
    return (
        f"--from_step={last['from_step']} was done at {last['time']}: the run goes on from its latest checkpoint{latest}. "
        "To go back to that step once more, move the folders of later steps out of checkpoints/."
    )


def _check_same_state(experiment: Experiment, there: changes.Flat, changed: Collection[str]) -> None:
    """Raise ConfigError if a change adds or removes arrays of the state: those of the optimizer, or the EMA."""
    ema = "training.ema"
    if ema in changed and (there[ema] is None) != (experiment.training.ema is None):
        raise ConfigError(f"config.{ema}: the average cannot be {'added to' if there[ema] is None else 'removed from'} a run. {new_run()}")
    keys = [key for key in changed if covers(["optimizer"], key)]
    if keys:
        shapes = experiment.state_shapes()
        before, here = (jax.tree.leaves(tree) for tree in (changes.optimizer_state(experiment, there, shapes), shapes.opt_state))
        if [(x.shape, x.dtype) for x in before] != [(x.shape, x.dtype) for x in here]:
            raise ConfigError(f"{', '.join(f'config.{key}' for key in keys)}: this change adds or removes arrays of the optimizer's state. {new_run()}")


def _check_same_data(experiment: Experiment, folder: RunFolder, changed: Collection[str]) -> None:
    """Raise ConfigError if a run would resume with other data than it started with. Other weights of a mixture change the length of an epoch."""
    before, here = folder.manifest().get("data"), describe_data(experiment)
    if before is not None:  # further sets come and go, but a name stands for the same examples
        gone = {split for split in before.keys() ^ here.keys() if is_named(split)}
        before, here = ({split: values for split, values in data.items() if split not in gone} for data in (before, here))
    if before is not None and any(covers(["data.sources"], key) for key in changed):
        before, here = ({split: values for split, values in data.items() if split != "train"} for data in (before, here))
    if before is not None and before != here:
        raise ConfigError(f"the data of this run has changed: {before} at its start, {here} now. Restore the data, or start anew with --overwrite.")
    tokenizer = experiment.dataset.info.get("tokenizer")
    if tokenizer is not None and folder.tokenizer_file.is_file() and folder.tokenizer_file.read_text(encoding="utf-8") != tokenizer.to_json():
        raise ConfigError(
            f"the data of this run has changed: its tokenizer differs from {folder.tokenizer_file}. Restore the data, or start anew with --overwrite."
        )
