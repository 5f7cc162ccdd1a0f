"""What a collective takes on a topology's network, from bytes and bandwidths: rings, without what starting one takes."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

# Bytes that a device sends, for each byte of the larger of its operand and its result, in a ring of n devices.
_SENT = {
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-gather": lambda n: (n - 1) / n,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1.0,
}


def collective_seconds(kind: str, size: float, axes: Sequence[str], mesh: Mapping[str, int], topology: Any) -> float:
    """The time of one collective.

    Args:
      kind: `all-reduce`, `all-gather`, `reduce-scatter`, `all-to-all` or `collective-permute`.
      size: bytes on a device, of the operand or the result, whichever is larger.
      axes: of the mesh, that it goes over.
      mesh: sizes of all axes, in order: the last ones lie on the nearest devices.
      topology: as `plan.topology.parse` gives.
    """
    devices = math.prod(mesh[axis] for axis in axes)
    return 0.0 if devices == 1 else _SENT[kind](devices) * size / bandwidth(axes, mesh, topology)


def bandwidth(axes: Sequence[str], mesh: Mapping[str, int], topology: Any) -> float:
    """Bytes a second that one device sends to its neighbours along axes of the mesh.

    A TPU has two links for each dimension of its slice that the axes need; between slices, its share of the hosts' network. A GPU has its links to the
    node's switch; a ring through several nodes goes through as many of a node's network adapters as devices of the node are in it.
    """
    chip, devices = topology.chip, math.prod(mesh[axis] for axis in axes)
    per_slice = math.prod(mesh.values()) // topology.slices
    # Devices that lie next to each other up to the end of the innermost of the axes: so far apart are neighbours along it.
    names = list(mesh)
    stride = math.prod(mesh[name] for name in names[max(names.index(axis) for axis in axes) + 1 :])
    inside = max(1, min(devices, per_slice // stride))  # of those that communicate, in one slice or node
    if inside < devices:
        return min(chip.network_bandwidth * inside, _inside(chip, devices, topology)) / chip.devices_per_chip
    return _inside(chip, devices, topology) / chip.devices_per_chip


def _inside(chip: Any, devices: int, topology: Any) -> float:
    """Of one chip, inside a slice or node."""
    if not chip.torus_dimensions:
        return chip.link_bandwidth
    covered, dimensions = 1, 0
    for size in sorted(topology.grid, reverse=True):
        if covered >= devices:
            break
        covered, dimensions = covered * size, dimensions + 1
    return 2 * max(1, dimensions) * chip.link_bandwidth
