"""In: values and the slices they pass. Out: writes, scatters and base loads along their way.

What goes to a place known only when the step begins: each value is sent from the VXM past all
slices that might keep it, and base registers, loaded the same way a moment before, say which one
does.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field, replace

from openlpu import isa
from openlpu.schedule.expression import Leaf
from openlpu.schedule.memory import Buffer
from openlpu.schedule.section import SectionBuilder, after
from openlpu.schedule.table import Flow, InItsOwnWayError, Request, Slot, burst

_STRETCHES = 8  # how far apart sends are moved at most, times their distance


@dataclass(frozen=True, slots=True)
class Visit:
    """What slice `slice` does with byte `part` of a value that passes: op is write, setbase or
    scatter; word and base, or reg, lane and limit."""

    slice: int
    op: str
    part: int = 0
    word: int = 0
    base: int = 0
    lane: int = 0
    limit: int = 0


@dataclass(slots=True)
class Send:
    """A value of 1 or 2 bytes that leaves the VXM `at` cycles after the task's first one. The
    slices farthest out take it. with_map: the send whose value is the map of this one's scatters;
    all of their slices stand at one position."""

    at: int
    value: Buffer
    visits: list[Visit] = field(default_factory=list)
    with_map: int = -1


def deliver(
    builder: SectionBuilder, sends: list[Send], count: int, period: int, *, earliest: int = 0
) -> int:
    """Place all sends as one task, for `count` elements, at least `period` cycles apart. All
    visited slices lie in one hemisphere. Returns the cycle of the task's first send."""
    tries = 2 * builder.chip.positions if count > 1 else 1
    for stretch in range(1, _STRETCHES + 1):
        # its reads and writes may meet in a bank: at other distances they do not
        apart = [replace(send, at=send.at * stretch) for send in sends]
        for longer in range(tries):
            try:
                return _deliver(builder, apart, count, period * stretch + longer, earliest)
            except InItsOwnWayError:
                continue
    raise InItsOwnWayError("values cannot be delivered: they meet in a bank at any distance")


def _deliver(
    builder: SectionBuilder, sends: list[Send], count: int, period: int, earliest: int
) -> int:
    chip = builder.chip
    bits = burst(count, period)
    request = Request([], [], [])
    pool: tuple[Hashable, ...] = tuple(builder.units.vxm + a for a in range(chip.alus))
    took = builder.latency("mov")
    placed: list[tuple[Slot, Flow, Flow]] = []
    visited = [visit.slice for send in sends for visit in send.visits]
    side = int(visited[0] >= chip.slices_per_hemisphere)
    x = chip.vxm_position
    start = earliest
    for send in sends:
        mapped = [s for s in sends if s.with_map >= 0 and sends[s.with_map] is send]
        stops = [v.slice for s in (send, *mapped) for v in s.visits]
        far = max((chip.mem_position(s) for s in stops), key=lambda p: abs(p - x))
        slot = Slot(pool, send.at - took, send.at, bits)
        request.slots.append(slot)
        inward, begun = builder.fetch(request, Leaf(send.value), send.at - took, bits)
        start = max(start, after(send.value, count, period) - begun)
        width = send.value.width
        outward = Flow(side, (x,) * width, far, send.at + abs(far - x), bits, width)
        request.flows.append(outward)
        for visit in send.visits:
            at = send.at + abs(chip.mem_position(visit.slice) - x)
            request.fixed.append((("write", visit.slice), at, bits))
            if visit.op != "setbase":
                bank = visit.word // chip.words_per_bank
                request.fixed.append((("bank", visit.slice, bank), at, bits))
        placed.append((slot, inward, outward))
    _keep_bases(
        request,
        sends,
        [builder.chip.mem_position(s) for s in range(chip.slices)],
        x,
        count * period,
    )
    begin = builder.table.place(request, start)
    for k, send in enumerate(sends):
        slot, inward, outward = placed[k]
        builder.emit_fetch(Leaf(send.value), inward, begin + send.at - took, count, period)
        kind = {1: isa.Source.BYTE, 2: isa.Source.HALF, 4: isa.Source.WORD}[send.value.width]
        ends = [0, 0]
        ends[side] = outward.stream + 1
        operand = (int(kind), builder.number(inward) * 2 + 1, 0, 0, 0, 0)
        args = (*operand, 0, send.value.width, *ends)
        assert isinstance(slot.chosen, int)
        builder.issue(begin + send.at - took, slot.chosen, "mov", args, count, period)
        for visit in send.visits:
            stream = builder.number(outward, visit.part)
            place = chip.mem_position(visit.slice)
            at = begin + send.at + abs(place - x)
            take = int(place == outward.end)
            if visit.op == "setbase":
                args = (visit.base, visit.lane, visit.limit, stream, take)
            elif visit.op == "write":
                args = (visit.word, 0, visit.base, stream, take)
            else:
                maps = builder.number(placed[send.with_map][2])
                assert take and place == placed[send.with_map][2].end
                args = (visit.word, 0, visit.base, stream, maps, take, visit.limit)
            builder.issue(at, visit.slice, visit.op, args, count, period)
    return begin


def _keep_bases(
    request: Request, sends: list[Send], positions: list[int], x: int, cycles: int
) -> None:
    """Nobody else loads the base of a slice from its first use here to the last."""
    loaded = {v.slice: send.at for send in sends for v in send.visits if v.op == "setbase"}
    for s, at in loaded.items():
        begins = at + abs(positions[s] - x)
        request.fixed.append((("base", s), begins, burst(cycles, 1)))
