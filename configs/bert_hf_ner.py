"""Named entities in WikiANN English (Pan et al. 2017; splits of Rahimi et al. 2019): full fine-tuning of a published BERT.

    jaxmodels train --config=configs/bert_hf_ner.py --workdir=runs/bert_hf_ner --data_dir=DIR
    jaxmodels train --config=configs/bert_hf_ner.py:MODEL --workdir=runs/bert_hf_ner --data_dir=DIR

MODEL is a folder with config.json, model.safetensors and the tokenizer's files, or an id on the Hugging Face hub; the default is
google-bert/bert-base-cased, which preserves case. Needs DIR/wikiann_en/{train,dev,test}.conll. A sentence is enclosed in [CLS] and [SEP]; the
tag of a word is predicted at its first token.

Reached: no result is claimed, because no published weights were available. Tested with random weights in the same format.
Time: not measured.
"""

from ml_collections import ConfigDict


def get_config(model="google-bert/bert-base-cased"):
    c = ConfigDict()
    c.init_from = f"hf:{model}"
    c.model = {"dropout": 0.1}
    c.task = {"name": "tag"}
    c.data = {"source": "conll:wikiann_en", "sequence_length": 64, "tokenizer": f"hf:{model}", "batch_size": 32, "eval_batch_size": 100}
    c.optimizer = {"name": "adamw", "learning_rate": 5e-5, "weight_decay": 0.01, "clip_norm": 1.0, "schedule": {"name": "linear", "warmup": 180}}
    c.training = {"epochs": 3}
    c.evaluation = {"every": 625}
    c.checkpoint = {"every": 625, "best": "f1"}
    return c
