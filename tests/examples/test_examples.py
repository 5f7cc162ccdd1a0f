"""The examples of docs/extending.md, each in one file as a user would write it, run end to end; and the page shows these files."""

import json
import os
import re
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import small_configs
import warm_python
from conftest import ROOT
from flax import nnx

import jaxmodels
from jaxmodels.errors import Interrupted
from jaxmodels.runs.folder import RunFolder

HERE = Path(__file__).parent
FILES = sorted(path.name for path in HERE.glob("own_*.py"))
TIMES = {"seconds", "steps_per_second", "examples_per_second", "data_wait"}


def test_the_page_shows_the_files():
    page = (ROOT / "docs" / "extending.md").read_text()
    blocks = dict(re.findall(r"```python\n# (own_\w+\.py)\n(.*?)```", page, re.S))
    assert sorted(blocks) == FILES
    for name, text in blocks.items():
        assert text == (HERE / name).read_text(), f"docs/extending.md: {name} differs from tests/examples/{name}"


def test_models_stand_alone():
    page = (ROOT / "docs" / "extending.md").read_text()
    (code,) = re.findall(r"```python\n(from flax import nnx\n.*?)```", page, re.S)
    found = {}
    exec(code.replace("create(", "nnx.eval_shape(lambda: create(").replace("nnx.Rngs(0))", "nnx.Rngs(0)))"), found)  # shapes are enough
    assert sum(x.size for x in jax.tree.leaves(nnx.state(found["model"], nnx.Param))) == 124_439_808  # of the pretrained model


def test_all_of_them_train_from_the_command_line(tmp_path):
    for name in FILES:
        shutil.copy(HERE / name, tmp_path)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}
    command = ["-m", "jaxmodels", "train", "--config=own_config.py", "--workdir=run"]
    done = warm_python.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "stopping early: top_k is above 0.97" in done.stdout and re.search(r"validation +loss [\d.]+ +top_k", done.stdout)
    folder = RunFolder(tmp_path / "run")
    validation = folder.metrics("validation")
    assert [line["good_in_a_row"] for line in validation][-2:] == [1.0, 2.0]
    # The best checkpoint is the first with the best value of the user's metric, and its weights are tested.
    (test,) = folder.metrics("test")
    assert test["step"] == max(validation, key=lambda line: (line["top_k"], -line["step"]))["step"] and test["top_k"] > 0.9
    # The schedule: a triangle over 360 steps from 0.2 of the peak, also for a run that stopped early.
    for line in folder.metrics("train"):
        position = (line["step"] - 1) / 180
        assert line["learning_rate"] == pytest.approx(3e-3 * (0.2 + 0.8 * (position if position < 1 else 2 - position)), rel=1e-5)
    rows = (tmp_path / "run" / "table.md").read_text().splitlines()
    assert len(rows) == 2 + len(validation) + 1 and rows[-1].startswith(f"| {test['step']} | test |")
    config = json.loads(folder.config_file.read_text())
    assert config["model"]["rate"] == 0.1 and config["data"]["noise"] == 0.1


@pytest.fixture
def importable(monkeypatch):
    """Make the examples importable, in place of other modules of these names that tests made."""
    monkeypatch.syspath_prepend(HERE)
    for name in FILES:
        monkeypatch.delitem(sys.modules, name.removesuffix(".py"), raising=False)


def test_they_resume_exactly(tmp_path, importable):
    """The dropout of a tutorial's module, a callback's count and the state of a user's optimizer are restored exactly."""

    class StopAt(jaxmodels.Callback):
        def on_step(self, run, step, metrics):
            if step == 70 and not run.resumed:
                raise Interrupted("SIGTERM")

    config = jaxmodels.load_config(str(HERE / "own_config.py"), {"callbacks": ({"name": "own_callback:StopWhenGood", "metric": "top_k", "above": 2.0},)})
    jaxmodels.train(config, str(tmp_path / "whole"), quiet=True)
    with pytest.raises(Interrupted):
        jaxmodels.train(config, str(tmp_path / "cut"), quiet=True, callbacks=[StopAt()])
    jaxmodels.train(config, str(tmp_path / "cut"), quiet=True)
    one, other = ([{k: v for k, v in line.items() if k not in TIMES} for line in RunFolder(tmp_path / name).metrics()] for name in ("whole", "cut"))
    assert one == other


def test_a_loss_of_your_own(tmp_path, importable):
    config = small_configs.config(small_configs.CNN, task={"name": "classify", "loss": "own_loss:brier"}, optimizer__learning_rate=1e-2, training__steps=100)
    result = jaxmodels.train(config, str(tmp_path / "x"), quiet=True)
    assert result.metrics["test"]["accuracy"] > 0.7
    probabilities = jaxmodels.load(str(tmp_path / "x")).predict({"image": np.zeros((2, 8, 8, 1), np.float32)})
    assert probabilities.shape == (2, 10)
