"""How long a compiled TPU program takes, from its text: the compiler's estimates of instructions, kernels by shapes, collectives by bytes.

A computation's instructions are gone through as they are scheduled, with a clock. What is asynchronous begins where it starts, or where its
network is free again, and adds to the clock only what is left of it where it is waited for. `docs/estimates.md` says how far off this is.
"""

import collections
import dataclasses
import re
from typing import Any

from jax.sharding import Mesh

from jaxmodels.errors import ConfigError
from jaxmodels.plan import kernels as kernels_lib
from jaxmodels.plan import program as program_lib
from jaxmodels.plan import torus
from jaxmodels.plan.program import Array, Computation, Instruction, Program

PARTS = ("matrix products", "attention kernels", "other", "exposed collectives", "exposed host transfers")

# That take no time of their own: names of values, and both ends of what runs beside the rest, such as copies between a chip's memories.
_FREE = frozenset("parameter constant tuple get-tuple-element bitcast after-all partition-id replica-id add-dependency opt-barrier iota send recv".split())
_ENDS = re.compile(r".*-(start|update|done)")
_FREE_TARGETS = ("AllocateBuffer", "ConcatBitcast", "PrepareAsyncCallStart", "PrepareAsyncCallDone", "AssumeGatherIndicesInBound", "Sharding")
_HOST = re.compile(r"S\(5\)")  # the host's memory, in a layout


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A Pallas kernel of a step.

    Attributes:
      name: without the number that the compiler adds.
      count: how often it runs in a step.
      shapes: of its operands.
      seconds: of all runs; None where nothing tells.
    """

    name: str
    count: int
    shapes: tuple[str, ...]
    seconds: float | None


@dataclasses.dataclass(frozen=True)
class Collective:
    """Collectives of a step that are of one kind and go over the same axes.

    Attributes:
      kind: `all-gather`, `reduce-scatter`, `all-reduce`, `all-to-all`, `collective-permute`; `all-gather by all-reduce` where the compiler adds up
        arrays that are zero but for a device's own part, which sends as much as an all-reduce.
      axes: of the mesh.
      count: how many run in a step.
      bytes: that one device sends in a step.
      seconds: that they take in a step.
      exposed_seconds: of these, with nothing beside them.
      network: `links` inside a slice, or `slices`, the network between them.
    """

    kind: str
    axes: tuple[str, ...]
    count: int
    bytes: float
    seconds: float
    exposed_seconds: float
    network: str


@dataclasses.dataclass(frozen=True)
class HostTransfer:
    """Copies of a step between a device and its host's memory, one way.

    Attributes:
      direction: `to` the host or `from` it.
      count: in a step.
      bytes: of one device in a step.
      seconds: that they take in a step.
      exposed_seconds: of these, with nothing beside them.
    """

    direction: str
    count: int
    bytes: float
    seconds: float
    exposed_seconds: float


@dataclasses.dataclass(frozen=True)
class Estimate:
    """The time of one run of a program, on one device as on all.

    Attributes:
      cycles: the compiler's estimates, added up over the instructions that run, those of loops as often as they run; without kernels and
        collectives, for which it has none. None of a GPU's program, which has no such estimates.
      seconds: predicted, kernels and collectives included.
      parts: seconds by part, which add up to `seconds`; keys are `PARTS`.
      kernels: Pallas kernels, longest first.
      collectives: by kind, axes and network, longest first.
      host_transfers: by direction.
      notes: what the program's text does not tell, and what was done about it.
    """

    cycles: int | None
    seconds: float
    parts: dict[str, float]
    kernels: list[Kernel]
    collectives: list[Collective]
    host_transfers: list[HostTransfer]
    notes: list[str]


def estimate(text: str, topology: Any, mesh: Mesh) -> Estimate:
    """The time of a compiled step.

    Args:
      text: of the optimized program, `compiled.as_text()`.
      topology: as `plan.topology.parse` gives; its chip is read.
      mesh: that the step was compiled for.

    Raises:
      ConfigError: the chip is no TPU.
      RunError: the text is not understood.
    """
    if topology.chip.clock_hz is None:
        raise ConfigError(f"{topology.chip.name}: programs of GPUs carry no estimates of their compiler; see plan/roofline.py.")
    reader = _Reader(program_lib.parse(text), torus.make_network(topology.chip, mesh))
    total = reader.run(reader.program.entry)
    return Estimate(
        cycles=total.cycles,
        seconds=total.seconds,
        parts={part: total.parts[part] for part in PARTS},
        kernels=sorted(
            (Kernel(name, count, shapes, total.kernel_seconds[name, shapes]) for (name, shapes), count in total.kernels.items()),
            key=lambda kernel: -(kernel.seconds or 0),
        ),
        collectives=sorted(
            (Collective(kind, axes, *figures, network) for (kind, axes, network), figures in total.transfers.items() if network != "host"),
            key=lambda collective: -collective.seconds,
        ),
        host_transfers=[HostTransfer(direction, *figures) for (direction, _, network), figures in sorted(total.transfers.items()) if network == "host"],
        notes=total.list_notes(topology.chip),
    )


@dataclasses.dataclass
class _Total:
    """What a computation takes when it runs once."""

    cycles: int = 0
    seconds: float = 0.0
    parts: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    kernels: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    kernel_seconds: dict = dataclasses.field(default_factory=dict)
    transfers: dict = dataclasses.field(default_factory=dict)  # (kind, axes, network) -> [count, bytes, seconds, exposed seconds]
    notes: dict = dataclasses.field(default_factory=dict)
    guessed: list = dataclasses.field(default_factory=lambda: [0, 0.0])  # instructions without an estimate: how many, seconds

    def take(self, part: str, seconds: float) -> None:
        """Adds time of a part."""
        self.seconds += seconds
        self.parts[part] += seconds

    def add(self, other: "_Total", times: int) -> None:
        """Adds what runs so often."""
        self.cycles += times * other.cycles
        self.seconds += times * other.seconds
        for part, seconds in other.parts.items():
            self.parts[part] += times * seconds
        for kernel, count in other.kernels.items():
            self.add_kernel(kernel, times * count, None if other.kernel_seconds[kernel] is None else times * other.kernel_seconds[kernel])
        for key, figures in other.transfers.items():
            self.add_transfer(key, *(times * figure for figure in figures))
        self.notes |= other.notes
        self.guessed = [a + times * b for a, b in zip(self.guessed, other.guessed, strict=True)]

    def add_transfer(self, key: tuple, *figures: float) -> None:
        """Adds runs of a collective, or of a copy to the host: count, bytes, seconds, exposed seconds."""
        self.transfers[key] = [a + b for a, b in zip(self.transfers.get(key, (0, 0.0, 0.0, 0.0)), figures, strict=True)]

    def add_kernel(self, kernel: tuple, count: int, seconds: float | None) -> None:
        """Adds runs of a kernel."""
        self.kernels[kernel] += count
        self.kernel_seconds[kernel] = None if seconds is None else (self.kernel_seconds.get(kernel) or 0.0) + seconds

    def list_notes(self, chip: Any) -> list[str]:
        """Notes, with what is guessed where it is more than a thousandth."""
        count, seconds = self.guessed
        if seconds > 1e-3 * self.seconds:
            rate = f"at the memory's {chip.memory_bandwidth / 1e9:g} GB/s"
            return [*self.notes, f"{count} instructions have no estimate of the compiler and take {seconds * 1e3:.3g} ms {rate}"]
        return list(self.notes)


@dataclasses.dataclass(frozen=True)
class _Transfer:
    """One collective, or copy to or from the host: under which key it is listed, bytes that a device sends, seconds."""

    key: tuple[str, tuple[str, ...], str]
    bytes: float
    seconds: float


@dataclasses.dataclass
class _Reader:
    program: Program
    network: torus.Network

    @property
    def clock(self) -> float:
        return self.network.chip.clock_hz

    def run(self, computation: Computation) -> _Total:
        """One run of a computation."""
        total = _Total()
        queues: dict[Any, list] = {}  # by network: what it sends one after the other, as (begin, end, key)
        pending: dict[str, tuple[Any, float]] = {}  # what has started: on which network, when it will be done

        def start(name: str, transfer: _Transfer) -> None:
            network = transfer.key if transfer.key[-1] == "host" else transfer.key[1:]
            queue = queues.setdefault(network, [])
            begin = max(total.seconds, queue[-1][1]) if queue else total.seconds
            queue.append((begin, begin + transfer.seconds, transfer.key))
            pending[name] = network, begin + transfer.seconds
            total.add_transfer(transfer.key, 1, transfer.bytes, transfer.seconds, 0.0)

        def wait(name: str) -> None:
            network, done = pending.pop(name)
            now = total.seconds
            queues[network] = [entry for entry in queues[network] if entry[1] > now]
            for begin, end, key in queues[network]:
                exposed = min(end, done) - max(begin, now)
                if exposed > 0:
                    total.take("exposed host transfers" if network[-1] == "host" else "exposed collectives", exposed)
                    total.add_transfer(key, 0, 0.0, 0.0, exposed)

        for instruction in computation.instructions.values():
            started, ended = self.ends(computation, instruction, set(pending), total)
            for name, transfer in started.items():
                start(name, transfer)
            self.step(computation, instruction, total)
            for name in ended:
                if name in pending:
                    wait(name)
                else:
                    total.notes[f"{instruction.name} waits for what starts elsewhere; its time is not counted"] = None
        for name in list(pending):
            wait(name)
            total.notes[f"{name} is not waited for where it starts; it is counted to the end of that computation"] = None
        return total

    def step(self, computation: Computation, instruction: Instruction, total: _Total) -> None:
        """The time that an instruction itself takes, without waiting for collectives."""
        match instruction.opcode:
            case "while":
                times = program_lib.trip_count(self.program, computation, instruction)
                if times is None:
                    total.notes[f"{instruction.name}: how often it runs is not in the program's text; it is counted once"] = None
                total.add(self.run(self.program.computations[instruction.called("body")]), 1 if times is None else times)
            case "conditional":
                runs = [self.run(self.program.computations[name]) for name in instruction.branches]
                total.add(max(runs, key=lambda run: run.seconds), 1)
                total.notes[f"{instruction.name}: which branch runs is decided by values; the longest is counted"] = None
            case "call":
                total.add(self.run(self.program.computations[instruction.called("to_apply")]), 1)
            case _:
                self.compute(computation, instruction, total)

    def compute(self, computation: Computation, instruction: Instruction, total: _Total) -> None:
        """The time of an instruction on the chip's cores."""
        total.cycles += instruction.cycles
        inner = self.program.inside(instruction)
        kernel = next((each for each in (instruction, *inner) if each.attribute("custom_call_target") == "tpu_custom_call"), None)
        if kernel is not None:
            where = computation if kernel is instruction else self.where(instruction, kernel)
            self.kernel(kernel, self.operands(where, kernel), total)
        if instruction.cycles:
            products = any(each.opcode in ("convolution", "dot") for each in (instruction, *inner))
            total.take("matrix products" if products else "other", instruction.cycles / self.clock)
        elif kernel is None and not self.is_free(instruction, inner):
            seconds = 2 * self.touched(computation, instruction, inner) / self.network.chip.memory_bandwidth * self.network.chip.devices_per_chip
            total.guessed = [total.guessed[0] + 1, total.guessed[1] + seconds]
            total.take("other", seconds)

    def kernel(self, kernel: Instruction, operands: list[Array], total: _Total) -> None:
        """A Pallas kernel."""
        part, seconds, note = kernels_lib.cost(self.network.chip, kernel, operands)
        total.add_kernel((re.sub(r"(\.\w+)+$", "", kernel.name), tuple(map(str, operands))), 1, seconds)
        total.take(part, seconds or 0.0)
        if note:
            total.notes[note] = None

    def is_free(self, instruction: Instruction, inner: tuple[Instruction, ...]) -> bool:
        """Whether it takes no time on the cores, or what it takes is a collective's."""
        if instruction.opcode in _FREE or instruction.attribute("custom_call_target") in _FREE_TARGETS:
            return True
        return _ENDS.fullmatch(instruction.opcode) is not None or any(_kind(each.opcode) for each in (instruction, *inner))

    def touched(self, computation: Computation, instruction: Instruction, inner: tuple[Instruction, ...]) -> int:
        """Bytes that it writes; into an array that is there already, those of the part."""
        writes = [instruction, *(each for each in inner if each.is_root)]
        into = next((each for each in writes if each.opcode == "dynamic-update-slice"), None)
        if into is None:
            return instruction.bytes
        where = computation if into is instruction else self.where(instruction, into)
        return where.instructions[into.operands[1]].bytes

    def where(self, outer: Instruction, wanted: Instruction) -> Computation:
        """The computation, of those that an instruction stands for, that has an instruction."""
        computation = self.program.computations[outer.body]
        if computation.instructions.get(wanted.name) is wanted:
            return computation
        return next(found for each in computation.instructions.values() if wanted in self.program.inside(each) for found in (self.where(each, wanted),))

    def operands(self, computation: Computation, instruction: Instruction) -> list[Array]:
        """Types of an instruction's operands."""
        return [array for name in instruction.operands for array in program_lib.arrays(computation.instructions[name].shape)]

    def ends(self, computation: Computation, instruction: Instruction, pending: set[str], total: _Total) -> tuple[dict[str, _Transfer], list[str]]:
        """Transfers that start at an instruction, and the names of those that are waited for at its end."""
        opcode = instruction.opcode
        if opcode == "send" and "_xla_megascale" in instruction.attributes:
            return {_rendezvous(instruction): self.between_slices(computation, instruction)}, []
        if opcode == "recv-done" and "megascale" in instruction.attributes:
            return {}, [_rendezvous(computation.instructions[instruction.operands[0]])]
        if re.fullmatch(r"(copy|slice|dynamic-slice|dynamic-update-slice)-start", opcode):
            moved = self.host_copy(computation, instruction)
            return {instruction.name: moved} if moved else {}, []
        if opcode == "async-update":
            # What runs on the SparseCores may be started before it has its operands: it begins when they come.
            begun = _start_of(computation, instruction)
            return self.beside(computation, begun, total) if begun.name not in pending and not begun.operands else {}, []
        if opcode.endswith("-done"):
            name = _start_of(computation, instruction).name if instruction.operands else None
            return {}, [name] if name in pending else []
        if opcode.startswith("collective-permute"):
            found = {instruction.name: self.collective(computation, instruction)}
        elif opcode == "fusion":
            return self.fused(computation, instruction, pending)
        elif _kind(opcode):
            found = {instruction.name: self.collective(computation, instruction)}
        elif opcode in ("async-start", "call-start"):
            found = self.beside(computation, instruction, total) if instruction.operands else {}
        else:
            return {}, []
        found = {name: transfer for name, transfer in found.items() if transfer}
        return found, [] if opcode.endswith("-start") else list(found)

    def beside(self, computation: Computation, start: Instruction, total: _Total) -> dict[str, _Transfer | None]:
        """The collective that an asynchronous start stands for; nothing where it computes on other cores, which a note says."""
        inner = next((each for each in self.program.inside(start) if _kind(each.opcode)), None)
        if inner is not None:
            return {start.name: self.collective(self.where(start, inner), inner)}
        what = re.sub(r"[\d.]+", " ", start.name).strip()
        total.notes[f"{what} runs beside the rest, on other cores of the chip; its time is not counted"] = None
        return {}

    def fused(self, computation: Computation, fusion: Instruction, pending: set[str]) -> tuple[dict[str, _Transfer], list[str]]:
        """Collectives in a fusion: the start, a step or the end of one that runs beside others, by its channel; or one as long as the fusion."""
        started, ended = {}, []
        inner = self.program.inside(fusion)
        targets = {each.attribute("custom_call_target") for each in inner if each.opcode == "custom-call"}
        for each in inner:
            if not _kind(each.opcode):
                continue
            name = f"channel {each.attribute('channel_id')}"
            if name in started:
                continue
            if name not in pending:
                scatters = any(other.opcode == "dynamic-slice" and each.name in other.operands for other in inner)
                if scatters and each.opcode == "all-reduce":
                    size = sum(array.bytes for array in self.operands(computation, fusion)[:1])
                    transfer = self.grouped("reduce-scatter", size, each)
                else:
                    transfer = self.collective(self.where(fusion, each), each)
                if transfer is None:
                    continue
                started[name] = transfer
                if "AsyncCollectiveStart" not in targets:
                    ended.append(name)
            elif any(other.attribute("custom_call_target") == "AsyncCollectiveDone" and each.name in other.operands for other in inner):
                ended.append(name)
        return started, ended

    def collective(self, computation: Computation, instruction: Instruction) -> _Transfer | None:
        """A collective; None where no device sends anything."""
        kind = _kind(instruction.opcode)
        size = sum(array.bytes for array in self.operands(computation, instruction))
        if kind == "collective-permute":
            sent = torus.pairs(instruction.attributes)
            if all(source == target for source, target in sent):
                return None
            key = kind, torus.axes_of(self.network, sent), "links"
            return _Transfer(key, size, torus.permute_seconds(self.network, size, sent))
        if kind == "all-reduce" and all(self.gathers(computation, name) for name in instruction.operands):
            return self.grouped("all-gather by all-reduce", size, instruction)
        if kind == "all-gather":
            size *= max(map(len, torus.groups(instruction.attributes, len(self.network.places))))
        return self.grouped(kind, size, instruction)

    def grouped(self, listed: str, size: float, instruction: Instruction) -> _Transfer | None:
        """A collective of groups: `size` as in `torus.seconds`."""
        members = torus.groups(instruction.attributes, len(self.network.places))
        largest = max(map(len, members))
        if largest == 1:
            return None
        kind = "all-reduce" if listed.endswith("by all-reduce") else listed
        slices = max(len({self.network.places[device].slice for device in group}) for group in members)
        key = listed, torus.axes_of(self.network, members), "links" if slices == 1 else "slices"
        return _Transfer(key, torus.SENT[kind](largest) * size, torus.seconds(self.network, kind, size, members))

    def gathers(self, computation: Computation, name: str) -> bool:
        """Whether an array is a device's part written into zeros."""
        instruction = computation.instructions[name]
        if instruction.opcode in ("copy", "bitcast", "copy-done", "copy-start", "convert"):
            return self.gathers(computation, instruction.operands[0])
        if instruction.opcode == "fusion":
            inner = self.program.computations[instruction.called("calls")]
            return self.gathers(inner, inner.root.name)
        if instruction.opcode != "dynamic-update-slice":
            return False
        into = computation.instructions[instruction.operands[0]]
        return into.opcode in ("broadcast", "parameter")  # an accumulator would be an element of a loop's tuple

    def between_slices(self, computation: Computation, send: Instruction) -> _Transfer:
        """A transfer to other slices, which the hosts do; an all-reduce there sends each byte twice but for a device's own part."""
        size = sum(array.bytes for array in self.operands(computation, send))
        slices = len({place.slice for place in self.network.places})
        kind = (send.attribute("_xla_megascale_transfer_type") or "ALL_REDUCE").lower().replace("_", "-")
        sent = torus.SENT[kind](slices) * size if kind in torus.SENT else size
        if kind == "all-gather":
            sent = (slices - 1) * size
        per_device = self.network.chip.network_bandwidth / self.network.chip.devices_per_chip
        return _Transfer((kind, torus.slice_axes(self.network), "slices"), sent, sent / per_device)

    def host_copy(self, computation: Computation, start: Instruction) -> _Transfer | None:
        """A copy to or from the host's memory, of an array or a part of one; None of one inside the chip."""
        source = computation.instructions[start.operands[0]]
        if start.opcode == "dynamic-update-slice-start":
            to, size = True, computation.instructions[start.operands[1]].bytes
            inside = not _HOST.search(source.shape)
        elif start.opcode == "copy-start":
            to, size = _HOST.search(start.shape.split("}, ", 1)[0]) is not None, source.bytes
            inside = to == (_HOST.search(source.shape) is not None)
        else:  # a part: its type comes after those of the operands
            to, size = False, program_lib.arrays(start.shape)[len(start.operands)].bytes
            inside = not _HOST.search(source.shape)
        if inside:
            return None
        rate = self.network.chip.host_bandwidth / self.network.chip.devices_per_chip
        return _Transfer(("to" if to else "from", (), "host"), size, size / rate)


def _kind(opcode: str) -> str | None:
    """The collective that an opcode is, or starts."""
    kind = opcode.removesuffix("-start")
    return kind if kind in torus.SENT else None


def _start_of(computation: Computation, instruction: Instruction) -> Instruction:
    """What an update or the end of something asynchronous is of."""
    while instruction.opcode == "async-update" or instruction.opcode.endswith("-done"):
        instruction = computation.instructions[instruction.operands[0]]
    return instruction


def _rendezvous(instruction: Instruction) -> str:
    return f"transfer {instruction.attribute('_xla_host_transfer_rendezvous')}"
