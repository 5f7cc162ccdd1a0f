"""Masked language modelling on the sentences of SST-2 (training split) and Shakespeare's plays: pretraining for `bert_sst2`.

    jaxmodels train --config=configs/bert_mlm_sst2.py --workdir=runs/bert_mlm_sst2 --data_dir=DIR

Needs DIR/sst2/{train,dev,test}.tsv, whose labels are not read, and DIR/tinyshakespeare/input.txt.

Reached: loss per masked token 5.000 nats on the validation sentences and plays (accuracy 0.232), 5.454 on the test sentences.
Time: 18 min 52 s of training on two CPU cores with a load of 8 to 16 from other programs: an upper bound, several times too high.
"""

from ml_collections import ConfigDict


def get_config():
    c = ConfigDict()
    c.model = {
        "name": "encoder",
        "layers": 2,
        "heads": 4,
        "width": 128,
        "context": 48,
        "post_norm": False,
        "positions": "rotary",
        "pool": "mean",
    }
    c.task = {"name": "masked_lm", "rate": 0.3}
    c.data = {"source": "mixture", "tokenizer": "bpe:6000", "batch_size": 32, "eval_batch_size": 64}
    c.data.sources = {
        "sst2": {"source": "tsv:sst2", "label": "none", "sequence_length": 48, "weight": 0.75},
        # A window has `sequence_length` + 1 tokens, the length of the sentences' rows.
        "shakespeare": {"source": "text:tinyshakespeare/input.txt", "sequence_length": 47, "weight": 0.25},
    }
    c.optimizer = {
        "name": "adamw",
        "learning_rate": 3e-3,
        "b2": 0.98,
        "weight_decay": 0.05,
        "clip_norm": 1.0,
        "schedule": {"name": "linear", "warmup": 100, "final": 0.02},
    }
    c.training = {"steps": 1600}
    c.evaluation = {"every": 400}
    c.checkpoint = {"every": 400}
    return c
