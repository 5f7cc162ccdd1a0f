"""Rows that stay in their files: found by an index that is built once, the same as rows read whole by Python's own modules."""

import ast
import concurrent.futures
import csv
import errno
import gzip
import json
import os
import pickle
import re
import threading
import time
import zlib

import numpy as np
import pytest
from conftest import ROOT
from indexed_rows import TEXT, assert_same, examples, records

from jaxmodels import config as config_lib
from jaxmodels.data import access, compressed, groups, index, inspect, loader, order, reading
from jaxmodels.data.holdout import Draw, Part
from jaxmodels.data.registry import open_dataset, resolve_source
from jaxmodels.data.skipping import BadExample
from jaxmodels.data.source import get_batch
from jaxmodels.errors import ConfigError

pytestmark = pytest.mark.usefixtures("index_cache")


def as_lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def zstd(content):
    zstandard = pytest.importorskip("zstandard")
    return zstandard.ZstdCompressor().compress(content)


def members(content, compress, size=700):
    """Compress in several frames, cut anywhere."""
    return b"".join(compress(content[i : i + size]) for i in range(0, len(content), size))


FORMS = {
    "plain": (".jsonl", lambda content: content),
    "no last line break": (".jsonl", lambda content: content[:-1]),
    "gzip": (".jsonl.gz", gzip.compress),
    "gzip members": (".jsonl.gz", lambda content: members(content, gzip.compress) + b"\0" * 100),
    "zstd": (".jsonl.zst", zstd),
    "zstd frames": (".jsonl.zst", lambda content: members(content, zstd)),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("copied", (False, True))
def test_lines_are_those_that_are_read_whole(form, copied, tmp_path, monkeypatch):
    suffix, encode = FORMS[form]
    if copied:  # frames that are too large to be read in place
        monkeypatch.setattr(compressed, "FRAME", 100)
        monkeypatch.setattr(compressed, "BLOCK", 64)
    rows = records(150)
    for name, part in (("a", rows[:90]), ("b", []), ("c", rows[90:])):
        (tmp_path / f"{name}.jsonl").write_bytes(as_lines(part))
        (tmp_path / f"big-{name}{suffix}").write_bytes(encode(as_lines(part)))
    whole = open_dataset(f"jsonl:{tmp_path}/[abc].jsonl", TEXT | {"indexed": False}, None)
    dataset = open_dataset(f"jsonl:{tmp_path}/big-*{suffix}", TEXT | {"indexed": True, "group_cache_mb": 0.001}, None)
    assert_same(dataset.splits, whole.splits)
    assert dataset.info["tokenizer"].to_json() == whole.info["tokenizer"].to_json() and dataset.info["labels"] == whole.info["labels"]
    assert dataset.splits["train"].rows[149].where == f"{tmp_path}/big-c{suffix}, line 60"
    groups = dataset.splits["train"].groups()
    assert (groups is not None) == (suffix != ".jsonl") and (groups is None or groups.ends[-1] == len(dataset.splits["train"]))


def test_tables_are_those_that_are_read_whole(tmp_path):
    rows = [(f'he said "{i}",\nand went', str(i % 3)) for i in range(40)]
    with open(tmp_path / "x.csv", "w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows([("text", "label"), *rows[:25]])
    with open(tmp_path / "y.csv", "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([("label", "text"), *((b, a) for a, b in rows[25:])])
    (tmp_path / "x.tsv").write_bytes(b"".join(f"{b}\tt {a[:9]}\r\n".encode() for a, b in rows))
    for source, more in ((f"csv_rows:{tmp_path}/?.csv", {}), (f"tsv:{tmp_path}/x.tsv", {"text_column": 1, "label_column": 0})):
        whole, dataset = (open_dataset(source, TEXT | more | {"indexed": indexed}, None) for indexed in (False, True))
        assert_same(dataset.splits, whole.splits)
    assert open_dataset(f"csv_rows:{tmp_path}/?.csv", TEXT | {"indexed": True}, None).splits["train"].rows[25].where == f"{tmp_path}/y.csv, row 1"


def test_the_draw_is_that_of_a_sort():
    """Held out are the rows with the smallest of PCG64's numbers."""
    for count, share in ((1, 0.5), (1023, 0.1), (1025, 0.001), (5000, 0.3)):
        held = np.zeros(count, bool)
        held[np.argsort(np.random.PCG64(0).random_raw(count), kind="stable")[: max(1, round(share * count))]] = True
        draw = Draw(count, share)
        np.testing.assert_array_equal(draw.mask(0, count), held)
        for side in (False, True):
            rows, part = np.flatnonzero(held == side), Part(draw, side)
            assert [part.row(i) for i in range(0, len(part), 7)] == rows[::7].tolist() and len(part) == len(rows)
            assert part.before(np.array([0, count // 2, count])).tolist() == [(rows < edge).sum() for edge in (0, count // 2, count)]


def test_an_index_is_built_once(tmp_path, index_cache, monkeypatch):
    (tmp_path / "x.jsonl").write_bytes(as_lines(records(50)))
    options = TEXT | {"indexed": True, "tokenizer": "bpe:300"}
    first = open_dataset(f"jsonl:{tmp_path}/x.jsonl", options, None)
    assert "index written to" in first.notes[0]
    (entry,) = index_cache.iterdir()
    monkeypatch.setattr(access, "blocks", None)  # nothing reads the file from its start
    monkeypatch.setattr("jaxmodels.data.sources.row_index.RecordRows.scan", None)  # or row by row, for labels and words
    again = open_dataset(f"jsonl:{tmp_path}/x.jsonl", options, None)
    assert "index read from" in again.notes[0]
    assert_same(first.splits, again.splits)
    assert_same(pickle.loads(pickle.dumps(first.splits)), again.splits)  # as worker processes get them
    assert first.splits["train"].fingerprint() == again.splits["train"].fingerprint() != first.splits["validation"].fingerprint()


DAMAGE = {
    "header": lambda entry: (entry / "header.json").write_text("{"),
    "array": lambda entry: (entry / "start.bin").write_bytes(b"\1" + (entry / "start.bin").read_bytes()[1:]),
    "short": lambda entry: (entry / "start.bin").write_bytes((entry / "start.bin").read_bytes()[:-8]),
    "gone": lambda entry: (entry / "start.bin").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_index_is_built_again(damage, tmp_path, index_cache):
    (tmp_path / "x.jsonl").write_bytes(as_lines(records(50)))
    source, options = f"jsonl:{tmp_path}/x.jsonl", TEXT | {"indexed": True}
    good = examples(open_dataset(source, options, None), "train")
    (entry,) = index_cache.iterdir()
    DAMAGE[damage](entry)
    again = open_dataset(source, options, None)
    assert again.notes[0].startswith("warning: ") and "is damaged" in again.notes[0] and "built again" in again.notes[0]
    np.testing.assert_array_equal(good["tokens"], examples(again, "train")["tokens"])
    assert "index read" in open_dataset(source, options, None).notes[0] and [path.name for path in index_cache.iterdir()] == [entry.name]


def test_a_file_that_changes(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(as_lines(records(50)))
    source, options = f"jsonl:{path}", TEXT | {"indexed": True}
    train = open_dataset(source, options, None).splits["train"]
    path.write_bytes(as_lines(records(60)))
    with pytest.raises(access.Changed, match="x.jsonl has changed since its index was built"):
        train[0]
    dataset = open_dataset(source, options, None)
    assert "x.jsonl has changed; the index is built again" in dataset.notes[0]
    assert sum(map(len, dataset.splits.values())) == 60


def test_without_a_cache_it_warns(tmp_path, monkeypatch):
    (tmp_path / "x.jsonl").write_bytes(as_lines(records(50)))
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("JAXMODELS_CACHE_DIR", str(tmp_path / "file"))
    dataset = open_dataset(f"jsonl:{tmp_path}/x.jsonl", TEXT | {"indexed": True}, None)
    assert "no cache of indexes" in dataset.fallbacks[0] and "JAXMODELS_CACHE_DIR" in dataset.fallbacks[0]
    assert len(pickle.loads(pickle.dumps(dataset.splits["train"]))) == 45


def test_a_full_disk_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "x.jsonl").write_bytes(as_lines(records(50)))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("jaxmodels.data.index.Writer.append", full)
    with pytest.raises(ConfigError, match="the disk is full.*JAXMODELS_CACHE_DIR"):
        open_dataset(f"jsonl:{tmp_path}/x.jsonl", TEXT | {"indexed": True}, None)


def test_damaged_compressed_files_are_named(tmp_path):
    content = gzip.compress(np.random.default_rng(0).bytes(100_000))
    for name, damaged, message in (
        ("short", content[:-50], "is truncated: it ends after"),
        ("bits", content[:50_000] + b"\xff" * 10 + content[50_010:], "is damaged: it cannot be decompressed"),
        ("text", b"no gzip", "is damaged: it cannot be decompressed"),
    ):
        (tmp_path / f"{name}.jsonl.gz").write_bytes(damaged)
        with pytest.raises(ConfigError, match=f"{name}.jsonl.gz: the file {message}"):
            open_dataset(f"jsonl:{tmp_path}/{name}.jsonl.gz", TEXT, None)
    with pytest.raises(ConfigError, match="indexed must not be false.*compressed"):
        open_dataset(f"jsonl:{tmp_path}/short.jsonl.gz", TEXT | {"indexed": False}, None)


def test_bad_rows_are_named_or_weigh_nothing(tmp_path):
    lines = as_lines(records(20)).splitlines(keepends=True)
    lines[4] = b'{"text": 3, "label": "odd"}\n'
    (tmp_path / "x.jsonl").write_bytes(b"".join(lines))
    options = TEXT | {"indexed": True, "holdout": 0.0}
    with pytest.raises(BadExample, match="x.jsonl, line 5: 'text' is 3, not a text"):
        examples(open_dataset(f"jsonl:{tmp_path}/x.jsonl", options, None), "train")
    skipped = examples(open_dataset(f"jsonl:{tmp_path}/x.jsonl", options | {"on_bad_example": "skip"}, None), "train")
    assert np.flatnonzero(skipped["skipped"]).tolist() == [4] and skipped["tokens"].shape == (20, 6)


def test_windows_of_groups_are_an_order(tmp_path, monkeypatch):
    """Each epoch has every example once; a window has few groups; and a position needs no other."""
    sizes = np.random.default_rng(0).integers(0, 30, 40)
    ends = np.cumsum(sizes)
    windows = order.Windows(ends, 3, seed=5)
    epochs = [windows.order(np.arange(ends[-1]), epoch) for epoch in range(3)]
    for one in epochs:
        np.testing.assert_array_equal(np.sort(one), np.arange(ends[-1]))
        groups = np.searchsorted(ends, one, side="right")
        runs = [np.flatnonzero(groups == group) for group in np.unique(groups)]
        assert max(run.max() - run.min() for run in runs) < 3 * sizes.max()
        assert np.mean(np.diff(groups) != 0) > 0.5, "the groups of a window are mixed"
    assert np.mean(epochs[0] == epochs[1]) < 0.1
    anywhere = pickle.loads(pickle.dumps(windows))
    np.testing.assert_array_equal(anywhere.order(np.array([400, 7, 123]), 2), epochs[2][[400, 7, 123]])


def test_a_window_decodes_each_block_once(tmp_path, monkeypatch):
    monkeypatch.setattr(compressed, "FRAME", 100)
    monkeypatch.setattr(compressed, "BLOCK", 256)
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(as_lines(records(300))))
    train = open_dataset(f"jsonl:{tmp_path}/x.jsonl.gz", TEXT | {"group_cache_mb": 8 * 256 / 2**20, "holdout": 0.2}, None).splits["train"]
    batches = loader.TrainingBatches(train, 10, 24, seed=0, shuffle=True, window=4)
    late = batches[20]["tokens"]
    decoded = []
    decompress = zlib.decompress
    monkeypatch.setattr(zlib, "decompress", lambda content: decoded.append(content) or decompress(content))
    seen = [batches[step] for step in range(24)]
    np.testing.assert_array_equal(seen[20]["tokens"], late)
    blocks = len(train.groups().ends)
    assert len(decoded) == len(set(decoded)) == blocks
    np.testing.assert_array_equal(np.sort(np.concatenate([batch["tokens"] for batch in seen]), 0), np.sort(examples({"train": train}, "train")["tokens"], 0))
    fit = train.groups().fit
    assert 8 <= fit <= 9
    order.check_window(train, fit, "x")
    with pytest.raises(ConfigError, match=f"shuffle_window={fit + 1}: {fit} of the largest groups of x fit in data.group_cache_mb"):
        order.check_window(train, fit + 1, "x")
    (tmp_path / "x.jsonl").write_bytes(as_lines(records(30)))
    plain = open_dataset(f"jsonl:{tmp_path}/x.jsonl", TEXT | {"indexed": True}, None).splits["train"]
    with pytest.raises(ConfigError, match="shuffle_window: x has no groups"):
        order.check_window(plain, 2, "x")


@pytest.mark.parametrize("suffix, encode", ((".gz", gzip.compress), (".zst", zstd)))
def test_compressed_texts_for_language_models(suffix, encode, tmp_path):
    content = as_lines(records(40))
    (tmp_path / "x.jsonl").write_bytes(content)
    (tmp_path / f"y.jsonl{suffix}").write_bytes(encode(content))
    plain, compressed_ = (open_dataset(f"text:{tmp_path}/{name}", {"sequence_length": 8}, None) for name in ("x.jsonl", f"y.jsonl{suffix}"))
    assert_same(plain.splits, compressed_.splits)


def test_two_threads_build_one_index(tmp_path, index_cache, monkeypatch):
    """Both write an entry; one of them stays, and both read the same rows."""
    (tmp_path / "x.jsonl").write_bytes(as_lines(records(50)))
    together, build = threading.Barrier(2, timeout=30), index.fill_entry
    monkeypatch.setattr(index, "fill_entry", lambda *args, **keys: (together.wait(), build(*args, **keys))[1])
    options = TEXT | {"indexed": True, "labels": ("odd", "even")}
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        one, other = pool.map(lambda _: open_dataset(f"jsonl:{tmp_path}/x.jsonl", options, None), range(2))
    assert_same(one.splits, other.splits)
    assert len(list(index_cache.iterdir())) == 1 and not list(index_cache.glob("*.tmp"))


def test_the_cache_of_groups_is_bounded():
    """It holds no more than its limit, decodes few groups at once, and a group that several threads want once."""
    cache, decoding, most, decoded = groups.GroupCache(50), 0, 0, []

    def decode(key):
        nonlocal decoding, most
        with lock:
            decoding, most = decoding + 1, max(most, decoding + 1)
            decoded.append(key)
        time.sleep(0.002)
        with lock:
            decoding -= 1
        return f"group {key}", 10

    lock = threading.Lock()
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        assert list(pool.map(lambda i: cache.get(i, lambda: decode(i)), range(40))) == [f"group {i}" for i in range(40)]
        assert len(decoded) == 40 and most <= 4 and cache._size == 50 and len(cache._groups) == 5
        decoded.clear()
        assert set(pool.map(lambda _: cache.get("one", lambda: decode("one")), range(16))) == {"group one"} and decoded == ["one"]
    assert cache.get("large", lambda: ("large", 51)) == "large" and cache._size == 50


def test_an_error_of_the_disk_is_retried(tmp_path, monkeypatch):
    (tmp_path / "x.jsonl").write_bytes(as_lines(records(50)))
    train = open_dataset(f"jsonl:{tmp_path}/x.jsonl", TEXT | {"indexed": True, "on_bad_example": "skip"}, None).splits["train"]
    expected, pread, failures = get_batch(train, np.arange(5)), os.pread, iter((True, True))

    def fails(*arguments):
        if next(failures, False):
            raise OSError(errno.EIO, "Input/output error")
        return pread(*arguments)

    monkeypatch.setattr(os, "pread", fails)
    monkeypatch.setattr(reading, "RETRY_SECONDS", (0.0, 0.0, 0.0))
    np.testing.assert_array_equal(reading.read(train, np.arange(5), "x")["tokens"], expected["tokens"])
    assert not expected["skipped"].any() and next(failures, None) is None


def test_jaxmodels_data_describes_indexed_rows(tmp_path):
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(as_lines(records(50))))
    section = TEXT | {"source": f"jsonl:{tmp_path}/x.jsonl.gz"}
    report = inspect.inspect({"data": section}, examples=2)
    assert report["splits"]["train"]["examples"] == 45 and report["splits"]["validation"]["labels"].keys() == {"even", "odd"}
    assert report["examples"][0]["tokens"].startswith("w0 number 0") and "lengths" in report["splits"]["train"]


def test_the_sections_in_the_documentation_are_valid():
    page = (ROOT / "docs" / "data.md").read_text().partition("## Large data")[2]
    sections = re.findall(r"^data = (\{.*\})$", page, re.M)
    assert len(sections) == 3
    for section in sections:
        resolve_source(ast.literal_eval(section), config_lib.fields(loader.Loading))


@pytest.mark.slow
@pytest.mark.parametrize("name", ("x.jsonl.gz", "x.jsonl"))
def test_worker_processes_read_the_same_batches(name, tmp_path):
    (tmp_path / name).write_bytes((gzip.compress if name.endswith("gz") else bytes)(as_lines(records(200))))
    train = open_dataset(f"jsonl:{tmp_path}/{name}", TEXT | {"indexed": True}, None).splits["train"]
    batches = loader.TrainingBatches(train, 8, 30, seed=2, shuffle=True, window=2 if name.endswith("gz") else None)
    expected = [batches[step]["tokens"] for step in range(12, 30)]
    for threads, workers in ((4, 0), (0, 2)):
        with loader.read_ahead(batches, start=12, threads=threads, workers=workers, buffer=4) as stream:
            np.testing.assert_array_equal([batch["tokens"] for batch in stream], expected)
