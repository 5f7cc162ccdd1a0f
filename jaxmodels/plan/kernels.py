"""What Pallas kernels of a compiled TPU program take. The compiler estimates nothing for them, so their shapes and their names tell."""

import math
import re
from collections.abc import Sequence

from jaxmodels.hardware.chips import Chip
from jaxmodels.plan import splash
from jaxmodels.plan.program import Array, Instruction, arrays

# Of grouped products (megablox, and the compiler's own): they pad groups to tiles of rows, and lay tiles out as a dense product does.
GROUPED_SHARE = 0.8
# Of kernels whose authors state their FLOPs.
STATED_SHARE = 0.5


def cost(chip: Chip, kernel: Instruction, operands: Sequence[Array]) -> tuple[str, float | None, str | None]:
    """A kernel's part of a step, its seconds, and what is to be said of it.

    Args:
      chip: it runs on one device of it.
      kernel: the custom call.
      operands: their types.

    Returns:
      `attention kernels`, `matrix products` or `other`; seconds, None where nothing tells; a note, or None.
    """
    name = re.sub(r"(\.\w+)+$", "", kernel.name)
    attention = re.match(r"splash_m[hq]a_(fwd|dkv|dq)", name)
    if attention:
        seconds, note = _splash_seconds(chip, attention[1], kernel, operands)
        return "attention kernels", seconds, note
    if name in ("gmm", "tgmm"):
        flops, note = _grouped_flops(name, kernel, operands)
        return "matrix products", flops / (chip.flops_per_device * GROUPED_SHARE), note
    grouped = name.startswith("ragged-dot")  # the compiler's own of `jax.lax.ragged_dot`
    part = "matrix products" if grouped else "attention kernels" if "attention" in name or "flash" in name else "other"
    stated = kernel.config.get("custom_call_config", {}).get("cost_estimate")
    if stated:
        moved = int(stated.get("bytes_accessed", 0)) / (chip.memory_bandwidth / chip.devices_per_chip)
        share = GROUPED_SHARE if grouped else STATED_SHARE
        return part, max(int(stated.get("flops", 0)) / (chip.flops_per_device * share), moved), None
    return part, None, f"kernel {name}: neither known here nor with a cost of its own in the program; it is left out of the time"


def _splash_seconds(chip: Chip, which: str, kernel: Instruction, operands: Sequence[Array]) -> tuple[float, str | None]:
    """Of jax.experimental.pallas.ops.tpu.splash_attention, and a note.

    The kernel leaves out blocks that its mask covers. Which these are is data, which the text has not: `models.fused` states how many are
    left in the name of the scope that it calls the kernel in. Of a kernel called elsewhere, how many blocks there are, and how many a row
    has at most, are shapes of its first operand.
    """
    queries, keys = [array.shape for array in operands if array.dtype in ("bf16", "f32") and len(array.shape) >= 3][:2]
    *heads, length, size = _sequence_first(queries, kernel, "q")
    shape = (length, _sequence_first(keys, kernel, "k")[-2])
    mask = next((array for array in operands if array.dtype in ("s8", "s32") and len(array.shape) == 3), None)
    cells = (1, 1) if mask is None else mask.shape[-2:]
    block = noted_block(which, kernel.attributes) or tuple(-(-length // n) for length, n in zip(shape, cells, strict=True))
    rows, columns = (-(-n // of) for n, of in zip(shape, block, strict=True))
    share, note = stated(kernel.attributes, "blocks"), None
    if share is None and mask is not None:
        visible = _visible(block, rows, columns, cells)
        share = visible / (rows * columns)
        note = f"splash attention kernels: masks are taken as causal, {visible:.0f} of {rows * columns} blocks; their values are not in the program's text"
    computed = rows * columns * (1.0 if share is None else share)
    one = which == "dkv" and re.search(r'use_fused_bwd_kernel\\*": true', kernel.attributes)
    times = {"computed": computed, "shape": shape, "block": block, "head_width": size, "heads": math.prod(heads)}
    return splash.seconds(chip, "fused" if one else which, **times), note


def stated(scopes: str, what: str) -> float | None:
    """The share that a scope states, `blocks=36of64`: the innermost, None where there is none."""
    found = re.findall(rf"{what}=(\d+)of(\d+)", scopes)
    return int(found[-1][0]) / int(found[-1][1]) if found else None


def _sequence_first(shape: tuple[int, ...], kernel: Instruction, which: str) -> tuple[int, ...]:
    """`[…, length, head size]`, of an array that may lie the other way round (layout 2, `QKVLayout.SEQ_MINOR`)."""
    return (*shape[:-2], shape[-1], shape[-2]) if re.search(rf'{which}_layout\\*": 2', kernel.attributes) else shape


def noted_block(which: str, notes: str) -> tuple[int, int] | None:
    """Queries and keys in a block of a splash attention kernel, as what it notes of itself says."""
    noted = {key: int(size) for key, size in re.findall(r'(block_\w+)\\*": (\d+)', notes)}
    names = {"fwd": ("block_q", "block_kv"), "dkv": ("block_q_dkv", "block_kv_dkv"), "dq": ("block_q_dq", "block_kv_dq")}[which]
    return tuple(noted[name] for name in names) if all(name in noted for name in names) else None


def _visible(block: tuple[int, int], rows: int, columns: int, cells: tuple[int, int]) -> float:
    """Blocks that a causal mask lets be computed; rows of fewer cells than there are blocks were cut to those that they need."""
    if sorted(cells) != sorted((rows, columns)):
        return math.prod(cells)
    return sum((row + 1) * block[0] > column * block[1] for row in range(rows) for column in range(columns))


def _grouped_flops(name: str, kernel: Instruction, operands: Sequence[Array]) -> tuple[float, str | None]:
    """FLOPs of jax.experimental.pallas.ops.tpu.megablox, rows × k × n, whatever the groups; and a note.

    Rows after the last group take no time. How many there are is data: `models.moe` states in a scope how many rows have an expert where
    all experts have as much to do.
    """
    left, right = [array for array in operands if array.dtype in ("bf16", "f32") and len(array.shape) >= 2][:2]
    result, share = arrays(kernel.shape)[0], stated(kernel.attributes, "rows")
    if name == "gmm":  # [m, k] and [groups, k, n], to [m, n]
        flops = 2.0 * math.prod(left.shape) * result.shape[-1]
    else:  # [groups, k, n], of [k, m] and [m, n]
        flops = 2.0 * math.prod(right.shape) * result.shape[-2]
    if share is None:
        return flops, None
    return (
        flops * share,
        f"grouped products: experts are taken to have as much to do as each other, so that {share:.0%} of the rows there is room for are computed",
    )
