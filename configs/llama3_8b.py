"""A decoder of the size of Llama 3 8B (Grattafiori et al. 2024) on 64 TPU chips: 8,192 tokens a row, or with Llama 3.1's positions 131,072.

    jaxmodels train --config=configs/llama3_8b.py           # parameters, gradients and optimizer state in 64 shares
    jaxmodels train --config=configs/llama3_8b.py:tensor    # in 16 shares, and each matrix in 4 parts
    jaxmodels train --config=configs/llama3_8b.py:128k      # each row of 131,072 tokens in 16 parts

The tokens are random, made up as they are read: for text of your own, --config.data.source=text:FILES with
--config.data.tokenizer=FILE.json (128,256 tokens) and without the keys `vocab_size` and `examples`. Learning rate, decay and warm-up
are those of the paper. Half a million tokens a step; the paper's four million are the same with eight times the batch and
--config.training.accumulate=8.

Reached: nothing: it was never trained here. That its train step compiles for v5p:4x4x4 and v6e:8x8, and what memory and
    operations it takes there, says
    pytest -m tpu_compiler -n 0 -s -k llama3_8b tests/test_tpu_compiler.py
Time: not measured: no such machine was at hand.
"""

from ml_collections import ConfigDict

from jaxmodels.errors import ConfigError


def get_config(arg=None):
    if arg not in (None, "tensor", "128k"):
        raise ConfigError(f"--config: llama3_8b.py has the variants 'tensor' and '128k', not {arg!r}.")
    c = ConfigDict()
    c.model = {"name": "llama3-8b", "scan": True, "remat": "full"}
    c.task = {"name": "language_model"}
    c.data = {"source": "synthetic", "vocab_size": 128256, "sequence_length": 8192, "examples": 100_000_000, "batch_size": 64}
    c.optimizer = {
        "name": "adamw",
        "learning_rate": 3e-4,
        "b2": 0.95,
        "weight_decay": 0.1,
        "clip_norm": 1.0,
        "schedule": {"name": "cosine", "warmup": 8000, "final": 0.01},
    }
    c.training = {"steps": 1_200_000, "precision": "bfloat16"}
    c.checkpoint = {"every": 1000}
    c.mesh = {"data": 1, "fsdp": 64}
    if arg == "tensor":
        c.mesh = {"data": 1, "fsdp": 16, "tensor": 4}
    elif arg == "128k":
        c.model.name = "llama3.1-8b"
        c.data.sequence_length, c.data.examples, c.data.batch_size = 131072, 10_000_000, 4
        c.mesh = {"data": 1, "fsdp": 4, "context": 16}
        # Parameters and their optimizer's state lie in 64 shares here too: along the parts of a row as well.
        c.sharding = {"context": "ring", "rules": (("embed", "fsdp", "context"), ("largest", "fsdp", "context"))}
    return c
