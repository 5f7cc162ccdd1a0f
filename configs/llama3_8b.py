"""Llama 3 8B (Grattafiori et al. 2024) on 256 TPU v6e chips, 4 rows of 8,192 tokens per chip, with variants for 64 chips.

    jaxmodels train --config=configs/llama3_8b.py
    jaxmodels train --config=configs/llama3_8b.py:64    # 64 chips, one row per chip; parameters, gradients and optimizer state sharded 64 ways
    jaxmodels train --config=configs/llama3_8b.py:tensor    # sharded 16 ways, with 4-way tensor parallelism
    jaxmodels train --config=configs/llama3_8b.py:128k    # Llama 3.1's positions; rows of 131,072 tokens, each sharded 16 ways
    jaxmodels plan --config=configs/llama3_8b.py --topology=v6e-256

The tokens are random. For your own text, use --config.data.source=text:FILES with --config.data.tokenizer=FILE, and
remove the keys `vocab_size` and `examples`. Learning rate, weight decay and warm-up are the paper's. The loss is computed in tiles,
because all logits together would use half of the memory.

Reached: no result, never trained. The plan (jax 0.10.2, libtpu 0.0.52):
    v6e-256, data=8 fsdp=32: 4,992 M estimated cycles per step, 28.6 GB peak memory per device
        (MaxText's recipe, by the same compiler: 5,954 M cycles, 30.4 GB, with host offload)
        predicted: 3.86 s per step (3.63 to 4.21), MFU 54.6%, 48.6% with only unmasked pairs
        attention kernels: dkv × 32, dq × 32, fwd × 32; queries bf16[4,32,8192,128], keys bf16[4,8,8192,128], in blocks of 1,024 × 1,024
Time: not measured, no such machine was available.
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
    # Shards of 4096 / 32 = 128 values fill the 128 vector lanes. The optimizer state is sharded 256 ways.
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
        # Parameters and optimizer state are again sharded 64 ways, also over the context axis.
        c.sharding = {"context": "ring", "rules": (("embed", "fsdp", "context"), ("largest", "fsdp", "context"))}
    return c
