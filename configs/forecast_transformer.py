"""PatchTST on ETTh1: horizon of 96 hours, all seven variables, splits of 12/4/4 months.

    jaxmodels train --config=configs/forecast_transformer.py --data_dir=DIR     # DIR/etth1/ETTh1.csv

Published results (test MSE / MAE): DLinear 0.375 / 0.399, PatchTST/64 0.370 / 0.400.

Reached: test MSE 0.391, MAE 0.409; the error still decreases slowly at the end of the run.
Time: 5 min 31 s of training on two CPU cores.
Both were measured before attention had separate matrices for queries, keys and values; the initial weights differ now.
"""

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
