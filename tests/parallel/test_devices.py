"""Eight devices give the results of one, and a run resumes on another number of devices."""

import json

import numpy as np
import pytest
import small_configs
from run_state import final_state

from jaxmodels.errors import ConfigError
from jaxmodels.parallel.mesh import MeshSizes, make_mesh
from jaxmodels.runs.folder import RunFolder

# Uses of the eight devices. Under pmap each device draws its own dropout masks, so there is no dropout.
SPREADS = {
    "cnn": (["--config.partition=pmap"], {"model__dropout": 0.0}),
    "lstm": (["--config.mesh.fsdp=8", "--config.mesh.data=1"], {}),
    "gpt": (["--config.mesh.fsdp=2", "--config.mesh.tensor=2", "--config.sharding.optimizer=data"], {"model__vocab_multiple": 128}),
}


@pytest.mark.parametrize("name", [*(pytest.param(name, marks=pytest.mark.slow) for name in ("cnn", "lstm")), "gpt"])
def test_eight_devices_equal_one_and_resume_across(name, tmp_path, jaxmodels_command):
    spread, changes = SPREADS[name]
    config = small_configs.config(small_configs.ALL[name], training__steps=20, training__accumulate=2, training__ema=0.9, checkpoint__every=10, **changes)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))

    def train(workdir, devices, *more):
        done = jaxmodels_command(
            "train", f"--config={path}", f"--workdir={tmp_path}/{workdir}", f"--cpu_devices={devices}", *(spread if devices == 8 else ()), *more
        )
        assert done.returncode == 0, done.stderr

    train("one", 1)
    train("eight", 8)
    one, eight = final_state(tmp_path / "one"), final_state(tmp_path / "eight")
    # Float32 sums in another order; Adam divides small differences by small numbers.
    for key in one[0]:
        np.testing.assert_allclose(one[0][key], eight[0][key], rtol=2e-3, atol=2e-4, err_msg=key)
    for a, b in zip(one[1], eight[1], strict=True):
        assert a.keys() == b.keys() and (a["step"], a["split"]) == (b["step"], b["split"])
        np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-4)
    mesh = RunFolder(tmp_path / "eight").manifest()["starts"][0]["mesh"]
    assert {axis: size for axis, size in mesh.items() if size > 1} == {
        "cnn": {"data": 8},
        "lstm": {"fsdp": 8},
        "gpt": dict.fromkeys(("data", "fsdp", "tensor"), 2),
    }[name]
    if name == "gpt":  # the EMA of a child has its own sharding, not that of the parameters
        train("child", 8, f"--config.init_from={tmp_path}/eight", "--config.training.steps=3", "--config.checkpoint.every=3")
    # The first half on eight, the second on one.
    import shutil

    shutil.rmtree(tmp_path / "eight" / "checkpoints" / "20")
    train("eight", 1)
    starts = RunFolder(tmp_path / "eight").manifest()["starts"]
    assert [start["from_step"] for start in starts] == [0, 10] and starts[1]["mesh"]["data"] == 1
    mixed = final_state(tmp_path / "eight")
    for key in one[0]:
        np.testing.assert_allclose(one[0][key], mixed[0][key], rtol=2e-3, atol=2e-4, err_msg=key)


def test_mesh_sizes_that_do_not_fit():
    assert make_mesh(MeshSizes()).shape["data"] == 1
    for size in (3, 0, -2):
        with pytest.raises(ConfigError, match="config.mesh"):
            make_mesh(MeshSizes(data=size))
