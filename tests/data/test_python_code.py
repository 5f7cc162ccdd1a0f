"""Text and labelled passages from Python's own library: divided by file, the same every time."""

import re
import sysconfig

import numpy as np
import pytest

from jaxmodels.data.registry import open_dataset
from jaxmodels.data.source import get_batch
from jaxmodels.data.sources import python_code
from jaxmodels.errors import ConfigError

SIZES = {"a": 900, "b": 800, "c": 700, "d": 600, "e": 1}
FILES = {f"{package}/{name}.py": f"{package} {name}\n" * size for package in ("json", "xml") for name, size in SIZES.items()}
FILES |= {"http/a.py": "x\n" * 3000, "http/b.py": "x\n" * 3000, "shutil.py": "y\n" * 3000}


def passages(**options):
    return open_dataset("python_packages", {"sequence_length": 64, "tokenizer": "byte"} | options, None)


def test_files_go_to_splits_whole_and_from_the_largest_on():
    places = python_code.divide(FILES)
    for package in ("json", "xml"):
        assert [places[f"{package}/{name}.py"] for name in "abcd"] == ["train", "test", "validation", "train"]
        assert f"{package}/e.py" not in places, "too small"
    assert not any(path.startswith(("http/", "shutil")) for path in places), "two files are too few for three splits"


def test_training_text_excludes_the_files_of_validation_and_test_passages(monkeypatch):
    files = {path: f"{path}\n" * 500 for path in FILES}
    monkeypatch.setattr(python_code, "_library", lambda: files)
    monkeypatch.setattr(python_code, "_topics", lambda: "topics\n" * 10)
    dataset = open_dataset("python_code", {"sequence_length": 40, "tokenizer": "byte"}, None)
    places = python_code.divide(files)
    text = {split: dataset.info["tokenizer"].decode(get_batch(part, np.arange(len(part)))["tokens"].ravel()) for split, part in dataset.splits.items()}
    assert {"train", "test", "validation"} == set(places.values())
    for path in FILES:
        split = places.get(path, "train")
        assert (path in text["train"]) == (split == "train"), path
        assert (path in text["validation"]) == (split == "validation"), path
    assert "topics" in text["train"]


def test_the_library_of_this_python():
    files = python_code._library()
    assert "json/decoder.py" in files and not any(re.search(r"(^|/)(tests?|site-packages|idle_test)/", path) for path in files)
    places = python_code.divide(files)
    for name in python_code.PACKAGES:
        assert {place for path, place in places.items() if path.startswith(f"{name}/")} == {"train", "validation", "test"}, name


def test_passages_are_balanced_few_and_nested_and_do_not_name_their_package():
    few, more, again = passages(examples=4), passages(examples=8), passages(examples=4)
    assert few.info["num_classes"] == len(python_code.PACKAGES) == 12 and few.info["labels"] == list(python_code.PACKAGES)
    batches = [get_batch(dataset.splits["train"], np.arange(len(dataset.splits["train"]))) for dataset in (few, more, again)]
    np.testing.assert_array_equal(np.bincount(batches[0]["label"]), 4)
    np.testing.assert_array_equal(np.bincount(batches[1]["label"]), 8)
    np.testing.assert_array_equal(batches[0]["tokens"], batches[2]["tokens"])
    assert {tuple(row) for row in batches[0]["tokens"]} <= {tuple(row) for row in batches[1]["tokens"]}
    whole = passages(sequence_length=2000, test_examples=20)
    decode = whole.info["tokenizer"].decode
    for part in whole.splits.values():
        texts = [decode(row) for row in get_batch(part, np.arange(len(part)))["tokens"]]
        assert not any(re.search(r"\b(asyncio|json|http|xml)\b", text) for text in texts)
        assert all(text.count("\n") == 9 for text in texts)
    assert any("Python 3." in note for note in whole.notes)


def test_passages_come_from_the_files_of_their_split():
    files = python_code._library()
    places = python_code.divide(files)
    dataset = passages(sequence_length=2000, test_examples=5, examples=5)
    hidden = {}
    for path, split in places.items():
        text = python_code._OWN_NAME.sub("package", files[path])
        hidden.setdefault((split, path.split("/")[0]), set()).update(line.rstrip() for line in text.split("\n"))
    for split, part in dataset.splits.items():
        batch = get_batch(part, np.arange(len(part)))
        for row, label in zip(batch["tokens"], batch["label"], strict=True):
            lines = dataset.info["tokenizer"].decode(row).split("\n")
            assert set(lines) <= hidden[split, python_code.PACKAGES[label]]


def test_a_library_without_source_is_an_error_and_a_missing_package_a_warning(monkeypatch, tmp_path):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(ConfigError, match="without the source"):
        passages()
    for path, content in FILES.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(content)
    dataset = passages()
    assert dataset.info["labels"] == ["json", "xml"] and "asyncio" in dataset.fallbacks[0] and "http" in dataset.fallbacks[0]
    with pytest.raises(ConfigError, match="at least 1"):
        passages(lines=0)
