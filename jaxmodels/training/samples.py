"""Samples that a model makes during training, shown at each evaluation."""

import dataclasses

import jax

from jaxmodels.models.functional import evaluation_model
from jaxmodels.parallel import layout as layout_lib
from jaxmodels.parallel import mesh as mesh_lib
from jaxmodels.training.callback import Callback
from jaxmodels.training.compile import compile_ahead


class Samples(Callback):
    """Shows what the task samples from the model at each evaluation. The key is a function of seed and step."""

    processes = "all"  # the model is one program over all devices

    def __init__(self, key: jax.Array, stop, on_compile):
        """
        Args:
          key: of the run's samples.
          stop: the run's StopSignals.
          on_compile: called with the CompileRecord.
        """
        self._key, self._stop, self._on_compile = key, stop, on_compile
        self._compiled = None

    def on_evaluate(self, run, step, split, values):
        """Sample once an evaluation of the validation split."""
        task = run.experiment.task
        if split != "validation" or not getattr(task, "sample_length", 0) or getattr(task, "tokenizer", None) is None:
            return
        arguments = (run.state.weights, run.state.stats, jax.random.fold_in(self._key, step))
        if self._compiled is None:
            self._compile(run, arguments)
        run.media("sample", task.tokenizer.decode(jax.device_get(self._compiled(*arguments))), "text")

    def _compile(self, run, arguments):
        task, graph = run.experiment.task, run.experiment.graph
        layout = dataclasses.replace(run.experiment.evaluation_layout, left_whole={})

        def sample(params, stats, key):
            with layout_lib.use(layout):
                return task.sample(evaluation_model(graph, params, stats), key)

        everywhere = mesh_lib.replicated(run.mesh)
        self._compiled, record = self._stop.run(lambda: compile_ahead("sample", sample, *arguments, out_shardings=everywhere))
        self._on_compile(record)
