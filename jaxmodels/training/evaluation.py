"""Evaluating a split: every example once, summed up on the devices; what no sum can give is scored on the host."""

import contextlib
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels import tasks
from jaxmodels.data import loader
from jaxmodels.data.source import DataSource
from jaxmodels.experiment.experiment import Experiment
from jaxmodels.parallel import mesh as mesh_lib
from jaxmodels.step import metrics as metrics_lib
from jaxmodels.training.compile import CompileRecord, compile_ahead
from jaxmodels.training.signals import StopSignals


class Evaluator:
    """Evaluates splits of an experiment on a mesh; compiles once, when first used, and tells `on_compile`."""

    def __init__(self, experiment: Experiment, mesh: jax.sharding.Mesh, stop: StopSignals, on_compile: Callable[[CompileRecord], None] = lambda _: None):
        self.experiment, self.mesh, self.stop, self.on_compile = experiment, mesh, stop, on_compile
        self._step = None  # compiled when first used
        self._sums = None  # shapes of the metrics

    def run(self, params, stats, source: DataSource) -> dict[str, float]:
        """Metrics of a split, and how long it took.

        Raises:
          Interrupted: a signal came; nothing is lost by it.
        """
        started = time.perf_counter()
        sharding, everywhere = mesh_lib.batch_sharding(self.mesh), mesh_lib.replicated(self.mesh)
        size = self.experiment.eval_batch_size
        batches = loader.EvaluationBatches(source, size, rows=mesh_lib.local_rows(sharding, size))
        if self._step is None:
            self._step, self._sums, record = self.stop.run(self._compile, params, stats)
            self.on_compile(record)
        sums = jax.device_put(metrics_lib.zeros(self._sums), everywhere)
        rows = _Rows()
        with contextlib.closing(loader.read_ahead(batches, **self.experiment.reading(source))) as stream:
            feed = loader.DeviceFeed(stream, lambda batch: mesh_lib.place(batch, sharding, size))
            while True:
                with self.stop.may_raise():
                    batch = next(feed, None)
                if batch is None:
                    break
                self.stop.check()
                sums, outputs = self._step(params, stats, batch, sums)
                rows.add(outputs)
        values = metrics_lib.values(sums)
        if tasks.scores(self.experiment.task):
            values |= self.experiment.task.score(rows.all())
        return self.experiment.task.summarize(values) | {"seconds": round(time.perf_counter() - started, 3)}

    def _compile(self, params, stats):
        sharding, everywhere = mesh_lib.batch_sharding(self.mesh), mesh_lib.replicated(self.mesh)
        shapes = self.experiment.batch_shapes(self.experiment.eval_batch_size)
        batch = {k: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding) for k, s in shapes.items()}
        sums = self.experiment.eval_metric_shapes(params, stats, batch)
        sums = jax.tree.map(lambda _: jax.ShapeDtypeStruct((), jnp.float32, sharding=everywhere), sums)
        function = self.experiment.eval_function()
        step, record = compile_ahead("eval_step", function, params, stats, batch, sums, donate=(3,), out_shardings=everywhere)
        return step, sums, record


class _Rows:
    """The outputs of all real rows, on the host.

    They come replicated from the step, so that every process has the whole split and scores it alike.
    """

    def __init__(self):
        self._kept: list[dict[str, np.ndarray]] = []
        self._last = {}  # on the devices, which may still be at it

    def add(self, outputs) -> None:
        """A batch's outputs; fetches those of the batch before."""
        self._fetch()
        self._last = outputs

    def all(self) -> dict[str, np.ndarray]:
        """Each output with all rows along its first axis."""
        self._fetch()
        return {name: np.concatenate([part[name] for part in self._kept]) for name in self._kept[0]}

    def _fetch(self) -> None:
        if self._last:
            outputs, self._last = jax.device_get(self._last), {}
            real = outputs.pop("weight") > 0
            self._kept.append({name: value[real] for name, value in outputs.items()})
