"""Text regression: one number for each sequence of tokens."""

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from scipy import stats

from jaxmodels.tasks import losses
from jaxmodels.tasks.base import Task, read_tokens, require


class RegressText(Task):
    """A regression error, the squared error by default.

    Batches: `tokens` int [B, T] (-1 is padding), of two texts also `types` int [B, T], `label` float [B], `weight` float [B].
    """

    scores = ("pearson", "spearman")
    shown = ("loss", "mse", "mae", "pearson")

    def __init__(
        self,
        info: Mapping,
        *,
        center: float = 0.0,
        scale: float = 1.0,
        loss: str = "mse",
        delta: float = 1.0,
    ):
        """
        Args:
          info: of the data set: `vocab_size`.
          center, scale: a prediction is `center + scale *` the model's output. Set them near the labels' mean and standard deviation if those
            are far from 0 and 1. Metrics are in the labels' own units.
          loss: `mse`, `mae`, `huber`, or `package.module:function`; see `tasks.losses`.
          delta: error, in the labels' units, above which `huber` is linear.
        """
        require(info, "regress_text", "texts", "vocab_size")
        self.provides = {"vocab_size": info["vocab_size"], "head": ("value", 1)}
        self.batch = {"tokens": (None,), "label": ()} | ({"types": (None,)} if info.get("pairs") else {})
        losses.check(delta=delta)
        self.center, self.scale = center, scale
        self.error = losses.regression(loss, delta)

    def predict(self, model, batch, key=None):
        """Return the value of each row of `tokens` [B, T], float [B]."""
        return self._value(model, batch, None)

    def loss(self, model, batch, rngs):
        """Return the sum of errors, the sum of weights, and metrics."""
        metrics = self._errors(model, batch, rngs)
        return *metrics[self.error[0]], metrics

    def evaluate(self, model, batch, key):
        """Return `mse` and `mae`, and the loss by its name if it is another."""
        return self._errors(model, batch, None)

    def outputs(self, model, batch, key):
        """Return the prediction and the label of each row."""
        return {"predicted": self._value(model, batch, None), "label": batch["label"].astype(jnp.float32)}

    def score(self, outputs):
        """Return the correlations of predictions and labels, `pearson` and `spearman`; 0 if predictions or labels are constant."""
        predicted, label = outputs["predicted"].astype(np.float64), outputs["label"].astype(np.float64)
        if len(label) < 2 or not np.ptp(predicted) or not np.ptp(label):
            return {"pearson": 0.0, "spearman": 0.0}
        return {"pearson": float(stats.pearsonr(predicted, label)[0]), "spearman": float(stats.spearmanr(predicted, label)[0])}

    def summarize(self, values):
        """Add `loss`, the error that is trained on."""
        return {"loss": values[self.error[0]]} | dict(values)

    def _errors(self, model, batch, rngs):
        return losses.errors(self._value(model, batch, rngs), batch["label"], batch["weight"], loss=self.error)

    def _value(self, model, batch, rngs):
        return self.center + self.scale * read_tokens(model, batch, rngs)[:, 0].astype(jnp.float32)
