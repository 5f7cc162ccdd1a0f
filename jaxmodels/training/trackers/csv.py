"""Metrics in `metrics.csv`, for spreadsheets and data frames."""

import csv
import os
from collections.abc import Mapping
from typing import Any

from jaxmodels.training.callback import Callback


class Csv(Callback):
    """Append metrics to `metrics.csv`, one value a row: step, split, name, value.

    One value a row, since splits have different metrics and a callback may add some later. At each start the file is written anew from
    `metrics.jsonl`, which has been rewound to the checkpoint by then, so the two always agree. Runs in the training loop, as `jsonl` does.
    """

    name = "csv"
    background = False
    on_error = "continue"

    def on_start(self, run: Any) -> None:
        path = run.folder.path / "metrics.csv"
        temporary = path.with_name("metrics.csv.tmp")
        with open(temporary, "w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerow(("step", "split", "name", "value"))
            for line in run.folder.metrics():
                _write(file, line.pop("step"), line.pop("split"), line)
        os.replace(temporary, path)

    def on_log(self, run: Any, step: int, values: Mapping[str, float]) -> None:
        self.on_evaluate(run, step, "train", values)

    def on_evaluate(self, run: Any, step: int, split: str, values: Mapping[str, float]) -> None:
        with open(run.folder.path / "metrics.csv", "a", encoding="utf-8", newline="") as file:
            _write(file, step, split, values)


def _write(file, step: int, split: str, values: Mapping[str, float]) -> None:
    csv.writer(file).writerows((step, split, name, value) for name, value in values.items())
