"""Fine-tuning of a published GPT-2 on Shakespeare's text, in windows of 256 of its tokens.

    jaxmodels train --config=configs/gpt2_hf_text.py --workdir=runs/gpt2_hf_text --data_dir=DIR
    jaxmodels train --config=configs/gpt2_hf_text.py:MODEL --workdir=runs/gpt2_hf_text --data_dir=DIR

MODEL is a folder with config.json, model.safetensors and the tokenizer's files, or an id on the Hugging Face hub; the default is
openai-community/gpt2. Needs DIR/tinyshakespeare/input.txt, whose last tenth is the validation split. For other text, use `--config.data.source=text:FILES`.

Reached: no result is claimed, because no published weights were available. Tested with random weights in the same format.
Time: not measured.
"""

from ml_collections import ConfigDict


def get_config(model="openai-community/gpt2"):
    c = ConfigDict()
    c.init_from = f"hf:{model}"
    c.model = {"dropout": 0.1}
    c.task = {"name": "language_model"}
    c.data = {"source": "text:tinyshakespeare/input.txt", "sequence_length": 256, "tokenizer": f"hf:{model}", "batch_size": 8}
    c.optimizer = {
        "name": "adamw",
        "learning_rate": 3e-5,
        "b2": 0.99,
        "weight_decay": 0.01,
        "clip_norm": 1.0,
        "schedule": {"name": "cosine", "warmup": 20},
    }
    c.training = {"epochs": 3}
    c.evaluation = {"every": 50}
    c.checkpoint = {"every": 50, "best": "loss"}
    return c
