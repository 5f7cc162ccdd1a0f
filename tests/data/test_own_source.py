"""The source in docs/data.md that composes features, run as printed there."""

import re
import sqlite3

import numpy as np
from conftest import ROOT

from jaxmodels.data.registry import open_dataset


def test_the_sqlite_source_of_the_documentation(tmp_path, monkeypatch):
    (code,) = [block for block in re.findall(r"(?s)```python\n(.*?)```", (ROOT / "docs" / "data.md").read_text()) if "sqlite3" in block]
    (tmp_path / "own_sqlite.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    with sqlite3.connect(tmp_path / "films.db") as database:
        database.execute("create table films (text, label)")
        database.executemany("insert into films values (?, ?)", [("good film", "yes"), ("bad", "no")])
    options = {"file": str(tmp_path / "films.db"), "table": "films", "sequence_length": 3, "tokenizer": "word:9", "holdout": 0.0}
    dataset = open_dataset("own_sqlite:sqlite", options, None)
    arrays = dataset.splits["train"].arrays
    assert [dataset.info["tokenizer"].decode(row) for row in arrays["tokens"]] == ["good film", "bad"]
    np.testing.assert_array_equal(arrays["label"], [1, 0])
