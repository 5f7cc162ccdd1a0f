from ml_collections import ConfigDict


def get_config():
    c = ConfigDict()
    c.model = {"name": "forecast_transformer"}
    c.task = {"name": "forecast"}
    c.data = {"source": "csv:etth1/ETTh1.csv", "lookback": 336, "horizon": 96, "rows": (8640, 2880, 2880), "batch_size": 64}
    c.optimizer = {"name": "adam", "learning_rate": 5e-4, "schedule": {"name": "cosine", "warmup": 50}}
    c.training = {"epochs": 10}
    c.evaluation = {"every": 128}
    c.checkpoint = {"every": 128, "best": "mse"}
    return c
