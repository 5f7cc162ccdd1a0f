"""A pipeline of stages gives the results of one device; its memory and collectives; its bubble; models that cannot be pipelined."""

import json
import re

import jax
import numpy as np
import pytest
import small_configs
import warm_python
from conftest import HELPERS

from jaxmodels.errors import ConfigError
from jaxmodels.experiment.build import build_experiment
from jaxmodels.parallel import layout as layout_lib
from jaxmodels.parallel import pipeline
from jaxmodels.parallel.mesh import MeshSizes, make_mesh
from jaxmodels.runs.folder import RunFolder

SCANNED = small_configs.config(small_configs.GPT, model__scan=True, model__layers=4)


def pipelined(*arguments: str) -> dict:
    """Return the output of train_in_stages.py on eight simulated devices."""
    script = HELPERS / "train_in_stages.py"
    done = warm_python.run([script, *arguments], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def found():
    return pipelined()


@pytest.mark.parametrize("model", ["packed mixture", "padded encoder"])
def test_outputs_and_gradients_equal_one_device(found, model):
    """The outputs include a mixture's statistics, so these exclude bubbles."""
    assert found["models"][model] < 2e-5


@pytest.mark.slow
def test_equals_one_device_in_more_configurations():
    """Training on pipeline=4,data=2 and pipeline=2,fsdp=2,tensor=2, with 4 and 8 microbatches, with and without accumulation; rings and
    heads of attention, experts with capacity, and an encoder-decoder with relative positions in stages. `pytest -m slow tests/parallel/test_pipeline.py`"""
    found = pipelined("more")
    assert len(found) == 12 and max(found.values()) < 2e-5, found


def test_dry_run_states_the_schedule_and_counts_no_bubble(found):
    plan = found["exchange"]
    assert plan["pipeline"] == pipeline.describe(4, 4) and plan["notes"] == []
    assert plan["operations"][0] == plan["operations"][1]


def test_a_stage_stores_its_layers_and_sends_only_activations(found):
    case = found["exchange"]
    assert case["blocks"] == 1 / 4
    moved = [(shape, where) for shape, kind, where in case["collectives"] if kind == "collective-permute"]
    # One in the loop over turns in each direction, of a device's rows [1, 32 / (2 accumulated × 4 microbatches × 2), T, D].
    assert len(moved) == 2 and all(shape.startswith("f32[1,2,16,32]") and "/while/body/" in where for shape, where in moved)
    assert sum("transpose" in where for _, where in moved) == 1
    # No parameter leaves its stage: the other gathers are of activations [.., T, D], before and after all turns (in the one loop, over
    # accumulated batches), since stages share the rows there.
    gathered = [(shape, where) for shape, kind, where in case["collectives"] if kind in ("all-gather", "all-to-all", "reduce-scatter")]
    assert all(re.match(r"f32\[[\d,]+,16,32\]", shape) and where.count("while/body") == 1 for shape, where in gathered), gathered
    assert case["logits"] == 32 // (2 * 2 * 4) * 16  # of a device's tokens: rows over accumulated batches, data and stages


def test_schedule_gives_the_closed_form(found):
    case = found["schedule"]
    assert max(case["y"], case["sums"], case["one row"]) < 1e-6
    assert case["counted"] == [8.0] * 8  # each layer ran once on each microbatch, and bubbles added nothing


def test_every_layer_and_microbatch_draws_independently(found):
    drawn = np.asarray(found["schedule"]["drawn"])  # [16 rows, 8 layers], of 8 microbatches
    assert (drawn[:8] == drawn[8:]).all()  # rows r and r + 8 are of one microbatch
    assert len(np.unique(drawn)) == 8 * 8


def test_bubble():
    # By hand: with 4 stages and 4 microbatches, a device works in 4 of 7 turns.
    assert pipeline.bubble(4, 4) == 3 / 7
    assert pipeline.bubble(4, 16) == 3 / 19
    assert pipeline.bubble(1, 8) == 0
    assert pipeline.describe(4, 4) == "4 stages, 4 microbatches in 7 turns: each stage is idle in 43% of them"


def test_microbatches_of_few_rows():
    layout = layout_lib.Layout(make_mesh(MeshSizes(), jax.devices()[:1]), microbatches=4)
    assert [pipeline.microbatches_of(rows, layout) for rows in (1, 2, 3, 6, 8, 20)] == [1, 2, 3, 3, 4, 4]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mesh__pipeline": 3}, r"mesh.pipeline=3 does not divide the 4 layers of the model; sizes that do: 1, 2, 4"),
        ({"mesh__pipeline": 2, "model__scan": False}, r"mesh.pipeline=2 needs a Transformer with model.scan=True"),
    ],
)
def test_models_that_cannot_be_pipelined(changes, message):
    with pytest.raises(ConfigError, match=message):
        build_experiment(small_configs.config(SCANNED, **changes))
    with pytest.raises(ConfigError, match="needs a Transformer"):
        build_experiment(small_configs.config(small_configs.CNN, mesh__pipeline=2))


@pytest.mark.slow
def test_command(tmp_path, jaxmodels_command):
    """Train, evaluate and sample; the error for a batch that does not divide is one line."""
    config = tmp_path / "config.json"
    config.write_text(json.dumps(small_configs.config(SCANNED, training__steps=2, task__sample_length=8, mesh__pipeline=4, log__every=1)))
    train = ["train", f"--config={config}", f"--workdir={tmp_path}/run", "--cpu_devices=8"]
    refused = jaxmodels_command(*train, "--config.data.eval_batch_size=12")
    assert refused.returncode == 2 and "eval_batch_size=12 does not divide over 2 devices × 4 microbatches; try 8 or 16" in refused.stderr
    done = jaxmodels_command(*train)
    assert done.returncode == 0, done.stderr
    assert "4 stages, 4 microbatches in 7 turns" in done.stdout and "sample:" in done.stdout
    start = RunFolder(tmp_path / "run").manifest()["starts"][0]
    assert start["pipeline"] == {"stages": 4, "microbatches": 4, "bubble": 3 / 7}
    assert RunFolder(tmp_path / "run").manifest()["fallbacks"] == []
