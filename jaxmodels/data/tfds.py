"""TensorFlow Datasets by name, read from a prepared folder without TensorFlow."""

import os
from collections.abc import Mapping

import numpy as np

from jaxmodels.data.source import Dataset
from jaxmodels.errors import ConfigError


class Examples:
    """A TFDS split as a data source: its numeric features by name, whole numbers as int32."""

    def __init__(self, source, names: tuple[str, ...]):
        self.source, self.names = source, names

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        example = self.source[index]
        values = {name: np.asarray(example[name]) for name in self.names}
        return {name: v.astype(np.int32) if v.dtype == np.int64 else v for name, v in values.items()}


def tfds(
    name: str,
    data_dir: str | None,
    *,
    splits: Mapping[str, str] | None = None,
    holdout: int = 10,
) -> Dataset:
    """A prepared TFDS data set: `tfds:NAME`, `tfds:NAME/CONFIG` or `tfds:NAME:VERSION`.

    Args:
      name: as TFDS writes it.
      data_dir: the folder that holds it, or that holds a folder `tensorflow_datasets` that does;
        `~/tensorflow_datasets` if None.
      splits: which TFDS split, with slices, is which: `{"train": "train[:90%]", "validation": "train[90%:]"}`. Unless
        given, those that the data set has, and where it has no validation split, the end of train.
      holdout: percent of train that validates in that case.

    Raises:
      ConfigError: no such folder (how to prepare it), a format without random access, or an unknown split.
    """
    import tensorflow_datasets

    if not 0 < holdout < 100:
        raise ConfigError(f"config.data.holdout is a percentage between 0 and 100, got {holdout}.")
    folder = _find_folder(name, data_dir)
    builder = tensorflow_datasets.builder_from_directory(folder)
    if splits is None:
        splits = {s: s for s in ("train", "validation", "test") if s in builder.info.splits}
        if "train" in splits and "validation" not in splits:
            splits |= {"train": f"train[:{100 - holdout}%]", "validation": f"train[{100 - holdout}%:]"}
    if not splits or not all(isinstance(value, str) for value in splits.values()):
        raise ConfigError(f"config.data.splits: give each split as TFDS writes it, {{'train': 'train[:90%]'}}; got {dict(splits)}.")
    features = builder.info.features
    names = tuple(name for name, feature in features.items() if _is_numeric(feature))
    try:
        parts = {ours: Examples(builder.as_data_source(theirs), names) for ours, theirs in splits.items()}
    except NotImplementedError as error:
        raise ConfigError(f"config.data.source: {folder} allows no random access. {_how_to_prepare(name, data_dir)}") from error
    except (KeyError, ValueError) as error:
        raise ConfigError(f"config.data.splits: {error} (the data set has: {', '.join(builder.info.splits)})") from error
    info = {}
    if "image" in features:
        info["image_shape"] = tuple(features["image"].shape)
    if "label" in features and hasattr(features["label"], "num_classes"):
        info["num_classes"] = features["label"].num_classes
    return Dataset(parts, info)


def _is_numeric(feature) -> bool:
    try:
        return np.dtype(feature.np_dtype).kind in "biuf"
    except (AttributeError, TypeError):  # texts, and features inside features
        return False


def _find_folder(name: str, data_dir: str | None) -> str:
    """The folder of the wanted version of a data set, the newest unless one is named."""
    path, _, version = name.partition(":")
    roots = [os.path.join(data_dir, "tensorflow_datasets"), data_dir] if data_dir else [os.path.expanduser("~/tensorflow_datasets")]
    for root in roots:
        folder = os.path.join(root, path)
        found = sorted(os.listdir(folder), key=_version_key) if os.path.isdir(folder) else []
        found = [v for v in found if os.path.isfile(os.path.join(folder, v, "dataset_info.json")) and version in ("", v)]
        if found:
            return os.path.join(folder, found[-1])
    looked = " nor ".join(os.path.join(root, path, version or "VERSION") for root in roots)
    raise ConfigError(f"config.data.source: there is no prepared {looked}. {_how_to_prepare(name, data_dir)}")


def _version_key(version: str) -> tuple:
    return tuple((part.isdigit(), int(part) if part.isdigit() else 0, part) for part in version.split("."))


def _how_to_prepare(name: str, data_dir: str | None) -> str:
    where = f" --data_dir={os.path.join(data_dir, 'tensorflow_datasets')}" if data_dir else ""
    return (
        f"Prepare it with: pip install 'jaxmodels[prepare]' && tfds build {name.partition(':')[0]} --file_format=array_record{where}; "
        "or say where it lies with --data_dir=DIR or JAXMODELS_DATA_DIR."
    )
