"""In: expressions, reductions, weight loads and products, one after the other. Out: a Section.

Every task is placed at the earliest cycle at which its inputs are ready and nothing it occupies is
taken; tasks of equal readiness go in the order of the calls.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from openlpu import isa
from openlpu.chip import EAST, WEST, Chip
from openlpu.errors import DoesNotFit
from openlpu.program import Issue, Section
from openlpu.schedule.expression import (
    Accumulator,
    CannotWaitError,
    Expression,
    Leaf,
    Node,
    arrange,
    side_of,
)
from openlpu.schedule.layout import Maps
from openlpu.schedule.memory import Buffer, Memory
from openlpu.schedule.table import Flow, InItsOwnWayError, Request, Slot, Table, burst

LAYER_BASE, UPPER_LAYER_BASE = 1, 8  # base registers that move from layer to layer, per bank
_WORD = 4


@dataclass(slots=True)
class Plane:
    """How far a plane's queues are decided; installed and last_act are cycles, -1 for none."""

    installed: int = -1  # cycle of the last install
    loaded: int = 0  # cycle from which what was loaded can be installed
    last_act: int = -1
    free: list[tuple[int, int, int]] = field(default_factory=list)  # (from cycle, slot, count)


def after(source: Buffer | Accumulator, count: int, interval: int) -> int:
    """The earliest cycle at which reading may begin, an element every `interval` cycles."""
    return source.ready + max(0, (count - 1) * (source.period - interval))


class SectionBuilder:
    """Collects the issues of one section."""

    def __init__(self, chip: Chip, memory: Memory, maps: Maps, name: str) -> None:
        self.chip = chip
        self.memory = memory
        self.maps = maps
        self.name = name
        self.end = 0
        self.units = isa.units(chip)
        self.table = Table(chip)
        self._issues: list[Issue] = []
        self._tags: list[str] = [""]
        self.planes = [Plane(free=[(0, 0, chip.accumulators)]) for _ in range(chip.planes)]

    def tag(self, name: str) -> None:
        """Name the operation that the next tasks belong to."""
        if name not in self._tags:
            self._tags.append(name)
        self._tag = self._tags.index(name)

    def finish(self) -> Section:
        """The section, as long as its last event."""
        order = sorted(self._issues, key=lambda i: (i.queue, i.cycle, i.op, i.args))
        return Section(self.name, self.end, tuple(order), tuple(self._tags))

    # -- VXM ------------------------------------------------------------------------------------

    def evaluate(
        self, expression: Expression, count: int, *, earliest: int = 0
    ) -> dict[Buffer, Buffer]:
        """Place an expression over `count` elements; the buffers it writes, with their times."""
        for alus in range(self.chip.alus, 0, -1):  # a looser arrangement where one collides
            try:
                return self._evaluate(expression, count, earliest, alus)
            except (InItsOwnWayError, CannotWaitError):
                continue
        raise DoesNotFit(
            f"an expression on the VXM of {self.chip.name}",
            len(expression.nodes),
            self.chip.alus * self.chip.history_cycles,
            "operations, and results that can wait",
            ("a chip with longer histories", "fewer --rows"),
        )

    def _evaluate(
        self, expression: Expression, count: int, earliest: int, alus: int
    ) -> dict[Buffer, Buffer]:
        nodes, interval = arrange(expression, self.chip, count, alus)
        bits = burst(count, interval)
        request = Request([], [], [])
        slots: dict[int, Slot] = {}
        flows: dict[tuple[int, int], list[Flow]] = {}
        starts = 0
        pool = tuple(self.units.vxm + a for a in range(self.chip.alus))
        start = earliest - min(node.at for node in nodes)
        for node in nodes:
            slots[id(node)] = Slot(pool, node.at, node.at + self.latency(node.op), bits)
            request.slots.append(slots[id(node)])
            for k, arg in enumerate(node.args):
                if isinstance(arg, Leaf):
                    flow, began = self.fetch(request, arg, node.at, bits)
                    flows[id(node), k] = [flow]
                    start = max(start, after(arg.source, count, interval) - began)
            for j, buffer in enumerate(node.outputs):
                out = node.at + self.latency(node.op)
                flows[id(node), 3 + j] = [self.store(request, buffer, out, bits)]
                start = max(start, buffer.ready - out)
        starts = self.table.place(request, start)
        written: dict[Buffer, Buffer] = {}
        for node in nodes:
            self._emit_node(node, nodes, slots, flows, starts, count, interval, written)
        return written

    def latency(self, op: str) -> int:
        return isa.latency(self.chip, isa.KINDS[op])

    def fetch(self, request: Request, leaf: Leaf, at: int, bits: int) -> tuple[Flow, int]:
        """Reserve the way of a leaf to the VXM, to be there at `at`; its flow, its beginning."""
        chip, source = self.chip, leaf.source
        side = side_of(source, chip)
        inward = EAST if side == WEST else WEST
        if isinstance(source, Accumulator):
            x = chip.mxm_position(source.plane)
            began = at - abs(x - chip.vxm_position) - chip.latency.mxm_out
            request.fixed.append((self.queue("out", source.plane), began, bits))
            flow = Flow(inward, (x,) * _WORD, chip.vxm_position, at, bits, _WORD)
        else:
            places = tuple(chip.mem_position(s) for s in source.slices)
            issues = [at - abs(x - chip.vxm_position) - chip.latency.mem_read for x in places]
            for s, word, issue in zip(source.slices, source.words, issues, strict=True):
                self.access(request, "read", s, word, issue, bits)
            began = min(issues)
            flow = Flow(inward, places, chip.vxm_position, at, bits, source.width)
        request.flows.append(flow)
        return flow, began

    def store(self, request: Request, buffer: Buffer, out: int, bits: int) -> Flow:
        """Reserve the way of a result from the VXM into memory."""
        chip = self.chip
        x = chip.vxm_position
        side = side_of(buffer, chip)
        places = [chip.mem_position(s) for s in buffer.slices]
        far = max(places, key=lambda p: abs(p - x))
        for s, word, p in zip(buffer.slices, buffer.words, places, strict=True):
            self.access(request, "write", s, word, out + abs(p - x), bits)
        flow = Flow(side, (x,) * buffer.width, far, out + abs(far - x), bits, buffer.width)
        request.flows.append(flow)
        return flow

    def access(self, request: Request, what: str, s: int, word: int, at: int, bits: int) -> None:
        """Reserve the port and the bank of a slice."""
        request.fixed.append(((what, s), at, bits))
        request.fixed.append((("bank", s, word // self.chip.words_per_bank), at, bits))

    def queue(self, unit: str, plane: int) -> int:
        return self.units.load + 3 * plane + ("load", "act", "out").index(unit)

    def number(self, flow: Flow, b: int = 0) -> int:
        return flow.direction * self.chip.streams + flow.stream + b

    def _emit_node(
        self,
        node: Node,
        nodes: list[Node],
        slots: dict[int, Slot],
        flows: dict[tuple[int, int], list[Flow]],
        start: int,
        count: int,
        interval: int,
        written: dict[Buffer, Buffer],
    ) -> None:
        """The issue of one operation, of its leaves' reads and its results' writes."""
        fields: list[int] = []
        imm = 0
        for k in range(3):
            if k >= len(node.args):
                fields += [isa.Source.NONE, 0]
                continue
            arg = node.args[k]
            if isinstance(arg, int):
                fields += [isa.Source.IMM, 0]
                imm = arg
            elif isinstance(arg, Leaf):
                flow = flows[id(node), k][0]
                kind = {1: isa.Source.BYTE, 2: isa.Source.HALF, 4: isa.Source.WORD}[arg.width]
                fields += [kind, self.number(flow) * 2 + 1]
                self.emit_fetch(arg, flow, start + node.at, count, interval)
            else:
                delay = node.at - arg.at - self.latency(arg.op)
                assert 0 <= delay < self.chip.history_cycles, (node.op, delay)
                alu = slots[id(arg)].chosen
                assert isinstance(alu, int)
                fields += [isa.Source.TAP, (alu - self.units.vxm) * isa.DELAYS + delay]
        ends = [0, 0]
        width = 0
        out = start + node.at + self.latency(node.op)
        for j, buffer in enumerate(node.outputs):
            flow = flows[id(node), 3 + j][0]
            ends[flow.direction] = flow.stream + 1
            width = buffer.width
            written[buffer] = self.emit_store(buffer, flow, out, count, interval)
        queue = slots[id(node)].chosen
        assert isinstance(queue, int)
        args = (*(int(f) for f in fields), imm, width, ends[WEST], ends[EAST])
        self.issue(start + node.at, queue, node.op, args, count, interval)

    def emit_fetch(self, leaf: Leaf, flow: Flow, at: int, count: int, interval: int) -> None:
        chip, source = self.chip, leaf.source
        if isinstance(source, Accumulator):
            x = chip.mxm_position(source.plane)
            begin = at - abs(x - chip.vxm_position) - chip.latency.mxm_out
            step = source.step if count > 1 else 0
            out = (source.slot, step, self.number(flow))
            self.issue(begin, self.queue("out", source.plane), "out", out, count, interval)
            freed = (begin + (count - 1) * interval + 1, source.slot, count)
            self.planes[source.plane].free.append(freed)
            return
        for b, (s, word) in enumerate(zip(source.slices, source.words, strict=True)):
            x = chip.mem_position(s)
            begin = at - abs(x - chip.vxm_position) - chip.latency.mem_read
            step = source.step if count > 1 else 0
            args = (word, step, source.base, self.number(flow, b))
            self.issue(begin, s, "read", args, count, interval)

    def emit_store(self, buffer: Buffer, flow: Flow, out: int, count: int, interval: int) -> Buffer:
        chip = self.chip
        x = chip.vxm_position
        places = [chip.mem_position(s) for s in buffer.slices]
        far = max(abs(p - x) for p in places)
        ready = 0
        for b, (s, word, p) in enumerate(zip(buffer.slices, buffer.words, places, strict=True)):
            at = out + abs(p - x)
            step = buffer.step if count > 1 else 0
            args = (word, step, buffer.base, self.number(flow, b), 1)
            self.issue(at, s, "write", args, count, interval)
            ready = max(ready, at + chip.latency.mem_write)
        assert far == abs(flow.end - x)
        return replace(buffer, ready=ready, period=interval)

    def issue(
        self, cycle: int, queue: int, op: str, args: tuple[int, ...], count: int, period: int
    ) -> None:
        period = period if count > 1 else 1
        if op == "read" and args[2] == LAYER_BASE and args[0] >= self.chip.words_per_bank:
            args = (*args[:2], UPPER_LAYER_BASE, *args[3:])
        self._issues.append(Issue(cycle, queue, op, args, count, period, self._tag))
        kind = isa.KINDS[op]
        last = cycle + (count - 1) * period + isa.latency(self.chip, kind)
        self.end = max(self.end, last + 1)
