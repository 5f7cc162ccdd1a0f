"""TensorFlow Datasets by name, read from a prepared folder without TensorFlow."""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxmodels.data import access, copies, folders
from jaxmodels.data.evaluation_sets import EvaluationSets
from jaxmodels.data.features.array import Array
from jaxmodels.data.features.base import Row
from jaxmodels.data.keys import takes
from jaxmodels.data.reading import is_unavailable
from jaxmodels.data.rows import Holdout, open_on_read
from jaxmodels.data.skipping import Policy
from jaxmodels.data.source import Dataset
from jaxmodels.errors import ConfigError


class SplitRows:
    """Rows of a TFDS split, read by index."""

    def __init__(self, source, where: str):
        """
        Args:
          source: the split, as TFDS opens it.
          where: data set and split, for errors.
        """
        self.source, self.where = source, where

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index: int) -> Row:
        where = f"{self.where}, example {index}"
        try:
            return Row(where, self.source[index])
        except MemoryError:
            raise
        except Exception as error:  # noqa: BLE001  what a decoder raises depends on where the record is broken
            if is_unavailable(error):
                raise
            return Row(where, problem=f"cannot be decoded: {error}.")


@takes(EvaluationSets)
def tfds(
    name: str,
    data_dir: str | None,
    *,
    splits: Mapping[str, str] | None = None,
    holdout: int = 10,
    on_bad_example: Policy = "error",
    **keys: Any,
) -> Dataset:
    """Read a prepared TFDS data set: `tfds:NAME`, `tfds:NAME/CONFIG` or `tfds:NAME:VERSION`. Examples are its numeric features by name.

    Args:
      name: name in the TFDS catalog.
      data_dir: the folder that holds the data set, or that has a folder `tensorflow_datasets` that holds it;
        `~/tensorflow_datasets` if None. From a remote one, the data set is copied to the cache.
      splits: split -> TFDS split, with slices: `{"train": "train[:90%]", "validation": "train[90%:]"}`. By default
        those that the data set has, and without a validation split, the end of train.
      holdout: percent of train that validates in that case; 0 for none.
      on_bad_example: for an example that cannot be decoded: `error` ends the run when it is read; `skip` gives its row
        weight 0 and counts it in the metric `skipped_examples`.

    Raises:
      ConfigError: no such folder (how to prepare it), a format without random access, or an unknown split.
    """
    import tensorflow_datasets

    if not 0 <= holdout < 100:
        raise ConfigError(f"config.data.holdout is a percentage of at least 0 and below 100, got {holdout}.")
    folder = _find_folder(name, data_dir)
    builder = tensorflow_datasets.builder_from_directory(copies.keep_folder(folder))
    if splits is None:
        splits = {s: s for s in ("train", "validation", "test") if s in builder.info.splits}
        if "train" in splits and "validation" not in splits and holdout:
            splits |= {"train": f"train[:{100 - holdout}%]", "validation": f"train[{100 - holdout}%:]"}
    splits = dict(splits) | EvaluationSets.of(keys).named()
    if not splits or not all(isinstance(value, str) for value in splits.values()):
        raise ConfigError(f"config.data.splits: give each split as TFDS writes it, {{'train': 'train[:90%]'}}; got {dict(splits)}.")
    features = builder.info.features
    arrays = [Array(column=name, shape=kind.shape, dtype=np.dtype(kind.np_dtype)) for name, kind in features.items() if _is_numeric(kind)]
    try:
        rows = {name: SplitRows(builder.as_data_source(split), f"{folder} {split}") for name, split in splits.items()}
    except NotImplementedError as error:
        raise ConfigError(f"config.data.source: {folder} allows no random access. {_how_to_prepare(name, data_dir)}") from error
    except (KeyError, ValueError) as error:
        raise ConfigError(f"config.data.splits: {error} (the data set has: {', '.join(builder.info.splits)})") from error
    dataset = open_on_read(rows, arrays, Holdout(holdout=0, on_bad_example=on_bad_example))
    info = {}
    if "image" in features:
        info["image_shape"] = tuple(features["image"].shape)
    if "label" in features and hasattr(features["label"], "num_classes"):
        info["num_classes"] = features["label"].num_classes
    return dataclasses.replace(dataset, info=info)


def _is_numeric(feature) -> bool:
    try:
        return np.dtype(feature.np_dtype).kind in "biuf"
    except (AttributeError, TypeError):  # texts and nested features
        return False


def _find_folder(name: str, data_dir: str | None) -> str:
    """Return the folder of a data set's version, by default the newest."""
    path, _, version = name.partition(":")
    data_dir = access.address(data_dir, "--data_dir") if data_dir else None
    roots = [access.join(data_dir, "tensorflow_datasets"), data_dir] if data_dir else [os.path.expanduser("~/tensorflow_datasets")]
    for root in roots:
        folder = access.join(root, path)
        found = sorted(folders.entries(folder).folders, key=_version_key) if access.is_folder(folder) else []
        found = [v for v in found if access.is_file(access.join(folder, f"{v}/dataset_info.json")) and version in ("", v)]
        if found:
            return access.join(folder, found[-1])
    looked = " nor ".join(os.path.join(root, path, version or "VERSION") for root in roots)
    raise ConfigError(f"config.data.source: there is no prepared {looked}. {_how_to_prepare(name, data_dir)}")


def _version_key(version: str) -> tuple:
    return tuple((part.isdigit(), int(part) if part.isdigit() else 0, part) for part in version.split("."))


def _how_to_prepare(name: str, data_dir: str | None) -> str:
    where = f" --data_dir={os.path.join(data_dir, 'tensorflow_datasets')}" if data_dir else ""
    return (
        f"Prepare it with: pip install 'jaxmodels[prepare]' && tfds build {name.partition(':')[0]} --file_format=array_record{where}; "
        "or name its folder with --data_dir=DIR or JAXMODELS_DATA_DIR."
    )
