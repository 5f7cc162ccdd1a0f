"""A train step compiled for NVIDIA GPUs that are not here, and what its optimized program takes on them.

JAX's CUDA plugin holds the compiler; told of a GPU's figures in place of a GPU, it compiles without one, without a driver and without CUDA's
libraries, but for cuDNN where attention is cuDNN's: JAX asks it for its version. What it would try out on a GPU it cannot: matrix products go to cuBLAS
all, and cuDNN's algorithms stay open.

`estimate` costs the program's operations as `plan.roofline` does those of a traced step. Of matrix products on Hopper, the compiler's own figures
count, which are from its table of products measured on an H100 (`xla_gpu_collect_cost_model_stats`; there is none of an A100).
"""

import dataclasses
import importlib.util
import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies

from jaxmodels.errors import ConfigError
from jaxmodels.experiment.experiment import Experiment
from jaxmodels.plan import program as program_lib
from jaxmodels.plan import topology as topology_lib
from jaxmodels.plan import torus
from jaxmodels.plan.estimate import PARTS, Collective, Estimate, Kernel
from jaxmodels.plan.network import collective_seconds
from jaxmodels.plan.program import Computation, Instruction, Program
from jaxmodels.plan.roofline import attention_seconds, other_seconds, product_seconds
from jaxmodels.plan.topology import CompiledStep, Topology
from jaxmodels.plan.torus import SENT

# The plugin is of the very version of JAX, which no extra of ours can say; the rest of CUDA is not needed to compile.
INSTALL = f"pip install --no-deps jax-cuda13-plugin=={jax.__version__} jax-cuda13-pjrt=={jax.__version__} nvidia-cudnn-cu13"

MODELS_ARE_LOW = "of steps for GPUs their memory was 25 to 33% below the compiler's (docs/estimates_gpu.md)"
NOT_TRIED = "compiled without a GPU, so no kernels were tried out; predictions for GPUs have not been measured (docs/estimates_gpu.md)"
JAX_SHARE = 0.75  # docs.jax.dev/en/latest/gpu_memory_allocation.html

# What the compiler asks of a GPU (`GpuTargetConfigProto` of XLA), from NVIDIA's data sheets and tuning guides (docs.nvidia.com/cuda/ampere-tuning-guide and
# /hopper-tuning-guide). `device_memory_size` is about what drivers leave of 80 GB and 141 GB; the compiler saves memory where a step needs more than that.
_FIGURES = {
    "a100": {"core_count": 108, "fpus_per_core": 64, "shared_memory_per_core": 167936, "shared_memory_per_block_optin": 166912, "clock_rate_ghz": 1.41,
             "memory_bandwidth": 2039000000000, "l2_cache_size": 41943040, "device_memory_size": 84987740160},
    "h100": {"core_count": 132, "fpus_per_core": 128, "shared_memory_per_core": 233472, "shared_memory_per_block_optin": 232448, "clock_rate_ghz": 1.98,
             "memory_bandwidth": 3352320000000, "l2_cache_size": 52428800, "device_memory_size": 84929347584},
    "h200": {"core_count": 132, "fpus_per_core": 128, "shared_memory_per_core": 233472, "shared_memory_per_block_optin": 232448, "clock_rate_ghz": 1.98,
             "memory_bandwidth": 4814000000000, "l2_cache_size": 52428800, "device_memory_size": 150000000000},
}  # fmt: skip
_CAPABILITY = {"a100": (8, 0), "h100": (9, 0), "h200": (9, 0)}
_SHARED = {
    "threads_per_block_limit": 1024, "threads_per_warp": 32, "shared_memory_per_block": 49152, "threads_per_core_limit": 2048, "block_dim_limit_x": 2147483647,
    "block_dim_limit_y": 65535, "block_dim_limit_z": 65535, "registers_per_core_limit": 65536, "registers_per_block_limit": 65536,
}  # fmt: skip

# Of the shortest kernel, from its start to that of the next one.
KERNEL_SECONDS = 2e-6

_NOTHING = frozenset("parameter constant get-tuple-element tuple bitcast after-all opt-barrier partition-id replica-id".split())
_SLICES = ("dynamic-slice", "slice", "gather")


def memory_notes(peak: int, topology: Topology) -> list[str]:
    """What to know of a step that needs so many bytes of a GPU."""
    if peak <= JAX_SHARE * topology.chip.memory_per_device:
        return []
    return [f"JAX takes {JAX_SHARE:.0%} of a GPU's memory unless told otherwise, and this step needs more: XLA_PYTHON_CLIENT_MEM_FRACTION=.95"]


def has_compiler() -> bool:
    """Whether JAX's CUDA plugin is installed."""
    return any(importlib.util.find_spec(f"jax_cuda{version}_plugin") is not None for version in (13, 12))


def target_config(chip: str) -> str:
    """What the compiler is told of a GPU, as text."""
    figures = "\n".join(f"  {name}: {value}" for name, value in (_SHARED | _FIGURES[chip]).items())
    major, minor = _CAPABILITY[chip]
    capability = f"  cuda_compute_capability {{ major: {major} minor: {minor} }}"
    versions = "dnn_version_info { major: 9 minor: 12 }\nruntime_version { major: 13 }"
    (kind, *_) = topology_lib.CHIPS[chip].device_kinds
    return f'gpu_device_info {{\n{figures}\n{capability}\n}}\nplatform_name: "CUDA"\n{versions}\ndevice_description_str: "{kind}"\n'


def devices(topology: Topology) -> list:
    """The GPUs of a topology, to compile for; they can run nothing.

    Raises:
      ConfigError: JAX's CUDA plugin is not installed.
    """
    if not has_compiler():
        raise ConfigError(f"JAX's CUDA plugin, which holds the compiler for GPUs, is not installed, and is needed here: {INSTALL}")
    shape = f"1x{topology.slices}x{math.prod(topology.grid)}"
    try:
        return list(topologies.get_topology_desc(platform="cuda", topology=shape, target_config=target_config(topology.chip.name)).devices)
    except (jax.errors.JaxRuntimeError, RuntimeError, NotImplementedError) as error:
        raise ConfigError(
            f"JAX's CUDA plugin makes no topology {topology.name!r}: {_first_line(error)}. JAX_PLATFORMS=cpu keeps it from looking for a GPU; and it is of JAX's own version: {INSTALL}"
        ) from error


def compile_step(experiment: Experiment, topology: Topology) -> CompiledStep:
    """Compiles the train step of a run, the one that `jaxmodels train` would run, for GPUs.

    Args:
      experiment: as `build_experiment` gives. Its mesh is made of the topology's GPUs.
      topology: of GPUs.

    Raises:
      ConfigError: mesh, batch, or a kernel that is asked for, does not fit the topology; the compiler is not installed, or not cuDNN, of a step with its attention.
      RunError: the compiler failed.
    """
    options = compiler_options(topology) | experiment.config["compiler_options"]
    experiment = dataclasses.replace(experiment, config=experiment.config | {"compiler_options": options})
    try:
        return topology_lib.compile_for(experiment, topology, lambda: devices(topology))
    except RuntimeError as error:
        if "cuDNN" not in str(error):
            raise
        raise ConfigError(
            f"to compile attention by cuDNN, cuDNN must be installed ({_first_line(error)}): {INSTALL}; or --config.model.attention=xla"
        ) from error


def compiler_options(topology: Topology) -> dict[str, bool]:
    """How compiling without a GPU differs: nothing is tried out, and the compiler writes down its own estimates where it has a table of the GPU."""
    hopper = _CAPABILITY[topology.chip.name] >= (9, 0)
    return {"xla_gpu_enable_triton_gemm": False} | ({"xla_gpu_collect_cost_model_stats": True} if hopper else {})


def estimate(text: str, topology: Topology, mesh: Mapping[str, int]) -> Estimate:
    """The time of a step that is compiled for GPUs; without cycles, which their compiler does not count.

    Args:
      text: of the optimized program, `compiled.as_text()`.
      topology: that it was compiled for.
      mesh: sizes of its axes, in order.

    Raises:
      RunError: the text is not understood.
    """
    reader = _Reader(program_lib.parse(text), topology, dict(mesh))
    reader.read(reader.program.entry, 1)
    found = [Collective(kind, axes, *figures, network) for (kind, axes, network), figures in reader.collectives.items()]
    parts = dict.fromkeys(PARTS, 0.0) | {
        "matrix products": reader.products,
        "attention kernels": reader.attention,
        "other": reader.other,
        "exposed collectives": sum(each.exposed_seconds for each in found),
    }
    return Estimate(
        cycles=None,
        seconds=sum(parts.values()),
        parts=parts,
        kernels=[Kernel(name, count, shapes, seconds) for (name, shapes), (count, seconds) in reader.kernels.items()],
        collectives=sorted(found, key=lambda each: -each.seconds),
        host_transfers=[],
        notes=[*reader.notes, NOT_TRIED],
    )


class _Reader:
    """Goes through a program in the order of its schedule, adding up."""

    def __init__(self, program: Program, topology: Topology, mesh: dict[str, int]):
        self.program, self.topology, self.mesh = program, topology, mesh
        self.products = self.attention = self.other = 0.0
        self.collectives: dict[tuple, list] = {}  # (kind, axes, network) -> [count, bytes, seconds, exposed seconds]
        self.kernels: dict[tuple, list] = {}  # of attention: (name, shapes) -> [count, seconds]
        self.notes: list[str] = []

    def read(self, computation: Computation, times: int) -> float:
        """Adds a computation that runs so many times. Returns the seconds of one run, collectives left out."""
        total = 0.0
        running: dict[str, list] = {}  # collectives under way, in order: [seconds that are left, their row]
        for instruction in computation.instructions.values():
            opcode = instruction.opcode
            kind = opcode.removesuffix("-start").removesuffix("-done")
            if opcode in _NOTHING:
                continue
            if kind in SENT and opcode.endswith("-done"):
                left, row = running.pop(instruction.operands[0])
                row[3] += times * left
            elif kind in SENT:
                row, seconds = self.collective(kind, computation, instruction, times)
                if not opcode.endswith("-start") or instruction.config.get("collective_backend_config", {}).get("is_sync"):
                    row[3] += times * seconds
                    seconds = 0.0
                running[instruction.name] = [seconds, row]
            elif not opcode.endswith("-done"):
                seconds = self.one(computation, instruction, times)
                total += seconds
                for state in running.values():  # one after the other
                    hidden = min(state[0], seconds)
                    state[0], seconds = state[0] - hidden, seconds - hidden
        return total

    def one(self, computation: Computation, instruction: Instruction, times: int) -> float:
        """Adds an instruction. Returns the seconds of one run."""
        if instruction.opcode == "while":
            turns = program_lib.trip_count(self.program, computation, instruction)
            if turns is None:
                self.notes.append(f"how often the loop {instruction.name} turns is not known when compiling: counted once")
            return (turns or 1) * self.read(self.program.computations[instruction.called("body")], times * (turns or 1))
        if instruction.branches:
            return max(self.read(self.program.computations[name], times) for name in instruction.branches)
        if instruction.opcode in ("call", "async-start"):
            name = instruction.called("to_apply") or instruction.called("calls")
            return self.read(self.program.computations[name], times)
        chip, target = self.topology.chip, instruction.attribute("custom_call_target") or ""
        moved = self.moved(computation, instruction)
        if target.startswith("__cudnn$fmha"):
            seconds = attention_seconds(chip, attention_flops(instruction, self.operands(computation, instruction)))
            self.attention += times * seconds
            shapes = tuple(str(program_lib.arrays(each.shape)[0]) for each in self.operands(computation, instruction))
            row = self.kernels.setdefault((target.removeprefix("__"), shapes), [0, 0.0])
            row[0], row[1] = row[0] + times, row[1] + times * seconds
            return seconds
        flops = self.flops(computation, instruction)
        if flops:
            itemsize = program_lib.bits(program_lib.arrays(self.operands(computation, instruction)[0].shape)[0].dtype) // 8
            seconds = max(own_seconds(instruction) or product_seconds(chip, flops, moved, itemsize), KERNEL_SECONDS)
            self.products += times * seconds
        else:
            seconds = max(other_seconds(chip, moved), KERNEL_SECONDS)
            self.other += times * seconds
        return seconds

    def operands(self, computation: Computation, instruction: Instruction) -> list[Instruction]:
        return [computation.instructions[name] for name in instruction.operands if name in computation.instructions]

    def flops(self, computation: Computation, instruction: Instruction) -> int:
        """In products and convolutions; 0 of anything else."""
        target, operands = instruction.attribute("custom_call_target") or "", self.operands(computation, instruction)
        if target.startswith("__cublas"):
            return gemm_flops(instruction.config["gemm_backend_config"]["dot_dimension_numbers"], instruction, operands)
        if target.startswith("__cudnn$conv"):
            return convolution_flops(target, instruction, operands)
        if instruction.opcode == "dot":
            return dot_flops(instruction, operands)
        if instruction.opcode == "fusion":
            inner = self.program.computations[instruction.called("calls")]
            return sum(dot_flops(each, self.operands(inner, each)) for each in inner.instructions.values() if each.opcode == "dot")
        return 0

    def moved(self, computation: Computation, instruction: Instruction) -> int:
        """Bytes that an instruction reads and writes: of arrays that it cuts parts out of, or into, those parts."""
        operands = self.operands(computation, instruction)
        if instruction.opcode == "custom-call":
            return sum(each.bytes for each in operands) + program_lib.arrays(instruction.shape)[0].bytes  # without room to work in
        if instruction.opcode != "fusion":
            return 2 * instruction.bytes if instruction.opcode in _SLICES else sum(each.bytes for each in operands) + instruction.bytes
        inner = self.program.computations[instruction.called("calls")]
        updates = [each for each in inner.instructions.values() if each.opcode in ("dynamic-update-slice", "scatter")]
        targets = {each.operands[0] for each in updates}
        read = 0
        for each in inner.instructions.values():
            if each.opcode != "parameter":
                continue
            users = [user for user in inner.instructions.values() if each.name in user.operands]
            if all(user.opcode in _SLICES and user.operands[0] == each.name for user in users):
                read += sum(user.bytes for user in users)
            elif _through(inner, each.name) & targets:
                read += 0  # changed in place
            else:
                read += each.bytes
        written = instruction.bytes
        for update in updates:
            whole, part = update.bytes, inner.instructions[update.operands[-1 if update.opcode == "scatter" else 1]].bytes
            written += (part - whole) if written >= whole else 0
        return read + written

    def collective(self, kind: str, computation: Computation, instruction: Instruction, times: int) -> tuple[list, float]:
        """Adds a collective. Returns its row and the seconds of one run."""
        members = group(instruction, math.prod(self.mesh.values()))
        axes = axes_of(members, self.mesh)
        size = sum(each.bytes for each in self.operands(computation, instruction)) * (len(members) if kind == "all-gather" else 1)
        seconds = max(collective_seconds(kind, size, axes, self.mesh, self.topology), KERNEL_SECONDS) if axes else 0.0
        per_node = math.prod(self.topology.grid)
        network = "slices" if len({member // per_node for member in members}) > 1 else "links"
        row = self.collectives.setdefault((kind, axes, network), [0, 0.0, 0.0, 0.0])
        row[:3] = row[0] + times, row[1] + times * SENT[kind](len(members)) * size, row[2] + times * seconds
        return row, seconds


def _through(computation: Computation, name: str) -> set[str]:
    """A value and what is the same bytes under another name."""
    names = {name}
    for each in computation.instructions.values():
        if each.opcode in ("bitcast", "copy") and each.operands[0] in names:
            names.add(each.name)
    return names


def own_seconds(instruction: Instruction) -> float | None:
    """The compiler's own estimate of a kernel that is not its own; None where it has none."""
    found = [cost["exec_time_us"] for cost in instruction.config.get("reification_cost", ()) if cost.get("name") == "sol"]
    return found[0] * 1e-6 if found and found[0] > 0 else None


def gemm_flops(numbers: Mapping[str, Any], instruction: Instruction, operands: list[Instruction]) -> int:
    """Of a product by cuBLAS."""
    left, result = program_lib.arrays(operands[0].shape)[0].shape, program_lib.arrays(instruction.shape)[0].shape
    return 2 * math.prod(result) * math.prod(left[int(i)] for i in numbers["lhs_contracting_dimensions"])


def dot_flops(instruction: Instruction, operands: list[Instruction]) -> int:
    """Of a product by the compiler."""
    left = program_lib.arrays(operands[0].shape)[0].shape
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)[1]
    return 2 * math.prod(program_lib.arrays(instruction.shape)[0].shape) * math.prod(left[int(i)] for i in contracted.split(",") if i)


def convolution_flops(target: str, instruction: Instruction, operands: list[Instruction]) -> int:
    """Of a convolution by cuDNN, or one of its two gradients, which take as many: `dim_labels` are those of the convolution itself."""
    labels = re.search(r"dim_labels=\w+_(\w+)->\w+", instruction.attributes)[1]
    result, (first, second) = program_lib.arrays(instruction.shape)[0].shape, (program_lib.arrays(each.shape)[0].shape for each in operands[:2])
    if "BackwardFilter" in target:
        kernel, output = result, second
    elif "BackwardInput" in target:
        kernel, output = second, first
    else:
        kernel, output = second, result
    return 2 * math.prod(output) * math.prod(kernel) // kernel[labels.index("o")]


def attention_flops(instruction: Instruction, operands: list[Instruction]) -> int:
    """Of cuDNN's attention: two products of queries, keys and values; in the gradient five. Of a causal mask half."""
    config = instruction.config["cudnn_fmha_backend_config"]
    scores = math.prod(int(size) for size in config["intermediate_tensor_shape"]["dimensions"])
    width = program_lib.arrays(operands[0].shape)[0].shape[-1]
    products = 5 if "Backward" in instruction.attribute("custom_call_target") else 2
    return products * 2 * scores * width // (2 if "CAUSAL" in config["mask_type"] else 1)


def group(instruction: Instruction, devices: int) -> tuple[int, ...]:
    """Devices that take part in a collective with the first one, by their places in the mesh."""
    if instruction.opcode.startswith("collective-permute"):
        return tuple(sorted(set(torus.pairs(instruction.attributes)[0])))
    return torus.groups(instruction.attributes, devices)[0]


def axes_of(members: tuple[int, ...], mesh: Mapping[str, int]) -> tuple[str, ...]:
    """The mesh axes along which devices differ."""
    places = np.array(np.unravel_index(members, tuple(mesh.values())))
    return tuple(axis for axis, row in zip(mesh, places, strict=True) if len(set(row.tolist())) > 1)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0].rstrip(" .") if str(error) else type(error).__name__
