"""Further sets to validate and to test on, of each kind of source: they are read as the main sets are."""

import json

import numpy as np
import pytest
import small_configs
from PIL import Image

from jaxmodels.data.registry import open_dataset
from jaxmodels.data.source import Arrays, Dataset, get_batch
from jaxmodels.errors import ConfigError
from jaxmodels.experiment.build import build_experiment
from jaxmodels.experiment.sections import resolve

ROWS = {"sequence_length": 6, "tokenizer": "word:100"}
TRAIN = "good film\t1\nbad film\t0\nfine\t1\nawful\t0\nso so\t1\n"
FURTHER = "fine film\t1\ngood\t0\nbad\t1\n"


def equal(one, other):
    """Whether two splits have the same examples."""
    one, other = (get_batch(part, np.arange(len(part))) for part in (one, other))
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def opened(source, options, folder, **sets):
    return open_dataset(source, options, str(folder), sets={key.replace("__", "/"): value for key, value in sets.items()})


@pytest.mark.parametrize("indexed", [False, True])
def test_rows_are_encoded_as_those_of_the_main_set(tmp_path, index_cache, indexed):
    (tmp_path / "train.tsv").write_text(TRAIN)
    (tmp_path / "dev.tsv").write_text(FURTHER)
    (tmp_path / "other.tsv").write_text("good fine\t0\n")
    options = ROWS | {"indexed": indexed}
    alone = opened(f"tsv:{tmp_path}/train.tsv", options | {"validation": f"{tmp_path}/dev.tsv"}, tmp_path)
    dataset = opened(f"tsv:{tmp_path}/train.tsv", options, tmp_path, validation__a="dev.tsv", validation__b="other.tsv", test__c="other.tsv")
    assert set(dataset.splits) == {
        "train",
        "validation",
        "validation/a",
        "validation/b",
        "test/c",
    }
    assert len(dataset.splits["train"]) == 4 and len(dataset.splits["validation"]) == 1  # the held-out rows are what they are without further sets
    held_out = opened(f"tsv:{tmp_path}/train.tsv", options, tmp_path)
    assert equal(dataset.splits["train"], held_out.splits["train"])
    whole = opened(f"tsv:{tmp_path}/train.tsv", options | {"holdout": 0.0}, tmp_path, validation__a="dev.tsv")
    assert equal(whole.splits["validation/a"], alone.splits["validation"]) and whole.info["labels"] == ["0", "1"]
    assert whole.info["tokenizer"].to_json() == alone.info["tokenizer"].to_json()


def test_errors_and_guesses_name_the_set(tmp_path):
    (tmp_path / "train.tsv").write_text(TRAIN)
    (tmp_path / "dev.tsv").write_text("good film\t1\nbad\t2\n")
    (tmp_path / "hidden.tsv").write_text("good film\t-1\nbad\t-1\n")
    (tmp_path / "empty.tsv").write_text("")
    source = f"tsv:{tmp_path}/train.tsv"
    with pytest.raises(ConfigError, match=r"dev.tsv, line 2: the label '2' is none of 0, 1"):
        opened(source, ROWS, tmp_path, validation__a="dev.tsv")
    with pytest.raises(ConfigError, match="empty.tsv, line 1: the file is empty"):
        opened(source, ROWS, tmp_path, validation__a="empty.tsv")
    with pytest.raises(ConfigError, match=r"config.data.test_sets.a: there is no file .*nothing.tsv"):
        opened(source, ROWS, tmp_path, test__a="nothing.tsv")
    dataset = opened(source, ROWS | {"on_bad_example": "skip"}, tmp_path, validation__a="dev.tsv", validation__b="hidden.tsv")
    assert "validation/b" not in dataset.splits and "validation/b is left out: no row of it has a label in 1" in dataset.guesses
    assert dataset.skipped == {"validation/a": 1}
    assert "1 of 1 examples of validation/a have inputs that an example of train has, too" in dataset.guesses


def test_texts_have_the_vocabulary_of_the_training_text(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXMODELS_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr("jaxmodels.data.sources.text.CACHE_QUICK_FROM", 1)
    for name, text in {"a": "abc abd\n" * 40, "b": "cab bad\n" * 20, "c": "xyz\n" * 20}.items():
        (tmp_path / f"{name}.txt").write_text(text)
    options = {"sequence_length": 8}
    without = opened(f"text:{tmp_path}/a.txt", options, tmp_path)
    dataset = opened(f"text:{tmp_path}/a.txt", options, tmp_path, validation__b="b.txt", test__b="b.txt")
    assert set(dataset.splits) == {"train", "validation", "validation/b", "test/b"}
    assert dataset.info["tokenizer"].to_json() == without.info["tokenizer"].to_json()
    assert any("tokens read from" in note for note in dataset.notes)  # those of the training text are not made again
    main = opened(f"text:{tmp_path}/a.txt", options | {"validation": f"{tmp_path}/b.txt"}, tmp_path)
    assert equal(dataset.splits["validation/b"], main.splits["validation"])
    again = opened(f"text:{tmp_path}/a.txt", options, tmp_path, validation__b="b.txt")
    assert equal(again.splits["validation/b"], dataset.splits["validation/b"])
    with pytest.raises(ConfigError, match=r"c.txt: .*'x'"):
        opened(f"text:{tmp_path}/a.txt", options, tmp_path, validation__c="c.txt")


def test_folders_of_images(tmp_path, index_cache):
    def write(split, classes):
        for name in classes:
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(3):
                Image.fromarray(np.full((4, 4, 3), 40 * i + len(split), np.uint8)).save(tmp_path / split / name / f"{i}.png")

    write("train", "ab"), write("val", "ab"), write("sketch", "b"), write("wrong", "c")
    options = {"size": (4, 4)}
    dataset = opened(f"images:{tmp_path}", options, tmp_path, validation__sketch="sketch", test__again="val")
    assert {split: len(part) for split, part in dataset.splits.items()} == {"train": 6, "validation": 6, "validation/sketch": 3, "test/again": 6}
    assert set(get_batch(dataset.splits["validation/sketch"], np.arange(3))["label"]) == {1}
    assert equal(dataset.splits["validation"], dataset.splits["test/again"])
    with pytest.raises(ConfigError, match="the class 'c' is in validation/x, but not in train"):
        opened(f"images:{tmp_path}", options, tmp_path, validation__x="wrong")
    with pytest.raises(ConfigError, match=r"config.data.validation_sets.x: .* has no folder 'sketches'. Did you mean 'sketch'"):
        opened(f"images:{tmp_path}", options, tmp_path, validation__x="sketches")


def test_splits_of_a_saved_data_set(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    sizes = {"train": 8, "validation": 2, "validation_far": 3, "test_near": 4}
    parts = {name: datasets.Dataset.from_dict({"text": ["a b"] * n, "label": [i % 2 for i in range(n)]}, features=features) for name, n in sizes.items()}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "saved"))
    dataset = opened("hf:saved", ROWS, tmp_path, validation__far="validation_far", validation__same="validation", test__near="test_near")
    found = {split: len(part) for split, part in dataset.splits.items()}
    assert found == {"train": 8, "validation": 2, "validation/far": 3, "validation/same": 2, "test/near": 4}
    assert not any("not used" in guess for guess in dataset.guesses)
    with pytest.raises(ConfigError, match="config.data.validation_sets.x: .* has no split 'far'"):
        opened("hf:saved", ROWS, tmp_path, validation__x="far")


def test_a_section_is_other_data_with_the_vocabulary_and_classes_of_the_training_data(tmp_path):
    (tmp_path / "train.tsv").write_text(TRAIN)
    rows = [{"text": "fine film", "label": "1"}, {"text": "good", "label": "0"}, {"text": "good unknown", "label": "1"}]
    (tmp_path / "new.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    section = {"source": f"jsonl:{tmp_path}/new.jsonl", "split": "train"}
    dataset = opened(f"tsv:{tmp_path}/train.tsv", ROWS | {"holdout": 0.0}, tmp_path, validation__new=section)
    new = dataset.splits["validation/new"].arrays
    coder = dataset.info["tokenizer"]
    assert new["label"].tolist() == [1, 0, 1] and new["tokens"][0][:2].tolist() == coder.encode("fine film").tolist()
    assert new["tokens"][2][1] == coder.special("unknown")
    with pytest.raises(ConfigError, match=r"config.data.validation_sets.new.split: 'jsonl:.*' has no validation, only train. To evaluate all of it: 'split'"):
        opened(f"tsv:{tmp_path}/train.tsv", ROWS, tmp_path, validation__new={"source": f"jsonl:{tmp_path}/new.jsonl"})
    (tmp_path / "new.jsonl").write_text(json.dumps({"text": "fine", "label": "7"}) + "\n")
    with pytest.raises(ConfigError, match=r"config.data.validation_sets.new: .*new.jsonl, line 1: the label '7' is none of 0, 1"):
        opened(f"tsv:{tmp_path}/train.tsv", ROWS, tmp_path, validation__new=section)


def test_a_table_over_time_is_scaled_as_the_training_rows(tmp_path):
    draw = np.random.default_rng(0).normal(size=(60, 2))
    for name, values in {"a": draw, "b": draw * 3 + 5}.items():
        (tmp_path / f"{name}.csv").write_text("date,x,y\n" + "".join(f"{i},{x},{y}\n" for i, (x, y) in enumerate(values)))
    options = {"lookback": 4, "horizon": 2, "rows": (30, 10, 10)}
    dataset = opened(f"csv:{tmp_path}/a.csv", options, tmp_path, validation__b={"source": f"csv:{tmp_path}/b.csv"}, test__later={"rows": (30, 10, 20)})
    mean, deviation = draw[:30].mean(0), draw[:30].std(0)
    np.testing.assert_allclose(dataset.splits["validation/b"][0]["past"], ((draw * 3 + 5)[26:30] - mean) / deviation, rtol=1e-5)
    assert len(dataset.splits["test/later"]) == 20 - 2 + 1
    (tmp_path / "b.csv").write_text("date,y,x\n" + "".join(f"{i},{i},{i * i}\n" for i in range(60)))
    with pytest.raises(ConfigError, match=r"config.data.validation_sets.b.columns: .*b.csv has y, x; the run was trained on x, y"):
        opened(f"csv:{tmp_path}/a.csv", options, tmp_path, validation__b={"source": f"csv:{tmp_path}/b.csv"})


def test_the_parts_of_a_mixture_validate_alone(tmp_path):
    for name, text in {"a": "abc abd\n" * 40, "b": "cab bad\n" * 40}.items():
        (tmp_path / f"{name}.txt").write_text(text)
    sources = {name: {"source": f"text:{tmp_path}/{name}.txt", "sequence_length": 8} for name in "ab"}
    section = {"source": "mixture", "sources": sources, "batch_size": 2}
    section["validation_sets"] = {name: {"source": f"text:{tmp_path}/{name}.txt", "sequence_length": 8, "holdout": 0.1} for name in "ab"}
    config = small_configs.config(small_configs.GPT, data=section, model__context=8)
    splits = build_experiment(config).dataset.splits
    assert len(splits["validation"]) == len(splits["validation/a"]) + len(splits["validation/b"])
    section["validation_sets"] = {"a": f"{tmp_path}/a.txt"}
    with pytest.raises(ConfigError, match="config.data.validation_sets.a=.*: 'mixture' names no split by a path. Give a section"):
        build_experiment(small_configs.config(small_configs.GPT, data=section, model__context=8))


def test_arrays_and_own_sources_name_sets_as_splits():
    part = {"image": np.zeros((8, 4, 4, 1), np.float32), "label": np.arange(8) % 2}
    dataset = open_dataset("arrays", {}, None, {"train": part, "validation/far": part, "test/near": part})
    assert set(dataset.splits) == {"train", "validation/far", "test/near"}
    for name in ("validation/a/b", "train/x", "validation/train", "dev", "validation/"):
        with pytest.raises(ConfigError, match="a split is one of|cannot be the name of a set"):
            open_dataset("arrays", {}, None, {"train": part, name: part})


def own(*, count: int = 4):
    """Return a data set of `count` examples in each split."""
    part = Arrays({"image": np.ones((count, 8, 8, 1), np.float32), "label": np.zeros(count, np.int32)})
    return Dataset({"train": part, "validation": part}, {"image_shape": (8, 8, 1), "num_classes": 2})


def test_an_own_source_opened_with_other_keys():
    dataset = open_dataset(f"{__name__}:own", {"count": 4}, None, sets={"validation/more": {"count": 6}})
    assert {split: len(part) for split, part in dataset.splits.items()} == {"train": 4, "validation": 4, "validation/more": 6}
    assert "6 of 6 examples of validation/more have inputs that an example of train has, too" in dataset.guesses


WRONG = {
    "a slash": ({"a/b": "x.tsv"}, "config.data.validation_sets: 'a/b' cannot be the name of a set: a name has letters"),
    "a split's name": ({"train": "x.tsv"}, "'train' cannot be the name of a set: that is a split's own name"),
    "no name": ({"": "x.tsv"}, "'' cannot be the name of a set"),
    "nothing": ({"a": ""}, "config.data.validation_sets.a must be what config.data.validation takes, or a section of keys; got ''"),
    "a number": ({"a": 3}, "config.data.validation_sets.a must be what"),
    "a key": ({"a": {"text_colum": 0}}, "config.data.validation_sets.a.text_colum: .*Did you mean 'text_column'"),
    "a source": ({"a": {"source": "jsnl:x"}}, "config.data.validation_sets.a.source"),
    "a tokenizer": ({"a": {"tokenizer": "byte"}}, "config.data.validation_sets.a.tokenizer: a set has no tokenizer of its own"),
    "a split": ({"a": {"split": "dev"}}, "config.data.validation_sets.a.split: a split is one of"),
    "a list": (["x.tsv"], "config.data.validation_sets must be a dictionary"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_sets_are_one_error(case):
    sets, message = WRONG[case]
    config = small_configs.config(small_configs.LSTM, data={"source": "tsv:x.tsv", "batch_size": 2, "validation_sets": sets, **ROWS})
    with pytest.raises(ConfigError, match=message):
        resolve(config)
