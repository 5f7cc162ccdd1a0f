"""Data in buckets whose requests fail: repeated, or one line with the address. And what a bucket is asked."""

import os
import signal

import numpy as np
import pytest
import remote_data
import small_configs
from indexed_rows import TEXT, assert_same
from remote_data import opened

from jaxmodels import Callback, api
from jaxmodels.data import reading
from jaxmodels.data.inspect import inspect
from jaxmodels.data.registry import open_dataset
from jaxmodels.errors import ConfigError, Interrupted, RunError
from jaxmodels.experiment.build import build_experiment
from jaxmodels.experiment.sections import resolve
from jaxmodels.pretrained import folder, gguf
from jaxmodels.runs.folder import RunFolder
from jaxmodels.storage import paths

pytest.importorskip("fsspec")
pytestmark = pytest.mark.usefixtures("index_cache")
data, root = remote_data.data, remote_data.root  # fixtures

in_buckets = pytest.mark.parametrize("root", [pytest.param(name, marks=pytest.mark.buckets) for name in ("s3", "gs")], indirect=True)


@pytest.fixture
def proxy(root, bucket_servers):
    proxy = bucket_servers.s3 if root.startswith("s3") else bucket_servers.gcs
    yield proxy
    proxy.fault = lambda method, path: None


def some(what, number):
    """A fault of one of `number` requests that read."""
    count = [0]

    def fault(method, path):
        count[0] += method in ("GET", "HEAD")
        return what if method in ("GET", "HEAD") and count[0] % number == 0 else None

    return fault


@in_buckets
@pytest.mark.parametrize("what", ["503", "cut", "lose"])
def test_requests_that_fail_are_repeated(what, root, proxy, data):
    for name in ("images", "text", "hf"):
        proxy.fault = some(what, 9)
        assert_same(opened(name, root, data).splits, opened(name, data, data).splits)


@in_buckets
def test_an_image_is_one_request(root, proxy, data):
    source = opened("images", root, data).splits["train"]
    before = len(proxy.log)
    source[0], source[1]
    assert len(proxy.log) == before + 2


@in_buckets
def test_a_gguf_file_in_a_bucket_is_copied(root, monkeypatch):
    place = paths.parse(f"{root}/x.gguf")
    place.write_bytes(b"GGUF and more")
    monkeypatch.setattr(gguf, "folder_of", lambda file: file)
    assert folder.place(f"hf:{place}").read_bytes() == b"GGUF and more"


@in_buckets
def test_access_that_is_denied_is_one_line(root, proxy, data):
    proxy.fault = lambda method, path: "403"
    for name in ("text", "csv", "tsv", "hf", "tfds", "parquet"):
        with pytest.raises(PermissionError, match=f"access is denied .*Log in, or set the credentials .*{root}"):
            opened(name, root, data)
    section = {"source": "images:pictures", "size": 4, "batch_size": 1}
    config = {"data": section, "model": {"name": "cnn"}, "task": {"name": "classify"}, "optimizer": {"name": "sgd", "learning_rate": 0.1}}
    config |= {"training": {"steps": 1}}
    for open_it in (lambda: build_experiment(config, data_dir=root), lambda: inspect(resolve(config), data_dir=root)):
        with pytest.raises(RunError, match=f"data.source='images:pictures' cannot be opened: PermissionError: .*access is denied .*{root}") as error:
            open_it()
        assert "\n" not in str(error.value)


@in_buckets
def test_images_whose_credentials_expire_are_not_left_out(root, proxy, data, monkeypatch):
    """They are tried again, and then end the run, also where bad examples are left out."""
    source = open_dataset("images:pictures", {"size": 4, "on_bad_example": "skip"}, root).splits["train"]
    monkeypatch.setattr(reading, "RETRY_SECONDS", (0.0, 0.0))
    proxy.fault = some("403", 1)
    with pytest.raises(reading.ReadError, match=r"mine: example 0 cannot be read: PermissionError: .*access is denied .*0.png.* Tried 3 times"):
        reading.read(source, np.array([0, 1]), "mine")


@in_buckets
def test_a_bucket_that_does_not_exist(root):
    for source, options in (("images", {"size": 4}), ("text", {"sequence_length": 8}), ("tsv", TEXT)):
        with pytest.raises(ConfigError, match=r"there is no (file|folder).*://no-such-bucket-here/x"):
            open_dataset(f"{source}:{root.partition(':')[0]}://no-such-bucket-here/x", options, None)


@in_buckets
def test_a_run_moves_from_a_bucket_to_a_disk(root, data, tmp_path):
    """It reads in threads and in worker processes; after a resume with the same images in a folder, its metrics are those of a run that stayed there."""
    changes = {"data": {"source": "images:pictures", "size": 8, "batch_size": 4, "workers": 1}, "training__steps": 4}
    changes |= {"checkpoint__every": 2, "evaluation__every": 4, "log__every": 1}
    config = small_configs.config(small_configs.CNN, **changes)
    api.train(config, str(tmp_path / "stays"), data_dir=str(data), quiet=True)
    with pytest.raises(Interrupted):
        api.train(config, str(tmp_path / "moves"), data_dir=root, quiet=True, callbacks=[StopAfter(2)])
    api.train(config, str(tmp_path / "moves"), data_dir=str(data), quiet=True)
    lines = [[line["loss"] for line in RunFolder(tmp_path / name).metrics()] for name in ("stays", "moves")]
    assert len(lines[0]) == 5 and lines[0] == lines[1]


class StopAfter(Callback):
    """Ends a run after a step, as a signal does."""

    def __init__(self, step):
        self.step = step

    def on_step(self, run, step, metrics):
        if step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)
