"""Train steps compiled in one process and loaded in another: the same runs, and reasons not to load."""

import hashlib
import io
import json
import re
import shutil
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import jax
import numpy as np
import pytest
import small_configs
import warm_python
from conftest import HELPERS, ROOT
from rich.console import Console
from run_state import final_state
from save_step import FIGURES, compiled_here

import jaxmodels
from jaxmodels.errors import ConfigError
from jaxmodels.experiment.build import build_experiment
from jaxmodels.hardware import compiler_options
from jaxmodels.parallel.mesh import MeshSizes, make_mesh
from jaxmodels.runs.folder import RunFolder
from jaxmodels.runs.json_files import write_json
from jaxmodels.training import compare, executable, trainer

CONFIG = small_configs.config(small_configs.GPT, training__steps=12, training__accumulate=2, training__ema=0.9, evaluation={}, log__every=4)
ONE = small_configs.config(CONFIG, training__steps=1)  # with a constant learning rate, the same program


def save_elsewhere(config, folder, devices=1):
    """Save the step of a config in a separate process."""
    file = Path(folder).with_suffix(".config.json")
    file.write_text(json.dumps(config))
    done = warm_python.run([HELPERS / "save_step.py", file, folder, str(devices)], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of the step on one device."""
    folder = tmp_path_factory.mktemp("saved") / "step"
    save_elsewhere(ONE, folder)
    return folder


def run(config, workdir, plan=None):
    """Return the output of a run, and its last start in the manifest."""
    output = io.StringIO()
    trainer.train(build_experiment(config), str(workdir), console=Console(file=output, width=400), **compare.for_training(plan))
    return output.getvalue(), RunFolder(workdir).manifest()["starts"][-1]


def assert_same(one, other):
    """Return the parameters, and the lines of metrics without times."""
    (params, lines), (other_params, other_lines) = final_state(one), final_state(other)
    assert params.keys() == other_params.keys()
    for name in params:
        np.testing.assert_array_equal(params[name], other_params[name], err_msg=name)
    assert [(line["step"], line["split"], line["loss"]) for line in lines] == [(line["step"], line["split"], line["loss"]) for line in other_lines]


def test_the_page_describes_the_executable(saved):
    page = json.loads((saved / executable.PAGE).read_text())
    assert page["versions"] == {name: metadata.version(name) for name in ("jaxmodels", "jax", "jaxlib")}
    assert page["devices"] == {"platform": "cpu", "kind": "cpu", "count": 1, "places": [[0, 0]]} and page["mesh"]["data"] == 1
    assert page["config"] == json.loads(json.dumps(build_experiment(ONE).config)) and page["plan"] == FIGURES
    assert page["executable"]["bytes"] == (saved / executable.PROGRAM).stat().st_size > 10_000
    assert re.fullmatch("[0-9a-f]{64}", page["program"])
    state = [path for path in page["arguments"] if path.startswith("0/params/")]
    assert page["arguments"]["0/params/blocks/0/mlp/up/kernel"] == "float32[16,64] (None, None)" and len(state) == len(small_parameters())
    assert page["results"]["0/step"] == "int32[] ()" and page["results"]["1/loss/0"] == "float32[] ()"


def small_parameters():
    return jax.tree.leaves(build_experiment(CONFIG).state_shapes().params)


def test_a_run_that_loads_it_is_bitwise_equal(saved, tmp_path):
    output, start = run(CONFIG, tmp_path / "loaded", saved)
    assert f"train_step: loaded from {saved}" in output and "warning" not in output
    compiled = start["compiled"]["train_step"]
    assert compiled["loaded"] == str(saved) and "not_loaded" not in compiled and not RunFolder(tmp_path / "loaded").manifest()["fallbacks"]
    output, start = run(CONFIG, tmp_path / "compiled")
    assert "loaded" not in start["compiled"]["train_step"]
    assert_same(tmp_path / "loaded", tmp_path / "compiled")


def test_nothing_is_compiled_for_a_step_that_is_loaded(saved, tmp_path, monkeypatch):
    compiled = []
    original = jax.stages.Lowered.compile
    monkeypatch.setattr(jax.stages.Lowered, "compile", lambda self, *args, **more: compiled.append(self) or original(self, *args, **more))
    _, start = run(CONFIG, tmp_path / "x", saved)
    others = [name for name in start["compiled"] if name != "train_step"]
    assert len(compiled) == len(others) > 0


@pytest.mark.slow
def test_eight_devices(tmp_path, jaxmodels_command):
    config = small_configs.config(CONFIG, model__layers=1, mesh__fsdp=2, mesh__tensor=2)
    save_elsewhere(config, tmp_path / "step", 8)
    page = json.loads((tmp_path / "step" / executable.PAGE).read_text())
    assert page["devices"]["count"] == 8 and page["mesh"] | {"data": 2, "fsdp": 2, "tensor": 2} == page["mesh"]
    assert page["arguments"]["0/params/blocks/0/mlp/up/kernel"] == "float32[16,64] ('fsdp', 'tensor')"
    for workdir, more in (("loaded", [f"--plan={tmp_path}/step"]), ("compiled", [])):
        done = jaxmodels_command("train", f"--config={tmp_path}/step.config.json", f"--workdir={tmp_path}/{workdir}", "--cpu_devices=8", *more)
        assert done.returncode == 0, done.stderr
    assert RunFolder(tmp_path / "loaded").manifest()["starts"][0]["compiled"]["train_step"]["loaded"] == f"{tmp_path}/step"
    assert_same(tmp_path / "loaded", tmp_path / "compiled")


@pytest.mark.slow
def test_two_processes_load_what_the_first_of_two_saved(tmp_path):
    config = small_configs.config(small_configs.CNN, training__steps=6, evaluation={}, log__every=2)
    (tmp_path / "c.json").write_text(json.dumps(config))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{probe.getsockname()[1]}"

    def both(*command):
        pair = [subprocess.Popen([*map(str, command), *more], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for more in arguments]
        output = [process.communicate(timeout=300)[0] for process in pair]
        assert [process.returncode for process in pair] == [0, 0], output

    arguments = [[coordinator, str(i)] for i in range(2)]
    both(sys.executable, HELPERS / "save_step.py", tmp_path / "c.json", tmp_path / "step", 1)
    arguments = [[f"--coordinator={coordinator}", "--processes=2", f"--process={i}"] for i in range(2)]
    train = [sys.executable, "-m", "jaxmodels", "train", f"--config={tmp_path}/c.json", "--cpu_devices=1"]
    both(*train, f"--workdir={tmp_path}/loaded", f"--plan={tmp_path}/step")
    both(*train, f"--workdir={tmp_path}/compiled")
    assert RunFolder(tmp_path / "loaded").manifest()["starts"][0]["compiled"]["train_step"]["loaded"] == f"{tmp_path}/step"
    assert_same(tmp_path / "loaded", tmp_path / "compiled")


# Reasons not to load: one line, the manifest, and a run that compiles as usual


def changed(saved, folder, **values):
    """A copy of the saved step, with another page."""
    shutil.copytree(saved, folder)
    page = json.loads((folder / executable.PAGE).read_text())
    for key, value in values.items():
        section, _, name = key.partition("__")
        if name:
            page[section][name] = value
        else:
            page[section] = value
    write_json(folder / executable.PAGE, page)
    return folder


def refused(config, workdir, plan):
    """Return the reason of a run for not loading; it compiled and finished."""
    output, start = run(config, workdir, plan)
    reason = start["compiled"]["train_step"]["not_loaded"]
    line = f"train_step: {plan} is not loaded: {reason}; the step is compiled instead"
    assert output.count("warning: " + line) == 1 and line in RunFolder(workdir).manifest()["fallbacks"]
    assert "loaded" not in start["compiled"]["train_step"] and RunFolder(workdir).metrics("train")
    return reason


def reason_for(folder, config=ONE, program=None):
    """Return why a step would not be loaded here, without a run; None if it would be loaded."""
    saved, config = executable.open_saved(folder), build_experiment(config).config
    return saved.load(None, program or saved.page["program"], compiler_options.choose({}, jax.devices()[0]).options, config, make_mesh(MeshSizes()))[1]


def test_a_run_states_why_it_compiles(saved, tmp_path):
    folder = changed(saved, tmp_path / "changed", versions__jaxlib="0.9.1")
    assert refused(ONE, tmp_path / "x", folder) == reason_for(folder) == f"jaxlib is 0.9.1 in the saved step, {jax.lib.__version__} here"


@pytest.mark.parametrize(
    "page, reason",
    [
        ({"versions__jaxlib": "0.9.1"}, f"jaxlib is 0.9.1 in the saved step, {jax.lib.__version__} here"),
        ({"versions__libtpu": "0.0.1"}, "libtpu is 0.0.1 in the saved step, (absent) here"),
        (
            {"devices__count": 64, "devices__kind": "v5p"},
            "the devices' count is 64 in the saved step, 1 here; the devices' kind is v5p in the saved step, cpu here",
        ),
        ({"mesh__fsdp": 2}, "mesh.fsdp is 2 in the saved step, 1 here"),
        ({"devices__places": [[1, 0]]}, "the mesh has the devices in another order, or with other ids"),
        ({"compiler_options__xla_cpu_enable_fast_math": True}, "compiler option xla_cpu_enable_fast_math is True in the saved step, (absent) here"),
        ({"program": "0" * 64}, "the config is the same, but the program of the step differs: code or shapes of the data have changed"),
    ],
)
def test_another_page(saved, tmp_path, page, reason):
    program = json.loads((saved / executable.PAGE).read_text())["program"]
    assert reason_for(changed(saved, tmp_path / "changed", **page), program=program) == reason


def test_another_config(saved):
    changes = {"model__width": 32, "training__accumulate": 4, "optimizer__learning_rate": 1e-3, "seed": 3}
    reasons = (
        "config.model.width is 16 in the saved step, 32 here",
        "config.optimizer.learning_rate is 0.003 in the saved step, 0.001 here",
        "config.training.accumulate is 2 in the saved step, 4 here",
    )
    assert reason_for(saved, small_configs.config(ONE, **changes), program="0" * 64) == "; ".join(reasons)


def test_a_config_whose_step_is_the_same_loads(saved, tmp_path):
    config = small_configs.config(ONE, seed=4, checkpoint__every=7, log__tensorboard=False)
    assert run(config, tmp_path / "x", saved)[1]["compiled"]["train_step"]["loaded"] == str(saved)


def test_a_truncated_file(saved, tmp_path):
    folder = changed(saved, tmp_path / "cut")
    content = (folder / executable.PROGRAM).read_bytes()
    (folder / executable.PROGRAM).write_bytes(content[:-100])
    assert reason_for(folder) == "it cannot be read: executable.bin is not the file that executable.json describes"


def test_a_file_that_is_not_an_executable(saved, tmp_path):
    folder = changed(saved, tmp_path / "bad", executable={"bytes": 3, "sha256": hashlib.sha256(b"bad").hexdigest()})
    (folder / executable.PROGRAM).write_bytes(b"bad")
    assert refused(ONE, tmp_path / "x", folder).startswith("it cannot be read: ")


def test_of_several_processes_all_load_it_or_none(saved, monkeypatch):
    monkeypatch.setattr(
        executable.session, "gather", lambda name, value=None: [value, "jax is 1.0 in the saved step, 2.0 here"] if name == "executable" else [value]
    )
    monkeypatch.setattr(executable.Saved, "_read", lambda self, *_: "loaded")
    assert reason_for(saved) == "process 1: jax is 1.0 in the saved step, 2.0 here"


def test_pmap_loads_nothing(saved, tmp_path):
    assert "config.partition is 'pmap'" in refused(small_configs.config(ONE, partition="pmap"), tmp_path / "x", saved)


def test_an_invalid_folder_is_an_error_before_the_start(saved, tmp_path):
    (tmp_path / "empty").mkdir()
    half = changed(saved, tmp_path / "half")
    (half / executable.PROGRAM).unlink()
    for folder, reason in (("nothing", "there is no such folder"), ("empty", "it has no executable.json"), ("half", "it has no executable.bin")):
        with pytest.raises(ConfigError, match=rf"--plan=.*{folder} is not a saved step \({reason}\)"):
            jaxmodels.train(ONE, str(tmp_path / "x"), plan=str(tmp_path / folder), quiet=True)
    assert not (tmp_path / "x").exists()


def test_saving_over_an_older_step_and_into_a_folder_that_cannot_be_written(tmp_path):
    step = compiled_here(ONE)
    first = executable.save(step, tmp_path / "x", {})
    assert executable.save(step, tmp_path / "x", FIGURES)["program"] == first["program"]
    assert executable.open_saved(tmp_path / "x").page["plan"] == FIGURES
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="--save=.* cannot be written"):
        executable.save(step, tmp_path / "file" / "x", {})


@pytest.mark.tpu_compiler
def test_a_step_for_tpus(tmp_path):
    """The executable and its page are written. Loading on a TPU cannot be tested without one."""
    from jaxmodels.plan import compiler

    step = compiler.compile_step(build_experiment(small_configs.config(CONFIG, mesh__fsdp=2)), "v5e:2x2")
    page = executable.save(step, tmp_path / "step", FIGURES)
    assert page["versions"]["libtpu"] and page["devices"]["platform"] == "tpu" and page["devices"]["kind"] == "v5e"
    assert sorted(place[0] for place in page["devices"]["places"]) == [0, 1, 2, 3] and len(page["devices"]["places"][0]) == 5
    assert page["executable"]["bytes"] == (tmp_path / "step" / executable.PROGRAM).stat().st_size > 100_000
    assert page["compiler_options"] == step.record.options and not any("dump" in name for name in page["compiler_options"])
    # Compiled again, it is the same program.
    again = compiler.compile_step(build_experiment(small_configs.config(CONFIG, mesh__fsdp=2)), "v5e:2x2")
    assert again.record.program == page["program"]
    # A CPU does not load it.
    reason = "the devices' count is 4 in the saved step, 1 here; the devices' kind is v5e in the saved step, cpu here; the devices' platform is tpu in the saved step, cpu here"
    assert refused(ONE, tmp_path / "x", tmp_path / "step") == reason
