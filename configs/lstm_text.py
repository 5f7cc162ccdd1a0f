from ml_collections import ConfigDict


def get_config():
    c = ConfigDict()
    c.model = {"name": "lstm", "layers": 2, "width": 256, "dropout": 0.1}
    c.task = {"name": "language_model"}
    c.data = {"source": "python_docs", "sequence_length": 128, "stride": 1, "batch_size": 16, "eval_batch_size": 64}
    c.optimizer = {"name": "adam", "learning_rate": 4e-3, "clip_norm": 1.0, "schedule": {"name": "cosine", "warmup": 100}}
    c.training = {"steps": 1000}
    c.evaluation = {"every": 250}
    c.checkpoint = {"every": 250, "best": "loss"}
    return c
