"""The commands as functions: train, evaluate, and load a run back to predict with it, or to make texts."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console

from jaxmodels.experiment.build import Arrays, build_experiment
from jaxmodels.hardware.malloc import tune_malloc
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
    allow_change: Sequence[str] = (),
    from_step: int | None = None,
    plan: str | None = None,
    callbacks: Sequence[Any] = (),
    quiet: bool = False,
) -> Result:
    """Train a config in a folder, or resume the run of this config in it. Some keys may differ from those of the run; see docs/runs.md.

    For the whole process it sets JAX's compilation cache (`training.compile`) and the allocator's reuse of freed memory (`hardware.malloc`).

    Args:
      config: as `load_config` gives, or nested dictionaries.
      workdir: the run's folder.
      data: arrays by split, for `data.source = "arrays"`: `{"train": {"image": …, "label": …}, "test": …}`.
      data_dir: the data directory; `JAXMODELS_DATA_DIR` if None.
      overwrite: delete the run that is in the folder.
      allow_change: dotted keys, or sections, that may differ from the run in the folder, in addition to those that always may.
      from_step: go back to the checkpoint of this step; later ones are moved aside. The same call again does not go back again.
      plan: a plan of this config for these devices, to load and to compare with: a JSON file or a folder that `jaxmodels plan` wrote.
      callbacks: objects with methods of `jaxmodels.Callback`, in addition to those of the config.
      quiet: print nothing.

    Raises:
      ConfigError, Diverged, Interrupted: see jaxmodels.errors.
    """
    tune_malloc()
    options = for_training(plan)
    options["callbacks"] = [*callbacks, *options["callbacks"]]
    experiment = build_experiment(config, data_dir=data_dir, data=data)
    return trainer.train(experiment, workdir, overwrite=overwrite, allow_change=allow_change, from_step=from_step, console=Console(quiet=quiet), **options)


def plan(config: Mapping, topology: str, *, data: Arrays | None = None, data_dir: str | None = None) -> "Plan":
    """Estimate memory, step time and cost of a config on absent hardware.

    Args:
      config: as `load_config` gives, or nested dictionaries.
      topology: such as `v5p-128`, `v5p:4x4x4`, `4xv5p-128` or `h100x8`; see `hardware.topologies.parse`.
      data, data_dir: as for `train`.

    Raises:
      ConfigError: the topology is none, or mesh, batch or a kernel does not fit it.
      plan.compiler.DoesNotFit: the step needs more memory than a device has; states how much, and what to change.
      RunError: the compiler failed.
    """
    from jaxmodels.plan.plan import make_plan  # plans are not loaded by runs

    return make_plan(build_experiment(config, data_dir=data_dir, data=data), topology)
