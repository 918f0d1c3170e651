"""In: weights in memory and int8 vectors. Out: products in a plane's accumulators."""

from __future__ import annotations

from dataclasses import dataclass

from openlpu.chip import EAST, WEST
from openlpu.errors import DoesNotFit
from openlpu.schedule.expression import Accumulator
from openlpu.schedule.memory import Buffer
from openlpu.schedule.section import SectionBuilder, after
from openlpu.schedule.table import Flow, Request, burst


@dataclass(frozen=True, slots=True)
class Tile:
    """Weights of one plane as they lie in memory: stream j of group g in slices[j], words[j] + g.

    row: a vector is a row of the plane (else a column). groups: (first group of the plane, first
    group in memory, how many), in the order to load them. ready: all words, from that cycle on."""

    slices: tuple[int, ...]
    words: tuple[int, ...]
    groups: tuple[tuple[int, int, int], ...]
    row: bool
    base: int = 0
    ready: int = 0
    mode: int = 0


def outward(builder: SectionBuilder, plane: int) -> int:
    """The direction in which streams run towards a plane."""
    return EAST if plane >= builder.chip.planes_per_hemisphere else WEST


def load(builder: SectionBuilder, plane: int, tile: Tile) -> None:
    """Bring a tile into the plane's buffer, as soon as the buffer is free, and install it once the
    products with the old weights have begun."""
    chip, state = builder.chip, builder.planes[plane]
    x, queue = chip.mxm_position(plane), builder.queue("load", plane)
    places = tuple(chip.mem_position(s) for s in tile.slices)
    earliest, last = state.installed + 1, 0
    for group, at, count in tile.groups:
        bits = burst(count, 1)
        request = Request([(queue, 0, bits)], [], [])
        for s, word, place in zip(tile.slices, tile.words, places, strict=True):
            begin = -abs(x - place) - chip.latency.mem_read
            builder.access(request, "read", s, word + at, begin, bits)
        flow = Flow(outward(builder, plane), places, x, 0, bits, chip.install_streams)
        request.flows.append(flow)
        far = max(abs(x - place) for place in places) + chip.latency.mem_read
        start = builder.table.place(request, max(earliest, tile.ready + far))
        step = 1 if count > 1 else 0
        args = (group, step, builder.number(flow), int(tile.row), tile.mode)
        builder.issue(start, queue, "load", args, count, 1)
        for j, (s, word, place) in enumerate(zip(tile.slices, tile.words, places, strict=True)):
            begin = start - abs(x - place) - chip.latency.mem_read
            read = (word + at, step, tile.base, builder.number(flow, j))
            builder.issue(begin, s, "read", read, count, 1)
        last = max(last, start + count - 1)
    # Of several tiles the first one may be the last to arrive.
    state.loaded = max(state.loaded, last + chip.latency.mxm_load)


def install(builder: SectionBuilder, plane: int) -> None:
    """What was loaded becomes the plane's weights."""
    state, queue = builder.planes[plane], builder.queue("load", plane)
    earliest = max(state.loaded, state.last_act - builder.chip.latency.mxm_install + 1)
    state.installed = builder.table.place(Request([(queue, 0, 1)], [], []), earliest)
    builder.issue(state.installed, queue, "install", (), 1, 1)


def accumulators(builder: SectionBuilder, plane: int, count: int) -> Accumulator:
    """`count` accumulators of a plane, those that are free first."""
    free = builder.planes[plane].free
    entry = min((e for e in free if e[2] >= count), default=None)
    if entry is None:
        free.sort(key=lambda e: e[1])
        merged: list[tuple[int, int, int]] = []
        for cycle, slot, size in free:
            if merged and merged[-1][1] + merged[-1][2] == slot:
                before = merged.pop()
                merged.append((max(before[0], cycle), before[1], before[2] + size))
            else:
                merged.append((cycle, slot, size))
        free[:] = merged
        entry = min((e for e in free if e[2] >= count), default=None)
        if entry is None:
            raise DoesNotFit(
                f"the accumulators of a plane of {builder.chip.name}",
                count,
                max((e[2] for e in free), default=0),
                "vectors at once",
                ("fewer --rows",),
            )
    free.remove(entry)
    cycle, slot, size = entry
    if size > count:
        free.append((cycle, slot + count, size - count))
    return Accumulator(plane, slot, 1, cycle, 0)


def act(
    builder: SectionBuilder, into: Accumulator, x: Buffer, count: int, *, add: bool
) -> Accumulator:
    """Products of `count` vectors with the weights of the plane; the accumulators, with their
    times. x must lie in the plane's hemisphere."""
    chip, state = builder.chip, builder.planes[into.plane]
    position, queue = chip.mxm_position(into.plane), builder.queue("act", into.plane)
    place = chip.mem_position(x.slices[0])
    begin = -abs(position - place) - chip.latency.mem_read
    bits = burst(count, 1)
    flow = Flow(outward(builder, into.plane), (place,), position, 0, bits, 1)
    request = Request([(queue, 0, bits)], [flow], [])
    builder.access(request, "read", x.slices[0], x.words[0], begin, bits)
    earliest = max(state.installed + chip.latency.mxm_install, after(x, count, 1) - begin)
    before = into.ready - chip.latency.mxm_dot + 1 if add else into.ready
    start = builder.table.place(request, max(earliest, before))
    several = count > 1
    args = (into.slot, int(several), builder.number(flow), 1, int(add))
    builder.issue(start, queue, "act", args, count, 1)
    read = (x.words[0], x.step if several else 0, x.base, builder.number(flow))
    builder.issue(start + begin, x.slices[0], "read", read, count, 1)
    state.last_act = max(state.last_act, start + count - 1)
    return Accumulator(into.plane, into.slot, 1, start + chip.latency.mxm_dot, 1)
