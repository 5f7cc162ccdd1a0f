"""A task of your own, with a metric of its own: losses and metrics are pairs (sum, weight)."""

import jax
import jax.numpy as jnp

from jaxmodels.tasks import Task


class Rank(Task):
    """Classification that counts how often the label is among the k likeliest classes."""

    higher_is_better = {"top_k": True}
    shown = ("loss", "top_k")

    def __init__(self, info, *, k: int = 2):
        """
        Args:
          k: number of classes that may hold the label.
        """
        self.provides = {"image_shape": info["image_shape"], "num_classes": info["num_classes"]}
        self.batch = {"image": tuple(info["image_shape"]), "label": ()}
        self.k = k

    def loss(self, model, batch, rngs):
        metrics = self._metrics(model, batch)
        return *metrics["loss"], metrics

    def evaluate(self, model, batch, key):
        return self._metrics(model, batch)

    def predict(self, model, batch, key=None):
        return jax.nn.softmax(model(batch["image"]))

    def _metrics(self, model, batch):
        logits, label, weight = model(batch["image"]).astype(jnp.float32), batch["label"], batch["weight"]
        loss = -jnp.take_along_axis(jax.nn.log_softmax(logits), label[:, None], axis=1)[:, 0]
        found = jnp.any(jax.lax.top_k(logits, self.k)[1] == label[:, None], axis=1)
        return {"loss": (jnp.sum(loss * weight), jnp.sum(weight)), "top_k": (jnp.sum(found * weight), jnp.sum(weight))}
