"""ResNet v1.5 (He et al. 2015) in the format of `transformers`."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from jaxmodels.errors import ConfigError
from jaxmodels.pretrained.architecture import Architecture, Keys, linear
from jaxmodels.pretrained.mapping import Entry

_EXPANSION = {"basic": 1, "bottleneck": 4}  # ratio of a block's output width to its inner width


def _options(keys: Keys, names: Callable[[], Sequence[str]]) -> dict:
    keys.must("hidden_act", "relu", "relu")
    keys.must("num_channels", 3, 3)
    keys.must("downsample_in_first_stage", False, False)
    keys.must("downsample_in_bottleneck", False, False)
    keys.ignore("out_features", "out_indices", "stage_names", "image_size")
    block = keys.must("layer_type", "bottleneck", *_EXPANSION)
    width, widths = keys.get("embedding_size"), keys.get("hidden_sizes")
    if widths != [width * _EXPANSION[block] * 2**stage for stage in range(len(widths))]:
        wanted = f"embedding_size={width} times {_EXPANSION[block]}, doubled at each stage"
        raise ConfigError(f"{keys.where}: hidden_sizes={widths} is not supported; it must be {wanted}.")
    depths = keys.get("depths")
    if len(depths) != len(widths):
        raise ConfigError(f"{keys.where}: depths={depths} and hidden_sizes={widths} must have one value for each stage.")
    return {"stages": tuple(depths), "block": block, "width": width, "stem": "imagenet"}


def _config(options: Mapping) -> dict:
    widths = [options["width"] * _EXPANSION[options["block"]] * 2**stage for stage in range(len(options["stages"]))]
    config = {"depths": list(options["stages"]), "layer_type": options["block"], "embedding_size": options["width"], "hidden_sizes": widths}
    return config | {"hidden_act": "relu", "num_channels": 3, "downsample_in_first_stage": False, "downsample_in_bottleneck": False}


def _layers(options: Mapping) -> list[tuple[str, str]]:
    """Return (our path, their name) of each convolution with its normalisation."""
    pairs = [("first", "resnet.embedder.embedder")]
    names = {"basic": ("first", "second"), "bottleneck": ("first", "second", "third")}[options["block"]]
    number = 0
    for stage, count in enumerate(options["stages"]):
        for layer in range(count):
            home = f"resnet.encoder.stages.{stage}.layers.{layer}"
            pairs += [(f"blocks/{number}/{name}", f"{home}.layer.{i}") for i, name in enumerate(names)]
            # The first block of a stage changes the size or width of its input, and so has a convolution on its shortcut. In the first stage
            # only a bottleneck block changes the width.
            if layer == 0 and (stage > 0 or options["block"] == "bottleneck"):
                pairs.append((f"blocks/{number}/shortcut", f"{home}.shortcut"))
            number += 1
    return pairs


def _table(options: Mapping) -> list[Entry]:
    entries = []
    for path, tensor in _layers(options):
        entries.append(Entry(f"{path}/conv/kernel", f"{tensor}.convolution.weight", "convolution"))
        for side, name in (("scale", "weight"), ("bias", "bias"), ("mean", "running_mean"), ("var", "running_var")):
            entries.append(Entry(f"{path}/norm/{side}", f"{tensor}.normalization.{name}"))
    return entries


RESNET = Architecture(
    name="resnet",
    model="resnet50",
    options=_options,
    config=_config,
    table=_table,
    heads={"": linear("output", "classifier.1")},
    classes={"ResNetForImageClassification": "", "ResNetModel": None},
    sizes=lambda options: {},
    prefix="resnet.",
    ignored=(r"num_batches_tracked$",),
    others=r"^classifier\.",
    head_paths=("output/",),
    images=True,
    constants=lambda options: {f"{tensor}.normalization.num_batches_tracked": np.zeros((), np.int64) for _, tensor in _layers(options)},
)
