"""Llama 2 7B (Touvron et al. 2023) on 64 TPU v5p chips, 4 rows of 4,096 tokens per chip, with variants for four slices and for long rows.

    jaxmodels train --config=configs/llama2_7b.py
    jaxmodels train --config=configs/llama2_7b.py:slices    # four such slices, 256 chips
    jaxmodels train --config=configs/llama2_7b.py:128k    # rows of 131,072 tokens, each sharded 16 ways
    jaxmodels plan --config=configs/llama2_7b.py --topology=v5p-128
    jaxmodels plan --config=configs/llama2_7b.py:slices --topology=4xv5p-128
    jaxmodels plan --config=configs/llama2_7b.py:128k --topology=v5p-128

The tokens are random. For your own text, use --config.data.source=text:FILES with --config.data.tokenizer=FILE, and
remove the keys `vocab_size` and `examples`. Learning rate, weight decay and warm-up are the paper's.
The activations named in `remat` are saved, so the backward pass recomputes only norms, values and the output of attention. Parameters are
sharded 32 ways, in shards of 128 values, the number of vector lanes; with 64 shards, all-gathers compile to sums of zero-padded arrays.

Reached: no result, never trained. The plans (jax 0.10.2, libtpu 0.0.52):
    v5p-128, data=2 fsdp=32: 3,019 M estimated cycles per step, 47.0 GB peak memory per device
        (MaxText's recipe, by the same compiler: 4,041 M cycles, 49.3 GB)
        predicted: 2.00 s per step (1.94 to 2.15), MFU 82.4%, 76.7% with only unmasked pairs
        attention kernels: dkv × 32, dq × 32, fwd × 32; queries bf16[4,32,4096,128], keys bf16[4,32,4096,128], in blocks of 1,024 × 1,024
    :slices, 4xv5p-128, slices=4 data=2 fsdp=32: 3,044 M estimated cycles per step, 49.3 GB peak memory per device
        predicted: 2.02 s per step (1.96 to 2.21), MFU 81.6%, 75.9% with only unmasked pairs
        attention kernels: dkv × 32, dq × 32, fwd × 32; queries bf16[4,32,4096,128], keys bf16[4,32,4096,128], in blocks of 1,024 × 1,024
    :128k, v5p-128, data=4 context=16: 3,520 M estimated cycles per step, 48.4 GB peak memory per device
        predicted: 9.31 s per step (7.62 to 10.8), MFU 94.2%, 54.7% with only unmasked pairs
        attention kernels: dkv × 32, dq × 32, fwd × 32; queries bf16[2,2,131072,128], keys bf16[2,2,131072,128], in blocks of 1,024 × 2,048
Time: not measured, no such machine was available.
"""

from ml_collections import ConfigDict

from jaxmodels.errors import ConfigError


def get_config(arg=None):
    if arg not in (None, "slices", "128k"):
        raise ConfigError(f"--config: llama2_7b.py has the variants 'slices' and '128k', not {arg!r}.")
    c = ConfigDict()
    c.model = {"name": "llama2-7b", "scan": True, "remat": ("query", "key", "attention", "gate", "up")}
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
    c.mesh = {"data": 2, "fsdp": 32}
    if arg == "slices":
        c.mesh.slices, c.data.batch_size = 4, 1024
    elif arg == "128k":
        c.model.context, c.data.sequence_length, c.data.batch_size, c.data.examples = 131072, 131072, 8, 3_000_000
        # The shards of a row exchange heads (all-to-all); each device has two heads. Parameters are sharded 16 ways over this axis,
        # the optimizer state 64 ways.
        c.mesh = {"data": 4, "context": 16}
        c.sharding = {"context": "heads", "optimizer": "data", "rules": (("embed", "context"), ("largest", "context"))}
    return c
