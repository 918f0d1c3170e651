"""In: vectors of 32-bit words. Out: their maximum over lanes, in every lane.

Two trips through the SXM: the lanes of each superlane, then the superlanes of each segment. On a
trip one read feeds several rotations in both hemispheres at once, and the VXM joins all copies in a
tree.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

from openlpu import isa
from openlpu.chip import EAST, WEST
from openlpu.schedule.memory import Buffer
from openlpu.schedule.section import SectionBuilder, after
from openlpu.schedule.table import Flow, InItsOwnWayError, Request, Slot, burst

_WORD = 4


@dataclass(slots=True)
class _Copy:
    """A value on the VXM: of a leaf (a flow) or an ALU, at hand from cycle `at` on."""

    at: int
    flow: Flow | None = None
    slot: Slot | None = None


@dataclass(slots=True)
class _Join:
    """An operation of the tree."""

    at: int
    a: _Copy
    b: _Copy
    slot: Slot


def reduce_lanes(
    builder: SectionBuilder,
    west: Buffer,
    east: Buffer,
    op: str,
    segment: int,
    count: int,
    outputs: tuple[Buffer, ...],
) -> tuple[Buffer, ...]:
    """Maximum (op max or fmax) over each `segment` lanes of `count` elements, in all of those
    lanes.

    west and east hold the same values in their hemispheres; outputs: at most one in each."""
    lanes = builder.chip.superlane_lanes
    superlanes = segment // lanes
    inside = [("rotate", k) for k in range(lanes)]
    if superlanes == 1:
        return trip(builder, west, east, inside, op, count, outputs)
    memory = builder.memory
    halves = tuple(memory.scratch(_WORD, count, hemisphere=h, outer=True) for h in (WEST, EAST))
    w, e = trip(builder, west, east, inside, op, count, halves)
    across = [("permute", builder.maps.rotation(segment, k)) for k in range(superlanes)]
    found = trip(builder, w, e, across, op, count, outputs)
    for half in (w, e):  # what is read is free once the result is complete
        memory.give_back(half, max(b.ready + (count - 1) * b.period for b in found))
    return found


def trip(
    builder: SectionBuilder,
    west: Buffer,
    east: Buffer,
    copies: list[tuple[str, int]],
    op: str,
    count: int,
    outputs: tuple[Buffer, ...],
) -> tuple[Buffer, ...]:
    """One trip: copies of each element by the SXM, joined on the VXM, elements as close as their
    own reads and writes allow."""
    slack = 0
    while True:
        try:
            return _spaced_trip(builder, west, east, copies, op, count, outputs, slack)
        except InItsOwnWayError:
            slack += 1


def _spaced_trip(
    builder: SectionBuilder,
    west: Buffer,
    east: Buffer,
    copies: list[tuple[str, int]],
    op: str,
    count: int,
    outputs: tuple[Buffer, ...],
    slack: int,
) -> tuple[Buffer, ...]:
    """Time 0 is when the first copies reach the VXM. slack: cycles more between elements than the
    streams and ALUs need."""
    chip = builder.chip
    at_once = chip.streams // _WORD
    fans = [copies[i : i + at_once] for i in range(0, len(copies), at_once)]
    interval = max(-(-len(fans) // 2), -(-len(copies) // chip.alus)) + slack
    bits = burst(count, interval)
    request = Request([], [], [])
    reads: list[tuple[Buffer, int, Flow]] = []
    permutes: list[tuple[int, str, int, Flow, Flow, Slot, bool]] = []
    ready: list[_Copy] = []
    start = 0
    for i, fan in enumerate(fans):
        side = EAST if i % 2 == 0 else WEST
        source = east if side == EAST else west
        x = chip.sxm_position(side)
        took = builder.latency(fan[0][0])
        at = i // 2 - abs(x - chip.vxm_position) - took
        places = tuple(chip.mem_position(s) for s in source.slices)
        outward = Flow(side, places, x, at, bits, _WORD)
        request.flows.append(outward)
        for s, word, place in zip(source.slices, source.words, places, strict=True):
            begin = at - abs(x - place) - chip.latency.mem_read
            builder.access(request, "read", s, word, begin, bits)
            start = max(start, after(source, count, interval) - begin)
        reads.append((source, at, outward))
        first = builder.units.sxm + side * chip.sxm_queues
        pool: tuple[Hashable, ...] = tuple(range(first, first + chip.sxm_queues))
        for k, (name, amount) in enumerate(fan):
            slot = Slot(pool, at, at + took, bits)
            inward = Flow(1 - side, (x,) * _WORD, chip.vxm_position, i // 2, bits, _WORD)
            request.slots.append(slot)
            request.flows.append(inward)
            permutes.append((at, name, amount, outward, inward, slot, k == 0))
            ready.append(_Copy(i // 2, flow=inward))
    joins = _tree(builder, ready, op, request, bits)
    out = joins[-1].at + builder.latency(op)
    stores = [builder.store(request, buffer, out, bits) for buffer in outputs]
    start = max([start, *(buffer.ready - out for buffer in outputs)])
    begun = builder.table.place(request, start)
    for source, at, flow in reads:
        x = flow.end
        for b, (s, word) in enumerate(zip(source.slices, source.words, strict=True)):
            begin = begun + at - abs(x - chip.mem_position(s)) - chip.latency.mem_read
            read = (word, source.step if count > 1 else 0, source.base, builder.number(flow, b))
            builder.issue(begin, s, "read", read, count, interval)
    for at, name, amount, src, dst, slot, take in permutes:
        move = (builder.number(src), builder.number(dst), 1, int(take), amount)
        assert isinstance(slot.chosen, int)
        builder.issue(begun + at, slot.chosen, name, move, count, interval)
    ends, width = [0, 0], 0
    written = []
    for buffer, flow in zip(outputs, stores, strict=True):
        ends[flow.direction] = flow.stream + 1
        width = _WORD
        written.append(builder.emit_store(buffer, flow, begun + out, count, interval))
    for join in joins:
        fields: list[int] = []
        for copy in (join.a, join.b):
            if copy.flow is not None:
                fields += [isa.Source.WORD, builder.number(copy.flow) * 2 + 1]
            else:
                assert copy.slot is not None and isinstance(copy.slot.chosen, int)
                alu = copy.slot.chosen - builder.units.vxm
                fields += [isa.Source.TAP, alu * isa.DELAYS + join.at - copy.at]
        last = join is joins[-1]
        tail = (0, width, *ends) if last else (0, 0, 0, 0)
        args = (*(int(f) for f in fields), int(isa.Source.NONE), 0, *tail)
        assert isinstance(join.slot.chosen, int)
        builder.issue(begun + join.at, join.slot.chosen, op, args, count, interval)
    return tuple(written)


def _tree(
    builder: SectionBuilder, ready: list[_Copy], op: str, request: Request, bits: int
) -> list[_Join]:
    """Join copies two by two, those at hand first. Copies on streams must be read at their cycle:
    they come in pairs of one cycle (a copy left alone is joined with itself: max(a, a) = a)."""
    pool: tuple[Hashable, ...] = tuple(builder.units.vxm + a for a in range(builder.chip.alus))
    took = builder.latency(op)
    joins: list[_Join] = []

    def join(a: _Copy, b: _Copy, at: int) -> _Copy:
        slot = Slot(pool, at, at + took, bits)
        request.slots.append(slot)
        joins.append(_Join(at, a, b, slot))
        return _Copy(at + took, slot=slot)

    waiting: list[_Copy] = []
    for cycle in sorted({copy.at for copy in ready}):
        now = [copy for copy in ready if copy.at == cycle]
        for i in range(0, len(now), 2):
            pair = now[i : i + 2]
            waiting.append(join(pair[0], pair[-1], cycle))
    while len(waiting) > 1:
        waiting.sort(key=lambda copy: copy.at)
        a, b = waiting[:2]
        waiting[:2] = [join(a, b, max(a.at, b.at))]
    return joins
