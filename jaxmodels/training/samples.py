"""Samples that a model generates during training, shown at each evaluation."""

import jax

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
        self._traced, self._compiled = False, None  # traced and compiled at the first use

    def on_evaluate(self, run, step, split, values):
        """Sample once an evaluation."""
        if split != "validation":
            return
        arguments = (run.state.weights, run.state.stats, jax.random.fold_in(self._key, step))
        if not self._traced:
            self._traced = True
            self._compiled, record = self._stop.run(self._compile, run, arguments)
            if record is not None:
                self._on_compile(record)
        if self._compiled is not None:
            for sample in run.experiment.task.show(jax.device_get(self._compiled(*arguments))):
                run.media(sample.name, sample.media, sample.kind, **sample.options)

    def _compile(self, run, arguments):
        """Return the compiled function and its record; two None for a task without samples."""
        function = run.experiment.sample_function()
        if not jax.eval_shape(function, *arguments):
            return None, None
        # JAX has cached the trace: the function is not traced again.
        return compile_ahead("sample", function, *arguments, out_shardings=mesh_lib.replicated(run.mesh))
