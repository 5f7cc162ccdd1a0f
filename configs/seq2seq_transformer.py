"""A small encoder–decoder Transformer that converts dates in various formats to ISO 8601 (no download).

    jaxmodels train --config=configs/seq2seq_transformer.py

Inputs have fourteen formats, such as `Thursday, March 5, 1998` and `5.III.1998`. No day of the test split is in the training split, in
any format. Exact match compares whole dates, decoded greedily.

Reached: test exact match 0.9980, the mean of three seeds.
Time: 1 min 22 s of training on two CPU cores.
"""

from ml_collections import ConfigDict


def get_config():
    c = ConfigDict()
    c.model = {
        "name": "encoder_decoder",
        "context": 32,
        "layers": 2,
        "heads": 4,
        "width": 64,
        "mlp_width": 256,
        "positions": "learned",
        "post_norm": False,
    }
    c.task = {"name": "seq2seq"}
    c.data = {"source": "dates", "batch_size": 100, "eval_batch_size": 200}
    c.optimizer = {"name": "adam", "learning_rate": 2e-3, "clip_norm": 1.0, "schedule": {"name": "cosine", "warmup": 100}}
    c.training = {"steps": 1500}
    c.evaluation = {"every": 300}
    c.checkpoint = {"every": 300, "best": "exact_match"}
    return c
