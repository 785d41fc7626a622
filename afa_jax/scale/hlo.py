"""A parser of a compiled program's text (``compiled.as_text()``): what is executed, and how often.

XLA's own cost analysis counts the body of a loop once, and here loops are everywhere: over experts, over sampling
steps, over parts of a batch. So the program is walked from its entry, and what a loop's body holds counts as often as
the loop turns. The text's grammar: https://openxla.org/xla/operation_semantics and xla/hlo/parser in its source.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

_START = re.compile(r"\s+(ROOT )?%([\w.\-]+) = ")
# Bits of the types whose name does not give them.
_BITS = dict(pred=8, token=0, opaque=0)
_MOST_TURNS = 10**6
"""The most iterations of a loop; a loop that runs longer counts as one of unknown length."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Instruction:
    """One line of a computation.

    Attributes:
        shape: the printed shape, with layouts; a tuple's is in parentheses.
        operands: names, without percent signs.
        argument: the text between the parentheses: a constant's value, a parameter's number.
        attributes: the text after the parentheses.
    """

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    argument: str
    attributes: str
    root: bool

    @property
    def arrays(self) -> list[tuple[str, tuple[int, ...]]]:
        """Return dtype and dimensions of the arrays that the instruction yields."""
        return arrays_of(self.shape)

    @property
    def place(self) -> str:
        """Return its place in the Python program, ``metadata``'s op_name; "" if the compiler added it."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    def called(self, attribute: str) -> str | None:
        """Return the computation that an attribute such as ``body`` or ``calls`` names; None without it."""
        found = re.search(rf"\b{attribute}=%([\w.\-]+)", self.attributes)
        return found[1] if found else None


class Computation(NamedTuple):
    """A computation's instructions by name, in order, and the root, whose value it returns."""

    name: str
    instructions: dict[str, Instruction]
    root: Instruction


class Executed(NamedTuple):
    """An instruction in its computation, and the number of its executions in a run of the program.

    ``times`` is None if the number is unknown; within a conditional it is an upper bound, as if every branch ran.
    """

    instruction: Instruction
    computation: Computation
    times: int | None
    conditional: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """The computations of a module by name, the entry's name, and the number of devices that it is for."""

    computations: dict[str, Computation]
    entry: str
    devices: int

    def executed(self) -> Iterator[Executed]:
        """Yield every instruction that a run executes, including those in loops, fusions, calls and branches.

        The scalar functions that reduce, sort and scatter apply are left out.
        """
        yield from self._walk(self.entry, (), 1, False)

    def _walk(self, name: str, arguments: Sequence[Any], times: int | None, conditional: bool) -> Iterator[Executed]:
        computation = self.computations[name]
        known = _Values(self, computation, arguments)
        for instruction in computation.instructions.values():
            yield Executed(instruction, computation, times, conditional)
            opcode = instruction.opcode
            if opcode == "while":
                condition, body = instruction.called("condition"), instruction.called("body")
                assert condition is not None and body is not None
                start = known.operand(instruction, 0)
                turns, constants = self._turns(instruction, condition, body, start)
                inside = None if times is None or turns is None else times * turns
                yield from self._walk(
                    condition, (constants,), None if inside is None else inside + (times or 0), conditional
                )
                yield from self._walk(body, (constants,), inside, conditional)
            elif opcode == "conditional":
                for number, branch in enumerate(_branches(instruction)):
                    yield from self._walk(branch, (known.operand(instruction, number + 1),), times, True)
            elif opcode in ("fusion", "call", "async-start", "custom-call"):
                for callee in _callees(instruction):
                    values = [known.operand(instruction, i) for i in range(len(instruction.operands))]
                    yield from self._walk(callee, values, times, conditional)

    def _turns(self, loop: Instruction, condition: str, body: str, start: Any) -> tuple[int | None, Any]:
        """Return a loop's number of iterations, and the part of its state that is the same in all of them."""
        root = self.computations[body].root
        state = start if isinstance(start, tuple) else (None,) * len(root.operands)
        first = _Values(self, self.computations[body], (_Recorded(state),))
        same = tuple(
            value if first.passes_through(name, i) else None
            for i, (name, value) in enumerate(zip(root.operands, state, strict=True))
        )
        stated = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes)
        if stated:
            return int(stated[1]), same
        # Follow the iterations one by one, for the elements that the condition reads.
        for turn in range(_MOST_TURNS):
            seen = _Recorded(state)
            again = _Values(self, self.computations[condition], (seen,)).root()
            if again is None:
                return None, same
            if not again:
                return turn, same
            step = _Values(self, self.computations[body], (state,))
            state = tuple(step.of(name) if i in seen.read else same[i] for i, name in enumerate(root.operands))
        return None, same


class _Recorded(tuple):
    """A loop's state that records which of its elements were read."""

    read: set[int]

    def __new__(cls, values: Sequence[Any]) -> _Recorded:
        self = super().__new__(cls, values)
        self.read = set()
        return self


class _Values:
    """The integers in a computation that follow from constants and the known parts of its arguments.

    Anything else is None; a tuple is a tuple of such values.
    """

    def __init__(self, program: Program, computation: Computation, arguments: Sequence[Any]):
        self._program, self._computation, self._arguments = program, computation, arguments
        self._memo: dict[str, Any] = {}

    def root(self) -> Any:
        return self.of(self._computation.root.name)

    def operand(self, instruction: Instruction, number: int) -> Any:
        return self.of(instruction.operands[number]) if number < len(instruction.operands) else None

    def of(self, name: str) -> Any:
        if name not in self._memo:
            self._memo[name] = self._evaluate(self._computation.instructions[name])
        return self._memo[name]

    def passes_through(self, name: str, index: int) -> bool:
        """Return whether an instruction is element ``index`` of the only argument, unchanged."""
        instruction = self._computation.instructions[name]
        while instruction.opcode in ("copy", "bitcast", "optimization-barrier"):
            instruction = self._computation.instructions[instruction.operands[0]]
        if instruction.opcode != "get-tuple-element" or _index(instruction) != index:
            return False
        return self._computation.instructions[instruction.operands[0]].opcode == "parameter"

    def _evaluate(self, instruction: Instruction) -> Any:
        opcode, operands = instruction.opcode, instruction.operands
        if opcode == "parameter":
            number = int(instruction.argument)
            return self._arguments[number] if number < len(self._arguments) else None
        if opcode == "get-tuple-element":
            value, index = self.of(operands[0]), _index(instruction)
            if isinstance(value, _Recorded):
                value.read.add(index)
            return value[index] if isinstance(value, tuple) and index < len(value) else None
        if opcode == "tuple":
            return tuple(self.of(operand) for operand in operands)
        if opcode in ("copy", "bitcast", "optimization-barrier", "copy-done"):
            return self.of(operands[0])
        if opcode == "copy-start":
            return self.of(operands[0])
        if not re.fullmatch(r"(pred|[su]\d+)\[\](\{.*\})?", instruction.shape):
            return None
        if opcode == "constant":
            text = instruction.argument.strip()
            return {"true": 1, "false": 0}.get(text, int(text) if re.fullmatch(r"-?\d+", text) else None)
        if opcode in ("fusion", "call"):
            (callee,) = _callees(instruction)
            values = [self.of(operand) for operand in operands]
            return _Values(self._program, self._program.computations[callee], values).root()
        values = [self.of(operand) for operand in operands]
        if None in values:
            return None
        return _calculate(instruction, values)


def _calculate(instruction: Instruction, values: Sequence[int]) -> int | None:
    a, b, *_ = (*values, 0, 0)
    results = {
        "convert": a,
        "add": a + b,
        "subtract": a - b,
        "multiply": a * b,
        "and": a & b,
        "or": a | b,
        "not": int(not a),
        "minimum": min(a, b),
        "maximum": max(a, b),
    }
    if instruction.opcode != "compare":
        return results.get(instruction.opcode)
    comparisons = dict(LT=a < b, LE=a <= b, GT=a > b, GE=a >= b, EQ=a == b, NE=a != b)
    found = re.search(r"direction=(\w\w)", instruction.attributes)
    return int(comparisons[found[1]]) if found else None


def _index(instruction: Instruction) -> int:
    found = re.search(r"index=(\d+)", instruction.attributes)
    assert found is not None, instruction
    return int(found[1])


def _branches(instruction: Instruction) -> list[str]:
    listed = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
    if listed:
        return re.findall(r"%([\w.\-]+)", listed[1])
    pair = (instruction.called("true_computation"), instruction.called("false_computation"))
    return [branch for branch in pair if branch is not None]


def _callees(instruction: Instruction) -> list[str]:
    """Return the names of the computations that each execution of an instruction runs once."""
    listed = re.search(r"called_computations=\{([^}]*)\}", instruction.attributes)
    if listed:
        return re.findall(r"%([\w.\-]+)", listed[1])
    callee = instruction.called("to_apply" if instruction.opcode == "call" else "calls")
    return [] if callee is None else [callee]


def parse(text: str) -> Program:
    """Read a module's text.

    Raises:
        ValueError: there is no entry computation in it.
    """
    computations: dict[str, Computation] = {}
    entry, name = "", ""
    lines: list[str] = []
    for line in text.splitlines():
        if header := re.match(r"(ENTRY )?%([\w.\-]+) \(.*\{\s*$", line):
            name, lines = header[2], []
            entry = name if header[1] else entry
        elif line == "}" and name:
            instructions = [_instruction(line) for line in lines]
            root = next((one for one in instructions if one.root), instructions[-1])
            computations[name] = Computation(name, {one.name: one for one in instructions}, root)
            name = ""
        elif name and _START.match(line):
            lines.append(line)
        elif name and lines:
            lines[-1] += line  # attributes may go on in the next line
    if not entry:
        raise ValueError("not the text of a compiled program: it has no ENTRY computation")
    devices = re.search(r"num_partitions=(\d+)", text.partition("\n")[0])
    return Program(computations=computations, entry=entry, devices=int(devices[1]) if devices else 1)


def _instruction(line: str) -> Instruction:
    start = _START.match(line)
    assert start is not None
    rest = re.sub(r"/\*.*?\*/", "", line[start.end() :])
    end = _closing(rest) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opcode, _, _ = rest.partition("(")
    rest = rest[len(opcode) :]
    end = _closing(rest)
    return Instruction(
        name=start[2],
        shape=shape,
        opcode=opcode,
        operands=tuple(re.findall(r"%([\w.\-]+)", rest[:end])),
        argument=rest[1:end],
        attributes=rest[end + 1 :],
        root=start[1] is not None,
    )


def _closing(text: str) -> int:
    """Return the position of the parenthesis that closes the one at the start of a text."""
    depth = 0
    for found in re.finditer(r"[()]", text):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return found.start()
    return len(text)


@functools.cache
def _arrays(shape: str) -> tuple[tuple[str, tuple[int, ...]], ...]:
    found = re.findall(r"([a-z]\w*)\[([\d,<=]*)\]", shape)
    return tuple(
        (dtype, tuple(int(size.removeprefix("<=")) for size in sizes.split(",") if size)) for dtype, sizes in found
    )


def arrays_of(shape: str) -> list[tuple[str, tuple[int, ...]]]:
    """Return dtype and dimensions of every array in a printed shape, without layouts."""
    return list(_arrays(shape))


def bytes_of(shape: str) -> int:
    """Return the number of bytes of the arrays in a printed shape, without the padding of a layout's tiles."""
    return sum(math.prod(sizes) * _bits(dtype) // 8 for dtype, sizes in _arrays(shape))


def _bits(dtype: str) -> int:
    if dtype in _BITS:
        return _BITS[dtype]
    found = re.match(r"(?:bf|[fsuc])(\d+)", dtype)
    if found is None:
        raise ValueError(f"unknown dtype {dtype} in a compiled program")
    return int(found[1])
