"""A run's predictions as one compiled function, in a chosen precision and on the devices that hold the model."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.errors import ConfigError
from jaxmodels.inference.form import Example, Form
from jaxmodels.inference.forms import form_of
from jaxmodels.inference.run import Run
from jaxmodels.models import functional
from jaxmodels.parallel import layout as layout_lib


class Predictor:
    """Batches of a form's examples to the outputs of the task.

    Attributes:
      form: of the task.
    """

    def __init__(self, run: Run, *, precision: str = "float32", max_pixels: int = 67_108_864):
        """
        Args:
          run: a loaded run.
          precision: dtype of the computation, `float32` or `bfloat16`.
          max_pixels: as in `form_of`, whose errors it raises.
        """
        if precision not in functional.DTYPES:
            raise ConfigError(f"precision must be {' or '.join(functional.DTYPES)}, got {precision!r}.")
        self.form: Form = form_of(run, max_pixels=max_pixels)
        dtype = functional.DTYPES[precision]
        graph, params, stats = functional.split(run.model)
        self._weights = functional.cast(params, dtype), stats

        def predict(params, stats, batch):
            with layout_lib.use(run.layout):
                values = run.task.predict(functional.evaluation_model(graph, params, stats, dtype), batch)
            return functional.cast(values, jnp.float32)

        self._predict = jax.jit(predict)

    def __call__(self, batch: Mapping[str, np.ndarray]) -> Any:
        """Return the task's predictions for arrays with B rows, as NumPy arrays."""
        return jax.tree.map(np.asarray, self._predict(*self._weights, dict(batch)))

    def blanks(self) -> Iterator[Example]:
        """Yield one example of each shape, to compile for."""
        return self.form.blanks()
