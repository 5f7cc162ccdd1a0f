"""The report of `jaxmodels data` against figures counted by hand."""

import json

import numpy as np
import pytest
from PIL import Image

from jaxmodels.cli import main as cli
from jaxmodels.data import inspect
from jaxmodels.data.registry import open_dataset
from jaxmodels.data.source import Arrays, Dataset


def config(folder, **data):
    """Write a config file; its model and task are not used."""
    values = {
        "model": "cnn",
        "task": "classify",
        "data": {"batch_size": 2} | data,
        "optimizer": {"name": "sgd", "learning_rate": 0.1},
        "training": {"steps": 1},
    }
    (folder / "config.json").write_text(json.dumps(values))
    return f"--config={folder}/config.json"


def report(argument, capsys, *more):
    assert cli.run(["data", argument, "--json", *more]) == 0
    return json.loads(capsys.readouterr().out)


def test_labelled_text(tmp_path, capsys):
    (tmp_path / "train.tsv").write_text("a b c d\tyes\na b\tno\na [x]\tyes\n\tno\n")
    (tmp_path / "test.tsv").write_text("a z z z\tno\nb\tno\n")
    options = {"source": f"tsv:{tmp_path}", "sequence_length": 3, "tokenizer": "word:9", "holdout": 0.0, "on_bad_example": "skip"}
    found = report(config(tmp_path, **options), capsys, "--examples=2")
    train, test = found["splits"]["train"], found["splits"]["test"]
    assert list(found["splits"]) == ["train", "test"] and found["info"] == {"num_classes": 2, "labels": ["no", "yes"], "vocab_size": 9}
    assert (train["examples"], train["skipped"], train["labels"], train["bytes"]) == (3, 1, {"no": 1, "yes": 2}, 3 * (3 + 1) * 4)
    assert (test["examples"], test["skipped"], test["labels"]) == (2, 0, {"no": 2, "yes": 0})
    assert train["arrays"] == {"tokens": "int32 [3]", "label": "int32 []"}
    lengths = train["lengths"]["tokens"]
    assert (lengths["least"], lengths["most"], lengths["full"], lengths["room"]) == (2, 3, 1, 3)
    assert lengths["histogram"] == [[2, 2, 2], [3, 3, 1]] and lengths["mean"] == pytest.approx(7 / 3)
    assert train["unknown"] == 0 and test["unknown"] == 2 / 4  # two, in "a z z" and "b"
    assert found["examples"] == [{"tokens": "a b c", "label": "yes"}, {"tokens": "a b", "label": "no"}]
    assert len(found["notes"]) == 3 and "train.tsv, line 4" in found["notes"][0]
    assert cli.run(["data", config(tmp_path, **options)]) == 0
    shown = capsys.readouterr().out
    assert "yes 2 (66.7%)" in shown and "50.000% of the tokens are unknown" in shown and "'a [x]'" in shown


def test_tags_are_shown_with_their_words(tmp_path):
    (tmp_path / "train.conll").write_text("Ann\tB-PER\nLee\tI-PER\nsleeps\tO\n")
    dataset = open_dataset(f"conll:{tmp_path}", {"sequence_length": 20, "tokenizer": "byte", "holdout": 0.0}, None)
    assert inspect.readable(dataset, dataset.splits["train"][0])["tags"] == "Ann/B-PER Lee/I-PER sleeps/O"
    assert inspect.describe(dataset, "train", 9)["tags"] == {"B-PER": 1, "I-PER": 1, "O": 1}


def test_images_and_a_broken_one(tmp_path, capsys):
    images = np.random.default_rng(0).integers(0, 256, (9, 4, 5, 3), np.uint8)
    for i, image in enumerate(images):
        (tmp_path / f"class{i % 3}").mkdir(exist_ok=True)
        Image.fromarray(image).save(tmp_path / f"class{i % 3}" / f"{i}.png")
    options = {"source": f"images:{tmp_path}", "size": [4, 5], "holdout": 0.0}
    found = report(config(tmp_path, **options), capsys)["splits"]["train"]
    np.testing.assert_allclose(found["image"]["mean"], (images / 255).mean((0, 1, 2)), atol=1e-4)
    np.testing.assert_allclose(found["image"]["deviation"], (images / 255).std((0, 1, 2)), atol=1e-4)
    assert found["labels"] == {"class0": 3, "class1": 3, "class2": 3}
    few = report(config(tmp_path, **options), capsys, "--limit=3")["splits"]["train"]
    assert few["read"] == 3 and few["examples"] == 9 and set(few["labels"].values()) == {1}  # one of each class: evenly spaced examples, not the first ones
    (tmp_path / "class1" / "4.png").write_bytes(b"no image")
    assert cli.run(["data", config(tmp_path, **options)]) == 2
    assert "class1/4.png: cannot be decoded" in capsys.readouterr().err
    found = report(config(tmp_path, on_bad_example="skip", **options), capsys, "--examples=5")
    assert found["splits"]["train"]["skipped"] == 1 and found["splits"]["train"]["labels"]["class1"] == 2
    assert [("left out" in example) for example in found["examples"]] == [False, False, False, False, True]


def test_packed_rows_values_and_other_arrays(capsys):
    class Letters:
        decode = staticmethod(lambda tokens: "".join("ab"[t] for t in tokens))
        special = staticmethod(lambda name: None)

    arrays = {
        "tokens": np.array([[0, 1, 1, -1], [0, 0, -1, -1]]),
        "segments": np.array([[1, 1, 2, 0], [1, 1, 0, 0]]),
        "label": np.array([0.5, -1.5]),
        "past": np.array([[0.0, 1], [2, 3]]),
    }
    dataset = Dataset({"train": Arrays(arrays)}, {"tokenizer": Letters()})
    found = inspect.describe(dataset, "train", 9)
    assert found["segments"] == 1.5 and found["label"] == {"least": -1.5, "mean": -0.5, "deviation": 1.0, "most": 0.5}
    assert inspect.readable(dataset, dataset.splits["train"][0]) == {"tokens": "ab | b", "label": "0.5", "past": "float64 [2] from 0 to 1"}
