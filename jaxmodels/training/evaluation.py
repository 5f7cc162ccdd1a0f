"""Evaluation of a split: metrics are summed on the devices over every example once; scores are computed on the host."""

import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.data import loader
from jaxmodels.data.source import DataSource
from jaxmodels.experiment.experiment import Experiment
from jaxmodels.parallel import mesh as mesh_lib
from jaxmodels.step import metrics as metrics_lib
from jaxmodels.training.batches import Feed, name_of
from jaxmodels.training.compile import CompileRecord, compile_ahead
from jaxmodels.training.signals import StopSignals


class Evaluator:
    """Evaluates splits of an experiment on a mesh. Compiles once, at the first use, and calls `on_compile`."""

    def __init__(self, experiment: Experiment, mesh: jax.sharding.Mesh, stop: StopSignals, on_compile: Callable[[CompileRecord], None] = lambda _: None):
        self.experiment, self.mesh, self.stop, self.on_compile = experiment, mesh, stop, on_compile
        self._step = None  # compiled at the first use
        self._sums = None  # shapes of the metrics
        self._key = experiment.evaluation_key

    def run(self, params, stats, source: DataSource) -> dict[str, float]:
        """Return the metrics of a split, and the `seconds` it took. All splits have one compiled step.

        Metrics do not depend on batch size, devices or processes beyond rounding, unless the task's own do (see `Task.evaluate`).

        Raises:
          Interrupted, RunError, OneFailed: as of `Feed.next`.
        """
        started = time.perf_counter()
        sharding, everywhere = mesh_lib.batch_sharding(self.mesh), mesh_lib.replicated(self.mesh)
        size = self.experiment.eval_batch_size
        split = next((name for name, part in self.experiment.dataset.splits.items() if part is source), "evaluated")
        batches = loader.EvaluationBatches(source, size, rows=mesh_lib.local_rows(sharding, size), name=name_of(self.experiment, split))
        if self._step is None:
            self._step, self._sums, record = self.stop.run(self._compile, params, stats)
            self.on_compile(record)
        sums = jax.device_put(metrics_lib.zeros(self._sums), everywhere)
        rows = _Rows()
        with loader.read_ahead(batches, **self.experiment.reading(source)) as stream:
            feed = Feed(loader.DeviceFeed(stream, lambda batch: mesh_lib.place(batch, sharding, size)), len(batches), self.stop)
            while (batch := feed.next(sums)) is not None:
                sums, outputs = self._step(params, stats, batch, sums, self._key)
                rows.add(outputs)
        values = metrics_lib.values(sums)
        if self.experiment.task.scores:
            values |= self.experiment.task.score(rows.all())
        return self.experiment.task.summarize(values) | {"seconds": round(time.perf_counter() - started, 3)}

    def _compile(self, params, stats):
        sharding, everywhere = mesh_lib.batch_sharding(self.mesh), mesh_lib.replicated(self.mesh)
        batch = {k: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding) for k, s in self.experiment.eval_batch_shapes().items()}
        sums = self.experiment.eval_metric_shapes(params, stats)
        sums = jax.tree.map(lambda _: jax.ShapeDtypeStruct((), jnp.float32, sharding=everywhere), sums)
        key = jax.ShapeDtypeStruct(self._key.shape, self._key.dtype, sharding=everywhere)
        function = self.experiment.eval_function()
        step, record = compile_ahead("eval_step", function, params, stats, batch, sums, key, out_shardings=everywhere)
        return step, sums, record


class _Rows:
    """Outputs of all rows except padding, on the host.

    They are replicated in the step, so that every process scores the whole split.
    """

    def __init__(self):
        self._fetched: list[dict[str, np.ndarray]] = []
        self._last = {}  # on the devices, maybe not computed yet

    def add(self, outputs) -> None:
        """Add a batch's outputs. Fetches those of the batch before, which waits for that batch only."""
        self._fetch()
        self._last = outputs

    def all(self) -> dict[str, np.ndarray]:
        """Return each output with all rows along its first axis."""
        self._fetch()
        return {name: np.concatenate([part[name] for part in self._fetched]) for name in self._fetched[0]}

    def _fetch(self) -> None:
        if self._last:
            outputs, self._last = jax.device_get(self._last), {}
            real = outputs.pop("weight") > 0
            self._fetched.append({name: value[real] for name, value in outputs.items()})
