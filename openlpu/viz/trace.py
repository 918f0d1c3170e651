"""In: a Program, its Chip and parameters. Out: a trace for ui.perfetto.dev or chrome://tracing.

One process per unit, one track per queue and per group of four streams, on the time axis of a whole
step. Of each loop one iteration is drawn; the others are one slice. A burst is one event with its
count and period. Events that overlap on a queue (a MEM queue reads and writes; bursts interleave)
stand on further tracks of it, because slices of one track may only nest.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from openlpu.chip import Chip
from openlpu.isa import place, queue_name
from openlpu.program import Params, Program, Section, cycles
from openlpu.viz.flows import flows, instruction_text
from openlpu.viz.outline import Span, prove_drawable, spans

STREAM_GROUP = 4
# Events in full; beyond, a section that was drawn before is only named. Keeps a file near 10 MB.
MOST_EVENTS = 60_000
_PICO = 10**12

Event = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Bar:
    """A slice inside a section. track: "mem.w3 read"; process: where the track stands."""

    process: str
    order: int
    track: str
    name: str
    start: int
    cycles: int
    args: dict[str, Any]


def trace(program: Program, chip: Chip, params: Params) -> dict[str, Any]:
    """The trace as a JSON object. Equal programs give equal objects."""
    prove_drawable(program, chip, params)
    writer = _Writer(chip.clock_hz)
    drawn: dict[int, int] = {}
    bars: dict[int, list[Bar]] = {}
    for span in spans(program, params):
        name, args = _told(program, span)
        if span.section >= 0:
            if span.section not in bars:
                bars[span.section] = list(_bars(program.sections[span.section], chip))
            inside = bars[span.section]
            again = span.section in drawn
            if again and len(writer.events) + len(inside) > MOST_EVENTS:
                args["drawn at cycle"] = drawn[span.section]
                inside = []
            drawn.setdefault(span.section, span.start_cycle)
            for bar in inside:
                writer.add(bar, span.start_cycle)
        # Spans come in order and nest, so one track per depth shows them as a flame graph.
        track = f"plan, level {span.depth + 1}"
        writer.add(Bar("step", span.depth, track, name, span.start_cycle, span.cycles, args), 0)
    return {
        "displayTimeUnit": "ns",
        "otherData": {
            "chip": program.chip,
            "clock_hz": chip.clock_hz,
            "cycles": cycles(program, params),
            "params": {name: list(values) for name, values in sorted(params.items())},
        },
        "traceEvents": [*writer.metadata(), *writer.events],
    }


def trace_bytes(program: Program, chip: Chip, params: Params, *, packed: bool = False) -> bytes:
    """The trace as a file's contents; packed: gzip, with no time or name in it."""
    text = json.dumps(trace(program, chip, params), separators=(",", ":"), ensure_ascii=True)
    data = (text + "\n").encode()
    return gzip.compress(data, 6, mtime=0) if packed else data


@dataclass(slots=True)
class _Writer:
    """Numbers processes and tracks, and keeps the slices of a track from overlapping."""

    clock_hz: int
    events: list[Event] = field(default_factory=list)
    processes: dict[str, int] = field(default_factory=dict)
    # (process, track) -> per lane its number and the cycle at which it is free again
    lanes: dict[tuple[str, str], list[list[int]]] = field(default_factory=dict)
    tracks: list[tuple[int, int, str, int]] = field(default_factory=list)

    def add(self, bar: Bar, offset: int) -> None:
        start, end = bar.start + offset, bar.start + offset + bar.cycles
        process = self.processes.setdefault(bar.process, len(self.processes) + 1)
        lanes = self.lanes.setdefault((bar.process, bar.track), [])
        lane = next((lane for lane in lanes if lane[1] <= start), None)
        if lane is None:
            lane = [len(self.tracks) + 1, 0]
            name = f"{bar.track} ({len(lanes) + 1})" if lanes else bar.track
            lanes.append(lane)
            self.tracks.append((process, lane[0], name, bar.order))
        lane[1] = end
        self.events.append(
            {
                "name": bar.name,
                "ph": "X",
                "pid": process,
                "tid": lane[0],
                "ts": self.time_us(start),
                "dur": round(self.time_us(end) - self.time_us(start), 6),
                "args": {"cycle": bar.start, **bar.args},
            }
        )

    def time_us(self, cycle: int) -> float:
        """Microseconds, the format's unit, to the picosecond; rounded down, so never crossing."""
        return cycle * _PICO // self.clock_hz / 1e6

    def metadata(self) -> list[Event]:
        found = []
        # The step first, then as the units stand on the chip.
        ordered = sorted(self.processes, key=lambda name: (name != "step", _ORDER.index(name)))
        for index, name in enumerate(ordered):
            of = {"ph": "M", "pid": self.processes[name], "tid": 0, "ts": 0}
            found.append({"name": "process_name", **of, "args": {"name": name}})
            found.append({"name": "process_sort_index", **of, "args": {"sort_index": index}})
        for process, number, name, order in sorted(self.tracks, key=lambda t: (t[0], t[3], t[1])):
            of = {"ph": "M", "pid": process, "tid": number, "ts": 0}
            found.append({"name": "thread_name", **of, "args": {"name": name}})
            found.append({"name": "thread_sort_index", **of, "args": {"sort_index": order}})
        return found


_ORDER = (
    "step",
    "MXM",
    "VXM",
    "SXM west",
    "SXM east",
    "MEM west",
    "MEM east",
    "streams west",
    "streams east",
)


def _told(program: Program, span: Span) -> tuple[str, dict[str, Any]]:
    """A span's name and figures."""
    if span.section >= 0:
        return program.sections[span.section].name, {"cycles": span.cycles}
    if span.first == span.last:
        return f"{span.var} {span.first}", {"cycles": span.cycles}
    times = span.last - span.first + 1
    name = f"{span.var} {span.first}..{span.last}, x{times}, {span.cycles:,} cycles"
    return name, {"cycles": span.cycles, "times": times}


def _bars(section: Section, chip: Chip) -> Iterator[Bar]:
    """Slices of a section, by cycle."""
    found = [*_queue_bars(section, chip), *_stream_bars(section, chip)]
    found.sort(key=lambda bar: (bar.start, bar.process, bar.order, bar.track, bar.name))
    yield from found


def _queue_bars(section: Section, chip: Chip) -> Iterator[Bar]:
    for issue in section.issues:
        unit, track = place(chip, issue.queue).unit, queue_name(chip, issue.queue)
        process = "VXM" if unit == "vxm" else "MXM"
        if unit in ("mem", "sxm"):
            process = f"{unit.upper()} {'east' if '.e' in track else 'west'}"
        order = 2 * issue.queue
        if unit == "mem":
            reads = issue.op in ("read", "gather")
            track, order = f"{track} {'read' if reads else 'write'}", order + (not reads)
        args: dict[str, Any] = {"op": issue.op, "fields": instruction_text(issue)}
        if issue.count > 1:
            args |= {"count": issue.count, "period": issue.period}
        name = f"{section.tags[issue.tag]} {issue.op}".strip()
        length = issue.last_cycle - issue.cycle + 1
        yield Bar(process, order, track, name, issue.cycle, length, args)


@dataclass(frozen=True, slots=True)
class Busy:
    """A group of four streams of one direction holds values of one operation, without a gap."""

    group: int  # stream // STREAM_GROUP
    tag: int
    start: int
    end: int  # the first cycle after it
    values: int
    hops: int


def stream_intervals(section: Section, chip: Chip) -> list[Busy]:
    """When each group of streams is busy, per operation, by (group, operation, cycle)."""
    values = flows(section, chip)
    if not len(values.issue):
        return []
    tags = np.array([issue.tag for issue in section.issues], np.int64)[values.issue]
    groups = values.stream // STREAM_GROUP
    ends = values.cycle + values.hops + 1
    order = np.lexsort((ends, values.cycle, tags, groups))
    group, tag, start, end, hops = (
        column[order] for column in (groups, tags, values.cycle, ends, values.hops)
    )
    # Each (group, operation) on an axis of its own, one behind the other: then the latest end so
    # far is a running maximum, and a gap is a start behind it.
    axis = (group * len(section.tags) + tag) * (int(ends.max()) + 2)
    latest = np.maximum.accumulate(axis + end)
    fresh = np.concatenate([[0], 1 + np.flatnonzero((axis + start)[1:] > latest[:-1])])
    columns = (
        group[fresh],
        tag[fresh],
        start[fresh],
        np.maximum.reduceat(end, fresh),
        np.diff([*fresh, len(order)]),
        np.add.reduceat(hops, fresh),
    )
    return [Busy(*row) for row in zip(*(c.tolist() for c in columns), strict=True)]


def _stream_bars(section: Section, chip: Chip) -> Iterator[Bar]:
    for busy in stream_intervals(section, chip):
        side, first = divmod(busy.group * STREAM_GROUP, chip.streams)
        process = f"streams {('west', 'east')[side]}"
        track = f"streams {'we'[side]}{first}-{first + STREAM_GROUP - 1}"
        name = section.tags[busy.tag] or "values"
        args = {"values": busy.values, "hops": busy.hops}
        yield Bar(process, busy.group, track, name, busy.start, busy.end - busy.start, args)
