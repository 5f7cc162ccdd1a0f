"""Parse the text of an optimized XLA program (`compiled.as_text()`): computations, instructions, trip counts of loops, groups of devices.

The text is the program of one device, with the instructions in scheduled order. Grammar: openxla.org/xla/operation_semantics and xla/hlo/parser. The estimates of
the compilers are JSON in `backend_config`.
"""

import dataclasses
import functools
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxmodels.errors import RunError

_COMPUTATION = re.compile(r"(ENTRY )?%?([^\s(]+) \(.*\) -> .*\{$")
_END = re.compile(r"\}(, execution_thread=\S*)?$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([^\s=]+) = ")
_ARRAY = re.compile(r"\b([a-z]+[0-9a-z]*)\[([\d,]*)\]")
_BITS = {"pred": 8, "bf16": 16, "token": 0, "opaque": 0, "c64": 64, "c128": 128}
# The trip count of a loop with more iterations is unknown.
_MAX_ITERATIONS = 10**5


@dataclasses.dataclass(frozen=True)
class Array:
    """The type of an array: its element type, such as `bf16`, and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Bytes without padding to tiles."""
        return math.ceil(math.prod(self.shape) * bits(self.dtype) / 8)

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
      name: without `%`.
      shape: of its result, as text.
      opcode: such as `fusion`.
      operands: names; of a constant or parameter, its value or number.
      attributes: the text after the operands.
      config: its `backend_config`; empty if it has none.
      is_root: of its computation.
    """

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    config: Mapping[str, Any]
    is_root: bool

    @property
    def cycles(self) -> int:
        """The compiler's estimate; 0 if it has none."""
        return int(self.config.get("window_config", {}).get("estimated_cycles", 0))

    @property
    def bytes(self) -> int:
        """Bytes of the result."""
        return sum(array.bytes for array in arrays(self.shape))

    def attribute(self, key: str) -> str | None:
        """Return the value of `key=…` as text: without quotes, but with braces; None if it has no such attribute."""
        match = re.search(rf'\b{key}=("[^"]*"|\{{|[^\s,]+)', self.attributes)
        if match is None:
            return None
        return self.attributes[match.start(1) : _closing(self.attributes, match.start(1))] if match[1] == "{" else match[1].strip('"')

    def called(self, *keys: str) -> str | None:
        """Return the computation of the first of these attributes that it has (`calls`, `to_apply`, `body`, …); None if it has none."""
        return next((name.strip("{}%") for key in keys if (name := self.attribute(key))), None)

    @property
    def body(self) -> str | None:
        """The computation of a fusion, a call or an asynchronous start, also on other cores of a chip; None for other instructions."""
        if self.opcode == "custom-call":
            return self.called("called_computations")
        return self.called("calls", *(["to_apply"] if self.opcode.startswith("call") else ()))

    @property
    def branches(self) -> tuple[str, ...]:
        """Computations of a conditional, one of which runs."""
        listed = self.attribute("branch_computations")
        names = listed[1:-1].split(",") if listed else [self.called(key) for key in ("true_computation", "false_computation")]
        return tuple(name.strip().lstrip("%") for name in names if name)


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions by name, in scheduled order."""

    name: str
    instructions: Mapping[str, Instruction]

    @property
    def root(self) -> Instruction:
        """The instruction whose result is that of the computation."""
        return next(instruction for instruction in self.instructions.values() if instruction.is_root)

    def operands(self, instruction: Instruction) -> list[Instruction]:
        """Return the instructions whose results an instruction of this computation reads."""
        return [self.instructions[name] for name in instruction.operands if name in self.instructions]


@dataclasses.dataclass(frozen=True)
class Program:
    """All computations; `entry` is the one that runs."""

    computations: Mapping[str, Computation]
    entry: Computation

    @functools.cached_property
    def _owners(self) -> dict[int, Computation]:
        return {id(each): computation for computation in self.computations.values() for each in computation.instructions.values()}

    def owner(self, instruction: Instruction) -> Computation:
        """Return the computation of an instruction."""
        return self._owners[id(instruction)]

    def inside(self, instruction: Instruction) -> tuple[Instruction, ...]:
        """Return all instructions of the computation that an instruction calls, including nested calls."""
        own = tuple(self.computations[instruction.body].instructions.values()) if instruction.body else ()
        return own + tuple(inner for each in own for inner in self.inside(each))


def bits(dtype: str) -> int:
    """Return the number of bits of an element type; raise RunError for an unknown type."""
    match = re.match(r"[a-z]+(\d+)", dtype)  # s32, f8e4m3fn
    if dtype not in _BITS and match is None:
        raise RunError(f"the compiler's program has an unknown type {dtype!r}.")
    return _BITS[dtype] if dtype in _BITS else int(match[1])


@functools.lru_cache(maxsize=65536)
def arrays(shape: str) -> tuple[Array, ...]:
    """Return the arrays in the text of a shape: one, or those of a tuple."""
    return tuple(Array(dtype, tuple(int(size) for size in sizes.split(",") if size)) for dtype, sizes in _ARRAY.findall(shape))


def parse(text: str) -> Program:
    """Parse a program; raise RunError if it has no entry computation, or an instruction in an unknown form."""
    computations, entry, name, lines = {}, None, None, []
    for line in text.splitlines():
        if name is None:
            match = _COMPUTATION.match(line)
            if match:
                name, lines = match[2], []
                entry = name if match[1] else entry
        elif _END.match(line):
            computations[name] = Computation(name, _with_elements([_instruction("\n".join(parts)) for parts in lines]))
            name = None
        elif _INSTRUCTION.match(line):
            lines.append([line])
        elif _COMPUTATION.match(line):
            raise RunError(f"the compiler's program has a computation {name} without an end.")
        elif lines:
            lines[-1].append(line)  # attributes may have line breaks
    if entry is None or entry not in computations:
        raise RunError("the compiler's program has no ENTRY computation; its text may be truncated.")
    return Program(computations, computations[entry])


def _instruction(text: str) -> Instruction:
    match = _INSTRUCTION.match(text)
    at = match.end()
    end = _closing(text, at) if text[at] == "(" else text.index(" ", at)
    shape = re.sub(r"/\*.*?\*/", "", text[at:end])
    opcode = re.match(r"\s*([\w\-]+)\(", text[end:])
    if opcode is None:
        raise RunError(f"the compiler's program has an instruction in an unknown form: {text.strip()[:200]}")
    opening = end + opcode.end() - 1
    closing = _closing(text, opening)
    operands = re.sub(r"/\*.*?\*/", "", text[opening + 1 : closing - 1])
    if opcode[1] in ("constant", "parameter"):
        names = (operands,)
    else:
        names = tuple(re.findall(r"%([^\s,()]+)", operands)) or tuple(part.split()[-1] for part in operands.split(",") if part.strip())
    attributes, config = text[closing:], {}
    found = attributes.find("backend_config={")
    if found >= 0:
        try:
            config, length = json.JSONDecoder().raw_decode(attributes[found + len("backend_config=") :])
            attributes = attributes[:found] + attributes[found + len("backend_config=") + length :]
        except ValueError as error:
            raise RunError(f"the compiler's program has an invalid backend_config of {match[2]}: {error}") from error
    return Instruction(match[2], shape, opcode[1], names, attributes, config, match[1] is not None)


def _with_elements(instructions: list[Instruction]) -> dict[str, Instruction]:
    """Return instructions by name. As of jax 0.12, an operand may be an element of a tuple, `x#0`; the `get-tuple-element` of older programs is added for it."""
    found: dict[str, Instruction] = {}

    def element(name: str) -> None:
        of, _, index = name.rpartition("#")
        if not of or not index.isdigit() or name in found:
            return
        element(of)
        if of in found:
            found[name] = Instruction(name, _elements(found[of].shape)[int(index)], "get-tuple-element", (of,), f", index={index}", {}, False)

    for instruction in instructions:
        if instruction.opcode not in ("constant", "parameter"):
            for name in instruction.operands:
                element(name)
        found[instruction.name] = instruction
    return found


def _elements(shape: str) -> list[str]:
    """Return the types in the type of a tuple: two for `(s32[], (f32[2], f32[3]))`."""
    found, begin, at = [], 1, 1
    while at < len(shape) - 1:
        if shape[at] in "([{":
            at = _closing(shape, at)
        elif shape[at] == ",":
            found.append(shape[begin:at].strip())
            begin = at = at + 1
        else:
            at += 1
    return [*found, shape[begin:at].strip()]


def _closing(text: str, at: int) -> int:
    """Return the index after the closing bracket of the group that opens at `at`, ignoring brackets in quotes."""
    depth, quoted = 0, False
    for match in re.finditer(r'\\.|["(){}\[\]]', text[at:]):
        token = match[0]
        if token == '"':
            quoted = not quoted
        elif not quoted and token in "([{":
            depth += 1
        elif not quoted and token in ")]}":
            depth -= 1
            if depth == 0:
                return at + match.end()
    raise RunError(f"the compiler's program has unbalanced brackets: {text.strip()[:200]}")


# Loops


def trip_count(program: Program, computation: Computation, loop: Instruction) -> int | None:
    """Return how often the body of a `while` runs; None if unknown.

    It is the compiler's `known_trip_count` if there is one. Otherwise the loop is evaluated for the integers whose values are known.
    """
    if known := loop.config.get("known_trip_count"):
        return int(known["n"])
    condition, body = (program.computations[loop.called(key)] for key in ("condition", "body"))
    state, before, count = _value(program, computation, loop.operands[0], (), {}), None, 0
    while (continues := _value(program, condition, condition.root.name, (state,), {})) and state != before and count < _MAX_ITERATIONS:
        before, state, count = state, _value(program, body, body.root.name, (state,), {}), count + 1
    return count if continues is not None and not continues else None


def _value(program: Program, computation: Computation, name: str, given: Sequence[Any], known: dict[str, Any]) -> Any:
    """Return the value of an instruction: an integer, a tuple of values, or None if unknown.

    Args:
      program, computation: that contain the instruction.
      name: of the instruction.
      given: values of the computation's parameters.
      known: values of its instructions so far; new ones are added.
    """
    if name not in known:
        instruction = computation.instructions[name]
        scalar = instruction.shape.startswith("(") or re.match(r"(pred|[su]\d+)\[\]", instruction.shape)
        known[name] = _compute(program, computation, instruction, given, known) if scalar else None
    return known[name]


def _compute(program: Program, computation: Computation, instruction: Instruction, given: Sequence[Any], known: dict[str, Any]) -> Any:
    def value(place: int) -> Any:
        return _value(program, computation, instruction.operands[place], given, known)

    match instruction.opcode:
        case "constant":
            return int(instruction.operands[0]) if re.fullmatch(r"-?\d+", instruction.operands[0]) else None
        case "parameter":
            place = int(instruction.operands[0])
            return given[place] if place < len(given) else None
        case "tuple":
            return tuple(value(place) for place in range(len(instruction.operands)))
        case "get-tuple-element":
            whole = value(0)
            return whole[int(instruction.attribute("index"))] if isinstance(whole, tuple) else None
        case "copy" | "bitcast" | "reshape" | "convert" | "copy-start" | "copy-done" | "optimization-barrier" | "opt-barrier" | "broadcast":
            return value(0)
        case "add" | "subtract" | "compare":
            left, right = value(0), value(1)
            if not isinstance(left, int) or not isinstance(right, int):
                return None
            if instruction.opcode == "compare":
                return getattr(left, f"__{instruction.attribute('direction').lower()}__")(right)
            return left + right if instruction.opcode == "add" else left - right
        case "fusion" | "call":
            inner = program.computations[instruction.body]
            return _value(program, inner, inner.root.name, [value(place) for place in range(len(instruction.operands))], {})
    return None


# Groups of devices


def groups(attributes: str, devices: int) -> tuple[tuple[int, ...], ...]:
    """Return the groups of devices that communicate, from an instruction's attributes: lists, a reshaped and transposed iota, or axes of a mesh.

    Raises:
      RunError: they are in an unknown form.
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
    raise RunError(f"the compiler's program has groups of devices in an unknown form: {attributes.strip()[:200]}")


def pairs(attributes: str) -> tuple[tuple[int, int], ...]:
    """Return the senders and receivers of a collective-permute."""
    match = re.search(r"source_target_pairs=\{([\d,{}\s]*)\}", attributes)
    return tuple((int(source), int(target)) for source, target in re.findall(r"\{(\d+),\s*(\d+)\}", match[1] if match else ""))


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def _iota(text: str) -> np.ndarray:
    """Return the array of an iota: `[2,4]T(1,0)` is 0 to 7, reshaped to 2 × 4 and transposed."""
    sizes, _, order = text.partition("T")
    counted = np.arange(math.prod(_numbers(sizes))).reshape(_numbers(sizes))
    return counted.transpose(_numbers(order)) if order else counted


def _along(order: np.ndarray, names: Sequence[str], sizes: Sequence[int], used: str) -> tuple[tuple[int, ...], ...]:
    """Return groups along axes of a mesh, or along parts of axes: `'x':(2)4` is a part of size 4 after one of size 2."""
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
