"""Names of topologies, and a train step compiled for their chips, which need not be present.

Package `libtpu` holds the TPU's compiler, `plan.gpu` that of GPUs; both work in a process for CPUs (`JAX_PLATFORMS=cpu`).
"""

import dataclasses
import difflib
import importlib.util
import json
import math
import os
import re
import tempfile
import traceback
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from jaxmodels.errors import ConfigError, RunError
from jaxmodels.experiment.experiment import Experiment
from jaxmodels.hardware.chips import CHIPS, Chip
from jaxmodels.parallel import mesh as mesh_lib
from jaxmodels.parallel import sharding as sharding_lib
from jaxmodels.parallel.layout import Layout
from jaxmodels.plan import gpu
from jaxmodels.training.compile import CompileRecord, compile_train_step

FORMS = "v5p-128 (Google's name of a slice), v5p:4x4x4 (its chips), 4xv5p-128 (four slices), h100x8 (a node of GPUs), 2xh100x8 (two nodes)"

# Grids of chips for Google's names of slices: docs.cloud.google.com/tpu/docs/v5e and /v6e, "Configurations".
_FLAT_GRIDS = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
# The same of /v4, /v5p and /tpu7x, up to one cube of 4 × 4 × 4; larger slices are made of cubes.
_SMALL_GRIDS = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4), (4, 4, 4))
_LARGEST = {"v4": 4096, "v5p": 6144, "tpu7x": 9216}  # chips of the largest slice: the same pages
_GPUS_PER_NODE = 8
_OTHER_NAMES = {"v5litepod": "v5e"}

_DUMP = "xla_dump_to"


@dataclasses.dataclass(frozen=True)
class Topology:
    """Chips and how they are connected.

    Attributes:
      name: as given.
      chip: their kind.
      grid: chips of one slice along its torus; of a node of GPUs, their number.
      slices: number of slices of TPUs, or of nodes of GPUs.
    """

    name: str
    chip: Chip
    grid: tuple[int, ...]
    slices: int

    @property
    def chips(self) -> int:
        """In all slices."""
        return math.prod(self.grid) * self.slices

    @property
    def devices(self) -> int:
        """That a program sees, in all slices."""
        return self.chips * self.chip.devices_per_chip


def parse(name: str) -> Topology:
    """Return the topology of a name such as `v5p-128`, `v6e-256`, `v5p:4x4x4`, `4xv5p-128`, `h100x8`, `2xh100x8`.

    Google's names count TensorCores, of which v4, v5p and tpu7x have two a chip: `v5p-128` is 64 chips, 4 × 4 × 4. Of several grids with as many
    chips, it is the one most like a cube, as Google's are (cloud.google.com/tpu/docs/types-topologies, "Topology variants").

    Raises:
      ConfigError: it is unknown; names the nearest, and the forms there are.
    """
    match = re.fullmatch(r"(?:(\d+)x(?=[a-z]))?([a-z]\w*?)(?:-(\d+)|:(\d+(?:x\d+)*)|x(\d+))", name)
    chip = CHIPS.get(_OTHER_NAMES.get(match[2], match[2])) if match else None
    if chip is None:
        close = difflib.get_close_matches(name, [each for chip in CHIPS.values() for each in _names(chip)], n=1, cutoff=0.4)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ConfigError(f"--topology={name} is not known.{hint} Topologies are written {FORMS}; chips are {', '.join(CHIPS)}.")
    slices, count, grid, gpus = int(match[1] or 1), match[3], match[4], match[5]
    if slices < 1:
        raise ConfigError(f"--topology={name}: the number of slices must be 1 or more.")
    if (gpus is not None) != (chip.platform == "gpu"):
        other = _names(chip)[-1] if chip.platform == "gpu" else f"{_names(chip)[4]} or {_written(chip, _grids(chip)[4])}"
        raise ConfigError(f"--topology={name}: {chip.name} is written such as {other}; several with a count in front.")
    if gpus is not None:
        sizes = _node(name, chip, int(gpus))
    elif grid is None:
        sizes = _slice(name, chip, int(count))
    else:
        sizes = tuple(int(size) for size in grid.split("x"))
        if len(sizes) != chip.torus_dimensions or 0 in sizes:
            raise ConfigError(f"--topology={name}: chips of {chip.name} are in {chip.torus_dimensions} dimensions, such as {_written(chip, _grids(chip)[4])}.")
    return Topology(name, chip, sizes, slices)


def _written(chip: Chip, grid: tuple[int, ...]) -> str:
    return f"{chip.name}:{'x'.join(map(str, grid))}"


def _names(chip: Chip) -> list[str]:
    if chip.platform == "gpu":
        return [f"{chip.name}x{count}" for count in (1, 2, 4, _GPUS_PER_NODE)]
    return [f"{chip.name}-{math.prod(grid) * chip.cores_per_chip}" for grid in _grids(chip)]


def _grids(chip: Chip) -> list[tuple[int, ...]]:
    """Grids that Google's names stand for, smallest first: one for each number of chips."""
    if chip.torus_dimensions == 2:
        return list(_FLAT_GRIDS)
    cubes = range(2, _LARGEST[chip.name] // math.prod(_SMALL_GRIDS[-1]) + 1)
    return [*_SMALL_GRIDS, *(tuple(4 * size for size in _most_like_a_cube(count)) for count in cubes)]


def _most_like_a_cube(count: int) -> tuple[int, int, int]:
    """Three factors of a number, smallest first, with the least sum."""
    factors = [n for n in range(1, count + 1) if count % n == 0]
    return min(((a, b, count // (a * b)) for a in factors for b in factors if a <= b <= count / (a * b) and count % (a * b) == 0), key=sum)


def _slice(name: str, chip: Chip, count: int) -> tuple[int, ...]:
    """The grid of `v5p-128`."""
    known = {math.prod(grid) * chip.cores_per_chip: grid for grid in _grids(chip)}
    if count not in known:
        near = [f"{chip.name}-{size}" for size in sorted(sorted(known, key=lambda size: abs(size - count))[:2])]
        unit = f"TensorCores, {chip.cores_per_chip} a chip" if chip.cores_per_chip > 1 else "chips"
        raise ConfigError(
            f"--topology={name}: there is no slice of {count:,} {unit}; the nearest are {' and '.join(near)}. "
            f"Slices have {', '.join(str(size) for size in sorted(known)[:8])}, … {max(known):,} {unit.partition(',')[0]}."
        )
    return known[count]


def _node(name: str, chip: Chip, count: int) -> tuple[int, ...]:
    """The number of GPUs of `h100x8`."""
    if not 1 <= count <= _GPUS_PER_NODE:
        several = (
            f": {count // _GPUS_PER_NODE}x{chip.name}x{_GPUS_PER_NODE}"
            if count and count % _GPUS_PER_NODE == 0
            else f", such as 2x{chip.name}x{_GPUS_PER_NODE}"
        )
        raise ConfigError(f"--topology={name}: a node has 1 to {_GPUS_PER_NODE} GPUs; several nodes have their number in front{several}.")
    return (count,)


def check_mesh(sizes: mesh_lib.MeshSizes, topology: Topology) -> None:
    """Raise ConfigError unless a config's mesh covers a topology; states which sizes would."""
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
        would = f" With the others as they are, one of these would do: {' '.join(ways)}." if ways else ""
        raise ConfigError(f"--topology={topology.name} has {topology.devices} devices. {error}{would}") from error


# Compilers


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    """A compiled train step.

    Attributes:
      compiled: as `jax.jit(...).lower(...).compile()` returns.
      shapes: of the train state, with shardings.
      mesh: of the topology's devices.
      layout: of the step; its `left_whole` lists what could not be sharded.
      record: how long it took, and with which options.
      experiment: as it is on that mesh; its `kernels` tell which implementations run.
      text: of the optimized program; None if nothing installed can read it.
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
      needed: bytes, as the compiler states when it gives up; None if it does not.
      available: bytes of a device that a program can use.
    """

    def __init__(self, message: str, needed: int | None, available: int):
        super().__init__(message)
        self.needed, self.available = needed, available


def has_libtpu() -> bool:
    """Whether the compiler for TPUs is installed."""
    return importlib.util.find_spec("libtpu") is not None


def has_compiler(topology: Topology) -> bool:
    """Whether the compiler for a topology is installed."""
    return has_libtpu() if topology.chip.platform == "tpu" else gpu.has_compiler()


def devices(topology: str | Topology) -> list:
    """Return the devices of a topology, to compile for; they can run nothing.

    Raises:
      ConfigError: its compiler is not installed, or makes no such topology.
    """
    topology = parse(topology) if isinstance(topology, str) else topology
    if topology.chip.platform == "gpu":
        return gpu.devices(topology)
    if not has_libtpu():
        raise ConfigError("libtpu, the compiler for TPUs, is not installed, and is needed here: pip install 'jaxmodels[plan]'")
    if os.environ.get("TPU_SKIP_MDS_QUERY") == "1":
        # JAX found no TPU here and set this, so that libtpu does not wait minutes for the cloud's metadata server. These answer what it
        # would ask there; and several processes may compile at a time, though only one could use a TPU.
        defaults = {"TPU_ACCELERATOR_TYPE": "v5p-8", "TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
        os.environ.update(defaults | {name: value for name, value in os.environ.items() if name in defaults})
    options: dict[str, Any] = {"num_slices": topology.slices}
    if topology.chip.name == "v4":
        options["chip_config_name"] = "megacore"  # the two cores of a chip as one device, the default for v5p
    if math.prod(topology.grid) == 1:
        options["chips_per_host_bounds"] = [1, 1, 1]
    name = _written(topology.chip, topology.grid)
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices)
    except (jax.errors.JaxRuntimeError, RuntimeError) as error:
        raise ConfigError(f"libtpu makes no topology {topology.name!r} ({name}): {_first_line(error)}.") from error


def compile_step(experiment: Experiment, topology: str | Topology) -> CompiledStep:
    """Compile the train step of a run, the one that `jaxmodels train` would run, for a topology.

    Args:
      experiment: as `build_experiment` returns. Its mesh is made of the topology's devices; for TPUs, `mesh.slices` must be the topology's slices.
      topology: or its name, as for `parse`.

    Raises:
      ConfigError: mesh, batch, or a requested kernel does not fit the topology, or its compiler is not installed.
      DoesNotFit: it needs more memory than a TPU has; states how much, and what to change.
      RunError: the compiler failed otherwise; names the file with its whole output.
    """
    topology = parse(topology) if isinstance(topology, str) else topology
    if experiment.config["partition"] == "pmap":
        raise ConfigError("config.partition=pmap runs only on devices that are present; to compile for others, use --config.partition=jit.")
    check_mesh(experiment.mesh, topology)
    platform = topology.chip.platform
    if platform == "gpu":
        options = gpu.compiler_options(topology) | experiment.config["compiler_options"]
        experiment = dataclasses.replace(experiment, config=experiment.config | {"compiler_options": options})
    mesh = mesh_lib.make_mesh(experiment.mesh, devices(topology))
    layout = sharding_lib.make_layout(mesh, experiment.sharding)
    experiment = experiment.on(platform, layout)
    mesh_lib.check_batch(experiment.loading.batch_size, experiment.training.accumulate, mesh, "data.batch_size", layout.microbatches)
    shapes = sharding_lib.place_state(experiment.state_shapes(), experiment.sharding, layout)
    key = jax.ShapeDtypeStruct((), jax.random.key(0).dtype, sharding=mesh_lib.replicated(mesh))
    with tempfile.TemporaryDirectory(prefix="jaxmodels_") as folder:
        try:
            compiled, record = compile_train_step(_writing_to(folder, experiment), mesh, shapes, shapes, key)
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
                f"to compile cuDNN's attention, cuDNN must be installed ({_first_line(error)}): {gpu.INSTALL}; or --config.model.attention=xla"
            ) from error
        text = _program_text(compiled, folder)
    if _DUMP not in experiment.config["compiler_options"]:
        record = dataclasses.replace(record, options={name: value for name, value in record.options.items() if name != _DUMP})
    return CompiledStep(compiled, shapes, mesh, layout, record, experiment, text)


def _writing_to(folder: str, experiment: Experiment) -> Experiment:
    """The experiment, whose step the TPU's compiler also writes to a folder; the program is the same, and so is its cache key."""
    if experiment.platform != "tpu":
        return experiment
    options = {_DUMP: folder} | experiment.config["compiler_options"]
    return dataclasses.replace(experiment, config=experiment.config | {"compiler_options": options})


def _program_text(compiled: Any, folder: str) -> str | None:
    """The optimized program as its compiler wrote it; else as jaxlib reads it, which one older than libtpu cannot always do."""
    written = [file.read_text() for file in Path(folder).glob("*.after_codegen.txt")]
    if written:
        return max(written, key=len)  # the others are probes of its options
    try:
        return compiled.as_text()
    except jax.errors.JaxRuntimeError:
        return None


def _refused(error: Exception, experiment: Experiment, topology: Topology, state: int) -> DoesNotFit:
    """The error of a compiler that says `Used 24.5G of 15.75G hbm`, or `(26.84G) exceeds available HBM (15.75G)`."""
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
      by: who says so.
    """
    over = f": it needs {needed / 1e9:.2f} GB and a device has {available / 1e9:.2f} GB, {(needed - available) / 1e9:.2f} GB too few" if needed else ""
    model, training, batch = experiment.config["model"], experiment.training, experiment.loading.batch_size
    spread = "--config.mesh.fsdp or --config.mesh.tensor in place of mesh.data"
    ways = []
    if "remat" in model and model["remat"] != "full":
        ways.append("--config.model.remat=full")
    if model.get("offload") == ():
        ways.append("--config.model.offload (activations in the host's memory)")
    if batch % (2 * training.accumulate) == 0:
        ways.append(f"--config.training.accumulate={2 * training.accumulate}")
    if experiment.mesh.data != 1:
        ways.append(f"{spread}, which spread the state")
    if batch > 1:
        ways.append(f"--config.data.batch_size={batch // 2}")
    if state > available:
        ways = [f"{spread}: the state alone, {state / 1e9:.2f} GB, is more than a device has"]
    return DoesNotFit(
        f"the step does not fit {topology.name}{over}, says {by}. Try {', '.join(ways)}; or a larger topology. jaxmodels plan --search looks for a setting that fits.",
        needed,
        available,
    )


def _bytes(text: str) -> int:
    """Bytes of `15.75G`, as compilers write 2**30 bytes."""
    scale = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    return round(float(text.rstrip("KMGT")) * scale.get(text[-1], 1))


def _failed(error: Exception, experiment: Experiment, topology: Topology) -> RunError:
    """The error of a failed compilation: its reason in one line, the rest in a file."""
    with tempfile.NamedTemporaryFile("w", prefix="jaxmodels_compiler_", suffix=".log", delete=False, encoding="utf-8") as log:
        log.write(f"config: {json.dumps(experiment.config)}\n\n" + "".join(traceback.format_exception(error)))
    return RunError(f"the compiler failed for {topology.name}: {_first_line(error)}. All it said is in {log.name}.")


def memory(compiled: Any) -> dict[str, int]:
    """Bytes on each device while a compiled function runs: arguments, outputs, temporaries, aliased (outputs in donated arguments), and their total."""
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
