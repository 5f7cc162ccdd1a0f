"""A small CNN on the handwritten digits of scikit-learn, 8x8 pixels (no download).

    jaxmodels train --config=configs/cnn_digits.py --workdir=runs/cnn_digits

Reached: test accuracy 0.9944 (step 700, the best on validation; seed 0).
Time: 3 s of training on two CPU cores, 11 s with imports and compilation.
"""

from ml_collections import ConfigDict


def get_config():
    c = ConfigDict()
    c.model = {"name": "cnn", "features": (32, 64), "hidden": 64, "dropout": 0.3}
    c.task = {"name": "classify"}
    c.data = {"source": "digits", "batch_size": 64}
    c.optimizer = {"name": "adam", "learning_rate": 2e-3, "schedule": {"name": "cosine"}}
    c.training = {"epochs": 40}
    c.evaluation = {"every": 100}
    c.checkpoint = {"every": 200, "best": "loss"}
    return c
