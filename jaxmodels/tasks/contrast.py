"""Contrastive learning of images without labels: two views of an image are similar, views of different images are not."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from jaxmodels.errors import ConfigError
from jaxmodels.tasks import augment, losses
from jaxmodels.tasks.base import Task, require


class Contrast(Task):
    """NT-Xent of SimCLR (Chen et al. 2020), symmetric InfoNCE, or a loss of one's own, over the images of a batch.

    The model is any image classifier; its output is the embedding, [B, width]. A classifier takes over the other layers by `init_from`,
    without the last one (Chen et al. drop two layers more).

    Batches: `image` float or uint8 [B, H, W, C] (uint8 is scaled to [0, 1]), `weight` float [B]. Rows of weight 0 are no negatives. With
    `training.accumulate`, negatives come from the microbatch.
    """

    across_rows = True

    def __init__(
        self,
        info: Mapping,
        *,
        width: int = 64,
        loss: str = "nt_xent",
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
          loss: `nt_xent` (negatives are all other views), `info_nce` (negatives are the second views of the other images, and the other way
            round), or `package.module:function`; see `tasks.losses`.
          temperature: divides cosine similarities.
          crop: pixels of zero padding on each side, from which each view is cut at random.
          flip: mirror half of the views, left to right.
          brightness: each view is multiplied by a factor drawn from [1 - brightness, 1 + brightness].
          noise: standard deviation of Gaussian noise added to every value.
        """
        require(info, "contrast", "images", "image_shape")
        if len(info["image_shape"]) != 3:
            raise ConfigError(f"config.task: 'contrast' needs images of (height, width, channels), got {tuple(info['image_shape'])}.")
        losses.check(temperature=temperature)
        if crop < 0 or noise < 0 or not 0 <= brightness < 1 or width < 1:
            raise ConfigError("config.task: crop and noise must not be negative, brightness lie in [0, 1), and width be at least 1.")
        if not (crop or flip or brightness or noise):
            raise ConfigError("config.task: 'contrast' needs views that differ: set at least one of crop, flip, brightness and noise.")
        self.provides = {"image_shape": tuple(info["image_shape"]), "num_classes": width}
        self.batch = {"image": self.provides["image_shape"]}
        self.crop, self.flip, self.brightness, self.noise = crop, flip, brightness, noise
        self.contrast, self.temperature = losses.contrastive(loss), temperature

    def predict(self, model, batch, key=None):
        """Return embeddings of unit length of the images, not augmented, float [B, width]."""
        embedding = model(augment.scale(batch["image"])).astype(jnp.float32)
        return embedding / jnp.maximum(jnp.linalg.norm(embedding, axis=-1, keepdims=True), 1e-6)

    def loss(self, model, batch, rngs):
        """Return the sum of weighted losses, the sum of weights, and metrics."""
        image = augment.scale(batch["image"])
        return self._contrast(model, batch, [self._view(key, image) for key in jax.random.split(rngs.dropout())], rngs)

    def evaluate(self, model, batch, key):
        """Return `loss`, and `accuracy`: how often the partner is the most similar of all second views. Both depend on the batch size.

        A row's views are drawn from its key, so that they are the same in every evaluation.
        """
        image = augment.scale(batch["image"])
        views = jax.vmap(lambda key, image: [self._view(k, image[None])[0] for k in jax.random.split(key)])(key, image)
        return self._contrast(model, batch, views, None)[2]

    def _contrast(self, model, batch, views, rngs):
        weight = batch["weight"]
        one, other = jnp.split(model(jnp.concatenate(views), rngs=rngs).astype(jnp.float32), 2)
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
