"""ConvNeXt (Liu et al. 2022) in the format of `transformers`."""

from collections.abc import Callable, Mapping, Sequence

from jaxmodels.errors import ConfigError
from jaxmodels.pretrained.architecture import Architecture, Keys, linear, norm
from jaxmodels.pretrained.mapping import Entry, patches


def _options(keys: Keys, names: Callable[[], Sequence[str]]) -> dict:
    keys.must("hidden_act", "gelu", "gelu")
    keys.must("num_channels", 3, 3)
    keys.ignore("out_features", "out_indices", "stage_names", "image_size")
    widths, depths, scale = keys.get("hidden_sizes"), keys.get("depths"), keys.get("layer_scale_init_value", 1e-6)
    if widths != [widths[0] * 2**stage for stage in range(len(widths))]:
        raise ConfigError(f"{keys.where}: hidden_sizes={widths} is not supported; it must be {widths[0]}, doubled at each stage.")
    if len(depths) != len(widths) or keys.get("num_stages", len(depths)) != len(depths):
        raise ConfigError(f"{keys.where}: depths={depths} and hidden_sizes={widths} must have one value for each stage, num_stages of them.")
    if isinstance(scale, int | float) and scale <= 0:
        raise ConfigError(f"{keys.where}: layer_scale_init_value={scale} is not supported: a model without scales on its blocks.")
    return {
        "stages": tuple(depths),
        "width": widths[0],
        "patch": keys.get("patch_size", 4),
        "kernel": 7,
        "layer_scale": scale,
        "epsilon": keys.get("layer_norm_eps", 1e-12),
        "stochastic_depth": keys.get("drop_path_rate", 0.0),
    }


def _config(options: Mapping) -> dict:
    stages = options["stages"]
    return {
        "depths": list(stages),
        "hidden_sizes": [options["width"] * 2**stage for stage in range(len(stages))],
        "num_stages": len(stages),
        "patch_size": options["patch"],
        "layer_scale_init_value": options["layer_scale"],
        "layer_norm_eps": options["epsilon"],
        "drop_path_rate": options["stochastic_depth"],
        "hidden_act": "gelu",
        "num_channels": 3,
    }


def _table(options: Mapping) -> list[Entry]:
    entries = [
        *linear("stem/linear", "convnext.embeddings.patch_embeddings", form=patches(options["patch"], 3)),
        *norm("stem_norm", "convnext.embeddings.layernorm"),
        *norm("norm", "convnext.layernorm"),
    ]
    for stage, count in enumerate(options["stages"]):
        theirs = f"convnext.encoder.stages.{stage}"
        if stage:
            entries += norm(f"norms/{stage - 1}", f"{theirs}.downsampling_layer.0")
            entries += linear(f"merges/{stage - 1}/linear", f"{theirs}.downsampling_layer.1", form=patches(2, options["width"] * 2 ** (stage - 1)))
        for block in range(count):
            entries += _block(f"blocks/{stage}/{block}", f"{theirs}.layers.{block}")
    return entries


def _block(path: str, tensor: str) -> list[Entry]:
    """Return the entries of one block."""
    return [
        Entry(f"{path}/kernel", f"{tensor}.dwconv.weight", "depthwise"),
        Entry(f"{path}/bias", f"{tensor}.dwconv.bias"),
        *norm(f"{path}/norm", f"{tensor}.layernorm"),
        *linear(f"{path}/up", f"{tensor}.pwconv1"),
        *linear(f"{path}/down", f"{tensor}.pwconv2"),
        Entry(f"{path}/layer_scale", f"{tensor}.layer_scale_parameter"),
    ]


CONVNEXT = Architecture(
    name="convnext",
    model="convnext",
    options=_options,
    config=_config,
    table=_table,
    heads={"": linear("output", "classifier")},
    classes={"ConvNextForImageClassification": "", "ConvNextModel": None},
    sizes=lambda options: {},
    prefix="convnext.",
    others=r"^classifier\.",
    head_paths=("output/",),
    images=True,
)
