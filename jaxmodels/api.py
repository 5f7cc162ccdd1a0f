"""The commands as functions: train, evaluate, and load a run back to predict with it, or to make texts."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console

from jaxmodels.experiment.build import Arrays, build_experiment
from jaxmodels.hardware.malloc import keep_freed_memory
from jaxmodels.training import trainer
from jaxmodels.training.compare import for_training
from jaxmodels.training.result import Result

if TYPE_CHECKING:
    from jaxmodels.plan.plan import Plan


def train(
    config: Mapping,
    workdir: str,
    *,
    data: Arrays | None = None,
    data_dir: str | None = None,
    overwrite: bool = False,
    plan: str | None = None,
    callbacks: Sequence[Any] = (),
    quiet: bool = False,
) -> Result:
    """Trains a config in a folder, or goes on with the run of it that is there.

    For the whole process it sets JAX's compilation cache (`training.compile`) and how freed memory is kept (`allocator`).

    Args:
      config: as `load_config` gives, or nested dictionaries.
      workdir: the run's folder.
      data: arrays by split, for `data.source = "arrays"`: `{"train": {"image": …, "label": …}, "test": …}`.
      data_dir: the data directory; `JAXMODELS_DATA_DIR` if None.
      overwrite: delete the run that is in the folder.
      plan: a plan of this config for these devices, to load and to compare with: a JSON file or a folder that `jaxmodels plan` wrote.
      callbacks: objects with methods of `jaxmodels.Callback`, beside those of the config.
      quiet: print nothing.

    Raises:
      ConfigError, Diverged, Interrupted: see jaxmodels.errors.
    """
    keep_freed_memory()
    options = for_training(plan)
    options["callbacks"] = [*callbacks, *options["callbacks"]]
    experiment = build_experiment(config, data_dir=data_dir, data=data)
    return trainer.train(experiment, workdir, overwrite=overwrite, console=Console(quiet=quiet), **options)


def plan(config: Mapping, topology: str, *, data: Arrays | None = None, data_dir: str | None = None) -> "Plan":
    """What a config takes of chips that are not here: memory, time, cost.

    Args:
      config: as `load_config` gives, or nested dictionaries.
      topology: such as `v5p-128`, `v5p:4x4x4`, `4xv5p-128` or `h100x8`; see `hardware.topologies.parse`.
      data, data_dir: as for `train`.

    Raises:
      ConfigError: the topology is none, or mesh, batch or a kernel does not fit it.
      plan.compiler.DoesNotFit: the step needs more memory than a device has; says how much, and what to change.
      RunError: the compiler failed.
    """
    from jaxmodels.plan.plan import make_plan  # plans are not loaded by runs

    return make_plan(build_experiment(config, data_dir=data_dir, data=data), topology)
