"""Addresses: folders, file://, gs:// and s3://; what looks like one and is none is an error."""

from pathlib import Path

import pytest

from jaxmodels.cli import main as cli
from jaxmodels.errors import ConfigError
from jaxmodels.storage import paths
from jaxmodels.storage.paths import BucketPath, parse


@pytest.mark.parametrize(
    "address, expected",
    [
        ("runs/x", Path("runs/x")),
        ("file:///a/b%20c", Path("/a/b c")),
        ("file://localhost/a", Path("/a")),
        ("odd:name", Path("odd:name")),
        ("gs://bkt/x/../y//z/", BucketPath("gs", "bkt", "y/z")),
        ("s3://my.bucket/a/b", BucketPath("s3", "my.bucket", "a/b")),
        ("gs://bkt", BucketPath("gs", "bkt", "")),
    ],
)
def test_addresses(address, expected):
    assert parse(address) == expected


def test_paths_of_folders_as_uri():
    odd = Path("/a b/ü%/c#d")
    assert parse(odd.as_uri()) == odd


@pytest.mark.parametrize(
    "address, hint",
    [
        ("gcs://bkt/x", "gs://bkt/x"),
        ("s3a://bkt/x", "s3://bkt/x"),
        ("GS://bkt/x", "gs://bkt/x"),
        ("s3:/bkt/x", "s3://bkt/x"),
        ("gs:bkt/x", "gs://bkt/x"),
        ("hdfs://node/x", "hdfs:// is not supported"),
        ("https://x/y", "https:// is not supported"),
        ("file://tmp/x", "file:///tmp/x"),
        ("file:tmp/x", "file:///tmp/x"),
        ("s3://", "the bucket is missing"),
        ("gs:///x", "did you mean gs://x"),
        ("s3://Bad_Name/x", "'Bad_Name' is not the name of a bucket"),
    ],
)
def test_wrong_addresses(address, hint):
    with pytest.raises(ConfigError, match="--workdir=") as error:
        parse(address, "--workdir")
    assert hint in str(error.value)


def test_names_of_bucket_paths():
    place = parse("gs://bkt/a/b.tar.gz")
    assert (place.name, place.stem, place.suffix, str(place.parent)) == ("b.tar.gz", "b.tar", ".gz", "gs://bkt/a")
    assert place.with_name("c") == parse("gs://bkt/a/c") and place.parent / "x" / "y" == parse("gs://bkt/a/x/y")
    with pytest.raises(TypeError):
        open(place)


def test_relative_and_joined_addresses(tmp_path):
    assert paths.relative(parse("gs://bkt/a/b"), parse("gs://bkt/a/c/d")) == "../../b"
    assert paths.relative(parse("gs://bkt/a"), parse("s3://bkt/a")) is None and paths.relative(tmp_path, parse("s3://bkt/a")) is None
    assert paths.relative(tmp_path / "x", tmp_path / "y") == "../x"
    assert paths.join("gs://bkt/a", "b/c") == "gs://bkt/a/b/c" and paths.join("/data", "s3://bkt/x") == "s3://bkt/x"
    assert paths.join("/data", "/other") == "/other" and paths.join("s3://bkt", "x") == "s3://bkt/x"


def test_wrong_addresses_end_before_anything_is_loaded(capsys):
    for arguments in (
        ["train", "--config=none.py", "--workdir=gcs://b/x"],
        ["evaluate", "--workdir=s3:/b/x"],
        ["train", "--config=none.py", "--data_dir=hdfs://b/x"],
        ["export", "gcs://b/x", "out"],
        ["merge", "--workdir=x", "--output=s3a://b/x"],
        ["plan", "--config=none.py", "--topology=v5p-8", "--save=gs://bkt/x"],
    ):
        assert cli.run(arguments) == 2
        text = capsys.readouterr().err
        assert "did you mean" in text or "hdfs:// is not supported" in text or "on a disk only" in text


def test_file_addresses_name_folders(tmp_path, capsys):
    assert cli.run(["lineage", f"--workdir={(tmp_path / 'a b').as_uri()}"]) == 2
    assert f"{tmp_path / 'a b'} is not the folder of a run" in capsys.readouterr().err
