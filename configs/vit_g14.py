"""ViT-g/14, a billion parameters (Zhai et al. 2022), on 64 TPU v5p chips, 64 images of 224×224 pixels per chip.

    jaxmodels train --config=configs/vit_g14.py
    jaxmodels plan --config=configs/vit_g14.py --topology=v5p-128

The paper trained on JFT-3B, which is not public, with another optimizer. This config uses AdamW and random images, as many as in ImageNet. For your own
images, use --config.data.source=tfds:imagenet2012 or images:FOLDER, and remove the keys of the synthetic source.

Reached: no result, never trained. The plan (jax 0.10.2, libtpu 0.0.52):
    v5p-128, data=8 fsdp=8: 805 M estimated cycles per step, 23.1 GB peak memory per device
        predicted: 0.461 s per step (0.460 to 0.483), MFU 48.5%
Time: not measured, no such machine was available.
"""

from ml_collections import ConfigDict


def get_config():
    c = ConfigDict()
    # For 257 positions, XLA's attention is faster than a kernel that pads them to 384 (479 ms per step instead of 533 ms).
    c.model = {"name": "vit_g14", "attention": "xla", "scan": True, "remat": "dots_no_batch"}
    c.task = {"name": "classify", "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "flip": True}
    c.data = {"source": "synthetic", "kind": "images", "image_shape": (224, 224, 3), "num_classes": 1000, "examples": 1_281_167, "batch_size": 4096}
    c.optimizer = {
        "name": "adamw",
        "learning_rate": 8e-4,
        "b2": 0.95,
        "weight_decay": 0.1,
        "clip_norm": 1.0,
        "schedule": {"name": "cosine", "warmup": 10_000},
    }
    c.training = {"epochs": 300, "precision": "bfloat16"}
    c.checkpoint = {"every": 1564}
    # Found by `jaxmodels plan --search`, 463 ms per step; the best manual setting, data=64 with five saved activations, takes 479 ms.
    c.mesh = {"data": 8, "fsdp": 8}
    c.sharding = {"optimizer": "data"}
    return c
