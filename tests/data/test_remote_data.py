"""Data in other places than a folder: the same examples, in the same order, by an address and relative to a data directory that is one."""

import functools
import http.server
import threading

import pytest
import remote_data
from indexed_rows import TEXT, assert_same
from remote_data import CASES, NEEDS, opened, png

from jaxmodels.data import access, copies, folders, reading
from jaxmodels.data.registry import open_dataset
from jaxmodels.data.skipping import BadExample
from jaxmodels.data.train_tokenizer import train_tokenizer
from jaxmodels.errors import ConfigError, RunError

fsspec = pytest.importorskip("fsspec")
pytestmark = pytest.mark.usefixtures("index_cache")
data, root = remote_data.data, remote_data.root  # fixtures


@pytest.mark.parametrize("name", CASES)
def test_the_same_examples_from_every_place(name, root, data, monkeypatch):
    pytest.importorskip(NEEDS.get(name, "numpy"))
    monkeypatch.setattr("jaxmodels.data.sources.text.CACHE_FROM", 0)
    local = opened(name, data, data)
    for relative in (False, True):
        remote = opened(name, root, data, relative)
        assert_same(remote.splits, local.splits)
        checksums = [[part.fingerprint() for part in dataset.splits.values() if hasattr(part, "fingerprint")] for dataset in (local, remote)]
        infos = [{key: value for key, value in dataset.info.items() if key != "tokenizer"} for dataset in (local, remote)]
        assert checksums[0] == checksums[1] and infos[0] == infos[1]


def test_patterns_match_what_they_match_on_a_disk(root, data):
    for pattern in (
        "docs/**/*.txt",
        "docs/*",
        "docs/**",
        "docs/.*",
        "docs/.d/*",
        "**/*.png",
        "pictures/*/cat/[0-2].png",
        "pictures/tr*/*/more/*",
        "*/a.tx?",
        "x/*",
    ):
        found = folders.glob(access.join(access.address(str(root)), pattern))
        assert [file.removeprefix(access.address(str(root))) for file in found] == [file.removeprefix(str(data)) for file in folders.glob(f"{data}/{pattern}")]


def test_tokenizers_are_trained_on_remote_files(root, data, tmp_path):
    here, there = (train_tokenizer(f"{place}/docs/**/*.txt", 280, str(tmp_path / f"{i}.json")) for i, place in enumerate((data, root)))
    assert (tmp_path / "0.json").read_text() == (tmp_path / "1.json").read_text() and here.split(":", 1)[1] == there.split(":", 1)[1]


def test_what_is_missing_is_named_by_its_address(root, data):
    at = access.address(str(root))
    for source, options in {"images": {"size": 4}, "hf": TEXT, "tfds": {}, "csv": CASES["csv"][2]}.items():
        with pytest.raises(ConfigError, match=rf"there is no .*{at}/.*none"):
            open_dataset(f"{source}:none", options, str(root))
    for source in ("tsv", "csv_rows", "jsonl", "parquet", "webdataset", "array_record", "conll"):
        with pytest.raises(ConfigError, match=rf"there is no file or folder none.x nor {at}/none.x"):
            open_dataset(f"{source}:none.x", TEXT, str(root))
    with pytest.raises(ConfigError, match=rf"there is no file none.txt nor {at}/none.txt"):
        open_dataset("text:valid.txt,none.txt", {"sequence_length": 8}, str(root))
    with pytest.raises(ConfigError, match=f"there is no file {at}/none.jinja"):
        open_dataset(f"chat:{data}/talks.jsonl", {"sequence_length": 9, "tokenizer": f"hf:{data}/model", "template": f"{root}/none.jinja"}, None)
    with pytest.raises(ConfigError, match=r"data.validation: there is no file .*/none.tsv"):
        open_dataset("tsv:tsv", TEXT | {"validation": "none.tsv"}, str(root))


@pytest.mark.parametrize(
    ("source", "data_dir", "message"),
    [
        ("text:gcs://bkt/x.txt", None, "config.data.source=gcs://bkt/x.txt: did you mean gs://bkt/x.txt"),
        ("images:s3a://bkt/x", None, "did you mean s3://bkt/x"),
        ("text:file://tmp/x", None, "three slashes and no host: file:///tmp/x"),
        ("csv:x.csv", "gs:/bkt", "--data_dir=gs:/bkt: did you mean gs://bkt"),
        ("text:nothing-like-it://x.txt", None, "nothing-like-it://: Protocol not known"),
    ],
)
def test_a_wrong_address_is_corrected(source, data_dir, message):
    options = {"images": {"size": 4}, "csv": CASES["csv"][2]}.get(source.partition(":")[0], {"sequence_length": 8})
    with pytest.raises(ConfigError, match=message):
        open_dataset(source, options, data_dir)


@pytest.fixture
def store():
    """The file system of `memory://`, with a folder of images of its own."""
    system = fsspec.filesystem("memory")
    for kind in ("cat", "dog"):
        for i in range(3):
            system.pipe(f"/own/{kind}/{i}.png", png(i))
    yield system
    system.rm("/own", recursive=True)


def pictures(**options):
    return open_dataset("images:memory://own", {"size": 4, "holdout": 0.0} | options, None)


def test_an_index_of_images_notices_one_that_is_replaced(store):
    first = pictures()
    assert "index written" in first.notes[0] and "index read" in pictures().notes[0]
    store.pipe("/own/cat/1.png", png(31))
    changed = pictures()
    assert "has changed; the index is built again" in changed.notes[0] and "index read" in pictures().notes[0]
    assert [pictures.splits["train"][1]["image"].max() for pictures in (first, changed)] == [7 * 31, 7 * 31]  # a run does not notice
    store.pipe("/own/dog/9.png", png(9))
    assert len(pictures().splits["train"]) == 7


def test_images_that_are_none_or_are_missing_are_named(store):
    store.pipe("/own/cat/2.txt", b"no image")
    with pytest.raises(BadExample, match=r"memory://own/cat/2.txt: it is no image"):
        pictures()
    store.pipe("/own/cat/2.txt", b"")
    with pytest.raises(BadExample, match=r"memory://own/cat/2.txt: the file is empty"):
        pictures()
    store.rm("/own/cat/2.txt")
    dataset, skipping = pictures(), pictures(on_bad_example="skip")
    store.rm("/own/dog/0.png")
    with pytest.raises(BadExample, match=r"memory://own/dog/0.png: cannot be decoded as an image: \[Errno 2\] No such file or directory"):
        dataset.splits["train"][3]
    assert [int(row["skipped"]) for row in skipping.splits["train"]] == [0, 0, 0, 1, 0, 0]
    assert reading.is_unavailable(PermissionError(13, "denied", "gs://bkt/x")) and not reading.is_unavailable(FileNotFoundError(2, "none", "gs://bkt/x"))


def test_rows_on_a_disk_name_images_elsewhere(store, tmp_path):
    (tmp_path / "train.csv").write_text("image,label\n" + "".join(f"memory://own/{kind}/{i}.png,{kind}\n" for kind in ("cat", "dog") for i in range(3)))
    options = {"image_column": "image", "size": 4, "holdout": 0.0}
    for indexed in (False, True):
        rows = open_dataset(f"csv_rows:{tmp_path}", options | {"indexed": indexed, "text_column": None}, None)
        assert_same(rows.splits, pictures().splits)


def test_a_copy_is_made_once_and_anew_when_the_file_changes(store, capfd, index_cache):
    store.pipe("/own/a.txt", b"one text of a cat")
    for content, copied in ((b"one text of a cat", True), (b"one text of a cat", False), (b"another text of a dog", True)):
        if copied:
            store.pipe("/own/a.txt", content)
        (path,) = copies.keep(["memory://own/a.txt"])
        assert access.open_file(path).read() == content and ("copied 1 file, 0.0 MiB, of memory://own, to " in capfd.readouterr().err) == copied
    with pytest.raises(ConfigError, match=r"8 files, 0.0 MiB, of memory://own: they are read from a disk, and .* has 0.0 MiB free. Set JAXMODELS_CACHE_DIR"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("shutil.disk_usage", lambda place: type("Usage", (), {"free": 5}))
            store.pipe("/own/b.txt", b"b" * 9)
            copies.keep_folder("memory://own")
    folder = copies.keep_folder("memory://own")
    assert sorted(folders.glob(f"{folder}/**/*")) == sorted(
        f"{folder}/{name}" for name in ("a.txt", "b.txt", *(f"{k}/{i}.png" for k in ("cat", "dog") for i in range(3)))
    )
    assert not list(index_cache.parent.glob("copies/*/*.part"))


def test_copies_that_cannot_be_written_or_are_cut_are_one_line(store, tmp_path, monkeypatch, index_cache):
    store.pipe("/own/a.txt", b"one text of a cat")
    monkeypatch.setattr(access, "blocks", lambda path: iter([b"one text"]))
    with pytest.raises(reading.ReadError, match="memory://own/a.txt has changed"):
        copies.keep(["memory://own/a.txt"])
    assert not [path for path in index_cache.parent.rglob("*") if path.is_file()]
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("JAXMODELS_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match=r"file/copies/.* cannot be written \(Not a directory\). Set JAXMODELS_CACHE_DIR to a folder with room for 1 file"):
        copies.keep(["memory://own/a.txt"])


def test_files_of_a_web_server(data):
    """A server of files says sizes and times of change; it has no folders, and this one sends no parts of files."""
    pytest.importorskip("aiohttp")
    handler = functools.partial(QuietHandler, directory=data)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        root = f"http://127.0.0.1:{server.server_address[1]}"
        for name in ("text-gz", "csv", "chat"):
            assert_same(opened(name, root, data, model=data).splits, opened(name, data, data).splits)
        with pytest.raises(ConfigError, match=f"there is no file {root}/none.txt"):
            open_dataset(f"text:{root}/none.txt", {"sequence_length": 8}, None)
        with pytest.raises(RunError, match=f"{root}/tsv/rows.jsonl: its server sends files whole only"):
            open_dataset(f"jsonl:{root}/tsv/rows.jsonl", TEXT, None).splits["train"][1]
        server.shutdown()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        """Print nothing."""
