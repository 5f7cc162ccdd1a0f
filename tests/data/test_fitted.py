"""Other data that a run is evaluated on is read with what was derived from its training data, for every kind of source."""

import json

import numpy as np
import pytest
from PIL import Image

from jaxmodels.data.registry import open_dataset
from jaxmodels.data.source import get_batch
from jaxmodels.errors import ConfigError
from jaxmodels.tokenizers import factory

TEXT = {"sequence_length": 6, "tokenizer": "word:100"}


def stored(dataset):
    """Return the `info` of a data set as a run's folder keeps it: JSON, and the tokenizer's file."""
    info = json.loads(json.dumps({key: value for key, value in dataset.info.items() if key != "tokenizer"}))
    tokenizer = dataset.info.get("tokenizer")
    return info if tokenizer is None else info | {"tokenizer": factory.from_json(tokenizer.to_json())}


def other(source, options, training, split="train"):
    """Return a split of other data, all of it, and its `info`."""
    dataset = open_dataset(source, options, None, trained=stored(training))
    return get_batch(dataset.splits[split], np.arange(len(dataset.splits[split]))), dataset.info


def as_json(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize("form", ["in memory", "indexed", "parquet"])
@pytest.mark.parametrize("label", ["class", "classes"])
def test_rows_have_the_words_and_classes_of_training(tmp_path, index_cache, form, label):
    def write(name, texts, labels):
        rows = [{"text": text, "label": name} for text, name in zip(texts, labels, strict=True)]
        if form == "parquet":
            arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
            parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / f"{name}.parquet")
            return f"parquet:{tmp_path}/{name}.parquet"
        (tmp_path / f"{name}.jsonl").write_text(as_json(rows))
        return f"jsonl:{tmp_path}/{name}.jsonl"

    options = TEXT | {"holdout": 0.0, "label": label} | ({} if form == "parquet" else {"indexed": form == "indexed"})
    training = open_dataset(write("a", ["b a", "c a", "d a", "b c"], ["x", "y", "z", "y"]), options, None)
    batch, info = other(write("b", ["d b e", "e e e e d"], ["z", "y"]), options, training)
    coder = training.info["tokenizer"]
    assert info["labels"] == ["x", "y", "z"] and info["tokenizer"].to_json() == coder.to_json()
    assert [row[row >= 0].tolist() for row in batch["tokens"]] == [coder.encode(text).tolist() for text in ("d b e", "e e e e d")]
    assert batch["label"].tolist() == ([2, 1] if label == "class" else [[0, 0, 1], [0, 1, 0]])
    with pytest.raises(ConfigError, match="the (label|class) 'w' is none of x, y, z"):
        other(write("c", ["b"], ["w"]), options, training)


def test_numbers_of_classes_that_a_saved_data_set_names_otherwise(tmp_path):
    datasets = pytest.importorskip("datasets")
    for name, names in {"a": ["no", "yes", "unsure"], "b": ["yes", "no"]}.items():
        features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)})
        rows = {"text": ["b a", "c"], "label": [0, 1]}
        datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / name))
    options = TEXT | {"holdout": 0.0}
    batch, info = other(f"hf:{tmp_path}/b", options, open_dataset(f"hf:{tmp_path}/a", options, None))
    assert batch["label"].tolist() == [1, 0] and info["labels"] == ["no", "yes", "unsure"]


def test_tags_and_pairs(tmp_path):
    (tmp_path / "a.conll").write_text("Ann\tB-PER\nLee\tI-PER\n\nParis\tB-LOC\nis\tO\n")
    (tmp_path / "b.conll").write_text("is\tO\nParis\tB-PER\n")
    options = TEXT | {"holdout": 0.0}
    training = open_dataset(f"conll:{tmp_path}/a.conll", options, None)
    batch, info = other(f"conll:{tmp_path}/b.conll", options, training)
    names = training.info["tags"]
    assert info["tags"] == names and [names[tag] for tag in batch["tags"][0] if tag >= 0] == ["O", "B-PER"]
    assert batch["tokens"][0][:2].tolist() == [training.info["tokenizer"].encode(word)[0] for word in ("is", "Paris")]
    (tmp_path / "a.jsonl").write_text(as_json([{"s": "a b", "t": "c"}, {"s": "d", "t": "a"}]))
    (tmp_path / "b.jsonl").write_text(as_json([{"s": "d e", "t": "c b"}]))
    options = options | {"source_column": "s", "target_column": "t"}
    training = open_dataset(f"jsonl:{tmp_path}/a.jsonl", options, None)
    batch, info = other(f"jsonl:{tmp_path}/b.jsonl", options, training)
    assert batch["source"][0][:2].tolist() == training.info["tokenizer"].encode("d e").tolist() and info["vocab_size"] == training.info["vocab_size"]


def test_images_and_boxes(tmp_path, index_cache):
    for name, classes in {"a": "xyz", "b": "zy"}.items():
        for each in classes:
            (tmp_path / name / each).mkdir(parents=True)
            Image.fromarray(np.full((4, 4, 3), ord(each), np.uint8)).save(tmp_path / name / each / "1.png")
    options = {"size": (4, 4), "holdout": 0.0}
    training = open_dataset(f"images:{tmp_path}/a", options, None)
    batch, info = other(f"images:{tmp_path}/b", options, training)
    assert sorted(zip(batch["label"].tolist(), batch["image"][:, 0, 0, 0].tolist(), strict=True)) == [(1, ord("y")), (2, ord("z"))]
    assert info["labels"] == ["x", "y", "z"] and info["num_classes"] == 3
    (tmp_path / "b" / "w").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "b" / "w" / "1.png")
    with pytest.raises(ConfigError, match="the class 'w' is in train, but not in the training data"):
        other(f"images:{tmp_path}/b", options, training)
    for name, labels in {"a": ["car", "dog", "cat"], "b": ["dog"]}.items():
        boxes = [[0.1 * i, 0.1, 0.5, 0.5] for i in range(len(labels))]
        (tmp_path / f"{name}.jsonl").write_text(as_json([{"boxes": boxes, "names": labels}]))
    options = {"boxes_column": "boxes", "box_labels_column": "names", "max_boxes": 3, "holdout": 0.0}
    training = open_dataset(f"jsonl:{tmp_path}/a.jsonl", options, None)
    batch, info = other(f"jsonl:{tmp_path}/b.jsonl", options, training)
    assert batch["box_labels"][0].tolist() == [2, -1, -1] and info["box_labels"] == ["car", "cat", "dog"]


@pytest.mark.parametrize("tokenizer", ["character", "word:20", "bpe:300"])
def test_all_of_a_text_is_read_with_the_vocabulary_of_training(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("some words and some more words\n" * 30)
    (tmp_path / "b.txt").write_text("more words\n" * 5 + "and some")
    options = {"sequence_length": 8, "tokenizer": tokenizer, "stride": 3, "holdout": 0.0}
    training = open_dataset(f"text:{tmp_path}/a.txt", options, None)
    batch, info = other(f"text:{tmp_path}/b.txt", options, training)
    assert info["tokenizer"].to_json() == training.info["tokenizer"].to_json()
    tokens = training.info["tokenizer"].encode((tmp_path / "b.txt").read_text())
    end = training.info["tokenizer"].special("end")
    tokens = tokens if end is None else np.append(tokens, end)
    assert batch["tokens"][:, 1:][batch["tokens"][:, 1:] >= 0].tolist() == tokens[1:].tolist()  # each token but the first is a target once


def test_the_cached_tokens_of_training_are_read_again(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXMODELS_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr("jaxmodels.data.sources.text.CACHE_FROM", 1)
    (tmp_path / "a.txt").write_text("some words and some more words\n" * 30)
    options = {"sequence_length": 8, "tokenizer": "word:20"}
    training = open_dataset(f"text:{tmp_path}/a.txt", options, None)
    again = open_dataset(f"text:{tmp_path}/a.txt", options, None, trained=stored(training))
    assert any("tokens read from" in note for note in again.notes)
    assert len(list((tmp_path / "cache" / "tokens").iterdir())) == 1
    (tmp_path / "a.txt").write_text("more words and yet another\n" * 30)  # another vocabulary would be trained on it
    changed = open_dataset(f"text:{tmp_path}/a.txt", options, None, trained=stored(training))
    assert changed.info["tokenizer"].to_json() == training.info["tokenizer"].to_json()


def test_a_mixture(tmp_path):
    (tmp_path / "a.txt").write_text("some words and some more words\n" * 30)
    (tmp_path / "b.txt").write_text("other words\n" * 30)

    def sources(*names):
        return {"tokenizer": "word:20", "sources": {name: {"source": f"text:{tmp_path}/{name}.txt", "sequence_length": 8} for name in names}}

    training = open_dataset("mixture", sources("a"), None)
    _, info = other("mixture", sources("a", "b"), training, "validation")
    assert info["tokenizer"].to_json() == training.info["tokenizer"].to_json()
