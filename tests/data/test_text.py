"""Text: files, documents, splits, rows of documents, and the cache on disk."""

import os
import pickle
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import small_configs
import tokenizer_folders
import warm_python

import jaxmodels
from jaxmodels.data import tokens
from jaxmodels.data.packing import Packed
from jaxmodels.data.registry import open_dataset
from jaxmodels.data.source import get_batch
from jaxmodels.data.sources import documents, text
from jaxmodels.data.tokens import Tokens
from jaxmodels.errors import ConfigError
from jaxmodels.runs.folder import RunFolder


def everything(source):
    return get_batch(source, np.arange(len(source)))


def stream(source):
    """Return the tokens of adjacent windows as one sequence."""
    rows = everything(source)["tokens"]
    joined = np.concatenate([rows[0, :1], rows[:, 1:].ravel()])
    return joined[joined >= 0]


# Rows of documents


def packed(sizes, length):
    """Return documents of consecutive numbers, so that a token identifies its position."""
    ends = np.cumsum(sizes)
    return Packed(Tokens(np.arange(ends[-1])), ends, length)


@pytest.mark.parametrize("seed", range(4))
def test_rows_have_each_target_once_and_only_whole_documents(seed):
    draw = np.random.default_rng(seed)
    length = int(draw.integers(3, 12))
    sizes = np.concatenate([draw.integers(1, 3 * length, 80), [1, 2, length, length + 1, length + 2, 2 * length + 1]])
    firsts = np.cumsum(sizes) - sizes
    source = packed(sizes, length)
    rows = everything(source)
    assert rows["tokens"].shape == rows["segments"].shape == (len(source), length + 1)
    assert rows["tokens"].dtype == rows["segments"].dtype == np.int32
    np.testing.assert_array_equal(rows["tokens"] < 0, rows["segments"] < 0)
    targets, places = [], {}
    for number, (row, segments) in enumerate(zip(rows["tokens"].tolist(), rows["segments"].tolist(), strict=True)):
        used = len([t for t in row if t >= 0])
        assert row[used:] == [-1] * (length + 1 - used), "padding is at the end"
        for place in range(used):
            document = int(np.searchsorted(firsts, row[place], side="right")) - 1
            places.setdefault(document, set()).add((number, segments[place]))
            if place and segments[place] == segments[place - 1]:
                assert row[place] == row[place - 1] + 1 and row[place] not in firsts
                targets.append(row[place])
    assert sorted(targets) == [t for t in range(sizes.sum()) if t not in firsts]
    for document, where in places.items():
        assert len(where) == max(1, -(-(sizes[document] - 1) // length)), "cut only where it is too long"
    segments = [sorted(set(row[row >= 0].tolist())) for row in rows["segments"]]
    assert all(row == list(range(len(row))) for row in segments)


def test_rows_are_random_access_and_well_filled():
    sizes = np.random.default_rng(0).geometric(1 / 30, 3000) + 1
    source, again = packed(sizes, 127), packed(sizes, 127)
    whole = everything(source)
    for i in (0, 5, len(source) - 1):
        np.testing.assert_array_equal(again[i]["tokens"], whole["tokens"][i])
    few = get_batch(source, np.array([7, 3, 7]))
    np.testing.assert_array_equal(few["segments"], whole["segments"][[7, 3, 7]])
    assert source.fill == np.mean(whole["tokens"] >= 0) > 0.99
    assert source.fingerprint() == again.fingerprint() != packed(sizes[::-1], 127).fingerprint()


@pytest.mark.parametrize(("name", "options"), [("gpt", {"heads": 2, "context": 8}), ("lstm", {})])
def test_packed_rows_have_the_loss_of_their_documents(name, options):
    """The loss of rows equals that of the documents one by one: states, attention and positions do not cross documents."""
    import jax.numpy as jnp
    from flax import nnx

    from jaxmodels.models import create
    from jaxmodels.tasks.language_model import LanguageModel

    sizes = np.array([4, 3, 9, 2, 5, 6])
    values = np.random.default_rng(0).integers(0, 11, sizes.sum())
    source = Packed(Tokens(values), np.cumsum(sizes), 8)
    model, task = create(name, 11, layers=1, width=8, **options, rngs=nnx.Rngs(0)), LanguageModel({"vocab_size": 11})

    rows, alone = everything(source), np.full((len(sizes), 9), -1)
    for row, document in zip(alone, np.split(values, np.cumsum(sizes)[:-1]), strict=True):
        row[: len(document)] = document
    assert len(source) < len(sizes)
    loss = nnx.jit(lambda model, batch: task.loss(model, batch, None)[:2])

    def filled_up(batch):  # to one shape, for one compilation
        weight = jnp.arange(len(sizes)) < len(batch["tokens"])
        return {key: np.resize(value, (len(sizes), 9)) for key, value in batch.items()} | {"weight": weight}

    one, other = (loss(model, filled_up(batch)) for batch in (rows, {"tokens": alone, "segments": np.zeros_like(alone)}))
    assert one[1] == other[1] == (sizes - 1).sum()
    np.testing.assert_allclose(one[0], other[0], rtol=1e-5)


# Files and documents


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "docs" / "deep").mkdir(parents=True)
    (tmp_path / "docs" / "b.txt").write_text("bb bb")
    (tmp_path / "docs" / "a.txt").write_text("aaaa aa")
    (tmp_path / "docs" / "deep" / "c.txt").write_text("cc ccc")
    (tmp_path / "more.jsonl").write_text('{"text": "ddd d", "id": 1}\n{"text": "eee\\n", "id": 2}\n')
    return tmp_path


def opened(source, folder, **options):
    return open_dataset(f"text:{source}", {"sequence_length": 4, "tokenizer": "byte", "holdout": 0.0} | options, str(folder))


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("docs/*.txt", "aaaa aabb bb"),
        ("docs/**/*.txt", "aaaa aabb bbcc ccc"),
        ("docs/b.txt,docs/*.txt", "bb bbaaaa aa"),
        ("more.jsonl, docs/b.txt", "ddd deee\nbb bb"),
    ],
)
def test_which_files_in_which_order(folder, source, expected):
    dataset = opened(source, folder, stride=1)
    assert list(dataset.splits) == ["train"]
    rows = everything(dataset.splits["train"])["tokens"]
    got = np.concatenate([rows[0], rows[1:, -1]])
    assert dataset.info["tokenizer"].decode(got) == expected


def test_documents_end_and_the_end_of_the_text_validates(folder):
    dataset = opened("docs/*.txt", folder, tokenizer="byte+special", holdout=0.25, sequence_length=2)
    end = dataset.info["tokenizer"].special("end")
    decode = dataset.info["tokenizer"].decode
    assert decode(stream(dataset.splits["train"])) == "aaaa aa<end>bb"[: len("aaaa aa") + 6]
    got = stream(dataset.splits["validation"])
    assert decode(got) == " bb<end>" and got[-1] == end
    separate = opened("docs/*.txt", folder, validation="more.jsonl", test="docs/deep/c.txt", sequence_length=2)
    assert decode(stream(separate.splits["validation"]) + 4) == "ddd deee\n" and decode(stream(separate.splits["test"]) + 4) == "cc ccc"


def test_documents_are_packed_whole(folder):
    dataset = opened("docs/*.txt,more.jsonl", folder, tokenizer="byte+special", packing="examples", sequence_length=15)
    rows, coder = everything(dataset.splits["train"]), dataset.info["tokenizer"]
    found = [coder.decode(row[parts == s]) for row, parts in zip(rows["tokens"], rows["segments"], strict=True) for s in range(parts.max() + 1)]
    assert sorted(found) == ["aaaa aa<end>", "bb bb<end>", "ddd d<end>", "eee\n<end>"]


def test_a_user_tokenizer_for_the_help_topics(folder):
    (folder / "t.json").write_text('{"kind": "word", "lower": false, "words": ["the", "Python"]}')
    dataset = open_dataset("python_docs", {"sequence_length": 16, "tokenizer": "t.json", "packing": "examples"}, str(folder))
    rows = everything(dataset.splits["train"])
    assert dataset.info["vocab_size"] == 6 and set(np.unique(rows["tokens"])) == {-1, 0, 2, 4, 5}
    from pydoc_data.topics import topics

    ends = sum((everything(source)["tokens"] == 2).sum() for source in dataset.splits.values())
    assert ends == len(topics), "each topic is a document"


@pytest.mark.parametrize("spec", ["bpe:270", "word:3", "character+special"])
def test_tokenizers_are_trained_on_the_training_text(folder, spec):
    (folder / "val.txt").write_text("zz zz zz zz zz zz")
    coder = opened("docs/*.txt", folder, tokenizer=spec, validation="val.txt", sequence_length=2).info["tokenizer"]
    assert coder.to_json() == opened("docs/*.txt", folder, tokenizer=spec, sequence_length=2).info["tokenizer"].to_json()
    assert "z" in opened("docs/*.txt", folder, tokenizer="character", validation="val.txt").info["tokenizer"].alphabet


BAD = {
    "an empty file": (b"", r"bad.txt: the text is empty.*on_bad_example=skip"),
    "white space": (b" \n", r"bad.txt: the text is empty"),
    "another encoding": (b"caf\xe9", r"bad.txt: not UTF-8 text: byte 3"),
    "broken JSON": (b'{"text": "a b"}\n{"text": "a', r"bad.jsonl, line 2: not JSON"),
    "no text": (b'{"text": "a b"}\n{"txt": "a"}', r"bad.jsonl, line 2: no 'text' \(data.text_column\). Did you mean 'txt'"),
    "a number": (b'{"text": 3}', r"bad.jsonl, line 1: the text is 3"),
    "an empty text": (b'{"text": "a"}\n{"text": ""}', r"bad.jsonl, line 2: the text is empty"),
    "half a character": (b'{"text": "\\ud800"}', r"bad.jsonl, line 1: the text is not UTF-8"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_documents_are_named_or_left_out(folder, what):
    content, message = BAD[what]
    name = "bad.jsonl" if "jsonl" in message else "bad.txt"
    (folder / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        opened(f"{name},docs/a.txt", folder)
    dataset = opened(f"{name},docs/a.txt", folder, on_bad_example="skip", stride=1)
    assert dataset.skipped == {"train": 1} and "1 bad example of train" in dataset.notes[0]
    good = ("a b" if b"a b" in content else "a" if b'"a"' in content and b"txt" not in content else "") + "aaaa aa"
    rows = everything(dataset.splits["train"])["tokens"]
    assert dataset.info["tokenizer"].decode(np.concatenate([rows[0], rows[1:, -1]])) == good


def test_only_bad_documents(folder):
    (folder / "bad.txt").write_text(" ")
    with pytest.raises(ConfigError, match="all 1 examples of train are bad"):
        opened("bad.txt", folder, on_bad_example="skip")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sequence_length": 0}, "sequence_length and stride must be at least 1"),
        ({"holdout": 1.0}, "config.data.holdout must be"),
        ({"packing": "examples", "stride": 2}, "config.data.stride"),
        ({"validation": "no.txt"}, "config.data.validation: there is no file no.txt nor .*no.txt"),
        ({"validation": "docs"}, "config.data.validation: .*docs is a folder; give a pattern of its files: docs/../.*txt"),
        ({"sequence_length": 400}, "docs/a.txt has 7 tokens in train: less than one window of sequence_length=400"),
        ({"tokenizer": "run"}, "config.data.tokenizer: .*a.txt: character 'a' .at 0. is not one of"),
    ],
)
def test_options_that_are_wrong(folder, options, message):
    (folder / "run").mkdir()
    (folder / "run" / "tokenizer.json").write_text('{"kind": "character", "alphabet": "bc"}')
    with pytest.raises(ConfigError, match=message):
        opened("docs/a.txt", folder, **options)


# The cache


@pytest.fixture
def cached(folder, monkeypatch):
    monkeypatch.setenv("JAXMODELS_CACHE_DIR", str(folder / "cache"))
    monkeypatch.setattr(text, "CACHE_FROM", 0)
    monkeypatch.setattr(text, "CACHE_QUICK_FROM", 0)
    return folder


def same(one, other):
    assert one.info["tokenizer"].to_json() == other.info["tokenizer"].to_json()
    for split, source in one.splits.items():
        assert source.fingerprint() == other.splits[split].fingerprint()
        for key, value in everything(source).items():
            np.testing.assert_array_equal(everything(other.splits[split])[key], value)


OPTIONS = {"tokenizer": "word:6", "sequence_length": 2, "holdout": 0.3}


@pytest.mark.parametrize("options", [OPTIONS, OPTIONS | {"packing": "examples"}, {"tokenizer": "byte"}, {"tokenizer": "bpe:300"}])
def test_cached_tokens_equal_the_tokenised_ones(cached, monkeypatch, options):
    files = "docs/**/*.txt,more.jsonl"
    with monkeypatch.context() as without:
        without.setattr(text, "CACHE_FROM", 1 << 30)
        without.setattr(text, "CACHE_QUICK_FROM", 1 << 30)
        plain = opened(files, cached, **options)
    first = opened(files, cached, **options)
    if options["tokenizer"] != "byte":  # it is cheap
        monkeypatch.setattr(text, "make_tokenizer", lambda *_: pytest.fail("made again"))
    monkeypatch.setattr(text, "survey", lambda *_: pytest.fail("read again"))
    second = opened(files, cached, **options)
    same(first, second)
    for split, source in plain.splits.items():
        np.testing.assert_array_equal(everything(source)["tokens"], everything(second.splits[split])["tokens"])
    assert "written to" in "".join(first.notes) and "read from" in "".join(second.notes)
    assert {f.tokens.values.dtype.itemsize for f in second.splits.values()} == {2 if "bpe" in options["tokenizer"] else 1}
    again = pickle.loads(pickle.dumps(second.splits["train"]))
    np.testing.assert_array_equal(everything(again)["tokens"], everything(first.splits["train"])["tokens"])
    assert isinstance(again.tokens.values, np.memmap), "a worker maps the file itself"


def test_another_text_or_tokenizer_is_another_entry(cached):
    def entries():
        return len(list((cached / "cache" / "tokens").iterdir()))

    opened("docs/*.txt", cached, **OPTIONS)
    for number, (files, options) in enumerate([("docs/*.txt", {"tokenizer": "word:5"}), ("docs/*.txt", {"holdout": 0.4}), ("more.jsonl", {})], 2):
        opened(files, cached, **OPTIONS | options)
        assert entries() == number
    opened("docs/*.txt", cached, **OPTIONS | {"sequence_length": 3, "packing": "examples"})
    assert entries() == 4
    (cached / "docs" / "a.txt").write_text("aaaa ab")
    opened("docs/*.txt", cached, **OPTIONS)
    assert entries() == 5


@pytest.mark.parametrize("damage", ["half", "flipped", "header", "no header", "gone", "ends"])
def test_a_damaged_entry_is_written_again(cached, damage):
    good = opened("docs/*.txt", cached, **OPTIONS)
    (entry,) = (cached / "cache" / "tokens").iterdir()
    file = entry / {"header": "header.json", "no header": "header.json", "gone": "train.tokens", "ends": "train.ends"}.get(damage, "train.tokens")
    content = bytearray(file.read_bytes())
    content[0] ^= 1
    if damage in ("gone", "no header"):
        file.unlink()
    else:
        file.write_bytes({"half": content[: len(content) // 2], "header": b'{"dtype"'}.get(damage, content))
    anew = opened("docs/*.txt", cached, **OPTIONS)
    assert any("is damaged" in note for note in anew.notes) and any("written to" in note for note in anew.notes)
    for split, source in anew.splits.items():
        assert source.tokens.path.exists() and len(source) == len(good.splits[split])
    assert "read from" in opened("docs/*.txt", cached, **OPTIONS).notes[-1]
    assert os.listdir(cached / "cache" / "tokens") == [entry.name]


def test_without_a_writable_folder_it_warns_and_continues(cached, monkeypatch):
    good = opened("docs/*.txt", cached, **OPTIONS)
    (cached / "file").write_text("")
    monkeypatch.setenv("JAXMODELS_CACHE_DIR", str(cached / "file"))
    dataset = opened("docs/*.txt", cached, **OPTIONS)
    assert "no cache of tokens" in dataset.fallbacks[0] and "JAXMODELS_CACHE_DIR" in dataset.fallbacks[0]
    same(good, dataset)


CHILD = """
import sys, time
from jaxmodels.data.registry import open_dataset
from jaxmodels.data.sources import documents, text
from jaxmodels.data import cache, tokens
text.CACHE_FROM = 0
{extra}
dataset = open_dataset("text:" + sys.argv[1], {options!r}, None)
print(dataset.splits["train"].fingerprint(), len(dataset.splits["train"]), dataset.splits["train"].get_batch([0, 1])["tokens"].tolist())
"""


def child(folder, extra=""):
    environment = os.environ | {"JAXMODELS_CACHE_DIR": str(folder / "cache"), "PYTHONPATH": str(Path(__file__).parent.parent)}
    code = CHILD.format(extra=extra, options={"sequence_length": 8, "tokenizer": "bpe:300"})
    return warm_python.Popen(["-c", code, str(folder / "long.txt")], env=environment, stdout=subprocess.PIPE, text=True)


def test_two_processes_at_once(cached):
    (cached / "long.txt").write_text("the cat sat on the mat\n" * 2000)
    # Each process writes its entry, and waits with renaming it until the other has written its own.
    wait = """
publish = cache._publish
def together(temporary, folder, is_whole):
    while len([t for t in folder.parent.glob("*.tmp")] + [f for f in [folder] if f.exists()]) < 2:
        time.sleep(0.01)
    publish(temporary, folder, is_whole)
cache._publish = together
"""
    processes = [child(cached, wait) for _ in range(2)]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0] and outputs[0] == outputs[1] and outputs[0]
    (entry,) = (cached / "cache" / "tokens").iterdir()
    assert tokens.read_cache(entry.name)[0] is not None


def test_a_killed_build_leaves_no_readable_entry(cached):
    (cached / "long.txt").write_text("the cat sat on the mat\n" * 2000)
    for place in ("checksum", "_publish"):  # with half of the descriptions written; with all written, but not renamed yet
        killed = child(cached, f"import os, signal\ncache.{place} = lambda *_: os.kill(os.getpid(), signal.SIGKILL)")
        killed.communicate(timeout=120)
        assert killed.returncode == -signal.SIGKILL
    left = list((cached / "cache" / "tokens").iterdir())
    assert len(left) == 2 and all(path.suffix == ".tmp" for path in left)
    os.utime(left[0], (time.time() - 10**6,) * 2)
    dataset = opened("long.txt", cached, sequence_length=8, tokenizer="bpe:300")
    assert not any("damaged" in note for note in dataset.notes) and "written to" in dataset.notes[-1]
    assert not left[0].exists() and left[1].exists(), "what was abandoned long ago is removed"


def test_a_run_saves_its_tokenizer_and_records_fallbacks(cached, monkeypatch):

    (cached / "long.txt").write_text("the cat sat on the mat\n" * 50)
    monkeypatch.setenv("JAXMODELS_CACHE_DIR", str(cached / "long.txt"))
    data = {"source": "text:long.txt", "sequence_length": 8, "tokenizer": "word:7", "batch_size": 4}
    model = {"name": "lstm", "layers": 1, "width": 4}
    config = small_configs.config(small_configs.LSTM, data=data, model=model, training__steps=1, checkpoint__every=1)
    jaxmodels.train(config, str(cached / "run"), data_dir=str(cached), quiet=True)
    manifest = RunFolder(cached / "run").manifest()
    assert any("no cache of tokens" in fallback for fallback in manifest["fallbacks"])
    again = opened("long.txt", cached, tokenizer="run")
    assert again.info["vocab_size"] == 4 + 5 and jaxmodels.load(str(cached / "run")).tokenizer.to_json() == again.info["tokenizer"].to_json()
    assert jaxmodels.train(config, str(cached / "run"), data_dir=str(cached), quiet=True).step == 1, "trained again, the tokenizer is the same"
    (cached / "long.txt").write_text("the cat sat on the hat\n" * 50)
    with pytest.raises(ConfigError, match="data of this run has changed"):
        jaxmodels.train(config, str(cached / "run"), data_dir=str(cached), quiet=True)


# Long files


LONG = "the cat sat on the mat, naïve café\n\n  def f(x):\treturn x 東京 is a city 🙂\n" * 40 + "no" + "東" * 90 + " end"


@pytest.mark.parametrize("options", [{}, {"packing": "examples"}, {"holdout": 0.0}])
@pytest.mark.parametrize("spec", ["bpe:300", "word-lower:20", "character+special", "byte", "wordpiece"])
def test_a_file_that_is_read_in_parts_has_the_tokens_of_the_whole(tmp_path, monkeypatch, spec, options):
    (tmp_path / "long.txt").write_bytes(b"\xef\xbb\xbf" + LONG.encode())
    (tmp_path / "short.txt").write_text("a cat")
    if spec == "wordpiece":
        (tmp_path / "bert.json").write_text(tokenizer_folders.wordpiece().to_str())
        spec = str(tmp_path / "bert.json")
    keys = {"sequence_length": 16, "tokenizer": spec, **options}
    monkeypatch.setattr(tokens, "_TOGETHER", 50)
    source = f"text:{tmp_path}/long.txt,{tmp_path}/short.txt"
    whole = open_dataset(source, keys, None)
    monkeypatch.setattr(documents, "_PART", 31)
    parts = list(documents.read_documents([str(tmp_path / "long.txt")], "text"))
    assert len(parts) > 50 and "".join(part.text for part in parts) == LONG and [part.whole for part in parts] == [False] * (len(parts) - 1) + [True]
    same(whole, open_dataset(source, keys, None))


def test_bytes_at_the_end_of_a_long_file_that_are_not_utf8(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "_PART", 31)
    (tmp_path / "a.txt").write_bytes(LONG.encode() + b"\xff")
    (tmp_path / "b.txt").write_text("the cat sat")
    keys = {"sequence_length": 4, "tokenizer": "byte", "holdout": 0.0}
    with pytest.raises(ConfigError, match=rf"a\.txt: not UTF-8 text: byte {len(LONG.encode())}: invalid start byte"):
        open_dataset(f"text:{tmp_path}/*.txt", keys, None)
    dataset = open_dataset(f"text:{tmp_path}/*.txt", keys | {"on_bad_example": "skip"}, None)
    assert dataset.skipped == {"train": 1} and bytes(stream(dataset.splits["train"]).tolist()) == b"the cat sat"[:9]
