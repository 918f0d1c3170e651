"""In: a Table. Out: nothing; ProgramError if a queue, an ALU or a plane is asked what it cannot."""

from __future__ import annotations

import numpy as np

from openlpu import isa
from openlpu.check.table import I64, Group, Table

_SECOND = ("write", "scatter", "setbase")  # a MEM queue issues one of these beside a read or gather


def demand_units(table: Table) -> None:
    """Raise unless every queue, ALU and plane can do what the section asks."""
    _queues(table)
    _repeats(table)
    _banks(table)
    _taps(table)
    _installs(table)
    _slots(table)


def joined(groups: list[Group], *parts: list[I64]) -> tuple[I64, ...]:
    """row and time of the groups' events, then the other parts, each as one array."""
    columns = [[group.row for group in groups], [group.time for group in groups], *parts]
    return tuple(np.concatenate([np.zeros(0, np.int64), *column]) for column in columns)


def latest(keys: I64, wanted: I64) -> I64:
    """Index of the last of the sorted keys that is not above each wanted one; -1 if none."""
    return np.searchsorted(keys, wanted, side="right") - 1


def _queues(table: Table) -> None:
    """At most one issue a cycle; in a MEM queue, one of either sort."""
    groups = list(table.groups.values())
    ports = [2 * group.queue + (group.kind.name in _SECOND) for group in groups]
    row, time, port = joined(groups, ports)
    key = port * table.section.cycles + time
    order = np.argsort(key, kind="stable")
    again = np.zeros(len(key), np.bool_)
    again[order[1:]] = key[order[1:]] == key[order[:-1]]
    table.refuse(again, row, time, "the queue issues another in this cycle")


def _repeats(table: Table) -> None:
    """Not more repetitions under way in a queue than it has registers for."""
    parts, owners = [], []
    span = table.section.cycles + 1
    for group in table.groups.values():
        at = np.flatnonzero(group.issue_last > group.issue_first)
        queue, first, last = group.issue_queue[at], group.issue_first[at], group.issue_last[at]
        # One that ended in the cycle before does not count any more: ends sort before beginnings.
        parts += [2 * (queue * span + first) + 1, 2 * (queue * span + last + 1)]
        owners += [group.issue_row[at], group.issue_row[at]]
    if not parts:
        return
    key, row = np.concatenate(parts), np.concatenate(owners)
    order = np.argsort(key, kind="stable")
    key, row = key[order], row[order]
    under_way = np.cumsum(np.where(key % 2 == 1, 1, -1))
    what = f"more than {table.chip.repeats} repetitions are under way in the queue"
    table.refuse(under_way > table.chip.repeats, row, key // 2 % span, what)


def _banks(table: Table) -> None:
    """A read and a write of a slice in one cycle are in different banks."""
    keys, sides = [], []
    for names in (("read", "gather"), ("write", "scatter")):
        groups = list(table.of(*names))
        row, time, queue, word = joined(
            groups, [group.queue for group in groups], [group.stepped for group in groups]
        )
        keys.append(queue * table.section.cycles + time)
        sides.append((row, time, word // table.chip.words_per_bank))
    _, one, other = np.intersect1d(keys[0], keys[1], assume_unique=True, return_indices=True)
    row, time, bank = sides[0]
    bad = bank[one] == sides[1][2][other]
    table.refuse(bad, row[one], time[one], "a write uses the same bank in this cycle")


def _taps(table: Table) -> None:
    """An ALU delivers one result a cycle, and a tap finds one."""
    for group in table.of("vxm"):
        span = table.section.cycles
        alu = group.queue - isa.units(table.chip).vxm
        done = group.time + table.latency(group)
        inside = np.flatnonzero(done < span)  # later results are dropped
        key = (alu * span + done)[inside]
        order = np.argsort(key, kind="stable")
        again = np.zeros(len(done), np.bool_)
        again[inside[order[1:]]] = key[order[1:]] == key[order[:-1]]
        table.refuse(again, group.row, group.time, "another result comes at the same cycle")
        for letter in "abc":
            at = np.flatnonzero(group.field(f"{letter}_from") == isa.Source.TAP)
            source, delay = np.divmod(group.field(f"{letter}_at")[at], isa.DELAYS)
            then = group.time[at] - delay
            bad = (then < 0) | ~np.isin(source * span + then, key)
            what = f"operand {letter}: the ALU delivered nothing then"
            table.refuse(bad, group.row[at], group.time[at], what)


def _plane(table: Table, queue: I64) -> I64:
    return (queue - isa.units(table.chip).load) // 3


def _installs(table: Table) -> None:
    """An install follows a load that is done; an act follows an install that is done."""
    chip, span = table.chip, table.section.cycles + table.chip.latency.mxm_install
    keys = {name: np.zeros(0, np.int64) for name in ("load", "install")}
    for group in table.of("load", "install"):
        keys[group.kind.name] = np.sort(_plane(table, group.queue) * span + group.time)
    for group in table.of("install"):
        # From here on planes lie one after the other on one long line of cycles.
        begin = _plane(table, group.queue) * span
        own = begin + group.time
        loaded = np.append(keys["load"], [-1])[latest(keys["load"], own)]
        before = np.append(keys["install"], [-1])[latest(keys["install"], own - 1)]
        bad = loaded < np.maximum(begin, before)
        table.refuse(bad, group.row, group.time, "no load came since the last install")
        bad = loaded + chip.latency.mxm_load > own
        table.refuse(bad, group.row, group.time, "the last load is not done")
    for group in table.of("act"):
        begin = _plane(table, group.queue) * span
        ready = keys["install"] + chip.latency.mxm_install
        at = latest(ready, begin + group.time)
        bad = np.append(keys["install"], [-1])[at] < begin
        table.refuse(bad, group.row, group.time, "nothing is installed on the plane")


def _slots(table: Table) -> None:
    """A slot is written before it is added to, and done before it is read."""
    chip, span = table.chip, table.section.cycles + table.chip.latency.mxm_dot
    acts = np.zeros(0, np.int64)
    for group in table.of("act"):
        begin = (_plane(table, group.queue) * chip.accumulators + group.stepped) * span
        key = begin + group.time
        order = np.argsort(key)
        acts = key[order]
        fresh = np.append([-1], begin[order])[:-1] != begin[order]
        bad = np.zeros(len(key), np.bool_)
        bad[order] = fresh & (group.field("add") != 0)[order]
        table.refuse(bad, group.row, group.time, "there is nothing to add to in its slot")
    for group in table.of("out"):
        begin = (_plane(table, group.queue) * chip.accumulators + group.stepped) * span
        own = begin + group.time
        last = np.append(acts, [-1])[latest(acts, own)]
        table.refuse(last < begin, group.row, group.time, "its slot is empty")
        bad = last + chip.latency.mxm_dot > own
        table.refuse(bad, group.row, group.time, "the last act on its slot is not done")
