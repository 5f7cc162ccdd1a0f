"""Fine-tuning of a published Vision Transformer on CIFAR-10, from a prepared TFDS folder; images are resized to its input size.

    jaxmodels train --config=configs/vit_hf_cifar10.py --workdir=runs/vit_hf_cifar10 --data_dir=DIR
    jaxmodels train --config=configs/vit_hf_cifar10.py:MODEL --workdir=runs/vit_hf_cifar10 --data_dir=DIR

MODEL is a folder with config.json and model.safetensors, or an id on the Hugging Face hub; the default is
google/vit-base-patch16-224-in21k. Needs DIR/tensorflow_datasets/cifar10/3.0.2. `task.resize`, `task.mean` and `task.std` are
`size`, `image_mean` and `image_std` of that model's preprocessor_config.json; set them for another model.
Dosovitskiy et al. (2021) fine-tuned with momentum, a batch size of 512, learning rates of 1e-3 to 3e-2 and no weight decay.

Reached: no result is claimed, because no published weights were available. Tested with random weights in the same format.
Time: not measured.
"""

from ml_collections import ConfigDict


def get_config(model="google/vit-base-patch16-224-in21k"):
    c = ConfigDict()
    c.init_from = f"hf:{model}"
    c.model = {}
    c.task = {"name": "classify", "resize": (224, 224), "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "flip": True}
    c.data = {"source": "tfds:cifar10", "holdout": 2, "batch_size": 512, "eval_batch_size": 500}
    c.optimizer = {"name": "sgd", "learning_rate": 3e-3, "momentum": 0.9, "clip_norm": 1.0, "schedule": {"name": "cosine", "warmup": 500}}
    c.training = {"steps": 10_000, "precision": "bfloat16", "accumulate": 8}
    c.evaluation = {"every": 500}
    c.checkpoint = {"every": 500, "best": "accuracy"}
    return c
