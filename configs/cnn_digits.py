from ml_collections import ConfigDict


def get_config():
    c = ConfigDict()
    c.model = {"name": "cnn", "features": (32, 64), "hidden": 64, "dropout": 0.3}
    c.task = {"name": "classify"}
    c.data = {"source": "digits", "batch_size": 64}
    c.optimizer = {"name": "adam", "learning_rate": 2e-3, "schedule": {"name": "cosine"}}
    c.training = {"epochs": 40}
    c.evaluation = {"every": 100}
    c.checkpoint = {"every": 200, "best": "accuracy"}
    return c
