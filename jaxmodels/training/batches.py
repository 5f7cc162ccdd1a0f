"""The batches of a run, on its devices; several processes use one when all have theirs."""

import collections
from typing import Any

import jax

from jaxmodels.data import loader
from jaxmodels.distributed import session
from jaxmodels.experiment.experiment import Experiment
from jaxmodels.parallel import mesh as mesh_lib
from jaxmodels.training.signals import StopSignals


class Feed:
    """The batches of one pass over data, and the check for a stop before each.

    With several processes, none passes the check of a batch before every process has that batch: a process that passed it would start a step which
    waits for the others for ever. Knowing this costs no message. A process starts step s when it has the batches up to s + `ahead`. A result that
    depends on all rows of step s is computed when all processes have started it. So a process that waits for the result of step s - `ahead` knows that
    all have the batch of step s. Only the first batches of a pass need an exchange.

    A process whose reader fails starts no further step, so the others cannot pass the check of the missing batch. It asks for a common stop. That is at
    a check which some process has reached, so all have the batches before it, take the steps up to it, and stop there.
    """

    def __init__(self, batches: loader.DeviceFeed, count: int, stop: StopSignals):
        """
        Args:
          batches: of the pass.
          count: their number.
          stop: of the run.
        """
        self._batches, self._left, self._stop = batches, count, stop
        self._member = session.current()
        self._results: collections.deque | None = None  # of the steps that may not be computed yet

    def next(self, result: Any) -> Any:
        """Return the next batch on the devices; None after the last one. All processes call this together.

        Args:
          result: arrays that depend on all rows of the step before and are not donated; not used in the first call.

        Raises:
          Interrupted: a signal stops the run here.
          RunError: the reader of this process failed, and the batches before that are used up; its `state_is_good`.
          OneFailed: the reader of a process failed, and all stop here.
        """
        if not self._left:
            return None
        self._left -= 1
        self._stop.read_ahead(self._batches.fill)
        if self._member is not None:
            self._wait_for_others(result)
        self._stop.check(self._batches.error)
        return self._batches.take()

    def _wait_for_others(self, result: Any) -> None:
        if self._results is None:
            self._results = collections.deque()
            self._member.exchange_errors(self._batches.error)
            return
        self._results.append(result)
        if len(self._results) == self._batches.ahead:
            jax.block_until_ready(self._results.popleft())


def name_of(experiment: Experiment, split: str) -> str:
    """Return the name of a split for errors of its reader."""
    return f"config.data.source={experiment.config['data']['source']!r}, split {split}"


def training_batches(experiment: Experiment, mesh: jax.sharding.Mesh, stop: StopSignals, step: int, offset: int = 0) -> tuple[loader.Stream, Feed]:
    """Return the stream of training batches from `step` on, to be closed, and the feed of them on the devices; `offset` as of `TrainingBatches`."""
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
    return stream, Feed(loader.DeviceFeed(stream, lambda batch: _place(batch, experiment, mesh, sharding)), experiment.steps - step, stop)


def _place(batch, experiment: Experiment, mesh: jax.sharding.Mesh, sharding) -> Any:
    """Put a batch on the devices; for pmap with a leading device dimension."""
    size = experiment.loading.batch_size
    if experiment.layout.axis:
        rows, size = size // mesh.size, mesh.size
        batch = jax.tree.map(lambda x: x.reshape(-1, rows, *x.shape[1:]), batch)
    return mesh_lib.place(batch, sharding, size)
