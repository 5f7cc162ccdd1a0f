"""Fine-tuning of a published T5 v1.1 that converts dates in various formats to ISO 8601; the text pairs are synthetic.

    jaxmodels train --config=configs/t5_hf_seq2seq.py --workdir=runs/t5_hf_seq2seq
    jaxmodels train --config=configs/t5_hf_seq2seq.py:MODEL --workdir=runs/t5_hf_seq2seq

MODEL is a folder with config.json, model.safetensors and the tokenizer's files, or an id on the Hugging Face hub; the default is
google/t5-v1_1-small. For your own pairs, in columns of a file: `--config.data.source=tsv:FILE --config.data.source_column=0 --config.data.target_column=1
--config.data.sequence_length=512 --config.data.target_length=128`. A source ends with </s>; a target starts with the decoder start token of
config.json. Adafactor with a constant learning rate of 1e-3 and dropout of 0.1, as for fine-tuning in Raffel et al. (2020).

Reached: no result is claimed, because no published weights were available. Tested with random weights in the same format.
Time: not measured.
"""

from ml_collections import ConfigDict


def get_config(model="google/t5-v1_1-small"):
    c = ConfigDict()
    c.init_from = f"hf:{model}"
    c.model = {"dropout": 0.1}
    c.task = {"name": "seq2seq"}
    c.data = {"source": "dates", "tokenizer": f"hf:{model}", "batch_size": 64, "eval_batch_size": 200}
    c.optimizer = {"name": "adafactor", "learning_rate": 1e-3, "weight_decay": 0.0, "schedule": {"name": "constant", "warmup": 50}}
    c.training = {"epochs": 3}
    c.evaluation = {"every": 300}
    c.checkpoint = {"every": 300, "best": "exact_match"}
    return c
