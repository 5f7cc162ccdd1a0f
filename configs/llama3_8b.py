"""Llama 3 8B (Grattafiori et al. 2024) on 256 TPU v6e chips, 4 rows of 8,192 tokens on each; and variants for 64 chips.

    jaxmodels train --config=configs/llama3_8b.py
    jaxmodels train --config=configs/llama3_8b.py:64    # 64 chips, a row on each; parameters, gradients and optimizer state in 64 shares
    jaxmodels train --config=configs/llama3_8b.py:tensor    # in 16 shares, and each matrix in 4 parts
    jaxmodels train --config=configs/llama3_8b.py:128k    # Llama 3.1's positions: each row of 131,072 tokens in 16 parts
    jaxmodels plan --config=configs/llama3_8b.py --topology=v6e-256

The tokens are random, made up as they are read: for text of your own, --config.data.source=text:FILES with --config.data.tokenizer=FILE, and
without the keys `vocab_size` and `examples`. Learning rate, decay and warm-up are the paper's. The vocabulary's loss is computed in tiles: its logits alone would take half of the memory.

Reached: nothing: it was never trained here. The plan (jax 0.10.2, libtpu 0.0.52):
    v6e-256, data=8 fsdp=32: 4,992 M estimated cycles a step, 28.6 GB at most on a device (MaxText's recipe, read the same way: 5,954 M cycles, 30.4 GB, with host offload)
        predicted: 3.96 s a step, MFU 53.1%, 47.3% by what masks leave
        attention kernels: dkv × 32, dq × 32, fwd × 32; queries bf16[4,32,8192,128], keys bf16[4,8,8192,128], in blocks of 1,024 × 1,024
Time: not measured: no such machine was at hand.
"""

from ml_collections import ConfigDict

from jaxmodels.errors import ConfigError


def get_config(arg=None):
    if arg not in (None, "64", "tensor", "128k"):
        raise ConfigError(f"--config: llama3_8b.py has the variants '64', 'tensor' and '128k', not {arg!r}.")
    c = ConfigDict()
    c.model = {"name": "llama3-8b", "scan": True, "remat": ("attention",)}
    c.task = {"name": "language_model", "tiles": 8}
    c.data = {"source": "synthetic", "vocab_size": 128256, "sequence_length": 8192, "examples": 100_000_000, "batch_size": 1024}
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
    # Shares of 4096 / 32 = 128 values fill the lanes of a vector; what the optimizer keeps is in 256 shares.
    c.mesh = {"data": 8, "fsdp": 32}
    c.sharding = {"optimizer": "data"}
    if arg is None:
        return c
    c.model = {"name": "llama3-8b", "scan": True, "remat": "full"}
    c.task.tiles, c.data.batch_size, c.sharding = 1, 64, {}
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
