"""The tasks of GLUE (Wang et al. 2019), as the library `datasets` saves them: full fine-tuning of a published BERT.

    python -c 'import datasets; datasets.load_dataset("glue", "mrpc").save_to_disk("DIR/glue/mrpc")'
    jaxmodels train --config=configs/bert_hf_glue.py:MODEL,mrpc --workdir=runs/mrpc --data_dir=DIR

MODEL is a folder with config.json, model.safetensors and the tokenizer's files, or an id on the Hugging Face hub, such as
google-bert/bert-base-uncased. The task is one of cola, mnli, mrpc, qnli, qqp, rte, sst2, stsb and wnli, sst2 by default. The labels of their
tests are not public, so a run is tested on nothing; the validation split is the one that papers call dev. That of mnli is two sets, matched and
mismatched: both are evaluated, and the best checkpoint is that of matched. The recipe is that of Devlin et al. (2019): AdamW, peak learning rate
2e-5 with warm-up and decay to 0, batch size 32, 3 epochs.

Reached: no result is claimed: the data sets were not available. Tested with random weights and rows of the same form.
Time: not measured.
"""

from ml_collections import ConfigDict

# Task -> first text, second text, metric.
TASKS = {
    "cola": ("sentence", None, "accuracy"),
    "mnli": ("premise", "hypothesis", "accuracy"),
    "mrpc": ("sentence1", "sentence2", "accuracy"),
    "qnli": ("question", "sentence", "accuracy"),
    "qqp": ("question1", "question2", "accuracy"),
    "rte": ("sentence1", "sentence2", "accuracy"),
    "sst2": ("sentence", None, "accuracy"),
    "stsb": ("sentence1", "sentence2", "pearson"),
    "wnli": ("sentence1", "sentence2", "accuracy"),
}


def get_config(argument="google-bert/bert-base-uncased"):
    model, _, task = argument.partition(",")
    task = task or "sst2"
    if task not in TASKS:
        raise ValueError(f"bert_hf_glue.py:MODEL,TASK has the tasks {', '.join(TASKS)}, not {task!r}.")
    text, pair, metric = TASKS[task]
    c = ConfigDict()
    c.init_from = f"hf:{model}"
    c.model = {"dropout": 0.1}
    c.task = {"name": "regress_text" if task == "stsb" else "classify_text"}
    c.data = {"source": f"hf:glue/{task}", "text_column": text, "pair_column": pair, "label": "value" if task == "stsb" else "class"}
    c.data.update({"sequence_length": 128, "tokenizer": f"hf:{model}", "batch_size": 32, "eval_batch_size": 64})
    if task == "mnli":
        c.data.validation_sets = {"matched": "validation_matched", "mismatched": "validation_mismatched"}
        c.data.holdout = 0.0
        metric = "matched/accuracy"
    c.optimizer = {"name": "adamw", "learning_rate": 2e-5, "weight_decay": 0.01, "clip_norm": 1.0, "schedule": {"name": "linear", "warmup": 20}}
    c.training = {"epochs": 3}
    c.evaluation = {"every": 100}
    c.checkpoint = {"every": 100, "best": metric}
    return c
