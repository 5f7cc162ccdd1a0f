"""A mixture of the size of Mixtral 8x7B (Jiang et al. 2024), 46.7 billion parameters, 12.9 a token, on 64 TPU v5p chips, 4 rows of 4,096 tokens on each.

    jaxmodels train --config=configs/mixtral_8x7b.py
    jaxmodels train --config=configs/mixtral_8x7b.py:expert     # 64 chips of 32 GB, a row on each: each of 8 groups of chips has one of the 8 experts of each layer
    jaxmodels plan --config=configs/mixtral_8x7b.py --topology=v5p-128

@PLAN@
"""

from ml_collections import ConfigDict

from jaxmodels.errors import ConfigError


def get_config(arg=None):
    if arg not in (None, "expert"):
        raise ConfigError(f"--config: mixtral_8x7b.py has the variant 'expert', not {arg!r}.")
    c = ConfigDict()
    c.model = {"name": "mixtral-8x7b", "scan": True, "remat": ("query", "key", "value", "attention")}
    c.task = {"name": "language_model"}
    c.data = {"source": "synthetic", "vocab_size": 32000, "sequence_length": 4096, "examples": 100_000_000, "batch_size": 256}
    c.optimizer = {
        "name": "adamw",
        "learning_rate": 3e-4,
        "b2": 0.95,
        "weight_decay": 0.1,
        "clip_norm": 1.0,
        "schedule": {"name": "cosine", "warmup": 2000, "final": 0.1},
    }
    c.training = {"steps": 500_000, "precision": "bfloat16"}
    c.checkpoint = {"every": 1000}
    # Every chip has all experts of a layer when it runs: their matrices come together in less time than tokens go to their experts, and
    # rows are laid out for the assignments that there are; where experts are apart, for the most that might come to one.
    c.mesh = {"data": 2, "fsdp": 32}
    if arg == "expert":
        c.model.remat, c.data.batch_size = "full", 64
        c.mesh = {"data": 1, "fsdp": 8, "expert": 8}
    return c
