"""Sentiment of film-review sentences (SST-2, Socher et al. 2013): a bidirectional LSTM, trained from scratch.

    jaxmodels train --config=configs/lstm_sst2.py --data_dir=DIR

DIR contains `sst2/{train,dev,test}.tsv`, `sentence<TAB>label`: 6,920, 872 and 1,821 whole sentences, without phrases. Published on
these splits: CNN-rand 82.7 (Kim 2014), LSTM with GloVe vectors 84.9 (Tai et al. 2015), both also trained on the phrases.

Reached: test accuracy 0.8083, with the best weights on validation (0.8108); training stops early after six epochs.
Time: 19 s of training on two CPU cores.
"""

from ml_collections import ConfigDict


def get_config():
    c = ConfigDict()
    c.model = {"name": "lstm_encoder", "width": 64, "embedding": 100, "pool": "max", "dropout": 0.5, "word_dropout": 0.2}
    c.task = {"name": "classify_text"}
    # The number of words that occur more than once. Rarer words are <unknown>, so that its embedding is trained.
    c.data = {"source": "tsv:sst2", "sequence_length": 40, "tokenizer": "word:7000", "batch_size": 50, "eval_batch_size": 100}
    c.optimizer = {"name": "adamw", "learning_rate": 2e-3, "weight_decay": 0.01, "clip_norm": 1.0, "schedule": {"name": "cosine", "warmup": 50}}
    c.training = {"epochs": 8, "ema": 0.99}
    c.evaluation = {"every": 138, "patience": 3}
    c.checkpoint = {"every": 138, "best": "accuracy"}
    return c
