"""The Vision Transformer (Dosovitskiy et al. 2021) and DeiT (Touvron et al. 2021) in the format of `transformers`."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from jaxmodels.pretrained.architecture import Architecture, Keys, linear, norm
from jaxmodels.pretrained.mapping import Entry, patches

_SIZES = {"layers": "num_hidden_layers", "heads": "num_attention_heads", "width": "hidden_size", "mlp_width": "intermediate_size"}


def _options(keys: Keys, names: Callable[[], Sequence[str]]) -> dict:
    keys.must("hidden_act", "gelu", "gelu")
    keys.must("num_channels", 3, 3)
    keys.not_applied("attention_probs_dropout_prob", "attention weights have no dropout")
    keys.ignore("encoder_stride", "pooler_act", "pooler_output_size", "image_size")
    return {option: keys.get(key) for option, key in _SIZES.items()} | {
        "patch": keys.get("patch_size"),
        "pool": "token",
        "positions": "learned",
        "epsilon": keys.get("layer_norm_eps", 1e-12),
        "qkv_bias": keys.get("qkv_bias", True),
        "dropout": keys.get("hidden_dropout_prob", 0.0),
    }


def _config(options: Mapping) -> dict:
    return {key: options[option] for option, key in _SIZES.items()} | {
        "intermediate_size": options["mlp_width"] or 4 * options["width"],
        "patch_size": options["patch"],
        "layer_norm_eps": options["epsilon"],
        "qkv_bias": options["qkv_bias"],
        "hidden_act": "gelu",
        "hidden_dropout_prob": options["dropout"],
        "attention_probs_dropout_prob": 0.0,
        "num_channels": 3,
    }


def _table(options: Mapping) -> list[Entry]:
    block, layer = "blocks/{layer}", "vit.encoder.layer.{layer}"
    entries = [
        Entry("token", "vit.embeddings.cls_token"),
        Entry("positions", "vit.embeddings.position_embeddings", "first"),
        *linear("patches", "vit.embeddings.patch_embeddings.projection", form=patches(options["patch"], 3)),
        *norm(f"{block}/attention_norm", f"{layer}.layernorm_before"),
        *norm(f"{block}/mlp_norm", f"{layer}.layernorm_after"),
        *linear(f"{block}/attention/out", f"{layer}.attention.output.dense"),
        *linear(f"{block}/mlp/up", f"{layer}.intermediate.dense"),
        *linear(f"{block}/mlp/down", f"{layer}.output.dense"),
        *norm("norm", "vit.layernorm"),
    ]
    for name in ("query", "key", "value"):
        entries += linear(f"{block}/attention/{name}", f"{layer}.attention.attention.{name}", bias=options["qkv_bias"])
    return entries


VIT = Architecture(
    name="vit",
    model="vit",
    options=_options,
    config=_config,
    table=_table,
    heads={"": linear("output", "classifier")},
    classes={"ViTForImageClassification": "", "ViTModel": None},
    sizes=lambda options: {"layer": options["layers"]},
    prefix="vit.",
    others=r"^(classifier|vit\.pooler)\.",
    head_paths=("output/",),
    images=True,
)


_TEACHER = "DeiTForImageClassificationWithTeacher"


def _deit_options(keys: Keys, names: Callable[[], Sequence[str]]) -> dict:
    # The class name alone says whether there is a second output layer.
    return _options(keys, names) | {"distillation": "output" if _TEACHER in (keys.get("architectures", None) or ()) else "token"}


def _deit_config(options: Mapping) -> dict:
    return _config(options) | ({"architectures": [_TEACHER]} if options["distillation"] == "output" else {})


def _deit_table(options: Mapping) -> list[Entry]:
    entries = [dataclasses.replace(entry, tensor="deit" + entry.tensor.removeprefix("vit")) for entry in _table(options)]
    return [*entries, Entry("distillation_token", "deit.embeddings.distillation_token")]


DEIT = dataclasses.replace(
    VIT,
    name="deit",
    options=_deit_options,
    config=_deit_config,
    table=_deit_table,
    heads=VIT.heads | {"teacher": linear("output", "cls_classifier") + linear("output_distilled", "distillation_classifier")},
    classes={"DeiTForImageClassification": "", _TEACHER: "teacher", "DeiTModel": None},
    prefix="deit.",
    others=r"^(classifier|cls_classifier|distillation_classifier|deit\.pooler)\.",
    head_paths=("output/", "output_distilled/"),
)
