"""Small configs that compile quickly."""

import copy

from jaxmodels.config import set_at

CNN = {
    "model": {"name": "cnn", "features": (4, 8), "hidden": 16, "dropout": 0.2},
    "task": {"name": "classify"},
    "data": {"source": "digits", "batch_size": 32},
    "optimizer": {"name": "adam", "learning_rate": 3e-3},
    "training": {"steps": 60},
    "evaluation": {"every": 20},
    "checkpoint": {"every": 10},
    "log": {"every": 10},
}
LSTM = {
    "model": {"name": "lstm", "layers": 2, "width": 16, "dropout": 0.1},
    "task": {"name": "language_model", "sample_length": 0},
    "data": {"source": "python_docs", "sequence_length": 16, "batch_size": 16, "eval_batch_size": 256, "holdout": 0.02},
    "optimizer": {"name": "adamw", "learning_rate": 3e-3, "weight_decay": 0.01, "clip_norm": 1.0},
    "training": {"steps": 60},
    "evaluation": {"every": 20},
    "checkpoint": {"every": 10},
    "log": {"every": 10},
}
GPT = copy.deepcopy(LSTM) | {"model": {"name": "gpt", "layers": 2, "heads": 2, "width": 16, "context": 16, "dropout": 0.1}}
ALL = {"cnn": CNN, "lstm": LSTM, "gpt": GPT}


def config(base: dict, **changes) -> dict:
    """Return a copy with changes; `training__steps=3` sets training.steps."""
    result = copy.deepcopy(base)
    for key, value in changes.items():
        set_at(result, key.replace("__", "."), value)
    return result
