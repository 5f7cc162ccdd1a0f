"""The GPT of nanoGPT's CPU setting on the characters of tinyshakespeare: 4 layers, 4 heads, width 128, context 64, batch size 12,
2,000 steps, no dropout. The published validation loss is 1.88; the learning rate here is different.

    jaxmodels train --config=configs/gpt_shakespeare.py --data_dir=DIR     # DIR/tinyshakespeare/input.txt

Evaluated on the last tenth of the text, with each character as a target once, in windows of 64.

Reached: validation loss 1.758, the mean of three seeds (1.774, 1.745, 1.755).
Time: 2 min 6 s of training on two CPU cores.
"""

from ml_collections import ConfigDict


def get_config():
    c = ConfigDict()
    c.model = {"name": "gpt", "layers": 4, "heads": 4, "width": 128, "context": 64}
    c.task = {"name": "language_model"}
    c.data = {"source": "text:tinyshakespeare/input.txt", "sequence_length": 64, "stride": 1, "batch_size": 12, "eval_batch_size": 64}
    c.optimizer = {
        "name": "adamw",
        "learning_rate": 4e-3,
        "b2": 0.99,
        "weight_decay": 0.1,
        "clip_norm": 1.0,
        "schedule": {"name": "cosine", "warmup": 100, "final": 0.1},
    }
    c.training = {"steps": 2000}
    c.evaluation = {"every": 500}
    c.checkpoint = {"every": 500}
    return c
