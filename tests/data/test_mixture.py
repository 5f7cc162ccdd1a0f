"""Mixtures: shares, epochs, one tokenizer for all parts, and errors that name the part's key."""

import numpy as np
import pytest

from jaxmodels.data import loader
from jaxmodels.data.registry import open_dataset
from jaxmodels.data.source import Arrays, get_batch
from jaxmodels.data.sources import text
from jaxmodels.data.sources.mixture import PERIOD, Concatenation, Mixture
from jaxmodels.errors import ConfigError
from jaxmodels.experiment.sections import resolve


def part(number, size):
    return Arrays({"part": np.full(size, number), "x": np.arange(size)})


@pytest.mark.parametrize(
    ("sizes", "weights"),
    [([10, 10], [1, 1]), ([7, 30, 4], [0.2, 0.5, 0.3]), ([100, 3], [1, 50]), ([9], [2.0]), ([25_000, 10], [1, 0.001]), ([3, 3, 3], [1, 1, 1])],
)
def test_shares_are_exact_in_every_range_and_an_epoch_reads_all_examples(sizes, weights):
    mixed = Mixture([part(i, size) for i, size in enumerate(sizes)], weights)
    got = get_batch(mixed, np.arange(len(mixed)))
    shares = np.array(weights) / np.sum(weights)
    whole = []
    for i, size in enumerate(sizes):
        own = got["x"][got["part"] == i]
        np.testing.assert_array_equal(own, np.arange(len(own)) % size)
        assert mixed.counts[i] == len(own) >= size
        whole.append(len(own) - size)
    cut = get_batch(mixed, np.arange(len(mixed) - 1))
    assert any(len(set(cut["x"][cut["part"] == i])) < size for i, size in enumerate(sizes)), "an epoch is no longer than it takes"
    so_far = np.cumsum(got["part"][:, None] == np.arange(len(sizes)), axis=0)
    ideal = np.arange(1, len(mixed) + 1)[:, None] * shares
    assert np.abs(so_far - ideal).max() < 2 + len(mixed) / PERIOD


def test_an_example_is_located_in_constant_time():
    mixed, again = (Mixture([part(0, 40), part(1, 9)], [3, 1]) for _ in range(2))
    whole = get_batch(mixed, np.arange(len(mixed)))
    few = np.array([30, 2, 30, 17])
    for key, value in get_batch(mixed, few).items():
        np.testing.assert_array_equal(value, whole[key][few])
    assert {k: v.item() for k, v in mixed[5].items()} == {k: v[5].item() for k, v in whole.items()}
    huge = Mixture([part(0, 10), part(1, 10)], [1, 1])
    assert 0.45 < np.mean(huge.locate(np.arange(10**12, 10**12 + 1000))[0]) < 0.55
    seeked = loader.TrainingBatches(mixed, 4, 30, seed=1, shuffle=True)[20]
    np.testing.assert_array_equal(seeked["x"], [loader.TrainingBatches(again, 4, 30, seed=1, shuffle=True)[step] for step in range(21)][-1]["x"])
    assert mixed.in_memory and mixed.fingerprint() != Mixture([part(0, 40), part(1, 9)], [1, 3]).fingerprint()


def test_validation_is_every_part_once():
    joined = Concatenation([part(0, 3), part(1, 1), part(2, 2)])
    got = get_batch(joined, np.arange(len(joined)))
    np.testing.assert_array_equal(got["part"], [0, 0, 0, 1, 2, 2])
    np.testing.assert_array_equal(got["x"], [0, 1, 2, 0, 0, 1])
    np.testing.assert_array_equal(get_batch(joined, np.array([4, 0]))["part"], [2, 0])


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "a.txt").write_text("aa ab " * 20)
    (tmp_path / "b.txt").write_text("bb bc " * 10)
    (tmp_path / "c.jsonl").write_text('{"text": "cc cd"}\n{"text": ""}\n')
    return tmp_path


def opened(folder, sources, **options):
    return open_dataset("mixture", {"sources": sources, **options}, str(folder))


def parts(**changes):
    text = {"sequence_length": 4, "holdout": 0.2}
    result = {"a": {"source": "text:a.txt", **text}, "b": {"source": "text:b.txt", "weight": 3, **text}}
    for key, value in changes.items():
        name, _, inner = key.partition("__")
        result[name] = result[name] | {inner: value} if inner else value
    return result


@pytest.mark.parametrize("spec", ["character", "bpe:270", "word:9", "byte+special"])
def test_all_parts_share_one_tokenizer_trained_on_all(folder, spec):
    dataset = opened(folder, parts(), tokenizer=spec)
    coder = dataset.info["tokenizer"]
    assert dataset.info["vocab_size"] == coder.vocab_size
    for split in ("train", "validation"):
        rows = get_batch(dataset.splits[split], np.arange(len(dataset.splits[split])))["tokens"]
        text = "".join(coder.decode(row) for row in rows)
        assert "aa" in text and "bb" in text and "<unknown>" not in text
    train = get_batch(dataset.splits["train"], np.arange(len(dataset.splits["train"])))["tokens"]
    share = np.mean(["b" in coder.decode(row).replace("ab", "") for row in train])
    assert abs(share - 0.75) < 0.1
    assert "an epoch of the mixture" in dataset.notes[-1]


def test_a_part_that_is_read_from_the_cache(folder, monkeypatch):
    monkeypatch.setenv("JAXMODELS_CACHE_DIR", str(folder / "cache"))
    before = opened(folder, parts(), tokenizer="bpe:270")
    monkeypatch.setattr(text, "CACHE_FROM", 0)
    for _ in range(2):
        dataset = opened(folder, parts(), tokenizer="bpe:270")
        assert any("cache" in note for note in dataset.notes)
        for split, source in dataset.splits.items():
            places = np.arange(len(source))
            np.testing.assert_array_equal(get_batch(source, places)["tokens"], get_batch(before.splits[split], places)["tokens"])


def test_nested_parts_and_their_messages(folder):
    lines = {"source": "text:c.jsonl", "sequence_length": 4, "holdout": 0.0, "on_bad_example": "skip"}
    inner = {"source": "mixture", "weight": 2, "sources": {"b": parts()["b"], "c": lines}}
    dataset = opened(folder, {"a": parts()["a"], "more": inner}, tokenizer="character")
    assert dataset.info["tokenizer"].alphabet == " abcd"
    assert dataset.skipped == {"train": 1} and any(note.startswith("more: c: warning: 1 bad example") for note in dataset.notes)


def test_images_can_be_mixed():
    sources = {"one": "digits", "two": {"source": "digits", "split_seed": 1, "weight": 2}}
    dataset = open_dataset("mixture", {"sources": sources}, None)
    assert dataset.info == {"image_shape": (8, 8, 1), "num_classes": 10} and len(dataset.splits["test"]) == 2 * 359


def config(sources, **data):
    return {
        "model": {"name": "lstm", "layers": 1, "width": 8},
        "task": "language_model",
        "data": {"source": "mixture", "batch_size": 2, "sources": sources, **data},
        "optimizer": {"name": "adam", "learning_rate": 0.1},
        "training": {"steps": 1},
    }


def test_a_resolved_config_has_every_key_of_every_part():
    section = resolve(config(parts(), tokenizer="byte"))["data"]
    assert section["sources"]["b"]["weight"] == 3.0 and section["sources"]["a"]["packing"] == "contiguous"
    assert section["tokenizer"] == "byte" and "tokenizer" not in section["sources"]["a"]
    again = resolve(config(section["sources"], tokenizer="byte"))
    assert again["data"] == section


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"b__weigth": 2}, "config.data.sources.b.weigth: .*Did you mean 'weight'"),
        ({"b__weight": 0}, "config.data.sources.b.weight must be above 0"),
        ({"b__weight": 1e-9}, "config.data.sources.b.weight is less than one example in 10,000"),
        ({"b__sequence_length": "4"}, "config.data.sources.b.sequence_length must be a whole number"),
        ({"b__tokenizer": "byte"}, "config.data.sources.b.tokenizer: .*share one; set config.data.tokenizer"),
        ({"b": {"weight": 1}}, "config.data.sources.b.source is required"),
        ({"b__source": "txt:b.txt"}, "config.data.sources.b.source: "),
        ({"b__source": "text"}, "config.data.sources.b.source: write it as 'text:PATH'"),
        ({"b__batch_size": 3}, "config.data.sources.b.batch_size: .*no such key"),
    ],
)
def test_wrong_keys_are_named_before_anything_is_opened(changes, message):
    with pytest.raises(ConfigError, match=message):
        resolve(config(parts(**changes)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"b__source": "text:no.txt"}, "config.data.sources.b.source: there is no file no.txt"),
        ({"b__holdout": 2.0}, "config.data.sources.b.holdout must be"),
        ({"b__sequence_length": 5}, "examples are .*in train of 'a' and .*'b'; the parts of a mixture must have the same arrays"),
        ({"b": {"source": "text:c.jsonl", "sequence_length": 4}}, "config.data.sources.b: .*c.jsonl, line 2: the text is empty"),
        ({"b": "digits"}, "config.data.sources: .* in 'a' and .* in 'b'; the parts of a mixture must be of one kind"),
    ],
)
def test_parts_that_cannot_be_mixed(folder, changes, message):
    with pytest.raises(ConfigError, match=message):
        opened(folder, parts(**changes), tokenizer="byte")


def test_no_parts_and_no_tokenizer(folder):
    with pytest.raises(ConfigError, match="a mixture needs parts"):
        opened(folder, {})
    with pytest.raises(ConfigError, match="^config.data.tokenizer: 'charcter'"):
        opened(folder, parts(), tokenizer="charcter")
