"""Tables of numbers over time, as windows of the past and the future, for forecasting."""

import array
import csv
import io
import os

import numpy as np

from jaxmodels import config as config_lib
from jaxmodels.data import access, copies, fitted
from jaxmodels.data.files import find_file
from jaxmodels.data.guesses import guess
from jaxmodels.data.source import Dataset, fingerprint
from jaxmodels.data.text_lines import MAX_FIELD, check_kind, csv_records, is_blank, is_number, is_utf8, not_utf8
from jaxmodels.errors import ConfigError

_ROUNDING = 1e-12  # of the largest value: deviations up to this come from rounding float64
_FAR = 1000.0  # deviations from the mean of the training rows
_BLOCK = 1 << 20  # bytes read at once
_ROWS = 1 << 16  # rows scaled at once
_SLOW_FROM = 16 << 20  # bytes of a file that takes half a second without PyArrow


class Horizons:
    """Windows of `lookback` rows and the `horizon` rows after them, one starting at every row of `values` where both fit."""

    in_memory = True

    def __init__(self, values: np.ndarray, lookback: int, horizon: int):
        self.values, self.lookback, self.horizon = values, lookback, horizon

    def __len__(self):
        return max(0, len(self.values) - self.lookback - self.horizon + 1)

    def fingerprint(self):
        return fingerprint(self.values, np.array([self.lookback, self.horizon]))

    def __getitem__(self, index):
        return {key: value[0] for key, value in self.get_batch(np.array([index])).items()}

    def get_batch(self, indices):
        rows = self.values[np.asarray(indices)[:, None] + np.arange(self.lookback + self.horizon)]
        return {"past": rows[:, : self.lookback], "future": rows[:, self.lookback :]}


def csv_table(
    path: str,
    data_dir: str | None,
    *,
    lookback: int,
    horizon: int,
    rows: tuple[int, ...],
    time_column: str = "date",
    columns: tuple[str, ...] | None = None,
) -> Dataset:
    """Read a CSV file with a header and one row for each time step, in order.

    Every column is standardised by the mean and deviation of its training rows, which are `mean` and `deviation` of the run's `info`; also in other data
    that the run is evaluated on. The windows of validation and test forecast rows of those splits only; their past may reach into the split before.

    Args:
      path: absolute or an address, or relative to the working directory or else to the data directory.
      data_dir: the data directory.
      lookback, horizon: rows of the past and of the future in an example.
      rows: numbers of rows that train, validate and test, from the first row on; the rest is not used.
      time_column: column that is not a variable.
      columns: the variables; all but `time_column` by default.

    Raises:
      ConfigError: no such file or column, a value that is not a number (file and line), or too few rows.
    """
    found = find_file(path, data_dir)
    copies.keep([found])
    if len(rows) != 3 or min(rows) < 1 or min(lookback, horizon) < 1:
        raise ConfigError(f"config.data: rows must be three numbers of rows, lookback and horizon at least 1; got {rows}, {lookback}, {horizon}.")
    values, names, notes = read_numbers(found, time_column, columns)
    train, validation, test = rows
    if sum(rows) > len(values):
        raise ConfigError(f"config.data.rows={rows} are more than the {len(values)} of {found}.")
    values, mean, deviation = _scaled(values[: sum(rows)], train, names, found)
    ends = np.cumsum(rows)
    parts = {"train": values[:train], "validation": values[train - lookback : ends[1]], "test": values[ends[1] - lookback : ends[2]]}
    splits = {name: Horizons(part, lookback, horizon) for name, part in parts.items()}
    if lookback > train or not all(len(split) for split in splits.values()):
        raise ConfigError(f"config.data: rows={rows} hold no window of lookback={lookback} and horizon={horizon}.")
    info = {"lookback": lookback, "horizon": horizon, "variables": len(names), "columns": list(names)}
    return Dataset(splits, info | {"mean": mean.tolist(), "deviation": deviation.tolist()}, notes=notes)


def read_numbers(path: str, time_column: str, columns: tuple[str, ...] | None) -> tuple[np.ndarray, list[str], tuple[str, ...]]:
    """Return the columns as float64 [rows, columns], their names, and notes for the start of a run.

    PyArrow reads what it reads without an error; whatever it refuses, Python's own reader reads or names.
    """
    table, reason = _read_by_arrow(path, time_column, columns)
    if table is not None:
        return *table, ()
    slow = os.path.getsize(access.on_disk(path)) >= _SLOW_FROM
    return *_read(path, time_column, columns), (
        f"{path} is read by Python's own reader of CSV, which takes some five times as long as PyArrow's: {reason}",
    ) * slow


def _read_by_arrow(path: str, time_column: str, columns: tuple[str, ...] | None) -> tuple[tuple[np.ndarray, list[str]] | None, str]:
    """Return what `_read` returns, or None and the reason: PyArrow is missing, or cannot read the file in the same way.

    Quotation marks below the header are left to the other reader, which is stricter with them. The numbers of both are the nearest ones of float64.
    """
    try:
        import pyarrow
        import pyarrow.csv
    except ImportError:
        return None, "pip install 'jaxmodels[parquet]' installs it"
    with open(access.on_disk(path), "rb") as file:
        check_kind(file.peek(4)[:4], path)
        first = file.readline(MAX_FIELD)
        start, most = file.tell(), 1
        while block := file.read(_BLOCK):
            if b'"' in block:
                return None, "there are quotation marks below the header"
            most += block.count(b"\n") + block.count(b"\r")
    try:
        text = first.decode("utf-8-sig")
        (header,) = csv.reader([text.rstrip("\r\n")], strict=True)
    except (UnicodeDecodeError, ValueError, csv.Error):
        return None, "its first line is no header"
    if is_blank(text) or "\r" in text.rstrip("\r\n"):
        return None, "its first line is no header"
    wanted = _choose(header, time_column, columns, path)
    names = [str(number) for number in range(len(header))]
    kept = [names[header.index(name)] for name in wanted]
    table, count = np.empty((most, len(wanted))), 0
    try:
        with pyarrow.OSFile(access.on_disk(path)) as file:
            file.seek(start)
            batches = pyarrow.csv.open_csv(
                file,
                pyarrow.csv.ReadOptions(column_names=names, block_size=_BLOCK),
                pyarrow.csv.ParseOptions(quote_char=False),
                pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(kept, pyarrow.float64()), include_columns=kept, null_values=[]),
            )
            for batch in batches:
                for place, column in enumerate(batch.columns):
                    table[count : count + len(batch), place] = column.to_numpy(zero_copy_only=False)
                count += len(batch)
    except (pyarrow.ArrowException, ValueError, IndexError) as error:
        return None, f"PyArrow says: {' '.join(str(error).split())[:200]}"
    finally:
        pyarrow.default_memory_pool().release_unused()
    return ((table[:count], wanted), "") if count and np.isfinite(table[:count]).all() else (None, "a value is not finite")


def _read(path: str, time_column: str, columns: tuple[str, ...] | None) -> tuple[np.ndarray, list[str]]:
    """Do what `read_numbers` does with Python's own reader, and name file and line of what is wrong."""
    values = array.array("d")  # a list of numbers would take four times the memory
    numbers = array.array("q")  # of the lines
    with open(access.on_disk(path), "rb") as binary:
        check_kind(binary.peek(4)[:4], path)
        file = io.TextIOWrapper(binary, encoding="utf-8-sig", errors="surrogateescape", newline="")
        records = ((line, fields) for line, fields in csv_records(file, path) if fields)
        header = next(records, (1, "the file is empty."))[1]
        if isinstance(header, str):
            raise ConfigError(f"{path}, line 1: {header}")
        wanted = _choose(header, time_column, columns, path)
        places = [header.index(name) for name in wanted]
        for line, row in records:
            if isinstance(row, str):
                raise ConfigError(f"{path}, line {line}: {row}")
            if len(row) != len(header):
                raise ConfigError(f"{path}, line {line}: {len(row)} columns, where the header has {len(header)}.")
            try:
                values.extend([float(row[place]) for place in places])
            except ValueError:
                name, value = next((name, row[place]) for name, place in zip(wanted, places, strict=True) if not is_number(row[place]))
                hint = "; fill the gaps first" if not value.strip() else "; leave the column out with data.columns, or correct it"
                raise ConfigError(f"{path}, line {line}: {name!r} is {value[:200]!r}, not a number{hint}.") from None
            numbers.append(line)
    table = np.frombuffer(values, np.float64).reshape(-1, len(wanted))
    bad = np.argwhere(~np.isfinite(table))
    if len(bad):
        row, column = bad[0]
        raise ConfigError(f"{path}, line {numbers[row]}: {wanted[column]!r} is {table[row, column]}, which is not finite; fill the gaps first.")
    return table, wanted


def _choose(header: list[str], time_column: str, columns: tuple[str, ...] | None, path: str) -> list[str]:
    """Return the names of the variables."""
    for name in header:
        if not is_utf8(name):
            raise ConfigError(f"{path}, line 1: {not_utf8(name)}")
    wanted = list(columns) if columns else [name for name in header if name != time_column]
    missing = [name for name in wanted if name not in header]
    if missing or not wanted:
        hint = config_lib.suggest(missing[0], header) if missing else ""
        raise ConfigError(f"config.data.columns: {path} has no column {', '.join(map(repr, missing))}; it has {', '.join(header)}.{hint}")
    twice = [name for name in dict.fromkeys(wanted) if header.count(name) > 1]
    if twice:
        raise ConfigError(f"{path}, line 1: {header.count(twice[0])} columns have the name {twice[0]!r}; rename them.")
    return wanted


def _scaled(values: np.ndarray, train: int, names: list[str], path: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return float32 values, standardised by the mean and deviation of the training rows, and these two, float64 [columns].

    Raises:
      ConfigError: a column is constant in these rows but for rounding, or a value is too large for float32 afterwards; the columns of other data are not
        those of training.
    """
    mean, deviation = values[:train].mean(0), values[:train].std(0)
    if fitted.get("deviation") is not None:
        if names != list(fitted.get("columns")):
            raise ConfigError(f"config.data.columns: {path} has {', '.join(names)}; the run was trained on {', '.join(fitted.get('columns'))}, in this order.")
        mean, deviation = np.array(fitted.get("mean")), np.array(fitted.get("deviation"))
    constant = [name for name, d, most in zip(names, deviation, np.abs(values[:train]).max(0), strict=True) if d <= _ROUNDING * most]
    if constant and fitted.get("deviation") is None:
        raise ConfigError(f"{path}: {', '.join(constant)} never changes in the training rows; leave it out with data.columns.")
    scaled = np.empty(values.shape, np.float32)
    with np.errstate(over="ignore"):
        for start in range(0, len(values), _ROWS):
            scaled[start : start + _ROWS] = (values[start : start + _ROWS] - mean) / deviation
    for column, name in enumerate(names):
        most = np.abs(scaled[:, column]).max()
        if not np.isfinite(most):
            raise ConfigError(f"{path}: {name!r} exceeds float32 when it is divided by its deviation in the training rows, {deviation[column]:.3g}.")
        if most > _FAR:
            guess(
                f"warning: {path}: {name!r} is up to {most:.3g} deviations from its mean in the training rows, where it hardly changes "
                f"(deviation {deviation[column]:.3g}); leave it out with data.columns if that is an error"
            )
    return scaled, mean, deviation
