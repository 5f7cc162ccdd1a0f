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
