"""Text classification: one label for each sequence of tokens."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.tasks import losses
from jaxmodels.tasks.base import Task, one_class, read_tokens, require


class ClassifyText(Task):
    """Softmax cross-entropy over classes, focal loss, or a loss of one's own.

    Batches: `tokens` int [B, T] (-1 is padding), of two texts also `types` int [B, T], `label` int [B], `weight` float [B].
    """

    scores = ("macro_f1",)
    shown = ("loss", "accuracy", "macro_f1")

    def __init__(
        self,
        info: Mapping,
        *,
        label_smoothing: float = 0.0,
        loss: str = "cross_entropy",
        gamma: float = 2.0,
        class_weights: tuple[float, ...] | None = None,
    ):
        """
        Args:
          info: of the data set: `vocab_size`, `num_classes`.
          label_smoothing: probability taken from the true class and spread evenly over all classes (Szegedy et al. 2016). Training only.
          loss: `cross_entropy`, `focal` (Lin et al. 2017), or `package.module:function`; see `tasks.losses`.
          gamma: focusing parameter γ of the focal loss; 0 gives cross-entropy.
          class_weights: weight of each class in the training loss, in the order of the classes; the mean is over the sum of weights, as in PyTorch.
        """
        require(info, "classify_text", "texts with labels", "vocab_size", "num_classes")
        one_class(info, "several_classes_of_text")
        losses.check(label_smoothing=label_smoothing, gamma=gamma)
        self.provides = {"vocab_size": info["vocab_size"], "head": ("class", info["num_classes"])}
        self.batch = {"tokens": (None,), "label": ()} | ({"types": (None,)} if info.get("pairs") else {})
        self.label_smoothing = label_smoothing
        self.losses = losses.classification(loss, classes=info["num_classes"], gamma=gamma, label_smoothing=label_smoothing)
        self.class_weights = losses.check_class_weights(class_weights, info)

    def predict(self, model, batch, key=None):
        """Return class probabilities of `tokens` [B, T], float [B, C]."""
        return jax.nn.softmax(self._logits(model, batch, None))

    def loss(self, model, batch, rngs):
        """Return the sum of weighted losses, the sum of weights, and metrics."""
        logits = self._logits(model, batch, rngs)
        values = self.losses(logits, batch["label"], label_smoothing=self.label_smoothing)
        weight = losses.with_class_weights(batch["weight"], batch["label"], self.class_weights)
        return jnp.sum(values * weight), jnp.sum(weight), self._metrics(logits, batch)

    def evaluate(self, model, batch, key):
        """Return `loss`, without label smoothing, and `accuracy`."""
        return self._metrics(self._logits(model, batch, None), batch)

    def outputs(self, model, batch, key):
        """Return the most probable class of each row, and its label."""
        return {"predicted": jnp.argmax(self._logits(model, batch, None), axis=-1), "label": batch["label"]}

    def score(self, outputs):
        """Return `macro_f1`: the F1 score of each class, averaged over the classes that occur or are predicted."""
        predicted, label = outputs["predicted"], outputs["label"]
        values = []
        for number in np.union1d(predicted, label):
            right = np.sum((predicted == number) & (label == number))
            values.append(2 * right / (np.sum(predicted == number) + np.sum(label == number)))
        return {"macro_f1": float(np.mean(values))}

    def _logits(self, model, batch, rngs):
        return read_tokens(model, batch, rngs).astype(jnp.float32)

    def _metrics(self, logits, batch):
        weight = batch["weight"]
        correct = jnp.argmax(logits, axis=-1) == batch["label"]
        total = jnp.sum(weight)
        return {"loss": (jnp.sum(self.losses(logits, batch["label"]) * weight), total), "accuracy": (jnp.sum(correct * weight), total)}
