"""Parquet files, read by row group and column."""

import dataclasses
import json
import re
import zlib
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np

from jaxmodels import config as config_lib
from jaxmodels.data import access, fitted
from jaxmodels.data.access import FileId, Files
from jaxmodels.data.features.base import Row
from jaxmodels.data.features.label import Label
from jaxmodels.data.features.table import FEATURES, choose
from jaxmodels.data.files import SplitFiles
from jaxmodels.data.groups import GroupCache, GroupKeys
from jaxmodels.data.index import Opened, Writer, open_index
from jaxmodels.data.indexed import IndexedBase, open_indexed
from jaxmodels.data.keys import takes
from jaxmodels.data.reading import is_unavailable
from jaxmodels.data.rows import Holdout
from jaxmodels.data.source import Dataset, Untokenized
from jaxmodels.data.sources.huggingface import named
from jaxmodels.data.sources.rows import OPTIONAL
from jaxmodels.errors import ConfigError, RunError, optional_import


@takes(*FEATURES, SplitFiles, Holdout, GroupKeys, optional=OPTIONAL, only_names=True, text_column="text", label_column="label")
def parquet(path: str, data_dir: str | None, **keys: Any) -> Dataset | Untokenized:
    """Read Parquet files. Only the columns that features need are read, a row group at a time.

    A row group is decoded as a whole. Reading rows in random order therefore decodes a row group for nearly each row, unless all row groups fit in
    `group_cache_mb`, or `data.shuffle_window` is set.

    Args:
      path: a folder with `train.parquet` and optionally `validation.parquet` (or `valid`, `val`, `dev`) and `test.parquet`, each also as
        `NAME-*.parquet` or `NAME/*.parquet`; a folder whose files all train; a pattern with `{split}`; or a file, or pattern of files, to train on.
        Relative to the working directory or else to the data directory, or remote: `gs://`, `s3://`, `https://`, `hf://datasets/OWNER/NAME/…`.
      data_dir: the data directory.

    Raises:
      ConfigError: pyarrow is missing; no such file or column; a damaged footer; files whose columns differ in type.
    """
    arrow = optional_import("pyarrow.parquet", "parquet")
    features, cache = choose(keys), GroupKeys.of(keys).cache()
    columns = {key: column for feature in features for key, column in feature.columns().items()}
    files = SplitFiles.of(keys).find(path, data_dir, (".parquet",), any_name=True)
    rows = {split: RowGroups(_open(arrow, paths, f"{path} ({split})"), f"{path} ({split})", columns, cache) for split, paths in files.items()}
    for i, feature in enumerate(features):
        if isinstance(feature, Label) and feature.labels is None and feature.label_column in rows["train"].classes and fitted.get("labels") is None:
            features[i] = dataclasses.replace(feature, labels=rows["train"].classes[feature.label_column])
    return open_indexed(rows, features, Holdout.of(keys), data_dir)


def _open(arrow: ModuleType, paths: Sequence[str], what: str) -> Opened:
    """Return the index of some files, from their footers.

    Its arrays have an entry for each row group: `end`, the rows up to its end, `file`, and `number` in the file; and `bytes`, for each row group the
    decompressed size of each column. Its header has the type of each column in the first file, and those that differ in others.
    """

    def build(files: Sequence[FileId], writer: Writer) -> dict[str, Any]:
        types, differing, rows, crc32, classes = {}, {}, 0, 0, {}
        for number, file in enumerate(files):
            footer = _footer(arrow, file.path)
            schema = footer.schema.to_arrow_schema()
            own = {field.name: _kind(field.type) for field in schema}
            if not number:
                types, classes = own, _class_names(schema.metadata)
            for name in types.keys() | own.keys():
                if types.get(name) != own.get(name):
                    differing.setdefault(name, [file.path, own.get(name)])
            for group in range(footer.num_row_groups):
                described = footer.row_group(group)
                rows += described.num_rows
                sizes, stored = dict.fromkeys(types, 0), []
                for column in (described.column(i) for i in range(described.num_columns)):
                    top = column.path_in_schema.split(".")[0]
                    sizes[top] = sizes.get(top, 0) + column.total_uncompressed_size
                    stored.append(column.total_compressed_size)
                for name, value in (("end", rows), ("file", number), ("number", group)):
                    writer.append(name, [value])
                writer.append("bytes", [sizes[name] for name in types])
                crc32 = zlib.crc32(f"{described.num_rows} {stored}".encode(), crc32)
            writer.progress.add(1)
        return {"types": types, "differing": differing, "classes": classes, "crc32": crc32}

    return open_index("parquet", access.identify_all(paths), build, what=what, total=len(paths), unit="files")


def _kind(type_: Any) -> str:
    """Return a column's type in words; types whose values are the same in Python are equal."""
    return re.sub(r"dictionary<values=(.*?), indices=.*?>", r"\1", str(type_)).replace("large_", "")


def _footer(arrow: ModuleType, path: str) -> Any:
    """Return the metadata of a file; ConfigError if it is damaged."""
    try:
        if not access.is_remote(path):
            return arrow.read_metadata(path)
        with access.open_file(path) as file:
            return arrow.read_metadata(file)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        if is_unavailable(error):
            raise
        raise ConfigError(f"{path}: not a whole Parquet file: {error} Copy it again or leave it out.") from error


def _class_names(metadata: Mapping[bytes, bytes] | None) -> dict[str, list[str]]:
    """Return column -> class names, from what Hugging Face's `datasets` writes into a schema."""
    try:
        described = json.loads((metadata or {}).get(b"huggingface", b"{}"))
    except (ValueError, RecursionError):
        return {}
    result = {}
    for name, feature in described.get("info", {}).get("features", {}).items():
        inner = feature[0] if isinstance(feature, list) and feature else feature
        inner = inner.get("feature", inner) if isinstance(inner, Mapping) else {}
        if isinstance(inner, Mapping) and isinstance(inner.get("names"), list):
            result[name] = inner["names"]
    return result


class RowGroups(IndexedBase):
    """The rows of Parquet files. Numbers of a ClassLabel of Hugging Face become the names of its classes."""

    def __init__(self, opened: Opened, what: str, columns: Mapping[str, str], cache: GroupCache):
        """
        Args:
          opened: index of `_open`.
          what: the files in words.
          columns: key of the section -> column.
          cache: of decoded row groups.
        """
        super().__init__(opened, what)
        self.columns, self.cache, self.files = dict(columns), cache, Files(opened.index.files)
        self.group_ends = opened.index["end"] if "end" in opened.index.arrays else np.zeros(0, np.int64)
        types, differing = opened.index.header["types"], opened.index.header["differing"]
        for key, column in columns.items():
            if column not in types:
                hint = config_lib.suggest(column, types)
                raise ConfigError(f"config.data.{key}: {self.files.path(0)} has no column {column!r}.{hint} It has {', '.join(types)}.")
            if column in differing:
                path, other = differing[column]
                has = f"is {other} in {path}" if other else f"is missing in {path}"
                raise ConfigError(
                    f"config.data.{key}: the column {column!r} is {types[column]} in {self.files.path(0)} and {has}. All files of a split need the same columns: "
                    "write that file again, or give a pattern without it."
                )
        names = opened.index.header["classes"]
        self.classes = {column: tuple(names[column]) for column in columns.values() if column in names}

    def __len__(self):
        return int(self.group_ends[-1]) if len(self.group_ends) else 0

    def _sizes(self) -> np.ndarray:
        """Return the decompressed bytes of each row group in the columns that are read, as the footers state them."""
        names = list(self.opened.index.header["types"])
        return self.opened.index["bytes"].reshape(-1, len(names))[:, [names.index(column) for column in self.columns.values()]].sum(1)

    @property
    def groups_that_fit(self) -> int:
        """How many row groups as large as the largest fit in the cache. It is decoded: texts of a dictionary take more than the footer states."""
        return self.cache.limit // max(1, self._table(int(np.argmax(self._sizes())), list(self.columns.values())).nbytes)

    def notes(self):
        sizes = self._sizes()
        shown = f"{self.what}: {len(self):,} rows in {len(sizes):,} row groups, of at most {sizes.max() / 2**20:,.1f} MiB in the columns that are read"
        if sizes.sum() <= self.cache.limit:
            return (shown,)
        fit = int(self.cache.limit // max(1, sizes.max()))
        return (f"{shown}; about {fit} fit in data.group_cache_mb. Read in random order, a row group is decoded for nearly each row: set data.shuffle_window",)

    def __getitem__(self, index: int) -> Row:
        group = int(np.searchsorted(self.group_ends, index, side="right"))
        table = self.cache.get((str(self.opened.index.folder), group), lambda: self._decode(group))
        place = index - (int(self.group_ends[group - 1]) if group else 0)
        if isinstance(table, str):
            return Row(self._where(group, place), problem=table)
        return self._row(group, place, table.slice(place, 1).to_pylist()[0], self.columns)

    def _decode(self, group: int) -> tuple[Any, int]:
        """Return a row group and its bytes, or why it cannot be decoded."""
        try:
            table = self._table(group, list(self.columns.values()))
        except (MemoryError, RunError):
            raise
        except Exception as error:  # noqa: BLE001  what Arrow raises depends on where the file is damaged
            path = self.files.path(int(self.opened.index["file"][group]))
            if is_unavailable(error) or isinstance(error, FileNotFoundError) or access.is_remote(path):
                raise
            return f"row group {self.opened.index['number'][group]} cannot be decoded: {' '.join(str(error).split())} Copy the file again or leave it out.", 1
        return table, table.nbytes

    def _table(self, group: int, columns: list[str]) -> Any:
        """Read some columns of a row group."""
        arrow = optional_import("pyarrow.parquet", "parquet")
        number, file = int(self.opened.index["number"][group]), int(self.opened.index["file"][group])
        self.files.check(file)
        path = self.files.path(file)
        with access.open_file(path) if access.is_remote(path) else open(path, "rb") as opened:
            return arrow.ParquetFile(opened, pre_buffer=access.is_remote(path)).read_row_group(number, columns=list(dict.fromkeys(columns)))

    def scan(self, columns):
        for group in range(len(self.group_ends)):
            place = 0
            for batch in self._table(group, list(columns.values())).to_batches(max_chunksize=1024):
                for record in batch.to_pylist():
                    yield self._row(group, place, record, columns)
                    place += 1

    def _row(self, group: int, place: int, record: Mapping[str, Any], columns: Mapping[str, str]) -> Row:
        values = {column: named(record[column], self.classes.get(column)) for column in columns.values()}
        return Row(self._where(group, place), values, folder=self.files.folders[self.opened.index["file"][group]])

    def _where(self, group: int, place: int) -> str:
        """Return file and row, counted from 0 in the file."""
        file = self.opened.index["file"][group]
        first = int(np.searchsorted(self.opened.index["file"], file))  # row group of the file
        before = (int(self.group_ends[group - 1]) if group else 0) - (int(self.group_ends[first - 1]) if first else 0)
        return f"{self.files.path(int(file))}, row {before + place}"
