"""Tables of numbers over time, as windows of the past and the future, for forecasting."""

import array
import csv

import numpy as np

from jaxmodels import config as config_lib
from jaxmodels.data.source import Dataset, find_file, fingerprint
from jaxmodels.errors import ConfigError


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

    Every column is standardised by the mean and deviation of its training rows. The windows of validation and test
    forecast rows of those splits only; their past may reach into the split before.

    Args:
      path: absolute, or relative to the working directory or else to the data directory.
      data_dir: the data directory.
      lookback, horizon: rows of the past and of the future in an example.
      rows: numbers of rows that train, validate and test, from the first row on; the rest is not used.
      time_column: column that is not a variable.
      columns: the variables; all but `time_column` by default.

    Raises:
      ConfigError: no such file or column, a value that is not a number (file and line), or too few rows.
    """
    found = find_file(path, data_dir)
    if len(rows) != 3 or min(rows) < 1 or min(lookback, horizon) < 1:
        raise ConfigError(f"config.data: rows must be three numbers of rows, lookback and horizon at least 1; got {rows}, {lookback}, {horizon}.")
    values, names = _read(found, time_column, columns)
    train, validation, test = rows
    if sum(rows) > len(values):
        raise ConfigError(f"config.data.rows={rows} are more than the {len(values)} of {found}.")
    mean, deviation = values[:train].mean(0), values[:train].std(0)
    constant = [name for name, d in zip(names, deviation, strict=True) if d == 0]
    if constant:
        raise ConfigError(f"{found}: {', '.join(constant)} never changes in the training rows; leave it out with data.columns.")
    values = ((values - mean) / deviation).astype(np.float32)
    ends = np.cumsum(rows)
    parts = {"train": values[:train], "validation": values[train - lookback : ends[1]], "test": values[ends[1] - lookback : ends[2]]}
    splits = {name: Horizons(part, lookback, horizon) for name, part in parts.items()}
    if lookback > train or not all(len(split) for split in splits.values()):
        raise ConfigError(f"config.data: rows={rows} hold no window of lookback={lookback} and horizon={horizon}.")
    return Dataset(splits, {"lookback": lookback, "horizon": horizon, "variables": len(names), "columns": list(names)})


def _read(path: str, time_column: str, columns: tuple[str, ...] | None) -> tuple[np.ndarray, list[str]]:
    """Return the columns as float64 [rows, columns], and their names."""
    try:
        return _table(path, time_column, columns)
    except (csv.Error, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not a table of comma-separated values: {error}.") from error


def _table(path: str, time_column: str, columns: tuple[str, ...] | None) -> tuple[np.ndarray, list[str]]:
    with open(path, encoding="utf-8", newline="") as file:
        reader = csv.reader(file)
        header = next(reader, [])
        wanted = list(columns) if columns else [name for name in header if name != time_column]
        missing = [name for name in wanted if name not in header]
        if missing or not wanted:
            hint = config_lib.suggest(missing[0], header) if missing else ""
            raise ConfigError(f"config.data.columns: {path} has no column {', '.join(map(repr, missing))}; it has {', '.join(header)}.{hint}")
        places = [header.index(name) for name in wanted]
        values = array.array("d")  # a list of numbers would take four times the memory
        for row in reader:
            if len(row) != len(header):
                raise ConfigError(f"{path}, line {reader.line_num}: {len(row)} columns, where the header has {len(header)}.")
            try:
                values.extend([float(row[place]) for place in places])
            except ValueError:
                raise ConfigError(f"{path}, line {reader.line_num}: not a number in each of {', '.join(wanted)}: {str(row)[:200]}") from None
    table = np.array(values, np.float64).reshape(-1, len(wanted))
    bad = np.flatnonzero(~np.isfinite(table).all(1))
    if len(bad):
        raise ConfigError(f"{path}, line {bad[0] + 2}: a value is not finite; fill the gaps first.")
    return table, wanted
