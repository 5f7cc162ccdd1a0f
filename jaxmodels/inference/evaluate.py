"""Evaluate a run's weights on splits of its data, or on other data."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jaxmodels import config as config_lib
from jaxmodels.data import evaluation_sets, registry
from jaxmodels.data.loader import Loading
from jaxmodels.errors import ConfigError, Interrupted
from jaxmodels.experiment.build import Arrays, build_experiment
from jaxmodels.inference.load import fitting_mesh, portable_config, trained_info_of
from jaxmodels.parallel import mesh as mesh_lib
from jaxmodels.parallel import sharding as sharding_lib
from jaxmodels.runs import weights as weights_lib
from jaxmodels.runs.folder import RunFolder
from jaxmodels.training.evaluation import Evaluator
from jaxmodels.training.signals import StopSignals

_OF_TRAINING = ("tokenizer", "labels")  # keys that say what is derived from the training data
_LOADING = {"balance": False, "shuffle_window": None}  # keys of training that other data may not fit


def evaluate(
    run: str, *, split: str = "test", data: Arrays | None = None, data_dir: str | None = None, other_data: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Evaluate a run's weights (the EMA if the run keeps one) on a split of its data, or of other data.

    Args:
      run: `RUN`, `RUN@best`, `RUN@latest` or `RUN@STEP`. `RUN` alone is its best checkpoint if it tracks one, else its latest.
      split: name of a split of the run's data: `train`, `validation`, `test`, or one of the further sets, `validation/NAME` or `test/NAME`; NAME
        alone if only one set is called so.
      data, data_dir: as in `train`.
      other_data: keys of the config's `data` that are others, to evaluate on other data: `{"test": "new.tsv"}`, or `{"source": "tsv:new.tsv"}`, all of
        which is then its split `train`. The tokenizer, the names of the classes and the statistics of the run are used.

    Returns:
      The metrics, the `step` of the weights, and the `seconds` of the evaluation.

    Raises:
      ConfigError: the run, checkpoint or split does not exist, or the data is of another kind than that of the run.
    """
    return next(iter(evaluate_splits(run, [split], data=data, data_dir=data_dir, other_data=other_data).values()))


def evaluate_splits(
    run: str,
    splits: Sequence[str] | None = None,
    *,
    data: Arrays | None = None,
    data_dir: str | None = None,
    other_data: Mapping[str, Any] | None = None,
) -> dict[str, dict[str, Any]]:
    """Evaluate a run's weights on several splits; return what `evaluate` returns for each, by its whole name.

    Args:
      run, data, data_dir, other_data: as in `evaluate`.
      splits: names as in `evaluate`; all that test if None.
    """
    located = weights_lib.locate(run)
    folder = located.folder
    try:
        experiment = build_experiment(config_to_evaluate(folder, other_data), data_dir=data_dir, data=data, trained_info=trained_info_of(folder))
        there = experiment.dataset.splits
        if splits is None:
            splits = evaluation_sets.of(there, "test") or ["test"]
        found = [_find(split, there, str(folder.path)) for split in splits]
        # Use all devices, whatever their number in training. Padding to a multiple of the devices can make a batch larger than configured.
        mesh = fitting_mesh(experiment.mesh, experiment.sharding, experiment.state_shapes())
        layout = sharding_lib.make_layout(mesh, experiment.sharding)
        ways = mesh_lib.batch_ways(mesh) * layout.microbatches
        loading = dataclasses.replace(experiment.loading, eval_batch_size=-(-experiment.eval_batch_size // ways) * ways)
        experiment = dataclasses.replace(experiment, loading=loading).on(mesh.devices.flat[0].platform, layout)
        shapes = sharding_lib.place_state(experiment.state_shapes(), experiment.sharding, layout)
        with StopSignals() as stop:
            params, stats = stop.run(weights_lib.read_model, located, shapes.weights, shapes.stats)
            evaluator = Evaluator(experiment, mesh, stop)
            values = {split: evaluator.run(params, stats, there[split]) | experiment.dataset.skipped_metric(split) for split in found}
    except Interrupted as error:
        raise Interrupted(f"{error}: stopped evaluating; there is nothing to save.") from None
    return {split: {"step": located.step} | metrics for split, metrics in values.items()}


def config_to_evaluate(folder: RunFolder, other_data: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the config of a run to evaluate it by, with other keys of `data` if there are any.

    Raises:
      ConfigError: a key says what the run has from its training data.
    """
    config = portable_config(folder.config())
    config |= {"checkpoint": config["checkpoint"] | {"best": None}, "evaluation": config["evaluation"] | {"patience": None}}  # of training
    if not other_data:
        return config
    for key in _OF_TRAINING:
        if key in other_data:
            raise ConfigError(f"config.data.{key}: a run is evaluated with its own {key}; leave it out.")
    shared = config_lib.fields(Loading)
    section, changes = ({key: value for key, value in keys.items() if key not in shared} for keys in (config["data"], other_data))
    loading = {key: keys[key] for keys in (config["data"], _LOADING if "source" in other_data else {}, other_data) for key in shared if key in keys}
    return config | {"data": registry.other_data(section, changes, "data") | loading}


def _find(split: str, there: Iterable[str], run: str) -> str:
    """Return the whole name of a split; ConfigError if there is none of this name, or more than one."""
    found = [name for name in there if name == split] or [name for name in there if evaluation_sets.is_named(name) and name.partition("/")[2] == split]
    if len(found) != 1:
        raise ConfigError(f"--split={split}: the data of {run} has {', '.join(there)}.")
    return found[0]
