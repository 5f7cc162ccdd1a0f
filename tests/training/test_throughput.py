"""MFU and memory on known chips, and the comparison with a plan: on the CPU, registered as a chip."""

import dataclasses
import io
import json
import re
import types

import jax
import pytest
import small_configs
from rich.console import Console

import jaxmodels
from jaxmodels.errors import ConfigError
from jaxmodels.experiment.build import build_experiment
from jaxmodels.experiment.flops import model_flops
from jaxmodels.experiment.sections import resolve
from jaxmodels.hardware import chips, compiler_options
from jaxmodels.hardware.flops import count_flops
from jaxmodels.parallel.mesh import MeshSizes, make_mesh
from jaxmodels.runs.folder import RunFolder
from jaxmodels.training import compare, throughput, trainer

CONFIG = small_configs.config(small_configs.CNN, training__steps=12, evaluation={}, log__every=3)
PEAK = 5e12
MESH = dict(make_mesh(MeshSizes()).shape)
FIGURES = {"step_seconds": 1000.0, "peak_bytes_per_device": 10**12, "chip": "fast", "devices": 1, "mesh": MESH, "config": resolve(CONFIG)}


@pytest.fixture
def chip(monkeypatch):
    """Register the CPU as a chip, with two devices."""
    fast = dataclasses.replace(chips.CHIPS["v5e"], name="fast", device_kinds=("cpu",), flops_per_second=2 * PEAK, devices_per_chip=2)
    monkeypatch.setitem(chips.CHIPS, "fast", fast)
    monkeypatch.setitem(compiler_options.OPTIONS, "fast", ())


def run(workdir, plan=None, config=CONFIG):
    """Return the output of a run, and its folder."""
    output = io.StringIO()
    if isinstance(plan, dict):
        file = workdir.with_suffix(".json")
        file.write_text(json.dumps(plan))
        plan = str(file)
    trainer.train(build_experiment(config), str(workdir), console=Console(file=output, width=400), **compare.for_training(plan))
    return output.getvalue(), RunFolder(workdir)


def test_flops_of_a_model_do_not_depend_on_rematerialisation():
    key = jax.eval_shape(lambda: jax.random.key(0))
    config = small_configs.config(small_configs.GPT, model__scan=True, model__dropout=0.0, training__accumulate=2)
    plain = build_experiment(config)
    arguments = plain.state_shapes(), plain.batch_shapes(16), key
    assert model_flops(plain).all == count_flops(plain.step_function(), *arguments)
    again = build_experiment(small_configs.config(config, model__remat="full"))
    assert count_flops(again.step_function(), *arguments) > model_flops(again).all == model_flops(plain).all
    cnn = build_experiment(small_configs.CNN)  # a model without the key
    assert model_flops(cnn).all == count_flops(cnn.step_function(), cnn.state_shapes(), cnn.batch_shapes(32), key)


def test_mfu_and_memory_of_a_known_chip(chip, tmp_path, monkeypatch):
    monkeypatch.setattr(throughput, "peak_memory", lambda mesh: 12345)
    output, folder = run(tmp_path / "x")
    flops = model_flops(build_experiment(CONFIG)).all
    start = folder.manifest()["starts"][0]
    assert (start["chip"], start["model_flops_per_step"]) == ("fast", flops) and "plan" not in start
    lines = folder.metrics("train")
    assert len(lines) == 4
    for line in lines:
        assert line["mfu"] == pytest.approx(flops * line["steps_per_second"] / PEAK, rel=1e-9) and line["memory_peak_bytes"] == 12345
    assert output.count("  MFU ") == 4
    assert all("mfu" not in line for line in folder.metrics("test"))


def test_memory_is_left_out_without_memory_statistics_of_jax(chip, tmp_path):
    lines = run(tmp_path / "x")[1].metrics("train")
    assert all("mfu" in line and "memory_peak_bytes" not in line for line in lines)


def test_nothing_is_logged_for_an_unknown_chip(tmp_path, monkeypatch):
    monkeypatch.setattr(throughput, "model_flops", lambda experiment: pytest.fail("counted"))
    output, folder = run(tmp_path / "x")
    assert "MFU" not in output and not {"mfu", "memory_peak_bytes"} & set().union(*folder.metrics("train"))
    assert "chip" not in folder.manifest()["starts"][0]


def test_peak_memory_is_the_most_of_this_processs_devices():
    def device(process, stats):
        return types.SimpleNamespace(process_index=process, memory_stats=lambda: stats)

    def peak(*devices):
        return throughput.peak_memory(types.SimpleNamespace(devices=types.SimpleNamespace(flat=devices)))

    assert peak(device(0, {"peak_bytes_in_use": 5}), device(0, {"peak_bytes_in_use": 7}), device(1, {"peak_bytes_in_use": 9})) == 7
    assert peak(device(0, None)) is peak(device(0, {"bytes_in_use": 3})) is None
    assert throughput.peak_memory(make_mesh(MeshSizes())) is None


def test_a_run_close_to_its_plan_records_both_without_a_warning(chip, tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "peak_memory", lambda mesh: 10**12 + 10**10)
    output, folder = run(tmp_path / "x", FIGURES)
    assert "warning" not in output and folder.manifest()["fallbacks"] == []
    plan = folder.manifest()["starts"][0]["plan"]
    assert plan["path"] == str(tmp_path / "x.json") and plan["peak_bytes_per_device"] == {"planned": 10**12, "measured": 10**12 + 10**10}
    assert plan["step_seconds"]["planned"] == 1000.0 and 0 < plan["step_seconds"]["measured"] < 1


def test_a_run_far_from_its_plan_warns_once(chip, tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "peak_memory", lambda mesh: 3 * 10**9)
    output, folder = run(tmp_path / "x", FIGURES | {"step_seconds": 1e-9, "peak_bytes_per_device": 2 * 10**9})
    slow = rf"the step time is \S+ s, \d+% more than the 1e-09 s planned in {tmp_path}/x.json \(median of 7 steps after 3\)"
    large = f"the peak memory of a device is 3 GB, 50% more than the 2 GB planned in {tmp_path}/x.json"
    fallbacks = folder.manifest()["fallbacks"]
    assert len(fallbacks) == 2 and fallbacks[1] == large and re.fullmatch(slow, fallbacks[0])
    assert all(output.count("warning: " + line) == 1 for line in fallbacks) and output.count("warning") == 2


def test_only_figures_far_from_the_plan_are_reported(chip, tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "peak_memory", lambda mesh: 10**12)
    output, _ = run(tmp_path / "x", FIGURES | {"step_seconds": 1e-9})
    assert output.count("warning") == 1 and "the step time is" in output


def test_the_median_excludes_warm_up_and_outliers():
    planned = compare.Planned("plan.json", FIGURES | {"step_seconds": 1.0}, None)
    comparison = compare.Comparison(planned)
    comparison._seconds = [60, 9, 9, 1.2, 1.2, 1.2, 1.2, 1.3, 8, 9]
    record, lines = comparison.result(make_mesh(MeshSizes()))
    assert record["step_seconds"] == {"planned": 1.0, "measured": 1.2} and lines == []


def test_a_run_too_short_to_time_records_no_time(chip, tmp_path):
    output, folder = run(tmp_path / "x", FIGURES, small_configs.config(CONFIG, training__steps=2))
    assert folder.manifest()["starts"][0]["plan"]["step_seconds"]["measured"] is None and "warning" not in output
    # A finished run has no steps to compare.
    assert "plan" not in run(tmp_path / "x", FIGURES, small_configs.config(CONFIG, training__steps=2))[1].manifest()["starts"][1]


OTHERS = [
    ({"chip": "v5p", "devices": 64}, "chip is 'v5p' in the plan, 'fast' here; devices is 64 in the plan, 1 here"),
    ({"mesh": MESH | {"fsdp": 2}}, "mesh.fsdp is 2 in the plan, 1 here"),
    ({"config": resolve(small_configs.config(CONFIG, data__batch_size=8, seed=5, training__steps=3))}, "config.data.batch_size is 8 in the plan, 32 here"),
]


@pytest.mark.parametrize("other, line", OTHERS)
def test_a_plan_for_another_run_is_recognised(chip, other, line):
    planned = compare.Planned("x.json", FIGURES | other, None)
    assert planned.differences(resolve(CONFIG), make_mesh(MeshSizes())) == line


def test_a_plan_for_another_run_is_not_compared(chip, tmp_path):
    other, line = OTHERS[0]
    output, folder = run(tmp_path / "x", FIGURES | {"step_seconds": 1e-9} | other)
    warning = f"this run is not compared with {tmp_path}/x.json, a plan for another run: {line}"
    assert folder.manifest()["fallbacks"] == [warning] and output.count("warning: " + warning) == 1 and "the step time is" not in output
    assert "plan" not in folder.manifest()["starts"][0]


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "is neither JSON .* nor a folder"),
        ('{"step_seconds": 1.0}', "the file has no step_seconds or no peak_bytes_per_device"),
        ('{"step_seconds": "1", "peak_bytes_per_device": 3}', "plan again"),
        ("[]", "plan again"),
        (None, "there is no such folder"),
    ],
)
def test_a_file_that_is_not_a_plan_is_an_error_before_the_start(tmp_path, content, message):
    if content is not None:
        (tmp_path / "plan.json").write_text(content)
    with pytest.raises(ConfigError, match=f"--plan={tmp_path}/plan.json.*{message}"):
        jaxmodels.train(CONFIG, str(tmp_path / "x"), plan=str(tmp_path / "plan.json"), quiet=True)
    assert not (tmp_path / "x").exists()
