"""Small train steps of all model families for comparing the memory model with the TPU compiler: name -> (config, topology)."""

import copy

from small_configs import config

GPT = {
    "model": {"name": "gpt", "layers": 6, "heads": 8, "width": 1024, "context": 512, "scan": True},
    "task": {"name": "language_model", "sample_length": 0},
    "data": {"source": "synthetic", "vocab_size": 8192, "sequence_length": 512, "batch_size": 128},
    "optimizer": {"name": "adamw", "learning_rate": 1e-3, "clip_norm": 1.0},
    "training": {"steps": 10, "precision": "bfloat16"},
}
LLAMA = config(
    GPT,
    model={
        "name": "gpt", "layers": 6, "heads": 8, "kv_heads": 2, "head_width": 128, "width": 1024, "mlp_width": 3072, "context": 1024, "positions": "rotary",
        "norm": "rms", "activation": "swiglu", "bias": False, "tie_embeddings": False, "scan": True,
    },
    data__sequence_length=1024,
    data__batch_size=64,
)  # fmt: skip
BERT = config(
    GPT,
    model={"name": "encoder", "layers": 6, "heads": 8, "width": 1024, "context": 512, "scan": True},
    task={"name": "masked_lm"},
    data__special=True,
    data__sequence_length=511,
)
VIT = {
    "model": {"name": "vit", "patch": 16, "layers": 6, "heads": 8, "width": 1024},
    "task": {"name": "classify"},
    "data": {"source": "synthetic", "kind": "images", "image_shape": (224, 224, 3), "num_classes": 1000, "batch_size": 512},
    "optimizer": {"name": "adamw", "learning_rate": 1e-3, "clip_norm": 1.0},
    "training": {"steps": 10, "precision": "bfloat16"},
}
RESNET = config(VIT, model={"name": "resnet18"}, optimizer={"name": "sgd", "learning_rate": 0.1, "momentum": 0.9})
LSTM = config(GPT, model={"name": "lstm", "layers": 2, "width": 1024}, data__sequence_length=128, data__batch_size=512)
MOE = config(LLAMA, model__mlp_width=2048, model__moe={"experts": 4, "top_k": 2})


def _on(base: dict, mesh: dict, **changes) -> dict:
    return config(copy.deepcopy(base), **changes) | {"mesh": {"data": 1, **mesh}}


POINTS = {
    "gpt none": (_on(GPT, {"data": 4}), "v5e:2x2"),
    "gpt full": (_on(GPT, {"fsdp": 4}, model__remat="full", data__batch_size=512), "v5e:2x2"),
    "gpt dots": (_on(GPT, {"fsdp": 2, "tensor": 2}, model__remat="dots"), "v5e:2x2"),
    "gpt unrolled": (_on(GPT, {"data": 4}, model__scan=False), "v5e:2x2"),
    "gpt unrolled full": (_on(GPT, {"data": 2, "fsdp": 2}, model__scan=False, model__remat="full"), "v5e:2x2"),
    "gpt float32": (_on(GPT, {"fsdp": 4}, training__precision="float32"), "v5e:2x2"),
    "gpt accumulated": (_on(GPT, {"fsdp": 4}, training__accumulate=4, data__batch_size=512), "v5e:2x2"),
    "llama none": (_on(LLAMA, {"fsdp": 4}), "v5p:2x2x1"),
    "llama full": (_on(LLAMA, {"fsdp": 4}, model__remat="full"), "v5p:2x2x1"),
    "llama dots_no_batch": (_on(LLAMA, {"fsdp": 4}, model__remat="dots_no_batch"), "v5p:2x2x1"),
    "llama names": (_on(LLAMA, {"fsdp": 4}, model__remat=("query", "key", "value", "attention")), "v5p:2x2x1"),
    "llama shares": (_on(LLAMA, {"data": 2, "fsdp": 2}, model__remat="full", sharding={"optimizer": "data"}), "v5p:2x2x1"),
    "llama tensor": (_on(LLAMA, {"tensor": 2, "data": 2}, model__remat="full"), "v5p:2x2x1"),
    "llama context": (_on(LLAMA, {"context": 2, "fsdp": 2}, model__remat="full"), "v5p:2x2x1"),
    "llama pipeline": (_on(LLAMA, {"pipeline": 2, "fsdp": 2}, model__remat="full"), "v5p:2x2x1"),
    "bert none": (_on(BERT, {"data": 4}), "v5e:2x2"),
    "bert dots": (_on(BERT, {"data": 4}, model__remat="dots", sharding={"optimizer": "data"}), "v5e:2x2"),
    "bert unrolled": (_on(BERT, {"fsdp": 4}, model__scan=False), "v5e:2x2"),
    "vit none": (_on(VIT, {"data": 4}), "v5e:2x2"),
    "vit full": (_on(VIT, {"fsdp": 4}, model__scan=True, model__remat="full"), "v5e:2x2"),
    "resnet18": (_on(RESNET, {"data": 4}), "v5e:2x2"),
    "resnet50": (_on(RESNET, {"data": 4}, model__name="resnet50"), "v5p:2x2x1"),
    "lstm": (_on(LSTM, {"data": 4}), "v5e:2x2"),
    "lstm float32": (_on(LSTM, {"data": 2, "fsdp": 2}, training__precision="float32"), "v5e:2x2"),
    "moe full": (_on(MOE, {"expert": 4}, model__remat="full"), "v5p:2x2x1"),
    "moe none": (_on(MOE, {"expert": 2, "fsdp": 2}), "v5p:2x2x1"),
}

# Tolerances of the steps whose relative error is known to exceed a tenth, the tolerance of all others. Why sharded encoders take more memory than the
# model predicts is unknown. For a deep residual network the compiler's order of the backward pass needs more memory. For the mixture the reason is
# collectives on SparseCores: without these options (`hardware/compiler_options.py`) the compiler takes 2.69 GB, not 3.28, and 5.00, not 5.40, for the
# residual network.
TOLERANCE = {"bert unrolled": 0.14, "vit full": 0.16, "resnet50": 0.18, "moe full": 0.16}
