"""A small Vision Transformer on CIFAR-10, from a prepared TFDS folder: a full recipe for a GPU, and `:cpu`, a short one for two cores.

    jaxmodels train --config=configs/vit_cifar10.py --data_dir=DIR        # DIR/tensorflow_datasets/cifar10/3.0.2
    jaxmodels train --config=configs/vit_cifar10.py:cpu --data_dir=DIR

Patches of 4×4 pixels. The full recipe is 9 blocks of width 192 for 200 epochs, with mixup, cutmix and RandAugment; the short one is 6
blocks of width 96 for 500 steps of 64 images. Trained from scratch on 50,000 images, a Vision Transformer is less accurate than a ResNet.

Reached: `:cpu`: test accuracy 0.3642 (seed 0), after 32,000 images. The full recipe was not measured, no GPU was available.
Time: `:cpu`: 8 min 36 s of training on two CPU cores with a high load from other programs: an upper bound.
"""

from ml_collections import ConfigDict

from jaxmodels.errors import ConfigError


def get_config(arg=None):
    if arg not in (None, "cpu"):
        raise ConfigError(f"--config: vit_cifar10.py has one variant, 'cpu', not {arg!r}.")
    c = ConfigDict()
    c.model = {"name": "vit", "patch": 4, "layers": 9, "heads": 3, "width": 192, "pool": "mean", "stochastic_depth": 0.1}
    c.task = {
        "name": "classify",
        "mean": (0.4914, 0.4822, 0.4465),
        "std": (0.2470, 0.2435, 0.2616),
        "crop": 4,
        "flip": True,
        "mixup": 0.8,
        "cutmix": 1.0,
        "label_smoothing": 0.1,
    }
    c.data = {"source": "tfds:cifar10", "holdout": 2, "batch_size": 512, "eval_batch_size": 1000}
    c.optimizer = {"name": "adamw", "learning_rate": 1e-3, "weight_decay": 0.1, "clip_norm": 1.0, "schedule": {"name": "cosine", "warmup": 1000}}
    c.training = {"epochs": 200, "ema": 0.999, "precision": "bfloat16"}
    c.evaluation = {"every": 1900}
    c.checkpoint = {"every": 1900}
    c.data.rand_augment = {"operations": 2, "magnitude": 9.0}
    if arg == "cpu":
        del c.data.rand_augment
        c.model.layers, c.model.width, c.model.stochastic_depth = 6, 96, 0.0
        c.task.mixup = c.task.cutmix = c.task.label_smoothing = 0.0
        c.task.crop = 2
        c.data.batch_size, c.data.eval_batch_size = 64, 500
        c.optimizer.learning_rate, c.optimizer.schedule = 1e-3, {"name": "cosine", "warmup": 50}
        c.training = {"steps": 500}
        c.evaluation.every = c.checkpoint.every = 250
    return c
