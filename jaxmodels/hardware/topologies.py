"""Names of topologies: chips, and how they are connected."""

import dataclasses
import difflib
import math
import re

from jaxmodels.errors import ConfigError
from jaxmodels.hardware.chips import CHIPS, Chip

FORMS = "v5p-128 (Google's name of a slice), v5p:4x4x4 (its chips), 4xv5p-128 (four slices), h100x8 (a node of GPUs), 2xh100x8 (two nodes)"

# Grids of chips for Google's names of slices: docs.cloud.google.com/tpu/docs/v5e and /v6e, "Configurations".
_FLAT_GRIDS = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
# The same of /v4, /v5p and /tpu7x, up to one cube of 4 × 4 × 4; larger slices consist of cubes.
_SMALL_GRIDS = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4), (4, 4, 4))
_LARGEST = {"v4": 4096, "v5p": 6144, "tpu7x": 9216}  # chips of the largest slice: the same pages
_GPUS_PER_NODE = 8
_OTHER_NAMES = {"v5litepod": "v5e"}


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
        other = _names(chip)[-1] if chip.platform == "gpu" else f"{_names(chip)[4]} or {written(chip, _grids(chip)[4])}"
        raise ConfigError(f"--topology={name}: {chip.name} is written such as {other}; several with a count in front.")
    if gpus is not None:
        sizes = _node(name, chip, int(gpus))
    elif grid is None:
        sizes = _slice(name, chip, int(count))
    else:
        sizes = tuple(int(size) for size in grid.split("x"))
        if len(sizes) != chip.torus_dimensions or 0 in sizes:
            raise ConfigError(f"--topology={name}: chips of {chip.name} are in {chip.torus_dimensions} dimensions, such as {written(chip, _grids(chip)[4])}.")
    return Topology(name, chip, sizes, slices)


def written(chip: Chip, grid: tuple[int, ...]) -> str:
    """Return `v5p:4x4x4`."""
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
        nodes = count // _GPUS_PER_NODE if count and count % _GPUS_PER_NODE == 0 else 2
        raise ConfigError(
            f"--topology={name}: a node has 1 to {_GPUS_PER_NODE} GPUs; several nodes have their number in front: {nodes}x{chip.name}x{_GPUS_PER_NODE}."
        )
    return (count,)
