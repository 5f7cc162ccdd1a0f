"""Llama 3.1 405B (Grattafiori et al. 2024) on 1,024 TPU v5p chips, one row of 8,192 tokens per chip.

    jaxmodels train --config=configs/llama3_405b.py
    jaxmodels plan --config=configs/llama3_405b.py --topology=v5p-2048

The tokens are random. For your own text, use --config.data.source=text:FILES with --config.data.tokenizer=FILE, and
remove the keys `vocab_size` and `examples`. Learning rate and warm-up are the paper's.

Reached: no result, never trained. The plan (jax 0.10.2, libtpu 0.0.52):
    v5p-2048, data=8 fsdp=128: 99,312 M estimated cycles per step, 89.7 GB peak memory per device
        predicted: 61.8 s per step (60.5 to 69.5), MFU 75.9%, 73.0% with only unmasked pairs
        attention kernels: fwd × 252, dkv × 126, dq × 126; queries bf16[8,16,8192,128], keys bf16[8,1,8192,128], in blocks of 1,024 × 1,024
Time: not measured, no such machine was available.
"""

from ml_collections import ConfigDict


def get_config():
    c = ConfigDict()
    c.model = {"name": "llama3.1-405b", "scan": True, "remat": ("key", "value")}
    c.task = {"name": "language_model", "tiles": 4}
    c.data = {"source": "synthetic", "vocab_size": 128256, "sequence_length": 8192, "examples": 200_000_000, "batch_size": 1024}
    c.optimizer = {
        "name": "adamw",
        "learning_rate": 8e-5,
        "b2": 0.95,
        "weight_decay": 0.1,
        "clip_norm": 1.0,
        "schedule": {"name": "cosine", "warmup": 8000, "final": 0.1},
    }
    c.training = {"steps": 1_900_000, "precision": "bfloat16"}
    c.checkpoint = {"every": 500}
    # Shards of 16384 / 128 = 128 values fill the 128 vector lanes. The optimizer state is sharded 1,024 ways.
    c.mesh = {"data": 8, "fsdp": 128}
    c.sharding = {"optimizer": "data"}
    return c
