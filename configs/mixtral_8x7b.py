"""A mixture of the size of Mixtral 8x7B (Jiang et al. 2024), 46.7 billion parameters, 12.9 a token, on 64 TPU chips.

    jaxmodels train --config=configs/mixtral_8x7b.py

Each of 8 groups of chips has one of the 8 experts of each layer; within a group that, and everything else, is in 8 shares. The tokens are
random, made up as they are read: for text of your own, --config.data.source=text:FILES with --config.data.tokenizer=FILE.model (32,000 tokens)
and without the keys `vocab_size` and `examples`. Mixtral's optimizer settings were not published; these are those of Llama 2
(Touvron et al. 2023).

Reached: nothing: it was never trained here. That its train step compiles for v5p:4x4x4 and v6e:8x8, and what memory and
    operations it takes there, says
    pytest -m tpu_compiler -n 0 -s -k mixtral_8x7b tests/test_tpu_compiler.py
Time: not measured: no such machine was at hand.
"""

from ml_collections import ConfigDict


def get_config():
    c = ConfigDict()
    c.model = {"name": "mixtral-8x7b", "scan": True, "remat": "full"}
    c.task = {"name": "language_model"}
    c.data = {"source": "synthetic", "vocab_size": 32000, "sequence_length": 4096, "examples": 100_000_000, "batch_size": 64}
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
    c.mesh = {"data": 1, "fsdp": 8, "expert": 8}
    return c
