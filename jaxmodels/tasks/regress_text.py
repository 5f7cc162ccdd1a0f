"""Text regression: one number for each sequence of tokens."""

from collections.abc import Mapping
from typing import Literal

import jax.numpy as jnp
import numpy as np
from scipy import stats

from jaxmodels.tasks import losses, require


class RegressText:
    """An error, squared unless asked otherwise.

    Batches: `tokens` int [B, T] (-1 is padding), `label` float [B], `weight` float [B].
    """

    scores = ("pearson", "spearman")

    def __init__(
        self,
        info: Mapping,
        *,
        center: float = 0.0,
        scale: float = 1.0,
        loss: Literal["mse", "mae", "huber"] = "mse",
        delta: float = 1.0,
    ):
        """
        Args:
          info: of the data set: `vocab_size`.
          center, scale: a prediction is `center + scale *` the model's output: of the size of the labels' mean and
            deviation, where these are far from 0 and 1. Metrics are in the labels' own units.
          loss: `mse`, `mae` or `huber`.
          delta: error, in the labels' units, from which on `huber` is linear.
        """
        require(info, "regress_text", "texts", "vocab_size")
        self.provides = {"vocab_size": info["vocab_size"], "head": ("value", 1)}
        self.batch = {"tokens": (None,), "label": ()}
        losses.check(delta=delta)
        self.center, self.scale = center, scale
        self.error = {"loss": loss, "delta": delta}

    def predict(self, model, batch):
        """The number of each of `tokens` [B, T]: float [B]."""
        return self._value(model, batch, None)

    def loss(self, model, batch, rngs):
        """The sum of errors, the sum of weights, and metrics."""
        metrics = self._errors(model, batch, rngs)
        return *metrics[self.error["loss"]], metrics

    def metrics(self, model, batch):
        """`mse` and `mae`, and `huber` where that is the loss."""
        return self._errors(model, batch, None)

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
        """Adds `loss`, which is that error of the others."""
        return {"loss": values[self.error["loss"]]} | dict(values)

    def _errors(self, model, batch, rngs):
        return losses.errors(self._value(model, batch, rngs), batch["label"], batch["weight"], **self.error)

    def _value(self, model, batch, rngs):
        return self.center + self.scale * model(batch["tokens"], rngs=rngs)[:, 0].astype(jnp.float32)
