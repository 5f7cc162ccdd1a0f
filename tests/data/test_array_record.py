"""ArrayRecord files, whose records are those that were written."""

import io
import json
import pickle

import numpy as np
import pytest
from array_records import example, write
from indexed_rows import TEXT, assert_same, examples, records
from PIL import Image

from jaxmodels.data.registry import open_dataset
from jaxmodels.data.skipping import BadExample
from jaxmodels.errors import ConfigError

pytestmark = pytest.mark.usefixtures("index_cache")

pytest.importorskip("array_record.python.array_record_module")


def test_records_are_those_of_json_lines(tmp_path):
    msgpack = pytest.importorskip("msgpack")
    rows = records(60)
    (tmp_path / "same.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    whole = open_dataset(f"jsonl:{tmp_path}/same.jsonl", TEXT, None)
    forms = {
        "json": lambda row: json.dumps(row).encode(),
        "msgpack": msgpack.packb,
        "tf_example": lambda row: example(text=row["text"].encode(), label=row["label"].encode(), id=row["id"]),
    }
    for name, encode in forms.items():
        folder = tmp_path / name
        folder.mkdir()
        write(folder / "a.array_record", map(encode, rows[:25]))
        write(folder / "b.array_record", map(encode, rows[25:]))
        dataset = open_dataset(f"array_record:{folder}", TEXT, None)
        assert_same(dataset.splits, whole.splits)
        assert f"records are {name}" in dataset.notes[-1]
        assert dataset.splits["train"].rows[30].where == f"{folder}/b.array_record, record 5"
        assert len(pickle.loads(pickle.dumps(dataset.splits["train"]))) == 54


def test_images_words_and_numbers_of_examples(tmp_path):
    file = io.BytesIO()
    Image.new("L", (4, 4), 77).save(file, "png")
    row = example(picture=file.getvalue(), score=0.5, words=[b"a", b"b"], tags=[b"O", b"O"], label=300)
    write(tmp_path / "x.array_record", [row])
    source = f"array_record:{tmp_path}/x.array_record"
    read = examples(
        open_dataset(source, {"image_column": "picture", "size": 4, "channels": 1, "label": "value", "label_column": "score", "holdout": 0.0}, None), "train"
    )
    assert read["image"][0, 0, 0, 0] == 77 and read["label"].tolist() == [0.5]
    assert open_dataset(source, {"image_column": "picture", "size": 4, "holdout": 0.0}, None).info["labels"] == ["300"]
    tagged = {"words_column": "words", "tags_column": "tags", "sequence_length": 4, "tokenizer": "word:9", "holdout": 0.0}
    assert examples(open_dataset(source, tagged, None), "train")["tags"].tolist() == [[0, 0, -1, -1]]


def test_wrong_files_and_records_are_named(tmp_path):
    write(tmp_path / "x.array_record", [json.dumps(row).encode() for row in records(30)] + [b"no json"])
    write(tmp_path / "odd.array_record", [b"\xff\xff"])
    (tmp_path / "cut.array_record").write_bytes((tmp_path / "x.array_record").read_bytes()[:-100])
    for name, keys, message in (
        ("cut", {}, "cut.array_record: not a whole ArrayRecord file"),
        ("odd", {}, "record: the records of .*odd.array_record begin with"),
        ("x", {"text_column": "txt"}, "text_column: the first record of .*x.array_record has no 'txt'. Did you mean 'text'"),
    ):
        with pytest.raises(ConfigError, match=message):
            open_dataset(f"array_record:{tmp_path}/{name}.array_record", TEXT | keys, None)
    odd = open_dataset(f"array_record:{tmp_path}/x.array_record", TEXT | {"holdout": 0.0, "tokenizer": "byte"}, None)
    with pytest.raises(BadExample, match="x.array_record, record 30: not json"):
        odd.splits["train"][30]


def test_a_damaged_record_is_named_or_weighs_nothing(tmp_path):
    write(tmp_path / "x.array_record", [json.dumps(row).encode() for row in records(20)])
    content = bytearray((tmp_path / "x.array_record").read_bytes())
    content[200:203] = b"\xff\xff\xff"
    (tmp_path / "x.array_record").write_bytes(content)
    options = TEXT | {"holdout": 0.0, "tokenizer": "byte", "labels": ("odd", "even")}
    with pytest.raises(BadExample, match="x.array_record, record 1: cannot be read: .*hash mismatch"):
        examples(open_dataset(f"array_record:{tmp_path}/x.array_record", options, None), "train")
    skipped = examples(open_dataset(f"array_record:{tmp_path}/x.array_record", options | {"on_bad_example": "skip"}, None), "train")["skipped"]
    assert np.flatnonzero(skipped).tolist() == [1]
