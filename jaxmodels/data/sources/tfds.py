"""TensorFlow Datasets by name, read from a prepared folder without TensorFlow."""

import os
from collections.abc import Mapping

import numpy as np

from jaxmodels.data.skipping import BadExample, Forgiving, Policy
from jaxmodels.data.source import Dataset
from jaxmodels.errors import ConfigError


class Examples:
    """A TFDS split as a data source: its numeric features by name, whole numbers as int32.

    An example that cannot be decoded raises BadExample when it is read.
    """

    def __init__(self, source, names: tuple[str, ...], where: str):
        """
        Args:
          source: of TFDS.
          names: the features.
          where: the data set and split, for errors.
        """
        self.source, self.names, self.where = source, names, where

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        try:
            example = self.source[index]
        except MemoryError:
            raise
        except Exception as error:  # noqa: BLE001  what a decoder raises depends on where the record is broken
            raise BadExample(f"{self.where}, example {index}", f"cannot be decoded: {error}.") from error
        values = {name: np.asarray(example[name]) for name in self.names}
        return {name: v.astype(np.int32) if v.dtype == np.int64 else v for name, v in values.items()}


def tfds(
    name: str,
    data_dir: str | None,
    *,
    splits: Mapping[str, str] | None = None,
    holdout: int = 10,
    on_bad_example: Policy = "error",
) -> Dataset:
    """A prepared TFDS data set: `tfds:NAME`, `tfds:NAME/CONFIG` or `tfds:NAME:VERSION`.

    Args:
      name: as TFDS writes it.
      data_dir: the folder that holds it, or that holds a folder `tensorflow_datasets` that does;
        `~/tensorflow_datasets` if None.
      splits: which TFDS split, with slices, is which: `{"train": "train[:90%]", "validation": "train[90%:]"}`. Unless
        given, those that the data set has, and where it has no validation split, the end of train.
      holdout: percent of train that validates in that case.
      on_bad_example: of an example that cannot be decoded: `error`, which ends the run when it is read, or `skip`: its row has
        weight 0 and is counted in the metric `skipped_examples`.

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
        parts = {ours: Examples(builder.as_data_source(theirs), names, f"{folder} {theirs}") for ours, theirs in splits.items()}
    except NotImplementedError as error:
        raise ConfigError(f"config.data.source: {folder} allows no random access. {_how_to_prepare(name, data_dir)}") from error
    except (KeyError, ValueError) as error:
        raise ConfigError(f"config.data.splits: {error} (the data set has: {', '.join(builder.info.splits)})") from error
    if on_bad_example == "skip":
        blank = _blank(features, names)
        parts = {name: Forgiving(part, blank) for name, part in parts.items()}
    info = {}
    if "image" in features:
        info["image_shape"] = tuple(features["image"].shape)
    if "label" in features and hasattr(features["label"], "num_classes"):
        info["num_classes"] = features["label"].num_classes
    return Dataset(parts, info)


def _blank(features, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """An example of zeros."""
    for name in names:
        if None in features[name].shape:
            raise ConfigError(f"config.data.on_bad_example='skip' needs features of one size; {name!r} is {tuple(features[name].shape)}.")
    dtypes = {name: np.dtype(features[name].np_dtype) for name in names}
    return {name: np.zeros(features[name].shape, np.int32 if dtype == np.int64 else dtype) for name, dtype in dtypes.items()}


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
