"""The search: the settings that it models and compiles, their ranking with reasons, and its output."""

import ast
import collections
import copy
import dataclasses
import json
import math
import time
from pathlib import Path

import jax
import pytest
import small_configs
from processes import is_alive
from rich.console import Console

from jaxmodels.cli import plan_files, plan_output
from jaxmodels.config import load_config
from jaxmodels.errors import ConfigError
from jaxmodels.experiment.build import build_experiment
from jaxmodels.experiment.sections import resolve
from jaxmodels.hardware import absent, topologies
from jaxmodels.parallel import mesh as mesh_lib
from jaxmodels.plan import candidates, compiler, memory, roofline, search

DECODER = small_configs.config(
    small_configs.GPT,
    model={"name": "gpt", "layers": 4, "heads": 4, "width": 64, "context": 128, "scan": True},
    data={"source": "synthetic", "vocab_size": 512, "sequence_length": 128, "batch_size": 32},
    training__precision="bfloat16",
)
MIXTURE = small_configs.config(DECODER, model__moe={"experts": 4, "top_k": 2})
RESNET = {
    "model": {"name": "resnet18"},
    "task": {"name": "classify"},
    "data": {"source": "synthetic", "kind": "images", "image_shape": (32, 32, 3), "num_classes": 10, "batch_size": 32},
    "optimizer": {"name": "sgd", "learning_rate": 0.1},
    "training": {"steps": 10, "accumulate": 2},
}
EIGHT = topologies.parse("v5e:2x4")
FOUR = topologies.parse("v5e:2x2")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def decoder():
    return build_experiment(DECODER)


@pytest.fixture(scope="module")
def settings(decoder):
    """The modelled settings of a decoder on four chips, computed once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "VARIED", 1)
        patch.setattr(search, "MESHES", 8)
        return search.model_settings(decoder, FOUR, math.inf)[0]


@pytest.fixture
def modelled(settings, monkeypatch):
    """Copies of these, for tests of the compiler stage."""
    monkeypatch.setattr(search, "model_settings", lambda *_: (copy.deepcopy(settings), []))
    return settings


# Candidates


def test_products_are_all_ways_to_factor_a_number():
    found = list(candidates._products(12, [12, 12, 2]))
    assert len(found) == len(set(found)) and all(math.prod(sizes) == 12 for sizes in found)
    assert set(found) == {(a, b, c) for a in range(1, 13) for b in range(1, 13) for c in (1, 2) if a * b * c == 12}


def test_meshes_cover_the_devices_and_divide_dimensions(decoder):
    found = [shape for shape, _ in candidates.meshes(decoder, EIGHT)]
    assert {"data": 8} in [{axis: n for axis, n in shape.items() if n > 1} for shape in found]
    for shape in found:
        assert list(shape) == [field.name for field in dataclasses.fields(mesh_lib.MeshSizes)] and math.prod(shape.values()) == 8
        assert 4 % shape["tensor"] == 0 and 4 % shape["pipeline"] == 0  # heads and layers
        assert shape["context"] == shape["expert"] == 1  # short rows, and no experts
        assert 32 % (shape["data"] * shape["fsdp"]) == 0
    assert {shape["tensor"] for shape in found} == {1, 2, 4} and {shape["pipeline"] for shape in found} == {1, 2, 4}
    # The most sharded mesh has the smallest state on a device; meshes with the fewest model shards come first.
    sizes = {tuple(shape.values()): state for shape, state in candidates.meshes(decoder, EIGHT)}
    assert sizes[1, 1, 1, 8, 1, 1, 1] < sizes[1, 1, 8, 1, 1, 1, 1] / 5
    assert found[0]["tensor"] * found[0]["pipeline"] == 1


def test_meshes_use_only_axes_of_the_model(decoder):
    def axes(config, place=EIGHT):
        return {axis for shape, _ in candidates.meshes(build_experiment(config), place) for axis, n in shape.items() if n > 1}

    assert axes(MIXTURE) == {"data", "fsdp", "expert", "tensor", "pipeline"}
    assert axes(RESNET) == {"data", "fsdp"}
    assert axes(small_configs.config(DECODER, model__scan=False)) == {"data", "fsdp", "tensor"}
    long = small_configs.config(DECODER, data__sequence_length=4096, model__context=4096)
    assert "context" in axes(long)
    assert all(shape["slices"] == 2 for shape, _ in candidates.meshes(decoder, topologies.parse("2xv5e:2x2")))


def test_context_is_by_heads_if_these_divide(decoder):
    one = dict.fromkeys(("slices", "pipeline", "data", "fsdp", "expert", "context", "tensor"), 1)
    heads = {"sharding.context": "heads"}
    assert [candidates.context_changes(decoder, one | mesh) for mesh in ({"context": 4}, {"context": 2, "tensor": 2})] == [heads, heads]
    assert [candidates.context_changes(decoder, one | mesh) for mesh in ({"data": 4}, {"context": 8}, {"context": 4, "tensor": 2})] == [{}, {}, {}]
    long = build_experiment(small_configs.config(DECODER, data__sequence_length=4096, model__context=4096))
    mesh = candidates.mesh_changes(one | {"data": 2, "context": 4})
    gathered, exchanged = (
        roofline.estimate_traced(roofline.trace(other, 8, EIGHT.chip), EIGHT) for other in (candidates.changed(long, mesh | way) for way in ({}, heads))
    )
    assert {"all-to-all"} == {each.kind for each in exchanged.collectives} - {each.kind for each in gathered.collectives}
    assert exchanged.seconds < gathered.seconds


def test_accumulation_is_varied_if_the_loss_is_a_sum_over_rows(decoder):
    mesh = dict.fromkeys(("slices", "pipeline", "data", "fsdp", "expert", "context", "tensor"), 1)
    assert candidates.accumulations(decoder, mesh | {"data": 8}) == [1, 2, 4]  # of 4 rows a device
    assert candidates.accumulations(decoder, mesh | {"data": 4, "pipeline": 2}) == [1, 2, 4]
    # Batch normalisation and a mixture's load depend on all rows of a microbatch.
    assert candidates.accumulations(build_experiment(RESNET), mesh | {"data": 8}) == [2]
    assert candidates.accumulations(build_experiment(MIXTURE), mesh | {"data": 8}) == [1]


def test_saved_activations_are_ordered_by_flops_per_byte(decoder):
    traced = roofline.trace(candidates.changed(decoder, {"model.remat": "full", "mesh.data": 8}), 8, EIGHT.chip)
    lists = candidates.saved_lists(traced)
    assert all(shorter == longer[:-1] for shorter, longer in zip(lists, lists[1:], strict=False))
    assert set(lists[-1]) == {"query", "key", "value", "attention", "middle", "up"}  # input, hidden: no product makes them
    policies = candidates.policies(decoder, traced)
    assert [p["model.remat"] for p in policies if not p["model.offload"]] == ["full", *lists, "dots_no_batch", "dots", "none"]
    assert all(candidates.changed(decoder, policy) for policy in policies)  # the model accepts all values
    assert candidates.policies(build_experiment(RESNET), traced) == [{}]


def test_a_candidate_computes_the_same_loss(decoder):
    """A search changes only how a step is computed: parameters, data and loss stay the same."""
    other = candidates.changed(decoder, {"mesh.data": 2, "mesh.fsdp": 4, "model.remat": ("query", "up"), "model.offload": (), "training.accumulate": 2})
    assert other.loading == decoder.loading and other.optimizer is decoder.optimizer and other.mesh.fsdp == 4 and other.training.accumulate == 2
    key, batch = jax.random.key(0), jax.tree.map(lambda s: jax.numpy.ones(s.shape, s.dtype), decoder.batch_shapes(4))
    losses = []
    for experiment in (decoder, other):
        state = jax.jit(experiment.init_function())(key)
        losses.append(float(jax.jit(experiment._loss)(state.params, state.frozen, state.stats, batch, key)[0]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


# The search, with a fake compiler


class Compiler:
    """A fake compiler: plans with times and sizes by rule; it records its calls."""

    def __init__(self, seconds=lambda changes: 1.0, size=lambda changes: 10**9, problem=lambda changes: None, takes=0.0):
        self.seconds, self.size, self.problem, self.takes, self.calls = seconds, size, problem, takes, []

    def process(self, command, log, seconds):
        """Replaces the process of `jaxmodels plan`."""
        values = dict(argument.removeprefix("--config.").split("=", 1) for argument in command if argument.startswith("--config."))
        (output,) = (argument.removeprefix("--json=") for argument in command if argument.startswith("--json="))
        plan, _ = self({key: ast.literal_eval(text) for key, text in values.items()}, seconds)
        Path(output).write_text(json.dumps(plan))
        return 0

    def __call__(self, changes, seconds):
        self.calls.append(dict(changes))
        time.sleep(self.takes)
        if (problem := self.problem(changes)) is not None:
            return None, problem
        step, size = self.seconds(changes), self.size(changes)
        parts = {"matrix products": 0.5, "exposed collectives": step - 0.5}
        page = {"step_seconds": step, "peak_bytes_per_device": size, "device_bytes": EIGHT.chip.memory_per_device, "mfu": 0.5 / step, "parts": parts}
        return page | {"fits": size <= EIGHT.chip.memory_per_device}, ""


@pytest.mark.slow
def test_the_fastest_compiled_setting_is_best_and_the_others_have_reasons(decoder, modelled):
    fastest = search.promising(modelled)[4].changes
    compiler = Compiler(seconds=lambda changes: 1.0 if changes == fastest else 1.25)
    found = search.find(decoder, FOUR, budget=300, run=compiler, workers=2)
    assert found.best.changes == fastest and found.best.why == ""
    assert compiler.calls[0]["mesh.data"] == 4 and any(each.own and each.plan for each in found.settings)  # the config's own, first
    assert len(compiler.calls) <= search.COMPILED
    slower = [each for each in found.settings[1:] if each.plan]
    assert slower and all(each.why.startswith("25.0% slower: exposed collectives +250 ms") for each in slower)
    rest = [each for each in found.settings if each.state == "modelled"]
    assert rest and all(each.why.startswith("not compiled: ") for each in rest)
    order = [each.plan is not None for each in found.settings if each.state in ("compiled", "modelled")]
    assert order == sorted(order, reverse=True)


@pytest.mark.slow
def test_few_settings_of_the_same_mesh_are_compiled(modelled):
    chosen = search.promising(modelled)
    of_mesh = collections.Counter(tuple(v for k, v in each.changes.items() if k.startswith("mesh.")) for each in chosen if not each.own)
    assert max(of_mesh.values()) == search.SAME and len(of_mesh) > 1
    assert all(each.state == "modelled" for each in chosen)


@pytest.mark.slow
def test_settings_that_do_not_fit_by_the_model_are_not_compiled(decoder, monkeypatch):
    monkeypatch.setattr(search, "VARIED", 1)
    least = memory.memory_model(candidates.changed(decoder, {"mesh.data": 4, "model.remat": "full"}), FOUR).total
    place = dataclasses.replace(FOUR, chip=dataclasses.replace(FOUR.chip, memory_bytes=least))
    compiler = Compiler(size=lambda changes: 1)
    found = search.find(decoder, place, budget=300, run=compiler, workers=1)
    large = [each for each in found.settings if each.state == "too large"]
    assert large and all("does not fit by" in each.why and "according to the model" in each.why for each in large)
    assert all(each.memory > least for each in large)
    assert all(each.own or each.memory <= search.MARGIN * least for each in found.settings if each.changes in compiler.calls)


def test_settings_that_do_not_fit_by_the_compiler_are_reported_and_not_chosen(decoder, modelled):
    policy = search.promising(modelled)[1].changes["model.remat"]
    compiler = Compiler(size=lambda c: 40 * 10**9 if c["model.remat"] == policy else 10**9, seconds=lambda c: 1.0 if c["model.remat"] == policy else 2.0)
    found = search.find(decoder, FOUR, budget=300, run=compiler, workers=2)
    assert found.best.changes["model.remat"] != policy and found.best.plan is not None
    over = (40 * 10**9 - FOUR.chip.memory_per_device) / 1e9
    assert f"does not fit by {over:.1f} GB, according to the compiler" in [each.why for each in found.settings if each.state == "too large"]
    with pytest.raises(ConfigError, match="no setting fits a device's 16.9 GB; the nearest, data=8, needs 100.0 GB"):
        search.rank([search.Candidate({"mesh.data": 8}, state="too large", memory=10**11)], FOUR.chip.memory_per_device)


def test_failures_and_timeouts_are_reported(decoder, modelled):
    broken, late = (search.promising(modelled)[i].changes for i in (1, 2))
    compiler = Compiler(problem=lambda c: {True: "the compiler broke"}.get(c == broken, search.OUT_OF_TIME if c == late else None))
    found = search.find(decoder, FOUR, budget=300, run=compiler, workers=2)
    (one,), (other,) = ([each for each in found.settings if each.changes == changes] for changes in (broken, late))
    assert (one.state, one.why) == ("failed", "the compiler broke") and (other.state, other.why) == ("out of time", search.OUT_OF_TIME)
    assert found.best.state == "compiled"


def test_no_compilation_starts_that_would_end_too_late():
    compiler, notes = Compiler(takes=0.4), []
    settings = [search.Candidate({"mesh.data": n, "model.remat": "none"}, own=n == 1, seconds=1.0, memory=1) for n in range(1, 9)]
    started = time.monotonic()
    search.compile_promising(settings, compiler, 1, started + 1.0, notes)
    assert time.monotonic() - started < 1.4 and 1 <= len(compiler.calls) <= 2
    assert compiler.calls[0]["mesh.data"] == 1
    assert notes == [f"{8 - len(compiler.calls)} promising settings were not compiled within the budget; raise --budget to compile them"]


def test_modelling_ends_with_its_time(decoder):
    settings, notes = search.model_settings(decoder, FOUR, time.monotonic())
    assert len(settings) == 1 and settings[0].own
    assert any("were not modelled within the budget" in note for note in notes)


def test_without_a_compiler_the_ranking_is_the_models_with_a_note(decoder, modelled):
    found = search.find(decoder, FOUR, budget=300, run=None, workers=1)
    assert "the ranking is that of the analytic models" in found.notes[-1]
    seconds = [each.seconds for each in found.settings if each.state == "modelled"]
    assert seconds == sorted(seconds) and found.best.plan is None
    assert {each.changes["model.remat"] for each in found.settings} >= {"none", "full", "dots"}
    # Collectives take time: sharding every matrix of so small a model is never the fastest.
    assert found.best.changes["mesh.tensor"] == 1


def test_a_config_for_another_topology_can_be_searched(monkeypatch):
    monkeypatch.setattr(search, "MESHES", 1)
    monkeypatch.setattr(search, "VARIED", 0)
    found = search.find(build_experiment(small_configs.config(DECODER, mesh__fsdp=64, mesh__data=1)), FOUR, budget=300, run=None, workers=1)
    assert not any(each.own for each in found.settings)
    assert any("the config's own setting is not ranked" in note and "64 devices" in note for note in found.notes)


# Files


@pytest.fixture
def config_file(tmp_path):
    file = tmp_path / "configs" / "decoder.py"
    file.parent.mkdir()
    file.write_text(f"def get_config(arg=None):\n    c = {DECODER!r}\n    c['seed'] = 0 if arg is None else int(arg)\n    return c\n")
    return file


def test_a_second_search_is_read_from_the_cache(config_file, modelled, monkeypatch):
    compiler = Compiler(seconds=lambda c: 1.0 + c["mesh.tensor"] / 10)
    monkeypatch.setattr(absent, "has_compiler", lambda platform: True)
    monkeypatch.setattr(search, "run_process", compiler.process)
    first = search.search(str(config_file), {"optimizer.learning_rate": "0.01"}, "v5e:2x2", budget=200)
    calls = len(compiler.calls)
    again = search.search(str(config_file), {"optimizer.learning_rate": "0.01"}, "v5e:2x2", budget=100)
    assert calls and len(compiler.calls) == calls and again.cached and not first.cached
    assert again.settings == first.settings and again.seconds == first.seconds
    output = Console(width=200, record=True, quiet=True)
    plan_output.print_search(again, output)
    # A larger budget continues the search without compiling again; another config or topology is another search.
    longer = search.search(str(config_file), {"optimizer.learning_rate": "0.01"}, "v5e:2x2", budget=300)
    assert not longer.cached and len(compiler.calls) == calls
    search.search(str(config_file), {"optimizer.learning_rate": "0.02"}, "v5e:2x2", budget=200)
    assert len(compiler.calls) > calls
    json.dumps(first.to_json())


@pytest.mark.parametrize("ending", ["py", "json"])
def test_the_written_config_loads_and_equals_the_best_setting(config_file, tmp_path, ending):
    changes = {"mesh.data": 2, "mesh.fsdp": 4, "training.accumulate": 2, "model.remat": ("query", "up"), "model.offload": ()}
    found = search.SearchResult("v5e:2x4", [search.Candidate(changes, seconds=0.1, memory=10**9)], [], 1.0)
    written = tmp_path / f"best.{ending}"
    plan_files.write_config(str(written), f"{config_file}:7", {"optimizer.learning_rate": "0.01"}, found)
    expected = copy.deepcopy(DECODER) | {"seed": 7, "mesh": {"data": 2, "fsdp": 4}}
    expected["training"]["accumulate"], expected["optimizer"]["learning_rate"] = 2, 0.01
    expected["model"] |= {"remat": ("query", "up"), "offload": ()}
    assert resolve(load_config(str(written))) == resolve(expected)
    with pytest.raises(ConfigError, match="exists; give another name"):
        plan_files.check_output(str(written))
    with pytest.raises(ConfigError, match="a .py or a .json file"):
        plan_files.check_output(str(tmp_path / "best.yaml"))
    with pytest.raises(ConfigError, match="there is no folder"):
        plan_files.check_output(str(tmp_path / "nowhere" / "best.py"))


def test_the_command_of_a_setting_and_its_children_end_at_the_time_limit(tmp_path, monkeypatch):
    """The process that compiles a setting has a child, which would survive a kill of the process alone."""
    program = tmp_path / "program"
    program.write_text(f"#!/bin/sh\nsleep 60 &\necho $! > {tmp_path}/child\nwait\n")
    program.chmod(0o755)
    monkeypatch.setattr(search.sys, "executable", str(program))
    run = search.plan_in_process([], "v5e:2x4", tmp_path)
    assert run({"mesh.data": 8}, 1.0) == (None, search.OUT_OF_TIME)
    child = int((tmp_path / "child").read_text())
    for _ in range(50):
        if not is_alive(child):
            break
        time.sleep(0.1)
    assert not is_alive(child)


def test_why_a_command_failed_is_its_last_line(tmp_path, monkeypatch):
    program = tmp_path / "program"
    program.write_text('#!/bin/sh\necho "jaxmodels: the step does not fit v5e:2x4: 20 GB"\nexit 1\n')
    program.chmod(0o755)
    monkeypatch.setattr(search.sys, "executable", str(program))
    plan, problem = search.plan_in_process([], "v5e:2x4", tmp_path)({"mesh.data": 8}, 30.0)
    assert plan is None and problem.startswith("the step does not fit v5e:2x4: 20 GB (")


@pytest.mark.tpu_compiler
def test_a_search_with_the_tpu_compiler(config_file, tmp_path):
    pytest.importorskip("libtpu")
    found = search.search(str(config_file), {"mesh.data": "4"}, "v5e:2x2", budget=240)
    (own,) = [each for each in found.settings if each.own]
    assert found.best.state == own.state == "compiled" and found.best.step_seconds <= own.step_seconds
    output = tmp_path / "best.py"
    plan_files.write_config(str(output), str(config_file), {"mesh.data": "4"}, found)
    best = build_experiment(load_config(str(output)))
    peak = compiler.compile_step(best, "v5e:2x2").compiled.memory_analysis().peak_memory_in_bytes
    assert found.best.plan["peak_bytes_per_device"] == pytest.approx(peak, rel=0.02)
    assert search.search(str(config_file), {"mesh.data": "4"}, "v5e:2x2", budget=240).cached
