"""All features, and the choice of those that a section's keys name."""

from collections.abc import Mapping
from typing import Any

from jaxmodels.data.features.audio import Audio
from jaxmodels.data.features.base import Feature
from jaxmodels.data.features.image import Boxes, Image
from jaxmodels.data.features.label import Classes, Label, Number
from jaxmodels.data.features.text import Pair, Tags, Text
from jaxmodels.data.features.weight import Weight
from jaxmodels.errors import ConfigError

FEATURES: tuple[type[Feature], ...] = (Text, Pair, Tags, Classes, Label, Image, Boxes, Audio, Weight)
BY_ARRAY = {array: feature for feature in FEATURES for array in feature.arrays}  # for data sets that hold arrays alone, too


def choose(keys: Mapping[str, Any]) -> list[Feature]:
    """Return the features that the keys of a section of rows name: those whose column is set, or one text if none is; a label, and a weight."""
    return [*_inputs(keys), *([Weight.of(keys)] if keys["weight_column"] is not None else [])]


def _inputs(keys: Mapping[str, Any]) -> list[Feature]:
    """Return the features but for the weight."""

    def named(*columns: str) -> bool:
        return any(keys[column] is not None for column in columns)

    if named("source_column", "target_column"):
        if keys["labels"] is not None:
            raise ConfigError("config.data.labels names the classes of data.label='class'; a pair of texts has no label.")
        return [Pair.of(keys)]
    if named("words_column", "tags_column"):
        return [Tags.of(keys)]
    chosen = [feature.of(keys) for feature, column in ((Image, "image_column"), (Audio, "audio_column")) if named(column)]
    if named("boxes_column", "box_labels_column"):
        if named("image_column") and (keys["fit"] != "stretch" or keys["scale_to"] is not None):
            raise ConfigError("config.data.fit must be 'stretch' with boxes, without scale_to: a crop would move them.")
        return [*chosen, Boxes.of(keys)]
    label = {"class": Label, "classes": Classes, "value": Number}.get(keys["label"])
    if keys["label"] not in ("class", "classes"):
        Label.of(keys)  # checks `labels`
    texts = [Text.of(keys)] if not chosen or keys["sequence_length"] is not None else []  # a text beside an image or audio is its caption
    return [*chosen, *texts, *([label.of(keys)] if label else [])]
