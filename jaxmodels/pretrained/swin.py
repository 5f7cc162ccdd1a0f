"""The Swin Transformer (Liu et al. 2021) in the format of `transformers`."""

from collections.abc import Callable, Mapping, Sequence

from jaxmodels.errors import ConfigError
from jaxmodels.pretrained.architecture import Architecture, Keys, linear, norm
from jaxmodels.pretrained.mapping import Entry, patches


def _options(keys: Keys, names: Callable[[], Sequence[str]]) -> dict:
    keys.must("hidden_act", "gelu", "gelu")
    keys.must("num_channels", 3, 3)
    keys.must("use_absolute_embeddings", False, False)
    keys.must("path_norm", True, True)
    keys.not_applied("attention_probs_dropout_prob", "attention weights have no dropout")
    keys.ignore("out_features", "out_indices", "stage_names", "encoder_stride", "hidden_size", "image_size")
    depths, heads = keys.get("depths"), keys.get("num_heads")
    if not isinstance(heads, list) or len(heads) != len(depths) or keys.get("num_layers", len(depths)) != len(depths):
        raise ConfigError(f"{keys.where}: depths={depths} and num_heads={heads} must have one value for each stage, num_layers of them.")
    return {
        "stages": tuple(depths),
        "heads": tuple(heads),
        "width": keys.get("embed_dim"),
        "patch": keys.get("patch_size"),
        "window": keys.get("window_size"),
        "mlp_ratio": keys.get("mlp_ratio", 4.0),
        "qkv_bias": keys.get("qkv_bias", True),
        "epsilon": keys.get("layer_norm_eps", 1e-5),
        "dropout": keys.get("hidden_dropout_prob", 0.0),
        "stochastic_depth": keys.get("drop_path_rate", 0.1),
    }


def _config(options: Mapping) -> dict:
    return {
        "depths": list(options["stages"]),
        "num_heads": list(options["heads"]),
        "embed_dim": options["width"],
        "patch_size": options["patch"],
        "window_size": options["window"],
        "mlp_ratio": options["mlp_ratio"],
        "qkv_bias": options["qkv_bias"],
        "layer_norm_eps": options["epsilon"],
        "hidden_dropout_prob": options["dropout"],
        "drop_path_rate": options["stochastic_depth"],
        "attention_probs_dropout_prob": 0.0,
        "use_absolute_embeddings": False,
        "hidden_act": "gelu",
        "num_channels": 3,
    }


def _table(options: Mapping) -> list[Entry]:
    entries = [
        *linear("embed", "swin.embeddings.patch_embeddings.projection", form=patches(options["patch"], 3)),
        *norm("embed_norm", "swin.embeddings.norm"),
        *norm("norm", "swin.layernorm"),
    ]
    for stage, count in enumerate(options["stages"]):
        theirs = f"swin.encoder.layers.{stage}"
        for block in range(count):
            entries += _block(f"blocks/{stage}/{block}", f"{theirs}.blocks.{block}", options["qkv_bias"])
        if stage < len(options["stages"]) - 1:
            entries += norm(f"merges/{stage}/norm", f"{theirs}.downsample.norm")
            entries += linear(f"merges/{stage}/linear", f"{theirs}.downsample.reduction", bias=False)
    return entries


def _block(path: str, tensor: str, qkv_bias: bool) -> list[Entry]:
    """Return the entries of one block."""
    entries = [
        *norm(f"{path}/attention_norm", f"{tensor}.layernorm_before"),
        *norm(f"{path}/mlp_norm", f"{tensor}.layernorm_after"),
        *linear(f"{path}/attention/out", f"{tensor}.attention.output.dense"),
        *linear(f"{path}/mlp/up", f"{tensor}.intermediate.dense"),
        *linear(f"{path}/mlp/down", f"{tensor}.output.dense"),
        Entry(f"{path}/relative", f"{tensor}.attention.self.relative_position_bias_table"),
    ]
    for name in ("query", "key", "value"):
        entries += linear(f"{path}/attention/{name}", f"{tensor}.attention.self.{name}", bias=qkv_bias)
    return entries


SWIN = Architecture(
    name="swin",
    model="swin",
    options=_options,
    config=_config,
    table=_table,
    heads={"": linear("output", "classifier")},
    classes={"SwinForImageClassification": "", "SwinModel": None},
    sizes=lambda options: {},
    prefix="swin.",
    ignored=(r"relative_position_index$",),
    others=r"^classifier\.",
    head_paths=("output/",),
    images=True,
)
