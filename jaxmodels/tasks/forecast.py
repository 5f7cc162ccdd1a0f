"""Forecasting: the next rows of a table, from those before."""

from collections.abc import Mapping
from typing import Literal

import jax.numpy as jnp

from jaxmodels.errors import ConfigError
from jaxmodels.tasks import losses


class Forecast:
    """An error, mean squared unless asked otherwise, over all variables and all rows of the horizon, in standardised units.

    Batches: `past` float [B, L, V], `future` float [B, H, V], `weight` float [B].
    """

    def __init__(self, info: Mapping, *, instance_norm: bool = True, loss: Literal["mse", "mae", "huber"] = "mse", delta: float = 1.0):
        """
        Args:
          info: of the data set: `lookback`, `horizon`, `variables`.
          instance_norm: the model sees each window standardised by its own past, and its forecast is scaled back
            (Kim et al. 2022, without their learned scale): what drifts over the years does not mislead it.
          loss: `mse`, `mae` or `huber`.
          delta: error from which on `huber` is linear.
        """
        for key in ("lookback", "horizon", "variables"):
            if key not in info:
                raise ConfigError(f"config.task: 'forecast' needs a table over time; this data source gives no {key}.")
        self.provides = {key: info[key] for key in ("lookback", "horizon", "variables")}
        self.batch = {"past": (info["lookback"], info["variables"]), "future": (info["horizon"], info["variables"])}
        losses.check(delta=delta)
        self.instance_norm = instance_norm
        self.error = {"loss": loss, "delta": delta}

    def predict(self, model, batch):
        """The forecast, float [B, H, V]."""
        return self._forecast(model, batch["past"], None)

    def loss(self, model, batch, rngs):
        """The sum of errors, how many there are, and metrics."""
        metrics = self._errors(model, batch, rngs)
        return *metrics[self.error["loss"]], metrics

    def metrics(self, model, batch):
        """`mse` and `mae`, and `huber` where that is the loss."""
        return self._errors(model, batch, None)

    def summarize(self, values):
        """Adds `loss`, which is that error of the others."""
        return {"loss": values[self.error["loss"]]} | dict(values)

    def _errors(self, model, batch, rngs):
        forecast = self._forecast(model, batch["past"], rngs)
        return losses.errors(forecast, batch["future"], batch["weight"][:, None, None], **self.error)

    def _forecast(self, model, past, rngs):
        if not self.instance_norm:
            return model(past, rngs=rngs).astype(jnp.float32)
        mean = past.mean(axis=1, keepdims=True)
        deviation = jnp.sqrt(past.var(axis=1, keepdims=True) + 1e-5)
        return (model((past - mean) / deviation, rngs=rngs) * deviation + mean).astype(jnp.float32)
