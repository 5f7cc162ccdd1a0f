"""Sentiment of film-review sentences (SST-2): full fine-tuning of a published BERT.

    jaxmodels train --config=configs/bert_hf_sst2.py --workdir=runs/bert_hf_sst2 --data_dir=DIR
    jaxmodels train --config=configs/bert_hf_sst2.py:MODEL --workdir=runs/bert_hf_sst2 --data_dir=DIR

MODEL is a folder with config.json, model.safetensors and the tokenizer's files, or an id on the Hugging Face hub; the default is
google-bert/bert-base-uncased. Needs DIR/sst2/{train,dev,test}.tsv. The recipe is that of Devlin et al. (2019): AdamW, peak learning
rate 5e-5 with warm-up and decay to 0, batch size 32, 3 epochs, no weight decay of biases and normalisations.
The warm-up of 60 steps is a tenth of 3 epochs of 6,920 sentences.

Reached: test accuracy 0.8874 with MiniLM-L6 (docs/published.md says where its weights are). BERT's own weights were not available.
Time: 15 minutes with MiniLM-L6 on two cores that other programs shared; `benchmarks/bert_step.py` measures a step of BERT.
"""

from ml_collections import ConfigDict


def get_config(model="google-bert/bert-base-uncased"):
    c = ConfigDict()
    c.init_from = f"hf:{model}"
    c.model = {"dropout": 0.1}
    c.task = {"name": "classify_text"}
    c.data = {"source": "tsv:sst2", "sequence_length": 64, "tokenizer": f"hf:{model}", "batch_size": 32, "eval_batch_size": 64}
    c.optimizer = {"name": "adamw", "learning_rate": 5e-5, "weight_decay": 0.01, "clip_norm": 1.0, "schedule": {"name": "linear", "warmup": 60}}
    c.training = {"epochs": 3}
    c.evaluation = {"every": 216}
    c.checkpoint = {"every": 216, "best": "accuracy"}
    return c
