"""In: lane operations on vectors. Out: their cycles relative to each other, modulo an interval.

An Expression is what the VXM does to one element (one row): inputs that can be fetched at any
cycle, operations, outputs. It is arranged backwards, each operation as late as its readers allow,
so that values wait as little as possible: an ALU's result can be read for history_cycles only.
Elements follow each other every `interval` cycles.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import TypeAlias

from openlpu import isa
from openlpu.chip import EAST, Chip
from openlpu.schedule.memory import Buffer

WORD_BYTES = 4
ALONE = 1 << 30  # the interval of a single element
_FAR_CYCLES = 1 << 16  # no expression is so long
_AROUND_CYCLES = 1 << 10  # more than a value is under way from memory or to it
_READS = 4  # of one word in an expression: cheaper than an ALU that holds it


@dataclass(frozen=True, slots=True)
class Accumulator:
    """int32 vectors in a plane: element i in slot + i * step, ready from `ready` + i * period."""

    plane: int
    slot: int
    step: int
    ready: int
    period: int


@dataclass(eq=False, slots=True)
class Leaf:
    """An input: a Buffer of 1, 2 or 4 bytes, or an Accumulator."""

    source: Buffer | Accumulator

    @property
    def width(self) -> int:
        return self.source.width if isinstance(self.source, Buffer) else WORD_BYTES


@dataclass(eq=False, slots=True)
class Node:
    """An operation. at: cycle of issue relative to the expression's end, once arranged."""

    op: str
    args: list[Operand]
    outputs: list[Buffer] = field(default_factory=list)
    at: int = 0


Operand: TypeAlias = "Node | Leaf | int"  # an int is an immediate: 32 bits


def bits(value: float) -> int:
    """The int32 with the bits of a float32."""
    return int(struct.unpack("<i", struct.pack("<f", value))[0])


class Expression:
    """Collects operations; every method returns the value it makes."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []

    def op(self, name: str, *args: Operand | float) -> Node:
        """One operation of isa.ALU; a float argument is an immediate float32."""
        plain: list[Operand] = [bits(a) if isinstance(a, float) else a for a in args]
        immediate = {a for a in plain if isinstance(a, int)}
        while len(immediate) > 1:  # an instruction has room for one
            extra = immediate.pop()
            plain = [
                self.op("mov", extra) if a == extra and isinstance(a, int) else a for a in plain
            ]
        node = Node(name, plain)
        self.nodes.append(node)
        return node

    def write(self, value: Operand, *buffers: Buffer) -> None:
        """Store a value; the buffer's width says how many of its bytes."""
        node = value if isinstance(value, Node) else self.op("mov", value)
        node.outputs.extend(buffers)


class CannotWaitError(Exception):
    """No arrangement with so many ALUs keeps every value within the histories."""


def arrange(expression: Expression, chip: Chip, count: int, alus: int) -> tuple[list[Node], int]:
    """Set `at` of every node (<= 0) and return them with the interval between elements.

    Nodes that must wait too long are handed on by added `mov`s. alus: how many may issue in a
    cycle. The expression is left as it is."""
    nodes = _one_use(_copied(expression.nodes), chip)
    alone = _attempt(nodes, chip, ALONE, alus)
    if alone is None:
        raise CannotWaitError("values cannot wait as long as the expression takes")
    if count == 1:
        return alone, 1
    # Elements so far apart that they never meet are each as alone.
    farthest = alone[-1].at - alone[0].at + _AROUND_CYCLES
    for interval in range(max(-(-len(nodes) // alus), _most_asked(nodes, chip)), farthest):
        arranged = _attempt(nodes, chip, interval, alus)
        if arranged is not None:
            return arranged, interval
    return alone, farthest


def _attempt(nodes: list[Node], chip: Chip, interval: int, alus: int) -> list[Node] | None:
    """Copies of the nodes, arranged with this interval, if one of the margins allows it."""
    for margin in range(4, chip.history_cycles // 2, 4):
        attempt = _Arrangement(chip, interval, alus, margin)
        arranged = attempt.run(_copied(nodes))
        if arranged is not None or attempt.crowded:  # crowded: another margin would not help
            return arranged
    return None


def _most_asked(nodes: list[Node], chip: Chip) -> int:
    """How often the port or bank that is asked for most is used by one element."""
    asked: dict[tuple[str | int, ...], int] = {}
    for node in nodes:
        ways = [("read", arg.source) for arg in node.args if isinstance(arg, Leaf)]
        for what, source in [*ways, *(("write", buffer) for buffer in node.outputs)]:
            keys: list[tuple[str | int, ...]]
            if isinstance(source, Accumulator):
                keys = [("out", source.plane)]
            else:
                keys = [(what, s) for s in source.slices]
                for s, word in zip(source.slices, source.words, strict=True):
                    keys.append(("bank", s, word // chip.words_per_bank))
            for key in keys:
                asked[key] = asked.get(key, 0) + 1
    return max(asked.values(), default=1)


def _copied(nodes: list[Node]) -> list[Node]:
    """The same expression, made of other nodes."""
    new: dict[int, Node] = {}
    for node in nodes:
        args = [new[id(arg)] if isinstance(arg, Node) else arg for arg in node.args]
        new[id(node)] = Node(node.op, args, list(node.outputs))
    return list(new.values())


def _one_use(nodes: list[Node], chip: Chip) -> list[Node]:
    """Leaves as operands of their own: memory is read again for each of a few readers, other leaves
    that several need are kept by a `mov`. Each output gets a node of its own where one instruction
    cannot send them all."""
    uses: dict[int, int] = {}
    for node in nodes:
        for arg in node.args:
            if isinstance(arg, Leaf):
                uses[id(arg)] = uses.get(id(arg), 0) + 1
    moved: dict[int, Node] = {}
    result: list[Node] = []
    for node in nodes:
        for i, arg in enumerate(node.args):
            again = _READS if isinstance(arg, Leaf) and isinstance(arg.source, Buffer) else 1
            if isinstance(arg, Leaf) and uses[id(arg)] > again:
                if id(arg) not in moved:
                    moved[id(arg)] = Node("mov", [arg])
                    result.append(moved[id(arg)])
                node.args[i] = moved[id(arg)]
            elif isinstance(arg, Leaf) and any(
                isinstance(other, Leaf) and _one_port(arg, other) for other in node.args[:i]
            ):
                result.append(Node("mov", [arg]))
                node.args[i] = result[-1]
        result.append(node)
        kept: list[Buffer] = []
        for buffer in node.outputs:
            side = buffer.slices[0] // chip.slices_per_hemisphere
            if any(
                b.width != buffer.width or b.slices[0] // chip.slices_per_hemisphere == side
                for b in kept
            ):
                result.append(Node("mov", [node], [buffer]))
            else:
                kept.append(buffer)
        node.outputs = kept
    return result


def _one_port(a: Leaf, b: Leaf) -> bool:
    """Whether two inputs cannot be fetched at the same time."""
    if isinstance(a.source, Buffer) and isinstance(b.source, Buffer):
        return not set(a.source.slices).isdisjoint(b.source.slices)
    if isinstance(a.source, Accumulator) and isinstance(b.source, Accumulator):
        return a.source.plane == b.source.plane
    return False


class _Arrangement:
    """Backward list scheduling of one expression with a given interval."""

    def __init__(self, chip: Chip, interval: int, alus: int, margin: int) -> None:
        self.chip = chip
        self.alus = alus
        self.margin = margin  # cycles a node may slip because ALUs are taken
        self.interval = interval
        self._used: dict[tuple[str, int, int], int] = {}
        self.crowded = False  # whether no cycle was found for a node

    def run(self, nodes: list[Node]) -> list[Node] | None:
        readers: dict[int, list[Node]] = {id(node): [] for node in nodes}
        for node in nodes:
            for arg in node.args:
                if isinstance(arg, Node) and node not in readers[id(arg)]:
                    readers[id(arg)].append(node)
        done: list[Node] = []
        for node in _backwards(nodes, readers, self.chip):
            mine = readers[id(node)]
            latest = self._bridge(node, mine, done)
            if latest is None or not self._settle(node, latest):
                return None
            done.append(node)
        if any(self._waits(node) >= self.chip.history_cycles for node in done):
            return None
        done.reverse()
        done.sort(key=lambda node: node.at)
        return done

    def _latency(self, node: Node) -> int:
        return isa.latency(self.chip, isa.KINDS[node.op])

    def _bridge(self, node: Node, readers: list[Node], done: list[Node]) -> int | None:
        """The latest cycle at which the node can issue, after `mov`s for its late readers."""
        lat = self._latency(node)
        if not readers:
            return -lat
        reach = self.chip.history_cycles
        took = isa.latency(self.chip, isa.KINDS["mov"])
        while True:
            first = min(reader.at for reader in readers)
            late = [reader for reader in readers if reader.at - first >= reach - self.margin]
            if not late:
                return first - lat
            last = max(reader.at for reader in late)
            latest = last - took - (reach - 1 - self.margin)  # it may slip by the margin
            served = [reader for reader in late if reader.at >= latest + took]
            relay = Node("mov", [node])
            if not self._settle(relay, latest) or last - relay.at - took >= reach:
                return None
            for reader in served:
                reader.args = [relay if arg is node else arg for arg in reader.args]
                readers.remove(reader)
            readers.append(relay)
            done.append(relay)

    def _waits(self, node: Node) -> int:
        """The longest that an operand of the node waits in a history."""
        made = [arg.at + self._latency(arg) for arg in node.args if isinstance(arg, Node)]
        return max((node.at - ready for ready in made), default=0)

    def _settle(self, node: Node, latest: int) -> bool:
        """Choose the node's cycle: the latest one with an ALU, ports and streams free."""
        slip = _FAR_CYCLES if self.interval == ALONE else 4 * self.interval + 8
        for at in range(latest, latest - slip, -1):
            asked: dict[tuple[str, int, int], int] = {}
            fits = True
            for key, n, limit in self._claims(node, at):  # a node may ask for one thing twice
                asked[key] = asked.get(key, self._used.get(key, 0)) + n
                fits = fits and asked[key] <= limit
            if fits:
                self._used.update(asked)
                node.at = at
                return True
        self.crowded = True
        return False

    def _bank(self, buffer: Buffer, s: int) -> int:
        """A number for the bank of a slice that the buffer's bytes lie in."""
        word = buffer.words[buffer.slices.index(s)]
        return s * self.chip.banks + word // self.chip.words_per_bank

    def _claims(self, node: Node, at: int) -> list[tuple[tuple[str, int, int], int, int]]:
        """(resource at a cycle of the interval, how much, how much there is)."""
        chip, out = self.chip, at + self._latency(node)
        found = [(("alu", 0, at % self.interval), 1, self.alus)]
        inward: dict[int, int] = {}
        for arg in node.args:
            if not isinstance(arg, Leaf):
                continue
            side = side_of(arg.source, chip)
            inward[side] = inward.get(side, 0) + arg.width
            if isinstance(arg.source, Buffer):
                for s in arg.source.slices:
                    hops = abs(chip.mem_position(s) - chip.vxm_position)
                    when = (at - hops - chip.latency.mem_read) % self.interval
                    found.append((("read", s, when), 1, 1))
                    found.append((("bank", self._bank(arg.source, s), when), 1, 1))
            else:
                found.append((("out", arg.source.plane, at % self.interval), 1, 1))
        for side, width in inward.items():
            found.append((("in", side, at % self.interval), width, chip.streams))
        for buffer in node.outputs:
            side = side_of(buffer, chip)
            found.append((("sent", side, out % self.interval), buffer.width, chip.streams))
            for s in buffer.slices:
                when = (out + abs(chip.mem_position(s) - chip.vxm_position)) % self.interval
                found.append((("written", s, when), 1, 1))
                found.append((("bank", self._bank(buffer, s), when), 1, 1))
        return found


def side_of(source: Buffer | Accumulator, chip: Chip) -> int:
    """The hemisphere a value lies in."""
    if isinstance(source, Accumulator):
        return int(chip.mxm_position(source.plane) > chip.vxm_position)
    return int(source.slices[0] >= chip.slices_per_hemisphere) and EAST


def _backwards(nodes: list[Node], readers: dict[int, list[Node]], chip: Chip) -> list[Node]:
    """Readers before what they read; among those free to go, the one on the longest way first."""
    height: dict[int, int] = {}
    for node in nodes:  # made in order: arguments come first
        below = [height[id(arg)] for arg in node.args if isinstance(arg, Node)]
        height[id(node)] = isa.latency(chip, isa.KINDS[node.op]) + max(below, default=0)
    depth: dict[int, int] = {}
    for node in reversed(nodes):
        after = [depth[id(r)] + isa.latency(chip, isa.KINDS[r.op]) for r in readers[id(node)]]
        depth[id(node)] = max(after, default=0)
    order = {id(node): i for i, node in enumerate(nodes)}
    return sorted(nodes, key=lambda node: (depth[id(node)], -height[id(node)], -order[id(node)]))
