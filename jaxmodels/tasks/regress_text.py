"""Text regression: one number for each sequence of tokens."""

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from scipy import stats

from jaxmodels.tasks import require


class RegressText:
    """Mean squared error.

    Batches: `tokens` int [B, T] (-1 is padding), `label` float [B], `weight` float [B].
    """

    scores = ("pearson", "spearman")

    def __init__(self, info: Mapping, *, center: float = 0.0, scale: float = 1.0):
        """
        Args:
          info: of the data set: `vocab_size`.
          center, scale: a prediction is `center + scale *` the model's output: of the size of the labels' mean and
            deviation, where these are far from 0 and 1. Metrics are in the labels' own units.
        """
        require(info, "regress_text", "texts", "vocab_size")
        self.provides = {"vocab_size": info["vocab_size"], "head": ("value", 1)}
        self.batch = {"tokens": (None,), "label": ()}
        self.center, self.scale = center, scale

    def predict(self, model, batch):
        """The number of each of `tokens` [B, T]: float [B]."""
        return self._value(model, batch, None)

    def loss(self, model, batch, rngs):
        """The sum of squared errors, the sum of weights, and metrics."""
        metrics = _metrics(self._value(model, batch, rngs), batch)
        return *metrics["mse"], metrics

    def metrics(self, model, batch):
        """`mse` and `mae`."""
        return _metrics(self._value(model, batch, None), batch)

    def outputs(self, model, batch):
        """The prediction and the label of each row."""
        return {"predicted": self._value(model, batch, None), "label": batch["label"].astype(jnp.float32)}

    def score(self, outputs):
        """The correlations of predictions and labels: `pearson`, and `spearman`, of their ranks; 0 where one of them is constant."""
        predicted, label = outputs["predicted"].astype(np.float64), outputs["label"].astype(np.float64)
        if len(label) < 2 or not np.ptp(predicted) or not np.ptp(label):
            return {"pearson": 0.0, "spearman": 0.0}
        return {"pearson": float(stats.pearsonr(predicted, label)[0]), "spearman": float(stats.spearmanr(predicted, label)[0])}

    def summarize(self, values):
        """Adds `loss`, which is the `mse`."""
        return {"loss": values["mse"]} | dict(values)

    def _value(self, model, batch, rngs):
        return self.center + self.scale * model(batch["tokens"], rngs=rngs)[:, 0].astype(jnp.float32)


def _metrics(value, batch):
    error, weight = value - batch["label"], batch["weight"]
    total = jnp.sum(weight)
    return {"mse": (jnp.sum(error**2 * weight), total), "mae": (jnp.sum(jnp.abs(error) * weight), total)}
