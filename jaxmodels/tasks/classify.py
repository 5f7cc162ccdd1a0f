"""Image classification: one label for each image."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax

from jaxmodels.errors import ConfigError


class Classify:
    """Softmax cross-entropy over classes.

    Batches: `image` float or uint8 [B, H, W, C] (uint8 is scaled to [0, 1]), `label` int [B], `weight` float [B].
    """

    def __init__(self, info: Mapping, *, label_smoothing: float = 0.0):
        """
        Args:
          info: of the data set: `image_shape`, `num_classes`.
          label_smoothing: probability taken from the true class and spread evenly over all (Szegedy et al. 2016).
            Training only.
        """
        for key in ("image_shape", "num_classes"):
            if key not in info:
                raise ConfigError(f"config.task: 'classify' needs images with labels; this data source gives no {key}.")
        if not 0 <= label_smoothing < 1:
            raise ConfigError(f"config.task.label_smoothing must lie in [0, 1), got {label_smoothing}.")
        if len(info["image_shape"]) != 3:
            raise ConfigError(f"config.task: 'classify' needs images of (height, width, channels), got {tuple(info['image_shape'])}.")
        self.provides = {"image_shape": tuple(info["image_shape"]), "num_classes": info["num_classes"]}
        self.batch = {"image": self.provides["image_shape"], "label": ()}
        self.label_smoothing = label_smoothing

    def predict(self, model, batch):
        """Class probabilities, float [B, number of classes]."""
        return jax.nn.softmax(self._logits(model, batch["image"], None))

    def loss(self, model, batch, rngs):
        """The sum of weighted cross-entropies, the sum of weights, and metrics."""
        logits = self._logits(model, batch["image"], rngs)
        metrics = _metrics(logits, batch)
        if not self.label_smoothing:
            return *metrics["loss"], metrics
        targets = optax.smooth_labels(jax.nn.one_hot(batch["label"], logits.shape[-1]), self.label_smoothing)
        losses = optax.softmax_cross_entropy(logits, targets)
        return jnp.sum(losses * batch["weight"]), jnp.sum(batch["weight"]), metrics

    def metrics(self, model, batch):
        """`loss` (without label smoothing) and `accuracy`."""
        return _metrics(self._logits(model, batch["image"], None), batch)

    def summarize(self, values):
        return dict(values)

    def _logits(self, model, image, rngs):
        if image.dtype == jnp.uint8:
            image = image.astype(jnp.float32) / 255
        return model(image, rngs=rngs).astype(jnp.float32)


def _metrics(logits, batch):
    weight = batch["weight"]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    correct = jnp.argmax(logits, axis=-1) == batch["label"]
    total = jnp.sum(weight)
    return {"loss": (jnp.sum(losses * weight), total), "accuracy": (jnp.sum(correct * weight), total)}
