"""Llama 2 70B (Touvron et al. 2023) on 512 TPU v5p chips, 2 rows of 4,096 tokens per chip.

    jaxmodels train --config=configs/llama2_70b.py
    jaxmodels plan --config=configs/llama2_70b.py --topology=v5p-1024

The tokens are random. For your own text, use --config.data.source=text:FILES with --config.data.tokenizer=FILE, and
remove the keys `vocab_size` and `examples`. Learning rate, weight decay and warm-up are the paper's.
Parameters are sharded 64 ways, the optimizer state 512 ways.

Reached: no result, never trained. The plan (jax 0.10.2, libtpu 0.0.52):
    v5p-1024, data=8 fsdp=64: 16,942 M estimated cycles per step, 38.3 GB peak memory per device
        (MaxText's recipe, by the same compiler: 19,775 M cycles, 41.1 GB)
        predicted: 10.4 s per step (10.2 to 11.7), MFU 76.5%, 73.7% with only unmasked pairs
        attention kernels: dkv × 80, dq × 80, fwd × 80; queries bf16[2,64,4096,128], keys bf16[2,8,4096,128], in blocks of 1,024 × 1,024
Time: not measured, no such machine was available.
"""

from ml_collections import ConfigDict


def get_config():
    c = ConfigDict()
    c.model = {"name": "llama2-70b", "scan": True, "remat": ("key", "value", "attention")}
    c.task = {"name": "language_model"}
    c.data = {"source": "synthetic", "vocab_size": 32000, "sequence_length": 4096, "examples": 100_000_000, "batch_size": 1024}
    c.optimizer = {
        "name": "adamw",
        "learning_rate": 1.5e-4,
        "b2": 0.95,
        "weight_decay": 0.1,
        "clip_norm": 1.0,
        "schedule": {"name": "cosine", "warmup": 2000, "final": 0.1},
    }
    c.training = {"steps": 500_000, "precision": "bfloat16"}
    c.checkpoint = {"every": 1000}
    c.mesh = {"data": 8, "fsdp": 64}
    c.sharding = {"optimizer": "data"}
    return c
