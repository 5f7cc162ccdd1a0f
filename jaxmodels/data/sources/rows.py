"""Files with one example a row: tab-separated, comma-separated, and JSON lines."""

import csv
import dataclasses
import functools
import io
import itertools
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from jaxmodels import config as config_lib
from jaxmodels.data import encoded
from jaxmodels.data.access import is_remote
from jaxmodels.data.compressed import SUFFIXES, codec_of, open_stream
from jaxmodels.data.features.base import Column, Feature, Row
from jaxmodels.data.features.table import FEATURES, choose
from jaxmodels.data.features.text import Tokenized
from jaxmodels.data.files import SplitFiles
from jaxmodels.data.groups import GroupCache, GroupKeys
from jaxmodels.data.guesses import guess
from jaxmodels.data.indexed import open_indexed
from jaxmodels.data.keys import Keys, takes
from jaxmodels.data.rows import FileRows, Holdout, open_rows
from jaxmodels.data.source import Dataset, Untokenized
from jaxmodels.data.sources.header import find_header
from jaxmodels.data.sources.row_index import RecordRows, open_records
from jaxmodels.data.text_lines import check_kind, csv_records, lines, numbered, without_end
from jaxmodels.errors import ConfigError

# A text is read unless the column of another feature is named, so that no feature's key is required.
OPTIONAL = ("sequence_length", "tokenizer")
INDEXED_FROM = 64 << 20  # bytes of files whose rows are found by an index


@dataclasses.dataclass(kw_only=True)
class Header(Keys):
    """Keys of tables in text files.

    Attributes:
      header: whether the first line of each file names the columns. By default that is seen from the first lines of a file: if only the first
        label is no number, or if it is none of the others and the line has usual names of columns.
    """

    header: bool | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Indexing(Keys):
    """Keys of files of rows.

    Attributes:
      indexed: whether rows stay in their files, are found by an index and are encoded when they are read; otherwise all are encoded at the start.
        By default, if the files have 64 MiB, or one is compressed or remote, or if texts are read beside images or audio.
    """

    indexed: bool | None = None

    def applies(self, files: Mapping[str, list[str]], features: Sequence[Feature]) -> bool:
        """Return whether the rows of these files are found by an index."""
        paths = [path for part in files.values() for path in part]
        needed = next((f"{path} is {'remote' if is_remote(path) else 'compressed'}" for path in paths if is_remote(path) or codec_of(path)), None)
        if any(feature.on_read for feature in features) and any(isinstance(feature, Tokenized) for feature in features):
            needed = "texts beside images or audio are tokenized when they are read"
        if self.indexed is False and needed:
            raise ConfigError(f"config.data.indexed must not be false: {needed}, which needs an index.")
        return bool(self.indexed or needed) or (self.indexed is None and sum(map(os.path.getsize, paths)) >= INDEXED_FROM)


@dataclasses.dataclass(frozen=True)
class _Format:
    """How a format is read.

    Attributes:
      extensions: of its files.
      read: (path, key -> column) -> all rows of a file.
      records: how rows are divided, see `open_records`.
      fields: text of a record -> its fields, or what is wrong; None for JSON.
      header: whether the first record names the columns; None if that is to be seen.
      table: path -> all records of a file, (line, fields or what is wrong); None for JSON.
    """

    extensions: tuple[str, ...]
    read: Callable[[str, Mapping], Iterator[Row]]
    records: str
    fields: Callable[[str], list[str] | str] | None = None
    header: bool | None = False
    table: Callable[[str], Iterator[tuple[int, list[str] | str]]] | None = None


def _table(extensions: tuple[str, ...], table: Callable, records: str, fields: Callable, header: bool | None) -> _Format:
    return _Format(extensions, functools.partial(_read_table, records=table, header=bool(header)), records, fields, header, table)


@takes(Header, *FEATURES, SplitFiles, Holdout, Indexing, GroupKeys, optional=OPTIONAL, text_column=0, label_column=1)
def tsv(path: str, data_dir: str | None, **keys: Any) -> Dataset | Untokenized:
    """Read tab-separated files: a row a line, no quoting, UTF-8.

    Args:
      path: a folder with `train.tsv` and optionally `validation.tsv` (or `valid`, `val`, `dev`) and `test.tsv`,
        each also as `NAME-*.tsv` or `NAME/*.tsv`; a pattern with `{split}`; or a file, or pattern of files, to train on.
        Relative to the working directory or else to the data directory.
      data_dir: the data directory.

    Raises:
      ConfigError: no such file or column; with `on_bad_example='error'` also a bad row, by file and line.
    """
    return _open(path, data_dir, keys, _table((".tsv",), _tsv_records, "lines", tsv_fields, keys["header"]))


@takes(Header, *FEATURES, SplitFiles, Holdout, Indexing, GroupKeys, optional=OPTIONAL, header=True, text_column="text", label_column="label")
def csv_rows(path: str, data_dir: str | None, **keys: Any) -> Dataset | Untokenized:
    """Read comma-separated files (RFC 4180: quoted values may hold commas, quotes and line breaks).

    Args:
      path: as of `tsv`, with the extension `.csv`.
      data_dir: the data directory.
    """
    return _open(path, data_dir, keys, _table((".csv",), _csv_records, "csv", csv_fields, keys["header"]))


@takes(*FEATURES, SplitFiles, Holdout, Indexing, GroupKeys, optional=OPTIONAL, only_names=True, text_column="text", label_column="label")
def jsonl(path: str, data_dir: str | None, **keys: Any) -> Dataset | Untokenized:
    """Read files with a JSON object in each line, or with one array of objects; columns are their keys.

    Args:
      path: as of `tsv`, with the extension `.jsonl`, `.ndjson` or `.json`.
      data_dir: the data directory.
    """
    return _open(path, data_dir, keys, _Format((".jsonl", ".ndjson", ".json"), read_jsonl, "lines"))


def _open(path: str, data_dir: str | None, keys: Mapping, form: "_Format") -> Dataset | Untokenized:
    """Open the data set of some files, whole or by an index."""
    features, options, indexing = choose(keys), Holdout.of(keys), Indexing.of(keys)
    files = SplitFiles.of(keys).find(path, data_dir, tuple(e + c for e in form.extensions for c in ("", *SUFFIXES)))
    columns = {key: column for feature in features for key, column in feature.columns().items()}
    if form.header is None:
        header = find_header(form.table, [file for part in files.values() for file in part], columns)
        form = _table(form.extensions, form.table, form.records, form.fields, header)
    if indexing.applies(files, features):
        cache = GroupKeys.of(keys).cache()
        indexed = {split: _indexed(paths, f"{path} ({split})", form, columns, cache) for split, paths in files.items()}
        return open_indexed(indexed, features, options, data_dir)

    hold = FileRows if any(feature.on_read for feature in features) else iter

    def rows():
        return {split: hold(row for file in paths for row in form.read(file, columns)) for split, paths in files.items()}

    kept = encoded.is_worth_it([file for part in files.values() for file in part])
    identity = (lambda: [form.extensions, form.header, encoded.contents(files)]) if kept else None
    return open_rows(rows, features, options, data_dir, identity=identity, what=path)


def _indexed(paths: list[str], what: str, form: "_Format", columns: Mapping[str, Column], cache: GroupCache) -> RecordRows:
    """Return the rows of some files, by an index."""
    opened = open_records(paths, form.records, form.header is True, what)
    for path, first in zip(paths, opened.index.header["first"], strict=True):
        if form.fields is None and _begins_array(first):
            raise ConfigError(f"{path} is one JSON array, which has no index of its items. Write an object a line: jq -c '.[]' {path} > NEW_FILE")
    parse: Any = JsonParser() if form.fields is None else TableParser(paths, opened.index.header["first"], form, columns)
    return RecordRows(opened, what, columns, parse, cache, "line" if form.records == "lines" else "row")


def _tsv_records(path: str) -> Iterator[tuple[int, list[str] | str]]:
    """Yield (line, fields)."""
    return ((number, line.split("\t")) for number, line in numbered(path))


def tsv_fields(text: str) -> list[str]:
    """Return the fields of a line."""
    return without_end(text).split("\t")


def csv_fields(text: str) -> list[str] | str:
    """Return the fields of a record, or what is wrong with it."""
    try:
        return next(csv.reader(io.StringIO(text, newline=""), strict=True), [])
    except csv.Error as error:
        return f"not a row of comma-separated values: {error}."


class JsonParser:
    """Text of a row -> row, for JSON lines."""

    def __call__(self, where: str, text: str, folder: str, file: int, columns: Mapping[str, Column]) -> Row:
        return _json_row(where, json_object(without_end(text)), columns, folder)


class TableParser:
    """Text of a row -> row, for tables. Files may have their columns in different orders."""

    def __init__(self, paths: list[str], first: list[str], form: _Format, columns: Mapping[str, Column]):
        """
        Args:
          paths: files.
          first: text of the first record of each.
          form: the format.
          columns: key of the section -> column.
        """
        self.fields = form.fields
        self.layouts = [_layout(form.fields(text) if text else None, path, form.header, columns) for path, text in zip(paths, first, strict=True)]

    def __call__(self, where: str, text: str, folder: str, file: int, columns: Mapping[str, Column]) -> Row:
        places, count = self.layouts[file]
        return _table_row(where, self.fields(text), {column: places[column] for column in columns.values()}, count, folder)


def _csv_records(path: str) -> Iterator[tuple[int, list[str] | str]]:
    """Yield (first line, fields), or (line, problem)."""
    with open_stream(path) as binary:
        check_kind(binary.peek(4)[:4], path)
        with io.TextIOWrapper(binary, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            yield from ((line, fields) for line, fields in csv_records(file, path) if fields)


def _read_table(path: str, columns: Mapping[str, Column], *, records: Callable, header: bool) -> Iterator[Row]:
    """Yield rows with the named columns; each row must have as many fields as the first."""
    table, folder = records(path), os.path.dirname(path)
    first = next(table, None)
    places, count = _layout(None if first is None else first[1], path, header, columns)
    for number, fields in table if header else itertools.chain([first], table):
        yield _table_row(f"{path}, line {number}", fields, places, count, folder)


def _layout(first: list[str] | str | None, path: str, header: bool, columns: Mapping[str, Column]) -> tuple[dict[Column, int], int]:
    """Return the place of each column and their number, given the fields of a file's first record, what is wrong with it, or None."""
    if first is None or isinstance(first, str):
        raise ConfigError(f"{path}, line 1: {first or 'the file is empty.'}")
    names = first if header else None
    return {column: _place(key, column, names, len(first), path) for key, column in columns.items()}, len(first)


def _table_row(where: str, fields: list[str] | str, places: Mapping[Column, int], count: int, folder: str) -> Row:
    if isinstance(fields, str):
        return Row(where, problem=fields)
    if len(fields) != count:
        return Row(where, problem=f"the row has {len(fields)} columns, the first of the file {count}.")
    return Row(where, {column: fields[place] for column, place in places.items()}, folder=folder)


def _place(key: str, column: Column, names: list[str] | None, count: int, path: str) -> int:
    """Return the index of a column given by name or number."""
    if isinstance(column, int):
        if not 0 <= column < count:
            raise ConfigError(f"config.data.{key}={column}: {path} has {count} columns, numbered from 0.")
        return column
    if names is None:
        raise ConfigError(f"config.data.{key}={column!r}: give the column's number, or set data.header=true if the first line of {path} has names.")
    if names.count(column) > 1:
        raise ConfigError(f"config.data.{key}: {path} has {names.count(column)} columns {column!r}. Rename them, or give the column's number.")
    if column not in names:
        raise ConfigError(f"config.data.{key}: {path} has no column {column!r}.{config_lib.suggest(column, names)} It has {', '.join(names)}.")
    return names.index(column)


def read_jsonl(path: str, columns: Mapping[str, str]) -> Iterator[Row]:
    """Yield the rows of a JSON lines file, each with the values of `columns` (key of the section -> name)."""
    for where, record in json_records(path):
        yield _json_row(where, record, columns, os.path.dirname(path))


def json_records(path: str) -> Iterator[tuple[str, dict | str]]:
    """Yield file and line, and the object or what is wrong, of each line of a file that is not blank, or of each item of its one array."""
    for i, (number, line) in enumerate(numbered(path)):
        if i == 0 and _begins_array(line):
            break
        yield f"{path}, line {number}", json_object(line)
    else:
        return
    try:
        items = json.loads("\n".join(lines(path)))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: the file begins with [, as one array of objects does, and is no JSON: {error}.") from error
    guess(f"{path} is one JSON array; its items are the rows (write an object a line to read it in parts)")
    yield from ((f"{path}, item {i}", item if isinstance(item, dict) else "not a JSON object.") for i, item in enumerate(items))


def _begins_array(line: str) -> bool:
    """Return whether the first line of a file begins an array of objects: it is one, or it is no JSON because the array goes on."""
    if not line.lstrip().startswith("["):
        return False
    try:
        items = json.loads(line)
    except (ValueError, RecursionError):
        return True
    return all(isinstance(item, dict) for item in items)


def _json_row(where: str, record: dict | str, columns: Mapping[str, str], folder: str) -> Row:
    if isinstance(record, str):
        return Row(where, problem=record)
    for key, column in columns.items():
        if column not in record:
            hint = config_lib.suggest(column, record) + f" The row has {', '.join(record) or 'nothing'}."
            return Row(where, problem=f"no {column!r} (data.{key}).{hint}")
    return Row(where, {column: record[column] for column in columns.values()}, folder=folder)


def json_object(line: str | bytes) -> dict | str:
    """Return the JSON object of a line, or what is wrong with the line."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        return f"not JSON: {error}."
    return record if isinstance(record, dict) else "not a JSON object."
