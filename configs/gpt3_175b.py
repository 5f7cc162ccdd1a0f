"""GPT-3 175B (Brown et al. 2020) on 512 TPU v5p chips, 3 rows of 2,048 tokens per chip.

    jaxmodels train --config=configs/gpt3_175b.py
    jaxmodels plan --config=configs/gpt3_175b.py --topology=v5p-1024

The tokens are random. For your own text, use --config.data.source=text:FILES with --config.data.tokenizer=FILE, and
remove the keys `vocab_size` and `examples`. Learning rate, weight decay, clipping and batch size are the paper's (0.6e-4, 3.1 million tokens).

Reached: no result, never trained. The plan (jax 0.10.2, libtpu 0.0.52):
    v5p-1024, data=16 fsdp=32: 31,236 M estimated cycles per step, 96.5 GB peak memory per device
        predicted: 19.1 s per step (18.3 to 22.4), MFU 75.4%, 74.4% with only unmasked pairs
        attention kernels: dkv × 96, dq × 96, fwd × 96; queries bf16[3,96,1,2048,128], keys bf16[3,96,1,2048,128], in blocks of 1,024 × 1,024
Time: not measured, no such machine was available.
"""

from ml_collections import ConfigDict


def get_config():
    c = ConfigDict()
    c.model = {"name": "gpt3-175b", "scan": True, "remat": ("query", "attention")}
    c.task = {"name": "language_model"}
    c.data = {"source": "synthetic", "vocab_size": 50257, "sequence_length": 2048, "examples": 200_000_000, "batch_size": 1536}
    c.optimizer = {
        "name": "adamw",
        "learning_rate": 6e-5,
        "b2": 0.95,
        "weight_decay": 0.1,
        "clip_norm": 1.0,
        "schedule": {"name": "cosine", "warmup": 120, "final": 0.1},
    }
    c.training = {"steps": 95_000, "precision": "bfloat16"}
    c.checkpoint = {"every": 500}
    # Shards of 12288 / 32 = 384 values are a multiple of the 128 vector lanes. The optimizer state is sharded 512 ways.
    c.mesh = {"data": 16, "fsdp": 32}
    c.sharding = {"optimizer": "data"}
    return c
