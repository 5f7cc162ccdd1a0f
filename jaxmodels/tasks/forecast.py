"""Forecasting: the next rows of a table, from those before."""

from collections.abc import Mapping

import jax.numpy as jnp

from jaxmodels.errors import ConfigError


class Forecast:
    """Mean squared error over all variables and all rows of the horizon, in standardised units.

    Batches: `past` float [B, L, V], `future` float [B, H, V], `weight` float [B].
    """

    def __init__(self, info: Mapping, *, instance_norm: bool = True):
        """
        Args:
          info: of the data set: `lookback`, `horizon`, `variables`.
          instance_norm: the model sees each window standardised by its own past, and its forecast is scaled back
            (Kim et al. 2022, without their learned scale): what drifts over the years does not mislead it.
        """
        for key in ("lookback", "horizon", "variables"):
            if key not in info:
                raise ConfigError(f"config.task: 'forecast' needs a table over time; this data source gives no {key}.")
        self.provides = {key: info[key] for key in ("lookback", "horizon", "variables")}
        self.batch = {"past": (info["lookback"], info["variables"]), "future": (info["horizon"], info["variables"])}
        self.instance_norm = instance_norm

    def predict(self, model, batch):
        """The forecast, float [B, H, V]."""
        return self._forecast(model, batch["past"], None)

    def loss(self, model, batch, rngs):
        """The sum of squared errors, how many there are, and metrics."""
        metrics = _metrics(self._forecast(model, batch["past"], rngs), batch)
        return *metrics["mse"], metrics

    def metrics(self, model, batch):
        """`mse` and `mae`."""
        return _metrics(self._forecast(model, batch["past"], None), batch)

    def summarize(self, values):
        """Adds `loss`, which is the `mse`."""
        return {"loss": values["mse"]} | dict(values)

    def _forecast(self, model, past, rngs):
        if not self.instance_norm:
            return model(past, rngs=rngs).astype(jnp.float32)
        mean = past.mean(axis=1, keepdims=True)
        deviation = jnp.sqrt(past.var(axis=1, keepdims=True) + 1e-5)
        return (model((past - mean) / deviation, rngs=rngs) * deviation + mean).astype(jnp.float32)


def _metrics(forecast, batch):
    error = forecast - batch["future"]
    weight = jnp.broadcast_to(batch["weight"][:, None, None], error.shape)
    total = jnp.sum(weight)
    return {"mse": (jnp.sum(error**2 * weight), total), "mae": (jnp.sum(jnp.abs(error) * weight), total)}
