"""In: what a task occupies, relative to its start. Out: the earliest start that collides with
nothing.

The reservation table holds one bit per cycle: of each port and queue, and of each stream register.
A stream register's cycles are kept in the frame that moves with the stream, where a value that
passes many registers has the same bit in all of them.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from openlpu.chip import Chip


@lru_cache(maxsize=4096)
def burst(count: int, period: int) -> int:
    """Bits 0, period, 2 * period, ... : `count` of them."""
    bits, have = 1, 1
    while have < count:
        more = min(have, count - have)
        bits |= (bits & ((1 << (more - 1) * period + 1) - 1)) << have * period
        have += more
    return bits


@dataclass(slots=True)
class Flow:
    """A value of `width` streams on its way: stream b leaves position starts[b] so that all reach
    `end` together, `arrives` cycles after the task's start. stream: the first one, once placed;
    first: demanded by whoever needs a certain one, else -1."""

    direction: int
    starts: tuple[int, ...]
    end: int
    arrives: int
    bits: int
    align: int
    stream: int = -1


@dataclass(slots=True)
class Slot:
    """One of several equal queues, busy `at` cycles after the start, with a result at `result` that
    must be its only one in that cycle. chosen: once placed."""

    pool: tuple[Hashable, ...]
    at: int
    result: int
    bits: int
    chosen: Hashable = None


@dataclass(slots=True)
class Request:
    """All that a task occupies. fixed: (resource, cycles after the start, bits)."""

    fixed: list[tuple[Hashable, int, int]]
    flows: list[Flow]
    slots: list[Slot]


class InItsOwnWayError(Exception):
    """No start suits a request: two of its own parts collide."""


class Table:
    """Reservations of one section."""

    def __init__(self, chip: Chip) -> None:
        self._chip = chip
        self._busy: dict[Hashable, int] = {}
        self._load: dict[tuple[Hashable, ...], NDArray[np.int16]] = {}  # busy queues per cycle
        # [direction][stream][position]: bits in the moving frame
        self._streams = [[[0] * chip.positions for _ in range(chip.streams)] for _ in range(2)]

    def place(self, request: Request, earliest: int) -> int:
        """Reserve the request at the first start >= earliest where it fits; the start.

        Raises InItsOwnWayError if it would not fit even into an empty table."""
        start = max(earliest, _first_start(request))
        demand = _Demand.of(request)
        if not Table(self._chip)._reserve(request, start):
            raise InItsOwnWayError("a task is in its own way")
        while True:
            start = demand.first_start(self._load, start)
            if not self._blocked(request, start) and self._reserve(request, start):
                demand.add(self._load, start)
                return start
            start += 1

    def _blocked(self, request: Request, start: int) -> bool:
        """Whether a fixed resource is taken at this start."""
        return any(
            (self._busy.get(resource, 0) >> (start + at)) & bits
            for resource, at, bits in request.fixed
        )

    def _reserve(self, request: Request, start: int) -> bool:
        """Reserve everything, or nothing."""
        done_flows: list[Flow] = []
        done_slots: list[Slot] = []
        fine = True
        for slot in request.slots:
            if not self._take_slot(slot, start):
                fine = False
                break
            done_slots.append(slot)
        if fine:
            for flow in request.flows:
                if not self._take_flow(flow, start):
                    fine = False
                    break
                done_flows.append(flow)
        if fine and self._take_fixed(request, start):
            return True
        for flow in done_flows:
            self._mark(flow, start, flow.stream)
        for slot in done_slots:
            self._busy[slot.chosen] ^= slot.bits << (start + slot.at)
            self._busy["result", slot.chosen] ^= slot.bits << (start + slot.result)
        return False

    def _take_fixed(self, request: Request, start: int) -> bool:
        taken: list[tuple[Hashable, int]] = []
        for resource, at, bits in request.fixed:
            moved = bits << (start + at)
            old = self._busy.get(resource, 0)
            if old & moved:  # two of the request's own parts
                for other, mark in taken:
                    self._busy[other] ^= mark
                return False
            self._busy[resource] = old | moved
            taken.append((resource, moved))
        return True

    def _take_slot(self, slot: Slot, start: int) -> bool:
        issue, result = slot.bits << (start + slot.at), slot.bits << (start + slot.result)
        for queue in slot.pool:
            issues, results = self._busy.get(queue, 0), self._busy.get(("result", queue), 0)
            if not issues & issue and not results & result:
                self._busy[queue] = issues | issue
                self._busy["result", queue] = results | result
                slot.chosen = queue
                return True
        return False

    def _take_flow(self, flow: Flow, start: int) -> bool:
        streams = self._streams[flow.direction]
        width = len(flow.starts)
        moved = flow.bits << self._frame(flow, start)
        ways = [self._way(flow, begin) for begin in flow.starts]
        for first in range(0, self._chip.streams - width + 1, flow.align):
            if all(not streams[first + b][x] & moved for b, way in enumerate(ways) for x in way):
                flow.stream = first
                self._mark(flow, start, first)
                return True
        return False

    def _mark(self, flow: Flow, start: int, first: int) -> None:
        """Flip the flow's bits: reserve it, or give it back."""
        streams = self._streams[flow.direction]
        moved = flow.bits << self._frame(flow, start)
        for b, begin in enumerate(flow.starts):
            registers = streams[first + b]
            for x in self._way(flow, begin):
                registers[x] ^= moved

    def _way(self, flow: Flow, begin: int) -> range:
        """Positions from begin to the flow's end, both included."""
        return range(begin, flow.end + 1) if begin <= flow.end else range(flow.end, begin + 1)

    def _frame(self, flow: Flow, start: int) -> int:
        """The cycle at which the flow would pass the position where its direction begins."""
        last = self._chip.positions - 1
        travelled = flow.end if flow.direction else last - flow.end
        return start + flow.arrives - travelled + last


@dataclass(slots=True)
class _Demand:
    """How many queues of each pool a request needs per cycle, from cycle `first` on: a start where
    too many are busy is passed over without a try."""

    parts: list[tuple[tuple[Hashable, ...], int, NDArray[np.int16]]]

    @staticmethod
    def of(request: Request) -> _Demand:
        by_pool: dict[tuple[Hashable, ...], list[Slot]] = {}
        for slot in request.slots:
            by_pool.setdefault(slot.pool, []).append(slot)
        parts = []
        for pool, slots in by_pool.items():
            first = min(slot.at for slot in slots)
            need = np.zeros(max(s.at + s.bits.bit_length() for s in slots) - first, np.int16)
            for slot in slots:
                digits = np.frombuffer(bin(slot.bits)[:1:-1].encode(), np.uint8) - ord("0")
                need[slot.at - first : slot.at - first + len(digits)] += digits
            parts.append((pool, first, need))
        return _Demand(parts)

    def first_start(self, load: dict[tuple[Hashable, ...], NDArray[np.int16]], start: int) -> int:
        """The first start at or after `start` at which every pool has enough queues."""
        while True:
            for pool, first, need in self.parts:
                busy = load.get(pool)
                if busy is None or start + first >= len(busy):
                    continue
                window = busy[start + first : start + first + len(need)]
                if (window + need[: len(window)] > len(pool)).any():
                    start += 1
                    break
            else:
                return start

    def add(self, load: dict[tuple[Hashable, ...], NDArray[np.int16]], start: int) -> None:
        """Count the request's queues as busy."""
        for pool, first, need in self.parts:
            busy = load.get(pool, np.zeros(1024, np.int16))
            end = start + first + len(need)
            if end > len(busy):
                busy = np.concatenate([busy, np.zeros(end, np.int16)])
            busy[start + first : end] += need
            load[pool] = busy


def _first_start(request: Request) -> int:
    """The first start at which nothing happens before cycle 0."""
    first = min((at for _, at, _ in request.fixed), default=0)
    first = min([first, *(slot.at for slot in request.slots)])
    for flow in request.flows:
        first = min([first, *(flow.arrives - abs(flow.end - begin) for begin in flow.starts)])
    return max(0, -first)
