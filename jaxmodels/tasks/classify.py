"""Image classification: one label for each image."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from jaxmodels.errors import ConfigError
from jaxmodels.tasks import augment, losses
from jaxmodels.tasks.base import Task, one_class, require


class Classify(Task):
    """Softmax cross-entropy over classes, focal loss, or a loss of one's own.

    Batches: `image` float or uint8 [B, H, W, C] (uint8 is scaled to [0, 1]), `label` int [B], `weight` float [B].

    Augmentation is part of the training loss and runs on the device, in this order: crop, flip, mixup or cutmix. Its key is a function of
    seed and step, so that a resumed run sees the same images. Evaluation does not augment.
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
        loss: str = "cross_entropy",
        gamma: float = 2.0,
        class_weights: tuple[float, ...] | None = None,
    ):
        """
        Args:
          info: of the data set: `image_shape`, `num_classes`.
          label_smoothing: probability taken from the true class and spread evenly over all classes (Szegedy et al. 2016). Training only.
          mean: of each channel, subtracted from every image.
          std: of each channel; divides every image after the mean is subtracted.
          resize: (height, width) of the model's input. Images of another size are resized, bilinear, after crop and flip and before mixing.
          crop: pixels of zero padding on each side, from which a window of the image's size is cut at random.
          flip: mirror half of the images, left to right.
          mixup: alpha of mixup (Zhang et al. 2018): image and label are an average of two examples, its weight drawn from Beta(alpha, alpha).
            0 turns it off.
          cutmix: alpha of cutmix (Yun et al. 2019): a rectangle of another example is pasted in. 0 turns it off. With both, each example gets
            one of the two, at random.
          mix_probability: share of the examples that are mixed.
          loss: `cross_entropy`, `focal` (Lin et al. 2017), or `package.module:function`; see `tasks.losses`.
          gamma: focusing parameter γ of the focal loss; 0 gives cross-entropy.
          class_weights: weight of each class in the training loss, in the order of the classes; the mean is over the sum of weights, as in PyTorch.
        """
        require(info, "classify", "images with labels that are whole numbers", "image_shape", "num_classes")
        one_class(info, "several_classes")
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
        self.across_rows = mixup > 0 or cutmix > 0
        self.label_smoothing, self.mean, self.std = label_smoothing, mean, std
        self.losses = losses.classification(loss, classes=info["num_classes"], gamma=gamma, label_smoothing=label_smoothing, mixed=self.across_rows)
        self.class_weights = losses.check_class_weights(class_weights, info)
        self.crop, self.flip, self.mixup, self.cutmix, self.mix_probability = crop, flip, mixup, cutmix, mix_probability

    def predict(self, model, batch, key=None):
        """Return class probabilities, float [B, C]."""
        return jax.nn.softmax(self._logits(model, self._scaled(batch["image"]), None))

    def loss(self, model, batch, rngs):
        """Return the sum of weighted losses, the sum of weights, and metrics.

        The metric `loss` has no label smoothing. Under mixup and cutmix it is that of the mixed labels; `accuracy` counts the label of the
        example itself, however little of it is left.
        """
        image, targets = self._augment(batch, rngs)
        logits = self._logits(model, image, rngs)
        values = self.losses(logits, targets, label_smoothing=self.label_smoothing)
        weight = losses.with_class_weights(batch["weight"], targets, self.class_weights)
        return jnp.sum(values * weight), jnp.sum(weight), self._metrics(logits, targets, batch)

    def logits(self, model, batch, rngs):
        """Return the logits of scaled images, float32 [B, C]; in training (`rngs` given) of augmented ones that are not mixed."""
        image = self._scaled(batch["image"]) if rngs is None else self._augment(batch, rngs)[0]
        return self._logits(model, image, rngs)

    def evaluate(self, model, batch, key):
        """Return `loss`, without label smoothing, and `accuracy`."""
        return self._metrics(self._logits(model, self._scaled(batch["image"]), None), batch["label"], batch)

    def _augment(self, batch, rngs):
        """Return augmented images and their labels: int [B], or probabilities [B, C] if images are mixed."""
        image, label = batch["image"], batch["label"]
        if self.crop:
            image = augment.random_crop(rngs.dropout(), image, self.crop)
        if self.flip:
            image = augment.random_flip(rngs.dropout(), image)
        image = self._scaled(image)
        if not (self.mixup or self.cutmix):
            return image, label
        mixed, share = augment.mix(rngs.dropout(), image, mixup_alpha=self.mixup, cutmix_alpha=self.cutmix, probability=self.mix_probability)
        counts = augment.partners(batch["weight"]) > 0  # a skipped example has weight 0 and must not be mixed into others
        image, share = jnp.where(counts[:, None, None, None], mixed, image), jnp.where(counts, share, 1.0)
        target = jax.nn.one_hot(label, self.provides["num_classes"])
        return image, share[:, None] * target + (1 - share[:, None]) * augment.partners(target)

    def _scaled(self, image):
        """Scale uint8 to [0, 1], and resize to the model's input size."""
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
