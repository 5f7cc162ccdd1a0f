"""The cost model: seconds that operations and collectives take on a chip, from counts and the rates of `hardware.chips`.

It is the same for traced steps (`plan.roofline`) and compiled programs (`plan.estimate`), for TPUs and GPUs. An operation uses a device's matrix unit, its vector unit
and its memory; the time of each is a count divided by a rate. At best the three overlap, and the longest time counts; at worst they run one after the other. The
time of a collective is the bytes that a device sends in a ring, divided by the bandwidth of the links that the ring uses. `docs/estimates.md` states the limits.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxmodels.hardware.chips import Chip

PARTS = ("matrix products", "attention kernels", "other", "exposed collectives", "exposed host transfers")

# Bytes that a device sends in a ring of n devices, for each byte of the array after gathering, or before reducing or scattering.
SENT = {
    "all-gather": lambda n: (n - 1) / n,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1.0,
}
# Products of queries × keys × head width in attention kernels. `fused` computes all gradients; `dq` and `dkv` those of queries, and of keys and values.
ATTENTION_PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4, "fused": 5}
# Elementwise operations for a score in an attention kernel: scale, mask (2), maximum, subtraction, exponential (3), sum, product, conversions (2).
SCORE_OPERATIONS = 12
TPU_HEAD_WIDTH = 128  # rows of a matrix unit; a narrower head is padded with zeros
GPU_LAUNCH = 2e-6  # minimum seconds between the starts of two kernels


@dataclasses.dataclass(frozen=True)
class Seconds:
    """A range of time: `low` if all units of a device overlap, `high` if none do."""

    low: float = 0.0
    high: float = 0.0

    @property
    def mean(self) -> float:
        """The predicted time."""
        return (self.low + self.high) / 2

    def __add__(self, other: "Seconds") -> "Seconds":
        return Seconds(self.low + other.low, self.high + other.high)

    def __mul__(self, times: float) -> "Seconds":
        return Seconds(times * self.low, times * self.high)


def operation_seconds(chip: Chip, *, flops: float = 0.0, vectors: float = 0.0, size: float = 0.0, itemsize: int = 2) -> Seconds:
    """Return the time of an operation on one device.

    Args:
      chip: the device's chip.
      flops: operations in matrix products, two for each multiply-add.
      vectors: elementwise operations.
      size: bytes read and written.
      itemsize: bytes of a product's operand values. A GPU multiplies float32 as TF32, at half the bfloat16 rate; a TPU as bfloat16.
    """
    slower = 2 if chip.platform == "gpu" and itemsize == 4 else 1
    units = slower * flops / chip.flops_per_device, vectors / chip.vector_rate_per_device, size / chip.bandwidth_per_device
    return Seconds(max(units), sum(units))


def attention_seconds(chip: Chip, kernel: str, *, scores: float, width: int) -> Seconds:
    """Return the time of a fused attention kernel on one device. `scores` is the number of query-key pairs over all rows and heads, `width` that of a head."""
    width = max(width, TPU_HEAD_WIDTH) if chip.platform == "tpu" else width
    return operation_seconds(chip, flops=2 * ATTENTION_PRODUCTS[kernel] * scores * width, vectors=SCORE_OPERATIONS * scores)


class Group(NamedTuple):
    """The size of a collective's group: its devices, and how many of them are in the same slice of TPUs or node of GPUs (`inside`)."""

    devices: int
    inside: int

    @property
    def network(self) -> str:
        """`links` within a slice or node, `slices` between them."""
        return "links" if self.devices == self.inside else "slices"


def group_along(axes: Sequence[str], mesh: Mapping[str, int], topology: Any) -> Group:
    """Return the group of a collective over mesh axes. The last axis of a mesh varies fastest over neighbouring devices."""
    devices, names = math.prod(mesh[axis] for axis in axes), list(mesh)
    innermost = max(names.index(axis) for axis in axes)
    stride = math.prod(mesh[name] for name in names[innermost + 1 :])
    per_slice = math.prod(mesh.values()) // topology.slices
    return Group(devices, max(1, min(devices, per_slice // stride)))


def collective_seconds(kind: str, size: float, group: Group, topology: Any) -> float:
    """Return the time of one collective; `size` is the bytes of its operand or result, whichever is larger."""
    if group.devices == 1:
        return 0.0
    chip = topology.chip
    seconds = SENT[kind](group.devices) * size / bandwidth(kind, group, topology)
    if kind == "all-to-all" and chip.torus_dimensions and group.network == "links":
        # Half of all bytes cross the middle of the longest dimension, over one link each way; over two in a ring.
        longest = max(topology.grid)
        links = 2 if longest % chip.ring_multiple == 0 else 1
        seconds = max(seconds, size * min(group.devices, longest) / (4 * links * chip.link_bandwidth))
    return max(seconds, GPU_LAUNCH if chip.platform == "gpu" else 0.0)


def bandwidth(kind: str, group: Group, topology: Any) -> float:
    """Return the bytes per second that a device of a group sends. Between slices or nodes, a ring uses the network links of all its devices in one of them."""
    chip, links = topology.chip, 1
    if chip.torus_dimensions and kind != "collective-permute":
        # One link for each dimension of the torus that the group spans, two if the dimension is a closed ring.
        links, left = 0, group.inside
        for length in sorted(topology.grid, reverse=True):
            links += 0 if left == 1 else 2 if left >= length and length % chip.ring_multiple == 0 else 1
            left = math.ceil(left / length)
    within = max(1, links) * chip.link_bandwidth
    return (within if group.network == "links" else min(chip.network_bandwidth * group.inside, within)) / chip.devices_per_chip


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A hand-written kernel of a step (Pallas, cuDNN), with the shapes of its operands. `seconds` is the time of all its runs; None if unknown."""

    name: str
    count: int
    shapes: tuple[str, ...]
    seconds: float | None


@dataclasses.dataclass(frozen=True)
class Collective:
    """Collectives of a step with the same kind and mesh axes.

    Attributes:
      kind: a key of `SENT`.
      axes: mesh axes along which the devices of a group differ.
      count: runs in a step.
      bytes: sent by one device in a step.
      seconds: of all runs in a step.
      exposed_seconds: the part of `seconds` that does not overlap with computation.
      network: `links` within a slice, or `slices` between them.
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
    """Copies of a step `to` host memory or `from` it; the figures are those of `Collective`."""

    direction: str
    count: int
    bytes: float
    seconds: float
    exposed_seconds: float


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Predicted time of a step, the same on all devices.

    Attributes:
      cycles: sum of the compiler's estimates over the instructions that run. It has none for kernels and collectives. None if it estimates no cycles.
      seconds: predicted time of a step.
      low, high: its bounds: everything overlaps, or nothing does.
      parts: `seconds` by part; keys are `PARTS`.
      kernels: longest first.
      collectives: by kind, axes and network, longest first.
      host_transfers: by direction.
      notes: assumptions and omissions of the figures.
    """

    cycles: int | None
    seconds: float
    low: float
    high: float
    parts: dict[str, float]
    kernels: list[Kernel]
    collectives: list[Collective]
    host_transfers: list[HostTransfer]
    notes: list[str]


@dataclasses.dataclass
class Total:
    """Sums over operations of a step.

    Attributes:
      now: seconds since the start, including waits for transfers.
      cycles: sum of the compiler's estimates.
      computing: seconds by part.
      kernels: (name, shapes of operands) -> [runs, seconds or None].
      transfers: (kind, axes, network) -> [count, bytes, seconds, exposed seconds]; copies have the kind `to` or `from` and the network `host`.
      notes: as keys.
    """

    now: float = 0.0
    cycles: int = 0
    computing: dict[str, Seconds] = dataclasses.field(default_factory=dict)
    kernels: dict[tuple, list] = dataclasses.field(default_factory=dict)
    transfers: dict[tuple, list] = dataclasses.field(default_factory=dict)
    notes: dict[str, None] = dataclasses.field(default_factory=dict)

    def compute(self, part: str, seconds: Seconds, times: int = 1) -> None:
        """Add the time of a computation to a part of the step."""
        self.now += times * seconds.mean
        self.computing[part] = self.computing.get(part, Seconds()) + seconds * times

    def transfer(self, key: tuple, *figures: float) -> None:
        """Add count, bytes, seconds and exposed seconds to the transfers of a key. The caller adds the wait to `now`."""
        self.transfers[key] = [a + b for a, b in zip(self.transfers.get(key, (0, 0.0, 0.0, 0.0)), figures, strict=True)]

    def kernel(self, key: tuple, seconds: float | None, count: int = 1) -> None:
        """Add runs of a kernel to the list; its time is added by `compute`."""
        before = self.kernels.get(key, [0, 0.0])
        self.kernels[key] = [before[0] + count, None if seconds is None else before[1] + seconds]

    def add(self, other: "Total", times: int) -> None:
        """Add another computation that runs `times` times."""
        now = self.now + times * other.now
        self.cycles += times * other.cycles
        for part, seconds in other.computing.items():
            self.compute(part, seconds, times)
        for key, (count, seconds) in other.kernels.items():
            self.kernel(key, None if seconds is None else times * seconds, times * count)
        for key, figures in other.transfers.items():
            self.transfer(key, *(times * figure for figure in figures))
        self.notes |= other.notes
        self.now = now

    def estimate(self, cycles: int | None = None) -> Estimate:
        """Return the estimate of a step with these sums."""
        collectives = [Collective(kind, axes, *row, network) for (kind, axes, network), row in self.transfers.items() if network != "host"]
        copies = [HostTransfer(direction, *row) for (direction, _, network), row in sorted(self.transfers.items()) if network == "host"]
        busy: dict[Any, float] = {each.direction: each.seconds for each in copies}  # of each network; networks can be used at the same time
        for each in collectives:
            busy[each.axes, each.network] = busy.get((each.axes, each.network), 0.0) + each.seconds
        computing = sum(self.computing.values(), Seconds())
        parts = dict.fromkeys(PARTS, 0.0) | {part: each.mean for part, each in self.computing.items()}
        parts["exposed collectives"] = sum(each.exposed_seconds for each in collectives)
        parts["exposed host transfers"] = sum(each.exposed_seconds for each in copies)
        return Estimate(
            cycles=cycles,
            seconds=sum(parts.values()),
            low=max(computing.low, *busy.values(), 0.0),
            high=computing.high + sum(busy.values()),
            parts=parts,
            kernels=sorted(
                (Kernel(name, runs, shapes, spent) for (name, shapes), (runs, spent) in self.kernels.items()), key=lambda each: -(each.seconds or 0)
            ),
            collectives=sorted(collectives, key=lambda each: -each.seconds),
            host_transfers=copies,
            notes=list(self.notes),
        )
