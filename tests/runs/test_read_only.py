"""Reading a run writes nothing into its folder; a run may be moved and copied."""

import hashlib
import json
import os
import shutil
import signal

import jax
import numpy as np
import pytest
import small_configs
from rich.console import Console
from run_state import final_state

import jaxmodels
from jaxmodels.errors import Interrupted
from jaxmodels.experiment.build import build_experiment
from jaxmodels.export.stablehlo import export_stablehlo
from jaxmodels.export.transformers import export_run
from jaxmodels.models.functional import split
from jaxmodels.runs.folder import RunFolder
from jaxmodels.runs.lineage import lineage
from jaxmodels.runs.merge import merge
from jaxmodels.training import trainer as trainer_lib

pytestmark = pytest.mark.faults

GPT = small_configs.config(small_configs.GPT, training__steps=20, checkpoint__best="loss", evaluation__every=10, log__tensorboard=False, model__dropout=0.0)
LORA = {"rank": 2, "alpha": 4.0, "targets": (r".*up$",)}


def train(config, workdir, **options):
    return trainer_lib.train(build_experiment(config), str(workdir), console=Console(quiet=True), **options)


def state(folder):
    """Every file and folder below one: its contents, size and times. A file that was made and deleted changes its folder's time."""
    found = {}
    for path in [folder, *folder.rglob("*")]:
        status = path.lstat()
        content = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else sorted(os.listdir(path))
        found[str(path.relative_to(folder))] = (status.st_mtime_ns, status.st_ctime_ns, status.st_mode, content)
    return found


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """A folder with a run `parent`, and a run `child` that holds adapters only."""
    place = tmp_path_factory.mktemp("family")
    train(GPT, place / "parent")
    config = small_configs.config(
        GPT, init_from=f"{place / 'parent'}@20", lora=LORA, data__tokenizer=str(place / "parent"), training__trainable=("final_norm",)
    )
    train(config, place / "child")
    return place


def read_everything(place, output):
    """All that reads a run, and its results."""
    found = {}
    for name in ("parent", "child"):
        run = str(place / name)
        found[name] = jaxmodels.evaluate(run, split="validation")["loss"], jaxmodels.evaluate(f"{run}@best", split="validation")["step"]
        loaded = jaxmodels.load(run)
        found[f"{name} text"] = loaded.generate(["def "], max_tokens=5, temperature=0.0)[0].text
        found[f"{name} weights"] = [np.asarray(x).sum() for x in jax.tree.leaves(split(loaded.model)[1])]
        found[f"{name} lineage"] = json.dumps(lineage(run)).count('"here": true')
        export_run(run, str(output / f"{name}-transformers"))
        if name == "child":
            export_stablehlo(run, str(output / f"{name}-stablehlo"))
        RunFolder(run).config()
    return found


@pytest.fixture(scope="module")
def found(family, tmp_path_factory):
    """What is read from the family, while nothing in its folder changes."""
    before = state(family)
    found = read_everything(family, tmp_path_factory.mktemp("read"))
    assert state(family) == before, "reading changes nothing"
    return found


def test_reading_changes_nothing(found):
    assert found["child lineage"] == 2


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_run_is_read(family, found, tmp_path):
    shutil.copytree(family, tmp_path / "shared")
    paths = [tmp_path / "shared", *(tmp_path / "shared").rglob("*")]
    for path in paths:
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        assert read_everything(tmp_path / "shared", tmp_path) == found
    finally:
        for path in paths:
            path.chmod(0o755 if path.is_dir() else 0o644)


@pytest.mark.slow
def test_a_moved_family_is_read(family, found, tmp_path):
    place = tmp_path / "one"
    shutil.copytree(family, place)
    for file in place.rglob("*.json*"):  # as if it had been trained there
        if file.name in ("config.json", "manifest.json", "children.jsonl"):
            file.write_text(file.read_text().replace(str(family), str(place)))
    merge(str(place / "child"), str(place / "merged"))
    merged = jaxmodels.evaluate(str(place / "merged"), split="validation")
    place.rename(tmp_path / "two")
    assert read_everything(tmp_path / "two", tmp_path / "after") == found
    assert jaxmodels.evaluate(str(tmp_path / "two" / "merged"), split="validation")["loss"] == merged["loss"]


@pytest.mark.parametrize("how", ["moved", pytest.param("copied", marks=pytest.mark.slow)])
def test_a_moved_or_copied_run_goes_on(how, family, tmp_path):
    class Stop(jaxmodels.Callback):
        def on_log(self, run, step, values):
            if step == 10:
                signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Interrupted):
        train(GPT, tmp_path / "here" / "x", callbacks=[Stop()])
    (tmp_path / "there").mkdir()
    place = tmp_path / "there" / "x"
    if how == "moved":
        (tmp_path / "here" / "x").rename(place)
    else:
        shutil.copytree(tmp_path / "here" / "x", place)
        before = state(tmp_path / "here")
    result = train(GPT, place)
    assert result.workdir == str(place) and result.step == 20
    if how == "copied":
        assert state(tmp_path / "here") == before
    arrays, metrics = final_state(place)
    expected, lines = final_state(family / "parent")
    assert metrics == lines
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, expected[name])
