"""ResNet-18 on CIFAR-10, from a prepared TFDS folder: a full recipe for a GPU, and `:cpu`, a short one for two cores.

    jaxmodels train --config=configs/resnet_cifar10.py --data_dir=DIR        # DIR/tensorflow_datasets/cifar10/3.0.2
    jaxmodels train --config=configs/resnet_cifar10.py:cpu --data_dir=DIR

The full recipe uses the `cifar` stem, which does not reduce the resolution before the first stage, for 40 epochs. The short one is the
same network with the `imagenet` stem, which needs a sixteenth of the computation per image, at a lower accuracy.

Reached: `:cpu`: test accuracy 0.5809 (seed 0), after 38,400 images. The full recipe was not measured, no GPU was available.
Time: `:cpu`: 2 min 15 s of training on two CPU cores.
"""

from ml_collections import ConfigDict

from jaxmodels.errors import ConfigError


def get_config(arg=None):
    if arg not in (None, "cpu"):
        raise ConfigError(f"--config: resnet_cifar10.py has one variant, 'cpu', not {arg!r}.")
    c = ConfigDict()
    c.model = {"name": "resnet18", "stem": "cifar"}
    c.task = {
        "name": "classify",
        "mean": (0.4914, 0.4822, 0.4465),
        "std": (0.2470, 0.2435, 0.2616),
        "crop": 4,
        "flip": True,
        "label_smoothing": 0.1,
    }
    c.data = {"source": "tfds:cifar10", "holdout": 2, "batch_size": 512, "eval_batch_size": 1000}
    c.optimizer = {
        "name": "sgd",
        "learning_rate": 0.4,
        "momentum": 0.9,
        "nesterov": True,
        "weight_decay": 5e-4,
        "schedule": {"name": "linear", "warmup": 800},
    }
    c.training = {"epochs": 40, "ema": 0.998, "precision": "bfloat16"}
    c.evaluation = {"every": 480}
    c.checkpoint = {"every": 480}
    if arg == "cpu":
        c.model.stem = "imagenet"
        c.task.crop, c.task.label_smoothing = 0, 0.0
        c.data.batch_size, c.data.eval_batch_size = 64, 500
        c.optimizer.learning_rate, c.optimizer.schedule = 0.08, {"name": "linear", "warmup": 100}
        c.training = {"steps": 600}
        c.evaluation.every = c.checkpoint.every = 300
    return c
