"""An LSTM over patches of each variable's past on ETTh1: horizon of 96 hours, all seven variables, splits of 12/4/4 months.

    jaxmodels train --config=configs/forecast_lstm.py --data_dir=DIR     # DIR/etth1/ETTh1.csv

Published results (test MSE / MAE): DLinear 0.375 / 0.399, PatchTST/64 0.370 / 0.400.

Reached: test MSE 0.3900, the mean of three seeds.
Time: 1 min 52 s of training on two CPU cores.
"""

from ml_collections import ConfigDict


def get_config():
    c = ConfigDict()
    c.model = {"name": "forecast_lstm"}
    c.task = {"name": "forecast"}
    c.data = {"source": "csv:etth1/ETTh1.csv", "lookback": 336, "horizon": 96, "rows": (8640, 2880, 2880), "batch_size": 64}
    c.optimizer = {"name": "adam", "learning_rate": 1e-3, "schedule": {"name": "cosine", "warmup": 50}}
    c.training = {"epochs": 10}
    c.evaluation = {"every": 128}
    c.checkpoint = {"every": 128, "best": "mse"}
    return c
