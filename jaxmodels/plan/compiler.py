"""The train step of a run, compiled for the chips of a topology, which may be absent."""

import dataclasses
import json
import math
import re
import tempfile
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from jaxmodels.errors import ConfigError, RunError
from jaxmodels.experiment.experiment import Experiment
from jaxmodels.hardware import absent, topologies
from jaxmodels.hardware.topologies import Topology
from jaxmodels.parallel import mesh as mesh_lib
from jaxmodels.parallel import sharding as sharding_lib
from jaxmodels.parallel.layout import Layout
from jaxmodels.training.compile import CompileRecord, compile_train_step

_DUMP = "xla_dump_to"


def check_mesh(sizes: mesh_lib.MeshSizes, topology: Topology) -> None:
    """Raise ConfigError unless a config's mesh covers a topology; the message states sizes that would."""
    if topology.chip.platform == "tpu" and sizes.slices not in (topology.slices, -1):
        raise ConfigError(
            f"config.mesh.slices={sizes.slices}, but --topology={topology.name} is {topology.slices} slice{'s' * (topology.slices > 1)}: "
            f"--config.mesh.slices={topology.slices}, or another topology."
        )
    try:
        mesh_lib.mesh_shape(sizes, topology.devices)
    except ConfigError as error:
        shape = dataclasses.asdict(sizes)
        others = {axis: math.prod(size for other, size in shape.items() if other != axis) for axis in shape if axis != "slices"}
        ways = [f"--config.mesh.{axis}={topology.devices // rest}" for axis, rest in others.items() if rest > 0 and topology.devices % rest == 0]
        would = f" With the other sizes unchanged, one of these fits: {' '.join(ways)}." if ways else ""
        raise ConfigError(f"--topology={topology.name} has {topology.devices} devices. {error}{would}") from error


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    """A compiled train step.

    Attributes:
      compiled: as `jax.jit(...).lower(...).compile()` returns.
      shapes: of the train state, with shardings.
      mesh: of the topology's devices.
      layout: of the step; its `left_whole` lists the dimensions that could not be sharded.
      record: compile time and compiler options.
      experiment: of the step, on that mesh; its `kernels` state which implementations run.
      text: of the optimized program; None if the installed jaxlib cannot read it.
    """

    compiled: Any
    shapes: Any
    mesh: Mesh
    layout: Layout
    record: CompileRecord
    experiment: Experiment
    text: str | None = None


class DoesNotFit(RunError):
    """A step needs more memory than a device has.

    Attributes:
      needed: bytes, from the compiler's error; None if the error does not state them.
      available: bytes of a device that a program can use.
    """

    def __init__(self, message: str, needed: int | None, available: int):
        super().__init__(message)
        self.needed, self.available = needed, available


def compile_step(experiment: Experiment, topology: str | Topology) -> CompiledStep:
    """Compile the train step of a run for a topology: the step that `jaxmodels train` would run there.

    Args:
      experiment: as `build_experiment` returns. Its mesh must cover the topology's devices; for TPUs, `mesh.slices` must be the number of slices.
      topology: or its name, as for `hardware.topologies.parse`.

    Raises:
      ConfigError: mesh, batch, or a requested kernel does not fit the topology, or its compiler is not installed.
      DoesNotFit: it needs more memory than a TPU has; the message states how much, and what to change.
      RunError: the compiler failed for another reason; the message names the file with its whole output.
    """
    topology = topologies.parse(topology) if isinstance(topology, str) else topology
    if experiment.config["partition"] == "pmap":
        raise ConfigError("config.partition=pmap runs only on devices that are present; to compile for others, use --config.partition=jit.")
    check_mesh(experiment.mesh, topology)
    experiment = _with_options(experiment, absent.compiler_options(topology))
    mesh = mesh_lib.make_mesh(experiment.mesh, absent.devices(topology))
    layout = sharding_lib.make_layout(mesh, experiment.sharding)
    experiment = experiment.on(topology.chip.platform, layout)
    mesh_lib.check_batch(experiment.loading.batch_size, experiment.training.accumulate, mesh, "data.batch_size", layout.microbatches)
    shapes = sharding_lib.place_state(experiment.state_shapes(), experiment.sharding, layout)
    key = jax.ShapeDtypeStruct((), jax.random.key(0).dtype, sharding=mesh_lib.replicated(mesh))
    with tempfile.TemporaryDirectory(prefix="jaxmodels_") as folder:
        try:
            dumping = _with_options(experiment, {_DUMP: folder} if topology.chip.platform == "tpu" else {})  # the compiled program is the same
            compiled, record = compile_train_step(dumping, mesh, shapes, shapes, key)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" in str(error):
                raise _refused(error, experiment, topology, mesh_lib.bytes_per_device(shapes)) from error
            raise _failed(error, experiment, topology) from error
        except (ValueError, TypeError, NotImplementedError) as error:  # from kernels, or lowering
            raise _failed(error, experiment, topology) from error
        except RuntimeError as error:
            if "cuDNN" not in str(error):
                raise
            raise ConfigError(
                f"to compile cuDNN's attention, cuDNN must be installed ({_first_line(error)}): {absent.INSTALL_CUDA}; or --config.model.attention=xla"
            ) from error
        text = _program_text(compiled, folder)
    if _DUMP not in experiment.config["compiler_options"]:
        record = dataclasses.replace(record, options={name: value for name, value in record.options.items() if name != _DUMP})
    return CompiledStep(compiled, shapes, mesh, layout, record, experiment, text)


def _with_options(experiment: Experiment, options: Mapping) -> Experiment:
    """Return the experiment with additional compiler options; those of its config take precedence."""
    config = experiment.config
    return dataclasses.replace(experiment, config=config | {"compiler_options": {**options, **config["compiler_options"]}})


def _program_text(compiled: Any, folder: str) -> str | None:
    """Return the optimized program as the compiler wrote it, else as jaxlib reads it. A jaxlib older than libtpu cannot always read it."""
    written = [file.read_text() for file in Path(folder).glob("*.after_codegen.txt")]
    if written:
        return max(written, key=len)  # the other files are from tests of compiler options
    try:
        return compiled.as_text()
    except jax.errors.JaxRuntimeError:
        return None


def _refused(error: Exception, experiment: Experiment, topology: Topology, state: int) -> DoesNotFit:
    """Return the error for a compiler's message `Used 24.5G of 15.75G hbm`, or `(26.84G) exceeds available HBM (15.75G)`."""
    text = str(error)
    match = re.search(r"Used ([\d.]+[KMGT]?) of ([\d.]+[KMGT]?) hbm", text) or re.search(r"\(([\d.]+[KMGT]?)\) exceeds available HBM \(([\d.]+[KMGT]?)\)", text)
    needed, available = (_bytes(match[1]), _bytes(match[2])) if match else (None, topology.chip.memory_per_device)
    return does_not_fit(experiment, topology, needed, available, state, by="the compiler" if match else f"the compiler ({_first_line(error)})")


def does_not_fit(experiment: Experiment, topology: Topology, needed: int | None, available: int, state: int, by: str) -> DoesNotFit:
    """Return the error of a step that needs more memory than a device has, with what to change.

    Args:
      experiment, topology: of the step.
      needed, available: bytes of a device; `needed` is None if unknown.
      state: bytes of the state on a device.
      by: `the compiler` or `the analytic model`.
    """
    over = f": it needs {needed / 1e9:.2f} GB and a device has {available / 1e9:.2f} GB, {(needed - available) / 1e9:.2f} GB less" if needed else ""
    model, training, batch = experiment.config["model"], experiment.training, experiment.loading.batch_size
    spread = "--config.mesh.fsdp or --config.mesh.tensor in place of mesh.data"
    ways = []
    if "remat" in model and model["remat"] != "full":
        ways.append("--config.model.remat=full")
    if model.get("offload") == ():
        ways.append("--config.model.offload (activations in host memory)")
    if batch % (2 * training.accumulate) == 0:
        ways.append(f"--config.training.accumulate={2 * training.accumulate}")
    if experiment.mesh.data != 1:
        ways.append(f"{spread}, which shard the state")
    if batch > 1:
        ways.append(f"--config.data.batch_size={batch // 2}")
    if state > available:
        ways = [f"{spread}: the state alone, {state / 1e9:.2f} GB, is more than a device has"]
    return DoesNotFit(
        f"the step does not fit {topology.name} according to {by}{over}. Try {', '.join(ways)}; or a larger topology. jaxmodels plan --search looks for a setting that fits.",
        needed,
        available,
    )


def _bytes(text: str) -> int:
    """Return the bytes of a size such as `15.75G`; compilers write G for 2**30 bytes."""
    scale = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    return round(float(text.rstrip("KMGT")) * scale.get(text[-1], 1))


def _failed(error: Exception, experiment: Experiment, topology: Topology) -> RunError:
    """Return the error of a failed compilation, with its reason in one line. The whole output is written to a file."""
    with tempfile.NamedTemporaryFile("w", prefix="jaxmodels_compiler_", suffix=".log", delete=False, encoding="utf-8") as log:
        log.write(f"config: {json.dumps(experiment.config)}\n\n" + "".join(traceback.format_exception(error)))
    return RunError(f"the compiler failed for {topology.name}: {_first_line(error)}. Its whole output is in {log.name}.")


def memory(compiled: Any) -> dict[str, int]:
    """Return the bytes on each device while a compiled function runs: arguments, outputs, temporaries, aliased (outputs in donated arguments), and their total."""
    found = compiled.memory_analysis()
    parts = {
        "arguments": found.argument_size_in_bytes,
        "outputs": found.output_size_in_bytes,
        "temporaries": found.temp_size_in_bytes,
        "aliased": found.alias_size_in_bytes,
    }
    return parts | {"total": parts["arguments"] + parts["outputs"] + parts["temporaries"] - parts["aliased"]}


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0].rstrip(" .") if str(error) else type(error).__name__
