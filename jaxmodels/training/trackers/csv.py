"""Metrics in `metrics.csv`, for spreadsheets and data frames."""

import csv
import io
import time
from collections.abc import Iterable, Mapping
from typing import Any

from jaxmodels.runs.json_files import append_text, replace
from jaxmodels.storage.paths import is_bucket
from jaxmodels.training.callback import Callback
from jaxmodels.training.trackers.jsonl import BUCKET_SECONDS


class Csv(Callback):
    """Append metrics to `metrics.csv`, one value a row: step, split, name, value.

    One value a row, since splits have different metrics and a callback may add some later. At each start the file is written anew from
    `metrics.jsonl`, which has been rewound to the checkpoint by then, so the two always agree. Runs in the training loop, as `jsonl` does.
    """

    name = "csv"
    background = False
    on_error = "continue"

    def __init__(self):
        self._waiting, self._next = "", 0.0  # rows for a bucket, which are written together with the lines of metrics.jsonl

    def on_start(self, run: Any) -> None:
        text = _rows([("step", "split", "name", "value")])
        for line in run.folder.metrics():
            step, split = line.pop("step"), line.pop("split")
            text += _rows((step, split, name, value) for name, value in line.items())
        replace(run.folder.path / "metrics.csv", text)

    def on_log(self, run: Any, step: int, values: Mapping[str, float]) -> None:
        self.on_evaluate(run, step, "train", values)

    def on_evaluate(self, run: Any, step: int, split: str, values: Mapping[str, float]) -> None:
        self._waiting += _rows((step, split, name, value) for name, value in values.items())
        if not is_bucket(run.folder.path) or split != "train" or time.monotonic() >= self._next:
            self.on_save(run, step)

    def on_save(self, run: Any, step: int) -> None:
        if self._waiting:
            append_text(run.folder.path / "metrics.csv", self._waiting)
        self._waiting, self._next = "", time.monotonic() + BUCKET_SECONDS

    def on_end(self, run: Any, result: Any) -> None:
        self.on_save(run, run.step)


def _rows(rows: Iterable[tuple]) -> str:
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    return text.getvalue()
