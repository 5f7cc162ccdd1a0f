"""The small CNN on MNIST, from a prepared TFDS folder.

    jaxmodels train --config=configs/cnn_mnist.py --data_dir=DIR     # DIR/tensorflow_datasets/mnist/3.0.1

The last 3,000 training images are the validation split. For comparison: Flax's example CNN has 99.17% after 10 epochs.

Reached: test accuracy 0.9926 (99.26%), the mean of three seeds.
Time: 3 min 20 s of training on two CPU cores.
"""

from ml_collections import ConfigDict


def get_config():
    c = ConfigDict()
    c.model = {"name": "cnn", "features": (32, 64), "hidden": 64, "dropout": 0.4}
    c.task = {"name": "classify"}
    c.data = {
        "source": "tfds:mnist",
        "splits": {"train": "train[:57000]", "validation": "train[57000:]", "test": "test"},
        "batch_size": 64,
        "eval_batch_size": 500,
    }
    c.optimizer = {"name": "adam", "learning_rate": 1.5e-3, "schedule": {"name": "cosine", "warmup": 200}}
    c.training = {"epochs": 8, "ema": 0.995}
    c.evaluation = {"every": 890}
    c.checkpoint = {"every": 890}
    return c
