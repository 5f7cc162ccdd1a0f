"""An optimized program of the TPU compiler, read from its text (`compiled.as_text()`): computations, instructions, how often loops run.

The text is of one device, its instructions in the order in which they are scheduled. Grammar: openxla.org/xla/operation_semantics and
xla/hlo/parser; the compiler's own figures are JSON in `backend_config`.
"""

import dataclasses
import functools
import json
import math
import re
from collections.abc import Mapping
from typing import Any

from jaxmodels.errors import RunError

_COMPUTATION = re.compile(r"(ENTRY )?%?([^\s(]+) \(.*\) -> .*\{$")
_END = re.compile(r"\}(, execution_thread=\S*)?$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([^\s=]+) = ")
_ARRAY = re.compile(r"\b([a-z]+[0-9a-z]*)\[([\d,]*)\]")
_BITS = {"pred": 8, "bf16": 16, "token": 0, "opaque": 0, "c64": 64, "c128": 128}


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
      name: without `%`.
      shape: of its result, as text.
      opcode: such as `fusion`.
      operands: names; of a constant or parameter, what stands there instead.
      attributes: the text after the operands.
      config: its `backend_config`; empty where there is none.
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
        """The compiler's estimate; 0 where it gives none."""
        return int(self.config.get("window_config", {}).get("estimated_cycles", 0))

    @property
    def bytes(self) -> int:
        """Of the result."""
        return sum(array.bytes for array in arrays(self.shape))

    def called(self, key: str) -> str | None:
        """The computation of `calls`, `to_apply`, `body`, `condition`; None where there is none."""
        match = re.search(rf"\b{key}=%?([^\s,}}]+)", self.attributes)
        return match[1] if match else None

    @property
    def body(self) -> str | None:
        """The computation that a fusion, a call, an asynchronous start, or what runs on other cores of a chip, stands for; else None."""
        if self.opcode == "custom-call":
            name = self.called("called_computations")
            return name.lstrip("{%") if name else None
        return self.called("calls") or (self.called("to_apply") if self.opcode.startswith("call") else None)

    def attribute(self, key: str) -> str | None:
        """The text of `key=…`: `a` or `"a"` as `a`, a group in braces with its braces; None where there is none."""
        match = re.search(rf'\b{key}=("[^"]*"|\{{|[^\s,]+)', self.attributes)
        if match is None:
            return None
        return self.attributes[match.start(1) : _closing(self.attributes, match.start(1))] if match[1] == "{" else match[1].strip('"')

    @property
    def branches(self) -> tuple[str, ...]:
        """Computations of a conditional, one of which runs."""
        names = self.attribute("branch_computations")
        if names is not None:
            return tuple(name.strip().lstrip("%") for name in names[1:-1].split(","))
        return tuple(name for key in ("true_computation", "false_computation") if (name := self.called(key)))


@dataclasses.dataclass(frozen=True)
class Array:
    """An array's type: `bf16`, and its sizes."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """In all, without padding to tiles."""
        return math.ceil(math.prod(self.shape) * bits(self.dtype) / 8)

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions by name, in the order of the text, which is that of their schedule."""

    name: str
    instructions: Mapping[str, Instruction]

    @property
    def root(self) -> Instruction:
        """Its result."""
        return next(instruction for instruction in self.instructions.values() if instruction.is_root)


@dataclasses.dataclass(frozen=True)
class Program:
    """All computations; `entry` is the one that runs."""

    computations: Mapping[str, Computation]
    entry: Computation

    def inside(self, instruction: Instruction) -> tuple[Instruction, ...]:
        """All instructions of the computation that an instruction stands for, and of those within."""
        if instruction.body is None:
            return ()
        own = tuple(self.computations[instruction.body].instructions.values())
        return own + tuple(inner for each in own for inner in self.inside(each))


def bits(dtype: str) -> int:
    """Of one number: `bf16` has 16.

    Raises:
      RunError: an unknown type.
    """
    if dtype in _BITS:
        return _BITS[dtype]
    match = re.match(r"[a-z]+(\d+)", dtype)  # s32, f8e4m3fn
    if match is None:
        raise RunError(f"the compiler's program has a type {dtype!r}, which is not known here.")
    return int(match[1])


@functools.lru_cache(maxsize=65536)
def arrays(shape: str) -> tuple[Array, ...]:
    """Arrays of a shape's text: one, or those of a tuple."""
    return tuple(Array(dtype, tuple(int(size) for size in sizes.split(",") if size)) for dtype, sizes in _ARRAY.findall(shape))


def parse(text: str) -> Program:
    """Reads a program.

    Raises:
      RunError: it has no entry, or an instruction that is not written as expected.
    """
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
            raise RunError(f"the compiler's program has a computation {name} that does not end before the next begins.")
        elif lines:
            lines[-1].append(line)  # attributes may have line breaks
    if entry is None or entry not in computations:
        raise RunError("the compiler's program has no ENTRY computation; was its text cut?")
    return Program(computations, computations[entry])


def _instruction(text: str) -> Instruction:
    match = _INSTRUCTION.match(text)
    at = match.end()
    end = _closing(text, at) if text[at] == "(" else text.index(" ", at)
    shape = re.sub(r"/\*.*?\*/", "", text[at:end])
    opcode = re.match(r"\s*([\w\-]+)\(", text[end:])
    if opcode is None:
        raise RunError(f"the compiler's program has an instruction that is not understood here: {text.strip()[:200]}")
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
            raise RunError(f"the compiler's program has a backend_config that is no JSON, of {match[2]}: {error}") from error
    return Instruction(match[2], shape, opcode[1], names, attributes, config, match[1] is not None)


def _with_elements(instructions: list[Instruction]) -> dict[str, Instruction]:
    """By name; where an operand is written as an element of a tuple, `x#0`, as in the programs of jax 0.12, with the `get-tuple-element` that others have."""
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
    """The types in a tuple's: of `(s32[], (f32[2], f32[3]))` two."""
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
    """The end of the group that opens at a place, after its closing bracket; brackets in quotes are none."""
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
    raise RunError(f"the compiler's program has brackets that do not close: {text.strip()[:200]}")


@dataclasses.dataclass(frozen=True)
class _Carried:
    """Element `index` of a loop's tuple, plus a number."""

    index: int
    plus: int


# Values of the parameters of a loop's body, and of its condition.
_LOOP = {0: "tuple"}


def trip_count(program: Program, computation: Computation, loop: Instruction) -> int | None:
    """How often the body of a `while` runs; None where the text does not tell.

    From the compiler's own `known_trip_count` where there is one; else from a condition that compares an element of the loop's tuple
    with a constant, that element's value before the loop, and what the body adds to it.
    """
    known = loop.config.get("known_trip_count") or loop.config.get("known_trip_count_config")
    if known:
        return int(known["n"])
    condition, body = (program.computations[loop.called(key)] for key in ("condition", "body"))
    start, carried = computation.instructions[loop.operands[0]], functools.partial(_tuple_element, program, _LOOP)
    compare, environment, where = _comparison(program, condition)
    if compare is None:
        return None
    sides = [_value(program, where, name, environment) for name in compare.operands]
    direction = re.search(r"direction=(\w\w)", compare.attributes)[1]
    if isinstance(sides[1], _Carried) and not isinstance(sides[0], _Carried):
        sides, direction = sides[::-1], {"LT": "GT", "GT": "LT", "LE": "GE", "GE": "LE"}.get(direction, direction)
    counter, bound = sides
    if not isinstance(counter, _Carried) or bound is None:
        return None
    first = carried(computation, start, counter.index)
    step = carried(body, body.root, counter.index)
    if isinstance(bound, _Carried):  # does not change in the loop
        if carried(body, body.root, bound.index) != _Carried(bound.index, 0):
            return None
        last = carried(computation, start, bound.index)
        bound = last + bound.plus if isinstance(last, int) else None
    if not isinstance(first, int) or not isinstance(bound, int) or not isinstance(step, _Carried) or step.index != counter.index:
        return None
    distance, step = bound - first - counter.plus, step.plus
    if direction in ("GT", "GE"):
        distance, step, direction = -distance, -step, {"GT": "LT", "GE": "LE"}[direction]
    if direction not in ("LT", "LE", "NE") or step <= 0 or (direction == "NE" and distance % step):
        return None
    return max(0, math.ceil((distance + (direction == "LE")) / step))


def _comparison(program: Program, condition: Computation):
    """The comparison that a condition ends in, maybe inside a fusion: with the values of its computation's parameters, and that computation."""
    root, environment = condition.root, _LOOP
    if root.opcode == "fusion":
        inner = program.computations[root.called("calls")]
        values = {place: _value(program, condition, name, environment) for place, name in enumerate(root.operands)}
        root, environment, condition = inner.root, values, inner
    return (root if root.opcode == "compare" else None), environment, condition


def _value(program: Program, computation: Computation, name: str, environment: Mapping[int, Any]) -> int | _Carried | None:
    """An integer of a computation: a number, an element of the tuple that the computation gets plus a number, or None for anything else.

    Args:
      environment: values of the computation's parameters by place; `tuple` for the loop's own.
    """
    instruction = computation.instructions[name]
    match instruction.opcode:
        case "constant":
            return int(instruction.operands[0]) if re.fullmatch(r"-?\d+", instruction.operands[0]) else None
        case "parameter":
            value = environment.get(int(instruction.operands[0]))
            return value if isinstance(value, int | _Carried) else None
        case "copy" | "bitcast" | "reshape" | "convert" | "copy-start" | "copy-done" | "optimization-barrier" | "broadcast":
            return _value(program, computation, instruction.operands[0], environment)
        case "add" | "subtract":
            left, right = (_value(program, computation, operand, environment) for operand in instruction.operands)
            if instruction.opcode == "subtract" and isinstance(right, int):
                right = -right
            elif instruction.opcode == "subtract":
                return None
            if isinstance(left, int):
                left, right = right, left
            if not isinstance(right, int) or left is None:
                return None
            return left + right if isinstance(left, int) else _Carried(left.index, left.plus + right)
        case "get-tuple-element":
            index = int(re.search(r"index=(\d+)", instruction.attributes)[1])
            return _tuple_element(program, environment, computation, computation.instructions[instruction.operands[0]], index)
        case "fusion":
            return _inside(program, computation, instruction, environment, None)
    return None


def _tuple_element(program: Program, environment, computation: Computation, source: Instruction, index: int) -> int | _Carried | None:
    """Element `index` of a tuple, as `_value` gives it."""
    match source.opcode:
        case "tuple":
            return _value(program, computation, source.operands[index], environment)
        case "parameter":
            return _Carried(index, 0) if environment.get(int(source.operands[0])) == "tuple" else None
        case "fusion":
            return _inside(program, computation, source, environment, index)
        case "copy" | "bitcast" | "optimization-barrier":
            return _tuple_element(program, environment, computation, computation.instructions[source.operands[0]], index)
    return None


def _inside(program: Program, computation: Computation, fusion: Instruction, environment, index: int | None) -> int | _Carried | None:
    """What a fusion gives, or an element of it."""
    inner = program.computations[fusion.called("calls")]
    values = {place: _value(program, computation, name, environment) for place, name in enumerate(fusion.operands)}
    if index is None:
        return _value(program, inner, inner.root.name, values)
    return _value(program, inner, inner.root.operands[index], values) if inner.root.opcode == "tuple" else None
