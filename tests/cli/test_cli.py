"""The command line: output, exit status, and that errors in the config are raised before a device starts."""

import json
import subprocess
import sys

import numpy as np
import pytest
import small_configs
from conftest import ROOT


@pytest.fixture
def cnn(tmp_path):
    path = tmp_path / "cnn.json"
    path.write_text(json.dumps(small_configs.CNN))
    return path


def python(code):
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_help_and_the_bare_import_load_no_heavy_package():
    heavy = "{'jax', 'flax', 'numpy', 'optax', 'orbax', 'grain', 'ml_collections', 'rich'}"
    for code in ("import jaxmodels", "from jaxmodels.cli import main as cli\ntry: cli.main(['--help'])\nexcept SystemExit: pass"):
        done = python(f"{code}\nimport sys; assert not {heavy} & set(sys.modules), {heavy} & set(sys.modules)")
        assert done.returncode == 0, done.stderr


def test_bad_input_ends_with_status_2_and_no_device_started(cnn, tmp_path):
    unwritable = tmp_path / "file"
    unwritable.write_text("")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps(small_configs.config(small_configs.CNN, optimizer__learning_rate=1.0, seed=7)))
    (tmp_path / "run" / "checkpoints").mkdir()
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "metrics.jsonl").write_text("")
    cases = [
        ["train", f"--config={tmp_path}/cn.json"],
        ["train", f"--config={cnn}", "--config.model.hiden=3"],
        ["train", f"--config={cnn}", "--config.data.batch_size=x"],
        ["train", f"--config={cnn}", f"--workdir={unwritable}/run"],
        ["train", f"--config={cnn}", "--workdir=/proc/run"],
        ["train", f"--config={cnn}", f"--workdir={tmp_path}/run"],
        ["train", f"--config={cnn}", f"--workdir={tmp_path}/odd"],
        ["train", f"--config={cnn}", f"--workdir={tmp_path}/run", "--config.seed=7"],
        ["train", f"--config={cnn}", f"--workdir={tmp_path}/new", "--allow_change=data.batch_size,seed"],
        ["train", f"--config={cnn}", f"--workdir={tmp_path}/new", "--allow_change=optimizer.learning_rat"],
        ["train", f"--config={tmp_path}/run", f"--workdir={tmp_path}/run", "--from_step=3"],
        ["train", f"--config={cnn}", f"--workdir={tmp_path}/new", f"--config.init_from={tmp_path}/nothing"],
        ["evaluate", f"--workdir={tmp_path}/nothing"],
        ["evaluate", f"--workdir={tmp_path}/run"],
        ["config", f"--config={cnn}", "--config.seed=a"],
        ["config", f"--config={cnn}:argument"],
    ]
    done = python(f"""
import json, sys
from jax._src import xla_bridge
from jaxmodels.cli import main as cli
for case in {cases!r}:
    status = cli.run(case)
    assert status == 2, (case, status)
    assert not xla_bridge.backends_are_initialized(), case
    print("---", file=sys.stderr)
""")
    assert done.returncode == 0, done.stderr
    messages = done.stderr.split("---\n")
    assert len(messages) == len(cases) + 1
    for message in messages[:-1]:
        assert message.startswith("jaxmodels: ") and "Traceback" not in message
    assert "learning_rate: 1.0 in the run, 0.003 now" in messages[5] and "seed: 7 in the run, 0 now" in messages[5] and "--overwrite" in messages[5]
    assert "--allow_change=optimizer.learning_rate" in messages[7] and "seed" not in messages[7]
    assert "--allow_change=seed: it cannot change" in messages[8] and "Did you mean 'optimizer.learning_rate'" in messages[9]
    assert "--from_step=3" in messages[10] and "it has none yet" in messages[10]
    assert "no checkpoint" in messages[13]
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("argv", [["tain"], ["train"], ["train", "--config=x", "--no_such"], ["evaluate", "--workdir=x", "--config.a=1"]])
def test_bad_usage_has_status_2(argv, jaxmodels_command):
    assert jaxmodels_command(*argv).returncode == 2


def test_a_batch_that_does_not_divide_over_devices(cnn, tmp_path, jaxmodels_command):
    done = jaxmodels_command("train", f"--config={cnn}", f"--workdir={tmp_path}/x", "--config.data.batch_size=12", "--cpu_devices=8")
    assert done.returncode == 2
    assert "data.batch_size=12 does not divide over 8 devices; try 8 or 16" in done.stderr
    assert not (tmp_path / "x" / "config.json").exists()


def test_train_evaluate_config_from_the_command_line(cnn, tmp_path, jaxmodels_command):
    run = tmp_path / "run"
    done = jaxmodels_command("train", f"--config={cnn}", f"--workdir={run}", "--config.training.steps=20")
    assert done.returncode == 0, done.stderr
    assert "initialised with seed 0" in done.stdout and "test accuracy" in done.stdout and "next:" in done.stdout
    line = next(json.loads(t) for t in (run / "metrics.jsonl").read_text().splitlines() if '"test"' in t)
    done = jaxmodels_command("evaluate", f"--workdir={run}", "--json")
    values = json.loads(done.stdout)
    assert values["step"] == 20
    np.testing.assert_allclose([values["accuracy"], values["loss"]], [line["accuracy"], line["loss"]], rtol=1e-6)
    done = jaxmodels_command("config", f"--config={cnn}", f"--diff={run}")
    assert done.stdout == f"training.steps: 60 in {cnn}, 20 in {run}\n"
    again = jaxmodels_command("train", f"--config={run}", f"--workdir={run}")
    assert again.returncode == 0 and "resumed from" in again.stdout
    assert jaxmodels_command("evaluate", f"--workdir={run}@7").returncode == 2
    assert jaxmodels_command("evaluate", f"--workdir={run}", "--split=tset").returncode == 2


def test_dry_run_trains_nothing_and_counts_right(cnn, tmp_path, jaxmodels_command):
    done = jaxmodels_command("train", f"--config={cnn}", f"--workdir={tmp_path}/x", "--dry_run")
    assert done.returncode == 0, done.stderr
    parameters = (9 * 4 + 4) + (9 * 4 * 8 + 8) + (2 * 2 * 8 * 16 + 16) + (16 * 10 + 10)
    assert f"{parameters:,}" in done.stdout and "FLOPs per step" in done.stdout and "state per device" in done.stdout
    assert not (tmp_path / "x").exists()
