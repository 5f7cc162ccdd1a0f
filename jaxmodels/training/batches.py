"""The training batches of a run, on its devices."""

from typing import Any

import jax

from jaxmodels.data import loader
from jaxmodels.experiment.experiment import Experiment
from jaxmodels.parallel import mesh as mesh_lib


def name_of(experiment: Experiment, split: str) -> str:
    """Return the name of a split for errors of its reader."""
    return f"config.data.source={experiment.config['data']['source']!r}, split {split}"


def training_batches(experiment: Experiment, mesh: jax.sharding.Mesh, step: int, offset: int = 0) -> tuple[loader.Stream, loader.DeviceFeed]:
    """Return the stream of training batches from `step` on, to be closed, and the iterator that places them on the devices; `offset` as of `TrainingBatches`."""
    source = experiment.dataset.splits["train"]
    sharding = mesh_lib.batch_sharding(mesh)
    batches = loader.TrainingBatches(
        source,
        experiment.loading.batch_size,
        experiment.steps,
        seed=experiment.config["seed"],
        shuffle=experiment.loading.shuffle,
        window=experiment.loading.shuffle_window,
        offset=offset,
        rows=mesh_lib.local_rows(sharding, experiment.loading.batch_size),
        crop=experiment.crop,
        transform=experiment.transform,
        name=name_of(experiment, "train"),
    )
    stream = loader.read_ahead(batches, start=step, **experiment.reading(source))
    return stream, loader.DeviceFeed(stream, lambda batch: _place(batch, experiment, mesh, sharding))


def _place(batch, experiment: Experiment, mesh: jax.sharding.Mesh, sharding) -> Any:
    """Put a batch on the devices; for pmap with a leading device dimension."""
    size = experiment.loading.batch_size
    if experiment.layout.axis:
        rows, size = size // mesh.size, mesh.size
        batch = jax.tree.map(lambda x: x.reshape(-1, rows, *x.shape[1:]), batch)
    return mesh_lib.place(batch, sharding, size)
