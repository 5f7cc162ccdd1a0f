"""Time of a compiled step, predicted from the text of its program, for TPUs and GPUs.

The instructions are simulated in scheduled order. The time of each is the compiler's estimate if there is one, else that of `plan.cost` for its counts.
An asynchronous transfer begins at its start instruction, or when its network is free. Its exposed time is what remains of it when the program waits for it.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxmodels.plan import cost, counts, hlo
from jaxmodels.plan.cost import Estimate, Group, Seconds, Total
from jaxmodels.plan.hlo import Computation, Instruction, Program

# Instructions that take no time: names of values, and the starts and ends of asynchronous operations.
_FREE = frozenset("parameter constant tuple get-tuple-element bitcast after-all partition-id replica-id add-dependency opt-barrier iota send recv".split())
_ENDS = re.compile(r".*-(start|update|done)")
_FREE_TARGETS = ("AllocateBuffer", "ConcatBitcast", "PrepareAsyncCallStart", "PrepareAsyncCallDone", "AssumeGatherIndicesInBound", "Sharding")
_GUESSED = "instructions without an estimate of the compiler are counted by their bytes"
_HOST = re.compile(r"S\(5\)")  # host memory, in a layout


def estimate(text: str, topology: Any, mesh: Mapping[str, int]) -> Estimate:
    """Predict the time of a compiled step.

    Args:
      text: of the optimized program.
      topology: that it was compiled for, as `hardware.topologies.parse` returns.
      mesh: sizes of its axes, in order.

    Raises:
      RunError: the text cannot be parsed.
    """
    reader = _Reader(hlo.parse(text), topology, dict(mesh))
    total = reader.run(reader.program.entry)
    return total.estimate(total.cycles if topology.chip.clock_hz else None)


@dataclasses.dataclass(eq=False)
class _Transfer:
    """A collective, or a copy to or from the host: its key in `cost.Total.transfers`, the bytes that a device sends, its seconds, and those that remain."""

    key: tuple[str, tuple[str, ...], str]
    bytes: float
    seconds: float
    left: float = 0.0


class _Networks:
    """Transfers in flight. Those of one network run one after the other, those of different networks at the same time."""

    def __init__(self, total: Total):
        self.total, self.queues, self.pending = total, collections.defaultdict(list), {}

    def start(self, name: str, transfer: _Transfer) -> None:
        """Queue a transfer on its network: the links of its axes, or one direction to the host."""
        transfer.left = transfer.seconds
        network = transfer.key if transfer.key[-1] == "host" else transfer.key[1:]
        self.queues[network].append(transfer)
        self.pending[name] = network, transfer
        self.total.transfer(transfer.key, 1, transfer.bytes, transfer.seconds, 0.0)

    def run(self, seconds: float, but: Any = None) -> None:
        """Let time pass, on all networks except one."""
        for network, queue in self.queues.items():
            left = 0.0 if network == but else seconds
            for transfer in queue:
                done = min(left, transfer.left)
                transfer.left, left = transfer.left - done, left - done
            self.queues[network] = [transfer for transfer in queue if transfer.left > 0]

    def wait(self, name: str) -> None:
        """Wait for a transfer, and for those before it on its network."""
        network, transfer = self.pending.pop(name)
        exposed, queue = 0.0, self.queues[network]
        for each in queue[: queue.index(transfer) + 1] if transfer.left else ():
            self.total.transfer(each.key, 0, 0.0, 0.0, each.left)
            exposed, each.left = exposed + each.left, 0.0
        self.total.now += exposed
        self.run(exposed, but=network)


@dataclasses.dataclass
class _Reader:
    program: Program
    topology: Any
    mesh: dict[str, int]

    @property
    def on_gpu(self) -> bool:
        return self.topology.chip.platform == "gpu"

    def run(self, computation: Computation) -> Total:
        """Return the totals of one run of a computation."""
        total = Total()
        networks = _Networks(total)
        for instruction in computation.instructions.values():
            started, ended = self.ends(computation, instruction, set(networks.pending), total)
            for name, transfer in started.items():
                networks.start(name, transfer)
            before = total.now
            self.step(computation, instruction, total)
            networks.run(total.now - before)
            for name in ended:
                if name in networks.pending:
                    networks.wait(name)
                else:
                    total.notes[f"{instruction.name} waits for a transfer that starts in another computation; its time is not counted"] = None
        for name in list(networks.pending):
            networks.wait(name)
            total.notes[f"no instruction waits for {name} in its computation; it is counted until the end of the computation"] = None
        return total

    def step(self, computation: Computation, instruction: Instruction, total: Total) -> None:
        """Add the time of an instruction, without waits for transfers."""
        match instruction.opcode:
            case "while":
                times = hlo.trip_count(self.program, computation, instruction)
                if times is None:
                    total.notes[f"{instruction.name}: its trip count is unknown; it is counted once"] = None
                total.add(self.run(self.program.computations[instruction.called("body")]), 1 if times is None else times)
            case "conditional":
                runs = [self.run(self.program.computations[name]) for name in instruction.branches]
                total.add(max(runs, key=lambda run: run.now), 1)
                total.notes[f"{instruction.name}: the branch depends on values; the longest one is counted"] = None
            case "call" | "async-start" if not self.is_free(instruction):  # on a GPU, another stream on the same cores
                total.add(self.run(self.program.computations[instruction.body]), 1)
            case _:
                self.compute(computation, instruction, total)

    def compute(self, computation: Computation, instruction: Instruction, total: Total) -> None:
        """Add an instruction that runs on the chip's cores."""
        total.cycles += instruction.cycles
        inner = (instruction, *self.program.inside(instruction))
        kernel = next((each for each in inner if each.attribute("custom_call_target") == "tpu_custom_call"), None)
        if kernel is not None:
            operands = [array for each in self.program.owner(kernel).operands(kernel) for array in hlo.arrays(each.shape)]
            part, seconds, note = counts.pallas_seconds(self.topology.chip, kernel, operands)
            total.kernel((re.sub(r"(\.\w+)+$", "", kernel.name), tuple(map(str, operands))), None if seconds is None else seconds.mean)
            total.compute(part, seconds or Seconds())
            total.notes |= {note: None} if note else {}
        if instruction.cycles:
            products = any(each.opcode in ("convolution", "dot") for each in inner)
            seconds = instruction.cycles / self.topology.chip.clock_hz
            total.compute("matrix products" if products else "other", Seconds(seconds, seconds))
        elif kernel is None and not self.is_free(instruction):
            self.counted(computation, instruction, total)

    def counted(self, computation: Computation, instruction: Instruction, total: Total) -> None:
        """Add an instruction without estimated cycles, by its FLOPs and bytes."""
        chip, target = self.topology.chip, instruction.attribute("custom_call_target") or ""
        shapes = [hlo.arrays(each.shape)[0] for each in computation.operands(instruction)]
        if target.startswith("__cudnn$fmha"):
            seconds = counts.cudnn_attention_seconds(chip, instruction, shapes)
            total.kernel((target.removeprefix("__"), tuple(map(str, shapes))), seconds.mean)
            return total.compute("attention kernels", seconds)
        flops, own = counts.flops(self.program, computation, instruction), counts.compilers_seconds(instruction)
        itemsize = hlo.bits(shapes[0].dtype) // 8 if flops else 0
        seconds = cost.operation_seconds(chip, flops=flops, size=counts.moved_bytes(self.program, computation, instruction), itemsize=itemsize)
        if flops and own:
            seconds = Seconds(own, own)
        if self.on_gpu:
            seconds = Seconds(max(seconds.low, cost.GPU_LAUNCH), max(seconds.high, cost.GPU_LAUNCH))
        else:
            total.notes[_GUESSED] = None
        total.compute("matrix products" if flops else "other", seconds)

    def is_free(self, instruction: Instruction) -> bool:
        """Return whether an instruction takes no time on the cores, or its time is that of a collective."""
        if instruction.opcode in _FREE or instruction.attribute("custom_call_target") in _FREE_TARGETS:
            return True
        if instruction.opcode != "call" and any(_kind(each.opcode) for each in (instruction, *self.program.inside(instruction))):
            return True
        return _ENDS.fullmatch(instruction.opcode) is not None and not (self.on_gpu and instruction.opcode == "async-start")

    # Transfers

    def ends(self, computation: Computation, instruction: Instruction, pending: set[str], total: Total) -> tuple[dict[str, _Transfer], Iterable[str]]:
        """Return the transfers that start at an instruction, by name, and the names of those that it waits for."""
        opcode, found = instruction.opcode, {}
        if opcode == "send" and "_xla_megascale" in instruction.attributes:
            return {_rendezvous(instruction): self.between_slices(computation, instruction)}, ()
        if opcode == "recv-done" and "megascale" in instruction.attributes:
            return {}, [_rendezvous(computation.instructions[instruction.operands[0]])]
        if opcode == "fusion":
            return self.fused(instruction, pending)
        if opcode.endswith("-done"):
            name = _start_of(computation, instruction).name if instruction.operands else None
            return {}, [name] if name in pending else ()
        if re.fullmatch(r"(copy|slice|dynamic-slice|dynamic-update-slice)-start", opcode):
            found = {instruction.name: self.host_copy(computation, instruction)}
        elif opcode == "async-update":
            # An operation on the SparseCores may be started before its operands are ready: it begins when they are.
            begun = _start_of(computation, instruction)
            found = self.beside(begun, total) if begun.name not in pending and not begun.operands else {}
        elif opcode in ("async-start", "call-start"):
            found = self.beside(instruction, total) if instruction.operands else {}
        elif _kind(opcode):
            found = {instruction.name: self.collective(instruction)}
        found = {name: transfer for name, transfer in found.items() if transfer}
        waits = _kind(opcode) and (not opcode.endswith("-start") or instruction.config.get("collective_backend_config", {}).get("is_sync"))
        return found, found if waits else ()

    def beside(self, start: Instruction, total: Total) -> dict[str, _Transfer | None]:
        """Return the collective of an asynchronous start; None, with a note, if it is a computation on other cores of a TPU."""
        inner = next((each for each in self.program.inside(start) if _kind(each.opcode)), None)
        if inner is None and not self.on_gpu:
            what = re.sub(r"[\d.]+", " ", start.name).strip()
            total.notes[f"{what} runs in parallel on other cores of the chip; its time is not counted"] = None
        return {start.name: self.collective(inner)} if inner else {}

    def fused(self, fusion: Instruction, pending: set[str]) -> tuple[dict[str, _Transfer], list[str]]:
        """Return the collectives that start in a TPU's fusion, by name, and the names of those that it waits for.

        A fusion contains a whole collective, or the start, a step or the end of an asynchronous one, which its channel identifies.
        """
        started, ended = {}, []
        inner = self.program.inside(fusion)
        for each in inner:
            name = f"channel {each.attribute('channel_id')}"
            if not _kind(each.opcode) or name in started:
                continue
            readers = [other for other in inner if each.name in other.operands]
            if name in pending:
                ended += [name] if any(other.attribute("custom_call_target") == "AsyncCollectiveDone" for other in readers) else []
                continue
            if each.opcode == "all-reduce" and any(other.opcode == "dynamic-slice" for other in readers):
                transfer = self.grouped("reduce-scatter", self.program.owner(fusion).operands(fusion)[0].bytes, each)
            else:
                transfer = self.collective(each)
            if transfer is not None:
                started[name] = transfer
                ended += [] if any(other.attribute("custom_call_target") == "AsyncCollectiveStart" for other in inner) else [name]
        return started, ended

    def collective(self, instruction: Instruction) -> _Transfer | None:
        """Return a collective; None if no device sends anything."""
        kind = _kind(instruction.opcode)
        size = sum(each.bytes for each in self.program.owner(instruction).operands(instruction))
        if kind == "collective-permute":
            sent = [pair for pair in hlo.pairs(instruction.attributes) if pair[0] != pair[1]]
            return self.timed(kind, size, sent) if sent else None
        return self.grouped(kind, size, instruction)

    def grouped(self, kind: str, size: float, instruction: Instruction) -> _Transfer | None:
        """Return a collective of groups; `size` is the bytes of its operands on a device. None for groups of one device."""
        members = hlo.groups(instruction.attributes, math.prod(self.mesh.values()))
        largest = max(map(len, members))
        return self.timed(kind, size * largest if kind == "all-gather" else size, members) if largest > 1 else None

    def timed(self, kind: str, size: float, members: Sequence[Sequence[int]]) -> _Transfer:
        """Return a collective of groups of devices, given by their indices in the mesh. The group with the fewest devices in a slice is the slowest."""
        per_slice = math.prod(self.mesh.values()) // self.topology.slices
        slices = [collections.Counter(device // per_slice for device in group) for group in members]
        group = min((Group(sum(each.values()), max(each.values())) for each in slices), key=lambda group: group.inside)
        places = [np.unravel_index(np.array(group), tuple(self.mesh.values())) for group in members]
        axes = tuple(axis for k, axis in enumerate(self.mesh) if any((each[k] != each[k][0]).any() for each in places))
        seconds = cost.collective_seconds(kind, size, group, self.topology)
        return _Transfer((kind, axes, group.network), cost.SENT[kind](group.devices) * size, seconds)

    def between_slices(self, computation: Computation, send: Instruction) -> _Transfer:
        """Return a transfer between slices of TPUs, over their hosts."""
        kind = (send.attribute("_xla_megascale_transfer_type") or "ALL_REDUCE").lower().replace("_", "-")
        kind, slices = kind if kind in cost.SENT else "collective-permute", self.topology.slices
        size = sum(each.bytes for each in computation.operands(send)) * (slices if kind == "all-gather" else 1)
        per_slice = math.prod(self.mesh.values()) // slices
        return self.timed(kind, size, [range(0, slices * per_slice, per_slice)])

    def host_copy(self, computation: Computation, start: Instruction) -> _Transfer | None:
        """Return a copy to or from host memory, of an array or a part of one; None for a copy within the chip."""
        source = computation.instructions[start.operands[0]]
        here = _HOST.search(source.shape) is not None
        if start.opcode == "dynamic-update-slice-start":
            direction, size, inside = "to", computation.instructions[start.operands[1]].bytes, not here
        elif start.opcode == "copy-start":
            there = _HOST.search(start.shape.split("}, ", 1)[0]) is not None
            direction, size, inside = "to" if there else "from", source.bytes, there == here
        else:  # a part: its type comes after those of the operands
            direction, size, inside = "from", hlo.arrays(start.shape)[len(start.operands)].bytes, not here
        rate = self.topology.chip.host_bandwidth / self.topology.chip.devices_per_chip
        return None if inside else _Transfer((direction, (), "host"), size, size / rate)


def _kind(opcode: str) -> str | None:
    """Return the kind of collective that an opcode is or starts; None for other opcodes."""
    kind = opcode.removesuffix("-start")
    return kind if kind in cost.SENT else None


def _start_of(computation: Computation, instruction: Instruction) -> Instruction:
    """Return the start of an asynchronous operation, from its update or end."""
    while instruction.opcode == "async-update" or instruction.opcode.endswith("-done"):
        instruction = computation.instructions[instruction.operands[0]]
    return instruction


def _rendezvous(instruction: Instruction) -> str:
    return f"transfer {instruction.attribute('_xla_host_transfer_rendezvous')}"
