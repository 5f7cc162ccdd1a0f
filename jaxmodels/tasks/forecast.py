"""Forecasting: the next rows of a table, from the rows before."""

from collections.abc import Mapping

import jax.numpy as jnp

from jaxmodels.models.functional import compute_dtype
from jaxmodels.tasks import losses
from jaxmodels.tasks.base import Task, require


class Forecast(Task):
    """A regression error, the mean squared error by default, over all variables and all rows of the horizon, in standardised units.

    Batches: `past` float [B, L, V], `future` float [B, H, V], `weight` float [B].
    """

    exact_inputs = ("past", "future")
    shown = ("loss", "mse", "mae")

    def __init__(self, info: Mapping, *, instance_norm: bool = True, loss: str = "mse", delta: float = 1.0):
        """
        Args:
          info: of the data set: `lookback`, `horizon`, `variables`.
          instance_norm: standardise each window by its own past, and scale the forecast back (Kim et al. 2022, without their learned scale).
            It removes the drift of mean and scale over time.
          loss: `mse`, `mae`, `huber`, or `package.module:function`; see `tasks.losses`.
          delta: error above which `huber` is linear.
        """
        require(info, "forecast", "a table over time", "lookback", "horizon", "variables")
        self.provides = {key: info[key] for key in ("lookback", "horizon", "variables")}
        self.batch = {"past": (info["lookback"], info["variables"]), "future": (info["horizon"], info["variables"])}
        losses.check(delta=delta)
        self.instance_norm = instance_norm
        self.error = losses.regression(loss, delta)

    def predict(self, model, batch, key=None):
        """Return the forecast, float [B, H, V]."""
        return self._forecast(model, batch["past"], None)

    def loss(self, model, batch, rngs):
        """Return the sum of errors, their number, and metrics."""
        metrics = self._errors(model, batch, rngs)
        return *metrics[self.error[0]], metrics

    def evaluate(self, model, batch, key):
        """Return `mse` and `mae`, and the loss by its name if it is another."""
        return self._errors(model, batch, None)

    def summarize(self, values):
        """Add `loss`, the error that is trained on."""
        return {"loss": values[self.error[0]]} | dict(values)

    def _errors(self, model, batch, rngs):
        forecast = self._forecast(model, batch["past"], rngs)
        return losses.errors(forecast, batch["future"], batch["weight"][:, None, None], loss=self.error)

    def _forecast(self, model, past, rngs):
        """Run the model in its compute dtype, on a window that is standardised in float32."""
        dtype = compute_dtype(model)
        if not self.instance_norm:
            return model(past.astype(dtype), rngs=rngs).astype(jnp.float32)
        mean = past.mean(axis=1, keepdims=True)
        deviation = jnp.sqrt(past.var(axis=1, keepdims=True) + 1e-5)
        normalised = (past - mean) / deviation
        return model(normalised.astype(dtype), rngs=rngs).astype(jnp.float32) * deviation + mean
