"""ResNet-50 on images of 224×224 pixels, on 64 TPU chips, with replicated parameters.

    jaxmodels train --config=configs/resnet50.py

The images are random, as many as in ImageNet's training set (1,281,167). For ImageNet, use --config.data.source=tfds:imagenet2012 or
images:FOLDER, and remove the keys of the synthetic source. The recipe is for large batches (Goyal et al. 2017): a learning rate of 0.1 per
256 images, after five epochs of warm-up, with cosine decay and label smoothing (He et al. 2018).

Reached: no result, never trained. The compilation of its train step for v5p:4x4x4 and v6e:8x8, with memory and FLOPs,
    is tested by
    pytest -m tpu_compiler -n 0 -s -k resnet50 tests/plan/test_tpu_compiler.py
Time: not measured, no such machine was available.
"""

from ml_collections import ConfigDict


def get_config():
    c = ConfigDict()
    c.model = {"name": "resnet50"}
    c.task = {"name": "classify", "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "flip": True, "label_smoothing": 0.1}
    c.data = {"source": "synthetic", "kind": "images", "image_shape": (224, 224, 3), "num_classes": 1000, "examples": 1_281_167, "batch_size": 4096}
    c.optimizer = {
        "name": "sgd",
        "learning_rate": 1.6,
        "momentum": 0.9,
        "nesterov": True,
        "weight_decay": 1e-4,
        "schedule": {"name": "cosine", "warmup": 1564},
    }
    c.training = {"epochs": 90, "precision": "bfloat16"}
    c.checkpoint = {"every": 1564}
    c.mesh = {"data": 64}
    return c
