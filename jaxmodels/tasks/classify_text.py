"""Text classification: one label for each sequence of tokens."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxmodels.errors import ConfigError
from jaxmodels.tasks import require


class ClassifyText:
    """Softmax cross-entropy over classes.

    Batches: `tokens` int [B, T] (-1 is padding), `label` int [B], `weight` float [B].
    """

    scores = ("macro_f1",)

    def __init__(self, info: Mapping, *, label_smoothing: float = 0.0):
        """
        Args:
          info: of the data set: `vocab_size`, `num_classes`.
          label_smoothing: probability taken from the true class and spread evenly over all (Szegedy et al. 2016).
            Training only.
        """
        require(info, "classify_text", "texts with labels", "vocab_size", "num_classes")
        if not 0 <= label_smoothing < 1:
            raise ConfigError(f"config.task.label_smoothing must lie in [0, 1), got {label_smoothing}.")
        self.provides = {"vocab_size": info["vocab_size"], "head": ("class", info["num_classes"])}
        self.batch = {"tokens": (None,), "label": ()}
        self.label_smoothing = label_smoothing

    def predict(self, model, batch):
        """Class probabilities of `tokens` [B, T]: float [B, number of classes]."""
        return jax.nn.softmax(self._logits(model, batch, None))

    def loss(self, model, batch, rngs):
        """The sum of weighted cross-entropies, the sum of weights, and metrics."""
        logits = self._logits(model, batch, rngs)
        metrics = _metrics(logits, batch)
        if not self.label_smoothing:
            return *metrics["loss"], metrics
        targets = optax.smooth_labels(jax.nn.one_hot(batch["label"], logits.shape[-1]), self.label_smoothing)
        losses = optax.softmax_cross_entropy(logits, targets)
        return jnp.sum(losses * batch["weight"]), jnp.sum(batch["weight"]), metrics

    def metrics(self, model, batch):
        """`loss` (without label smoothing) and `accuracy`."""
        return _metrics(self._logits(model, batch, None), batch)

    def outputs(self, model, batch):
        """The likeliest class of each row, and its label."""
        return {"predicted": jnp.argmax(self._logits(model, batch, None), axis=-1), "label": batch["label"]}

    def score(self, outputs):
        """`macro_f1`: the mean over classes (those that occur or are predicted) of the harmonic mean of precision and recall."""
        predicted, label = outputs["predicted"], outputs["label"]
        values = []
        for number in np.union1d(predicted, label):
            right = np.sum((predicted == number) & (label == number))
            values.append(2 * right / (np.sum(predicted == number) + np.sum(label == number)))
        return {"macro_f1": float(np.mean(values))}

    def summarize(self, values):
        return dict(values)

    def _logits(self, model, batch, rngs):
        return model(batch["tokens"], rngs=rngs).astype(jnp.float32)


def _metrics(logits, batch):
    weight = batch["weight"]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    correct = jnp.argmax(logits, axis=-1) == batch["label"]
    total = jnp.sum(weight)
    return {"loss": (jnp.sum(losses * weight), total), "accuracy": (jnp.sum(correct * weight), total)}
