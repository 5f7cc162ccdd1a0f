"""What collectives of a compiled TPU program take: who takes part, over which axes of the mesh, what is sent, on which links, for how long.

The model is that of jax-ml.github.io/scaling-book/sharding: bytes over the bandwidth of all links that a group can use at a time, and at least a
microsecond for every chip that a message passes. A dimension of the torus gives two links to a group that closes it to a ring, one to a group that is a line in it.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Sequence

import numpy as np
from jax.sharding import Mesh

from jaxmodels.errors import RunError
from jaxmodels.hardware.chips import Chip

HOP_SECONDS = 1e-6  # scaling book, "Sharded matrices": what one hop takes at least
DIE_LINKS = 6  # between the two dies of a chip, in links of the torus: docs.cloud.google.com/tpu/docs/tpu7x, "Dual-chiplet architecture"

# Bytes that a device sends in a group of n, for each byte of the whole: the gathered, or the not yet scattered, array.
SENT = {
    "all-gather": lambda n: (n - 1) / n,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1.0,
}


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a device is: its slice, and its chip's coordinates in the slice."""

    slice: int
    chip: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Network:
    """Devices of a mesh, by their number in the program, which is their place in the mesh.

    Attributes:
      chip: of which kind.
      places: of the devices.
      grid: chips of a slice, along its dimensions.
      axes: names and sizes of the mesh.
    """

    chip: Chip
    places: tuple[Place, ...]
    grid: tuple[int, ...]
    axes: tuple[tuple[str, int], ...]


def make_network(chip: Chip, mesh: Mesh) -> Network:
    """The network of a mesh of TPU devices, which need not be here."""
    places = tuple(Place(getattr(device, "slice_index", None) or 0, tuple(device.coords)) for device in mesh.devices.flat)
    grid = tuple(max(sizes) + 1 for sizes in zip(*(place.chip for place in places), strict=True))
    return Network(chip, places, grid, tuple(mesh.shape.items()))


def groups(attributes: str, devices: int) -> tuple[tuple[int, ...], ...]:
    """Groups of devices that communicate, from an instruction's attributes: listed, as a reshaped and transposed count, or as axes of a mesh.

    Raises:
      RunError: they are written in another way.
    """
    match = re.search(r"replica_groups=(\{\}|\{\{[\d,{}\s]*\}\})", attributes)
    if match:
        listed = tuple(tuple(int(number) for number in group.split(",")) for group in re.findall(r"\{([\d,\s]+)\}", match[1]))
        return listed or (tuple(range(devices)),)
    match = re.search(r"replica_groups=(\[[\d,]+\])<=(\[[\d,]+\](?:T\([\d,]+\))?)", attributes)
    if match:
        return tuple(map(tuple, _iota(match[2]).reshape(_numbers(match[1])).tolist()))
    match = re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^)]*(?:\([\d,]+\))?[^)]*)\))? ?\{([^}]*)\}", attributes)
    if match:
        names, sizes = zip(*((name, int(size)) for name, size in re.findall(r"'([^']+)'=(\d+)", match[1])), strict=True)
        order = np.arange(math.prod(sizes)) if match[2] is None else _iota(match[2]) if match[2].startswith("[") else np.array(_numbers(match[2]))
        return _along(order.ravel(), names, sizes, match[3])
    raise RunError(f"the compiler's program has groups of devices that are not understood here: {attributes.strip()[:200]}")


def pairs(attributes: str) -> tuple[tuple[int, int], ...]:
    """Senders and receivers of a collective-permute."""
    match = re.search(r"source_target_pairs=\{([\d,{}\s]*)\}", attributes)
    return tuple((int(source), int(target)) for source, target in re.findall(r"\{(\d+),\s*(\d+)\}", match[1] if match else ""))


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def _iota(text: str) -> np.ndarray:
    """`[2,4]T(1,0)`: 0 to 7, as 2 × 4, transposed."""
    sizes, _, order = text.partition("T")
    counted = np.arange(math.prod(_numbers(sizes))).reshape(_numbers(sizes))
    return counted.transpose(_numbers(order)) if order else counted


def _along(order: np.ndarray, names: Sequence[str], sizes: Sequence[int], used: str) -> tuple[tuple[int, ...], ...]:
    """Groups along axes of a mesh, or along parts of them: `'x':(2)4` is the 4 in the middle of an axis of which 2 come before."""
    parts, chosen = [], []
    wanted = {name: [(int(before), int(size)) for before, size in re.findall(rf"'{re.escape(name)}':\((\d+)\)(\d+)", used)] for name in names}
    whole = set(re.findall(r"'([^']+)'(?!:)", used))
    for name, size in zip(names, sizes, strict=True):
        at = 1
        for before, length in wanted[name]:
            parts += [before // at, length]
            chosen.append(len(parts) - 1)
            at = before * length
        if name in whole:
            chosen.append(len(parts))
        parts.append(size // at)
    array = order.reshape(parts)
    rest = [axis for axis in range(len(parts)) if axis not in chosen]
    return tuple(map(tuple, array.transpose(rest + chosen).reshape(-1, math.prod(parts[axis] for axis in chosen)).tolist()))


def axes_of(network: Network, members: Sequence[Sequence[int]]) -> tuple[str, ...]:
    """Axes of the mesh along which devices of one group differ."""
    names, sizes = zip(*network.axes, strict=True)
    indices = np.stack(np.unravel_index(np.arange(len(network.places)), sizes), axis=1)
    differ = np.zeros(len(names), bool)
    for group in members:
        own = indices[list(group)]
        differ |= (own != own[0]).any(axis=0)
    return tuple(name for name, found in zip(names, differ, strict=True) if found)


def slice_axes(network: Network) -> tuple[str, ...]:
    """Axes of the mesh along which devices lie in several slices."""
    names, sizes = zip(*network.axes, strict=True)
    slices = np.array([place.slice for place in network.places]).reshape(sizes)
    return tuple(name for axis, name in enumerate(names) if (slices != slices.take([0], axis)).any())


def seconds(network: Network, kind: str, size: float, members: Sequence[Sequence[int]]) -> float:
    """The time of a collective of groups.

    Args:
      kind: a key of `SENT`, but no collective-permute.
      size: bytes of the whole array: gathered, or not yet scattered; of an all-to-all, what one device has.
      members: groups of devices; the slowest counts.
    """
    return max(_group_seconds(network, kind, size, group) for group in {tuple(group) for group in members})


def _group_seconds(network: Network, kind: str, size: float, group: Sequence[int]) -> float:
    places = [network.places[device] for device in group]
    slices = len({place.slice for place in places})
    inside = [place.chip for place in places if place.slice == places[0].slice]
    total = _slice_seconds(network, kind, size, inside)
    if slices > 1:  # each device has its share of a slice's part to exchange with the others
        chips = len(set(inside)) if kind != "all-to-all" else 1
        total += SENT[kind](slices) * size / chips / network.chip.network_bandwidth
    return total


def _slice_seconds(network: Network, kind: str, size: float, chips: Sequence[tuple[int, ...]]) -> float:
    """Within a slice; `chips` has one twice if both of its devices take part."""
    distinct, chip = set(chips), network.chip
    cores = len(chips) // len(distinct)
    if len(distinct) == 1:
        return SENT[kind](cores) * size / (DIE_LINKS * chip.link_bandwidth) if cores > 1 else 0.0
    lines = [_line(network, dimension, distinct) for dimension in range(len(network.grid))]
    whole = math.prod(line.size for line in lines) == len(distinct)
    links = sum(line.links for line in lines) if whole else 1
    hops = sum(line.hops for line in lines)
    # Groups that have one device of each chip share the links with those of the other devices.
    bandwidth = links * chip.link_bandwidth * cores / chip.devices_per_chip
    total = SENT[kind](len(distinct)) * size / bandwidth
    if kind == "all-to-all":  # half of all bytes cross the middle of each dimension
        crossing = max(size * line.size / (4 * line.links * chip.link_bandwidth) for line in lines if line.links)
        total = max(total, crossing * chip.devices_per_chip)
    return max(total, HOP_SECONDS * hops * (2 if kind == "all-reduce" else 1))


@dataclasses.dataclass(frozen=True)
class _Line:
    """What a group has of one dimension: chips, links that each can send over at a time, the longest way to another chip."""

    size: int
    links: float
    hops: int


def _line(network: Network, dimension: int, chips: set[tuple[int, ...]]) -> _Line:
    positions = sorted({chip[dimension] for chip in chips})
    size = len(positions)
    if size == 1:
        return _Line(1, 0, 0)
    stride = min(after - before for before, after in itertools.pairwise(positions))
    if _closed(network, dimension) and size * stride == network.grid[dimension]:
        return _Line(size, 2 / stride, network.grid[dimension] // 2)
    return _Line(size, 1 / stride, positions[-1] - positions[0])


def _closed(network: Network, dimension: int) -> bool:
    return network.grid[dimension] % network.chip.ring_multiple == 0


def permute_seconds(network: Network, size: float, sent: Sequence[tuple[int, int]]) -> float:
    """The time of a collective-permute: messages go along one dimension after the other, the shorter way; the fullest link counts.

    Args:
      size: bytes of a message.
      sent: senders and receivers.
    """
    load: dict[tuple, int] = {}
    longest, between = 0, False
    for source, target in sent:
        here, there = network.places[source], network.places[target]
        if here.slice != there.slice:
            between = True
            continue
        at, hops = list(here.chip), 0
        if source != target and here.chip == there.chip:
            load[(here, "die")] = load.get((here, "die"), 0) + 1 / DIE_LINKS
        for dimension, length in enumerate(network.grid):
            distance = there.chip[dimension] - at[dimension]
            if _closed(network, dimension) and abs(distance) > length / 2:
                distance -= math.copysign(length, distance)
            for _ in range(int(abs(distance))):
                link = (here.slice, tuple(at), dimension, distance > 0)
                load[link] = load.get(link, 0) + 1
                at[dimension] = (at[dimension] + (1 if distance > 0 else -1)) % length
                hops += 1
        longest = max(longest, hops)
    inside = max(max(load.values(), default=0) * size / network.chip.link_bandwidth, longest * HOP_SECONDS)
    return max(inside, size * network.chip.devices_per_chip / network.chip.network_bandwidth if between else 0.0)
