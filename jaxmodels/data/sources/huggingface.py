"""Data sets of the Hugging Face `datasets` library, as `save_to_disk` writes them."""

import dataclasses
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxmodels import config as config_lib
from jaxmodels.data import access, copies, encoded, fitted
from jaxmodels.data.evaluation_sets import EvaluationSets, is_named, key_of
from jaxmodels.data.features.base import Row
from jaxmodels.data.features.label import Label
from jaxmodels.data.features.table import FEATURES, choose
from jaxmodels.data.files import find_folder, guess_splits, splits_by_name
from jaxmodels.data.index import Opened, open_index
from jaxmodels.data.indexed import IndexedBase, open_indexed
from jaxmodels.data.keys import takes
from jaxmodels.data.reading import is_unavailable
from jaxmodels.data.rows import Holdout, open_rows
from jaxmodels.data.source import Dataset, Untokenized, fingerprint
from jaxmodels.data.sources.rows import OPTIONAL, Indexing
from jaxmodels.errors import ConfigError, optional_import


class TableRows:
    """Rows of a table of the library, read by index; numbers of a ClassLabel become the names of its classes."""

    def __init__(self, table, columns: Sequence[str], where: str):
        """
        Args:
          table: `datasets.Dataset`.
          columns: to read.
          where: data set and split, for errors.
        """
        self.table, self.columns, self.where = table.select_columns(list(columns)), list(columns), where
        self.classes = {column: names for column in columns if (names := class_names_of(table.features[column]))}

    def __len__(self):
        return len(self.table)

    def __getitem__(self, index: int) -> Row:
        return self._row(index, self.table[index])

    def __iter__(self):
        return (self._row(i, record) for i, record in enumerate(self.table))

    def _row(self, index: int, record: Mapping) -> Row:
        return Row(f"{self.where}, row {index}", {column: named(record[column], self.classes.get(column)) for column in self.columns})

    def cheap(self, columns: Sequence[str]) -> list[Row]:
        """Return the rows with only some columns, without decoding the others."""
        return list(TableRows(self.table, columns, self.where))

    def fingerprint(self, indices: np.ndarray, arrays: Mapping[str, np.ndarray]) -> int:
        """Return a checksum of the rows' numbers and the arrays of other features; images and audio are not read."""
        others = {name: array for name, array in arrays.items() if name != "label"}
        return fingerprint(np.stack([indices, *(arrays[name] for name in arrays if name == "label")], axis=1), *others.values())


class IndexedTable(IndexedBase):
    """Rows of a table that are encoded when they are read. The library maps the table from disk; the index holds what is derived from it."""

    def __init__(self, opened: Opened, rows: TableRows):
        super().__init__(opened, rows.where)
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        return self.rows[index]

    def scan(self, columns):
        return iter(TableRows(self.rows.table, list(columns.values()), self.what))


def _indexed(rows: TableRows, paths: list[str]) -> IndexedTable:
    crc32 = zlib.crc32(f"{len(rows)} {rows.table.features}".encode())
    return IndexedTable(open_index("hf", [access.identify(path) for path in paths], lambda files, writer: {"crc32": crc32}, what=rows.where), rows)


@dataclasses.dataclass(kw_only=True)
class SplitNames(EvaluationSets):
    """Keys of data sets whose splits have names.

    Attributes:
      train, validation, test: name of that split in the data set, where it is another one: `validation_matched`.
    """

    train: str | None = None
    validation: str | None = None
    test: str | None = None

    def find(self, names: Sequence[str], where: str) -> dict[str, str]:
        """Return split -> its name; ConfigError if there is none for train, or a given name does not exist."""
        given = self.given()
        for split, name in given.items():
            if name not in names:
                raise ConfigError(f"{key_of(split)}: {where} has no split {name!r}.{config_lib.suggest(name, names)} It has {', '.join(names)}.")
        main = [name for split, name in given.items() if not is_named(split)]  # a further set may be a main one, too
        found, rest = splits_by_name([name for name in names if name not in main], where)
        if "train" not in found | given:
            raise ConfigError(f"config.data.source: {where} has no split 'train', but {', '.join(names)}; name it with data.train=SPLIT.")
        left_out = [name for name in rest if name not in given.values()]
        guess_splits({split: name for split, name in found.items() if split not in given}, left_out, where)
        return found | given


@takes(*FEATURES, SplitNames, Holdout, Indexing, optional=OPTIONAL, only_names=True, text_column="text", label_column="label")
def huggingface(path: str, data_dir: str | None, **keys: Any) -> Dataset | Untokenized:
    """Read a `Dataset`, which trains, or a `DatasetDict` with the splits `train`, `validation` (or `valid`, `val`, `dev`) and `test`.

    A column of the library's ClassLabel has the classes that it names, in each split its own. A split whose labels are all -1 or None is left out.

    Args:
      path: the folder that `save_to_disk` wrote, relative to the working directory or else to the data directory; a remote one is copied to the cache.
      data_dir: the data directory.

    Raises:
      ConfigError: the `datasets` package is missing, no such folder or column; with `on_bad_example='error'` also a bad row.
    """
    datasets = optional_import("datasets", "huggingface")
    folder = find_folder(path, data_dir)
    try:
        opened = datasets.load_from_disk(copies.keep_folder(folder))
    except (FileNotFoundError, ValueError, OSError) as error:
        if isinstance(error, OSError) and is_unavailable(error):
            raise
        raise ConfigError(f"config.data.source: {folder} is not what datasets' save_to_disk writes: {error}") from error
    there = dict(opened) if isinstance(opened, datasets.DatasetDict) else {"train": opened}
    parts = {split: there[name] for split, name in SplitNames.of(keys).find(list(there), folder).items()}
    features = choose(keys)
    columns = {key: column for feature in features for key, column in feature.columns().items()}
    rows = {split: _rows(datasets, part, columns, f"{folder} {split}") for split, part in parts.items()}
    for i, feature in enumerate(features):
        if isinstance(feature, Label) and feature.labels is None and feature.label_column in rows["train"].classes and fitted.get("labels") is None:
            features[i] = dataclasses.replace(feature, labels=rows["train"].classes[feature.label_column])
    files = {split: list(dict.fromkeys(file["filename"] for file in part.cache_files)) for split, part in parts.items()}
    if Indexing.of(keys).applies(files, features):
        return open_indexed({split: _indexed(part, files[split]) for split, part in rows.items()}, features, Holdout.of(keys), data_dir)
    kept = all(files.values()) and encoded.is_worth_it([path for part in files.values() for path in part])
    # The fingerprint of the library stands for what was chosen from the files, such as some rows.
    identity = (lambda: [{split: part._fingerprint for split, part in parts.items()}, encoded.contents(files)]) if kept else None
    return open_rows(lambda: rows, features, Holdout.of(keys), data_dir, identity=identity, what=folder)


def _rows(datasets, table, columns: Mapping[str, str], where: str) -> TableRows:
    """Return the rows of a split; images and audio stay bytes, which features decode."""
    for key, column in columns.items():
        if column not in table.column_names:
            hint = config_lib.suggest(column, table.column_names)
            raise ConfigError(f"config.data.{key}: {where} has no column {column!r}.{hint} It has {', '.join(table.column_names)}.")
        kind = table.features[column]
        if isinstance(kind, (datasets.Image, datasets.Audio)) and getattr(kind, "mode", None) is None:
            table = table.cast_column(column, type(kind)(decode=False))
    return TableRows(table, list(columns.values()), where)


def class_names_of(kind) -> tuple[str, ...] | None:
    """Return the class names of a ClassLabel, or of a list of them; else None."""
    return tuple(getattr(getattr(kind, "feature", kind), "names", None) or ()) or None


def named(value: Any, names: tuple[str, ...] | None) -> Any:
    """Return the name of a class number, or a list of names; a number out of range stays, and the feature reports it."""
    if names and isinstance(value, list):
        return [named(item, names) for item in value]
    return names[value] if names and isinstance(value, int) and 0 <= value < len(names) else value
