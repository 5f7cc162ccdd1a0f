"""Llama 2 7B (Touvron et al. 2023) on 64 TPU v5p chips, 4 rows of 4,096 tokens on each; and variants for four slices and for long rows.

    jaxmodels train --config=configs/llama2_7b.py
    jaxmodels train --config=configs/llama2_7b.py:slices    # four such slices, 256 chips
    jaxmodels train --config=configs/llama2_7b.py:128k    # rows of 131,072 tokens, each in 16 parts
    jaxmodels plan --config=configs/llama2_7b.py --topology=v5p-128
    jaxmodels plan --config=configs/llama2_7b.py:slices --topology=4xv5p-128
    jaxmodels plan --config=configs/llama2_7b.py:128k --topology=v5p-128

The tokens are random, made up as they are read: for text of your own, --config.data.source=text:FILES with --config.data.tokenizer=FILE, and
without the keys `vocab_size` and `examples`. Learning rate, decay and warm-up are the paper's. Of a block's activations those named in `remat` stay, so that only norms, values and what attention adds
are computed again; parameters are in 32 shares of 128 values, which fill the lanes of a vector: in 64, gathers become sums of zeros.

Reached: nothing: it was never trained here. The plans (jax 0.10.2, libtpu 0.0.52):
    v5p-128, data=2 fsdp=32: 3,019 M estimated cycles a step, 47.0 GB at most on a device (MaxText's recipe, read the same way: 4,041 M cycles, 49.3 GB)
        predicted: 2.00 s a step (1.94 to 2.15), MFU 82.4%, 76.7% by what masks leave
        attention kernels: dkv × 32, dq × 32, fwd × 32; queries bf16[4,32,4096,128], keys bf16[4,32,4096,128], in blocks of 1,024 × 1,024
    :slices, 4xv5p-128, slices=4 data=2 fsdp=32: 3,044 M estimated cycles a step, 49.3 GB at most on a device
        predicted: 2.00 s a step, MFU 82.2%, 76.5% by what masks leave
        attention kernels: dkv × 32, dq × 32, fwd × 32; queries bf16[4,32,4096,128], keys bf16[4,32,4096,128], in blocks of 1,024 × 1,024
    :128k, v5p-128, data=4 context=16: 3,520 M estimated cycles a step, 48.4 GB at most on a device
        predicted: 8.43 s a step, MFU 104.0%, 60.4% by what masks leave
        attention kernels: dkv × 32, dq × 32, fwd × 32; queries bf16[2,2,131072,128], keys bf16[2,2,131072,128], in blocks of 1,024 × 2,048
Time: not measured: no such machine was at hand.
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
        # A row's parts exchange heads, of which each device has two. Parameters lie in 16 shares along them, what the optimizer keeps in 64.
        c.mesh = {"data": 4, "context": 16}
        c.sharding = {"context": "heads", "optimizer": "data", "rules": (("embed", "context"), ("largest", "context"))}
    return c
