"""DINOv2 (Oquab et al. 2023) in the format of `transformers`: a Vision Transformer with scales on its residuals.

Its positions are those of the images of pretraining, and are interpolated for images of another size, as `transformers` does. The token that
replaces masked patches in pretraining is left out.
"""

from collections.abc import Callable, Mapping, Sequence

from jaxmodels.errors import ConfigError
from jaxmodels.pretrained.architecture import Architecture, Keys, linear, norm
from jaxmodels.pretrained.mapping import Entry, patches

_SIZES = {"layers": "num_hidden_layers", "heads": "num_attention_heads", "width": "hidden_size", "patch": "patch_size"}


def _mlp_width(width: int, ratio: float, gated: bool) -> int:
    """Return the hidden width of the feed-forward; a gated one has two thirds, rounded up to a multiple of 8."""
    hidden = int(width * ratio)
    return (int(hidden * 2 / 3) + 7) // 8 * 8 if gated else hidden


def _options(keys: Keys, names: Callable[[], Sequence[str]]) -> dict:
    gated = keys.must("use_swiglu_ffn", False, False, True)
    if gated:
        keys.ignore("hidden_act")  # a gated feed-forward does not read it
    else:
        keys.must("hidden_act", "gelu", "gelu")
    keys.must("num_channels", 3, 3)
    keys.not_applied("attention_probs_dropout_prob", "attention weights have no dropout")
    keys.not_applied("hidden_dropout_prob", "it drops values of the embedding alone there")
    if rate := keys.get("drop_path_rate", 0.0):
        keys.notes.append(f"drop_path_rate={rate} drops whole blocks in training, where `transformers` drops each of their two residuals")
    keys.ignore("out_features", "out_indices", "stage_names", "apply_layernorm", "reshape_hidden_states", "use_mask_token")
    options = {option: keys.get(key) for option, key in _SIZES.items()}
    size, scale = keys.get("image_size", None), keys.get("layerscale_value", 1.0)
    if isinstance(size, list):
        if size[0] != size[1]:
            raise ConfigError(f"{keys.where}: image_size={size} is not supported; the grid of the positions must be square.")
        size = size[0]
    if size is not None and size < options["patch"]:
        raise ConfigError(f"{keys.where}: image_size={size} is smaller than patch_size={options['patch']}.")
    return options | {
        "mlp_width": _mlp_width(options["width"], keys.get("mlp_ratio", 4) or 4, gated),
        "activation": "swiglu" if gated else "gelu_exact",
        "layer_scale": 1.0 if scale is None else scale,
        "grid": None if size is None else (size // options["patch"],) * 2,
        "pool": "both",
        "positions": "learned",
        "epsilon": keys.get("layer_norm_eps", 1e-6),
        "qkv_bias": keys.get("qkv_bias", True),
        "stochastic_depth": rate,
    }


def _config(options: Mapping) -> dict:
    gated, width, grid = options["activation"] == "swiglu", options["width"], options["grid"]
    wanted = options["mlp_width"] or 4 * width
    ratio = next((ratio for ratio in range(1, 65) if _mlp_width(width, ratio, gated) == wanted), None)
    if ratio is None:
        raise ConfigError(f"mlp_width={wanted}, which is not that of a whole mlp_ratio")
    if grid and grid[0] != grid[1]:
        raise ConfigError(f"grid={tuple(grid)}, which is not square")
    return {key: options[option] for option, key in _SIZES.items()} | {
        **({"image_size": grid[0] * options["patch"]} if grid else {}),
        "mlp_ratio": ratio,
        "use_swiglu_ffn": gated,
        "layerscale_value": options["layer_scale"],
        "layer_norm_eps": options["epsilon"],
        "qkv_bias": options["qkv_bias"],
        "drop_path_rate": options["stochastic_depth"],
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "num_channels": 3,
        "use_mask_token": False,
    }


def _table(options: Mapping) -> list[Entry]:
    block, layer = "blocks/{layer}", "dinov2.encoder.layer.{layer}"
    entries = [
        Entry("token", "dinov2.embeddings.cls_token"),
        Entry("positions", "dinov2.embeddings.position_embeddings", "first"),
        *linear("patches", "dinov2.embeddings.patch_embeddings.projection", form=patches(options["patch"], 3)),
        *norm(f"{block}/attention_norm", f"{layer}.norm1"),
        *norm(f"{block}/mlp_norm", f"{layer}.norm2"),
        *linear(f"{block}/attention/out", f"{layer}.attention.output.dense"),
        Entry(f"{block}/attention_scale", f"{layer}.layer_scale1.lambda1"),
        Entry(f"{block}/mlp_scale", f"{layer}.layer_scale2.lambda1"),
        *norm("norm", "dinov2.layernorm"),
    ]
    for name in ("query", "key", "value"):
        entries += linear(f"{block}/attention/{name}", f"{layer}.attention.attention.{name}", bias=options["qkv_bias"])
    if options["activation"] == "gelu_exact":
        return [*entries, *linear(f"{block}/mlp/up", f"{layer}.mlp.fc1"), *linear(f"{block}/mlp/down", f"{layer}.mlp.fc2")]
    for i, name in enumerate(("gate", "up")):
        entries.append(Entry(f"{block}/mlp/{name}/kernel", f"{layer}.mlp.weights_in.weight", "transposed", (i, i + 1, 2)))
        entries.append(Entry(f"{block}/mlp/{name}/bias", f"{layer}.mlp.weights_in.bias", part=(i, i + 1, 2)))
    return [*entries, *linear(f"{block}/mlp/down", f"{layer}.mlp.weights_out")]


DINOV2 = Architecture(
    name="dinov2",
    model="vit",
    options=_options,
    config=_config,
    table=_table,
    heads={"": linear("output", "classifier")},
    classes={"Dinov2ForImageClassification": "", "Dinov2Model": None},
    sizes=lambda options: {"layer": options["layers"]},
    prefix="dinov2.",
    others=r"^(classifier|dinov2\.embeddings\.mask_token)",
    head_paths=("output/",),
    images=True,
)
