"""Masked language modelling with BERT-large (Devlin et al. 2019), 512 tokens a row, on 64 TPU chips: a copy of the model on each, but
the optimizer's state in 64 shares (Rajbhandari et al. 2019, stage 1).

    jaxmodels train --config=configs/bert_large.py

The tokens are random, made up as they are read: for text of your own, --config.data.source=text:FILES with
--config.data.tokenizer=FILE.json (30,522 tokens) and without the keys `vocab_size`, `special` and `examples`. Batch, learning rate, decay and
warm-up are the paper's; it had rows of 128 tokens for the first nine tenths.

Reached: nothing: it was never trained here. That its train step compiles for v5p:4x4x4 and v6e:8x8, and what memory and
    operations it takes there, says
    pytest -m tpu_compiler -n 0 -s -k bert_large tests/plan/test_tpu_compiler.py
Time: not measured: no such machine was at hand.
"""

from ml_collections import ConfigDict


def get_config():
    c = ConfigDict()
    c.model = {"name": "bert-large", "scan": True, "remat": "dots"}
    c.task = {"name": "masked_lm"}
    # `masked_lm` reads all tokens of a row: one more than a language model is given.
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
