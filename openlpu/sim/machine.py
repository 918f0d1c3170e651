"""In: what units read and send, cycle by cycle. Out: the chip's state inside one section.

A cycle is arrive(), then every issue reads and sends, then move(). What a unit sends is kept until
the cycle at which it stands, so the order of the issues of one cycle cannot matter.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from openlpu.chip import Chip
from openlpu.errors import MachineError
from openlpu.program import Section
from openlpu.sim.decode import Instruction
from openlpu.sim.result import Where

U8 = NDArray[np.uint8]
I8 = NDArray[np.int8]
I32 = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Register:
    """A base register. highest: what it can hold at most, whatever the data say; legality must not
    depend on data, so it is judged by this."""

    value: int
    highest: int


@dataclass(frozen=True, slots=True)
class Write:
    """Lane l of value into word words[l] of a slice, where lanes[l]."""

    slice: int
    words: NDArray[np.int64]
    lanes: NDArray[np.bool_]
    value: U8


@dataclass(slots=True)
class Slot:
    """An accumulator; last_act is the cycle of the act that added to it last."""

    value: I32
    last_act: int


@dataclass(slots=True)
class Plane:
    """An MXM plane. Loads may change the buffer at once: no install sees them too early, because
    one that comes too early is an error. weights: (first cycle that sees them, weights)."""

    buffer: I8
    last_load: int | None = None  # since the last install
    weights: list[tuple[int, I8]] = field(default_factory=list)
    slots: dict[int, Slot] = field(default_factory=dict)


class Machine:
    """Streams, histories, planes and bases of one run of a section; memory is the chip's."""

    def __init__(
        self,
        chip: Chip,
        memory: U8,
        maps: NDArray[np.int16],
        section: Section,
        bases: dict[tuple[int, int], int],
    ) -> None:
        self.chip, self.memory, self.maps, self.section = chip, memory, maps, section
        self.cycle = 0
        self.hops = 0
        self.streams: dict[tuple[int, int], U8] = {}  # (stream, position)
        self.history: dict[int, dict[int, I32]] = {}  # cycle of delivery, ALU
        self.bases = {place: Register(value, value) for place, value in bases.items()}
        shape = (chip.lanes, chip.lanes)
        self.planes = [Plane(np.zeros(shape, np.int8)) for _ in range(chip.planes)]
        self._taken: set[tuple[int, int]] = set()
        # What stands at a later cycle.
        self._puts: dict[int, list[tuple[Instruction, int, U8]]] = defaultdict(list)
        self._results: dict[int, list[tuple[Instruction, I32]]] = defaultdict(list)
        self._writes: dict[int, list[Write]] = defaultdict(list)
        self._sets: dict[int, list[tuple[tuple[int, int], Register]]] = defaultdict(list)

    def fault(self, instruction: Instruction, what: str) -> MachineError:
        """The error that `what` is wrong with an instruction in this cycle."""
        where = Where(self.section.name, self.cycle, instruction.issue)
        return where.fault(self.chip, what)

    # -- what units do in a cycle

    def result(self, instruction: Instruction, alu: int, delay: int) -> I32:
        """What an ALU delivered `delay` cycles ago."""
        newest = self.history.get(self.cycle - delay, {})
        if alu not in newest:
            raise self.fault(instruction, f"alu{alu} delivered nothing {delay} cycles ago")
        return newest[alu]

    def read(self, instruction: Instruction, stream: int, take: bool) -> U8:
        """The value in the unit's register of a stream."""
        place = stream, instruction.place.position
        if place not in self.streams:
            raise self.fault(instruction, f"stream {stream} is empty at position {place[1]}")
        if take:
            self._taken.add(place)
        return self.streams[place]

    def put(self, instruction: Instruction, stream: int, value: U8) -> None:
        """A value onto a stream, after the instruction's latency."""
        cycle = self.cycle + instruction.latency
        if cycle >= self.section.cycles:
            raise self.fault(instruction, f"its result at cycle {cycle} comes after the section")
        self._puts[cycle].append((instruction, stream, value))

    def deliver(self, instruction: Instruction, value: I32) -> None:
        """The result of an ALU."""
        self._results[self.cycle + instruction.latency].append((instruction, value))

    def store(self, instruction: Instruction, write: Write | None) -> None:
        """A write to memory; None for one that is turned off, which takes its time all the same."""
        cycle = self.cycle + instruction.latency
        if cycle > self.section.cycles:
            raise self.fault(instruction, f"it writes until cycle {cycle}, after the section")
        if write is not None:
            self._writes[cycle].append(write)

    def set_base(self, instruction: Instruction, reg: int, register: Register) -> None:
        """A new value of a base register of the unit's slice."""
        place = instruction.place.index, reg
        self._sets[self.cycle + instruction.latency].append((place, register))

    def weights(self, instruction: Instruction) -> I8:
        """What the unit's plane multiplies by in this cycle."""
        plane = self.planes[instruction.place.index]
        seen = [weights for cycle, weights in plane.weights if cycle <= self.cycle]
        if not seen:
            raise self.fault(instruction, "nothing is installed on the plane")
        return seen[-1]

    # -- the cycle itself

    def arrive(self) -> None:
        """What was sent for this cycle stands now."""
        for instruction, stream, value in self._puts.pop(self.cycle, []):
            place = stream, instruction.place.position
            if place in self.streams:
                what = f"stream {stream} has another value at position {place[1]}"
                raise self.fault(instruction, what)
            self.streams[place] = value
        newest: dict[int, I32] = {}
        for instruction, result in self._results.pop(self.cycle, []):
            if instruction.place.index in newest:
                raise self.fault(instruction, "two results of the ALU come in one cycle")
            newest[instruction.place.index] = result
        self.history[self.cycle] = newest
        self.history.pop(self.cycle - self.chip.history_cycles, None)
        for write in self._writes.pop(self.cycle, []):
            self._commit(write)
        self.bases.update(self._sets.pop(self.cycle, []))

    def _commit(self, write: Write) -> None:
        lanes = np.flatnonzero(write.lanes)
        self.memory[write.slice, write.words[lanes], lanes] = write.value[lanes]

    def move(self) -> None:
        """Every value that was not taken goes on to its next register; the clock ticks."""
        moved: dict[tuple[int, int], U8] = {}
        for (stream, position), value in self.streams.items():
            if (stream, position) in self._taken:
                continue
            further = position + (1 if stream >= self.chip.streams else -1)
            if 0 <= further < self.chip.positions:
                moved[stream, further] = value
                self.hops += 1
        self.streams = moved
        self._taken.clear()
        self.cycle += 1

    def end(self) -> None:
        """The section is over: nothing may be on its way."""
        for stream, position in sorted(self.streams):
            what = f"stream {stream} still holds a value at position {position}"
            raise Where(self.section.name, self.cycle).fault(self.chip, what)
        for write in self._writes.pop(self.cycle, []):
            self._commit(write)
