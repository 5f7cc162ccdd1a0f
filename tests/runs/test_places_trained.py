"""Runs on a disk, in S3 and in GCS: training, lineage, merging, evaluation, import, export and generation. The disk's results are the reference."""

import json

import numpy as np
import pytest
import small_configs
from run_state import final_state

import jaxmodels
from jaxmodels.cli import main as cli
from jaxmodels.config import load_config
from jaxmodels.errors import ConfigError
from jaxmodels.runs.folder import RunFolder
from jaxmodels.runs.lineage import lineage
from jaxmodels.storage import paths

pytestmark = pytest.mark.slow
CNN = small_configs.config(small_configs.CNN, training__steps=20, evaluation__every=10, checkpoint={"every": 5, "keep": 2, "best": "loss"}, log__every=2)
TRACKERS = ("jsonl", "tensorboard", "csv")


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory):
    """A run on the disk, and its last state and metrics."""
    folder = str(tmp_path_factory.mktemp("disk") / "parent")
    jaxmodels.train(CNN, folder, quiet=True)
    return folder, *final_state(folder)


@pytest.fixture(scope="module")
def parent(place):
    """The same run in a place."""
    folder = f"{place}/parent"
    jaxmodels.train(small_configs.config(CNN, log__trackers=TRACKERS), folder, quiet=True)
    return folder


def test_a_run_is_the_same_in_all_places(on_disk, parent):
    _, arrays, metrics = on_disk
    found, lines = final_state(parent)
    assert lines == metrics
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)
    folder = RunFolder(parent)
    there = {key.split("/")[0] for key in paths.keys_below(folder.path)}
    assert there == {"config.json", "manifest.json", "metrics.jsonl", "metrics.csv", "checkpoints", "tensorboard"}
    assert folder.manifest()["fallbacks"] == [] and (folder.path / "metrics.csv").read_text().count("\n") > 20
    assert load_config(parent).to_dict()["training"]["steps"] == 20
    assert jaxmodels.evaluate(parent)["loss"] == folder.metrics("test")[0]["loss"]


@pytest.mark.buckets
@pytest.mark.parametrize("place", ["s3", "gs"], indirect=True)
def test_a_run_of_a_disk_goes_on_in_a_bucket(place, on_disk, tmp_path):
    """It is copied after ten steps. The rest is as on the disk, bit for bit."""
    jaxmodels.train(small_configs.config(CNN, training__steps=10), tmp_path / "run", quiet=True)
    moved = f"{place}/moved"
    paths.upload(tmp_path / "run", RunFolder(moved).path)
    assert jaxmodels.evaluate(moved)["loss"] == RunFolder(tmp_path / "run").metrics("test")[0]["loss"]
    jaxmodels.train(small_configs.config(small_configs.CNN, training__steps=1, evaluation={}, init_from=f"{moved}@10"), f"{place}/child", quiet=True)
    jaxmodels.train(CNN, moved, quiet=True)
    arrays, lines = final_state(moved)
    assert lines == on_disk[2] and [(change["step"], change["key"]) for change in RunFolder(moved).manifest()["changes"]] == [(10, "training.steps")]
    for name, array in on_disk[1].items():
        np.testing.assert_array_equal(arrays[name], array)


def test_children_lineage_and_merging(parent, location):
    config = small_configs.config(small_configs.CNN, training__steps=5, evaluation={}, lora={"rank": 2, "targets": ("hidden",)})
    config["training"]["trainable"] = ("output/",)
    config["init_from"] = f"{parent}@20"
    child = location("child")
    jaxmodels.train(config, child, quiet=True)
    family = lineage(child)
    assert family["run"] == str(RunFolder(parent).path) and [node["run"] for node in family["children"]] == [child]
    with pytest.raises(ConfigError, match="contains frozen weights of"):
        jaxmodels.train(CNN, parent, overwrite=True, quiet=True)
    loss = jaxmodels.evaluate(child)["loss"]
    assert cli.run(["merge", f"--workdir={child}", f"--output={location('merged')}"]) == 0
    assert jaxmodels.evaluate(location("merged"))["loss"] == pytest.approx(loss, rel=1e-4)
    assert cli.run(["merge", f"--workdir={child}", f"--output={location('merged')}"]) == 2


def test_import_export_and_generate(published, location, capsys, tmp_path):
    model = published("gpt2_hf_text")
    source = paths.parse(location("published"))
    if paths.is_bucket(source):
        paths.upload(model, source)
    else:
        source = model
    assert cli.run(["import", f"hf:{source}", location("imported")]) == 0
    assert cli.run(["export", location("imported"), location("exported")]) == 0
    assert "model.safetensors" in capsys.readouterr().out
    assert cli.run(["export", location("imported"), location("exported")]) == 2
    assert "not an empty folder" in capsys.readouterr().err
    exported = paths.parse(location("exported"))
    assert (exported / "model.safetensors").read_bytes()[:8] == (model / "model.safetensors").read_bytes()[:8] or exported.is_dir()
    assert json.loads((exported / "config.json").read_bytes())["model_type"] == "gpt2"
    assert cli.run(["generate", f"--workdir={location('imported')}", "--prompt=a", "--max_tokens=3", "--json"]) == 0
    assert capsys.readouterr().out


@pytest.mark.buckets
@pytest.mark.parametrize("place", ["s3", "gs"], indirect=True)
def test_a_run_is_the_same_while_requests_fail(place, on_disk, bucket_servers):
    proxy, count = bucket_servers.s3 if place.startswith("s3") else bucket_servers.gcs, [0]
    faults = ("503", "cut", "lose", 0.5)

    def fault(method, path):
        count[0] += 1
        return faults[count[0] // 29 % 4] if count[0] % 29 == 0 else None

    proxy.fault = fault
    try:
        jaxmodels.train(CNN, f"{place}/faults", quiet=True)
    finally:
        proxy.fault = lambda method, path: None
    arrays, lines = final_state(f"{place}/faults")
    assert count[0] > 8 * 29 and lines == on_disk[2]
    for name, array in on_disk[1].items():
        np.testing.assert_array_equal(arrays[name], array)
