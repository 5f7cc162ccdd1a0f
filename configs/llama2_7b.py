"""Llama 2 7B (Touvron et al. 2023) on 64 TPU v5p chips, 4 rows of 4,096 tokens on each.

    jaxmodels train --config=configs/llama2_7b.py
    jaxmodels plan --config=configs/llama2_7b.py --topology=v5p-128

The tokens are random, made up as they are read: for text of your own, --config.data.source=text:FILES with --config.data.tokenizer=FILE, and
without the keys `vocab_size` and `examples`. Learning rate, decay and warm-up are the paper's. Of a block's activations those named in `remat` stay, so that only norms, values and what attention adds
are computed again; parameters are in 32 shares of 128 values, which fill the lanes of a vector: in 64, gathers become sums of zeros.

Reached: nothing: it was never trained here. The plan (jax 0.10.2, libtpu 0.0.42.1):
    3,009 M estimated cycles a step, 47.1 GB at most on a device (MaxText's recipe, read the same way: 4,041 M cycles, 49.3 GB)
    predicted: 2.21 s a step, MFU 74.5%
    attention kernels a step: splash_mha_dkv_no_residuals × 32, splash_mha_dq_no_residuals × 32, splash_mha_fwd_residuals × 32
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
