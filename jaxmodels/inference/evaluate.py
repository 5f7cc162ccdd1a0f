"""Evaluate a run's weights on a split of its data."""

import dataclasses
from typing import Any

from jaxmodels.errors import ConfigError, Interrupted
from jaxmodels.experiment.build import Arrays, build_experiment
from jaxmodels.inference.load import fitting_mesh, portable_config, trained_info_of, with_own_tokenizer
from jaxmodels.parallel import mesh as mesh_lib
from jaxmodels.parallel import sharding as sharding_lib
from jaxmodels.runs import weights as weights_lib
from jaxmodels.training.evaluation import Evaluator
from jaxmodels.training.signals import StopSignals


def evaluate(run: str, *, split: str = "test", data: Arrays | None = None, data_dir: str | None = None) -> dict[str, Any]:
    """Evaluate a run's weights (the EMA if the run keeps one) on a split of its data.

    Args:
      run: `RUN`, `RUN@best`, `RUN@latest` or `RUN@STEP`. `RUN` alone is its best checkpoint if it tracks one, else its latest.
      split: name of a split of the run's data.
      data, data_dir: as in `train`.

    Returns:
      The metrics, the `step` of the weights, and the `seconds` of the evaluation.

    Raises:
      ConfigError: the run, checkpoint or split does not exist.
    """
    located = weights_lib.locate(run)
    folder = located.folder
    try:
        config = with_own_tokenizer(portable_config(folder.config()), folder, data_dir)
        experiment = build_experiment(config, data_dir=data_dir, data=data, trained_info=trained_info_of(folder))
        if split not in experiment.dataset.splits:
            raise ConfigError(f"--split={split}: the data of {folder.path} has {', '.join(experiment.dataset.splits)}.")
        # Use all devices, whatever their number in training. Padding to a multiple of the devices can make a batch larger than configured.
        mesh = fitting_mesh(experiment.mesh, experiment.sharding, experiment.state_shapes())
        layout = sharding_lib.make_layout(mesh, experiment.sharding)
        ways = mesh_lib.batch_ways(mesh) * layout.microbatches
        loading = dataclasses.replace(experiment.loading, eval_batch_size=-(-experiment.eval_batch_size // ways) * ways)
        experiment = dataclasses.replace(experiment, loading=loading).on(mesh.devices.flat[0].platform, layout)
        shapes = sharding_lib.place_state(experiment.state_shapes(), experiment.sharding, layout)
        with StopSignals() as stop:
            params, stats = stop.run(weights_lib.read_model, located, shapes.weights, shapes.stats)
            values = Evaluator(experiment, mesh, stop).run(params, stats, experiment.dataset.splits[split])
    except Interrupted as error:
        raise Interrupted(f"{error}: stopped evaluating; there is nothing to save.") from None
    return {"step": located.step} | values | experiment.dataset.skipped_metric(split)
