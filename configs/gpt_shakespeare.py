from ml_collections import ConfigDict


def get_config():
    c = ConfigDict()
    c.model = {"name": "gpt", "layers": 4, "heads": 4, "width": 128, "context": 64}
    c.task = {"name": "language_model"}
    c.data = {"source": "text:tinyshakespeare/input.txt", "sequence_length": 64, "stride": 1, "batch_size": 12, "eval_batch_size": 64}
    c.optimizer = {
        "name": "adamw",
        "learning_rate": 4e-3,
        "b2": 0.99,
        "weight_decay": 0.1,
        "clip_norm": 1.0,
        "schedule": {"name": "cosine", "warmup": 100, "final": 0.1},
    }
    c.training = {"steps": 2000}
    c.evaluation = {"every": 500}
    c.checkpoint = {"every": 500}
    return c
