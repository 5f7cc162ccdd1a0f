"""Contrastive learning of images without labels: two views of one image are to be told from those of all others."""

from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp

from jaxmodels.errors import ConfigError
from jaxmodels.tasks import augment, losses, require


class Contrast:
    """NT-Xent of SimCLR (Chen et al. 2020), or InfoNCE in both directions, over the images of a batch.

    The model is any that classifies images; what it gives is the embedding, [B, width]. Its other layers are what is
    learned here: a classifier takes them by `init_from`, without the last (Chen et al. keep two layers more apart).

    Batches: `image` float or uint8 [B, H, W, C] (uint8 is scaled to [0, 1]), `weight` float [B]. Rows of weight 0 are nobody's
    negative. With `training.accumulate`, the others are those of a microbatch.
    """

    def __init__(
        self,
        info: Mapping,
        *,
        width: int = 64,
        loss: Literal["nt_xent", "info_nce"] = "nt_xent",
        temperature: float = 0.1,
        crop: int = 4,
        flip: bool = False,
        brightness: float = 0.0,
        noise: float = 0.0,
    ):
        """
        Args:
          info: of the data set: `image_shape`.
          width: of the embedding.
          loss: `nt_xent`: the partner among all other views; `info_nce`: among the second views of all images, and back.
          temperature: that cosines are divided by.
          crop: rows and columns of black around an image, out of which each view is cut at random.
          flip: mirror half of the views, left to right.
          brightness: values are multiplied by a number between 1 less and 1 more this.
          noise: standard deviation of what is added to every value, drawn anew.
        """
        require(info, "contrast", "images", "image_shape")
        if len(info["image_shape"]) != 3:
            raise ConfigError(f"config.task: 'contrast' needs images of (height, width, channels), got {tuple(info['image_shape'])}.")
        losses.check(temperature=temperature)
        if crop < 0 or noise < 0 or not 0 <= brightness < 1 or width < 1:
            raise ConfigError("config.task: crop and noise must not be negative, brightness lie in [0, 1), and width be at least 1.")
        if not (crop or flip or brightness or noise):
            raise ConfigError("config.task: 'contrast' learns from views that differ; give at least one of crop, flip, brightness and noise.")
        self.provides = {"image_shape": tuple(info["image_shape"]), "num_classes": width}
        self.batch = {"image": self.provides["image_shape"]}
        self.across_rows = True  # a row's loss is that of its batch: pmap, which shows each device its own rows, is refused
        self.crop, self.flip, self.brightness, self.noise = crop, flip, brightness, noise
        self.contrast, self.temperature = losses.CONTRASTIVE[loss], temperature

    def predict(self, model, batch):
        """Embeddings of length 1, float [B, width], of the images as they are."""
        embedding = model(augment.scale(batch["image"])).astype(jnp.float32)
        return embedding / jnp.maximum(jnp.linalg.norm(embedding, axis=-1, keepdims=True), 1e-6)

    def loss(self, model, batch, rngs):
        """The sum of weighted losses, the sum of weights, and metrics."""
        return self._contrast(model, batch, rngs.dropout(), rngs)

    def metrics(self, model, batch):
        """`loss`, and `accuracy`: how often the partner is the most similar of all second views. Both depend on the batch's size.

        The views are those of a fixed key, so that they are the same in every evaluation.
        """
        return self._contrast(model, batch, jax.random.key(0), None)[2]

    def summarize(self, values):
        return dict(values)

    def _contrast(self, model, batch, key, rngs):
        image, weight = augment.scale(batch["image"]), batch["weight"]
        views = jnp.concatenate([self._view(k, image) for k in jax.random.split(key)])
        one, other = jnp.split(model(views, rngs=rngs).astype(jnp.float32), 2)
        values = self.contrast(one, other, temperature=self.temperature, valid=weight > 0)
        similar = jnp.where(weight > 0, losses.cosines(one, other), -jnp.inf)
        correct = jnp.argmax(similar, axis=-1) == jnp.arange(len(one))
        total, count = jnp.sum(values * weight), jnp.sum(weight)
        return total, count, {"loss": (total, count), "accuracy": (jnp.sum(correct * weight), count)}

    def _view(self, key, image):
        keys = jax.random.split(key, 4)
        if self.crop:
            image = augment.random_crop(keys[0], image, self.crop)
        if self.flip:
            image = augment.random_flip(keys[1], image)
        if self.brightness:
            factor = jax.random.uniform(keys[2], (len(image), 1, 1, 1), minval=1 - self.brightness, maxval=1 + self.brightness)
            image = image * factor.astype(image.dtype)
        if self.noise:
            image = image + self.noise * jax.random.normal(keys[3], image.shape, image.dtype)
        return image
