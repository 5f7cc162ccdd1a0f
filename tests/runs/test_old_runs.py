"""Run folders of an earlier version resume, evaluate, generate, merge and export as that version did; see fixtures/old_run/README.md."""

import json
import tarfile

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from conftest import ROOT
from safetensors.numpy import load_file

FIXTURE = ROOT / "tests" / "fixtures" / "old_run"
TIMES = {"seconds", "steps_per_second", "examples_per_second", "data_wait"}
# Structure must be equal. Numbers are float32 on a CPU; 15 steps of another compiler version may round differently.
TOLERANCE = {"rtol": 1e-3, "atol": 1e-4}
# The gradient of a key's bias is zero, but for rounding, which Adam amplifies to steps of the learning rate: another on each kind of CPU.
ROUNDING = "attention/key/bias"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Copy the folders to another place, where the paths in their manifests do not exist."""
    place = tmp_path_factory.mktemp("old")
    with tarfile.open(FIXTURE / "runs.tar.xz") as archive:
        archive.extractall(place, filter="data")
    return place


@pytest.fixture(scope="module")
def expected():
    return json.loads((FIXTURE / "expected.json").read_text()), dict(np.load(FIXTURE / "expected.npz"))


def kept(run):
    return sorted(int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdigit())


def stored(run, parts=("params", "ema")):
    """Return the parameters of a run's last checkpoint by path, read with Orbax only."""
    path = run / "checkpoints" / str(kept(run)[-1]) / "state"
    checkpointer = ocp.PyTreeCheckpointer()
    tree = checkpointer.metadata(path).item_metadata.tree
    state = checkpointer.restore(path, restore_args=jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree))
    leaves = jax.tree_util.tree_leaves_with_path({part: state[part] for part in parts})
    return {"/".join(str(key.key) for key in path): value for path, value in leaves}


def assert_close(found, expected, prefix):
    """Check that the arrays are those whose names begin with the prefix, with close values."""
    expected = {name.removeprefix(prefix + "/"): value for name, value in expected.items() if name.startswith(prefix + "/")}
    assert found.keys() == expected.keys() and expected
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        tolerance = {"atol": 0.05} if name.endswith(ROUNDING) else TOLERANCE
        np.testing.assert_allclose(found[name], value, **tolerance, err_msg=f"{prefix}: {name}")


def assert_lines_close(found, expected):
    assert len(found) == len(expected)
    for line, other in zip(found, expected, strict=True):
        assert line.keys() - TIMES == other.keys() and line["split"] == other["split"]
        names = other.keys() - {"split"}
        np.testing.assert_allclose([line[name] for name in names], [other[name] for name in names], **TOLERANCE)


def succeed(done):
    assert done.returncode == 0, done.stderr
    return done.stdout


# The parent comes first: resumed, it must keep the checkpoint of step 20, which the child reads.
@pytest.mark.parametrize("name", ["parent", "child", "sharded"])
def test_an_old_run_resumes_is_evaluated_and_generates(name, runs, expected, jaxmodels_command):
    values, arrays = expected
    run, devices = runs / name, ["--cpu_devices=2"] if name == "sharded" else []
    assert kept(run) == [20, 25]
    options = [f"--workdir={run}", f"--data_dir={runs}", *devices]
    output = succeed(jaxmodels_command("train", f"--config={run}", *options))
    assert "resumed from" in output and "checkpoints/25" in output
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert_lines_close([line for line in metrics if line["step"] > 20], values[name]["metrics"])
    assert kept(run) == values[name]["kept"]
    assert_close(stored(run), arrays, name)
    if name != "sharded":  # evaluation and generation as for its twin `parent`
        evaluated = json.loads(succeed(jaxmodels_command("evaluate", f"--workdir={run}@best", "--split=validation", f"--data_dir={runs}", "--json")))
        assert_lines_close([evaluated | {"split": ""}], [values[name]["evaluate"] | {"split": ""}])
        made = json.loads(succeed(jaxmodels_command("generate", f"--workdir={run}", "--prompt=one two", "--max_tokens=8", "--json")))
        assert made["completions"][0]["text"] == values[name]["generate"]


def test_an_old_run_with_adapters_is_merged_and_exported(runs, expected, tmp_path, jaxmodels_command):
    """The child is resumed to its end in a copy, next to an unchanged parent."""
    _, arrays = expected
    with tarfile.open(FIXTURE / "runs.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    succeed(jaxmodels_command("train", f"--config={tmp_path}/child", f"--workdir={tmp_path}/child", f"--data_dir={tmp_path}"))
    succeed(jaxmodels_command("merge", f"--workdir={tmp_path}/child", f"--output={tmp_path}/merged"))
    assert_close(stored(tmp_path / "merged", ("params",)), arrays, "merged")
    succeed(jaxmodels_command("export", f"{tmp_path}/child", f"{tmp_path}/exported"))
    assert_close(load_file(tmp_path / "exported" / "model.safetensors"), arrays, "exported")
