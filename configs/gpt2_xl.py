"""GPT-2 XL, 1.56 billion parameters (Radford et al. 2019), on 64 TPU chips: sharded and replicated parameters.

    jaxmodels train --config=configs/gpt2_xl.py

The tokens are random. For your own text, use --config.data.source=text:FILES with
--config.data.tokenizer=FILE.json (GPT-2's, 50,257 tokens) and remove the keys `vocab_size` and `examples`. GPT-2's optimizer
settings were not published; these are of GPT-3's model of this size (Brown et al. 2020, table 2.1: 2e-4), with half of its batch size.

Reached: no result, never trained. The compilation of its train step for v5p:4x4x4 and v6e:8x8, with memory and FLOPs,
    is tested by
    pytest -m tpu_compiler -n 0 -s -k gpt2_xl tests/plan/test_tpu_compiler.py
Time: not measured, no such machine was available.
"""

from ml_collections import ConfigDict


def get_config():
    c = ConfigDict()
    c.model = {"name": "gpt2-xl", "scan": True, "remat": "full"}
    c.task = {"name": "language_model"}
    c.data = {"source": "synthetic", "vocab_size": 50257, "sequence_length": 1024, "examples": 100_000_000, "batch_size": 512}
    c.optimizer = {
        "name": "adamw",
        "learning_rate": 2e-4,
        "b2": 0.95,
        "weight_decay": 0.1,
        "clip_norm": 1.0,
        "schedule": {"name": "cosine", "warmup": 700, "final": 0.1},
    }
    c.training = {"steps": 200_000, "precision": "bfloat16"}
    c.checkpoint = {"every": 1000}
    c.mesh = {"data": 4, "fsdp": 16}
    return c
