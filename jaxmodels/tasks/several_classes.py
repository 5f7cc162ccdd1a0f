"""Classification with several classes: each class is there or not, independently of the others."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxmodels.errors import ConfigError
from jaxmodels.tasks import losses
from jaxmodels.tasks.base import Task, read_tokens, require
from jaxmodels.tasks.classify import Classify


class SeveralClasses(Task):
    """Sigmoid cross-entropy, averaged over classes.

    Batches: `label` float [B, C], 1 for each class of a row; `weight` float [B]; and the inputs of a subclass.
    """

    scores = ("f1", "macro_f1", "exact_match")
    shown = ("loss", "f1", "macro_f1", "exact_match")
    threshold: float
    positive_weights: tuple[float, ...] | None

    def logits(self, model, batch, rngs):
        """Return float32 [B, C]."""
        raise NotImplementedError

    def predict(self, model, batch, key=None):
        """Return the probability of each class, float [B, C]."""
        return jax.nn.sigmoid(self.logits(model, batch, None))

    def loss(self, model, batch, rngs):
        """Return the sum of weighted losses, the sum of weights, and metrics."""
        logits = self.logits(model, batch, rngs)
        plain = optax.sigmoid_binary_cross_entropy(logits, batch["label"])
        values = plain if self.positive_weights is None else plain * jnp.where(batch["label"] > 0, jnp.asarray(self.positive_weights, plain.dtype), 1)
        total = jnp.sum(batch["weight"])
        return jnp.sum(values.mean(-1) * batch["weight"]), total, {"loss": (jnp.sum(plain.mean(-1) * batch["weight"]), total)}

    def evaluate(self, model, batch, key):
        """Return `loss`, without weights of classes."""
        plain = optax.sigmoid_binary_cross_entropy(self.logits(model, batch, None), batch["label"])
        return {"loss": (jnp.sum(plain.mean(-1) * batch["weight"]), jnp.sum(batch["weight"]))}

    def outputs(self, model, batch, key):
        """Return which classes of each row are predicted, and which it has, bool [B, C]."""
        return {"predicted": self.predict(model, batch) >= self.threshold, "label": batch["label"] > 0}

    def score(self, outputs):
        """Return `f1` over all rows and classes, `macro_f1`, the mean over the classes that occur or are predicted, and `exact_match` of whole rows."""
        predicted, label = np.asarray(outputs["predicted"], bool), np.asarray(outputs["label"], bool)
        right, made = (predicted & label).sum(0), predicted.sum(0) + label.sum(0)
        of_class = 2 * right[made > 0] / made[made > 0]
        exact = float((predicted == label).all(1).mean())
        return {"f1": float(2 * right.sum() / max(made.sum(), 1)), "macro_f1": float(of_class.mean()) if len(of_class) else 0.0, "exact_match": exact}

    def _set_up(self, info: Mapping, threshold: float, positive_weights: tuple[float, ...] | None) -> None:
        if not info.get("several_classes"):
            raise ConfigError("config.task: its data has one class a row; use data.label='classes', or the task 'classify' or 'classify_text'.")
        if not 0 < threshold < 1:
            raise ConfigError(f"config.task.threshold must lie between 0 and 1, got {threshold}.")
        self.threshold = threshold
        self.positive_weights = losses.check_class_weights(positive_weights, info, "positive_weights")
        self.batch = {**self.batch, "label": (info["num_classes"],)}


class SeveralClassesOfText(SeveralClasses):
    """Several classes of a text: `tokens` int [B, T] (-1 is padding), of two texts also `types` int [B, T]."""

    def __init__(self, info: Mapping, *, threshold: float = 0.5, positive_weights: tuple[float, ...] | None = None):
        """
        Args:
          info: of the data set: `vocab_size`, `num_classes`, `several_classes`.
          threshold: probability from which a class counts as predicted.
          positive_weights: weight of each class where it is there, in the order of the classes; training only.
        """
        require(info, "several_classes_of_text", "texts with labels", "vocab_size", "num_classes")
        self.provides = {"vocab_size": info["vocab_size"], "head": ("class", info["num_classes"])}
        self.batch = {"tokens": (None,)} | ({"types": (None,)} if info.get("pairs") else {})
        self._set_up(info, threshold, positive_weights)

    def logits(self, model, batch, rngs):
        return read_tokens(model, batch, rngs).astype(jnp.float32)


class SeveralClassesOfImages(SeveralClasses):
    """Several classes of an image: `image` float or uint8 [B, H, W, C]; scaled and augmented as by `classify`."""

    def __init__(
        self,
        info: Mapping,
        *,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        resize: tuple[int, ...] | None = None,
        crop: int = 0,
        flip: bool = False,
        threshold: float = 0.5,
        positive_weights: tuple[float, ...] | None = None,
    ):
        """
        Args:
          info: of the data set: `image_shape`, `num_classes`, `several_classes`.
          mean: of each channel, subtracted from every image.
          std: of each channel; divides every image after the mean is subtracted.
          resize: (height, width) of the model's input.
          crop: pixels of zero padding on each side, from which a window of the image's size is cut at random.
          flip: mirror half of the images, left to right.
          threshold: probability from which a class counts as predicted.
          positive_weights: weight of each class where it is there, in the order of the classes; training only.
        """
        self._images = Classify(dict(info) | {"several_classes": False}, mean=mean, std=std, resize=resize, crop=crop, flip=flip)
        self.mean, self.std = mean, std
        self.provides, self.batch = self._images.provides, self._images.batch
        self._set_up(info, threshold, positive_weights)

    def logits(self, model, batch, rngs):
        return self._images.logits(model, batch, rngs)
