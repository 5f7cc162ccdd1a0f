"""Sentiment of film-review sentences (SST-2): fine-tuning of an encoder pretrained on the same sentences and Shakespeare.

    jaxmodels train --config=configs/bert_mlm_sst2.py --workdir=runs/bert_mlm_sst2 --data_dir=DIR
    jaxmodels train --config=configs/bert_sst2.py --workdir=runs/bert_sst2 --data_dir=DIR
    jaxmodels train --config=configs/bert_sst2.py:scratch --workdir=runs/bert_sst2_scratch --data_dir=DIR

Needs DIR/sst2/{train,dev,test}.tsv and DIR/tinyshakespeare/input.txt.

Both variants train for one epoch with the same learning rate, which was not tuned. `python benchmarks/pretraining.py bert_sst2 --data_dir=DIR`
trains all runs with three seeds.

Reached: test accuracy, seeds 0, 1, 2 (1,821 sentences):
    fine-tuned    0.768, 0.778, 0.768; mean 0.771
    from scratch  0.743, 0.750, 0.758; mean 0.750
  Published on this split: CNN with random initial embeddings 0.827 (Kim 2014), BERT-base about 0.93.
Time: 2 to 3 min of training for each run, on two CPU cores with a load of 8 to 16 from other programs: an upper bound, several times too high.
"""

from ml_collections import ConfigDict


def get_config(start="pretrained"):
    if start not in ("pretrained", "scratch"):
        raise ValueError(f"start is 'pretrained' or 'scratch', not {start!r}")
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
        "dropout": 0.2,
    }
    c.task = {"name": "classify_text"}
    c.data = {"source": "tsv:sst2", "sequence_length": 48, "tokenizer": "runs/bert_mlm_sst2", "batch_size": 32, "eval_batch_size": 64}
    c.optimizer = {
        "name": "adamw",
        "learning_rate": 1e-3,
        "b2": 0.98,
        "weight_decay": 0.05,
        "clip_norm": 1.0,
        "schedule": {"name": "linear", "warmup": 20, "final": 0.0},
    }
    c.training = {"epochs": 1}
    c.evaluation = {"every": 108}
    c.checkpoint = {"every": 108, "best": "accuracy"}
    if start == "pretrained":
        c.init_from = {"run": "runs/bert_mlm_sst2", "skip": ("head/",), "rename": (("^head/.*", ""),)}
    return c
