"""Reads a compiled TPU module: loops, cycles, collectives, kernels.

A compiled module is text: computations, each a list of scheduled instructions. A loop's trip count
is the constant in its condition. Of the branches of a conditional the costliest one counts. The
cycles of a fusion are stated where it is called; those that the compiler does not know, such as a
gather's on the SparseCore, count 0.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import re
from collections.abc import Callable, Collection, Iterator

_HEAD = re.compile(r"^\s*(ENTRY )?%([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%([\w.\-]+) = (\(.*?\)|\S+) ([a-z][a-z\-]*)\((.*)$")
_UNKNOWN = 2**63 - 1  # cycles
_SHAPE = re.compile(r"\b(pred|[su]\d+|bf16|f16|f32|f64|f8\w+|c64)\[([\d,]*)\]")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_GROUPS = re.compile(r"replica_groups=(?:\[(\d+),(\d+)\]|\{\{([\d,]*)\})")
_MESH_GROUPS = re.compile(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}")
# The results of these are aliases of existing memory, or the results of a whole computation.
_NAMES = (
    "parameter",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "while",
    "conditional",
    "call",
    "copy-done",
    "opt-barrier",
    "constant",
)
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line: its name, result type, operation, and everything after the bracket."""

    name: str
    type: str
    op: str
    rest: str

    def called(self, key: str) -> str | None:
        found = re.search(rf"\b{key}=%?([\w.\-]+)", self.rest)
        return found.group(1) if found else None


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of the module, over all its executions in a step.

    Attributes:
      kind: one of KINDS.
      bytes: of one execution on one device: the larger of input and output.
      times: executions per step.
      group: devices that take part in one exchange.
      overlapped: whether there is compute between the instructions that start and end it.
      source: the operation of the model that caused it.
    """

    kind: str
    bytes: int
    times: int
    group: int
    overlapped: bool
    source: str

    @property
    def moved(self) -> float:
        """Bytes that leave a device in a step; an all-reduce sends its bytes twice."""
        share = (self.group - 1) / self.group if self.group else 0.0
        if self.kind == "collective-permute":
            share = 1.0
        return (2 if self.kind == "all-reduce" else 1) * share * self.bytes * self.times


@dataclasses.dataclass(frozen=True)
class Made:
    """An array that an instruction writes to memory: `times` per step, `bytes` each time."""

    name: str
    op: str
    bytes: int
    times: int


class Module:
    """A compiled module, parsed from `compiled.as_text()`."""

    def __init__(self, text: str, devices: int) -> None:
        """`devices`: number in the mesh, the size of a collective's group that names no members."""
        self.devices = devices
        self.computations: dict[str, list[Instruction]] = {}
        self.entry = ""
        here: list[Instruction] = []
        for line in text.splitlines():
            if head := _HEAD.match(line):
                here = self.computations.setdefault(head.group(2), [])
                if head.group(1):
                    self.entry = head.group(2)
            elif found := _INSTRUCTION.match(line):
                here.append(Instruction(*found.groups()))
        if not self.entry:
            raise ValueError("the text holds no ENTRY computation: not a compiled module")
        self._cycles: dict[str, float] = {}

    def cycles(self, computation: str | None = None) -> float:
        """The compiler's estimated cycles of a step; a loop's body counts at every turn."""
        name = computation or self.entry
        if name not in self._cycles:
            self._cycles[name] = 0.0
            self._cycles[name] = sum(map(self._instruction_cycles, self.computations[name]))
        return self._cycles[name]

    def trip_counts(self) -> dict[str, int]:
        """{name of a while loop: how often its body runs}."""
        return {
            instruction.name: self._trips(instruction)
            for body in self.computations.values()
            for instruction in body
            if instruction.op == "while"
        }

    def collectives(self) -> list[Collective]:
        """The collectives of a step; instructions on one channel are one collective."""
        found: dict[tuple[str, str], Collective] = {}
        for computation, times in self.executed():
            body = self.computations[computation]
            starts = any('"AsyncCollectiveStart"' in i.rest for i in body)
            fused = starts or computation.startswith("async_collective_fusion")
            scatters = computation.startswith("all-reduce-scatter")
            for instruction in body:
                kind = instruction.op.removesuffix("-start")
                if instruction.op == "async-start":
                    inner = self.computations.get(instruction.called("calls") or "", [])
                    kind = next((i.op for i in inner if i.op in KINDS), "")
                if kind not in KINDS:
                    continue
                # The type of a "-start" lists input, output and semaphores; others list outputs.
                size = size_of(instruction.type, max if "-start" in instruction.op else sum)
                if kind == "all-reduce" and scatters:
                    kind = "reduce-scatter"  # an all-reduce fused with the slice of its result
                group = _group(instruction.rest, self.devices)
                if instruction.op == "reduce-scatter":
                    size *= group
                channel = re.search(r"channel_id=(\d+)", instruction.rest)
                source = re.search(r'op_name="([^"]*)"', instruction.rest)
                overlapped = fused or instruction.op.endswith("-start")
                key = (kind, channel.group(1) if channel else f"{computation}/{instruction.name}")
                if instruction.op == "reduce-scatter" and not overlapped:
                    key = (kind, instruction.name)  # shard_map puts all of them on channel 1
                new = Collective(
                    kind, size, times, group, overlapped, source.group(1) if source else ""
                )
                old = found.get(key)
                # A fused collective may continue through several computations, a loop's body for
                # example. It is one exchange: it runs as often as its rarest part, and overlaps
                # compute if any part does.
                if old is None:
                    found[key] = new
                    continue
                found[key] = dataclasses.replace(
                    min(old, new, key=lambda c: (c.times, -c.bytes)),
                    overlapped=old.overlapped or new.overlapped,
                    source=old.source or new.source,
                )
        return list(found.values())

    def kernels(self) -> list[str]:
        """Names of the Pallas kernels in the module."""
        names = []
        for body in self.computations.values():
            for instruction in body:
                if 'custom_call_target="tpu_custom_call"' in instruction.rest:
                    source = re.search(r'op_name="([^"]*)"', instruction.rest)
                    names.append(source.group(1) if source else instruction.name)
        return names

    def holds(self, *shape: int, dtypes: tuple[str, ...] = ("bf16", "f32")) -> list[str]:
        """Names of instructions whose result is a whole array of this shape on one device."""
        dims = ",".join(map(str, shape))
        wanted = re.compile(rf"\b(?:{'|'.join(dtypes)})\[(?:1,)*{dims}\]")
        return [
            instruction.name
            for computation, _ in self.executed()
            for instruction in self.computations[computation]
            if wanted.search(instruction.type) and instruction.op != "parameter"
        ]

    def turn(self) -> Module:
        """A module that is one turn of the costliest loop in the entry computation."""
        loops = [i.called("body") for i in self.computations[self.entry] if i.op == "while"]
        if not loops:
            raise ValueError("the module's entry has no loop")
        part = copy.copy(self)
        part.entry = max(loops, key=self.cycles)
        return part

    def made(self, elements: Collection[int], loops: bool = True) -> list[Made]:
        """The arrays with one of these numbers of elements that a step writes to memory.

        `loops` includes writes within loops. Results within a fusion and aliases are not written;
        an update in place writes only its part; S(1) is the core's own memory.
        """
        found = []
        for name, times in self.executed(fused=False, loops=loops):
            for i in self.computations[name]:
                arrays = re.findall(r"\w+\[[\d,]*\](?:\{[^}]*\})?", i.type)
                if i.op == "copy-start":  # (result, operand, semaphore)
                    arrays = arrays[:1]
                elif i.op.endswith("-start"):  # (operand, result)
                    arrays = arrays[1:2]
                sizes = [
                    size_of(text)
                    for text in arrays
                    if "S(1)" not in text and _elements(text) in elements
                ]
                if i.op not in _NAMES and sizes and not self._in_place(i):
                    found.append(Made(i.name, i.op, max(sizes), times))
        return found

    # --- walking ------------------------------------------------------------------------------

    def _instruction_cycles(self, instruction: Instruction) -> float:
        if instruction.op == "while":
            return self._trips(instruction) * self.cycles(instruction.called("body"))
        if instruction.op == "conditional":
            return max(map(self.cycles, self._branches(instruction)), default=0.0)
        if instruction.op == "call":
            return self.cycles(instruction.called("to_apply"))
        found = _CYCLES.search(instruction.rest)
        return float(found.group(1)) if found and int(found.group(1)) != _UNKNOWN else 0.0

    def _in_place(self, instruction: Instruction) -> bool:
        body = self.computations.get(instruction.called("calls") or "", [instruction])
        return any(i.op in ("dynamic-update-slice", "scatter") for i in body)

    def executed(self, fused: bool = True, loops: bool = True) -> Iterator[tuple[str, int]]:
        """(computation, times per step), with or without those of fusions and of loops."""
        waiting = [(self.entry, 1)]
        while waiting:
            name, times = waiting.pop()
            if name not in self.computations:
                continue
            yield name, times
            for instruction in self.computations[name]:
                if instruction.op == "while":
                    if loops:
                        body = instruction.called("body")
                        waiting.append((body, times * self._trips(instruction)))
                elif instruction.op == "conditional":
                    branches = self._branches(instruction)
                    if branches:
                        waiting.append((max(branches, key=self.cycles), times))
                elif instruction.op in ("fusion", "async-start") and fused:
                    waiting.append((instruction.called("calls"), times))
                elif instruction.op == "call":
                    waiting.append((instruction.called("to_apply"), times))

    def _branches(self, instruction: Instruction) -> list[str]:
        named = re.search(r"branch_computations=\{([^}]*)\}", instruction.rest)
        if named:
            return [name.strip().lstrip("%") for name in named.group(1).split(",")]
        two = (instruction.called(f"{side}_computation") for side in ("true", "false"))
        return [name for name in two if name]

    def _trips(self, loop: Instruction) -> int:
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.rest)
        if known:
            return int(known.group(1))
        condition = self.computations.get(loop.called("condition") or "", [])
        constants = {
            i.name: int(m.group(1))
            for i in condition
            if i.op == "constant" and (m := re.match(r"(-?\d+)\)", i.rest))
        }
        for i in condition:
            if i.op == "compare" and "direction=LT" in i.rest:
                operands = re.findall(r"%([\w.\-]+)", i.rest.split(")")[0])
                found = [constants[o] for o in operands if o in constants]
                if found:
                    return found[-1]
        return max(constants.values(), default=1)


def _elements(text: str) -> int:
    """Number of elements of the first array of a type."""
    found = _SHAPE.search(text)
    return math.prod(int(d) for d in found.group(2).split(",") if d) if found else 0


def size_of(text: str, of: Callable = sum) -> int:
    """Bytes of the arrays of a type: the sum, or another function `of` them."""
    sizes = []
    for dtype, dims in _SHAPE.findall(text):
        bits = 8 if dtype == "pred" else int(re.findall(r"\d+", dtype)[0])
        sizes.append(math.prod(int(d) for d in dims.split(",") if d) * bits // 8)
    return of(sizes) if sizes else 0


def _group(rest: str, devices: int) -> int:
    """The number of devices in a collective's group."""
    if found := _GROUPS.search(rest):
        _, size, members = found.groups()
        if members is None:
            return int(size)
        return len([m for m in members.split(",") if m]) or devices
    if found := _MESH_GROUPS.search(rest):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", found.group(1)))
        axes = re.findall(r"'([^']+)'", found.group(2))
        return math.prod(int(sizes[axis]) for axis in axes) or devices
    return devices
