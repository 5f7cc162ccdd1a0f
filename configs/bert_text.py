"""Masked language modelling on the text and code included with Python (no download): pretraining for `bert_classify`.

    jaxmodels train --config=configs/bert_text.py --workdir=runs/bert_text

The training text is the help topics and 230 files, without the validation and test files of `bert_classify`; 34 files are the
validation split. 30% of the tokens are predicted, of which 80% are replaced by `<mask>`. The unigram entropy of the training text is
6.38 nats per token.

Reached: validation loss 3.533 nats per masked token, accuracy 0.347 (Python 3.11's library).
Time: 21 min 51 s of training on two CPU cores with a load of 8 to 12 from other programs: an upper bound, several times too high (a step takes
0.22 s of CPU time).
"""

from ml_collections import ConfigDict


def get_config():
    c = ConfigDict()
    c.model = {
        "name": "encoder", "layers": 2, "heads": 4, "width": 128, "context": 128, "post_norm": False,
        "positions": "rotary", "pool": "mean",
    }  # fmt: skip
    c.task = {"name": "masked_lm", "rate": 0.3}
    c.data = {"source": "python_code", "sequence_length": 127, "tokenizer": "bpe:2048", "batch_size": 16, "eval_batch_size": 64}
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
