"""Image classification: one label for each image."""

from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp

from jaxmodels.errors import ConfigError
from jaxmodels.tasks import augment, losses


class Classify:
    """Softmax cross-entropy over classes, or focal loss.

    Batches: `image` float or uint8 [B, H, W, C] (uint8 is scaled to [0, 1]), `label` int [B], `weight` float [B].

    Augmentation is a part of the training loss, on the device, in this order: crop, flip, mixup or cutmix. It is drawn from
    the step's key, so a resumed run sees the same images; evaluation sees them as they are.
    """

    def __init__(
        self,
        info: Mapping,
        *,
        label_smoothing: float = 0.0,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        resize: tuple[int, ...] | None = None,
        crop: int = 0,
        flip: bool = False,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        mix_probability: float = 1.0,
        loss: Literal["cross_entropy", "focal"] = "cross_entropy",
        gamma: float = 2.0,
    ):
        """
        Args:
          info: of the data set: `image_shape`, `num_classes`.
          label_smoothing: probability taken from the true class and spread evenly over all (Szegedy et al. 2016).
            Training only.
          mean: of each channel, subtracted from every image.
          std: of each channel, which every image is then divided by.
          resize: height and width that the model reads, where the data's are others: images are stretched to that, bilinear, after they
            are cropped and flipped and before they are mixed.
          crop: rows and columns of black around an image, out of which a window of its size is cut at random.
          flip: mirror half of the images, left to right.
          mixup: alpha of mixup (Zhang et al. 2018): an image and its label are a share of one example and the rest of
            another, the share drawn from Beta(alpha, alpha). 0 is none.
          cutmix: alpha of cutmix (Yun et al. 2019): the same with a rectangle pasted in. With both, each example has one
            of the two, at random.
          mix_probability: share of the examples that is mixed at all.
          loss: `cross_entropy`, or `focal` (Lin et al. 2017), for which what is right already counts less.
          gamma: of `focal`: how much less.
        """
        for key in ("image_shape", "num_classes"):
            if key not in info:
                raise ConfigError(f"config.task: 'classify' needs images with labels that are whole numbers; this data source gives no {key}.")
        if len(info["image_shape"]) != 3:
            raise ConfigError(f"config.task: 'classify' needs images of (height, width, channels), got {tuple(info['image_shape'])}.")
        losses.check(label_smoothing=label_smoothing, gamma=gamma)
        for name, value in {"crop": crop, "mixup": mixup, "cutmix": cutmix}.items():
            if value < 0:
                raise ConfigError(f"config.task.{name} must not be negative, got {value}.")
        if not 0 <= mix_probability <= 1:
            raise ConfigError(f"config.task.mix_probability must lie in [0, 1], got {mix_probability}.")
        for name, value in {"mean": mean, "std": std}.items():
            if value is not None and len(value) != info["image_shape"][-1]:
                raise ConfigError(f"config.task.{name} has {len(value)} numbers; the images have {info['image_shape'][-1]} channels.")
        if std is not None and min(std) <= 0:
            raise ConfigError(f"config.task.std must be above 0, got {std}.")
        if resize is not None and (len(resize) != 2 or min(resize) < 1):
            raise ConfigError(f"config.task.resize is the height and width that the model reads, such as (224, 224), got {tuple(resize)}.")
        shape = tuple(info["image_shape"])
        self.resize = None if resize is None or tuple(resize) == shape[:2] else tuple(resize)
        self.provides = {"image_shape": (*(self.resize or shape[:2]), shape[2]), "num_classes": info["num_classes"]}
        self.batch = {"image": shape, "label": ()}
        self.across_rows = mixup > 0 or cutmix > 0  # an image is mixed with another row's: pmap, which shows each device its own, is refused
        self.label_smoothing, self.mean, self.std = label_smoothing, mean, std
        self.losses = losses.classification(loss, gamma)
        self.crop, self.flip, self.mixup, self.cutmix, self.mix_probability = crop, flip, mixup, cutmix, mix_probability

    def predict(self, model, batch):
        """Class probabilities, float [B, number of classes]."""
        return jax.nn.softmax(self._logits(model, self._scaled(batch["image"]), None))

    def loss(self, model, batch, rngs):
        """The sum of weighted losses, the sum of weights, and metrics.

        The `loss` of the metrics is without label smoothing; under mixup and cutmix it is that of the mixed labels, and
        `accuracy` is measured against the label of the example itself, whatever its share.
        """
        image, targets = self._augment(batch, rngs)
        logits = self._logits(model, image, rngs)
        values = self.losses(logits, targets, label_smoothing=self.label_smoothing)
        return jnp.sum(values * batch["weight"]), jnp.sum(batch["weight"]), self._metrics(logits, targets, batch)

    def metrics(self, model, batch):
        """`loss` (without label smoothing) and `accuracy`."""
        return self._metrics(self._logits(model, self._scaled(batch["image"]), None), batch["label"], batch)

    def summarize(self, values):
        return dict(values)

    def _augment(self, batch, rngs):
        """Images scaled and changed, and their labels: int [B], or where they are mixed, probabilities [B, classes]."""
        image, label = batch["image"], batch["label"]
        if self.crop:
            image = augment.random_crop(rngs.dropout(), image, self.crop)
        if self.flip:
            image = augment.random_flip(rngs.dropout(), image)
        image = self._scaled(image)
        if not (self.mixup or self.cutmix):
            return image, label
        mixed, share = augment.mix(rngs.dropout(), image, mixup_alpha=self.mixup, cutmix_alpha=self.cutmix, probability=self.mix_probability)
        counts = augment.partners(batch["weight"]) > 0  # a row that stands for a bad example is mixed into no other
        image, share = jnp.where(counts[:, None, None, None], mixed, image), jnp.where(counts, share, 1.0)
        target = jax.nn.one_hot(label, self.provides["num_classes"])
        return image, share[:, None] * target + (1 - share[:, None]) * augment.partners(target)

    def _scaled(self, image):
        """Values in [0, 1], and the size that the model reads."""
        image = augment.scale(image)
        return image if self.resize is None else augment.resize(image, *self.resize)

    def _logits(self, model, image, rngs):
        if self.mean is not None:
            image = image - jnp.asarray(self.mean, image.dtype)
        if self.std is not None:
            image = image / jnp.asarray(self.std, image.dtype)
        return model(image, rngs=rngs).astype(jnp.float32)

    def _metrics(self, logits, targets, batch):
        weight = batch["weight"]
        correct = jnp.argmax(logits, axis=-1) == batch["label"]
        total = jnp.sum(weight)
        return {"loss": (jnp.sum(self.losses(logits, targets) * weight), total), "accuracy": (jnp.sum(correct * weight), total)}
