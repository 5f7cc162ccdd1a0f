"""Objects in buckets: written whole, on conditions, and read in spite of a network that fails."""

import threading

import pytest

from jaxmodels.errors import ConfigError
from jaxmodels.storage import client, paths
from jaxmodels.storage.paths import ABSENT, StorageError, parse

pytestmark = pytest.mark.buckets


@pytest.fixture(scope="module", params=["s3", "gs"])
def bucket(request, bucket_servers):
    """The address of a new folder in a bucket, and the proxy before its emulator."""
    from bucket_servers import BUCKET

    return parse(f"{request.param}://{BUCKET}/storage"), bucket_servers.s3 if request.param == "s3" else bucket_servers.gcs


@pytest.fixture
def fault(bucket):
    """Function that sets what happens to requests of a method, the first `times` of them."""
    proxy = bucket[1]

    def set_fault(what, method, times=1):
        left = [times]

        def fault(asked, path):
            if asked in method and left[0] > 0:
                left[0] -= 1
                return what
            return None

        proxy.fault = fault

    yield set_fault
    proxy.fault = lambda method, path: None


WRITES, READS = ("PUT", "POST"), ("GET", "HEAD")


def test_files_and_folders(bucket, tmp_path):
    root = bucket[0] / "files"
    (root / "a" / "b.txt").write_text("grüße")
    (root / "empty").write_bytes(b"")
    (root.parent / "files-2" / "x").write_bytes(b"1")
    assert (root / "a").is_dir() and not (root / "a").is_file() and (root / "empty").is_file() and not (root / "emp").exists()
    assert [place.name for place in root.iterdir()] == ["a", "empty"] and [str(place)[len(str(root)) :] for place in root.files()] == ["/a/b.txt", "/empty"]
    assert (root / "a/b.txt").read_text() == "grüße" and [place.name for place in root.glob("e*")] == ["empty"]
    with pytest.raises(FileNotFoundError):
        (root / "none").read_bytes()
    paths.download(root, tmp_path / "copy")
    assert (tmp_path / "copy/a/b.txt").read_text() == "grüße" and (tmp_path / "copy/empty").read_bytes() == b""
    paths.upload(tmp_path / "copy", root.parent / "again")
    assert (root.parent / "again/a/b.txt").read_text() == "grüße"
    paths.delete_tree(root)
    assert not root.exists() and (root.parent / "files-2").exists()


def test_one_creator_and_one_replacer_win(bucket):
    place = bucket[0] / "lock"
    results = []
    threads = [threading.Thread(target=lambda number=number: results.append(place.write_if(b"%d" % number, ABSENT))) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    generations = [found for found in results if found is not None]
    assert len(generations) == 1
    content, generation = place.read_with_generation()
    assert generation == generations[0]
    newer = place.write_if(b"new", generation)
    assert newer is not None and place.write_if(b"stale", generation) is None and place.write_if(None, generation) is None
    assert place.read_bytes() == b"new" and place.write_if(None, newer) is not None and not place.exists()
    assert place.read_with_generation() == (None, ABSENT)


@pytest.mark.parametrize("what", ["503", "cut", "lose"])
def test_requests_that_fail_are_repeated(bucket, fault, what):
    place, content = bucket[0] / f"repeated-{what}", bytes(range(256)) * 4096
    fault(what, WRITES, 2)
    place.write_bytes(content)
    fault(what, READS, 2)
    assert place.read_bytes() == content


def test_a_bucket_that_stalls_is_reported_once(bucket, fault, monkeypatch, capfd):
    monkeypatch.setattr(client, "_SILENT_SECONDS", 0.5)
    fault(1.5, WRITES)
    (bucket[0] / "slow").write_bytes(b"1")
    lines = [line for line in capfd.readouterr().err.splitlines() if "answer" in line]
    assert len(lines) == 2 and "has not answered" in lines[0] and "answers again" in lines[1]


def test_a_bucket_that_stays_away_is_an_error(bucket, fault, monkeypatch, capfd):
    monkeypatch.setattr(client, "_LIMIT_SECONDS", 2.0)
    monkeypatch.setattr(client, "_SILENT_SECONDS", 0.5)
    fault("503", WRITES, 1000)
    with pytest.raises(StorageError, match=r"no answer|503"):
        (bucket[0] / "away").write_bytes(b"1")
    assert "has not answered" in capfd.readouterr().err
    fault("503", WRITES, 0)
    (bucket[0] / "back").write_bytes(b"1")  # at once
    assert "answers again" in capfd.readouterr().err


def test_a_bucket_that_does_not_exist(bucket):
    place = parse(f"{bucket[0].scheme}://jaxmodels-none/x")
    with pytest.raises(ConfigError, match="--workdir=.*does not exist"):
        paths.check_writable(place, "--workdir")


def test_parts_of_an_object(bucket):
    place = bucket[0] / "parts"
    place.write_bytes(bytes(range(200)))
    assert paths.size(place) == 200
    with paths.open_file(place) as file:
        file.seek(-3, 2)
        assert file.read() == bytes([197, 198, 199]) and file.seek(10) == 10 and file.read(2) == bytes([10, 11])
