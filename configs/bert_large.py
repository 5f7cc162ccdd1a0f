"""Masked language modelling with BERT-large (Devlin et al. 2019), rows of 512 tokens, on 64 TPU chips: replicated parameters,
optimizer state sharded 64 ways (Rajbhandari et al. 2019, stage 1).

    jaxmodels train --config=configs/bert_large.py

The tokens are random. For your own text, use --config.data.source=text:FILES with
--config.data.tokenizer=FILE.json (30,522 tokens) and remove the keys `vocab_size`, `special` and `examples`. Batch size, learning rate, weight decay and
warm-up are the paper's; the paper used rows of 128 tokens for the first nine tenths of training.

Reached: no result, never trained. The compilation of its train step for v5p:4x4x4 and v6e:8x8, with memory and FLOPs,
    is tested by
    pytest -m tpu_compiler -n 0 -s -k bert_large tests/plan/test_tpu_compiler.py
Time: not measured, no such machine was available.
"""

from ml_collections import ConfigDict


def get_config():
    c = ConfigDict()
    c.model = {"name": "bert-large", "scan": True, "remat": "dots"}
    c.task = {"name": "masked_lm"}
    # A row has `sequence_length` + 1 tokens. `masked_lm` uses all of them, while a language model's inputs omit the last one.
    c.data = {"source": "synthetic", "vocab_size": 30522, "special": True, "sequence_length": 511, "examples": 100_000_000, "batch_size": 256}
    c.optimizer = {
        "name": "adamw",
        "learning_rate": 1e-4,
        "b2": 0.999,
        "weight_decay": 0.01,
        "clip_norm": 1.0,
        "schedule": {"name": "linear", "warmup": 10_000},
    }
    c.training = {"steps": 1_000_000, "precision": "bfloat16"}
    c.checkpoint = {"every": 1000}
    c.mesh = {"data": 64}
    c.sharding = {"optimizer": "data"}
    return c
