"""In: a Table. Out: Needs, what its accesses ask of the bases that a run loads; or ProgramError.

The word of an access is its own plus a base. That the sum stays in its bank is proved here for
bases that the section sets itself, from their limits; for bases that a run of the section loads, it
leaves one number per register: the room, which the highest base must not exceed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from openlpu.check.form import Extremes
from openlpu.check.table import I64, Table, fail
from openlpu.check.units import joined, latest

_ACCESSES = ("read", "write", "gather", "scatter")
_LEAVES = "the word leaves its bank"


@dataclass(frozen=True, slots=True, eq=False)
class Needs:
    """Per base register that a section uses as loaded: slice, register, room, an access."""

    place: I64  # slice * base_registers + register, no two the same
    room: I64
    row: I64
    time: I64


def demand_memory(table: Table) -> Needs:
    """Raise unless accesses stay in their banks, as far as the section decides it."""
    chip = table.chip
    for group in table.of("write", "scatter"):
        late = group.time + table.latency(group) > table.section.cycles
        table.refuse(late, group.row, group.time, "it is not done when the section ends")
    groups = list(table.of(*_ACCESSES))
    span = [
        group.field("limit") if group.kind.name in ("gather", "scatter") else 0 * group.time
        for group in groups
    ]
    place = [group.queue * chip.base_registers + group.field("base") for group in groups]
    row, time, place_of, word, reach = joined(
        groups, place, [group.stepped for group in groups], span
    )
    room = chip.words_per_bank - 1 - word % chip.words_per_bank - reach
    fixed = place_of % chip.base_registers == 0
    table.refuse(fixed & (room < 0), row, time, _LEAVES)
    limit = _limits(table, place_of, time)
    table.refuse((limit >= 0) & (limit > room), row, time, _LEAVES)
    return _needs(np.flatnonzero(~fixed & (limit < 0)), place_of, room, row, time)


def _limits(table: Table, place: I64, time: I64) -> I64:
    """The limit of the setbase that an access sees; -1 if it sees none."""
    chip = table.chip
    span = table.section.cycles + chip.latency.base_load
    for group in table.of("setbase"):
        own = group.queue * chip.base_registers + group.field("reg")
        keys = own * span + group.time + chip.latency.base_load
        order = np.argsort(keys)
        at = latest(keys[order], place * span + time)
        seen = (at >= 0) & (own[order][at] == place)
        return np.where(seen, group.field("limit")[order][at], -1)
    return np.full(len(place), -1, np.int64)


def _needs(at: I64, place: I64, room: I64, row: I64, time: I64) -> Needs:
    """The access with the least room of each register."""
    order = at[np.lexsort((room[at], place[at]))]
    _, first = np.unique(place[order], return_index=True)
    least = order[first]
    return Needs(place[least], room[least], row[least], time[least])


def demand_bases(table: Table, needs: Needs, bases: Extremes) -> None:
    """Raise unless a run loads what its section needs, for all values of the loops around it."""
    for (slice_index, reg), (lowest, _) in bases.items():
        if lowest < -1:
            what = f"base register {reg} of slice {slice_index} is loaded with {lowest}"
            fail(table.chip, what, table.section)
    registers = table.chip.base_registers
    found = zip(*(part.tolist() for part in _parts(needs)), strict=True)
    for place, room, row, time in found:
        slice_index, reg = divmod(place, registers)
        if (slice_index, reg) not in bases:
            what = f"base register {reg} holds nothing: a run does not load it"
            fail(table.chip, what, table.section, row, time)
        highest = bases[slice_index, reg][1]
        if highest >= 0 and highest > room:
            what = f"{_LEAVES} when a run loads base {highest}"
            fail(table.chip, what, table.section, row, time)


def _parts(needs: Needs) -> tuple[I64, I64, I64, I64]:
    return needs.place, needs.room, needs.row, needs.time
