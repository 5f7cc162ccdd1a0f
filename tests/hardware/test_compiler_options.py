"""Compiler options: those of a chip's table, those of a config, and those that a compiler rejects."""

import dataclasses
import io

import jax
import pytest
import small_configs
from rich.console import Console

from jaxmodels.errors import ConfigError
from jaxmodels.experiment.build import build_experiment
from jaxmodels.experiment.sections import resolve
from jaxmodels.hardware import absent, chips, compiler_options, topologies
from jaxmodels.hardware.compiler_options import Option, choose
from jaxmodels.runs.folder import RunFolder
from jaxmodels.training import trainer
from jaxmodels.training.compile import convolutional

FAST_MATH = Option("xla_cpu_enable_fast_math", True, "for a test")
UNKNOWN = Option("xla_cpu_no_such_thing", 3, "for a test")


@pytest.fixture
def cpu_table(monkeypatch):
    """Make the CPU a chip with a table of two options, one of which no compiler has."""
    chip = dataclasses.replace(chips.CHIPS["v5e"], name="cpu", device_kinds=("cpu",))
    monkeypatch.setitem(chips.CHIPS, "cpu", chip)
    monkeypatch.setitem(compiler_options.OPTIONS, "cpu", (FAST_MATH, UNKNOWN))


def test_every_option_has_a_chip_a_reason_and_a_unique_name():
    assert compiler_options.OPTIONS.keys() == {*chips.CHIPS, "cpu"}
    for options in compiler_options.OPTIONS.values():
        assert len({option.name for option in options}) == len(options)
        assert all(len(option.why) > 20 and isinstance(option.value, compiler_options.Value) for option in options)


def test_this_compiler_accepts_the_options_of_cpus_and_an_unknown_chip_has_none(monkeypatch):
    assert choose({}, jax.devices()[0]).rejected == {} and choose({}, jax.devices()[0]).options
    monkeypatch.delitem(compiler_options.OPTIONS, "cpu")
    assert choose({}, jax.devices()[0]) == compiler_options.Chosen({}, {})


def test_rejected_options_are_left_out_and_named(cpu_table):
    chosen = choose({}, jax.devices()[0])
    assert chosen.options == {"xla_cpu_enable_fast_math": True}
    assert chosen.rejected == {"xla_cpu_no_such_thing": "No such compile option: 'xla_cpu_no_such_thing'"}


def test_an_option_that_is_not_for_convolutions_is_not_used_with_them(cpu_table, monkeypatch):
    only = dataclasses.replace(FAST_MATH, convolutions=False)
    monkeypatch.setitem(compiler_options.OPTIONS, "cpu", (only,))
    device, vit = jax.devices()[0], {"name": "vit", "patch": 2, "layers": 1, "heads": 2, "width": 16}  # its first layer is a convolution
    for config in (small_configs.GPT, small_configs.LSTM, small_configs.config(small_configs.CNN, model=vit)):
        assert choose({}, device, convolutional(build_experiment(config).build)) == compiler_options.Chosen({only.name: True}, {})
    for model in ({"name": "resnet18"}, {"name": "cnn", "features": (64, 64), "hidden": 16}):
        build = build_experiment(small_configs.config(small_configs.CNN, model=model)).build
        assert choose({}, device, convolutional(build)) == compiler_options.Chosen({}, {})
        assert choose({only.name: False}, device, build).options == {only.name: False}


def test_a_config_changes_drops_and_adds(cpu_table):
    section = {"xla_cpu_enable_fast_math": False, "xla_cpu_no_such_thing": None, "xla_cpu_parallel_codegen_split_count": 2}
    chosen = choose(section, jax.devices()[0])
    assert chosen.options == {"xla_cpu_enable_fast_math": False, "xla_cpu_parallel_codegen_split_count": 2} and chosen.rejected == {}
    assert choose({"xla_cpu_enable_fast_math": None}, jax.devices()[0]).options == {}


def test_a_configured_option_that_the_compiler_lacks_is_an_error_with_the_nearest():
    with pytest.raises(
        ConfigError, match=r"compiler_options.xla_cpu_enable_fastmath=True: .*No such compile option.*Did you mean 'xla_cpu_enable_fast_math'\?"
    ):
        choose({"xla_cpu_enable_fastmath": True}, jax.devices()[0])
    with pytest.raises(ConfigError, match=r"xla_cpu_parallel_codegen_split_count='many': .*'many' is not a valid int32 value"):
        choose({"xla_cpu_parallel_codegen_split_count": "many"}, jax.devices()[0])


@pytest.mark.parametrize(
    "section, message",
    [
        (3, "compiler_options must be"),
        ({"xla_x": [1]}, "compiler_options.xla_x must be true or false, a number or a string"),
        ({"xla_cpu_enable_fast_maths": None}, "Did you mean 'xla_cpu_enable_fast_math'"),
        ({"xla_y": None}, "but this is not one"),
    ],
)
def test_types_of_the_section(cpu_table, section, message):
    with pytest.raises(ConfigError, match=message):
        resolve(small_configs.config(small_configs.CNN, compiler_options=section))


def test_the_section_is_empty_unless_given():
    assert resolve(small_configs.CNN)["compiler_options"] == {}
    assert resolve(small_configs.config(small_configs.CNN, compiler_options__xla_cpu_enable_fast_math=False))["compiler_options"] == {
        "xla_cpu_enable_fast_math": False
    }


def test_a_run_prints_and_records_its_options_and_the_rejected(cpu_table, tmp_path):
    output = io.StringIO()
    config = small_configs.config(small_configs.CNN, training__steps=2, evaluation={}, compiler_options__xla_cpu_parallel_codegen_split_count=2)
    trainer.train(build_experiment(config), str(tmp_path / "x"), console=Console(file=output, width=300))
    given = {"xla_cpu_enable_fast_math": True, "xla_cpu_parallel_codegen_split_count": 2}
    reason = "No such compile option: 'xla_cpu_no_such_thing'"
    assert output.getvalue().count("with xla_cpu_enable_fast_math=True, xla_cpu_parallel_codegen_split_count=2") == 1
    assert output.getvalue().count(f"warning: the compiler option xla_cpu_no_such_thing is not used, because this compiler rejects it: {reason}") == 1
    manifest = RunFolder(tmp_path / "x").manifest()
    compiled = manifest["starts"][0]["compiled"]
    assert compiled["train_step"]["options"] == given and compiled["train_step"]["rejected"] == {"xla_cpu_no_such_thing": reason}
    assert compiled["init"].keys() == {"name", "seconds", "cached"}
    assert any("xla_cpu_no_such_thing" in entry for entry in manifest["fallbacks"])
    # Options may change between the starts of a run.
    config = small_configs.config(config, training__steps=2, compiler_options={})
    assert trainer.train(build_experiment(config), str(tmp_path / "x"), console=Console(quiet=True)).step == 2


@pytest.mark.parametrize("partition", ["jit", "pmap"])
def test_options_reach_the_compiler(cpu_table, partition, monkeypatch, tmp_path):
    given = []
    compile_one = jax.stages.Lowered.compile

    def spy(self, compiler_options=None, **more):
        given.append(compiler_options)
        return compile_one(self, compiler_options=compiler_options, **more)

    monkeypatch.setattr(jax.stages.Lowered, "compile", spy)
    config = small_configs.config(small_configs.CNN, training__steps=1, partition=partition, compiler_options__xla_cpu_parallel_codegen_split_count=2)
    trainer.train(build_experiment(config), str(tmp_path / "x"), console=Console(quiet=True))
    # Tests of options compile with one at a time; only the step is compiled with options.
    assert [len(options or ()) for options in given].count(2) == 1
    assert {"xla_cpu_enable_fast_math": True, "xla_cpu_parallel_codegen_split_count": 2} in given


def test_a_wrong_option_does_not_change_the_folder(tmp_path):
    with pytest.raises(ConfigError, match="xla_cpu_no_such_thing"):
        trainer.train(build_experiment(small_configs.config(small_configs.CNN, compiler_options__xla_cpu_no_such_thing=1)), str(tmp_path / "x"))
    assert not (tmp_path / "x").exists()


@pytest.mark.tpu_compiler
@pytest.mark.parametrize("name", ["v5e:2x2", "v5p:4x4x4", "v6e:2x2"])
def test_the_installed_compiler_accepts_the_tables_of_tpus(name):
    """Also for absent devices on several hosts."""
    device = absent.devices(topologies.parse(name))[-1]
    chosen = choose({}, device)
    assert chosen.rejected == {} and chosen.options == {option.name: option.value for option in compiler_options.OPTIONS[name.partition(":")[0]]}
    with pytest.raises(ConfigError, match=r"No such compile option.*Did you mean 'xla_tpu_scoped_vmem_limit_kib'\?"):
        choose({"xla_tpu_scoped_vmem_limit_kb": 1}, device)
