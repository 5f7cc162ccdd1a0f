"""FLOPs and bytes of the instructions of a compiled program, and the work of Pallas kernels."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jaxmodels.hardware.chips import Chip
from jaxmodels.plan.cost import Seconds, attention_seconds, operation_seconds
from jaxmodels.plan.hlo import Array, Computation, Instruction, Program, arrays

_SLICES = ("dynamic-slice", "slice", "gather")


def _shape(instruction: Instruction) -> tuple[int, ...]:
    """Return the shape of its result, or of the first of several."""
    return arrays(instruction.shape)[0].shape


# Products


def flops(program: Program, computation: Computation, instruction: Instruction) -> int:
    """Return the FLOPs of an instruction in products and convolutions: of cuBLAS, of cuDNN, or of the compiler's own, also inside a fusion."""
    target, operands = instruction.attribute("custom_call_target") or "", computation.operands(instruction)
    if target.startswith("__cublas"):
        return _gemm_flops(instruction.config["gemm_backend_config"]["dot_dimension_numbers"], instruction, operands)
    if target.startswith("__cudnn$conv"):
        return convolution_flops(target, instruction, operands)
    dots = [each for each in (instruction, *program.inside(instruction)) if each.opcode == "dot"]
    return sum(_dot_flops(each, program.owner(each).operands(each)) for each in dots)


def _gemm_flops(numbers: Mapping[str, Any], instruction: Instruction, operands: Sequence[Instruction]) -> int:
    return 2 * math.prod(_shape(instruction)) * math.prod(_shape(operands[0])[int(i)] for i in numbers["lhs_contracting_dimensions"])


def _dot_flops(instruction: Instruction, operands: Sequence[Instruction]) -> int:
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)[1]
    return 2 * math.prod(_shape(instruction)) * math.prod(_shape(operands[0])[int(i)] for i in contracted.split(",") if i)


def convolution_flops(target: str, instruction: Instruction, operands: Sequence[Instruction]) -> int:
    """Return the FLOPs of a cuDNN convolution. Each of its two gradients has the same number, and the `dim_labels` of the convolution itself."""
    labels = re.search(r"dim_labels=\w+_(\w+)->\w+", instruction.attributes)[1]
    result, (first, second) = _shape(instruction), map(_shape, operands[:2])
    if "BackwardFilter" in target:
        kernel, output = result, second
    elif "BackwardInput" in target:
        kernel, output = second, first
    else:
        kernel, output = second, result
    return 2 * math.prod(output) * math.prod(kernel) // kernel[labels.index("o")]


def compilers_seconds(instruction: Instruction) -> float | None:
    """Return the GPU compiler's estimate for a library kernel; None without one. For Hopper it comes from the compiler's table of products measured on an H100."""
    found = [each["exec_time_us"] for each in instruction.config.get("reification_cost", ()) if each.get("name") == "sol"]
    return found[0] * 1e-6 if found and found[0] > 0 else None


def cudnn_attention_seconds(chip: Chip, instruction: Instruction, operands: Sequence[Array]) -> Seconds:
    """Return the time of cuDNN's fused attention. With a causal mask, half the scores are computed."""
    config = instruction.config["cudnn_fmha_backend_config"]
    scores = math.prod(int(size) for size in config["intermediate_tensor_shape"]["dimensions"])
    scores /= 2 if "CAUSAL" in config["mask_type"] else 1
    kernel = "fused" if "Backward" in instruction.attribute("custom_call_target") else "fwd"
    return attention_seconds(chip, kernel, scores=scores, width=operands[0].shape[-1])


# Bytes


def moved_bytes(program: Program, computation: Computation, instruction: Instruction) -> int:
    """Return the bytes that an instruction reads and writes. If it slices an array or updates a part in place, only that part counts."""
    operands = computation.operands(instruction)
    if instruction.opcode == "custom-call":
        return sum(each.bytes for each in operands) + arrays(instruction.shape)[0].bytes  # without workspace
    if instruction.opcode == "dynamic-update-slice":
        return 2 * operands[1].bytes
    if instruction.opcode != "fusion":
        return 2 * instruction.bytes if instruction.opcode in _SLICES else sum(each.bytes for each in operands) + instruction.bytes
    inner = program.computations[instruction.body]
    updates = [each for each in inner.instructions.values() if each.opcode in ("dynamic-update-slice", "scatter")]
    targets = {each.operands[0] for each in updates}
    size = instruction.bytes
    for each in inner.instructions.values():
        if each.opcode != "parameter":
            continue
        readers = [reader for reader in inner.instructions.values() if each.name in reader.operands]
        if all(reader.opcode in _SLICES and reader.operands[0] == each.name for reader in readers):
            size += sum(reader.bytes for reader in readers)
        elif not _names(inner, each.name) & targets:
            size += each.bytes
    for update in updates:
        part = inner.instructions[update.operands[-1 if update.opcode == "scatter" else 1]].bytes
        size -= update.bytes - part if update.bytes <= instruction.bytes else 0
    return size


def _names(computation: Computation, name: str) -> set[str]:
    """Return the names of a value and of its bitcasts and copies."""
    names = {name}
    for each in computation.instructions.values():
        if each.opcode in ("bitcast", "copy") and each.operands[0] in names:
            names.add(each.name)
    return names


# Pallas kernels


def pallas_seconds(chip: Chip, kernel: Instruction, operands: Sequence[Array]) -> tuple[str, Seconds | None, str | None]:
    """Return the time of a Pallas kernel of a TPU's program.

    Returns:
      Its part of the step (`matrix products`, `attention kernels` or `other`); seconds, None if unknown; a note, or None.
    """
    name = re.sub(r"(\.\w+)+$", "", kernel.name)
    if attention := re.match(r"splash_m[hq]a_(fwd|dkv|dq)", name):
        return "attention kernels", *_splash(chip, attention[1], kernel, operands)
    if name in ("gmm", "tgmm"):
        return "matrix products", *_grouped(chip, name, kernel, operands)
    grouped = name.startswith("ragged-dot")  # the compiler's kernel for `jax.lax.ragged_dot`
    part = "matrix products" if grouped else "attention kernels" if "attention" in name or "flash" in name else "other"
    stated = kernel.config.get("custom_call_config", {}).get("cost_estimate")
    if stated:
        return part, operation_seconds(chip, flops=int(stated.get("flops", 0)), size=int(stated.get("bytes_accessed", 0))), None
    return part, None, f"kernel {name} is not known and has no cost_estimate; its time is not counted"


def stated(scopes: str, what: str) -> float | None:
    """Return the share that a scope's name states, such as `blocks=36of64`: the innermost; None if there is none."""
    found = re.findall(rf"{what}=(\d+)of(\d+)", scopes)
    return int(found[-1][0]) / int(found[-1][1]) if found else None


def _splash(chip: Chip, which: str, kernel: Instruction, operands: Sequence[Array]) -> tuple[Seconds, str | None]:
    """Return the time of jax.experimental.pallas.ops.tpu.splash_attention, and a note or None.

    It skips blocks that are fully masked. The mask is data, so `models.fused` calls the kernel in a scope whose name states the number of computed blocks.
    """
    queries, keys = [array.shape for array in operands if array.dtype in ("bf16", "f32") and len(array.shape) >= 3][:2]
    *heads, length, width = _sequence_first(queries, kernel, "q")
    scores = math.prod(heads) * length * _sequence_first(keys, kernel, "k")[-2]
    share = stated(kernel.attributes, "blocks")
    masked = any(array.dtype in ("s8", "s32") and len(array.shape) == 3 for array in operands)
    fused = which == "dkv" and re.search(r'use_fused_bwd_kernel\\*": true', kernel.attributes)
    note = "splash attention kernels: the masks are not known, so all scores are counted" if share is None and masked else None
    return attention_seconds(chip, "fused" if fused else which, scores=scores * (share or 1.0), width=width), note


def _sequence_first(shape: tuple[int, ...], kernel: Instruction, which: str) -> tuple[int, ...]:
    """Return the shape as `[…, length, head width]`; the last two are swapped in layout 2 (`QKVLayout.SEQ_MINOR`)."""
    return (*shape[:-2], shape[-1], shape[-2]) if re.search(rf'{which}_layout\\*": 2', kernel.attributes) else shape


def _grouped(chip: Chip, name: str, kernel: Instruction, operands: Sequence[Array]) -> tuple[Seconds, str | None]:
    """Return the time of jax.experimental.pallas.ops.tpu.megablox, rows × k × n products for any groups; and a note or None.

    Rows after the last group take no time. Their number is data, so `models.moe` states in the name of a scope how many rows have an expert under an even load.
    """
    left, right = [array for array in operands if array.dtype in ("bf16", "f32") and len(array.shape) >= 2][:2]
    result, share = arrays(kernel.shape)[0], stated(kernel.attributes, "rows")
    if name == "gmm":  # [m, k] and [groups, k, n], to [m, n]
        products = 2.0 * math.prod(left.shape) * result.shape[-1]
    else:  # [groups, k, n], of [k, m] and [m, n]
        products = 2.0 * math.prod(right.shape) * result.shape[-2]
    note = None if share is None else f"grouped products: an even load of experts is assumed, which fills {share:.0%} of the allocated rows"
    share = 1.0 if share is None else share
    size = share * (left.bytes + right.bytes + result.bytes)
    return operation_seconds(chip, flops=products * share, size=size), note
