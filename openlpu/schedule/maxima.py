"""In: up to 16 vectors of words. Out: the maximum over lanes of each, in every lane.

A transposition makes of 16 vectors the 16 lanes of their superlanes: vector i then holds lane i of
all of them, and lane p belongs to vector p. So one tree of joins finds the maxima of all vectors
inside superlanes, and a second one, of turned superlanes, those over segments. On its way back into
memory a copy for each vector spreads its lane over the others. This is one trip more than a single
maximum takes, but the joins of one maximum serve 16.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace

from openlpu.chip import EAST, WEST, Chip
from openlpu.schedule.expression import Expression, Leaf, side_of
from openlpu.schedule.functions import joined
from openlpu.schedule.memory import QUAD, Buffer
from openlpu.schedule.reduce import trip
from openlpu.schedule.section import SectionBuilder, after
from openlpu.schedule.table import Flow, InItsOwnWayError, Request, Slot, burst

TOGETHER = 16  # vectors, and lanes, that a transposition exchanges
FEWEST = QUAD  # vectors of a group: each of its quads holds one
_WORD = 4


def can_group(chip: Chip) -> bool:
    """Whether a hemisphere reads the 16 bytes of a transposition at once, and streams hold them."""
    return chip.slices_per_hemisphere >= TOGETHER and chip.streams >= TOGETHER


def group_sizes(n: int, chip: Chip) -> list[int]:
    """How n vectors form groups, as even as possible; a group of 1 is reduced alone."""
    if n < FEWEST or not can_group(chip):
        return [1] * n
    groups = -(-n // TOGETHER)
    return [n // groups + int(i < n % groups) for i in range(groups)]


def reduce_group(
    builder: SectionBuilder,
    sources: Sequence[Buffer],
    op: str,
    segment: int,
    count: int,
) -> list[Buffer]:
    """Maxima (op max or fmax) over each `segment` lanes of `count` elements of each source.

    sources: FEWEST .. 16 buffers of one Memory.scratch_apart."""
    chip, memory = builder.chip, builder.memory
    lines = _transposed(builder, sources, count)
    _give_back(builder, sources, lines[0], count)
    pair = tuple(memory.scratch(_WORD, count, hemisphere=h, outer=True) for h in (WEST, EAST))
    e = Expression()
    # neighbours lie in different quads, so both can be fetched at once
    twos = [e.op(op, Leaf(a), Leaf(b)) for a, b in zip(lines[::2], lines[1::2], strict=True)]
    e.write(joined(e, op, twos), *pair)
    written = builder.evaluate(e, count)
    west, east = (written[buffer] for buffer in pair)
    _give_back(builder, lines, west, count)
    superlanes = segment // chip.superlane_lanes
    if superlanes > 1:
        across = [("permute", builder.maps.rotation(segment, k)) for k in range(superlanes)]
        pair = tuple(memory.scratch(_WORD, count, hemisphere=h, outer=True) for h in (WEST, EAST))
        found = trip(builder, west, east, across, op, count, pair)
        _give_back(builder, (west, east), found[0], count)
        west, east = found
    spread = [_spread(builder, (west, east)[p % 2], p, count) for p in range(len(sources))]
    last = max(spread, key=lambda buffer: buffer.ready + (count - 1) * buffer.period)
    _give_back(builder, (west, east), last, count)
    return spread


def _give_back(builder: SectionBuilder, read: Sequence[Buffer], result: Buffer, count: int) -> None:
    """What is read is free once the result is complete."""
    for buffer in read:
        builder.memory.give_back(buffer, result.ready + (count - 1) * result.period)


def _transposed(builder: SectionBuilder, sources: Sequence[Buffer], count: int) -> list[Buffer]:
    """Vector i: lane i of every superlane of the sources, lane p from source p. The lanes of
    sources that do not exist get what lies in the slices these would have: no one reads them."""
    side = side_of(sources[0], builder.chip)
    lines = builder.memory.scratch_apart(TOGETHER, count, side)
    planes = []
    for b in range(_WORD):
        taken = [
            (sources[p], b) if p < len(sources) else (sources[p % QUAD], (b + p // QUAD) % _WORD)
            for p in range(TOGETHER)
        ]
        given = [(line, b) for line in lines]
        planes.append(_through(builder, "transpose", (), taken, given, count))
    return [
        replace(
            line,
            ready=max(plane[i].ready for plane in planes),
            period=max(plane[i].period for plane in planes),
        )
        for i, line in enumerate(lines)
    ]


def _spread(builder: SectionBuilder, source: Buffer, lane: int, count: int) -> Buffer:
    """A lane of each superlane in all of its lanes."""
    side = side_of(source, builder.chip)
    out = builder.memory.scratch(_WORD, count, hemisphere=side, outer=False)
    taken, given = ([(buffer, b) for b in range(_WORD)] for buffer in (source, out))
    args = (1, 1, builder.maps.spread(lane))
    written = _through(builder, "distribute", args, taken, given, count)
    ready = max(buffer.ready for buffer in written)
    return replace(out, ready=ready, period=written[0].period)


def _through(
    builder: SectionBuilder,
    name: str,
    args: tuple[int, ...],
    sources: Sequence[tuple[Buffer, int]],
    targets: Sequence[tuple[Buffer, int]],
    count: int,
) -> list[Buffer]:
    """Bytes of buffers from memory through an instruction of the SXM into memory, elements as close
    as their reads and writes allow; the targets' buffers, with their times."""
    interval = 1
    while True:
        try:
            return _spaced_through(builder, name, args, sources, targets, count, interval)
        except InItsOwnWayError:
            interval += 1


def _spaced_through(
    builder: SectionBuilder,
    name: str,
    args: tuple[int, ...],
    sources: Sequence[tuple[Buffer, int]],
    targets: Sequence[tuple[Buffer, int]],
    count: int,
    interval: int,
) -> list[Buffer]:
    """Time 0 is when the SXM issues."""
    chip = builder.chip
    side = side_of(sources[0][0], chip)
    x = chip.sxm_position(side)
    bits, took = burst(count, interval), builder.latency(name)
    first = builder.units.sxm + side * chip.sxm_queues
    pool: tuple[Hashable, ...] = tuple(range(first, first + chip.sxm_queues))
    slot = Slot(pool, 0, took, bits)
    starts = tuple(chip.mem_position(buffer.slices[b]) for buffer, b in sources)
    ends = [chip.mem_position(buffer.slices[b]) for buffer, b in targets]
    far = max(ends, key=lambda place: abs(place - x))
    outward = Flow(side, starts, x, 0, bits, len(starts))
    inward = Flow(1 - side, (x,) * len(ends), far, took + abs(far - x), bits, len(ends))
    request = Request([], [outward, inward], [slot])
    start = 0
    for (buffer, b), place in zip(sources, starts, strict=True):
        begin = -abs(x - place) - chip.latency.mem_read
        builder.access(request, "read", buffer.slices[b], buffer.words[b], begin, bits)
        start = max(start, after(buffer, count, interval) - begin)
    for (buffer, b), place in zip(targets, ends, strict=True):
        at = took + abs(x - place)
        builder.access(request, "write", buffer.slices[b], buffer.words[b], at, bits)
        start = max(start, buffer.ready - at)
    begun = builder.table.place(request, start)
    several = int(count > 1)
    for k, ((buffer, b), place) in enumerate(zip(sources, starts, strict=True)):
        begin = begun - abs(x - place) - chip.latency.mem_read
        read = (buffer.words[b], several * buffer.step, buffer.base, builder.number(outward, k))
        builder.issue(begin, buffer.slices[b], "read", read, count, interval)
    assert isinstance(slot.chosen, int)
    move = (builder.number(outward), builder.number(inward), *args)
    builder.issue(begun, slot.chosen, name, move, count, interval)
    written = []
    for k, ((buffer, b), place) in enumerate(zip(targets, ends, strict=True)):
        at = begun + took + abs(x - place)
        write = (buffer.words[b], several * buffer.step, buffer.base, builder.number(inward, k), 1)
        builder.issue(at, buffer.slices[b], "write", write, count, interval)
        written.append(replace(buffer, ready=at + chip.latency.mem_write, period=interval))
    return written
