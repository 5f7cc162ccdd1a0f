"""A config that names all of them."""

from ml_collections import ConfigDict


def get_config():
    c = ConfigDict()
    c.model = {"name": "own_model:Mlp", "hidden": 48}
    c.task = {"name": "own_task:Rank", "k": 1}
    c.data = {"source": "own_source:moons", "batch_size": 50}
    c.optimizer = {"name": "own_optimizer:signed_momentum", "learning_rate": 3e-3, "schedule": {"name": "own_schedule:triangle", "start": 0.2}}
    c.training = {"epochs": 30}
    c.evaluation = {"every": 30}
    c.checkpoint = {"every": 60, "best": "top_k"}
    c.log = {"every": 30, "trackers": ("jsonl", {"name": "own_tracker:Markdown", "file": "table.md"})}
    c.callbacks = ({"name": "own_callback:StopWhenGood", "metric": "top_k", "above": 0.97},)
    return c
