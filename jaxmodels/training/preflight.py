"""Checks of a run folder before a run starts or resumes in it."""

from typing import Any

from jaxmodels.errors import ConfigError
from jaxmodels.experiment.experiment import Experiment
from jaxmodels.experiment.sections import MACHINE_KEYS, resolve
from jaxmodels.pretrained.folder import is_pretrained
from jaxmodels.runs.checkpoint import parse_run
from jaxmodels.runs.folder import RunFolder
from jaxmodels.training import initialize
from jaxmodels.training.manifest import describe_data


def check_run_folder(experiment: Experiment, folder: RunFolder, overwrite: bool) -> dict[str, tuple[Any, Any]]:
    """Check that the run may start or resume in the folder; return the machine keys that changed, as key -> (before, now)."""
    changed = {}
    if overwrite:
        folder.check_writable()
        if dependents := folder.dependents():
            names = ", ".join(map(str, dependents))
            raise ConfigError(
                f"--overwrite: {folder.path} contains frozen weights of {names}, which saved only its trained ones. Delete or merge that run first."
            )
    else:
        changed = folder.check(experiment.config, resolve, MACHINE_KEYS)
        if any(parent.get("merged") for parent in folder.manifest().get("parents", [])[:1]):
            raise ConfigError(f"{folder.path} contains merged weights, not a run to resume: start from it with config.init_from in another --workdir.")
        _check_same_data(experiment, folder)
    if experiment.init_from and (overwrite or not folder.config_file.exists()):
        parent = experiment.init_from.run
        if not is_pretrained(parent) and RunFolder(parse_run(parent)[0]).path.resolve() == folder.path.resolve():
            raise ConfigError("config.init_from names the run's own folder. Choose another --workdir.")
        initialize.check_parent(experiment)
    return changed


def _check_same_data(experiment: Experiment, folder: RunFolder) -> None:
    """Raise ConfigError if a run would resume with other data than it started with."""
    before, here = folder.manifest().get("data"), describe_data(experiment)
    if before is not None and before != here:
        raise ConfigError(f"the data of this run has changed: {before} at its start, {here} now. Restore the data, or start anew with --overwrite.")
    tokenizer = experiment.dataset.info.get("tokenizer")
    if tokenizer is not None and folder.tokenizer_file.is_file() and folder.tokenizer_file.read_text(encoding="utf-8") != tokenizer.to_json():
        raise ConfigError(
            f"the data of this run has changed: its tokenizer differs from {folder.tokenizer_file}. Restore the data, or start anew with --overwrite."
        )
