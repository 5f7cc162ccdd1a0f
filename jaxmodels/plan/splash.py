"""What JAX's splash attention kernels take on a TPU, by the compiler's own schedule of them.

The compiler estimates no cycles for Pallas kernels, but lays out their instructions as it does all others: one bundle a cycle. `SCHEDULES` has how
many there are; `python benchmarks/attention_kernels.py` compiles the kernels and counts them.
"""

import dataclasses
import math

from jaxmodels.hardware.chips import Chip

# Products of queries × keys × a head's size in a block. `fused` gives the gradients of queries, keys and values at once; `dq` and `dkv` apart.
PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4, "fused": 5}


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Cycles of a core, which chips of megacores have two of.

    Attributes:
      block: that it computes a block of 512 queries × 512 keys in, with heads of up to 128.
      large: one of 1,024 × 1,024.
      wide: one of 512 × 512, with heads of 256.
      step: around each block of the grid, computed or not.
      row: at the beginning and end of a row of blocks, for each 512 queries (of `dkv` and `fused`: keys).
    """

    block: int
    large: int
    wide: int
    step: int
    row: int


# jax 0.10.2, libtpu 0.0.52.
SCHEDULES = {
    "v4": {
        "fwd": Schedule(1574, 6871, 2964, 375, 984),
        "dq": Schedule(1809, 6933, 3264, 376, 183),
        "dkv": Schedule(2427, 9795, 3994, 507, 374),
        "fused": Schedule(2806, 10992, 5054, 826, 375),
    },
    "v5e": {
        "fwd": Schedule(1191, 4593, 2239, 251, 698),
        "dq": Schedule(1467, 5674, 3003, 139, 172),
        "dkv": Schedule(1860, 7185, 3771, 180, 334),
        "fused": Schedule(2234, 9164, 4595, 382, 334),
    },
    "v5p": {
        "fwd": Schedule(1201, 4776, 2178, 392, 701),
        "dq": Schedule(1458, 5777, 2924, 260, 172),
        "dkv": Schedule(1831, 7701, 3687, 364, 334),
        "fused": Schedule(2295, 9249, 4708, 617, 334),
    },
    "v6e": {
        "fwd": Schedule(909, 3159, 959, 299, 348),
        "dq": Schedule(1009, 3624, 1041, 149, 93),
        "dkv": Schedule(1283, 4572, 1328, 206, 173),
        "fused": Schedule(1570, 5723, 1603, 326, 173),
    },
    "tpu7x": {
        "fwd": Schedule(900, 3211, 1310, 177, 330),
        "dq": Schedule(957, 3684, 1198, 146, 81),
        "dkv": Schedule(1292, 4368, 1375, 208, 161),
        "fused": Schedule(1423, 5274, 1488, 323, 161),
    },
}


def seconds(chip: Chip, kernel: str, *, computed: float, shape: tuple[int, int], block: tuple[int, int], head_width: int, heads: int) -> float:
    """The time of a kernel on a device.

    Args:
      chip: a TPU.
      kernel: `fwd`, `dq`, `dkv` or `fused`.
      computed: blocks of a head that its mask leaves.
      shape: queries and keys.
      block: queries and keys in a block.
      head_width: of queries and keys.
      heads: of all rows.
    """
    schedule = SCHEDULES[chip.name][kernel]
    rows, columns = (math.ceil(length / size) for length, size in zip(shape, block, strict=True))
    if kernel in ("dkv", "fused"):
        across, along = block[1], columns
    else:
        across, along = block[0], rows
    around = rows * columns * schedule.step + along * schedule.row * across / 512
    return heads * (computed * block_cycles(chip, kernel, block, head_width) + around) / (chip.cores_per_device * chip.clock_hz)


def block_cycles(chip: Chip, kernel: str, block: tuple[int, int], head_width: int) -> float:
    """Cycles that a core computes a block in: as many as it has instructions, or as its matrix units take, whichever are more. Smaller
    or longer blocks are taken to be parts or multiples of those that were compiled; heads of up to 128 fill the units' rows with zeros."""
    schedule, area = SCHEDULES[chip.name][kernel], math.prod(block)
    if head_width > 128:
        instructions = schedule.wide * area / 512**2 * max(1.0, head_width / 256)
    elif min(block) >= 1024:
        instructions = schedule.large * area / 1024**2
    else:
        instructions = schedule.block * area / 512**2
    products = 2 * PRODUCTS[kernel] * area * max(128, head_width)
    return max(instructions, products * chip.clock_hz * chip.cores_per_device / chip.flops_per_device)
