"""`jaxmodels plan`: what a run takes of hardware that is not here, from its compiled train step; where there is no compiler, from models.

`Plan` holds the figures, `make_plan` finds them, `print_plan` shows them. docs/plan.md says what each means.
"""

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from jaxmodels.errors import ConfigError, RunError
from jaxmodels.experiment.experiment import Experiment
from jaxmodels.experiment.flops import ModelFlops, model_flops
from jaxmodels.parallel import mesh as mesh_lib
from jaxmodels.parallel import sharding as sharding_lib
from jaxmodels.plan import memory as memory_lib
from jaxmodels.plan import roofline
from jaxmodels.plan import topology as topology_lib
from jaxmodels.plan.estimate import Estimate, estimate
from jaxmodels.plan.memory import MemoryEstimate
from jaxmodels.plan.topology import CompiledStep, Topology
from jaxmodels.runs.folder import write_json

PACKAGES = ("jaxmodels", "jax", "jaxlib", "libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin")
BY_MODELS = "memory and time are those of the analytic models"


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run takes of a topology.

    Attributes:
      topology: that it was asked of.
      experiment: of the run.
      mesh: sizes of its axes.
      memory: bytes of a device by part, which add up to the peak.
      memory_by: `compiler`, or `analytic`.
      memory_model: the analytic model's own figures.
      time: of a step.
      time_by: `compiler`, or `analytic`.
      flops: of a step, over all devices.
      notes: what a reader of the figures has to know.
      step: compiled; None where there is no compiler.
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
        """Bytes of a device, at the moment when most are in use."""
        return sum(self.memory.values())

    @property
    def host_bytes(self) -> int | None:
        """Of the host's memory, for one device: what a step keeps there; None where no compiler tells."""
        if self.step is None:
            return None
        found = self.step.compiled.memory_analysis()
        return found.host_argument_size_in_bytes + found.host_output_size_in_bytes + found.host_temp_size_in_bytes - found.host_alias_size_in_bytes

    @property
    def fits(self) -> bool:
        """A compiler refuses what does not; a model tells."""
        return self.peak <= self.topology.chip.memory_per_device

    @property
    def flops_per_device(self) -> float:
        """Of the model, in a step."""
        return self.flops.all / self.topology.devices

    @property
    def mfu(self) -> float:
        """The share of the chips' peak (of bfloat16 products) that the model's operations are."""
        return self.flops_per_device / (self.time.seconds * self.topology.chip.flops_per_device)

    @property
    def mfu_attended(self) -> float:
        """The same of what masks leave."""
        return self.mfu * self.flops.attended / self.flops.all if self.flops.all else 0.0

    @property
    def rates(self) -> dict[str, float]:
        """`tokens_per_second_per_chip`, of texts, and `examples_per_second_per_chip`."""
        per_chip = self.topology.chips * self.time.seconds
        tokens = tokens_per_step(self.experiment)
        texts = {"tokens_per_second_per_chip": tokens / per_chip} if tokens else {}
        return texts | {"examples_per_second_per_chip": self.experiment.loading.batch_size / per_chip}

    @property
    def run_seconds(self) -> float:
        """All training steps; without start, evaluation and checkpoints."""
        return self.experiment.steps * self.time.seconds

    @property
    def chip_hours(self) -> float:
        """The same over all chips."""
        return self.run_seconds * self.topology.chips / 3600

    def to_json(self) -> dict[str, Any]:
        """As `--json` writes it: bytes, seconds and FLOPs are of one device and one step unless the key says otherwise."""
        chip, experiment = self.topology.chip, self.experiment
        return {
            "topology": self.topology.name,
            "chip": chip.name,
            "grid": list(self.topology.grid),
            "slices": self.topology.slices,
            "chips": self.topology.chips,
            "devices": self.topology.devices,
            "mesh": dict(self.mesh),
            "method": self.memory_by,
            "step_seconds_method": self.time_by,
            "fits": self.fits,
            "peak_bytes_per_device": self.peak,
            "device_bytes": chip.memory_per_device,
            "memory": dict(self.memory),
            "allocations": topology_lib.memory(self.step.compiled) if self.step else {},
            "host_bytes_per_device": self.host_bytes,
            "memory_model": dataclasses.asdict(self.memory_model) | {"total": self.memory_model.total},
            "step_seconds": self.time.seconds,
            "cycles": self.time.cycles,
            "parts": dict(self.time.parts),
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
            "collectives": [dataclasses.asdict(each) for each in self.time.collectives],
            "kernels": [dataclasses.asdict(each) for each in self.time.kernels],
            "host_transfers": [dataclasses.asdict(each) for each in self.time.host_transfers],
            "implementations": self.step.experiment.kernels if self.step else {},
            "compile_seconds": self.step.record.seconds if self.step else None,
            "compiler_options": self.step.record.options if self.step else {},
            "rejected_options": self.step.record.rejected if self.step else {},
            "versions": versions(),
            "notes": list(self.notes),
            "config": experiment.config,
        }


def make_plan(experiment: Experiment, topology: str | Topology) -> Plan:
    """The plan of a run: its train step compiled for a topology, or modelled where there is no compiler for it.

    Args:
      experiment: as `build_experiment` gives.
      topology: or its name, as for `topology.parse`.

    Raises:
      ConfigError: the topology is none, or mesh, batch or a kernel does not fit it.
      DoesNotFit: it needs more memory than a device has; says how much, and what to change.
      RunError: the compiler failed.
    """
    topology = topology_lib.parse(topology) if isinstance(topology, str) else topology
    topology_lib.check_mesh(experiment.mesh, topology)
    if topology.chip.platform == "gpu":
        from jaxmodels.plan import gpu

        if not gpu.has_compiler():
            why = f"JAX's CUDA plugin, which holds the compiler for GPUs, is not installed ({gpu.INSTALL}): {BY_MODELS}; {gpu.MODELS_ARE_LOW}"
            return analytic_plan(experiment, topology, why)
        step = gpu.compile_step(experiment, topology)
        plan = compiled_plan(experiment, topology, step, gpu.estimate(step.text, topology, step.mesh.shape))
        return dataclasses.replace(plan, notes=[*gpu.memory_notes(plan.peak, topology), *plan.notes])
    if not topology_lib.has_libtpu():
        return analytic_plan(experiment, topology, f"libtpu, the compiler for TPUs, is not installed (pip install 'jaxmodels[plan]'): {BY_MODELS}")
    step = topology_lib.compile_step(experiment, topology)
    return compiled_plan(experiment, topology, step, estimate(step.text, topology, step.mesh) if step.text is not None else None)


def check(topology: str, files: Mapping[str, str | None]) -> Topology:
    """What can be told of the command's arguments before anything is compiled.

    Args:
      topology: its name.
      files: `json`, `hlo` and `save`: where they go.

    Raises:
      ConfigError: the topology is none; a file's folder is none.
    """
    for name, path in files.items():
        if path is not None and not os.path.isdir(os.path.dirname(os.path.abspath(path))):
            raise ConfigError(f"--{name}={path}: there is no folder {os.path.dirname(path)!r}.")
        if path is not None and name != "save" and os.path.isdir(path):
            raise ConfigError(f"--{name}={path} is a folder; give a file's name.")
    found = topology_lib.parse(topology)
    if found.chip.platform == "gpu" and files["save"]:
        raise ConfigError(f"--save={files['save']}: what is compiled for {topology} without a GPU is not what one would run; train compiles there.")
    return found


def plan_and_write(experiment: Experiment, topology: Topology, files: Mapping[str, str | None], found: Any = None) -> Plan:
    """The plan of a run, written to the files that are asked for; of a step that does not fit, how much it needs.

    Args:
      experiment, topology: as for `make_plan`.
      files: `json`, `hlo` and `save`: where they go; None for those that nobody wants.
      found: by `plan.search`, where it was asked.

    Raises:
      ConfigError, DoesNotFit, RunError: as `make_plan` does; there is nothing to write.
    """
    # JAX keeps executables for devices that are not here, but cannot load them again (PjRt wants a client for that), and says so each time.
    jax.config.update("jax_enable_compilation_cache", False)
    extra = {"search": found.to_json()} if found is not None else {}
    try:
        plan = make_plan(experiment, topology)
    except topology_lib.DoesNotFit as error:
        if files["json"] and error.needed:
            page = {"topology": topology.name, "fits": False, "peak_bytes_per_device": error.needed, "device_bytes": error.available, "error": str(error)}
            write_json(Path(files["json"]), page | extra)
        raise
    if files["json"]:
        write_json(Path(files["json"]), plan.to_json() | extra)
    if files["hlo"]:
        if plan.step is None or plan.step.text is None:
            raise RunError(f"--hlo={files['hlo']}: there is no program to write. {plan.notes[0]}.")
        Path(files["hlo"]).write_text(plan.step.text)
    if files["save"]:
        if plan.step is None:
            raise RunError(f"--save={files['save']}: there is no compiled step to keep. {plan.notes[0]}.")
        from jaxmodels.plan import executable

        executable.save(plan.step, files["save"], plan.to_json())
    return plan


def write_found(found: Any, path: str | None) -> None:
    """Writes the best of a search, that its compilation told all of, as `--json` does.

    Args:
      found: by `plan.search`.
      path: of the file; None where nobody wants one.
    """
    if path:
        write_json(Path(path), found.best.plan | {"search": found.to_json()})


def compiled_plan(experiment: Experiment, topology: Topology, step: CompiledStep, time: Estimate | None) -> Plan:
    """The plan of a compiled step.

    Args:
      experiment: as `build_experiment` gives.
      topology: that it was compiled for.
      step: as `compile_step` gives.
      time: read from its program; None where that could not be read: then the analytic model's counts.

    Raises:
      DoesNotFit: it needs more memory than a GPU has.
    """
    traced = roofline.trace(experiment, topology.devices, topology.chip)
    notes = []
    if time is None:
        notes.append(
            f"jaxlib {jax.lib.__version__} cannot read the program of this compiler ({', '.join(f'{k} {v}' for k, v in versions().items() if k not in ('jaxmodels', 'jax', 'jaxlib'))}): "
            "time and collectives are those of the analytic model; for the compiler's, install the version that this jax asks for: pip install 'jaxmodels[plan]'"
        )
    found = time or roofline.traced_estimate(experiment, traced, topology)
    notes += [*found.notes, *sharding_lib.replicated_notes(step.shapes, experiment.sharding, step.layout), *sharding_lib.notes(step.layout)]
    memory, room = _memory(step), topology.chip.memory_per_device
    if topology.chip.platform == "gpu" and sum(memory.values()) > room:  # whose compiler does not refuse it
        raise topology_lib.does_not_fit(experiment, topology, sum(memory.values()), room, mesh_lib.bytes_per_device(step.shapes), by="the compiler")
    return Plan(
        topology=topology,
        experiment=experiment,
        mesh=dict(step.mesh.shape),
        memory=memory,
        memory_by="compiler",
        memory_model=memory_lib.peak(traced),
        time=found,
        time_by="analytic" if time is None else "compiler",
        flops=model_flops(experiment),
        notes=notes,
        step=step,
    )


def analytic_plan(experiment: Experiment, topology: Topology, why: str) -> Plan:
    """The plan of a step that nothing here compiles.

    Args:
      experiment: as `build_experiment` gives.
      topology: of its chips.
      why: there is no compiler, as a note.

    Raises:
      ConfigError: mesh or batch does not fit the topology.
      DoesNotFit: the model of memory says that it does not.
    """
    traced = roofline.trace(experiment, topology.devices, topology.chip)
    modelled, time = memory_lib.peak(traced), roofline.traced_estimate(experiment, traced, topology)
    if modelled.total > topology.chip.memory_per_device:
        raise topology_lib.does_not_fit(experiment, topology, modelled.total, topology.chip.memory_per_device, modelled.state, by="the analytic model")
    parts = {"state": modelled.state, "batch": modelled.batch}
    parts |= {part: size for part, size in dataclasses.asdict(modelled).items() if part not in parts}
    return Plan(
        topology=topology,
        experiment=experiment,
        mesh=traced.mesh,
        memory=parts,
        memory_by="analytic",
        memory_model=modelled,
        time=time,
        time_by="analytic",
        flops=model_flops(experiment),
        notes=[why, *(note for note in time.notes if "no compiler" not in note)],
    )


def _memory(step: CompiledStep) -> dict[str, int]:
    """Bytes of a device by part: the state, as its arrays lie there; the batch; and all else that is there at the peak.

    The peak is `peak_memory_in_bytes`, what the compiler itself compares with the memory there is (it refuses a program whose figure is above it): state and batch and, of the rest,
    what is alive at a time. It may count what lies in a TPU's memory on the chip, of small programs most of it; but never is more in use than all
    allocations together (arguments, temporaries, and outputs that take no argument's place), so these bound it.
    """
    analysis, total = step.compiled.memory_analysis(), topology_lib.memory(step.compiled)["total"]
    peak = min(getattr(analysis, "peak_memory_in_bytes", 0) or total, total)
    names = {"params": "parameters", "frozen": "frozen parameters", "opt_state": "optimizer", "ema": "moving average", "stats": "statistics"}
    parts = {name: mesh_lib.bytes_per_device(getattr(step.shapes, part)) for part, name in names.items()}
    rows = mesh_lib.batch_sharding(step.mesh)
    batch = step.experiment.batch_shapes(step.experiment.loading.batch_size)
    parts["batch"] = sum(math.prod(rows.shard_shape(x.shape)) * x.dtype.itemsize for x in batch.values())
    parts["temporaries"] = max(0, peak - sum(parts.values()))
    return {name: size for name, size in parts.items() if size}


def tokens_per_step(experiment: Experiment) -> int:
    """Tokens of a global batch, padding included; 0 where examples are no texts."""
    shape = experiment.batch_shapes(experiment.loading.batch_size).get("tokens")
    if shape is None:
        return 0
    # The last token of a row is predicted, not read.
    return shape.shape[0] * (shape.shape[1] - (experiment.config["task"]["name"] == "language_model"))


def versions() -> dict[str, str]:
    """Of the packages that a plan depends on."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def print_plan(plan: Plan, console: Console) -> None:
    """Prints the figures, a line or a small table each."""
    for name, value in _lines(plan).items():
        console.print(f"{name:<12} {value}", highlight=False, markup=False, soft_wrap=True)
    for table in (_collectives(plan.time), _kernels(plan.time)):
        if table is not None:
            console.print()
            console.print(table)
    console.print()
    for note in plan.notes:
        console.print(f"note: {note}", style="dim", highlight=False, markup=False, soft_wrap=True)


def _lines(plan: Plan) -> dict[str, str]:
    chip, time, experiment = plan.topology.chip, plan.time, plan.experiment
    by = {"compiler": "by the compiler", "analytic": "by the analytic model"}
    size, room = plan.peak, chip.memory_per_device
    parts = ", ".join(f"{part} {_gb(value)}" for part, value in plan.memory.items())
    modelled = {part: value for part, value in dataclasses.asdict(plan.memory_model).items() if part not in ("state", "batch") and value}
    slices = f"{plan.topology.slices} × " if plan.topology.slices > 1 else ""
    lines = {
        "topology": f"{plan.topology.name}: {slices}{'×'.join(map(str, plan.topology.grid))} {chip.name} chips, mesh {mesh_lib.shown(plan.mesh)}",
        "memory": f"{_gb(size)} of {_gb(room)} GB a device ({size / room:.0%}), {by[plan.memory_by]}: {parts}",
    }
    if plan.memory_by == "compiler":
        lines["  model"] = (
            f"{_gb(plan.memory_model.total)} GB by the analytic model, temporaries apart: {', '.join(f'{part} {_gb(value)}' for part, value in modelled.items())}"
        )
    if plan.host_bytes:
        lines["  host"] = f"{_gb(plan.host_bytes)} GB of the host's memory for each device"
    cycles = f", {time.cycles / 1e6:,.{0 if time.cycles > 1e9 else 2}f} M cycles in instructions that it estimates" if time.cycles is not None else ""
    lines["step"] = f"{_seconds(time.seconds)}, {by[plan.time_by]}{cycles}"
    lines["  parts"] = ", ".join(f"{part} {_seconds(value)} ({value / time.seconds:.0%})" for part, value in time.parts.items() if value)
    lines["MFU"] = f"{plan.mfu:.1%} of {chip.flops_per_device / 1e12:g} TFLOP/s a device: {plan.flops_per_device:.4g} FLOPs of the model in a step"
    if plan.flops.attended != plan.flops.all:
        lines["MFU"] += f"; {plan.mfu_attended:.1%} by those that masks leave"
    lines["speed"] = ", ".join(f"{rate:,.4g} {name.partition('_')[0]}/s a chip" for name, rate in plan.rates.items())
    accumulated = f", {experiment.training.accumulate} parts added up" if experiment.training.accumulate > 1 else ""
    lines["run"] = (
        f"{experiment.steps:,} steps of {experiment.loading.batch_size:,} examples{accumulated}: {_duration(plan.run_seconds)}, {plan.chip_hours:,.4g} chip-hours"
    )
    if plan.step is not None:
        record = plan.step.record
        options = ", ".join(f"{name}={value}" for name, value in record.options.items())
        lines["compiled"] = (
            f"in {record.seconds:.0f} s by {', '.join(f'{name} {version}' for name, version in versions().items())}{' with ' + options if options else ''}"
        )
        for name, reason in record.rejected.items():
            lines[f"  {name}"] = f"is left out: this compiler says: {reason}"
        for part, used in plan.step.experiment.kernels.items():
            lines[f"  {part}"] = f"{used['used']} ({used['why']})" if used.get("why") else used["used"]
    return lines


def _collectives(time: Estimate) -> Table | None:
    rows = [(each.kind, " × ".join(each.axes), each.network, each) for each in time.collectives]
    rows += [(f"copy {each.direction} the host", "", "host", each) for each in time.host_transfers]
    if not rows:
        return None
    table = Table("collective", "axes", "over", "count", "GB a device", "time", "exposed", box=None)
    for kind, axes, network, each in rows:
        table.add_row(kind, axes, network, f"{each.count:,}", f"{each.bytes / 1e9:.3g}", _seconds(each.seconds), _seconds(each.exposed_seconds))
    return table


def _kernels(time: Estimate) -> Table | None:
    if not time.kernels:
        return None
    table = Table("kernel", "count", "time", "operands", box=None)
    for each in time.kernels:
        table.add_row(each.name, f"{each.count:,}", _seconds(each.seconds) if each.seconds is not None else "not known", " ".join(each.shapes))
    return table


def _gb(size: float) -> str:
    """Of bytes, in 10**9."""
    return f"{size / 1e9:.2f}" if size >= 1e7 else f"{size / 1e9:.2g}"


def _seconds(value: float) -> str:
    return f"{value:.4g} s" if value >= 1 else f"{1e3 * value:.4g} ms" if value >= 1e-3 or not value else f"{1e6 * value:.3g} µs"


def _duration(seconds: float) -> str:
    """`12 s`, `3.4 hours`, `5.6 days`."""
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.1f} seconds"
