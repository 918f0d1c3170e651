"""In: a Table. Out: the flows of its streams: that no value meets another or is missed, and hops.

A value moves one register a cycle, so cycle minus registers passed never changes on its way. That
number and the stream name a flow. The events of a flow, sorted, are a row of puts, reads and takes:
a put must follow a take or nothing, and a read or a take must follow a put or a read. Events are
packed into one integer each, so that sorting is all the work.

    key = ((stream * span + flow) * positions + progress) * KINDS + kind

progress: registers between the end where the stream's values come from and the event.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from openlpu import isa
from openlpu.check.fields import port_width
from openlpu.check.table import I64, Bools, Group, Table, fail, queue_positions

PUT, READ, TAKE, KINDS = 0, 1, 2, 4


@dataclass(frozen=True, slots=True, eq=False)
class Use:
    """Events that put to or read from `width` neighbouring streams."""

    group: Group
    event: I64  # which of the group's
    first: I64  # stream
    width: int
    time: I64
    kind: I64


@dataclass(frozen=True, slots=True, eq=False)
class Flows:
    """All stream events of a section, sorted; a take that happens twice stands once."""

    span: int  # flows of a stream
    positions: int
    keys: I64

    @property
    def kind(self) -> I64:
        return self.keys % KINDS

    @property
    def progress(self) -> I64:
        return self.keys // KINDS % self.positions

    @property
    def flow(self) -> I64:
        """Stream and flow, as one number."""
        return self.keys // (KINDS * self.positions)

    @property
    def last(self) -> Bools:
        """Whether an event is the last of its flow."""
        flow = self.flow
        return np.append(flow[1:] != flow[:-1], [True])[: len(flow)]


def find_flows(table: Table) -> Flows:
    """The flows of a section."""
    span, positions = table.section.cycles + table.chip.positions, table.chip.positions
    parts = [_keys(table, use, span).ravel() for use in _uses(table)]
    keys = np.sort(np.concatenate([np.zeros(0, np.int64), *parts]))
    again = (keys[1:] == keys[:-1]) & (keys[1:] % KINDS == TAKE)
    return Flows(span, positions, np.delete(keys, np.flatnonzero(again) + 1))


def demand_flows(table: Table, flows: Flows) -> None:
    """Raise unless every value is put where none is, and every read finds one."""
    cycles = table.section.cycles
    for use in _uses(table):
        late = (use.kind == PUT) & (use.time >= cycles)
        what = "its result comes after the section"
        table.refuse(late, use.group.row[use.event], use.group.time[use.event], what)
    kind, last = flows.kind, flows.last
    before = np.full(len(kind), TAKE)  # nothing before is as good as a take
    before[1:] = np.where(last[:-1], TAKE, kind[:-1])
    bad = np.where(kind == PUT, before != TAKE, before == TAKE)
    if bad.any():
        _explain(table, flows, int(np.argmax(bad)))
    # What is never taken reaches the end of the chip, and must be gone when the section ends.
    stands = last & (kind != TAKE) & (flows.flow % flows.span + 1 > cycles)
    if stands.any():
        key = int(flows.flow[np.argmax(stands)])
        fail(table.chip, f"stream {key // flows.span} holds a value at the end", table.section)


def count_hops(flows: Flows) -> int:
    """Moves of single values from register to register, in a section without faults."""
    kind, progress = flows.kind, flows.progress
    lost = flows.last & (kind != TAKE)
    ends = int(progress[kind == TAKE].sum()) + (flows.positions - 1) * int(lost.sum())
    return ends - int(progress[kind == PUT].sum())


def _uses(table: Table) -> Iterator[Use]:
    for group in table.groups.values():
        latency = table.latency(group)
        if group.kind.unit == "vxm":
            yield from _alu_uses(table, group, latency)
        for port in (*group.kind.reads, *group.kind.writes):
            widths = port_width(table, group, port)[group.of]
            first = group.field(port.field)
            if port in group.kind.writes:
                kind, time = np.full(len(first), PUT), group.time + latency
            else:
                takes = group.field(port.take) != 0 if port.take else np.ones(len(first), np.bool_)
                kind, time = np.where(takes, TAKE, READ), group.time
            for width in np.unique(widths):
                at = np.flatnonzero(widths == width)
                yield Use(group, at, first[at], int(width), time[at], kind[at])


def _alu_uses(table: Table, group: Group, latency: I64) -> Iterator[Use]:
    for letter in "abc":
        source, place = group.field(f"{letter}_from"), group.field(f"{letter}_at")
        for kind, width in isa.SOURCE_WIDTH.items():
            at = np.flatnonzero(source == kind)
            takes = np.where(place[at] % 2 == 1, TAKE, READ)
            yield Use(group, at, place[at] // 2, width, group.time[at], takes)
    widths = group.field("width")
    for side, offset in (("west", 0), ("east", table.chip.streams)):
        number = group.field(side)
        for width in (1, 2, 4):
            at = np.flatnonzero((widths == width) & (number > 0))
            puts = np.full(len(at), PUT)
            yield Use(group, at, offset + number[at] - 1, width, (group.time + latency)[at], puts)


def _keys(table: Table, use: Use, span: int) -> I64:
    """[events, width]"""
    streams = use.first[:, None] + np.arange(use.width)
    place = queue_positions(table.chip)[use.group.queue[use.event]]
    east = use.first >= table.chip.streams
    progress = np.where(east, place, table.chip.positions - 1 - place)
    # Not negative: a flow that enters with the first cycle at the last register is number 0. Puts
    # after the section are refused elsewhere and only must not reach another stream's keys.
    flow = np.minimum(use.time - progress + table.chip.positions - 1, span - 1)
    rest = (flow * table.chip.positions + progress) * KINDS + use.kind
    keys: I64 = streams * (span * table.chip.positions * KINDS) + rest[:, None]
    return keys


def _explain(table: Table, flows: Flows, index: int) -> None:
    """Raise for one bad event, found again among the instructions."""
    key, kind = int(flows.keys[index]), int(flows.kind[index])
    stream = int(flows.flow[index]) // flows.span
    other = "it meets another value" if kind == PUT else "there is nothing"
    for use in _uses(table):
        found = np.flatnonzero((_keys(table, use, flows.span) == key).any(axis=1))
        if len(found):
            event = int(use.event[found[-1]])
            row, time = int(use.group.row[event]), int(use.group.time[event])
            fail(table.chip, f"stream {stream}: {other}", table.section, row, time)
