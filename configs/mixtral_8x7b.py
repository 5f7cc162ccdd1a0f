"""A mixture of experts of the size of Mixtral 8x7B (Jiang et al. 2024), 46.7 billion parameters, 12.9 per token, on 64 TPU v5p chips, 4 rows of 4,096
tokens per chip.

    jaxmodels train --config=configs/mixtral_8x7b.py
    jaxmodels train --config=configs/mixtral_8x7b.py:expert    # 64 chips of 32 GB, one row per chip; 8-way expert parallelism
    jaxmodels plan --config=configs/mixtral_8x7b.py --topology=v5p-128

The tokens are random. For your own text, use --config.data.source=text:FILES with --config.data.tokenizer=FILE.model
(32,000 tokens) and remove the keys `vocab_size` and `examples`. Mixtral's optimizer settings were not published; these are of Llama 2
(Touvron et al. 2023).

Reached: no result, never trained. The plan (jax 0.10.2, libtpu 0.0.52):
    v5p-128, data=2 fsdp=32: 2,324 M estimated cycles per step, 45.8 GB peak memory per device
        predicted: 5.11 s per step (4.83 to 5.87), MFU 73.7%, 71.4% with only unmasked pairs
        attention kernels: dkv × 32, dq × 32, fwd × 32; queries bf16[4,32,4096,128], keys bf16[4,8,4096,128], in blocks of 1,024 × 1,024
Time: not measured, no such machine was available.
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
    # Without expert parallelism, all-gathering the matrices of all experts takes less time than sending tokens to their experts, and
    # buffers have the exact number of assignments; with it, they must have the maximum number for each expert.
    c.mesh = {"data": 2, "fsdp": 32}
    if arg == "expert":
        c.model = {"name": "mixtral-8x7b", "scan": True, "remat": "full"}
        c.data.batch_size = 64
        c.mesh = {"data": 1, "fsdp": 8, "expert": 8}
    return c
