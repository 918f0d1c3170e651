"""In: a Section and a Chip. Out: Table, its issues as arrays, group by group; or ProgramError.

Two rows of figures for every group: one per issue, and one per event, an event being one repetition
of an issue. Everything that check and cost compute is computed on these arrays.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from openlpu import isa
from openlpu.chip import Chip
from openlpu.errors import ProgramError
from openlpu.program import Issue, Program, Section

I64 = NDArray[np.int64]
Bools = NDArray[np.bool_]

LONGEST = 1 << 31  # cycles that a section cannot have; keys of events stay below 2**63
_UNLINKED = ("icu", "c2c")
# `repeat` says how often more, and how far apart.
_MOST_REPEATS, _LONGEST_PERIOD = ((1 << field.bits) - 1 for field in isa.KINDS["repeat"].fields)
# All operations of the VXM have the same fields and make one group; of the rest each makes its own.
_GROUP_OF = {kind.name: "vxm" if kind.unit == "vxm" else kind.name for kind in isa.KINDS.values()}


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """Issues with the same fields. issue_*: per issue; the rest: per event."""

    kind: isa.Kind  # one of theirs
    issue_row: I64  # in Section.issues
    issue_code: I64  # isa.OPCODES
    issue_args: I64  # [issues, fields]
    issue_first: I64  # first cycle
    issue_last: I64
    issue_queue: I64
    of: I64  # which of the group's issues
    time: I64  # cycle
    stepped: I64  # the field that moves; 0 if none does

    def issue_field(self, name: str) -> I64:
        return self.issue_args[:, self.kind.index(name)]

    def field(self, name: str) -> I64:
        """A field that does not move, per event."""
        return self.issue_field(name)[self.of]

    @property
    def row(self) -> I64:
        return self.issue_row[self.of]

    @property
    def queue(self) -> I64:
        return self.issue_queue[self.of]

    @property
    def code(self) -> I64:
        return self.issue_code[self.of]


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """A section, taken apart."""

    program: Program
    chip: Chip
    section: Section
    groups: dict[str, Group]

    def of(self, *names: str) -> Iterator[Group]:
        """The groups of these names that have issues."""
        for name in names:
            if name in self.groups:
                yield self.groups[name]

    def latency(self, group: Group) -> I64:
        """Of each event."""
        return _latencies(self.chip)[group.code]

    def refuse(self, bad: Bools, row: I64, time: I64, what: str) -> None:
        """Raise for the earliest event that is bad."""
        if bad.any():
            found = np.flatnonzero(bad)
            first = found[np.argmin(time[found])]
            fail(self.chip, what, self.section, int(row[first]), int(time[first]))

    def refuse_issue(self, group: Group, bad: Bools, what: str) -> None:
        """Raise for the first issue of a group that is bad."""
        self.refuse(bad, group.issue_row, group.issue_first, what)


@functools.lru_cache(maxsize=16)
def _latencies(chip: Chip) -> I64:
    """Of each of isa.OPCODES; 0 of what never stands in a section."""
    kinds = isa.KINDS.values()
    found = [isa.latency(chip, kind) if kind.latency else 0 for kind in kinds]
    return np.array(found, np.int64)


@functools.lru_cache(maxsize=16)
def queue_positions(chip: Chip) -> I64:
    """Where the unit behind each queue stands."""
    queues = range(isa.units(chip).count)
    return np.array([isa.place(chip, queue).position for queue in queues], np.int64)


def fail(
    chip: Chip, what: str, section: Section | None = None, row: int = -1, time: int = -1
) -> NoReturn:
    """Raise ProgramError: one line that names section, cycle, queue and instruction, if known."""
    parts = [f"section {section.name!r}"] if section else []
    if time >= 0:
        parts.append(f"cycle {time}")
    if section and row >= 0:
        issue = section.issues[row]
        known = 0 <= issue.queue < isa.units(chip).count
        parts.append(isa.queue_name(chip, issue.queue) if known else f"queue {issue.queue}")
        parts.append(_text(issue))
    place = ", ".join(parts)
    raise ProgramError(f"{place}: {what}" if place else what)


def _text(issue: Issue) -> str:
    kind = isa.KINDS.get(issue.op)
    if kind is None or len(kind.fields) != len(issue.args):
        return f"{issue.op}{issue.args}"
    pairs = (f"{f.name}={v}" for f, v in zip(kind.fields, issue.args, strict=True))
    return f"{issue.op}({', '.join(pairs)})"


def tabulate(program: Program, chip: Chip, section: Section) -> Table:
    """The table of a section whose issues have known kinds, whole numbers, and cycles inside."""
    if not 0 <= section.cycles < LONGEST:
        fail(chip, f"{section.cycles} cycles are no length", section)
    members: dict[str, list[int]] = {}
    for row, issue in enumerate(section.issues):
        kind = isa.KINDS.get(issue.op)
        if kind is None:
            fail(chip, "there is no such instruction", section, row)
        if kind.unit in _UNLINKED:
            fail(chip, f"instructions of {kind.unit} never stand in a section", section, row)
        if len(issue.args) != len(kind.fields):
            fail(chip, f"the instruction has {len(kind.fields)} fields", section, row)
        members.setdefault(_GROUP_OF[issue.op], []).append(row)
    try:
        figures = np.array(
            [(i.cycle, i.queue, i.count, i.period, i.tag) for i in section.issues], np.int64
        ).reshape(-1, 5)
    except OverflowError:
        fail(chip, "a number has more than 64 bits", section)
    table = Table(program, chip, section, {})
    _demand_times(table, figures)
    _demand_order(table, figures)
    for name, rows in members.items():
        table.groups[name] = _group(table, np.array(rows, np.int64), figures)
    return table


def _demand_times(table: Table, figures: I64) -> None:
    cycle, queue, count, period, tag = figures.T
    rows = np.arange(len(figures))
    cycles = table.section.cycles

    def refuse(bad: Bools, what: str) -> None:
        table.refuse(bad, rows, cycle, what)

    refuse((queue < 0) | (queue >= isa.units(table.chip).count), "there is no such queue")
    refuse((count < 1) | (count - 1 > _MOST_REPEATS), f"count is not in 1 .. {_MOST_REPEATS + 1}")
    refuse((period < 1) | (period > _LONGEST_PERIOD), f"period is not in 1 .. {_LONGEST_PERIOD}")
    refuse((count == 1) & (period != 1), "without repetitions, period is 1")
    refuse((tag < 0) | (tag >= len(table.section.tags)), "there is no such tag")
    # The first two conditions keep the third from overflowing.
    beyond = (count > cycles) | ((count > 1) & (period > cycles)) | (cycle < 0) | (cycle >= cycles)
    refuse(beyond, "it does not issue inside the section")
    last = cycle + (count - 1) * np.where(count > 1, period, 0)
    refuse(last >= cycles, "its last repetition is not in the section")


def _demand_order(table: Table, figures: I64) -> None:
    """Issues stand sorted by (queue, cycle, op, args)."""
    issues = table.section.issues
    cycle, queue = figures[:, 0], figures[:, 1]
    queues, cycles = np.diff(queue), np.diff(cycle)
    wrong = (queues < 0) | ((queues == 0) & (cycles < 0))
    for row in np.flatnonzero((queues == 0) & (cycles == 0)):
        one, next_one = issues[row], issues[row + 1]
        wrong[row] = (one.op, one.args) > (next_one.op, next_one.args)
    if wrong.any():
        row = int(np.argmax(wrong)) + 1
        fail(table.chip, "issues are not sorted by queue, cycle, op, args", table.section, row)


def _group(table: Table, rows: I64, figures: I64) -> Group:
    issues = [table.section.issues[row] for row in rows]
    kind = isa.KINDS[issues[0].op]
    try:
        args = np.array([issue.args for issue in issues], np.int64).reshape(len(rows), -1)
    except OverflowError:
        fail(table.chip, f"a field of {kind.name} has more than 64 bits", table.section)
    cycle, queue, count, period, _ = figures[rows].T
    _demand_fields(table, kind, args, rows, cycle)
    of = np.repeat(np.arange(len(rows)), count)
    repetition = np.arange(len(of)) - np.repeat(np.cumsum(count) - count, count)
    stepped = np.zeros(len(of), np.int64)
    if kind.stepped >= 0:
        stepped = args[of, kind.stepped] + repetition * args[of, kind.index("step")]
    codes = np.array([isa.OPCODES[issue.op] for issue in issues], np.int64)
    time = cycle[of] + repetition * period[of]
    last = cycle + (count - 1) * np.where(count > 1, period, 0)
    return Group(kind, rows, codes, args, cycle, last, queue, of, time, stepped)


def _demand_fields(table: Table, kind: isa.Kind, args: I64, rows: I64, cycle: I64) -> None:
    """Every field holds what its bits can."""
    for column, field in enumerate(kind.fields):
        low = -(1 << field.bits - 1) if field.signed else 0
        high = low + (1 << field.bits) - 1
        bad = (args[:, column] < low) | (args[:, column] > high)
        table.refuse(bad, rows, cycle, f"{field.name} is not in {low} .. {high}")
