"""Collectives of a compiled program, read from its HLO text.

The text is a list of computations; an instruction may call others, and a `while` calls its body
once per trip. `collectives` walks from the entry and multiplies by the trip counts on the way, so
that a collective in a scan over layers counts once per layer.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import defaultdict

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BYTES = {
    "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "s32": 4, "u32": 4,
    "s64": 8, "u64": 8, "f16": 2, "bf16": 2, "f32": 4, "f64": 8, "c64": 8, "c128": 16,
    "f8e4m3fn": 1, "f8e5m2": 1,
}  # fmt: skip

COMPUTATION = re.compile(r"(ENTRY )?%?([\w.-]+) \(.*\) -> .* \{$")
INSTRUCTION = re.compile(r"(ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)\((.*)$")
SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")
CALLED = re.compile(r"(?:calls|to_apply|true_computation|false_computation)=%?([\w.-]+)")
BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


@dataclasses.dataclass
class Traffic:
    """All collectives of one kind, in one execution of the program."""

    count: int = 0
    bytes: int = 0
    """Sent by each device."""


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    shape: str
    operation: str
    rest: str
    """Operands and attributes: the text after the opening parenthesis."""
    root: bool

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.-]+)", self.rest.split(")", 1)[0])

    def attribute(self, name: str) -> str:
        found = re.search(rf"\b{name}=%?([\w.-]+)", self.rest)
        return found[1] if found else ""


class Program(dict):
    """`{computation: {name: instruction}}` of an HLO text; `entry` names the entry computation."""

    def __init__(self, text: str):
        super().__init__()
        current: dict[str, Instruction] = {}
        for line in text.splitlines():
            if head := COMPUTATION.match(line):
                current = self[head[2]] = {}
                if head[1]:
                    self.entry = head[2]
            elif found := INSTRUCTION.match(line.strip()):
                root, name, shape, operation, rest = found.groups()
                current[name] = Instruction(name, shape, operation, rest, root=bool(root))


def collectives(text: str) -> dict[str, Traffic]:
    """Count and bytes of the collectives by kind, as one device runs them.

    A gather or scatter over n devices sends (n - 1) / n of the full array, a reduction to all
    twice that, as on a ring; a permutation sends its array.
    """
    program = Program(text)
    total: defaultdict[str, Traffic] = defaultdict(Traffic)

    def walk(computation: str, times: int, seen: set[str] | None = None) -> None:
        fused: set[str] = set()  # an asynchronous collective appears in several fusions
        for instruction in program.get(computation, {}).values():
            kind = instruction.operation.removesuffix("-start")
            if kind in KINDS:
                channel = instruction.attribute("channel_id")
                if seen is None or channel not in seen:
                    total[kind].count += times
                    total[kind].bytes += times * sent(kind, instruction)
                if seen is not None:
                    seen.add(channel)
            elif kind == "while":
                inner = times * trips(program, computation, instruction)
                walk(instruction.attribute("body"), inner)
            else:
                for called in calls(instruction):
                    walk(called, times, fused if kind == "fusion" else None)

    walk(program.entry, 1)
    return dict(total)


def calls(instruction: Instruction) -> list[str]:
    """Computations that an instruction calls once; all branches of a conditional."""
    branches = BRANCHES.search(instruction.rest)
    named = re.findall(r"[\w.-]+", branches[1]) if branches else []
    return CALLED.findall(instruction.rest) + named


# --- collectives ---------------------------------------------------------------------------------


def sent(kind: str, instruction: Instruction) -> int:
    """Bytes that one device sends for one collective."""
    shapes = [shape for shape in SHAPE.findall(instruction.shape) if shape != ("u32", "")]
    arrays = [size(*shape) for shape in shapes]  # of the result; u32[] are contexts
    if instruction.operation.endswith("-start") and kind != "all-reduce":
        arrays = arrays[len(arrays) // 2 :]  # operands come first
    total = sum(arrays)
    if kind == "collective-permute":
        return int(total)
    devices = group_size(instruction.rest)
    if kind == "reduce-scatter":
        total *= devices
    share = (devices - 1) / devices
    return int((2 if kind == "all-reduce" else 1) * share * total)


def size(dtype: str, dims: str) -> float:
    """Bytes of one array; 0 for an unknown dtype."""
    return BYTES.get(dtype, 0) * math.prod(int(n) for n in dims.split(",") if n)


def group_size(rest: str) -> int:
    """Devices that take part in one collective, from `replica_groups` in any of its notations."""
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", rest):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", found[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'([^']+)'", found[2]))
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]<=", rest):
        return int(found[1])
    if found := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
        return len(found[1].split(","))
    return 1


# --- loops ---------------------------------------------------------------------------------------


def trips(program: Program, computation: str, loop: Instruction) -> int:
    """Trip count of a loop: XLA's own, or computed from start, bound and step.

    1 for a loop whose end depends on data.
    """
    if found := TRIPS.search(loop.rest):
        return int(found[1])
    condition, body = (program.get(loop.attribute(name), {}) for name in ("condition", "body"))
    test = next((each for each in condition.values() if each.root), None)
    if test is None or test.operation != "compare" or test.attribute("direction") != "LT":
        return 1
    counter, limit = (condition.get(name) for name in test.operands)
    bound = constant(limit)
    if not counter or counter.operation != "get-tuple-element" or bound is None:
        return 1
    index = int(counter.attribute("index"))
    start, step = 0, 1
    outer = program[computation]
    carried = outer.get(loop.operands[0])
    if carried and carried.operation == "tuple":
        start = constant(outer.get(carried.operands[index])) or 0
    result = next((each for each in body.values() if each.root), None)
    if result and result.operation == "tuple":
        advance = body.get(result.operands[index])
        if advance and advance.operation == "add":
            steps = [constant(body.get(name)) for name in advance.operands]
            step = next((each for each in steps if each), 1)
    return max(1, -(-(bound - start) // step))


def constant(instruction: Instruction | None) -> int | None:
    """The value of a scalar integer constant, through copies too; None otherwise."""
    if instruction is None or instruction.operation != "constant":
        return None
    found = re.match(r"(-?\d+)\)", instruction.rest)
    return int(found[1]) if found else None
