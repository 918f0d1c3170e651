"""In: a Program, its Chip and parameters. Out: Utilization: what is busy when, and what binds.

A slot is one cycle of one queue (of a MEM queue one for reads and one for writes), or one cycle of
one stream register. Slots that stand in for each other form a pool: a MEM slice or MXM plane is one
of its own, because data lives there; all ALUs are one; the SXM queues of a hemisphere are one; of
the streams, the registers of one direction at one position. An operation is bound by the unit with
the fullest pool while it lasts; if no pool is busy half of that time, it waits for results, and
what binds is "latency".
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from openlpu.chip import EAST, Chip
from openlpu.errors import ProgramError
from openlpu.isa import place, units
from openlpu.program import Params, Program, Section, cycles
from openlpu.viz.flows import Flows, flows
from openlpu.viz.outline import prove_drawable, run_counts

UNITS = (
    "MEM read",
    "MEM write",
    "MXM load",
    "MXM act",
    "MXM out",
    "VXM",
    "SXM",
    "streams",
)
LATENCY = "latency"
_READS = ("read", "gather")
_BINDS_FROM = 0.5
_MOST_CYCLES = 1 << 53  # of a step, and runs of a section: the page's numbers are float64

I64 = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Use:
    """Slots of a unit. tightest: the share of its fullest pool."""

    unit: str
    busy: int
    slots: int
    tightest: float

    @property
    def share(self) -> float:
        return self.busy / self.slots if self.slots else 0.0


@dataclass(frozen=True, slots=True)
class OperationUse:
    """All issues with one tag. Cycles are those of issue, in the section, both ends included."""

    tag: str
    first_cycle: int
    last_cycle: int
    issues: int
    uses: tuple[Use, ...]
    binds: str

    @property
    def cycles(self) -> int:
        return self.last_cycle - self.first_cycle + 1


@dataclass(frozen=True, slots=True)
class SectionUse:
    """One section, run once. runs: how often it runs in a step; issues: repetitions counted."""

    name: str
    cycles: int
    runs: int
    issues: int
    uses: tuple[Use, ...]
    binds: str
    operations: tuple[OperationUse, ...]


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """Bytes of one kind in one region; "" stands for words outside every region."""

    region: str
    what: str
    bytes: int


@dataclass(frozen=True, slots=True)
class Utilization:
    """A whole step. uses and binds are over all runs of all sections."""

    cycles: int
    seconds: float
    issues: int
    uses: tuple[Use, ...]
    binds: str
    sections: tuple[SectionUse, ...]
    memory: tuple[MemoryUse, ...]
    memory_bytes: int

    @property
    def used_bytes(self) -> int:
        return sum(entry.bytes for entry in self.memory)


def utilization(program: Program, chip: Chip, params: Params) -> Utilization:
    """The figures of a step. Raises RequestError for params, ProgramError if it is malformed."""
    prove_drawable(program, chip, params)
    pools = _Pools(chip)
    counts, total = run_counts(program, params), cycles(program, params)
    if max(total, *counts, 0) > _MOST_CYCLES:
        raise ProgramError(f"a step has {total:,} cycles; {_MOST_CYCLES:,} can be shown")
    sections, whole, issues = [], np.zeros(pools.count, np.int64), 0
    for section, runs in zip(program.sections, counts, strict=True):
        busy = pools.busy(section, flows(section, chip))
        found = _section(section, runs, pools, busy)
        sections.append(found)
        whole += runs * busy.sum(axis=0)
        issues += runs * found.issues
    uses = pools.uses(whole, total)
    return Utilization(
        cycles=total,
        seconds=total / chip.clock_hz,
        issues=issues,
        uses=uses,
        binds=what_binds(uses),
        sections=tuple(sections),
        memory=_memory(program, chip),
        memory_bytes=chip.memory_bytes,
    )


def what_binds(uses: tuple[Use, ...]) -> str:
    """The unit whose fullest pool is fullest, or LATENCY if none is busy half of the time."""
    tightest = max(uses, key=lambda use: use.tightest)
    return tightest.unit if tightest.tightest >= _BINDS_FROM else LATENCY


def occupancy(program: Program, chip: Chip) -> tuple[tuple[str, ...], NDArray[np.uint16]]:
    """Kinds of contents, and per slice and word 0 (free) or 1 + the index of its kind.

    A word that several parts of the program name counts once: image before `used` before ports."""
    kinds: dict[str, int] = {}
    words = np.zeros((chip.slices, chip.words), np.uint16)
    most = np.iinfo(words.dtype).max

    def paint(what: str, slice_index: int, rows: slice | I64) -> None:
        number = kinds.setdefault(what, len(kinds) + 1)
        if number > most:
            raise ProgramError(f"memory holds more than {most:,} kinds of contents")
        line = words[slice_index]
        line[rows] = np.where(line[rows] == 0, number, line[rows])

    for segment in program.image:
        paint(segment.what, segment.slice, slice(segment.word, segment.word + len(segment.data)))
    for what, slice_index, word, count in program.used:
        paint(what, slice_index, slice(word, word + count))
    for port in program.ports:
        for vector in port.vectors:
            rows = vector.word + np.arange(port.rows) * vector.row_step
            for slice_index in vector.slices:
                paint(f"port {port.name}", slice_index, rows)
    return tuple(kinds), words


class _Pools:
    """Pools of equal slots, numbered unit by unit."""

    def __init__(self, chip: Chip) -> None:
        self.chip = chip
        sizes = (
            [1] * chip.slices,
            [1] * chip.slices,
            *([1] * chip.planes for _ in range(3)),
            [chip.alus],
            [chip.sxm_queues] * 2,
            [chip.streams] * (2 * chip.positions),
        )
        self.sizes = np.array([size for unit in sizes for size in unit], np.int64)
        self.firsts = np.cumsum([0, *(len(unit) for unit in sizes)])
        self.count = len(self.sizes)

    @cached_property
    def of_queue(self) -> list[int]:
        """A queue's pool; for a MEM queue that of its reads."""
        first = dict(
            zip(("mem", "", "load", "act", "out", "vxm", "sxm"), self.firsts, strict=False)
        )
        found = []
        for queue in range(units(self.chip).count):
            where = place(self.chip, queue)
            index = {"vxm": 0, "sxm": where.index // self.chip.sxm_queues}
            found.append(int(first[where.unit]) + index.get(where.unit, where.index))
        return found

    def busy(self, section: Section, values: Flows) -> I64:
        """Busy slots, per tag and pool."""
        found = np.zeros((len(section.tags), self.count), np.int64)
        for issue in section.issues:
            pool = self.of_queue[issue.queue]
            if issue.queue < self.chip.slices and issue.op not in _READS:
                pool += int(self.firsts[1])
            found[issue.tag, pool] += issue.count
        # Each value is in one register a cycle, from its first to its last one: two marks, and a
        # running sum along the line.
        positions = self.chip.positions
        marks = np.zeros((len(section.tags), 2, positions + 1), np.int64)
        tags = np.array([issue.tag for issue in section.issues], np.int64)[values.issue]
        direction = np.where(values.stream >= self.chip.streams, EAST, 1 - EAST)
        np.add.at(marks, (tags, direction, values.along), 1)
        np.add.at(marks, (tags, direction, values.along + values.hops + 1), -1)
        held = np.cumsum(marks, axis=2)[:, :, :positions]
        found[:, self.firsts[7] :] = held.reshape(len(section.tags), -1)
        return found

    def uses(self, busy: I64, cycles: int) -> tuple[Use, ...]:
        """Busy slots per pool, over so many cycles, as one Use for each unit."""
        found = []
        for unit, first, end in zip(UNITS, self.firsts[:-1], self.firsts[1:], strict=True):
            slots = self.sizes[first:end] * cycles
            shares = busy[first:end] / np.maximum(slots, 1)
            total = int(busy[first:end].sum())
            found.append(Use(unit, total, int(slots.sum()), float(shares.max())))
        return tuple(found)


def _section(section: Section, runs: int, pools: _Pools, busy: I64) -> SectionUse:
    extents: dict[int, tuple[int, int, int]] = {}
    for issue in section.issues:
        first, last, count = extents.get(issue.tag, (issue.cycle, issue.last_cycle, 0))
        extents[issue.tag] = (
            min(first, issue.cycle),
            max(last, issue.last_cycle),
            count + issue.count,
        )
    operations = []
    for tag, (first, last, count) in sorted(extents.items(), key=lambda e: (e[1][:2], e[0])):
        uses = pools.uses(busy[tag], last - first + 1)
        operations.append(
            OperationUse(section.tags[tag], first, last, count, uses, what_binds(uses))
        )
    uses = pools.uses(busy.sum(axis=0), section.cycles)
    return SectionUse(
        name=section.name,
        cycles=section.cycles,
        runs=runs,
        issues=sum(operation.issues for operation in operations),
        uses=uses,
        binds=what_binds(uses),
        operations=tuple(operations),
    )


def _memory(program: Program, chip: Chip) -> tuple[MemoryUse, ...]:
    kinds, words = occupancy(program, chip)
    found = []
    outside = np.ones(chip.words, np.bool_)
    stretches = []
    for region in chip.regions:
        inside = np.zeros(chip.words, np.bool_)
        inside[region.first_word : region.first_word + region.words] = True
        outside &= ~inside
        stretches.append((region.name, inside))
    for name, inside in (*stretches, ("", outside)):
        counts = np.bincount(words[:, inside].ravel(), minlength=len(kinds) + 1)
        for what, count in zip(kinds, counts[1:], strict=True):
            if count:
                found.append(MemoryUse(name, what, int(count) * chip.lanes))
    return tuple(found)
