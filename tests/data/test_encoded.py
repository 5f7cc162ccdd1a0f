"""Rows that are encoded once, into the cache on disk: the same examples as without it, whatever happens to the cache."""

import json
import os
import pickle

import numpy as np
import pytest
import tokenizer_folders as folders

from jaxmodels.data import encoded, fitted
from jaxmodels.data.features.base import Row
from jaxmodels.data.features.text import Tokenized
from jaxmodels.data.registry import open_dataset
from jaxmodels.data.source import get_batch
from jaxmodels.data.sources import chat as chat_lib
from jaxmodels.data.spool import Spool
from jaxmodels.tokenizers import base
from jaxmodels.tokenizers.factory import make_tokenizer

TEXTS = [text for text in folders.LINES + folders.TRICKY if text.strip()]
PAIRS = [(" ".join(text.split()), " ".join(other.split())) for text, other in zip(TEXTS, reversed(TEXTS), strict=True)]


def bert(folder):
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]", "pad_token": "[PAD]"}
    files = {"config.json": {"model_type": "bert", "vocab_size": 300}, "tokenizer.json": folders.wordpiece().to_str(), "tokenizer_config.json": settings}
    return f"hf:{folder / 'bert' if (folder / 'bert').exists() else folders.write(folder / 'bert', files)}"  # its training differs from time to time


def tsv(folder):
    (folder / "train.tsv").write_text("".join(f"{a}\t{'ab'[i % 2]}\t{b}\n" for i, (a, b) in enumerate(PAIRS)))
    (folder / "test.tsv").write_text("".join(f"{a}\tb\t{b}\n" for a, b in PAIRS[:3]))
    return f"tsv:{folder}", {"header": False}


def jsonl(folder):
    """With a validation set of another name, a bad row, and values to predict."""
    lines = [json.dumps({"text": text, "label": i / 3}) for i, text in enumerate(TEXTS)]
    (folder / "train.jsonl").write_text("\n".join([*lines, '{"text": ""}']))
    (folder / "far.jsonl").write_text("\n".join(lines[:4]))
    return f"jsonl:{folder}/train.jsonl", {"label": "value", "on_bad_example": "skip", "validation_sets": {"far": f"{folder}/far.jsonl"}}


def conll(folder):
    (folder / "train.conll").write_text("\n".join("".join(f"{word}\t{'OXY'[len(word) % 3]}\n" for word in text.split()) for text in TEXTS))
    return f"conll:{folder}/train.conll", {"scheme": "none"}


def hf(folder):
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict({"text": TEXTS, "label": [i % 3 for i in range(len(TEXTS))]})
    table.select(range(1, len(TEXTS))).save_to_disk(str(folder / "saved"))
    return f"hf:{folder}/saved", {}


def chat(folder):
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "chat_template": folders.CHATML}
    tokenizer = folders.byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>"]).to_str()
    files = {"config.json": {"model_type": "llama", "vocab_size": 330}, "tokenizer.json": tokenizer, "tokenizer_config.json": settings}
    if not (folder / "talker").exists():
        folders.write(folder / "talker", files)
    rows = [{"prompt": a, "completion": b} for a, b in PAIRS if not any(token in a + b for token in ("</s>", "<s>", "<|endoftext|>"))]
    (folder / "chat.jsonl").write_text("\n".join(json.dumps(row) for row in [*rows, {"prompt": "?"}]))
    return f"chat:{folder}/chat.jsonl", {"tokenizer": f"hf:{folder}/talker", "on_bad_example": "skip"}


CASES = {
    "text and class": (tsv, {"text_column": 0, "label_column": 1, "tokenizer": "bpe:300"}),
    "bytes": (tsv, {"text_column": 0, "label_column": 1, "tokenizer": "byte+special"}),
    "two texts": (tsv, {"text_column": 0, "pair_column": 2, "label": "none", "tokenizer": "word:50"}),
    "two texts, BERT": (tsv, {"text_column": 0, "pair_column": 2, "label_column": 1, "tokenizer": bert}),
    "pair": (tsv, {"source_column": 0, "target_column": 2, "tokenizer": "bpe:300"}),
    "values, a bad row, a further set": (jsonl, {"tokenizer": "bpe:300"}),
    "tags": (conll, {"tokenizer": bert}),
    "tags, bpe": (conll, {"tokenizer": "bpe:300"}),
    "datasets": (hf, {"tokenizer": "bpe:300"}),
    "conversations": (chat, {}),
    "conversations, one a row": (chat, {"packing": "none"}),
}


@pytest.fixture
def cached(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXMODELS_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(encoded, "CACHE_FROM", 0)
    return tmp_path


def opened(case, folder):
    make, options = CASES[case]
    source, more = make(folder)
    options = {"sequence_length": 64 if "conv" in case else 24} | more | options
    if callable(options["tokenizer"]):
        options["tokenizer"] = options["tokenizer"](folder)
    return open_dataset(source, options, None)


def entries(folder):
    return list((folder / "cache" / "rows").iterdir())


def assert_same(one, other):
    assert list(one.splits) == list(other.splits) and one.skipped == other.skipped and one.guesses == other.guesses
    for name in one.info.keys() | other.info.keys():
        assert one.info[name] == other.info[name] if name != "tokenizer" else one.info[name].to_json() == other.info[name].to_json()
    for split, source in one.splits.items():
        there = other.splits[split]
        assert len(source) == len(there) and source.fingerprint() == there.fingerprint()
        for few in (np.arange(len(source)), np.array([len(source) - 1, 0])):
            here, again = get_batch(source, few), get_batch(there, few)
            assert here.keys() == again.keys()
            for name, array in here.items():
                np.testing.assert_array_equal(array, again[name])
                assert array.dtype == again[name].dtype
        for name, value in source[1].items():
            np.testing.assert_array_equal(value, there[1][name])


@pytest.mark.parametrize("case", CASES)
def test_examples_of_the_cache_are_those_without_it_and_nothing_is_tokenized_again(cached, monkeypatch, case):
    with monkeypatch.context() as without:
        without.setattr(encoded, "CACHE_FROM", 1 << 30)
        plain = opened(case, cached)
    assert not (cached / "cache" / "rows").exists()
    first = opened(case, cached)
    monkeypatch.setattr(Tokenized, "prepare", lambda *_: pytest.fail("tokenized again"))
    monkeypatch.setattr(chat_lib._Encoder, "prepare", lambda *_: pytest.fail("tokenized again"))
    second = opened(case, cached)
    assert len(entries(cached)) == 1 and "written to" in first.notes[-1 if "conv" not in case else 2] + first.notes[-1] and "read from" in "".join(second.notes)
    for dataset in (first, second):
        assert_same(plain, dataset)
        told = [note for note in dataset.notes if "encoded rows" not in note]
        assert told == list(plain.notes)
    if "conv" not in case:
        assert_same(plain, pickle.loads(pickle.dumps(second)))


@pytest.mark.parametrize("spec", ["bpe:300", "word:20", "byte", "character+special", "hf:bert", "sentencepiece", "spiece"])
def test_texts_encoded_together_have_the_tokens_of_each(tmp_path, spec):
    texts = [*folders.TRICKY, "the cat sat " * 60_000, *folders.LINES, "x" * 300_000]
    if spec == "sentencepiece":
        (tmp_path / "x.model").write_bytes(folders.sentencepiece_model("unigram"))
        spec = str(tmp_path / "x.model")
    elif spec == "spiece":
        files = {"config.json": {"model_type": "t5", "vocab_size": 400}, "spiece.model": folders.sentencepiece_model("unigram")}
        spec = f"hf:{folders.write(tmp_path / 't5', files)}"
    tokenizer = make_tokenizer(bert(tmp_path) if spec == "hf:bert" else spec, folders.LINES, None)
    for text, tokens in zip(texts, base.encode_all(tokenizer, texts), strict=True):
        assert tokens.dtype == np.int32 and np.array_equal(tokens, tokenizer.encode(text)), text[:40]
    assert base.encode_all(tokenizer, []) == []


def test_an_entry_is_of_contents_tokenizer_and_options(cached):
    opened("text and class", cached)
    (cached / "copy").mkdir()
    os.rename(cached / "train.tsv", cached / "copy" / "train.tsv")
    os.rename(cached / "test.tsv", cached / "copy" / "test.tsv")
    options = {"sequence_length": 24, "tokenizer": "bpe:300", "header": False, "text_column": 0, "label_column": 1}
    source = f"tsv:{cached}/copy"
    assert "read from" in open_dataset(source, options, None).notes[-1], "a copy of the files shares it"
    for number, change in enumerate(({"sequence_length": 23}, {"tokenizer": "bpe:301"}, {"holdout": 0.2}, {"text_column": 2}, {"labels": ("b", "a")}), 2):
        open_dataset(source, options | change, None)
        assert len(entries(cached)) == number
    with open(cached / "copy" / "test.tsv", "a") as file:
        file.write("one more\ta\tz\n")
    assert len(open_dataset(source, options, None).splits["test"]) == 4


@pytest.mark.parametrize("damage", ["half", "flipped", "header", "gone"])
@pytest.mark.parametrize("case", ["text and class", "conversations"])
def test_a_damaged_entry_is_written_again(cached, damage, case):
    good = opened(case, cached)
    (entry,) = entries(cached)
    file = entry / ("header.json" if damage == "header" else "train.tokens.bin" if case == "text and class" else "0.tokens.bin")
    content = bytearray(file.read_bytes())
    content[0] ^= 1
    file.unlink()  # arrays that are mapped from it stay whole
    if damage != "gone":
        file.write_bytes(content[: len(content) // 2] if damage == "half" else content)
    anew = opened(case, cached)
    assert any("is damaged" in note and "written again" in note for note in anew.notes) and any("written to" in note for note in anew.notes)
    assert_same(good, anew)
    assert any("read from" in note for note in opened(case, cached).notes) and entries(cached) == [entry]


@pytest.mark.parametrize("case", ["text and class", "conversations"])
def test_without_a_writable_folder_it_warns_and_continues(cached, monkeypatch, case):
    good = opened(case, cached)
    (cached / "file").write_text("")
    monkeypatch.setenv("JAXMODELS_CACHE_DIR", str(cached / "file"))
    dataset = opened(case, cached)
    assert "no cache of encoded rows" in dataset.fallbacks[0] and "JAXMODELS_CACHE_DIR" in dataset.fallbacks[0]
    assert_same(good, dataset)


def test_data_that_is_evaluated_shares_the_entry_of_its_training_where_it_is_the_same(cached, monkeypatch):
    source, options = f"tsv:{cached}", {"sequence_length": 24, "tokenizer": "bpe:300", "header": False, "text_column": 0, "label_column": 1}
    tsv(cached)
    trained = open_dataset(source, options, None)
    with monkeypatch.context() as without:
        without.setattr(Tokenized, "prepare", lambda *_: pytest.fail("tokenized again"))
        again = open_dataset(source, options, None, trained=trained.info)
    assert_same(trained, again)
    other = dict(trained.info) | {"labels": ["b", "a"]}
    turned = open_dataset(source, options, None, trained=other)
    np.testing.assert_array_equal(turned.splits["train"].arrays["label"], 1 - np.asarray(trained.splits["train"].arrays["label"]))
    assert len(entries(cached)) == 2 and not fitted.is_given()


def test_rows_without_their_padding_are_an_array_that_is_read_by_index():
    rows = np.array([[1, 2, -1], [-1, -1, -1], [-1, 3, -1], [4, 5, 6]], np.int32)
    ragged = encoded.Ragged(np.array([1, 2, -1, 3, 4, 5, 6], np.int32), np.array([2, 2, 4, 7]), 3)
    assert ragged.shape == rows.shape and len(ragged) == 4
    np.testing.assert_array_equal(np.asarray(ragged), rows)
    for index in (0, -1, np.int64(2), slice(1, 3), slice(None), [3, 0, 0], np.array([[1], [2]]), np.array([True, False, False, True]), np.zeros(0, int)):
        np.testing.assert_array_equal(ragged[index], rows[index])


def test_rows_wait_on_the_disk_while_they_are_checked(cached):
    rows = [Row(f"line {i}", {"text": f"text {i}", 0: [i]}, problem="bad" if i == 7 else None) for i in range(2500)]
    spool = Spool(iter(rows))
    assert len(spool) == 2500 and list(spool) == rows
    assert [(one, other) for one, other in zip(spool, spool, strict=True)] == list(zip(rows, rows, strict=True))  # two readers at once
    assert list(spool + Spool(iter(rows[:3]))) == rows + rows[:3] and len(Spool()) == 0 and not list(Spool())
