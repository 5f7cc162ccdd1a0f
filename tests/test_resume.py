"""Exact resume: killed at any moment, the same command ends where an uninterrupted run ends, to the bit."""

import json
import random
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import small
from conftest import ROOT

from jaxmodels.training.checkpoint import Checkpoints
from jaxmodels.training.run_folder import RunFolder

TIMES = {"seconds", "steps_per_second", "examples_per_second", "data_wait"}


def write_config(tmp_path, config):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    return path


def train(path, workdir, *extra):
    command = [sys.executable, "-m", "jaxmodels", "train", f"--config={path}", f"--workdir={workdir}", *extra]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process, status=0):
    output, _ = process.communicate(timeout=300)
    assert process.returncode == status, output
    return output


def final_state(workdir):
    """Every array of the last checkpoint by path, and the metrics without times."""
    checkpoints = Checkpoints(RunFolder(workdir).checkpoints, read_only=True)
    step = checkpoints.steps()[-1]
    parts = ("params", "ema", "stats", "opt_state", "metrics", "step", "diverged_at")
    shapes = checkpoints.shapes(step, *parts)
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = {k: v for k, v in shapes.items() if not isinstance(v, dict) or v}
    wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), wanted)
    arrays = checkpoints.restore_part(step, wanted)
    checkpoints.close()
    metrics = [{k: v for k, v in line.items() if k not in TIMES} for line in RunFolder(workdir).metrics()]
    return {jax.tree_util.keystr(k): np.asarray(v) for k, v in jax.tree_util.tree_leaves_with_path(arrays)}, metrics


def assert_same(one, other):
    arrays, metrics = final_state(one)
    arrays_2, metrics_2 = final_state(other)
    assert arrays.keys() == arrays_2.keys()
    assert any("opt_state" in k for k in arrays) and any("ema" in k for k in arrays)
    for key in arrays:
        assert arrays[key].dtype == arrays_2[key].dtype
        np.testing.assert_array_equal(arrays[key], arrays_2[key], err_msg=key)
    assert metrics == metrics_2


@pytest.mark.parametrize("name", [*(pytest.param(name, marks=pytest.mark.slow) for name in ("cnn", "lstm")), "gpt"])
def test_sigkill_at_random_moments_then_again_is_bitwise_equal(name, tmp_path):
    # 1259 training digits in batches of 32 are 39.3 steps an epoch, so that a resume falls into the middle of one;
    # checkpoints are close enough together that kills fall into saves as well.
    config = small.config(small.ALL[name], training__accumulate=2, training__ema=0.9, checkpoint__every=3, checkpoint__best="loss")
    path = write_config(tmp_path, config)
    finish(train(path, tmp_path / "whole"))
    generator = random.Random(name)
    kills = 0
    for _ in range(3):
        process = train(path, tmp_path / "killed")
        checkpoints = tmp_path / "killed" / "checkpoints"
        before = _latest(checkpoints)
        while process.poll() is None and _latest(checkpoints) <= before:
            time.sleep(0.01)
        time.sleep(generator.uniform(0, 0.3))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.communicate()
        if _latest(checkpoints) >= config["training"]["steps"]:
            break
    assert kills
    assert "resumed from" in finish(train(path, tmp_path / "killed"))
    assert_same(tmp_path / "whole", tmp_path / "killed")


def _latest(checkpoints):
    return max([int(p.name) for p in checkpoints.glob("*") if p.name.isdigit()], default=0)


def test_kill_in_the_middle_of_a_save_leaves_the_last_good_checkpoint(tmp_path):
    # The process kills itself from inside the save: its folder is half-written then.
    config = small.config(small.CNN, training__accumulate=2, training__ema=0.9)
    path = write_config(tmp_path, config)
    finish(train(path, tmp_path / "whole"))
    program = f"""
import os, signal
from orbax.checkpoint import PyTreeCheckpointHandler
from jaxmodels import cli
original = PyTreeCheckpointHandler.async_save
async def save(self, directory, *args, **kwargs):
    futures = await original(self, directory, *args, **kwargs)
    if "30" in str(directory).split("checkpoints")[-1]:
        os.kill(os.getpid(), signal.SIGKILL)
    return futures
PyTreeCheckpointHandler.async_save = save
cli.main(["train", "--config={path}", "--workdir={tmp_path / 'killed'}"])
"""
    process = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert _latest(tmp_path / "killed" / "checkpoints") == 20
    assert "checkpoints/20" in finish(train(path, tmp_path / "killed"))
    assert_same(tmp_path / "whole", tmp_path / "killed")


def test_sigterm_then_again_is_bitwise_equal(tmp_path):
    config = small.config(small.GPT, training__ema=0.9, training__steps=400, checkpoint__every=1000, log__every=1)
    path = write_config(tmp_path, config)
    finish(train(path, tmp_path / "whole"))
    process = train(path, tmp_path / "stopped")
    metrics = tmp_path / "stopped" / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.read_text()):
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    assert "SIGTERM: saved" in finish(process, 75)
    assert "resumed from" in finish(train(path, tmp_path / "stopped"))
    assert_same(tmp_path / "whole", tmp_path / "stopped")


def test_a_damaged_checkpoint_is_moved_aside_and_said(tmp_path):
    config = small.config(small.CNN, training__ema=0.9)
    path = write_config(tmp_path, config)
    finish(train(path, tmp_path / "run"))
    before = final_state(tmp_path / "run")
    damaged = tmp_path / "run" / "checkpoints" / "60"
    for file in damaged.rglob("*"):
        if file.is_file() and "/d/" in str(file):
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    output = finish(train(path, tmp_path / "run"))
    assert "checkpoints/60 cannot be read" in output and "resumed from" in output and "checkpoints/50" in output
    assert (tmp_path / "run" / "checkpoints" / "unreadable-60").is_dir()
    assert any("cannot be read" in f for f in RunFolder(tmp_path / "run").manifest()["fallbacks"])
    after = final_state(tmp_path / "run")
    assert before[1] == after[1]
    for key in before[0]:
        np.testing.assert_array_equal(before[0][key], after[0][key])
