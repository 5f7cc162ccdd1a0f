"""Tokenizers: round trips of text and JSON, special tokens that text cannot contain, and errors."""

import collections
import io
import json
import random

import numpy as np
import pytest

from jaxmodels.errors import ConfigError, optional_import
from jaxmodels.tokenizers import bpe
from jaxmodels.tokenizers.base import SPECIAL
from jaxmodels.tokenizers.factory import from_json, make_tokenizer

TEXT = "the cat sat on the mat. The dog's cat, the one that sat:\n\n    def cat(): return 'hat'\n" * 20 + "Grüße, 世界!\r\n\t🙂"


@pytest.fixture(scope="module")
def sentencepiece_model():
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines()), model_writer=model, vocab_size=320, byte_fallback=True, minloglevel=2, hard_vocab_limit=False
    )
    return model.getvalue()


def random_texts(count=40):
    """Return texts with Unicode of all planes, without surrogates: mixed ranges, white space, and text like special tokens."""
    draw = random.Random(0)
    pools = [lambda: chr(draw.randrange(32, 127)), lambda: draw.choice(" \n\t\r\u00a0\u200b"), lambda: draw.choice([*SPECIAL, "[MASK]", " the cat"])]
    pools += [lambda: chr(draw.choice([draw.randrange(0xD800), draw.randrange(0xE000, 0x110000)]))]
    return ["".join(draw.choice(pools)() for _ in range(draw.randrange(60))) for _ in range(count)]


@pytest.mark.parametrize("spec", ["byte", "byte+special", "character", "character+special", "bpe:400"])
def test_any_text_survives_a_round_trip_and_json_gives_the_same_tokenizer(spec):
    texts = random_texts()
    coder = make_tokenizer(spec, texts if spec.startswith("character") else [TEXT], None)
    again = from_json(coder.to_json())
    assert again.to_json() == coder.to_json() and again.vocab_size == coder.vocab_size
    for text in texts:
        tokens = coder.encode(text)
        assert tokens.dtype == np.int32 and coder.decode(tokens) == text
        assert not len(tokens) or (tokens.min() >= (4 if coder.special("end") else 0) and tokens.max() < coder.vocab_size)
        np.testing.assert_array_equal(again.encode(text), tokens)


@pytest.mark.parametrize("spec", ["byte+special", "character+special", "word:50", "word-lower:50", "bpe:300"])
def test_special_tokens_come_first_and_are_shown_by_name(spec):
    coder = make_tokenizer(spec, [TEXT], None)
    assert [coder.special(name) for name in ("unknown", "start", "end", "mask")] == [0, 1, 2, 3]
    tokens = np.concatenate([[1], coder.encode("the cat"), [2, -1, -1]])
    assert coder.decode(tokens).replace(" ", "") == "<start>thecat<end>"
    assert make_tokenizer(spec.replace("+special", ""), [TEXT], None).special("mask") == (None if "+" in spec else 3)
    with pytest.raises(ValueError, match="pad"):
        coder.special("pad")


def test_words_are_the_most_frequent():
    counts = collections.Counter(TEXT.split())
    coder = make_tokenizer("word:5", [TEXT], None)
    assert sorted((counts[word] for word in coder.words), reverse=True) == [n for _, n in counts.most_common(5)]
    assert coder.vocab_size == 9 and coder.decode(coder.encode("the\n cat  zebra")) == "the cat <unknown>"
    lower = make_tokenizer("word-lower:50", [TEXT], None)
    np.testing.assert_array_equal(lower.encode("The CAT"), lower.encode("the cat"))
    assert "The" in make_tokenizer("word:50", [TEXT], None).words and "The" not in lower.words


def test_bpe_is_deterministic_and_compresses():
    one, two = (make_tokenizer("bpe:400", [TEXT], None) for _ in range(2))
    assert one.to_json() == two.to_json() and 260 < one.vocab_size <= 400
    assert len(one.encode(TEXT)) < 0.5 * len(TEXT.encode())
    from tokenizers import Tokenizer

    assert Tokenizer.from_str(one.to_json()).encode("the cat").ids == one.encode("the cat").tolist(), "the library reads the file too"


def test_pieces_change_nothing(monkeypatch):
    texts = [TEXT, *random_texts()]
    whole = make_tokenizer("bpe:400", texts, None)
    monkeypatch.setattr(bpe, "_PIECE", 7)
    assert len(list(bpe._pieces(TEXT))) > 50 and "".join(bpe._pieces(TEXT)) == TEXT
    cut = make_tokenizer("bpe:400", texts, None)
    assert cut.to_json() == whole.to_json()
    for text in texts:
        tokens = cut.encode(text)
        np.testing.assert_array_equal(tokens, whole._tokenizer.encode(text, add_special_tokens=False).ids)


def test_unknown_characters_are_named_or_unknown():
    with pytest.raises(ValueError, match="'z'.*at 2"):
        make_tokenizer("character", ["abc"], None).encode("abz")
    assert make_tokenizer("character+special", ["abc"], None).encode("abz").tolist() == [4, 5, 0]


@pytest.mark.parametrize("spec", ["byte", "character", "word:5", "bpe:300"])
@pytest.mark.parametrize("wrong", [-2, 10**6])
def test_numbers_that_are_not_tokens(spec, wrong):
    with pytest.raises(ValueError, match=f"{wrong} is not a token"):
        make_tokenizer(spec, [TEXT], None).decode([0, wrong])


def test_files_and_runs(tmp_path, sentencepiece_model):
    (tmp_path / "s.model").write_bytes(sentencepiece_model)
    trained = make_tokenizer("bpe:300", [TEXT], None)
    (tmp_path / "t.json").write_text(trained.to_json(), encoding="utf-8")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "tokenizer.json").write_text(make_tokenizer("word:9", [TEXT], None).to_json(), encoding="utf-8")
    assert make_tokenizer("t.json", [], str(tmp_path)).to_json() == trained.to_json()
    assert make_tokenizer(str(tmp_path / "run"), [], None).vocab_size == 13
    pieces = make_tokenizer("s.model", [], str(tmp_path))
    assert pieces.decode(pieces.encode("the cat sat 世 🙂")) == "the cat sat 世 🙂"
    assert (pieces.special("unknown"), pieces.special("start"), pieces.special("end"), pieces.special("mask")) == (0, 1, 2, None)
    again = from_json(pieces.to_json())
    np.testing.assert_array_equal(again.encode("the hat"), pieces.encode("the hat"))
    assert again.to_json() == pieces.to_json()


def test_names_of_special_tokens_in_pretrained_models():
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    bert = Tokenizer(models.WordPiece({"[UNK]": 0, "[CLS]": 1, "[SEP]": 2, "[MASK]": 3, "cat": 4, "[": 5, "]": 6, "MASK": 7}, unk_token="[UNK]"))
    bert.add_special_tokens(["[UNK]", "[CLS]", "[SEP]", "[MASK]"])
    bert.pre_tokenizer = pre_tokenizers.Whitespace()
    bert.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    bert.enable_padding(length=9)
    coder = from_json(bert.to_str())
    assert [coder.special(name) for name in ("unknown", "start", "end", "mask")] == [0, 1, 2, 3]
    assert coder.encode("cat dog").tolist() == [4, 0], "nothing is added, nothing padded"
    assert coder.encode("cat [MASK]").tolist() == [4, 5, 7, 6], "text is text"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("charcter", "did you mean 'character'"),
        ("bpe:8k", "whole number of at least 260"),
        ("bpe:100", "whole number of at least 260"),
        ("word:0", "whole number of at least 1"),
        ("nowhere.json", "no file nowhere.json nor .*nowhere.json"),
        ("broken.json", "broken.json is not a tokenizer"),
        ("other.json", "unknown kind of tokenizer None"),
        ("broken.model", "broken.model is not a SentencePiece model"),
        ("empty", "has no tokenizer.json"),
    ],
)
def test_wrong_specifications(spec, message, tmp_path):
    (tmp_path / "broken.json").write_text('{"model": {"type": "BPE"')
    (tmp_path / "other.json").write_text(json.dumps({"a": 1}))
    (tmp_path / "broken.model").write_bytes(b"no model")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=f"(?i)config.data.tokenizer.*{message}"):
        make_tokenizer(spec, [TEXT], str(tmp_path))


def test_empty_training_text():
    for spec in ("word:5", "character"):
        with pytest.raises(ConfigError, match="training text"):
            make_tokenizer(spec, ["", ""], None)


def test_the_error_of_a_missing_package_states_how_to_install_it():
    with pytest.raises(ConfigError, match=r"no_such_package is required here and not installed.*pip install 'jaxmodels\[text\]'"):
        optional_import("no_such_package.inside", "text")
    assert optional_import("json", "text") is json


def test_the_command_trains_one_from_files(tmp_path, capsys):
    from jaxmodels.cli import main as cli

    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "b.jsonl").write_text(json.dumps({"body": TEXT}) + "\n{\n")
    output = tmp_path / "out" / "t.json"
    command = ["tokenizer", "--input=*.txt,b.jsonl", f"--data_dir={tmp_path}", "--size=300", f"--output={output}", "--text_column=body"]
    assert cli.run(command) == 2 and "b.jsonl, line 2: not JSON" in capsys.readouterr().err and not output.exists()
    assert cli.run([*command, "--on_bad_example=skip"]) == 0
    printed = capsys.readouterr().out
    coder = make_tokenizer(str(output), [], None)
    per_token = len(TEXT) / len(coder.encode(TEXT))
    assert "300 tokens, from 2 documents in 2 files" in printed and f"{per_token:.2f} characters a token" in printed and "1 bad example" in printed
    assert coder.to_json() == make_tokenizer("bpe:300", [TEXT, TEXT], None).to_json()
    assert cli.run(command) == 2 and "--overwrite" in capsys.readouterr().err
    assert cli.run([*command, "--overwrite", "--size=9"]) == 2 and "--size=9" in capsys.readouterr().err
    assert cli.run([*command, "--overwrite", "--on_bad_example=skip", "--size=9000"]) == 0 and "of the 9,000 requested" in capsys.readouterr().out
    assert cli.run(["tokenizer", "--input=no.txt", f"--output={tmp_path}/x"]) == 2 and "--input: there is no file no.txt" in capsys.readouterr().err
    assert cli.run([*command[:-2], f"--output={tmp_path}/a.txt/t.json", "--on_bad_example=skip", "--text_column=body"]) == 2
    assert "cannot be written" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.txt", "b.jsonl", "out", "t.json"]
