"""Evaluating a split: every example once, summed up on the devices."""

import contextlib
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxmodels.data import loader
from jaxmodels.data.source import DataSource
from jaxmodels.experiment import Experiment
from jaxmodels.parallel import mesh as mesh_lib
from jaxmodels.training import metrics as metrics_lib
from jaxmodels.training.compile import CompileRecord, compile_ahead
from jaxmodels.training.signals import StopSignals


class Evaluator:
    """Evaluates splits of an experiment on a mesh; compiles once, when first used, and tells `on_compile`."""

    def __init__(
        self, experiment: Experiment, mesh: jax.sharding.Mesh, stop: StopSignals, on_compile: Callable[[CompileRecord], None] = lambda _: None
    ):
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
        process = (jax.process_index(), jax.process_count())
        batches = loader.EvaluationBatches(source, self.experiment.eval_batch_size, process=process)
        if self._step is None:
            self._step, self._sums, record = self.stop.run(self._compile, params, stats)
            self.on_compile(record)
        sums = jax.device_put(metrics_lib.zeros(self._sums), everywhere)
        with contextlib.closing(loader.read_ahead(batches, **self.experiment.reading(source))) as stream:
            feed = loader.DeviceFeed(stream, lambda batch: mesh_lib.place(batch, sharding))
            while True:
                with self.stop.may_raise():
                    batch = next(feed, None)
                if batch is None:
                    break
                sums = self._step(params, stats, batch, sums)
        values = self.experiment.task.summarize(metrics_lib.values(sums))
        return values | {"seconds": round(time.perf_counter() - started, 3)}

    def _compile(self, params, stats):
        sharding, everywhere = mesh_lib.batch_sharding(self.mesh), mesh_lib.replicated(self.mesh)
        shapes = self.experiment.batch_shapes(self.experiment.eval_batch_size)
        batch = {k: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding) for k, s in shapes.items()}
        sums = self.experiment.eval_metric_shapes(params, stats, batch)
        sums = jax.tree.map(lambda _: jax.ShapeDtypeStruct((), jnp.float32, sharding=everywhere), sums)
        function = self.experiment.eval_function()
        step, record = compile_ahead("eval_step", function, params, stats, batch, sums, donate=(3,), out_shardings=everywhere)
        return step, sums, record

