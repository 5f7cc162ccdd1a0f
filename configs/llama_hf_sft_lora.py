"""Supervised fine-tuning of a published Llama (or Mistral, or Qwen) on your conversations: only adapters are trained, on the answers.

    jaxmodels train --config=configs/llama_hf_sft_lora.py --workdir=runs/llama_hf_sft_lora --data_dir=DIR
    jaxmodels train --config=configs/llama_hf_sft_lora.py:MODEL --workdir=runs/llama_hf_sft_lora --data_dir=DIR

MODEL is a folder with config.json, safetensors files and the tokenizer's files, or an id on the Hugging Face hub;
the default is TinyLlama/TinyLlama-1.1B-Chat-v1.0. Needs DIR/chats.jsonl with one conversation per line, {"messages": [{"role": "user", "content": …},
{"role": "assistant", "content": …}]}; a twentieth of them is the validation split. The model's chat template formats them. Whole
conversations are packed into rows of 1,024 tokens, without attention between conversations. Every linear layer has an adapter of rank 16, as
recommended by Hu et al. (2021) and Dettmers et al. (2023); the peak learning rate is 2e-4. The run saves the adapters; `jaxmodels merge` adds
them to the weights.

Reached: no result is claimed, because no published weights were available. Tested with random weights in the same format.
Time: not measured.
"""

from ml_collections import ConfigDict


def get_config(model="TinyLlama/TinyLlama-1.1B-Chat-v1.0"):
    c = ConfigDict()
    c.init_from = f"hf:{model}"
    c.model = {"remat": "dots"}
    c.task = {"name": "language_model", "sample_length": 0}
    c.data = {"source": "chat:chats.jsonl", "sequence_length": 1024, "tokenizer": f"hf:{model}", "holdout": 0.05, "batch_size": 8}
    c.optimizer = {
        "name": "adamw",
        "learning_rate": 2e-4,
        "b2": 0.99,
        "weight_decay": 0.0,
        "clip_norm": 1.0,
        "schedule": {"name": "cosine", "warmup": 10},
    }
    c.training = {"epochs": 3, "precision": "bfloat16"}
    c.lora = {"rank": 16, "alpha": 32.0, "targets": ("attention/(query|key|value|out)$", "mlp/(gate|up|down)$")}
    c.evaluation = {"every": 100}
    c.checkpoint = {"every": 100, "best": "loss"}
    return c
