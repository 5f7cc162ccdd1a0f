"""Files with one example a row: tab-separated, comma-separated, and JSON lines."""

import csv
import dataclasses
import functools
import json
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from jaxmodels import config as config_lib
from jaxmodels.data.features.base import Column, Row
from jaxmodels.data.features.table import FEATURES, choose
from jaxmodels.data.files import SplitFiles
from jaxmodels.data.keys import Keys, takes
from jaxmodels.data.rows import FileRows, Holdout, open_rows
from jaxmodels.data.source import Dataset, Untokenized
from jaxmodels.errors import ConfigError

# A text is read unless the column of another feature is named, so that no feature's key is required.
OPTIONAL = ("sequence_length", "tokenizer")


@dataclasses.dataclass(kw_only=True)
class Header(Keys):
    """Keys of tables in text files.

    Attributes:
      header: whether the first line of each file names the columns.
    """

    header: bool


@takes(Header, *FEATURES, SplitFiles, Holdout, optional=OPTIONAL, header=False, text_column=0, label_column=1)
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
    return _open(path, data_dir, keys, (".tsv",), functools.partial(_read_table, records=_tsv_records, header=keys["header"]))


@takes(Header, *FEATURES, SplitFiles, Holdout, optional=OPTIONAL, header=True, text_column="text", label_column="label")
def csv_rows(path: str, data_dir: str | None, **keys: Any) -> Dataset | Untokenized:
    """Read comma-separated files (RFC 4180: quoted values may hold commas, quotes and line breaks).

    Args:
      path: as of `tsv`, with the extension `.csv`.
      data_dir: the data directory.
    """
    return _open(path, data_dir, keys, (".csv",), functools.partial(_read_table, records=_csv_records, header=keys["header"]))


@takes(*FEATURES, SplitFiles, Holdout, optional=OPTIONAL, only_names=True, text_column="text", label_column="label")
def jsonl(path: str, data_dir: str | None, **keys: Any) -> Dataset | Untokenized:
    """Read files with a JSON object in each line; columns are its keys.

    Args:
      path: as of `tsv`, with the extension `.jsonl` or `.ndjson`.
      data_dir: the data directory.
    """
    return _open(path, data_dir, keys, (".jsonl", ".ndjson"), read_jsonl)


def _open(path: str, data_dir: str | None, keys: Mapping, extensions: tuple[str, ...], read: Callable[[str, Mapping], Iterator[Row]]) -> Dataset | Untokenized:
    """Open the data set of some files; `read` yields the rows of a file, given key -> column."""
    features, options = choose(keys), Holdout.of(keys)
    files = SplitFiles.of(keys).find(path, data_dir, extensions)
    columns = {key: column for feature in features for key, column in feature.columns().items()}

    def rows():
        return {split: FileRows(row for file in paths for row in read(file, columns)) for split, paths in files.items()}

    return open_rows(rows, features, options, data_dir)


def lines(path: str) -> Iterator[str]:
    """Yield lines without their ends. Bytes that are not UTF-8 become lone surrogates, which features refuse."""
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="\n") as file:
        for line in file:
            yield line.removesuffix("\n").removesuffix("\r")


def _tsv_records(path: str) -> Iterator[tuple[int, list[str] | str]]:
    """Yield (line, fields)."""
    return ((number, line.split("\t")) for number, line in enumerate(lines(path), 1))


def _csv_records(path: str) -> Iterator[tuple[int, list[str] | str]]:
    """Yield (first line, fields), or (line, problem)."""
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file, strict=True)
        while True:
            first = reader.line_num + 1
            try:
                yield first, next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield first, f"not a row of comma-separated values: {error}."


def _read_table(path: str, columns: Mapping[str, Column], *, records: Callable, header: bool) -> Iterator[Row]:
    """Yield rows with the named columns; each row must have as many fields as the first."""
    table, folder = records(path), os.path.dirname(path)
    first = next(table, None)
    if first is None or isinstance(first[1], str):
        raise ConfigError(f"{path}, line 1: " + ("the file is empty." if first is None else first[1]))
    names = first[1] if header else None
    places = {column: _place(key, column, names, len(first[1]), path) for key, column in columns.items()}

    def row(number, fields):
        where = f"{path}, line {number}"
        if isinstance(fields, str):
            return Row(where, problem=fields)
        if len(fields) != len(first[1]):
            return Row(where, problem=f"the row has {len(fields)} columns, the first of the file {len(first[1])}.")
        return Row(where, {column: fields[place] for column, place in places.items()}, folder=folder)

    if not header:
        yield row(*first)
    for number, fields in table:
        yield row(number, fields)


def _place(key: str, column: Column, names: list[str] | None, count: int, path: str) -> int:
    """Return the index of a column given by name or number."""
    if isinstance(column, int):
        if not 0 <= column < count:
            raise ConfigError(f"config.data.{key}={column}: {path} has {count} columns, numbered from 0.")
        return column
    if names is None:
        raise ConfigError(f"config.data.{key}={column!r}: give the column's number, or set data.header=true if the first line of {path} has names.")
    if column not in names:
        raise ConfigError(f"config.data.{key}: {path} has no column {column!r}.{config_lib.suggest(column, names)} It has {', '.join(names)}.")
    return names.index(column)


def read_jsonl(path: str, columns: Mapping[str, str]) -> Iterator[Row]:
    """Yield the rows of a JSON lines file, each with the values of `columns` (key of the section -> name)."""
    for number, line in enumerate(lines(path), 1):
        yield _json_row(f"{path}, line {number}", line, columns, os.path.dirname(path))


def _json_row(where: str, line: str, columns: Mapping[str, str], folder: str) -> Row:
    record = json_object(line)
    if isinstance(record, str):
        return Row(where, problem=record)
    for key, column in columns.items():
        if column not in record:
            hint = config_lib.suggest(column, record) + f" The row has {', '.join(record) or 'nothing'}."
            return Row(where, problem=f"no {column!r} (data.{key}).{hint}")
    return Row(where, {column: record[column] for column in columns.values()}, folder=folder)


def json_object(line: str) -> dict | str:
    """Return the JSON object of a line, or what is wrong with the line."""
    try:
        record = json.loads(line)
    except ValueError as error:
        return f"not JSON: {error}."
    return record if isinstance(record, dict) else "not a JSON object."
