"""Parquet by row group, the same as pyarrow reads whole tables."""

import io
import json

import numpy as np
import pytest
import small_configs
from indexed_rows import TEXT, assert_same, examples
from PIL import Image

import jaxmodels
from jaxmodels import api
from jaxmodels.data import loader, order
from jaxmodels.data.registry import open_dataset
from jaxmodels.data.skipping import BadExample
from jaxmodels.errors import ConfigError, RunError

pytestmark = pytest.mark.usefixtures("index_cache")

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def table(count, start=0):
    numbers = range(start, start + count)
    words = [[f"w{j}" for j in range(i % 3 + 1)] for i in numbers]
    columns = {"text": [f"w{i % 7} number {i % 13}" for i in numbers], "label": [f"c{i % 3}" for i in numbers], "words": words}
    return pa.table(columns | {"tags": [["O"] * len(part) for part in words], "unread": list(numbers)})


def write(folder, **counts):
    start = 0
    for name, count in counts.items():
        pq.write_table(table(count, start), folder / f"{name}.parquet", row_group_size=8)
        start += count


def as_jsonl(folder, pattern):
    """Write the same rows as JSON lines, by pyarrow's reader of whole tables."""
    rows = [row for path in sorted(folder.glob(pattern)) for row in pq.read_table(path).to_pylist()]
    (folder / "same.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"jsonl:{folder}/same.jsonl"


@pytest.mark.parametrize("more", ({}, {"words_column": "words", "tags_column": "tags"}))
def test_rows_are_those_of_whole_tables(more, tmp_path):
    write(tmp_path, a=50, b=3, c=40)
    whole = open_dataset(as_jsonl(tmp_path, "*.parquet"), TEXT | more, None)
    for source in (f"parquet:{tmp_path}", f"parquet:{tmp_path}/*.parquet", "parquet:*.parquet"):
        dataset = open_dataset(source, TEXT | more, str(tmp_path))
        assert_same(dataset.splits, whole.splits)
        assert {k: v for k, v in dataset.info.items() if k != "tokenizer"} == {k: v for k, v in whole.info.items() if k != "tokenizer"}
    rows = dataset.splits["train"].rows
    assert rows[52].where == f"{tmp_path}/b.parquet, row 2" and rows[61].where == f"{tmp_path}/c.parquet, row 8"
    assert set(rows[0].values) == ({"words", "tags"} if more else {"text", "label"})


def test_remote_files(tmp_path):
    fsspec = pytest.importorskip("fsspec")
    write(tmp_path, **{"train-0": 20, "train-1": 20, "validation": 9})
    memory = fsspec.filesystem("memory")
    for path in tmp_path.glob("*.parquet"):
        memory.pipe(f"/parquet-test/{path.name}", path.read_bytes())
    local = open_dataset(f"parquet:{tmp_path}", TEXT, None)
    assert_same(open_dataset("parquet:memory://parquet-test", TEXT, "elsewhere").splits, local.splits)
    named = TEXT | {"validation": "memory://parquet-test/validation.parquet"}
    assert_same(open_dataset("parquet:memory://parquet-test/train-*.parquet", named, None).splits, local.splits)
    memory.pipe("/parquet-test/rows.jsonl", b"".join(json.dumps(row).encode() + b"\n" for row in table(5).to_pylist()))
    assert len(examples(open_dataset("jsonl:memory://parquet-test/rows.jsonl", TEXT | {"holdout": 0.0}, None), "train")["tokens"]) == 5
    with pytest.raises(ConfigError, match="there is no file or folder memory://parquet-test/none.parquet"):
        open_dataset("parquet:memory://parquet-test/none.parquet", TEXT, None)
    with pytest.raises(ConfigError, match="nosuch://"):
        open_dataset("parquet:nosuch://x/y.parquet", TEXT, None)


def test_images_and_class_names_of_huggingface(tmp_path):
    datasets = pytest.importorskip("datasets")

    def png(grey):
        file = io.BytesIO()
        Image.new("L", (4, 4), grey).save(file, "png")
        return {"bytes": file.getvalue(), "path": None}

    features = datasets.Features({"picture": datasets.Image(), "label": datasets.ClassLabel(names=["dark", "bright"])})
    data = datasets.Dataset.from_dict({"picture": [png(10), png(200), png(20)], "label": [0, 1, 0]}, features=features)
    data.to_parquet(tmp_path / "train.parquet")
    dataset = open_dataset(f"parquet:{tmp_path}", {"image_column": "picture", "size": 4, "channels": 1, "holdout": 0.0}, None)
    read = examples(dataset, "train")
    assert dataset.info["labels"] == ["dark", "bright"] and read["label"].tolist() == [0, 1, 0]
    assert read["image"][:, 0, 0, 0].tolist() == [10, 200, 20]


def test_wrong_files_and_columns_are_named(tmp_path):
    write(tmp_path, a=20)
    (tmp_path / "broken.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-20])
    pq.write_table(pa.table({"text": [1, 2], "label": ["c0", "c1"]}), tmp_path / "b.parquet")
    pq.write_table(pa.table({"text": ["x"]}), tmp_path / "c.parquet")
    for source, keys, message in (
        ("broken", {}, "broken.parquet: not a whole Parquet file: .*Copy it again"),
        ("[ab]", {}, "text_column: the column 'text' is string in .*a.parquet and is int64 in .*b.parquet"),
        ("[ac]", {}, "label_column: the column 'label' is string in .*a.parquet and is missing in .*c.parquet"),
        ("a", {"text_column": "txet"}, "text_column: .*a.parquet has no column 'txet'. Did you mean 'text'"),
    ):
        with pytest.raises(ConfigError, match=message):
            open_dataset(f"parquet:{tmp_path}/{source}.parquet", TEXT | keys, None)


def test_a_damaged_row_group_is_named_or_weighs_nothing(tmp_path):
    pq.write_table(table(24), tmp_path / "x.parquet", row_group_size=8, compression="gzip")
    footer = pq.read_metadata(tmp_path / "x.parquet")
    content = bytearray((tmp_path / "x.parquet").read_bytes())
    column = footer.row_group(1).column(0)
    start = column.dictionary_page_offset or column.data_page_offset
    content[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    (tmp_path / "x.parquet").write_bytes(content)
    options = TEXT | {"holdout": 0.0, "tokenizer": "byte", "labels": ("c0", "c1", "c2")}
    with pytest.raises(BadExample, match="x.parquet, row 8: row group 1 cannot be decoded"):
        examples(open_dataset(f"parquet:{tmp_path}/x.parquet", options, None), "train")
    skipped = examples(open_dataset(f"parquet:{tmp_path}/x.parquet", options | {"on_bad_example": "skip"}, None), "train")["skipped"]
    assert skipped.tolist() == [0] * 8 + [1] * 8 + [0] * 8


def test_a_window_decodes_each_row_group_once(tmp_path, monkeypatch):
    write(tmp_path, a=80, b=80)
    train = open_dataset(f"parquet:{tmp_path}", TEXT | {"group_cache_mb": 0.0006, "holdout": 0.25}, None).splits["train"]
    assert 3 <= train.groups().fit < 20
    order.check_window(train, 3, "x")
    decoded = []
    decode = type(train.rows)._decode
    monkeypatch.setattr(type(train.rows), "_decode", lambda self, group: decoded.append(group) or decode(self, group))
    batches = loader.TrainingBatches(train, 10, 12, seed=1, shuffle=True, window=3)
    seen = [batches[step]["tokens"] for step in range(12)]
    assert sorted(decoded) == list(range(20))
    np.testing.assert_array_equal(loader.TrainingBatches(train, 10, 12, seed=1, shuffle=True, window=3)[9]["tokens"], seen[9])


def test_a_saved_data_set_of_huggingface_may_stay_on_disk(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])})
    datasets.Dataset.from_dict({"text": [f"w{i % 5} film" for i in range(40)], "label": [i % 2 for i in range(40)]}, features).save_to_disk(tmp_path / "a")
    whole, dataset = (open_dataset(f"hf:{tmp_path}/a", TEXT | {"indexed": indexed}, None) for indexed in (False, True))
    assert_same(dataset.splits, whole.splits)
    assert dataset.info["labels"] == ["neg", "pos"] and "index written" in dataset.notes[0]


class Crash(jaxmodels.Callback):
    """Ends a run with an error."""

    def on_step(self, run, step, metrics):
        if step == 7:
            raise ValueError("crash")


@pytest.mark.slow
def test_a_run_resumes_exactly(tmp_path, monkeypatch):
    """The lines of metrics are those of an uninterrupted run, also with other memory, other threads and a cache that was deleted."""

    def png(i):
        file = io.BytesIO()
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (8, 8), np.uint8)).save(file, "png")
        return file.getvalue()

    pq.write_table(pa.table({"picture": [png(i) for i in range(200)], "label": [i % 2 for i in range(200)]}), tmp_path / "x.parquet", row_group_size=20)
    data = {"source": f"parquet:{tmp_path}/x.parquet", "image_column": "picture", "size": 8, "channels": 1, "shuffle_window": 3, "batch_size": 32}
    config = small_configs.config(small_configs.CNN, data=data, training__steps=16, checkpoint__every=2, evaluation__every=8, log__every=2)

    def lines(folder):
        read = map(json.loads, (tmp_path / folder / "metrics.jsonl").read_text().splitlines())
        return [(line["step"], line["split"], line["loss"]) for line in read]

    api.train(config, str(tmp_path / "whole"), quiet=True)
    with pytest.raises(RunError, match="crash"):
        api.train(config, str(tmp_path / "part"), quiet=True, callbacks=[Crash()])
    monkeypatch.setenv("JAXMODELS_CACHE_DIR", str(tmp_path / "new cache"))
    config["data"] |= {"memory_gb": 0.0, "group_cache_mb": 1.0, "threads": 3}
    api.train(config, str(tmp_path / "part"), quiet=True)
    assert lines("part") == lines("whole") and len(lines("whole")) > 8
