"""Files with one example a row: tab-separated, comma-separated, and JSON lines."""

import csv
import json
from collections.abc import Callable, Iterator, Mapping

from jaxmodels import config as config_lib
from jaxmodels.data.features import Column, Label, Options, Row, open_rows
from jaxmodels.data.files import split_files
from jaxmodels.data.skipping import Policy
from jaxmodels.data.source import Dataset
from jaxmodels.errors import ConfigError


def tsv(
    path: str,
    data_dir: str | None,
    *,
    sequence_length: int,
    tokenizer: str,
    header: bool = False,
    text_column: int | str = 0,
    label_column: int | str = 1,
    label: Label = "class",
    labels: tuple[str, ...] | None = None,
    source_column: int | str | None = None,
    target_column: int | str | None = None,
    target_length: int | None = None,
    truncate: bool = True,
    train: str | None = None,
    validation: str | None = None,
    test: str | None = None,
    holdout: float = 0.1,
    on_bad_example: Policy = "error",
) -> Dataset:
    """Texts with labels, or pairs of texts, in tab-separated files: a row a line, no quoting, UTF-8.

    Args:
      path: a folder with `train.tsv` and, where there are any, `validation.tsv` (or `valid`, `val`, `dev`) and `test.tsv`,
        each also as `NAME-*.tsv` or `NAME/*.tsv`; a pattern with `{split}`; or a file, or pattern of files, to train on.
        Relative to the working directory or else to the data directory.
      data_dir: the data directory.
      sequence_length: tokens of an example, T; shorter ones are padded with -1.
      tokenizer: see `tokenizers.make_tokenizer`; one that has to be made is made from the training texts.
      header: whether the first line of each file names the columns.
      text_column: the text's name, or its number from 0.
      label_column: the same of the label.
      label: `class`, a name or number of a class; `value`, a number to be predicted; `none`: only the text is read.
      labels: the classes in their order; the distinct labels of the training rows, sorted, unless given.
      source_column, target_column: two texts, for sequence to sequence; then there is no label.
      target_length: tokens of a target with its `<start>` or its `<end>`, U; `sequence_length` unless given.
      truncate: longer texts are cut, counted and told of; otherwise they are bad examples.
      train, validation, test: that split's file or pattern, where the names do not say.
      holdout: share of the training rows that validates where no file does, drawn by a fixed draw; 0 for none.
      on_bad_example: `error`, or `skip`: left out, counted, and told of.

    Raises:
      ConfigError: no such file or column; with `error` also a bad row, by file and line.
    """
    options = _options(locals())
    files = split_files(path, data_dir, {"train": train, "validation": validation, "test": test}, (".tsv",))
    return _open(files, options, data_dir, lambda file: _read_tsv(file, options.columns, header))


def csv_rows(
    path: str,
    data_dir: str | None,
    *,
    sequence_length: int,
    tokenizer: str,
    header: bool = True,
    text_column: int | str = "text",
    label_column: int | str = "label",
    label: Label = "class",
    labels: tuple[str, ...] | None = None,
    source_column: int | str | None = None,
    target_column: int | str | None = None,
    target_length: int | None = None,
    truncate: bool = True,
    train: str | None = None,
    validation: str | None = None,
    test: str | None = None,
    holdout: float = 0.1,
    on_bad_example: Policy = "error",
) -> Dataset:
    """The same of comma-separated files (RFC 4180: quoted values may hold commas, quotes and lines). Arguments as those of `tsv`."""
    options = _options(locals())
    files = split_files(path, data_dir, {"train": train, "validation": validation, "test": test}, (".csv",))
    return _open(files, options, data_dir, lambda file: _read_csv(file, options.columns, header))


def jsonl(
    path: str,
    data_dir: str | None,
    *,
    sequence_length: int,
    tokenizer: str,
    text_column: str = "text",
    label_column: str = "label",
    label: Label = "class",
    labels: tuple[str, ...] | None = None,
    source_column: str | None = None,
    target_column: str | None = None,
    target_length: int | None = None,
    truncate: bool = True,
    train: str | None = None,
    validation: str | None = None,
    test: str | None = None,
    holdout: float = 0.1,
    on_bad_example: Policy = "error",
) -> Dataset:
    """The same of files with a JSON object in each line; columns are its keys. Arguments as those of `tsv`."""
    options = _options(locals())
    files = split_files(path, data_dir, {"train": train, "validation": validation, "test": test}, (".jsonl", ".ndjson"))
    return _open(files, options, data_dir, lambda file: read_jsonl(file, options.columns))


def _options(arguments: Mapping) -> Options:
    return Options(**{key: value for key, value in arguments.items() if key in config_lib.fields(Options)})


def _open(files: Mapping[str, list[str]], options: Options, data_dir: str | None, read: Callable[[str], Iterator[Row]]) -> Dataset:
    return open_rows({split: (row for file in paths for row in read(file)) for split, paths in files.items()}, options, data_dir)


def lines(path: str) -> Iterator[str]:
    """Lines without their ends. Bytes that are not UTF-8 come as lone surrogates, which no row may keep."""
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="\n") as file:
        for line in file:
            yield line.removesuffix("\n").removesuffix("\r")


def _read_tsv(path: str, columns: Mapping[str, Column], header: bool) -> Iterator[Row]:
    return _read_table(path, columns, header, ((number, line.split("\t")) for number, line in enumerate(lines(path), 1)))


def _read_csv(path: str, columns: Mapping[str, Column], header: bool) -> Iterator[Row]:
    return _read_table(path, columns, header, _csv_records(path))


def _csv_records(path: str) -> Iterator[tuple[int, list[str] | str]]:
    """(first line, fields), or (line, problem)."""
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


def _read_table(path: str, columns: Mapping[str, Column], header: bool, records: Iterator[tuple[int, list[str] | str]]) -> Iterator[Row]:
    """Rows of the wanted columns; each must have as many as the first."""
    first = next(records, None)
    if first is None or isinstance(first[1], str):
        raise ConfigError(f"{path}, line 1: " + ("the file is empty." if first is None else first[1]))
    names = first[1] if header else None
    places = [_place(key, column, names, len(first[1]), path) for key, column in columns.items()]

    def row(number, fields):
        where = f"{path}, line {number}"
        if isinstance(fields, str):
            return Row(where, problem=fields)
        if len(fields) != len(first[1]):
            return Row(where, problem=f"the row has {len(fields)} columns, the first of the file {len(first[1])}.")
        return Row(where, [fields[place] for place in places])

    if not header:
        yield row(*first)
    for number, fields in records:
        yield row(number, fields)


def _place(key: str, column: Column, names: list[str] | None, count: int, path: str) -> int:
    """Which column a name or number is."""
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
    """The rows of a JSON lines file: of each object the values of `columns`, or what is wrong with it."""
    for number, line in enumerate(lines(path), 1):
        yield _json_row(f"{path}, line {number}", line, columns)


def _json_row(where: str, line: str, columns: Mapping[str, str]) -> Row:
    try:
        record = json.loads(line)
    except ValueError as error:
        return Row(where, problem=f"not JSON: {error}.")
    if not isinstance(record, dict):
        return Row(where, problem="not a JSON object.")
    for key, column in columns.items():
        if column not in record:
            hint = config_lib.suggest(column, record) + f" The row has {', '.join(record) or 'nothing'}."
            return Row(where, problem=f"no {column!r} (data.{key}).{hint}")
    return Row(where, [record[column] for column in columns.values()])
