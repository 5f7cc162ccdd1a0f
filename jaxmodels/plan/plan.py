"""Memory, time and cost of a run on absent hardware (`jaxmodels plan`): from its compiled train step, or from analytic models without a compiler.

`make_plan` computes the figures, `Plan` stores them, `cli.plan_output` prints them. docs/plan.md explains each.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from jaxmodels.experiment.experiment import Experiment
from jaxmodels.experiment.flops import ModelFlops, model_flops
from jaxmodels.hardware import absent, topologies
from jaxmodels.hardware.topologies import Topology
from jaxmodels.parallel import mesh as mesh_lib
from jaxmodels.parallel import sharding as sharding_lib
from jaxmodels.plan import compiler, roofline
from jaxmodels.plan import memory as memory_lib
from jaxmodels.plan.compiler import CompiledStep
from jaxmodels.plan.cost import Estimate
from jaxmodels.plan.estimate import estimate
from jaxmodels.plan.memory import MemoryEstimate
from jaxmodels.training.executable import installed

PACKAGES = ("jaxmodels", "jax", "jaxlib", "libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin")
MODELS_ARE_LOW = "for GPUs the memory model was 25 to 33% below the compiler (docs/estimates.md)"
NOT_AUTOTUNED = "compiled without a GPU, so nothing was autotuned; predictions for GPUs have not been measured (docs/estimates.md)"
JAX_SHARE = 0.75  # docs.jax.dev/en/latest/gpu_memory_allocation.html


@dataclasses.dataclass(frozen=True)
class Plan:
    """Memory, time and cost of a run on a topology.

    Attributes:
      topology, experiment: of the run.
      mesh: sizes of its axes.
      memory: bytes on a device by part, which add up to the peak.
      memory_by, time_by: source of the figures, `compiler` or `analytic`.
      memory_model: figures of the analytic model.
      time: of a step.
      flops: of a step, over all devices.
      notes: assumptions and limits of the figures.
      step: the compiled step; None without a compiler.
    """

    topology: Topology
    experiment: Experiment
    mesh: Mapping[str, int]
    memory: Mapping[str, int]
    memory_by: str
    memory_model: MemoryEstimate
    time: Estimate
    time_by: str
    flops: ModelFlops
    notes: Sequence[str]
    step: CompiledStep | None = None

    @property
    def peak(self) -> int:
        """Bytes on a device at the peak of memory use."""
        return sum(self.memory.values())

    @property
    def host_bytes(self) -> int | None:
        """Bytes of host memory that a step uses for one device; None without a compiler."""
        if self.step is None:
            return None
        found = self.step.compiled.memory_analysis()
        return found.host_argument_size_in_bytes + found.host_output_size_in_bytes + found.host_temp_size_in_bytes - found.host_alias_size_in_bytes

    @property
    def flops_per_device(self) -> float:
        """FLOPs of the model in a step, divided by the number of devices."""
        return self.flops.all / self.topology.devices

    @property
    def mfu(self) -> float:
        """Model FLOPs utilization: the model's FLOPs in a step, divided by those that the chips can do in its time in bfloat16."""
        return self.flops_per_device / (self.time.seconds * self.topology.chip.flops_per_device)

    @property
    def mfu_attended(self) -> float:
        """MFU without the FLOPs of masked attention scores."""
        return self.mfu * self.flops.attended / self.flops.all if self.flops.all else 0.0

    @property
    def rates(self) -> dict[str, float]:
        """Throughput: `examples_per_second_per_chip`, and for texts `tokens_per_second_per_chip`."""
        chip_seconds, tokens = self.topology.chips * self.time.seconds, tokens_per_step(self.experiment)
        texts = {"tokens_per_second_per_chip": tokens / chip_seconds} if tokens else {}
        return texts | {"examples_per_second_per_chip": self.experiment.loading.batch_size / chip_seconds}

    @property
    def run_seconds(self) -> float:
        """Seconds of all training steps, without start, evaluation and checkpoints."""
        return self.experiment.steps * self.time.seconds

    @property
    def chip_hours(self) -> float:
        """Hours of `run_seconds`, times the number of chips."""
        return self.run_seconds * self.topology.chips / 3600

    def to_json(self) -> dict[str, Any]:
        """Return the plan as `--json` writes it. Bytes, seconds and FLOPs are those of one device and one step unless the key states otherwise."""
        topology, chip, time, step, experiment = self.topology, self.topology.chip, self.time, self.step, self.experiment
        return {
            "topology": topology.name,
            "chip": chip.name,
            "grid": list(topology.grid),
            "slices": topology.slices,
            "chips": topology.chips,
            "devices": topology.devices,
            "mesh": dict(self.mesh),
            "method": self.memory_by,
            "step_seconds_method": self.time_by,
            "fits": self.peak <= chip.memory_per_device,
            "peak_bytes_per_device": self.peak,
            "device_bytes": chip.memory_per_device,
            "memory": dict(self.memory),
            "allocations": compiler.memory(step.compiled) if step else {},
            "host_bytes_per_device": self.host_bytes,
            "memory_model": dataclasses.asdict(self.memory_model) | {"total": self.memory_model.total},
            "step_seconds": time.seconds,
            "step_seconds_range": [time.low, time.high],
            "cycles": time.cycles,
            "parts": dict(time.parts),
            "mfu": self.mfu,
            "mfu_attended": self.mfu_attended,
            "model_flops_per_device": self.flops_per_device,
            "model_flops_per_step": self.flops.all,
            "device_flops_per_second": chip.flops_per_device,
            "batch_size": experiment.loading.batch_size,
            "accumulate": experiment.training.accumulate,
            **self.rates,
            "steps": experiment.steps,
            "run_seconds": self.run_seconds,
            "chip_hours": self.chip_hours,
            "collectives": [dataclasses.asdict(each) for each in time.collectives],
            "kernels": [dataclasses.asdict(each) for each in time.kernels],
            "host_transfers": [dataclasses.asdict(each) for each in time.host_transfers],
            "implementations": step.experiment.kernels if step else {},
            "compile_seconds": step.record.seconds if step else None,
            "compiler_options": step.record.options if step else {},
            "rejected_options": step.record.rejected if step else {},
            "versions": versions(),
            "notes": list(self.notes),
            "config": experiment.config,
        }


def make_plan(experiment: Experiment, topology: str | Topology) -> Plan:
    """Plan a run: compile its train step for a topology, or use the analytic models if no compiler for it is installed.

    Args:
      experiment: as `build_experiment` returns.
      topology: or its name, as for `hardware.topologies.parse`.

    Raises:
      ConfigError: the topology is unknown, or mesh, batch or a kernel does not fit it.
      DoesNotFit: the step needs more memory than a device has; the message states how much, and what to change.
      RunError: the compiler failed.
    """
    topology = topologies.parse(topology) if isinstance(topology, str) else topology
    compiler.check_mesh(experiment.mesh, topology)
    platform = topology.chip.platform
    if absent.has_compiler(platform):
        return compiled_plan(experiment, topology, compiler.compile_step(experiment, topology))
    why = f"{absent.missing(platform)}: memory and time are from the analytic models" + (f"; {MODELS_ARE_LOW}" if platform == "gpu" else "")
    return analytic_plan(experiment, topology, why)


def compiled_plan(experiment: Experiment, topology: Topology, step: CompiledStep) -> Plan:
    """Plan a run from its compiled step. If the installed jaxlib cannot read the program, the time is from the analytic model.

    Raises:
      DoesNotFit: it needs more memory than a GPU has.
    """
    on_gpu, available = topology.chip.platform == "gpu", topology.chip.memory_per_device
    traced, memory, readable = roofline.trace(experiment, topology.devices, topology.chip), _memory(step), step.text is not None
    peak, notes = sum(memory.values()), []
    if on_gpu and peak > available:  # the GPU compiler does not check it
        raise compiler.does_not_fit(experiment, topology, peak, available, mesh_lib.bytes_per_device(step.shapes), by="the compiler")
    if not readable:
        compilers = ", ".join(f"{name} {version}" for name, version in versions().items() if name not in ("jaxmodels", "jax", "jaxlib"))
        notes.append(
            f"jaxlib {jax.lib.__version__} cannot read the program of this compiler ({compilers}): time and collectives are from the analytic model. "
            "Install the version that this jax requires: pip install 'jaxmodels[plan]'"
        )
    time = estimate(step.text, topology, step.mesh.shape) if readable else roofline.estimate_traced(traced, topology)
    notes += [*(gpu_memory_notes(peak, available) if on_gpu else ()), *time.notes, *([NOT_AUTOTUNED] if on_gpu else ())]
    notes += [*sharding_lib.replicated_notes(step.shapes, experiment.sharding, step.layout), *sharding_lib.notes(step.layout)]
    by, mesh, flops = "compiler" if readable else "analytic", dict(step.mesh.shape), model_flops(experiment)
    return Plan(topology, experiment, mesh, memory, "compiler", memory_lib.peak(traced), time, by, flops, notes, step)


def gpu_memory_notes(peak: int, available: int) -> list[str]:
    """Return a note if a step needs more of a GPU's memory than JAX allocates by default."""
    needs = f"JAX allocates {JAX_SHARE:.0%} of a GPU's memory by default, and this step needs more: set XLA_PYTHON_CLIENT_MEM_FRACTION=.95"
    return [needs] if peak > JAX_SHARE * available else []


def analytic_plan(experiment: Experiment, topology: Topology, why: str) -> Plan:
    """Plan a run from the analytic models alone; a note states why it was not compiled.

    Raises:
      ConfigError: mesh or batch does not fit the topology.
      DoesNotFit: the memory model is above a device's memory.
    """
    traced = roofline.trace(experiment, topology.devices, topology.chip)
    modelled, available = memory_lib.peak(traced), topology.chip.memory_per_device
    if modelled.total > available:
        raise compiler.does_not_fit(experiment, topology, modelled.total, available, modelled.state, by="the analytic model")
    time, flops = roofline.estimate_traced(traced, topology), model_flops(experiment)
    return Plan(topology, experiment, traced.mesh, dataclasses.asdict(modelled), "analytic", modelled, time, "analytic", flops, [why])


def _memory(step: CompiledStep) -> dict[str, int]:
    """Return the bytes on a device by part: the sharded state, the batch, and `temporaries`, which is everything else at the peak.

    The peak is `peak_memory_in_bytes`, which the compiler compares with the available memory. It may include a TPU's on-chip memory, which is most of it for small
    programs. The sum of all allocations (arguments, temporaries, and outputs without a donated argument) is an upper bound, so the smaller of the two is returned.
    """
    analysis, total = step.compiled.memory_analysis(), compiler.memory(step.compiled)["total"]
    peak = min(getattr(analysis, "peak_memory_in_bytes", 0) or total, total)
    names = {"params": "parameters", "frozen": "frozen parameters", "opt_state": "optimizer", "ema": "moving average", "stats": "statistics"}
    parts = {name: mesh_lib.bytes_per_device(getattr(step.shapes, part)) for part, name in names.items()}
    rows = mesh_lib.batch_sharding(step.mesh)
    batch = step.experiment.batch_shapes(step.experiment.loading.batch_size)
    parts["batch"] = sum(math.prod(rows.shard_shape(x.shape)) * x.dtype.itemsize for x in batch.values())
    parts["temporaries"] = max(0, peak - sum(parts.values()))
    return {name: size for name, size in parts.items() if size}


def tokens_per_step(experiment: Experiment) -> int:
    """Return the number of tokens of a global batch, including padding; 0 if the examples are not texts."""
    shape = experiment.batch_shapes(experiment.loading.batch_size).get("tokens")
    if shape is None:
        return 0
    # The last token of a row is predicted, not read.
    return shape.shape[0] * (shape.shape[1] - (experiment.config["task"]["name"] == "language_model"))


def versions() -> dict[str, str]:
    """Return the versions of the installed packages that a plan depends on."""
    return installed(PACKAGES)
