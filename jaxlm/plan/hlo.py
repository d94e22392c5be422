"""Reading an optimized HLO program: what its loops, fusions, kernels and collectives cost.

The text of ``compiled.as_text()`` is the compiler's schedule. XLA for TPU writes ``estimated_cycles`` beside each
operation that it has a cost model for; here they are added up, the body of a loop as many times as it runs. How often
that is, is read from the loop: from ``known_trip_count`` where a backend states it, else from its counter, which starts
at a constant, moves by a constant and is compared with a constant.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Iterator

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
"""Operations between devices; an asynchronous one is a pair, of which the ``-start`` counts."""
KERNELS = ("tpu_custom_call", "__gpu$xla.gpu.triton", "mosaic_gpu", "mosaic_gpu_v2")
"""Targets of custom calls that are Pallas kernels."""

_BYTES = {"pred": 1, "token": 0, "opaque": 0, "c64": 8, "c128": 16}
_ARRAY = re.compile(r"\b([a-z]+[0-9]*[a-z0-9]*)\[([0-9,<=]*)\]")
_CYCLES = re.compile(r'"estimated_cycles":"?(\d+)')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"?(\d+)')
_NAME = re.compile(r'op_name="((?:[^"\\]|\\.)*)"')
_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_CHANNEL = re.compile(r"channel_id=(\d+)")
_INDEX = re.compile(r"index=(\d+)")
_HEAD = re.compile(r"^(ENTRY )?%?([^\s(]+) \(.*->.*\{$")
_REFERENCE = re.compile(r"%([\w.\-<>]+)")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation. ``rest`` is what follows the operands: attributes, metadata, backend config."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    text: str
    rest: str
    root: bool

    @property
    def cycles(self) -> int | None:
        """The compiler's estimate of one execution, or None where it has none."""
        match = _CYCLES.search(self.rest)
        return int(match[1]) if match else None

    @property
    def op_name(self) -> str:
        """The JAX operation it comes from, such as ``jit(step)/dot_general``; else its own name."""
        match = _NAME.search(self.rest)
        return match[1] if match else self.name

    @property
    def kernel(self) -> bool:
        """Whether it is a Pallas kernel."""
        match = _TARGET.search(self.rest) if self.opcode == "custom-call" else None
        return match is not None and match[1] in KERNELS

    @property
    def readable(self) -> str:
        """``op_name`` without what every operation has: the jit, and the names of scan's own functions."""
        parts = self.op_name.split("/")
        parts = [part for part in parts[1:] if part not in ("closed_call", "body")] if len(parts) > 1 else parts
        return "/".join("loop" if part == "while" else part for part in parts)

    def called(self, *attributes: str) -> list[str]:
        """Names of the computations that these attributes hold."""
        names: list[str] = []
        for attribute in attributes:
            match = re.search(rf"\b{attribute}=(\{{[^}}]*\}}|%[\w.\-<>]+)", self.rest)
            names += _REFERENCE.findall(match[1]) if match else []
        return names


@dataclasses.dataclass(frozen=True)
class Program:
    """Computations by name, each in the order of its schedule, and the name of the one that is run."""

    computations: dict[str, list[Instruction]]
    entry: str


def parse(text: str) -> Program:
    """Read the text of an HLO module.

    Raises:
        ValueError: there is no entry computation in it.
    """
    computations: dict[str, list[Instruction]] = {}
    current: list[Instruction] | None = None
    entry = ""
    for line in _lines(text):
        if current is None:
            head = _HEAD.match(line)
            if head:
                current = computations[head[2]] = []
                entry = head[2] if head[1] else entry
        elif line == "}":
            current = None
        else:
            instruction = _instruction(line)
            if instruction is not None:
                current.append(instruction)
    if not entry:
        raise ValueError("this is no HLO module: it has no ENTRY computation")
    return Program(computations, entry)


def _lines(text: str) -> Iterator[str]:
    """Lines of the module; an attribute that was printed over several is joined to its instruction."""
    held = ""
    for line in text.splitlines():
        starts = line == "}" or line.startswith(("  %", "  ROOT ", "%", "ENTRY ", "HloModule")) or not line
        if starts and held:
            yield held
            held = ""
        held = line if starts else f"{held} {line.strip()}" if held.startswith("  ") else line
    if held:
        yield held


def _instruction(line: str) -> Instruction | None:
    line = line.strip()
    root = line.startswith("ROOT ")
    left, equals, right = line.removeprefix("ROOT ").partition(" = ")
    if not equals:
        return None
    shape = right[: _closing(right, 0)] if right.startswith("(") else right.partition(" ")[0]
    call = right[len(shape) :].lstrip()
    opcode, parenthesis, _ = call.partition("(")
    if not parenthesis:
        return None
    end = _closing(call, len(opcode))
    inside = call[len(opcode) + 1 : end - 1]
    operands = tuple(_REFERENCE.findall(inside)) if opcode != "constant" else ()
    return Instruction(left.lstrip("%"), shape, opcode, operands, inside, call[end:], root)


def _closing(text: str, start: int) -> int:
    """The place after the parenthesis that closes the one at ``start``."""
    depth = 0
    for at in range(start, len(text)):
        if text[at] == "(":
            depth += 1
        elif text[at] == ")":
            depth -= 1
            if depth == 0:
                return at + 1
    return len(text)


def shape_bytes(shape: str) -> int:
    """Bytes of a shape, without the padding of its layout; of a tuple, those of its parts together."""
    total = 0.0
    for kind, sizes in _ARRAY.findall(shape):
        bits = re.fullmatch(r"(?:bf|f|s|u)(\d+)\w*", kind)
        size = int(bits[1]) / 8 if bits else _BYTES.get(kind)
        if size is not None:
            total += size * math.prod(int(n.strip("<=")) for n in sizes.split(",") if n)
    return int(total)


# --------------------------------------------------------------------------------------------------- loops


def trip_count(program: Program, computation: Iterable[Instruction], loop: Instruction) -> int | None:
    """How often the body of a ``while`` runs, or None when only the running program can know."""
    stated = _TRIPS.search(loop.rest)
    if stated:
        return int(stated[1])
    condition, body = (program.computations[loop.called(name)[0]] for name in ("condition", "body"))
    test = next(i for i in condition if i.root)
    test = _behind(condition, test)
    direction = re.search(r"direction=(\w+)", test.rest)
    if test.opcode != "compare" or direction is None or len(test.operands) != 2:
        return None
    start_of = _initial(computation, loop)
    counter, bound = (_by_name(condition, name) for name in test.operands)
    ahead = {"LT": 0, "NE": 0, "LE": 1}.get(direction[1])
    if counter is None or bound is None or ahead is None:
        return None
    index = _parameter_index(counter)
    limit = _constant(bound)
    if limit is None:
        # The bound may come in as a part of the state that the body hands on unchanged.
        place = _parameter_index(bound)
        limit = None if place is None or not _unchanged(body, place) else start_of(place)
    if index is None or limit is None:
        return None
    start, step = start_of(index), _step(body, index)
    if start is None or step is None or step <= 0:
        return None
    return max(0, -(-(limit + ahead - start) // step))


def _by_name(computation: Iterable[Instruction], name: str) -> Instruction | None:
    return next((i for i in computation if i.name == name), None)


def _behind(computation: Iterable[Instruction], instruction: Instruction | None) -> Instruction:
    """What an instruction stands for, behind copies and conversions of its layout."""
    computation = list(computation)
    while instruction is not None and instruction.opcode in ("copy", "bitcast", "convert", "copy-done", "copy-start"):
        before = _by_name(computation, instruction.operands[0])
        if before is None:
            break
        instruction = before
    assert instruction is not None
    return instruction


def _constant(instruction: Instruction) -> int | None:
    if instruction.opcode != "constant" or not re.fullmatch(r"-?\d+", instruction.text):
        return None
    return int(instruction.text)


def _parameter_index(instruction: Instruction) -> int | None:
    index = _INDEX.search(instruction.rest)
    return int(index[1]) if instruction.opcode == "get-tuple-element" and index else None


def _initial(computation: Iterable[Instruction], loop: Instruction) -> Callable[[int], int | None]:
    """Of a part of a loop's state: the constant that it starts from, or None."""
    computation = list(computation)
    start = _by_name(computation, loop.operands[0])

    def of(index: int) -> int | None:
        if start is None or start.opcode != "tuple" or index >= len(start.operands):
            return None
        value = _by_name(computation, start.operands[index])
        return None if value is None else _constant(_behind(computation, value))

    return of


def _result(body: list[Instruction], index: int) -> Instruction | None:
    root = next(i for i in body if i.root)
    if root.opcode != "tuple" or index >= len(root.operands):
        return None
    value = _by_name(body, root.operands[index])
    return None if value is None else _behind(body, value)


def _unchanged(body: list[Instruction], index: int) -> bool:
    value = _result(body, index)
    return value is not None and _parameter_index(value) == index


def _step(body: list[Instruction], index: int) -> int | None:
    """By how much a body moves its counter."""
    value = _result(body, index)
    if value is None or value.opcode != "add":
        return None
    parts = [_by_name(body, name) for name in value.operands]
    steps = [_constant(_behind(body, part)) for part in parts if part is not None]
    counters = [_parameter_index(_behind(body, part)) for part in parts if part is not None]
    return next((step for step in steps if step is not None), None) if index in counters else None


# --------------------------------------------------------------------------------------------------- costs


@dataclasses.dataclass(frozen=True)
class Operation:
    """An operation of the schedule and how often a run of the program executes it."""

    instruction: Instruction
    computation: str
    times: int

    @property
    def cycles(self) -> int:
        """Estimated cycles of all executions; 0 where the compiler has no estimate."""
        return (self.instruction.cycles or 0) * self.times


@dataclasses.dataclass(frozen=True)
class Collective:
    """One operation between devices. ``bytes`` are those of the larger side, operands or result, of one execution."""

    kind: str
    bytes: int
    times: int
    group: int | None
    op_name: str


@dataclasses.dataclass(frozen=True)
class Costs:
    """What a program does.

    Attributes:
        operations: every operation with an estimate, and every kernel.
        collectives: operations between devices.
        unknown_loops: op names of loops whose number of rounds is not in the program; they are counted once.
    """

    operations: list[Operation]
    collectives: list[Collective]
    unknown_loops: list[str]

    @property
    def cycles(self) -> int:
        """Estimated cycles of everything that the compiler has a cost model for."""
        return sum(operation.cycles for operation in self.operations)

    @property
    def kernels(self) -> list[Operation]:
        """Pallas kernels, which carry no estimate."""
        return [operation for operation in self.operations if operation.instruction.kernel]


def costs(program: Program) -> Costs:
    """Walk the schedule: bodies of loops as often as they run, the dearest branch of a conditional, calls where they
    stand. What is fused is part of its fusion."""
    found = Costs([], [], [])
    _walk(program, program.entry, 1, found)
    return found


def _walk(program: Program, name: str, times: int, found: Costs) -> None:
    computation = program.computations[name]
    channels: set[str] = set()
    for i in computation:
        if i.opcode == "while":
            trips = trip_count(program, computation, i)
            if trips is None:
                found.unknown_loops.append(i.op_name)
            for part in i.called("body", "condition"):
                _walk(program, part, times * (1 if trips is None else trips), found)
        elif i.opcode == "conditional":
            branches = []
            for branch in i.called("branch_computations", "true_computation", "false_computation"):
                taken = Costs([], [], [])
                _walk(program, branch, times, taken)
                branches.append(taken)
            dearest = max(branches, key=lambda taken: (taken.cycles, len(taken.operations)))
            found.operations.extend(dearest.operations)
            found.collectives.extend(dearest.collectives)
            found.unknown_loops.extend(dearest.unknown_loops)
        elif i.opcode in ("call", "async-start"):
            for part in i.called("to_apply", "calls"):
                _walk(program, part, times, found)
        elif i.opcode == "fusion":
            _fused_collectives(program, i, times, channels, found)
        kind = i.opcode.removesuffix("-start")
        if kind in COLLECTIVES:
            found.collectives.append(_collective(computation, i, kind, times))
        if i.cycles is not None or i.kernel:
            found.operations.append(Operation(i, name, times))


def _fused_collectives(program: Program, fusion: Instruction, times: int, channels: set[str], found: Costs) -> None:
    """Collectives inside a fusion. One that runs beside computation stands in every fusion that it runs beside, always
    with the same channel; a reduce-scatter is a fusion of an all-reduce and the cut that follows."""
    for name in fusion.called("calls"):
        computation = program.computations[name]
        for i in computation:
            kind = i.opcode.removesuffix("-start")
            if i.opcode == "fusion":
                _fused_collectives(program, i, times, channels, found)
            if kind not in COLLECTIVES:
                continue
            channel = _CHANNEL.search(i.rest)
            if channel is not None and channel[1] in channels:
                continue
            if channel is not None:
                channels.add(channel[1])
            kind = "reduce-scatter" if kind == "all-reduce" and "reduce-scatter" in name else kind
            found.collectives.append(_collective(computation, i, kind, times))


def _collective(computation: list[Instruction], i: Instruction, kind: str, times: int) -> Collective:
    operands = sum(shape_bytes(found.shape) for found in computation if found.name in i.operands)
    result = shape_bytes(i.shape)
    if i.opcode.endswith("-start") and i.shape.startswith("("):
        result = max(result - operands, 0)  # a start gives its operands and its result
    return Collective(kind, max(operands, result), times, _group_size(i.rest), i.op_name)


def _group_size(rest: str) -> int | None:
    """How many devices take part together, where the text says so."""
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", rest)
    if listed:
        return len(listed[1].split(","))
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]<=", rest)
    if iota:
        return int(iota[2])
    mesh = re.search(r"replica_groups=(?:@?\w*)\[([^\]]*)\]\s*\{([^}]*)\}", rest)
    if mesh:
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", mesh[1]))
        axes = re.findall(r"'([^']+)'", mesh[2])
        if all(axis in sizes for axis in axes):
            return math.prod(int(sizes[axis]) for axis in axes)
    return None
