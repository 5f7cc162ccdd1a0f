"""`jaxmodels plan`: errors before compiling; consistent figures; the analytic models without a compiler."""

import dataclasses
import json
import tempfile
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import small_configs

from jaxmodels import api
from jaxmodels.cli import main as cli
from jaxmodels.errors import ConfigError, RunError
from jaxmodels.experiment.build import build_experiment
from jaxmodels.hardware import absent, topologies
from jaxmodels.plan import compiler, search
from jaxmodels.plan import plan as plan_lib
from jaxmodels.plan.cost import PARTS
from jaxmodels.training.compile import CompileRecord

GPT = small_configs.config(small_configs.GPT, training__steps=1000)
LARGE = {"model__width": 8192, "model__layers": 4, "model__heads": 64, "model__scan": True}


@pytest.fixture
def without_libtpu(monkeypatch):
    monkeypatch.setattr(absent, "has_compiler", lambda platform: platform != "tpu")


@pytest.fixture
def write(tmp_path):
    """Write a config file for the command line."""

    def write(config):
        path = tmp_path / "config.json"
        path.write_text(json.dumps(config))
        return f"--config={path}"

    return write


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["--topology=v5p-1000"], "the nearest are v5p-896 and v5p-1024"),
        (["--topology=tpu7-8"], "Did you mean 'tpu7x-8'?"),
        (["--topology=2xv5e-4"], "--config.mesh.slices=2"),
        (["--topology=v5e-4", "--config.mesh.data=3"], "one of these fits: --config.mesh.data=4"),
        (["--topology=v5e-8", "--config.data.batch_size=12"], "config.data.batch_size=12 does not divide over 8 devices"),
        (["--topology=v5e-4", "--write=x.py"], "--write needs --search"),
        (["--topology=v5e-4", "--budget=60"], "--budget needs --search"),
        (["--topology=v5e-4", "--json=/no/such/x.json"], "--json=/no/such/x.json: there is no folder '/no/such'"),
        (["--topology=v5e-4", "--hlo=/"], "--hlo=/ is a folder"),
        (["--topology=h100x8", "--save=x"], "--save=x: a step compiled for h100x8 without a GPU"),
    ],
)
def test_errors_end_with_status_2(arguments, expected, write, capsys, without_libtpu):
    assert cli.run(["plan", write(GPT), *arguments]) == 2
    output = capsys.readouterr()
    assert expected in output.err and output.err.count("\n") == 1 and not output.out


def test_without_libtpu_the_plan_is_analytic_with_a_note(write, tmp_path, capsys, without_libtpu):
    file = tmp_path / "plan.json"
    assert cli.run(["plan", write(GPT), "--topology=v5e-4", f"--json={file}"]) == 0
    output = capsys.readouterr().out
    assert "by the analytic model" in output and "pip install 'jaxmodels[plan]'" in output
    plan = json.loads(file.read_text())
    assert plan["method"] == plan["step_seconds_method"] == "analytic" and plan["fits"]
    assert plan["cycles"] is None and plan["compile_seconds"] is None
    check_sums(plan)
    # 3 × 2 FLOPs for each weight and token, and the products of attention.
    assert plan["model_flops_per_step"] == 3 * 16 * 16 * (2 * (2 * 12 * 16**2 + 16 * vocab()) + 2 * 2 * 2 * 16 * 16)
    attended = 3 * 16 * 16 * (2 * (2 * 12 * 16**2 + 16 * vocab()) + 2 * 2 * 2 * 16 * 17 // 2)
    assert plan["mfu_attended"] == pytest.approx(plan["mfu"] * attended / plan["model_flops_per_step"])
    assert f"{plan['mfu_attended']:.1%} without masked attention scores" in output
    assert [each["kind"] for each in plan["collectives"]] == ["all-reduce"]


def vocab() -> int:
    return build_experiment(GPT).dataset.info["vocab_size"]


def check_sums(plan: dict) -> None:
    """Check the figures that follow from others."""
    assert plan["peak_bytes_per_device"] == sum(plan["memory"].values()) > 0
    assert set(plan["parts"]) == set(PARTS) and plan["step_seconds"] == pytest.approx(sum(plan["parts"].values()))
    low, high = plan["step_seconds_range"]
    assert 0 < low <= plan["step_seconds"] <= high
    assert plan["model_flops_per_device"] == plan["model_flops_per_step"] / plan["devices"]
    assert plan["mfu"] == pytest.approx(plan["model_flops_per_device"] / plan["step_seconds"] / plan["device_flops_per_second"])
    assert plan["tokens_per_second_per_chip"] * plan["step_seconds"] * plan["chips"] == pytest.approx(16 * plan["batch_size"])
    assert plan["examples_per_second_per_chip"] * 16 == pytest.approx(plan["tokens_per_second_per_chip"])
    assert plan["run_seconds"] == pytest.approx(1000 * plan["step_seconds"])
    assert plan["chip_hours"] == pytest.approx(plan["run_seconds"] * plan["chips"] / 3600)
    assert plan["versions"]["jax"] == jax.__version__


def test_gpus_without_their_compiler(write, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(absent, "has_compiler", lambda platform: platform != "gpu")
    assert cli.run(["plan", write(GPT), "--topology=2xh100x4", f"--json={tmp_path / 'plan.json'}"]) == 0
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["method"] == "analytic" and plan["devices"] == 8 and "jax-cuda" in plan["notes"][0]
    check_sums(plan)


@pytest.mark.parametrize("name", ["--hlo", "--save"])
def test_without_libtpu_there_is_no_program(name, write, tmp_path, capsys, without_libtpu):
    assert cli.run(["plan", write(GPT), "--topology=v5e-4", f"{name}={tmp_path}/x"]) == 1
    assert "libtpu, the compiler for TPUs, is not installed" in capsys.readouterr().err


def test_the_error_of_a_step_that_does_not_fit_states_by_how_much_and_what_to_change(write, tmp_path, capsys, without_libtpu):
    file = tmp_path / "plan.json"
    assert cli.run(["plan", write(small_configs.config(GPT, **LARGE)), "--topology=v5e-4", f"--json={file}"]) == 1
    printed, page = capsys.readouterr().err, json.loads(file.read_text())
    assert "does not fit v5e-4 according to the analytic model: it needs" in printed and "a device has 16.91 GB" in printed and "GB less" in printed
    assert "the state alone" in printed and "--config.mesh.fsdp" in printed and "--search" in printed
    assert not page["fits"] and page["peak_bytes_per_device"] > page["device_bytes"]


@pytest.mark.parametrize(
    "changes, expected, unexpected",
    [
        ({}, ["--config.model.remat=full", "--config.training.accumulate=2", "--config.data.batch_size=8", "in place of mesh.data"], ["the state alone"]),
        ({"model__remat": "full"}, ["--config.training.accumulate=2"], ["remat"]),
        ({"mesh": {"data": 1, "fsdp": 4}, "training__accumulate": 16}, ["--config.data.batch_size=8"], ["mesh.data", "accumulate"]),
    ],
)
def test_only_possible_changes_are_suggested(changes, expected, unexpected):
    error = compiler.does_not_fit(
        build_experiment(small_configs.config(GPT, **changes)), topologies.parse("v5e-4"), 20 * 10**9, 16 * 10**9, 10**9, by="the compiler"
    )
    assert "needs 20.00 GB and a device has 16.00 GB, 4.00 GB less" in str(error) and error.exit_status == 1
    assert all(each in str(error) for each in expected) and not any(each in str(error) for each in unexpected)


@pytest.mark.parametrize(
    "message, needed",
    [
        (
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 24.50G of 15.75G hbm. Exceeded hbm capacity by 8.75G.",
            24.5,
        ),
        (
            "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO temporaries (26.84G) exceeds available HBM (15.75G). HLO",
            26.84,
        ),
        ("RESOURCE_EXHAUSTED: something else", None),
    ],
)
def test_memory_errors_of_compilers_are_parsed(message, needed, monkeypatch):
    def fail(*_):
        raise jax.errors.JaxRuntimeError(message)

    with pytest.raises(compiler.DoesNotFit) as error:
        compile_with(fail, monkeypatch)
    assert error.value.needed == (None if needed is None else round(needed * 2**30))
    assert error.value.available == (topologies.parse("v5e-1").chip.memory_per_device if needed is None else round(15.75 * 2**30))
    assert needed or "something else" in str(error.value)


def compile_with(compile_train_step, monkeypatch):
    """Make `compile_step` use a device of this process as if it were a TPU, with another compiler."""
    monkeypatch.setattr(absent, "devices", lambda _: jax.devices()[:1])
    monkeypatch.setattr(compiler, "compile_train_step", compile_train_step)
    return compiler.compile_step(build_experiment(GPT), "v5e-1")


def test_another_failure_of_the_compiler_is_one_line_and_a_file(monkeypatch, tmp_path):
    message = "INTERNAL: Mosaic failed to compile.\n" + "much more\n" * 50

    def fail(*_):
        raise jax.errors.JaxRuntimeError(message)

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    with pytest.raises(RunError) as error:
        compile_with(fail, monkeypatch)
    (line,) = str(error.value).splitlines()
    assert line.startswith("the compiler failed for v5e-1: INTERNAL: Mosaic failed to compile. Its whole output is in /")
    log = Path(line.rpartition(" is in ")[2].rstrip(".")).read_text()
    assert log.count("much more") == 50 and "Traceback" in log and "python_docs" in log


def test_a_program_that_jaxlib_cannot_read_comes_from_its_compiler(monkeypatch, tmp_path):
    class Unreadable:
        def as_text(self):
            raise jax.errors.JaxRuntimeError("INTERNAL: async-update instruction should have 1 operands but sees 3")

    def compile_train_step(experiment, *_):
        folder = experiment.config["compiler_options"]["xla_dump_to"]
        if written:
            for name, text in (("probe", "HloModule p"), ("jit_step", "HloModule the_step")):
                Path(folder, f"module_0000.{name}.after_codegen.txt").write_text(text)
        return Unreadable(), CompileRecord("train_step", 1.0, False, {"xla_dump_to": folder, "other": 1})

    written = True
    step = compile_with(compile_train_step, monkeypatch)
    assert step.text == "HloModule the_step"
    # It is not an option of the step.
    assert step.record.options == {"other": 1} and step.experiment.config["compiler_options"] == {}
    written = False
    assert compile_with(compile_train_step, monkeypatch).text is None


def test_an_unreadable_program_has_the_compilers_memory_and_the_models_time(monkeypatch, tmp_path, without_libtpu):
    step = compile_with(lambda *_: (compiled_function(), CompileRecord("train_step", 1.0, False)), monkeypatch)
    plan = plan_lib.compiled_plan(build_experiment(GPT), topologies.parse("v5e-1"), dataclasses.replace(step, text=None))
    found = plan.to_json()
    assert found["method"] == "compiler" and found["step_seconds_method"] == "analytic" and found["cycles"] is None
    assert f"jaxlib {jax.lib.__version__} cannot read" in found["notes"][0]
    check_sums(found)


def compiled_function():
    return jax.jit(lambda x: jnp.tanh(x @ x)).lower(jax.ShapeDtypeStruct((512, 512), jnp.float32)).compile()


@pytest.mark.parametrize("peak, total, shown", [(700, 900, 700), (900, 700, 700), (0, 700, 700)])
def test_the_peak_is_the_compilers_and_at_most_all_allocations(peak, total, shown, monkeypatch):
    step = compile_with(lambda *_: (compiled_function(), CompileRecord("train_step", 1.0, False)), monkeypatch)
    figures = types.SimpleNamespace(
        peak_memory_in_bytes=peak * 10**6, argument_size_in_bytes=0, output_size_in_bytes=0, temp_size_in_bytes=total * 10**6, alias_size_in_bytes=0
    )
    step = types.SimpleNamespace(
        compiled=types.SimpleNamespace(memory_analysis=lambda: figures), shapes=step.shapes, mesh=step.mesh, experiment=step.experiment
    )
    assert sum(plan_lib._memory(step).values()) == shown * 10**6


@pytest.mark.parametrize("compiled", [True, False])
def test_the_result_of_a_search_is_written(compiled, write, tmp_path, capsys, monkeypatch, without_libtpu):
    """A compiled setting is not compiled again; a modelled one is planned. Strings stay strings: `none` is a policy."""
    best = search.Candidate({"model.remat": "none", "mesh.data": 1, "mesh.fsdp": 4}, state="compiled" if compiled else "modelled", memory=10**9, seconds=0.1)
    best.plan = {"step_seconds": 0.1, "peak_bytes_per_device": 10**9, "mfu": 0.5} if compiled else None
    found = search.SearchResult("v5e-4", [best], [], 1.0)
    monkeypatch.setattr(search, "search", lambda spec, overrides, topology, *, budget, data_dir: found)
    file, written = tmp_path / "plan.json", tmp_path / "best.json"
    assert cli.run(["plan", write(GPT), "--topology=v5e-4", "--search", f"--write={written}", f"--json={file}"]) == 0
    page, shown = json.loads(file.read_text()), capsys.readouterr().out
    assert best.name in shown and f"jaxmodels train --config={written}" in shown
    assert page["search"]["settings"][0]["setting"] == best.name
    assert page["mfu"] == 0.5 if compiled else page["mesh"]["fsdp"] == 4 and page["config"]["model"]["remat"] == "none"
    assert json.loads(written.read_text())["mesh"]["fsdp"] == 4


def test_the_function_of_the_command(without_libtpu):
    plan = api.plan(GPT, "v5e-4")
    assert plan.memory_by == "analytic" and plan.topology.devices == 4
    with pytest.raises(ConfigError, match="is not known"):
        api.plan(GPT, "v5")


@pytest.mark.tpu_compiler
@pytest.mark.parametrize("name, mesh", [("v5e-4", {"data": 4}), ("v5p-8", {"data": 1, "fsdp": 4}), ("2xv5e-4", {"slices": 2, "data": 4})])
def test_of_the_compiler(name, mesh, write, tmp_path, capsys):
    pytest.importorskip("libtpu")
    config, file, program = small_configs.config(GPT, mesh=mesh), tmp_path / "plan.json", tmp_path / "program.txt"
    assert cli.run(["plan", write(config), f"--topology={name}", f"--json={file}", f"--hlo={program}", f"--save={tmp_path / 'step'}"]) == 0
    plan, shown, text = json.loads(file.read_text()), capsys.readouterr().out, program.read_text()
    check_sums(plan)
    assert plan["method"] == plan["step_seconds_method"] == "compiler" and plan["compile_seconds"] > 0
    assert text.startswith("HloModule") and "estimated_cycles" in text and plan["cycles"] > 0
    assert {axis for each in plan["collectives"] for axis in each["axes"]} == {axis for axis, size in mesh.items() if size > 1}
    assert plan["implementations"]["attention"]["used"] == "splash" and plan["kernels"][0]["name"].startswith("splash")
    assert "by the compiler" in shown and "MFU" in shown and "chip-hours" in shown
    saved = json.loads((tmp_path / "step" / "executable.json").read_text())
    assert saved["plan"]["step_seconds"] == plan["step_seconds"] and saved["compiler_options"] == {}


@pytest.mark.tpu_compiler
def test_of_the_compiler_for_a_step_that_does_not_fit(write, capsys):
    pytest.importorskip("libtpu")
    assert cli.run(["plan", write(small_configs.config(GPT, **LARGE)), "--topology=v5e-4"]) == 1
    assert "does not fit v5e-4 according to the compiler: it needs" in capsys.readouterr().err
    assert cli.run(["plan", write(small_configs.config(GPT, **LARGE, mesh={"data": 1, "fsdp": 16})), "--topology=v5e-16"]) == 0
