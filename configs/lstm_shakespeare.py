"""Two LSTM layers of width 256 on the characters of tinyshakespeare.

    jaxmodels train --config=configs/lstm_shakespeare.py --data_dir=DIR     # DIR/tinyshakespeare/input.txt

Evaluated on the last tenth of the text, with each character as a target once, in windows of 128.

Reached: validation loss 1.607.
Time: 7 min 41 s of training on two CPU cores with a load from other programs: an upper bound.
"""

from ml_collections import ConfigDict


def get_config():
    c = ConfigDict()
    c.model = {"name": "lstm", "layers": 2, "width": 256, "dropout": 0.0}
    c.task = {"name": "language_model"}
    c.data = {"source": "text:tinyshakespeare/input.txt", "sequence_length": 128, "stride": 1, "batch_size": 16, "eval_batch_size": 64}
    c.optimizer = {"name": "adam", "learning_rate": 4e-3, "clip_norm": 1.0, "schedule": {"name": "cosine", "warmup": 100}}
    c.training = {"steps": 2000}
    c.evaluation = {"every": 500}
    c.checkpoint = {"every": 500, "best": "loss"}
    return c
