"""Damaged files of a run folder: what is valid stays in use, the rest is set aside, and each is said once."""

import io
import json
import shutil

import pytest
import small_configs
from rich.console import Console

import jaxmodels
from jaxmodels.errors import ConfigError
from jaxmodels.experiment.build import build_experiment
from jaxmodels.runs.folder import RunFolder
from jaxmodels.runs.lineage import lineage
from jaxmodels.runs.repair import repair
from jaxmodels.storage import paths
from jaxmodels.training import trainer as trainer_lib

pytestmark = pytest.mark.faults

CONFIG = small_configs.config(small_configs.CNN, training__steps=30, evaluation={}, log={"every": 5, "tensorboard": False})


def train(config, workdir):
    output = io.StringIO()
    trainer_lib.train(build_experiment(config), str(workdir), console=Console(file=output, width=400))
    return output.getvalue()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("repair") / "run"
    train(CONFIG, workdir)
    return workdir


@pytest.fixture
def workdir(finished, location):
    """A copy of the run, on the disk and in buckets."""
    copy = paths.parse(location("run"))
    paths.upload(finished, copy) if paths.is_bucket(copy) else shutil.copytree(finished, copy)
    return copy


DAMAGED = {
    "torn": b'{"step": 15, "split": "tr',
    "NUL": b"\0" * 64,
    "a list": b"[1, 2]",
    "a number": b"7",
    "no split": b'{"step": 15, "loss": 0.5}',
    "no step": b'{"split": "train", "loss": 0.5}',
    "a step that is text": b'{"step": "15", "split": "train"}',
    "a value that is text": b'{"step": 15, "split": "train", "loss": "low"}',
    "not UTF-8": b'{"step": 15, "split": "\xff\xfe"}',
    "too deep": b"[" * 100_000,
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_line_in_the_middle_of_the_metrics(damage, workdir, tmp_path):
    """In a start of the whole program only for one kind; the others are as one to it."""
    folder = RunFolder(workdir)
    whole = folder.metrics()
    lines = folder.metrics_file.read_bytes().splitlines(keepends=True)
    assert len(lines) == 8  # six of training, a validation and a test
    folder.metrics_file.write_bytes(b"".join([*lines[:2], DAMAGED[damage] + b"\n", *lines[3:]]))
    assert folder.metrics() == [*whole[:2], *whole[3:]]
    lineage(str(workdir))  # a reader, which changes nothing
    assert DAMAGED[damage] in folder.metrics_file.read_bytes() and not (workdir / "damaged").exists()
    if damage == "torn":
        output = train(CONFIG, workdir)
        assert output.count("is damaged") == 1 and "warning: " in output
        (warning,) = folder.manifest()["fallbacks"]
        assert "is damaged" not in train(CONFIG, workdir)
    else:
        (warning,) = repair(folder)
        assert repair(folder) == []
    assert f"{folder.metrics_file}: line 3 is damaged and moved to {workdir}/damaged/metrics-1.jsonl; the other 7 are in use" == warning
    assert folder.metrics_file.read_bytes() == b"".join([*lines[:2], *lines[3:]])
    assert (workdir / "damaged" / "metrics-1.jsonl").read_bytes() == DAMAGED[damage] + b"\n"


def test_a_truncated_last_line_is_not_reported(workdir):
    """A kill leaves it, and the run writes it again; or a run that is read has not finished it."""
    folder = RunFolder(workdir)
    whole = folder.metrics()
    for end in (b'{"step": 35, "spl', b"\0" * 100):
        folder.metrics_file.write_bytes(folder.metrics_file.read_bytes() + end)
        assert folder.metrics() == whole and not repair(folder)
        folder.add_metrics(40, "train", {"loss": 1.0})  # on a line of its own
        assert folder.metrics() == [*whole, {"step": 40, "split": "train", "loss": 1.0}]
        assert len(repair(folder)) == 1
        folder.rewind(30, 30, True)
        assert folder.metrics() == whole


MANIFESTS = ["[]", "null", "", '{"id": "x", "starts"', "\0\0\0\0", '"text"', '{"parents": [1], "starts": {}, "fallbacks": 3, "info": [], "id": 5}']


@pytest.mark.parametrize("content", MANIFESTS)
def test_a_damaged_manifest(content, workdir):
    folder = RunFolder(workdir)
    info = folder.manifest()["info"]
    folder.manifest_file.write_text(content)
    with pytest.raises(ConfigError, match=r"manifest.json is damaged \(it.*Restore the file, or resume the run"):
        jaxmodels.load(str(workdir))
    assert lineage(str(workdir))["run"] == str(workdir)
    assert folder.manifest_file.read_text() == content
    if content == "[]":
        output = train(CONFIG, workdir)
        assert output.count("warning: ") == 1 and "resumed from" in output
        (warning,) = folder.manifest()["fallbacks"]
        assert folder.manifest()["info"] == info and len(folder.manifest()["starts"]) == 1
        assert jaxmodels.load(str(workdir)).step == 30
    else:
        (warning,) = repair(folder)
    assert "manifest.json was damaged: it" in warning and f"copied to {workdir}/damaged/manifest-1.json" in warning
    assert (workdir / "damaged" / "manifest-1.json").read_text() == content
    assert repair(folder) == [] and isinstance(folder.manifest(), dict)


def test_valid_entries_of_a_damaged_manifest_stay(workdir):
    folder = RunFolder(workdir)
    before = folder.manifest()
    folder.manifest_file.write_text(json.dumps(before | {"starts": "none"}))
    assert "its starts cannot be used" in repair(folder)[0]
    assert folder.manifest() == {key: value for key, value in before.items() if key != "starts"}


def test_a_parent_with_a_damaged_manifest_is_still_known_to_its_child(workdir, tmp_path):
    child = small_configs.config(CONFIG, training__steps=5, init_from=f"{workdir}@30", training__freeze=("convolutions",))
    train(child, tmp_path / "child")
    folder = RunFolder(workdir)
    run_id = folder.manifest()["id"]
    folder.children_file.write_bytes(folder.children_file.read_bytes() + b'{"run": 3}\n[]\n{"run": "/nowhere", "step": 1}\n')
    folder.manifest_file.write_text("[]")
    train(CONFIG, workdir)
    assert folder.manifest()["id"] == run_id
    assert jaxmodels.load(str(tmp_path / "child")).step == 5


def test_a_child_whose_manifest_no_longer_names_its_parent_says_so(workdir, tmp_path):
    config = small_configs.config(CONFIG, training__steps=5, init_from=f"{workdir}@30", training__freeze=("convolutions",))
    train(config, tmp_path / "child")
    manifest = tmp_path / "child" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"parents": {}}))
    for call in (lambda: jaxmodels.load(str(tmp_path / "child")), lambda: train(config, tmp_path / "child")):
        with pytest.raises(ConfigError, match="does not hold convolutions/0/.*, and its manifest.json names no run that does. Restore manifest.json"):
            call()


def test_a_config_that_is_no_json_is_an_error(workdir):
    for content in (b"\xff\xfe\xfa", b"[]", b"[" * 100_000, b"{"):
        (workdir / "config.json").write_bytes(content)
        with pytest.raises(ConfigError, match="config.json (is not valid JSON|does not contain a config)"):
            jaxmodels.load(str(workdir))


def test_overwrite_deletes_what_was_set_aside(workdir):
    folder = RunFolder(workdir)
    folder.manifest_file.write_text("[]")
    repair(folder)
    folder.clear()
    assert list(workdir.iterdir()) == []
