"""What a collective takes on a topology's network, from bytes and bandwidths: rings, without what starting one takes."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from jaxmodels.plan.torus import SENT


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
    return 0.0 if devices == 1 else SENT[kind](devices) * size / bandwidth(axes, mesh, topology)


def network(axes: Sequence[str], mesh: Mapping[str, int], topology: Any) -> str:
    """Which network a collective over axes needs: `links` of one slice or node, or `slices`, that between them."""
    devices, inside = _group(axes, mesh, topology)
    return "links" if inside == devices else "slices"


def bandwidth(axes: Sequence[str], mesh: Mapping[str, int], topology: Any) -> float:
    """Bytes a second that one device sends to its neighbours along axes of the mesh.

    A TPU has two links for each dimension of its slice that the axes need; between slices, its share of the hosts' network. A GPU has its links to the
    node's switch; a ring through several nodes goes through as many of a node's network adapters as devices of the node are in it.
    """
    (devices, inside), chip = _group(axes, mesh, topology), topology.chip
    within = _within(chip, inside, topology)
    return (within if inside == devices else min(chip.network_bandwidth * inside, within)) / chip.devices_per_chip


def _group(axes: Sequence[str], mesh: Mapping[str, int], topology: Any) -> tuple[int, int]:
    """How many devices communicate, and how many of these are in one slice or node."""
    devices, names = math.prod(mesh[axis] for axis in axes), list(mesh)
    per_slice = math.prod(mesh.values()) // topology.slices
    # So far apart are neighbours along the innermost of the axes.
    stride = math.prod(mesh[name] for name in names[max(names.index(axis) for axis in axes) + 1 :])
    return devices, max(1, min(devices, per_slice // stride))


def _within(chip: Any, devices: int, topology: Any) -> float:
    """Of one chip, inside a slice or node."""
    if not chip.torus_dimensions:
        return chip.link_bandwidth
    covered, dimensions = 1, 0
    for size in sorted(topology.grid, reverse=True):
        if covered >= devices:
            break
        covered, dimensions = covered * size, dimensions + 1
    return 2 * max(1, dimensions) * chip.link_bandwidth
