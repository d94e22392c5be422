"""Costs of an optimized HLO program: its loops, fusions, kernels and collectives.

The text of ``compiled.as_text()`` lists the instructions in the order of the compiler's schedule. XLA for TPUs writes
``estimated_cycles`` next to each operation for which it has a cost model. This module sums these cycles, and counts a
loop body once per iteration.

If the backend writes ``known_trip_count`` next to a loop, this is its number of iterations. Otherwise, the number is
computed from the loop counter. The counter must start at a constant, increase by a constant and be compared with a
constant. For other loops, the number is unknown.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
"""Opcodes of operations between devices. An asynchronous collective has two instructions, such as ``all-reduce-start``
and ``all-reduce-done``. Only the first one is counted."""
KERNELS = ("tpu_custom_call", "__gpu$xla.gpu.triton", "mosaic_gpu", "mosaic_gpu_v2")
"""Custom-call targets of Pallas kernels."""

_BYTES = {"pred": 1, "token": 0, "opaque": 0, "c64": 8, "c128": 16}
_ARRAY = re.compile(r"\b([a-z]+[0-9]*[a-z0-9]*)\[([0-9,<=]*)\]")
_CYCLES = re.compile(r'"estimated_cycles":"?(\d+)')
_UNKNOWN_CYCLES = 2**63 - 1  # what the compiler writes for an operation that it cannot estimate
_TRIPS = re.compile(r'"known_trip_count":\{"n":"?(\d+)')
_NAME = re.compile(r'op_name="((?:[^"\\]|\\.)*)"')
_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_CHANNEL = re.compile(r"channel_id=(\d+)")
_INDEX = re.compile(r"index=(\d+)")
_COMPUTATION_HEADER = re.compile(r"^(ENTRY )?%?([^\s(]+) \(.*->.*\{$")
_REFERENCE = re.compile(r"%([\w.\-<>]+)")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction of a computation.

    Attributes:
        shape: the text of the shape of the result, such as ``f32[8,128]{1,0}``.
        operands: names of the operands.
        text: the text of the operands.
        attribute_text: the text after the operands: attributes, metadata, backend config.
        is_root: whether the result is the result of the computation.
    """

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    text: str
    attribute_text: str
    is_root: bool

    @property
    def cycles(self) -> int | None:
        """The compiler's estimate of the cycles of one execution; None if there is no estimate."""
        match = _CYCLES.search(self.attribute_text)
        return int(match[1]) if match and int(match[1]) != _UNKNOWN_CYCLES else None

    @property
    def has_unknown_cycles(self) -> bool:
        """Whether the compiler says that it cannot estimate the cycles, such as for scatters on a SparseCore."""
        match = _CYCLES.search(self.attribute_text)
        return match is not None and int(match[1]) == _UNKNOWN_CYCLES

    @property
    def op_name(self) -> str:
        """The JAX name of the instruction, such as ``jit(step)/dot_general``; if there is none, its HLO name."""
        match = _NAME.search(self.attribute_text)
        return match[1] if match else self.name

    @property
    def is_kernel(self) -> bool:
        """Whether the instruction calls a Pallas kernel."""
        match = _TARGET.search(self.attribute_text) if self.opcode == "custom-call" else None
        return match is not None and match[1] in KERNELS

    @property
    def display_name(self) -> str:
        """``op_name`` without its first scope, such as ``jit(step)``, and with ``loop`` instead of ``while``. The inner
        scopes of ``lax.scan``, ``body`` and ``closed_call``, are also removed."""
        scopes = self.op_name.split("/")
        scopes = [scope for scope in scopes[1:] if scope not in ("closed_call", "body")] if len(scopes) > 1 else scopes
        return "/".join("loop" if scope == "while" else scope for scope in scopes)

    def called(self, *attributes: str) -> list[str]:
        """Names of the computations in these attributes, such as ``calls`` or ``to_apply``."""
        names: list[str] = []
        for attribute in attributes:
            match = re.search(rf"\b{attribute}=(\{{[^}}]*\}}|%[\w.\-<>]+)", self.attribute_text)
            names += _REFERENCE.findall(match[1]) if match else []
        return names


@dataclasses.dataclass(frozen=True)
class Program:
    """The computations of an HLO module.

    Attributes:
        computations: the instructions of each computation in the order of the schedule, by name.
        entry: the name of the entry computation.
    """

    computations: dict[str, list[Instruction]]
    entry: str


def parse(text: str) -> Program:
    """The :class:`Program` in the text of an HLO module.

    Raises:
        ValueError: the text has no entry computation.
    """
    computations: dict[str, list[Instruction]] = {}
    current: list[Instruction] | None = None
    entry = ""
    for line in _joined_lines(text):
        if current is None:
            header = _COMPUTATION_HEADER.match(line)
            if header:
                current = computations[header[2]] = []
                entry = header[2] if header[1] else entry
        elif _ends_computation(line):
            current = None
        else:
            instruction = _parse_instruction(line)
            if instruction is not None:
                current.append(instruction)
    if not entry:
        raise ValueError("this is not an HLO module: it has no ENTRY computation")
    return Program(computations, entry)


def _joined_lines(text: str) -> Iterator[str]:
    """The lines of the module. The lines of an instruction that spans several lines are joined into one."""
    statement = ""
    for line in text.splitlines():
        starts = line.startswith(("  %", "  ROOT ", "%", "ENTRY ", "HloModule")) or not line or _ends_computation(line)
        if starts and statement:
            yield statement
            statement = ""
        statement = line if starts else f"{statement} {line.strip()}" if statement.startswith("  ") else line
    if statement:
        yield statement


def _ends_computation(line: str) -> bool:
    return line == "}" or line.startswith("}, execution_thread=")  # for example of a SparseCore


def _parse_instruction(line: str) -> Instruction | None:
    line = line.strip()
    root = line.startswith("ROOT ")
    left, equals, right = line.removeprefix("ROOT ").partition(" = ")
    if not equals:
        return None
    shape = right[: _end_of_parentheses(right, 0)] if right.startswith("(") else right.partition(" ")[0]
    call = right[len(shape) :].lstrip()
    opcode, parenthesis, _ = call.partition("(")
    if not parenthesis:
        return None
    end = _end_of_parentheses(call, len(opcode))
    inside = call[len(opcode) + 1 : end - 1]
    operands = tuple(_REFERENCE.findall(inside)) if opcode != "constant" else ()
    return Instruction(left.lstrip("%"), shape, opcode, operands, inside, call[end:], root)


def _end_of_parentheses(text: str, start: int) -> int:
    """The index after the parenthesis that closes the parenthesis at ``start``."""
    depth = 0
    for index in range(start, len(text)):
        if text[index] == "(":
            depth += 1
        elif text[index] == ")":
            depth -= 1
            if depth == 0:
                return index + 1
    return len(text)


def array_shapes(shape: str) -> tuple[tuple[int, ...], ...]:
    """The shapes of the arrays in ``shape``: one shape for an array, or one for each element of a tuple."""
    return tuple(_sizes(sizes) for _, sizes in _ARRAY.findall(shape))


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(int(size.strip("<=")) for size in text.split(",") if size)


def shape_bytes(shape: str) -> int:
    """The number of bytes of an array with this shape, without layout padding; for a tuple, the sum of its elements."""
    total = 0.0
    for kind, sizes in _ARRAY.findall(shape):
        bits = re.fullmatch(r"(?:bf|f|s|u)(\d+)\w*", kind)
        size = int(bits[1]) / 8 if bits else _BYTES.get(kind)
        if size is not None:
            total += size * math.prod(_sizes(sizes))
    return int(total)


# --------------------------------------------------------------------------------------------------- loops


def trip_count(program: Program, computation: list[Instruction], loop: Instruction) -> int | None:
    """The number of iterations of a ``while`` loop, or None if it is unknown (see the docstring of the module).

    Args:
        computation: the computation that contains the loop.
    """
    stated = _TRIPS.search(loop.attribute_text)
    if stated:
        return int(stated[1])
    condition, body = (program.computations[loop.called(name)[0]] for name in ("condition", "body"))
    test, output = _through_copies(condition, _root(condition)), _root(body)
    direction = re.search(r"direction=(\w+)", test.attribute_text)
    if test.opcode != "compare" or direction is None or len(test.operands) != 2:
        return None
    counter, bound = (_instruction_named(condition, name) for name in test.operands)
    initial = _instruction_named(computation, loop.operands[0])
    index, limit, bound_index = _state_index(counter), _constant(bound), _state_index(bound)
    if bound_index is not None and _state_index(_element(body, output, bound_index)) == bound_index:
        limit = _constant(_element(computation, initial, bound_index))  # the body returns this element unchanged
    limit_offset = {"LT": 0, "NE": 0, "LE": 1}.get(direction[1])
    if index is None or limit is None or limit_offset is None:
        return None
    start, step = _constant(_element(computation, initial, index)), _counter_step(body, index)
    if start is None or step is None or step <= 0:
        return None
    return max(0, -(-(limit + limit_offset - start) // step))


def _root(computation: list[Instruction]) -> Instruction:
    return next(i for i in computation if i.is_root)


def _instruction_named(computation: list[Instruction], name: str) -> Instruction | None:
    return next((i for i in computation if i.name == name), None)


def _through_copies(computation: list[Instruction], instruction: Instruction) -> Instruction:
    """The instruction that computes the value of ``instruction``, before any copies, bitcasts and conversions."""
    while instruction.opcode in ("copy", "bitcast", "convert", "copy-done", "copy-start"):
        source = _instruction_named(computation, instruction.operands[0])
        if source is None:
            break
        instruction = source
    return instruction


def _element(computation: list[Instruction], value: Instruction | None, index: int) -> Instruction | None:
    """The instruction that computes element ``index`` of the tuple ``value``, or None if it is unknown."""
    if value is None or value.opcode != "tuple" or index >= len(value.operands):
        return None
    element = _instruction_named(computation, value.operands[index])
    return None if element is None else _through_copies(computation, element)


def _constant(instruction: Instruction | None) -> int | None:
    if instruction is None or instruction.opcode != "constant" or not re.fullmatch(r"-?\d+", instruction.text):
        return None
    return int(instruction.text)


def _state_index(instruction: Instruction | None) -> int | None:
    if instruction is None or instruction.opcode != "get-tuple-element":
        return None
    index = _INDEX.search(instruction.attribute_text)
    return int(index[1]) if index else None


def _counter_step(body: list[Instruction], index: int) -> int | None:
    """The constant that the loop body adds to its counter in each iteration, or None if it is unknown."""
    value = _element(body, _root(body), index)
    if value is None or value.opcode != "add":
        return None
    summands = [_through_copies(body, i) for name in value.operands if (i := _instruction_named(body, name))]
    steps = [step for step in map(_constant, summands) if step is not None]
    return steps[0] if steps and index in map(_state_index, summands) else None


# --------------------------------------------------------------------------------------------------- costs


@dataclasses.dataclass(frozen=True)
class Operation:
    """An operation of the schedule.

    Attributes:
        executions: number of executions in one run of the program.
    """

    instruction: Instruction
    executions: int

    @property
    def cycles(self) -> int:
        """Estimated cycles of all executions; 0 if the compiler has no estimate."""
        return (self.instruction.cycles or 0) * self.executions


@dataclasses.dataclass(frozen=True)
class Collective:
    """One operation between devices.

    Attributes:
        kind: the opcode without ``-start``, one of :data:`COLLECTIVES`.
        bytes: size of the operands or of the result on one device in one execution; the larger of the two numbers.
        executions: number of executions in one run of the program.
        group_size: number of devices in a replica group; None if unknown.
    """

    kind: str
    bytes: int
    executions: int
    group_size: int | None


@dataclasses.dataclass(frozen=True)
class Costs:
    """The operations of a program.

    Attributes:
        operations: all operations with an estimate, and all Pallas kernels.
        collectives: operations between devices.
        unknown_loops: op names of loops whose trip count is unknown. Their bodies are counted once.
        unknown_operations: op names of operations whose cycles the compiler cannot estimate.
    """

    operations: list[Operation]
    collectives: list[Collective]
    unknown_loops: list[str]
    unknown_operations: list[str]

    def add(self, other: Costs) -> None:
        """Append the contents of ``other``."""
        self.operations.extend(other.operations)
        self.collectives.extend(other.collectives)
        self.unknown_loops.extend(other.unknown_loops)
        self.unknown_operations.extend(other.unknown_operations)

    @property
    def cycles(self) -> int:
        """Sum of the estimated cycles of all operations with an estimate."""
        return sum(operation.cycles for operation in self.operations)

    @property
    def kernels(self) -> list[Operation]:
        """The Pallas kernels, for which the compiler has no estimate."""
        return [operation for operation in self.operations if operation.instruction.is_kernel]


def costs(program: Program) -> Costs:
    """The costs of all operations in the schedule of a program.

    A loop counts its body and its condition once per iteration, or once if the number of iterations is unknown. A
    conditional counts as its most expensive branch, and a call counts as the called computation. The estimate of a
    fusion includes its instructions. Collectives inside a fusion are also listed in ``collectives``.
    """
    return _costs_of(program, program.entry, 1)


_CALLED = {
    "while": ("body", "condition"), "call": ("to_apply", "calls"), "call-start": ("to_apply", "calls"),
    "async-start": ("to_apply", "calls"),
}  # fmt: skip
"""Opcode -> the attributes with the computations that an instruction runs, except ``conditional`` and ``fusion``."""


def _costs_of(program: Program, name: str, times: int) -> Costs:
    """The costs of a computation that runs ``times`` times."""
    computation, total = program.computations[name], Costs([], [], [], [])
    channels: set[str] = set()
    for instruction in computation:
        times_called = times
        if instruction.opcode == "while":
            trips = trip_count(program, computation, instruction)
            if trips is None:
                total.unknown_loops.append(instruction.op_name)
            else:
                times_called *= trips
        for called in instruction.called(*_CALLED.get(instruction.opcode, ())):
            total.add(_costs_of(program, called, times_called))
        if instruction.opcode == "conditional":
            branches = instruction.called("branch_computations", "true_computation", "false_computation")
            total.add(max((_costs_of(program, branch, times) for branch in branches), key=_size_of_costs))
        if instruction.opcode == "fusion":
            _add_fused_collectives(program, instruction, times, channels, total)
        kind = instruction.opcode.removesuffix("-start")
        if kind in COLLECTIVES:
            total.collectives.append(_collective(computation, instruction, kind, times))
        if instruction.has_unknown_cycles and not instruction.is_kernel:
            total.unknown_operations.append(instruction.op_name)
        if instruction.cycles is not None or instruction.is_kernel:
            total.operations.append(Operation(instruction, times))
    return total


def _size_of_costs(costs: Costs) -> tuple[float, int, int]:
    """A key that orders branches: cycles, number of operations, bytes of collectives.

    Without estimated cycles (all compilers except that for TPUs), the last two numbers decide.
    """
    return costs.cycles, len(costs.operations), sum(op.executions * op.bytes for op in costs.collectives)


def _add_fused_collectives(program: Program, fusion: Instruction, times: int, channels: set[str], total: Costs) -> None:
    """Add the collectives inside a fusion to ``total``.

    If a collective runs during several fusions, each of these fusions contains a copy with the same channel id. So each
    channel id counts once. A fusion of an all-reduce and a slice of its result counts as a reduce-scatter.

    Args:
        channels: channel ids that are already counted. The function adds new ids to this set.
    """
    for name in fusion.called("calls"):
        computation = program.computations[name]
        for instruction in computation:
            kind = instruction.opcode.removesuffix("-start")
            if instruction.opcode == "fusion":
                _add_fused_collectives(program, instruction, times, channels, total)
            if kind not in COLLECTIVES:
                continue
            channel = _CHANNEL.search(instruction.attribute_text)
            if channel is not None and channel[1] in channels:
                continue
            if channel is not None:
                channels.add(channel[1])
            kind = "reduce-scatter" if kind == "all-reduce" and "reduce-scatter" in name else kind
            total.collectives.append(_collective(computation, instruction, kind, times))


def _collective(computation: list[Instruction], instruction: Instruction, kind: str, times: int) -> Collective:
    operands = sum(shape_bytes(other.shape) for other in computation if other.name in instruction.operands)
    result = shape_bytes(instruction.shape)
    if instruction.opcode.endswith("-start") and instruction.shape.startswith("("):
        result = max(result - operands, 0)  # the shape of a ``-start`` is a tuple of operands and result
    return Collective(kind, max(operands, result), times, _group_size(instruction.attribute_text))


def _group_size(attribute_text: str) -> int | None:
    """The number of devices in one replica group; None if the text does not say it."""
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", attribute_text)
    if listed:
        return len(listed[1].split(","))
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]<=", attribute_text)
    if iota:
        return int(iota[2])
    mesh = re.search(r"replica_groups=(?:@?\w*)\[([^\]]*)\](?:,\s*device_ids=\([^{]*\))?\s*\{([^}]*)\}", attribute_text)
    if mesh:
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", mesh[1]))
        axes = re.findall(r"'([^']+)'", mesh[2])
        if all(axis in sizes for axis in axes):
            return math.prod(int(sizes[axis]) for axis in axes)
    return None
